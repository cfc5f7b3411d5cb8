"""The pictures of a pre-training run: views, neighbours, embedding, confusion, TensorBoard."""

import os
import sys

import matplotlib.figure
import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
import utils
from simsiam.data.loader import Data, ImageFiles
from simsiam.evaluation import metrics
from simsiam.models.methods import build_model
from simsiam.plots.run import draw_run, draw_views
from simsiam.runtime.files import read_csv
from simsiam.training import checkpoint
from simsiam.training.collapse import Monitor
from simsiam.training.recipes import PretrainConfig
from simsiam.views.augment import NORMALISATION, Augmentation, Batch, Views
from tests import helpers

TINY = "--data_name textures --train_size 200 --width 4 --feature_dim 16 --batch_size 32 --name a"


def config_of(flags):
    return utils.ConfigParser("main.py", "", PretrainConfig).read(flags.split())[0]


@pytest.fixture
def drawn(monkeypatch):
    """Figures that are saved, by the last part of their files' names."""
    figures = {}
    save = matplotlib.figure.Figure.savefig

    def savefig(self, file, **options):
        kind = os.path.basename(file.name).split("_")[-1].split(".")[0]  # .a_curves.png.part
        figures[kind] = self
        save(self, file, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return figures


def tiles_in(figure, columns):
    """Return the images of a figure, 32 pixels wide: rows x columns x 3 x 32 x 32, uint8."""
    canvas = torch.from_numpy(figure.axes[0].images[0].get_array().data.copy())
    pitch = (canvas.shape[1] - 32) // (columns - 1)
    return canvas.unfold(0, 32, pitch).unfold(1, 32, pitch)


# ---- views --------------------------------------------------------------------------------------


def test_show_views_draws_the_input_of_the_network(tmp_path, drawn):
    main.main([*TINY.split(), "--show_views", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["a_views.png"]  # and nothing is trained
    tiles = tiles_in(drawn["views"], columns=5)  # image, view, its description, view, description
    assert tiles.shape == (8, 5, 3, 32, 32)
    assert tiles[:, [2, 4]].eq(255).all()
    images = main.load_images(config_of(TINY)).train_images
    shown = tiles[:, 0].contiguous()
    assert all((image == images).flatten(1).all(1).any() for image in shown)
    views, batch = Views(32, *NORMALISATION["cifar"]), Batch.alone(shown)  # of epoch 0, step 0
    texts = {text.get_position(): text.get_text() for text in drawn["views"].axes[0].texts}
    for i, (x, params) in enumerate(zip(views(batch), views.sample(batch), strict=True)):
        for row in range(8):  # 32 pixels, and a gap of 2
            assert texts[34 * (2 + 2 * i), 34 * row].split("\n") == params.describe(row)
        pixels = x * torch.tensor(views.std).view(3, 1, 1) + torch.tensor(views.mean).view(3, 1, 1)
        torch.testing.assert_close(tiles[:, 1 + 2 * i] / 255, pixels, atol=0.51 / 255, rtol=0)


@pytest.mark.parametrize("in_files", [True, False])
def test_views_are_drawn_beside_their_own_image(tmp_path, in_files):
    """Each image has one colour, and the views keep it: the PNG has a row of tiles of it."""
    colours = [(15 * i, 255 - 15 * i, 100) for i in range(16)]
    images = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].repeat(1, 1, 32, 32)
    if in_files:
        for i, colour in enumerate(colours):
            Image.new("RGB", (32, 32), colour).save(tmp_path / f"{i}.png")
        images = ImageFiles([tmp_path / f"{i}.png" for i in range(16)], 32, workers=0)
    augmentation = Augmentation(jitter_p=0.0, gray_p=0.0)
    sizes = None if in_files else (20,)
    views = Views(32, *NORMALISATION["cifar"], augmentation, size_schedule=sizes)
    path = tmp_path / "a_views.png"
    draw_views(str(path), "a", images, views, 0)
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())
    places = [pixels.eq(torch.tensor(colour)).all(2).nonzero() for colour in colours]
    shown = [place for place in places if len(place)]
    assert len(shown) == 8
    height, width, _ = pixels.shape
    for place in shown:
        (top, left), (bottom, right) = place.min(0).values, place.max(0).values
        assert bottom - top < height / 8  # one row
        assert right - left > 0.65 * width  # of all tiles but the last description
        assert len(place) > 0.9 * 3 * (bottom - top) ** 2


# ---- a run's pictures ---------------------------------------------------------------------------


def test_neighbours_embedding_and_confusion_of_test_or_training_images(tmp_path, drawn):
    config = config_of(TINY)
    images, views = main.load_images(config), Views(32, *NORMALISATION["cifar"])
    images.test_images, images.test_labels = images.test_images[:123], images.test_labels[:123]
    net = build_model(vars(config)).eval()
    history = [{"epoch": 0, "rank": 1.0}, {"epoch": 1, "rank": 2.0}]

    def draw(name):
        drawn.clear()
        monitor = Monitor(net, views, images, config, torch.autocast("cpu", enabled=False))
        draw_run(str(tmp_path / name), name, history, monitor)
        return monitor

    @torch.no_grad()
    def features(part):
        return F.normalize(net.backbone(views.eval_transform(part)), dim=1)

    def check_tiles(queries, cosines):
        """Compare tiles and cosines with brute force; return the nearest images' indices."""
        axes, tiles = drawn["neighbours"].axes[0], tiles_in(drawn["neighbours"], columns=9)
        best, nearest = cosines.sort(1, descending=True)
        numbers = torch.tensor([float(text.get_text()) for text in axes.texts]).view(8, 8)
        torch.testing.assert_close(numbers, best[:, :8], atol=6e-4, rtol=0)
        assert torch.equal(tiles[:, 0], queries)
        shown = tiles[:, 1:].reshape(64, 1, -1)
        is_same = (shown == images.train_images.flatten(1)).all(2)
        assert (is_same.sum(1) == 1).all()
        neighbours = is_same.long().argmax(1).view(8, 8)
        close = torch.testing.assert_close
        close(cosines.gather(1, neighbours), best[:, :8], atol=1e-5, rtol=0)  # but for ties
        return nearest[:, :8]

    monitor = draw("a")
    assert set(drawn) == {"curves", "neighbours", "embedding", "confusion"}
    bank, queries = features(images.train_images), features(images.test_images)
    places = torch.linspace(0, 122, 8).long()
    nearest = check_tiles(images.test_images[places], queries[places] @ bank.T)
    axes, labels = drawn["neighbours"].axes[0], images.test_labels[places]
    is_framed = torch.zeros(8, 9, dtype=torch.bool)
    for patch in axes.patches:
        is_framed[round(patch.get_y() / 42), round(patch.get_x() / 42)] = True  # 32 pixels and 10
    assert torch.equal(is_framed[:, 1:], images.train_labels[nearest] == labels[:, None])
    assert not is_framed[:, 0].any()
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [images.classes[i] for i in labels]

    class_sizes = images.test_labels.bincount()
    shares = torch.from_numpy(drawn["confusion"].axes[0].images[0].get_array().data)
    matrix = (shares / 100 * class_sizes[:, None]).round().long()
    ranking = monitor.knn().ranking
    assert matrix.tolist() == metrics.confusion_matrix(images.test_labels, ranking[:, 0], 10)
    points = [len(part.get_offsets()) for part in drawn["embedding"].axes[0].collections]
    assert points == class_sizes.tolist()

    no_labels = torch.full_like(images.train_labels, -1)
    images = Data(images.train_images, no_labels, None, None, images.classes)
    draw("b")
    assert set(drawn) == {"curves", "neighbours", "embedding"}
    cosines = bank @ bank.T
    cosines.fill_diagonal_(-2)  # an image is not its own neighbour
    places = torch.linspace(0, 199, 8).long()
    check_tiles(images.train_images[places], cosines[places])
    assert not drawn["neighbours"].axes[0].patches
    (points,) = drawn["embedding"].axes[0].collections  # of one colour
    assert len(points.get_offsets()) == 200


# ---- TensorBoard --------------------------------------------------------------------------------


def test_tensorboard_gets_every_epoch_once_pictures_and_features(tmp_path, capsys, monkeypatch):
    """A run is started without TensorBoard, cut, and resumed with it twice, then finished."""
    root = helpers.image_files(tmp_path / "images", 96)
    flags = "--data_name imagenet --recipe short --image_size 32 --width 4 --feature_dim 16 --k 5 "
    flags += f"--batch_size 32 --epochs 2 --name a --data_root {root} --out {tmp_path} --pictures"
    helpers.interrupt(main, [*flags.split(), "--checkpoint_minutes", "0"], 1)
    assert not (tmp_path / "a_tensorboard").exists()
    for _ in range(2):
        main.main([*flags.split(), "--resume", "--tensorboard"])
        events = EventAccumulator(str(tmp_path / "a_tensorboard")).Reload()
        table = read_csv(tmp_path / "a_statistics.csv")
        for column in ("train_loss", "std", "rank", "test_acc@1"):
            points = [(event.step, event.value) for event in events.Scalars(column)]
            wanted = [(row["epoch"], row[column]) for row in table if column in row]
            assert points == [pytest.approx(point, rel=1e-4) for point in wanted]
        assert [event.step for event in events.Scalars("rank")] == [0, 1, 2]
    assert set(events.Tags()["images"]) == {"curves", "neighbours", "embedding", "confusion"}
    folder = tmp_path / "a_tensorboard" / "00002" / "default"
    values = pandas.read_csv(folder / "tensors.tsv", sep="\t", header=None).values
    net = checkpoint.network(checkpoint.load(tmp_path / "a_model.pth")).eval()
    images = main.load_images(config_of(flags))
    transform = Views(32, *NORMALISATION["cifar"]).eval_transform
    with torch.no_grad():
        features = [net.backbone(transform(part)) for part in images.test_images.split(61)]
    expected = F.normalize(torch.cat(features), dim=1)
    torch.testing.assert_close(torch.tensor(values).float(), expected, atol=1e-4, rtol=0)
    metadata = (folder / "metadata.tsv").read_text().split()
    assert metadata == [images.classes[i] for i in images.test_labels]
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    assert "tensorboard" in helpers.refused(capsys, main, *TINY.split(), "--tensorboard")
