"""Which pictures of a run are drawn, and from what; figures.py has how."""

import contextlib
from collections.abc import Iterator
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from simsiam.data import arrays
from simsiam.data.loader import Loader, evenly_spaced
from simsiam.evaluation import metrics
from simsiam.plots import curves as figures
from simsiam.plots.lettering import printable
from simsiam.runtime import distributed
from simsiam.runtime.files import atomic_write
from simsiam.training.collapse import Monitor
from simsiam.views.augment import Views


class Board:
    """TensorBoard's copy of a run: statistics, pictures, features. On the first rank only."""

    def __init__(self, folder: str, history: list[dict], columns: tuple[str, ...]):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard forgets what the folder's files have, and gets all rows so far anew: a run may
        # have begun without it, or may go on from before its last row.
        self.writer, self.columns = SummaryWriter(folder, purge_step=0), columns
        for row in history:
            self.row(row)

    def row(self, row: dict) -> None:
        """A row of the statistics."""
        for name in self.columns:
            if name in row:
                self.writer.add_scalar(name, row[name], row["epoch"])
        self.writer.flush()

    def picture(self, name: str, path: str, epoch: int) -> None:
        """A PNG file."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        self.writer.add_image(name, pixels, epoch, dataformats="HWC")

    def features(
        self, rows: Tensor, names: list[str] | None, images: list[Tensor], epoch: int
    ) -> None:
        """Features, M x d, with names of classes, and images: uint8, chunks of M x C x H x W."""
        # TensorBoard shows all images as one of at most 8192 x 8192 pixels.
        small = min(64, images[0].shape[-1])
        thumbnails = torch.cat([F.adaptive_avg_pool2d(x / 255, small) for x in images])
        thumbnails = thumbnails[:, arrays.rgb_channels(thumbnails.shape[1])]
        lines = names and [printable(name) for name in names]
        self.writer.add_embedding(rows, lines, thumbnails, epoch)

    def close(self) -> None:
        """To be called at the run's end."""
        self.writer.close()


def tiles(columns: list[Tensor]) -> np.ndarray:
    """Columns of images, N x C x H x W of uint8 each -> N x columns x H x W x 3, for `figures`."""
    found = torch.stack(columns, 1).permute(0, 1, 3, 4, 2)
    return found[..., arrays.rgb_channels(found.shape[-1])].cpu().numpy()


def draw_views(path: str, label: str, images: Tensor, views: Views, seed: int) -> None:
    """A picture of eight images, and their views as the network gets them in the first epoch, each
    with what chance has done to it in words.

    `images`: of a `Data`, from which those evenly apart are taken. Views of another size are shown
    as large, each of their pixels a square.
    """
    images = images[evenly_spaced(len(images), 8)]
    places = torch.arange(len(images))
    loader = Loader(
        images, len(images), seed, places, views=views, local_slice=lambda n: slice(0, n)
    )
    batch = next(loader.epoch(0))
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (views.mean, views.std))
    shown = [torch.cat(list(images.split(512)))[batch.labels]]
    blank, area = torch.full_like(shown[0], 255), batch.images.shape[-2] * batch.images.shape[-1]
    names, texts = ["image"], {}
    for i, (x, chance) in enumerate(zip(views(batch), views.sample(batch), strict=True)):
        x = (x * std + mean).mul(255).round()
        shown.append(F.interpolate(x, shown[0].shape[2:], mode="nearest-exact").byte())
        names.append(f"view {i + 1}" + f", {x.shape[-1]} px" * (x.shape != shown[0].shape))
        shown.append(blank)  # a column for the words
        names.append("")
        words = enumerate(chance.describe(row, area) for row in range(len(x)))
        texts |= {(row, len(shown) - 1): "\n".join(lines) for row, lines in words}
    with atomic_write(path) as file:
        title = f"{label}: what the network sees of each image"
        figures.sheet(tiles(shown), names, texts, title, file)


def draw_run(
    path: str, name: str, history: list[dict], monitor: Monitor, board: Board | None = None
) -> None:
    """Pictures of a run of main.py and of what its encoder has learned.

    `<path>_curves.png`, `_neighbours.png`, `_embedding.png` and, with test labels, `_confusion.png`
    (of the kNN). Queries are test images; without them, training images. `name` is their title,
    `board` gets them too. All ranks call it, the first one draws.
    """
    found, images = monitor.knn(), monitor.images
    if distributed.rank() > 0:
        return
    scored = found.queries is not None
    queries = found.queries if scored else found.bank
    asked, labels = images.test_images, images.test_labels
    if not scored:
        asked, labels = images.train_images, images.train_labels
    known = bool((labels >= 0).all())
    epoch = len(history) - 1

    @contextlib.contextmanager
    def picture(kind: str) -> Iterator[IO[bytes]]:
        with atomic_write(f"{path}_{kind}.png") as file:
            yield file
        if board:
            board.picture(kind, f"{path}_{kind}.png", epoch)

    with picture("curves") as file:
        figures.curves({name: history}, file)

    chosen = evenly_spaced(len(queries), 8).to(queries.device)
    similarity = queries[chosen] @ found.bank.T
    if not scored:
        similarity[torch.arange(len(chosen), device=queries.device), chosen] = -2  # itself
    similarity, nearest = similarity.topk(min(8, len(found.bank) - (not scored)))
    shown = [asked[chosen], *(images.train_images[column] for column in nearest.T)]
    right = (images.train_labels[nearest] == labels[chosen][:, None]).cpu().numpy()
    with picture("neighbours") as file:
        figures.neighbours(
            tiles([torch.cat(list(part.split(512))) for part in shown]),
            similarity.cpu().numpy(),
            right if known else None,
            [images.classes[i] if known else "" for i in labels[chosen].tolist()],
            f"{name}: nearest neighbours",
            file,
        )

    chosen = evenly_spaced(len(queries), 2000).to(queries.device)
    names = [images.classes[i] for i in labels[chosen].tolist()] if known else None
    with picture("embedding") as file:
        title = f"{name}: t-SNE of {len(chosen)} {'test' if scored else 'training'} images"
        figures.embedding(queries[chosen].cpu().numpy(), names, images.classes, title, file)
    if board:
        board.features(queries[chosen], names, list(asked[chosen].split(512)), epoch)
    if scored:
        matrix = metrics.confusion_matrix(labels, found.ranking[:, 0], len(images.classes))
        with picture("confusion") as file:
            figures.confusion(matrix, images.classes, f"{name}: kNN", file)
