"""The pictures of a pre-training run, and its copy for TensorBoard."""

import contextlib
from collections.abc import Iterator
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from simsiam.data.arrays import rgb_channels
from simsiam.data.loader import Loader, evenly_spaced
from simsiam.evaluation.metrics import confusion_matrix
from simsiam.plots.curves import plot_confusion, plot_curves, plot_embedding
from simsiam.plots.sheets import plot_neighbours, plot_views
from simsiam.plots.style import escape
from simsiam.runtime import distributed
from simsiam.runtime.files import atomic_write
from simsiam.training.collapse import Monitor
from simsiam.views.augment import Views


class Board:
    """TensorBoard's copy of a run: statistics, pictures and features. On rank 0 only.

    `history`: rows of the statistics so far; `columns`: those to show.
    """

    def __init__(self, folder: str, history: list[dict], columns: tuple[str, ...]):
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run may have begun without TensorBoard, or continue from before its last row:
        # purge what the folder has, and write all rows again.
        self.writer, self.columns = SummaryWriter(folder, purge_step=0), columns
        for row in history:
            self.add_row(row)

    def add_row(self, row: dict) -> None:
        """Add a row of the statistics."""
        for name in self.columns:
            if name in row:
                self.writer.add_scalar(name, row[name], row["epoch"])
        self.writer.flush()

    def add_picture(self, name: str, path: str, epoch: int) -> None:
        """Add a PNG file."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        self.writer.add_image(name, pixels, epoch, dataformats="HWC")

    def add_features(
        self, features: Tensor, names: list[str] | None, images: list[Tensor], epoch: int
    ) -> None:
        """Add features (M x d) with class names and images (uint8, chunks of M x C x H x W)."""
        # TensorBoard shows all images as one of at most 8192 x 8192 pixels.
        side = min(64, images[0].shape[-1])
        thumbnails = torch.cat([F.adaptive_avg_pool2d(x / 255, side) for x in images])
        thumbnails = thumbnails[:, rgb_channels(thumbnails.shape[1])]
        lines = names and [escape(name) for name in names]
        self.writer.add_embedding(features, lines, thumbnails, epoch)

    def close(self) -> None:
        """Write what is left, at the end of the run."""
        self.writer.close()


def as_tiles(columns: list[Tensor]) -> np.ndarray:
    """Arrange columns of images (N x C x H x W, uint8) as N x columns x H x W x 3."""
    tiles = torch.stack(columns, 1).permute(0, 1, 3, 4, 2)
    return tiles[..., rgb_channels(tiles.shape[-1])].cpu().numpy()


def draw_views(path: str, label: str, images: Tensor, views: Views, seed: int) -> None:
    """Draw eight images with their views of the first epoch, and describe each augmentation.

    The eight are evenly spaced over `images`, as a `Data` has them. Views of another size are
    enlarged or reduced to the images' size, without interpolation.
    """
    images = images[evenly_spaced(len(images), 8)]
    indices = torch.arange(len(images))
    loader = Loader(
        images, len(images), seed, indices, views=views, local_slice=lambda n: slice(0, n)
    )
    batch = next(loader.epoch(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (views.mean, views.std))
    columns, names, texts = [torch.cat(list(images.split(512)))[batch.labels]], ["image"], {}
    blank = torch.full_like(columns[0], 255)
    for i, (x, params) in enumerate(zip(views(batch), views.sample(batch), strict=True), 1):
        pixels = (x * std + mean).mul(255).round()
        view = F.interpolate(pixels, blank.shape[2:], mode="nearest-exact").byte()
        size = f", {x.shape[-1]} px" if x.shape != blank.shape else ""
        columns += [view, blank]  # the description is written over the blank tile
        names += [f"view {i}{size}", ""]
        for row in range(len(x)):
            texts[row, len(columns) - 1] = "\n".join(params.describe(row))
    with atomic_write(path) as file:
        title = f"{label}: what the network sees of each image"
        plot_views(as_tiles(columns), names, texts, title, file)


def draw_run(
    path: str, name: str, history: list[dict], monitor: Monitor, board: Board | None = None
) -> None:
    """Draw the curves of a pre-training run, and what its encoder has learned.

    Writes `<path>_curves.png`, `_neighbours.png`, `_embedding.png` and, with test labels,
    `_confusion.png` of the kNN. The queries are test images or, without test labels, training
    images. `name` is the title; `board` gets the pictures too. All ranks must call it; rank 0
    draws.
    """
    result, images = monitor.knn(), monitor.images
    if distributed.rank() > 0:
        return
    has_test = result.queries is not None
    queries, split = (result.queries, "test") if has_test else (result.bank, "training")
    query_images = images.test_images if has_test else images.train_images
    labels = images.test_labels if has_test else images.train_labels
    has_labels = bool((labels >= 0).all())
    epoch = len(history) - 1

    @contextlib.contextmanager
    def picture(kind: str) -> Iterator[IO[bytes]]:
        with atomic_write(f"{path}_{kind}.png") as file:
            yield file
        if board:
            board.add_picture(kind, f"{path}_{kind}.png", epoch)

    with picture("curves") as file:
        plot_curves({name: history}, file)

    chosen = evenly_spaced(len(queries), 8).to(queries.device)
    cosines = queries[chosen] @ result.bank.T
    if not has_test:  # a training image is not its own neighbour
        cosines[torch.arange(len(chosen), device=queries.device), chosen] = -2
    cosines, neighbours = cosines.topk(min(8, len(result.bank) - (not has_test)))
    columns = [query_images[chosen], *(images.train_images[column] for column in neighbours.T)]
    is_same_class = (images.train_labels[neighbours] == labels[chosen][:, None]).cpu().numpy()
    with picture("neighbours") as file:
        plot_neighbours(
            as_tiles([torch.cat(list(column.split(512))) for column in columns]),
            cosines.cpu().numpy(),
            is_same_class if has_labels else None,
            [images.classes[i] if has_labels else "" for i in labels[chosen].tolist()],
            f"{name}: nearest neighbours",
            file,
        )

    chosen = evenly_spaced(len(queries), 2000).to(queries.device)
    names = [images.classes[i] for i in labels[chosen].tolist()] if has_labels else None
    with picture("embedding") as file:
        title = f"{name}: t-SNE of {len(chosen)} {split} images"
        plot_embedding(queries[chosen].cpu().numpy(), names, images.classes, title, file)
    if board:
        board.add_features(queries[chosen], names, list(query_images[chosen].split(512)), epoch)

    if has_test:
        matrix = confusion_matrix(labels, result.ranking[:, 0], len(images.classes))
        with picture("confusion") as file:
            plot_confusion(matrix, images.classes, f"{name}: kNN", file)
