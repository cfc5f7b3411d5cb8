"""The views against torchvision, their chance, the data sets, the loader."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T

import data

PIXEL = 1 / 255


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(6, 3, 9, 9, generator=generator)
    x = torch.nn.functional.interpolate(smooth, (40, 48), mode="bilinear")
    x[4] = x[4, :1]  # one gray image: no chroma, the edge case of hue
    x[5] = torch.rand(3, 40, 48, generator=generator).round()  # saturated colours
    return x


@pytest.mark.parametrize("size", [32, 20, 64])  # 20: the antialiased way; 64: upsampling
def test_crop_resize_flip_equals_torchvision(images, size):
    boxes = [(0, 0, 40, 48), (3, 5, 30, 31), (10, 20, 17, 9), (0, 1, 1, 2), (39, 0, 1, 48)]
    boxes.append((7, 7, size if size < 33 else 33, 32))
    top, left, height, width = torch.tensor(boxes).float().T
    rows = data.resize_weights(top, height, 40, size)
    columns = data.resize_weights(left, width, 48, size)
    ours = data.resample(images, rows, columns)
    flipped = data.resample(images, rows, columns.flip(1))
    for i, box in enumerate(boxes):
        theirs = T.resized_crop(images[i], *box, [size, size], antialias=True)
        assert (ours[i] - theirs).abs().max() < PIXEL
        assert (flipped[i] - T.horizontal_flip(theirs)).abs().max() < PIXEL


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_operations_equal_torchvision(images, name):
    factors = [0.6, 0.85, 1.0, 1.15, 1.4, 0.0] if name != "hue" else [-0.5, -0.1, 0, 0.03, 0.1, 0.5]
    ours = getattr(data, f"adjust_{name}")(images, torch.tensor(factors).view(-1, 1, 1, 1))
    for x, y, factor in zip(images, ours, factors, strict=True):
        theirs = getattr(T, f"adjust_{name}")(x, factor)
        assert (y - theirs).abs().max() < PIXEL
    same = factors.index(0 if name == "hue" else 1.0)
    assert (ours[same] - images[same]).abs().max() < 1e-6


def test_grayscale_equals_torchvision(images):
    gray = data.adjust_saturation(images, torch.zeros(6, 1, 1, 1))
    assert (gray - T.rgb_to_grayscale(images, num_output_channels=3)).abs().max() < PIXEL


@pytest.mark.parametrize("taps", [3, 11, 23])
def test_blur_equals_torchvision(images, taps):
    x = images[..., :40]
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 1e-3])
    weights = data.blur_weights(sigma, 40, taps)
    ours = data.resample(x, weights, weights)
    for i in range(6):
        theirs = T.gaussian_blur(x[i], [taps, taps], [sigma[i].item()] * 2)
        assert (ours[i] - theirs).abs().max() < PIXEL
    assert torch.equal(ours[5], x[5])  # not blurred at all


@pytest.mark.parametrize(("height", "width"), [(32, 32), (10, 90), (90, 10)])
def test_crop_boxes_have_torchvisions_distribution(height, width):
    # 10 x 90: most tries fail and the fallback (central, ratio clamped) is common.
    n = 4000
    crop = v2.RandomResizedCrop(8, scale=(0.2, 1))
    torch.manual_seed(0)
    blank = torch.zeros(3, height, width)
    params = [crop.make_params([blank]) for _ in range(n)]
    theirs = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in params])
    ours = data.crop_boxes(np.random.default_rng(0), n, height, width)
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    area = (ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    ratio = (ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2])
    assert ks_2samp(*area).pvalue > 1e-3
    assert ks_2samp(*ratio).pvalue > 1e-3
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= (height, width)).all()


def make_views(**changes):
    settings = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25), "seed": 7} | changes
    return data.Views(16, **settings)


def bytes_of(n=64, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def test_views_are_a_function_of_seed_epoch_and_step():
    images, views = bytes_of(), make_views()
    views.seed(3, 5)
    first, second = views(images), views(images)
    torch.rand(10)  # the global generator has no part in it
    again = make_views()
    again.seed(3, 5)
    assert torch.equal(again(images), first)
    assert torch.equal(again(images), second)
    assert not torch.equal(first, second)
    for other in [(3, 6), (4, 5)]:
        again.seed(*other)
        assert not torch.equal(again(images), first)
    again = make_views(seed=8)
    again.seed(3, 5)
    assert not torch.equal(again(images), first)


def test_a_view_is_composed_in_the_papers_order():
    """Everything switched on for certain, one parameter each: the composition by torchvision."""
    images = bytes_of(8)
    views = make_views(
        crop_scale=(1, 1), jitter=(0, 0, 0, 0), jitter_p=1, gray_p=1, blur_p=1, flip_p=1
    )
    views.blur_sigma = (0.8, 0.8)
    views.seed(0, 0)
    whole = data.crop_boxes(np.random.default_rng([7, 0, 0]), 8, 16, 16, (1, 1))
    kept = (whole == (0, 0, 16, 16)).all(1)
    assert kept.any()
    x = T.rgb_to_grayscale(T.horizontal_flip(images.float() / 255), num_output_channels=3)
    x = T.gaussian_blur(x, [1, 1], [0.8, 0.8])  # a tenth of 16 pixels, odd
    x = T.normalize(x, views.mean, views.std)
    assert (views(images)[kept] - x[kept]).abs().max() < PIXEL / min(views.std)


def test_shares_of_the_random_operations():
    n = 4000
    images = bytes_of(1).expand(n, -1, -1, -1)
    only = {"crop_scale": (1, 1), "jitter_p": 0, "gray_p": 0, "flip_p": 0}
    plain = make_views().plain(images[:1])

    def share(**switched_on):
        views = make_views(**(only | switched_on))
        boxes = data.crop_boxes(np.random.default_rng([7, 0, 0]), n, 16, 16, (1, 1))
        whole = torch.from_numpy((boxes == (0, 0, 16, 16)).all(1))
        changed = (views(images)[whole] - plain).abs().amax((1, 2, 3)) > 1e-5
        return changed.float().mean().item()

    assert share() == 0
    assert share(flip_p=0.5) == pytest.approx(0.5, abs=0.05)
    assert share(gray_p=0.2) == pytest.approx(0.2, abs=0.04)
    assert share(jitter_p=0.8) == pytest.approx(0.8, abs=0.04)
    assert share(jitter_p=0.8, jitter=(0, 0, 0, 0.1)) == pytest.approx(0.8, abs=0.04)


def test_plain_is_normalised_and_channels_last():
    images, views = bytes_of(4), make_views()
    x = views.plain(images)
    theirs = T.normalize(images.float() / 255, views.mean, views.std)
    torch.testing.assert_close(x, theirs)
    assert x.is_contiguous(memory_format=torch.channels_last)
    resized = views.plain(bytes_of(4, size=24))
    theirs = T.resize(bytes_of(4, size=24).float() / 255, [16, 16], antialias=True)
    torch.testing.assert_close(resized, T.normalize(theirs, views.mean, views.std))


def test_loader_visits_every_image_once_in_a_reproducible_order():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 3, 2, 2)
    loader = data.Loader([images, torch.arange(10)], 3, seed=1)
    batches = list(loader.epoch(0))
    seen = torch.cat([x[:, 0, 0, 0] for _, (x, _) in batches]).tolist()
    assert len(loader) == len(batches) == 3
    assert len(set(seen)) == 9
    steps = [step for step, _ in loader.epoch(0, start=1)]
    assert steps == [1, 2]
    for (_, a), (_, b) in zip(batches[1:], loader.epoch(0, start=1), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[0][:, 0, 0, 0], a[1])  # images and labels stay together
    other = torch.cat([labels for _, (_, labels) in loader.epoch(1)]).tolist()
    assert other != seen
    whole = data.Loader([images], 3, seed=1, keep_last=True)
    assert [len(x) for _, (x,) in whole.epoch(0)] == [3, 3, 3, 1]
    assert len(whole) == 4
    with pytest.raises(ValueError, match="--batch_size 11"):
        data.Loader([images], 11)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """JPEG files of several sizes and modes."""
    root = tmp_path_factory.mktemp("jpegs")
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(64, 32), (48, 96), (80, 80), (32, 56), (96, 64)]):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        mode = ("RGB", "L", "CMYK")[i % 3]
        coarse.resize((width, height)).convert(mode).save(root / f"{i}.jpg", quality=95)
    return sorted(map(str, root.iterdir()))


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_of_files_equal_torchvision_bit_for_bit(jpegs, workers):
    views = make_views(crop_scale=(0.3, 0.9))
    loader = data.Loader([data.Files(jpegs, 32, workers), torch.arange(5)], 2, 1, True, views)
    seen = []
    for _, (crops, labels) in loader.epoch(4):
        assert crops.shape == (len(labels), 2, 3, 32, 32)
        for looks, i in zip(crops, labels.tolist(), strict=True):
            image = Image.open(jpegs[i]).convert("RGB")
            rng = np.random.default_rng([1, 4, i])  # of the sample: not of step, batch or worker
            boxes = data.crop_boxes(rng, 2, image.height, image.width, (0.3, 0.9))
            for look, box in zip(looks, boxes.tolist(), strict=True):
                theirs = T.resized_crop(image, *box, [32, 32])
                assert torch.equal(look, T.pil_to_tensor(theirs))
        seen += labels.tolist()
    assert sorted(seen) == [0, 1, 2, 3, 4]
    resumed = list(loader.epoch(4, start=2))
    assert [step for step, _ in resumed] == [2]
    assert torch.equal(resumed[0][1][0], crops)
    assert not torch.equal(next(iter(loader.epoch(5)))[1][0], crops)


def test_files_under_the_test_transform_equal_torchvision(jpegs):
    files = data.Files(jpegs, 28, workers=1)  # resized to 32, so that margins are whole pixels
    images = torch.cat(list(files.split(2)))
    assert images.shape == files.shape == (5, 3, 28, 28)
    for path, ours in zip(jpegs, images, strict=True):
        image = Image.open(path).convert("RGB")
        theirs = T.center_crop(T.resize(image, [32]), [28])
        assert (ours.int() - T.pil_to_tensor(theirs).int()).abs().max() <= 1
    assert torch.equal(next(files[torch.tensor([3, 1])].split(2)), images[[3, 1]])
    decoded = data.decode(jpegs, 28, shorter=data.shorter_side("imagenet", 28))[0]
    assert torch.equal(decoded, images)


def test_views_of_crops_take_one_look_after_the_other():
    crops = torch.stack([bytes_of(8, seed=1), bytes_of(8, seed=2)], dim=1)
    views = make_views(jitter_p=0, gray_p=0, flip_p=0)
    for _ in range(2):  # each step anew
        views.seed(0, 0)
        assert torch.equal(views(crops), views.plain(crops[:, 0]))
        assert torch.equal(views(crops), views.plain(crops[:, 1]))
    views = make_views(jitter_p=0, gray_p=0, flip_p=1)
    assert torch.equal(views(crops), views.plain(crops[:, 0].flip(-1)))


def test_a_bad_file_in_a_run_is_named(jpegs, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(Path(jpegs[0]).read_bytes()[:-200])
    files = data.Files([*jpegs, str(bad)], 16, workers=1)
    with pytest.raises(data.BadImage, match=r"bad\.jpg: cannot be read"):
        list(files.split(2))
    with pytest.raises(data.BadImage, match=r"bad\.jpg: cannot be read"):
        list(data.Loader([files], 3, views=make_views()).epoch(0))


def test_workers_leave_signals_to_the_run(jpegs):
    """Ctrl-C and a scheduler's SIGTERM go to all of a run's processes; its step is still to end."""
    loader = data.Loader([data.Files(20 * jpegs, 16, workers=2)], 5, views=make_views())
    batches = loader.epoch(0)
    next(batches), next(batches)  # of one worker each: both are at work
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 18


def test_imagenet_is_a_folder_left_in_its_files(tmp_path):
    for split, number in [("train", 6), ("val", 4)]:
        for i in range(number):
            write_image(tmp_path / split / ("cat", "dog")[i % 2] / f"{i}.png", (i, 0, 0))
    found = data.load("imagenet", tmp_path, 8)
    assert found.train_images.shape == (6, 3, 8, 8)
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.cat(list(found.test_images.split(3)))[:, 0, 0, 0].tolist() == [0, 2, 1, 3]
    half = found.subset(2, seed=0)
    assert len(half.train_images) == 2
    assert half.train_labels.tolist() == [0, 1]
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"no image")
    with pytest.raises(data.BadImage, match="2.png"):
        list(data.load("imagenet", tmp_path, 8).train_images.split(9))
    found = data.load("imagenet", tmp_path, 8, bad_images="skip")
    assert found.train_labels.tolist() == [0, 0, 1, 1, 1]
    assert len(next(iter(found.train_images.split(9)))) == 5
    assert len(found.bad) == 1
    other = data.load("imagenet", tmp_path, 8)
    assert data.crc(other.train_images) != data.crc(found.train_images)


def test_textures_are_the_same_bytes_everywhere():
    images, labels = data.textures(500, seed=1)
    assert images.shape == (500, 3, 32, 32)
    assert labels.bincount().tolist() == [50] * 10
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert digest[:16] == "49e08b7e6b4abc98"
    # Rounding the sine is safe: no value lies so near a tie that a libm could round it otherwise.
    exact = np.sin(2 * np.pi * np.arange(4096) / 4096) * 2**15
    assert np.abs(exact - np.floor(exact) - 0.5).min() > 1e-6


def test_subset_is_balanced_and_seeded():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 5)
    chosen = data.subset(labels, 30, seed=0)
    assert labels[chosen].bincount().tolist() == [13, 12, 5] or labels[
        chosen
    ].bincount().tolist() == [12, 13, 5]
    assert len(set(chosen.tolist())) == 30
    assert torch.equal(chosen, data.subset(labels, 30, seed=0))
    assert not torch.equal(chosen, data.subset(labels, 30, seed=1))
    for size in (0, 86):
        with pytest.raises(ValueError, match=f"--train_size {size}"):
            data.subset(labels, size, seed=0)


def write_torchvision_files(name, root):
    """A few images in the very files that torchvision downloads. Pixel (c, y, x) = 10 c + y + i."""

    def planes(number, size):
        c, y, _ = np.mgrid[0:3, 0:size, 0:size]
        return np.stack([10 * c + y + i for i in range(number)]).astype(np.uint8)

    def put(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    if name == "cifar10":
        folder = root / "cifar-10-batches-py"
        for part in ["data_batch_1", *(f"data_batch_{i}" for i in range(2, 6)), "test_batch"]:
            content = {"data": planes(1, 32).reshape(1, -1), "labels": [7]}
            put(folder / part, pickle.dumps(content))
        put(folder / "batches.meta", pickle.dumps({"label_names": list("abcdefghij")}))
    elif name == "cifar100":
        folder = root / "cifar-100-python"
        for part in ("train", "test"):
            content = {"data": planes(2, 32).reshape(2, -1), "fine_labels": [7, 99]}
            put(folder / part, pickle.dumps(content))
        put(folder / "meta", pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    elif name == "stl10":
        folder = root / "stl10_binary"
        for part, number in [("train", 2), ("unlabeled", 3), ("test", 2)]:
            # STL-10 stores columns first.
            put(folder / f"{part}_X.bin", planes(number, 96).transpose(0, 1, 3, 2).tobytes())
            put(folder / f"{part}_y.bin", np.array([8] * number, np.uint8).tobytes())
        put(folder / "class_names.txt", b"a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n")
    elif name == "svhn":
        root.mkdir(exist_ok=True)
        for part in ("train", "test"):
            images = planes(2, 32).transpose(2, 3, 1, 0)
            content = {"X": images, "y": np.array([[7], [10]], np.uint8)}
            scipy.io.savemat(root / f"{part}_32x32.mat", content)
    else:
        folder = root / "FashionMNIST" / "raw"
        for part in ("train", "t10k"):
            head = bytes([0, 0, 8, 3]) + np.array([2, 28, 28], ">i4").tobytes()
            put(folder / f"{part}-images-idx3-ubyte", head + planes(2, 28)[:, 0].tobytes())
            head = bytes([0, 0, 8, 1]) + np.array([2], ">i4").tobytes()
            put(folder / f"{part}-labels-idx1-ubyte", head + bytes([7, 7]))


def skip_checksums(monkeypatch):
    for module in ("utils", "cifar", "stl10", "svhn", "mnist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *path: True)


@pytest.mark.parametrize(
    ("name", "train", "test", "size", "classes"),
    [
        ("cifar10", [7] * 5, [7], 32, 10),
        ("cifar100", [7, 99], [7, 99], 32, 100),
        ("stl10", [7, 7, -1, -1, -1], [7, 7], 96, 10),
        ("svhn", [7, 0], [7, 0], 32, 10),  # SVHN stores the digit 0 as 10
        ("fashion_mnist", [7, 7], [7, 7], 28, 10),
    ],
)
def test_torchvisions_data_sets(tmp_path, monkeypatch, name, train, test, size, classes):
    write_torchvision_files(name, tmp_path)
    skip_checksums(monkeypatch)
    found = data.load(name, tmp_path)
    assert found.train_labels.tolist() == train
    assert found.test_labels.tolist() == test
    assert len(found.classes) == classes
    for images, number in [(found.train_images, len(train)), (found.test_images, len(test))]:
        assert images.shape == (number, 3, size, size)
        assert images.dtype == torch.uint8
    channel = 0 if name == "fashion_mnist" else 20
    assert found.test_images[0, 2, 5, 9] == channel + 5


def test_svhn_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    write_torchvision_files("svhn", tmp_path)
    skip_checksums(monkeypatch)
    with pytest.raises(ValueError, match="pip install scipy"):
        data.load("svhn", tmp_path)


# ---- folders ------------------------------------------------------------------------------------


def write_image(path, color, size=(12, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def test_folder_with_classes(tmp_path):
    for split, number in [("train", 3), ("val", 2)]:
        for name, color in [("cat", (255, 0, 0)), ("dog", (0, 0, 255))]:
            for i in range(number):
                write_image(tmp_path / split / name / f"{i}.png", color)
    found = data.load("folder", tmp_path)
    assert found.classes == ["cat", "dog"]
    assert found.train_images.shape == (6, 3, 12, 12)
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test_labels.tolist() == [0, 0, 1, 1]
    assert found.train_images[0, :, 0, 0].tolist() == [255, 0, 0]
    assert found.test_images[3, :, 0, 0].tolist() == [0, 0, 255]
    write_image(tmp_path / "test" / "cow" / "0.png", 0)
    with pytest.raises(ValueError, match="class cow"):
        data.load("folder", tmp_path)


def test_flat_folder_of_mixed_sizes_and_modes(tmp_path):
    write_image(tmp_path / "a.png", 100, (40, 20), "L")
    write_image(tmp_path / "b.jpg", (9, 9, 9), (20, 60))
    write_image(tmp_path / "deep" / "c.png", (1, 2, 3, 4), (30, 20), "RGBA")
    found = data.load("folder", tmp_path)
    assert found.train_images.shape == (3, 3, 20, 20)
    assert found.test_images is None
    assert found.classes == []
    assert found.train_labels.tolist() == [-1, -1, -1]
    assert data.load("folder", tmp_path, image_size=8).train_images.shape[-1] == 8


def test_csv_list(tmp_path):
    for i in range(3):
        write_image(tmp_path / "img" / f"{i}.png", i)
    (tmp_path / "list.csv").write_text("path,label\nimg/2.png,x\nimg/0.png,\nimg/1.png,a\n")
    found = data.load("folder", tmp_path / "list.csv")
    assert found.classes == ["a", "x"]
    assert found.train_labels.tolist() == [1, -1, 0]
    assert found.train_images[:, 0, 0, 0].tolist() == [2, 0, 1]
    (tmp_path / "list.csv").rename(tmp_path / "train.csv")
    (tmp_path / "test.csv").write_text("path,label\nimg/0.png,a\n")
    found = data.load("folder", tmp_path)
    assert found.test_labels.tolist() == [0]
    (tmp_path / "test.csv").write_text("file\nimg/0.png\n")
    with pytest.raises(ValueError, match="column `path`"):
        data.load("folder", tmp_path)


def test_bad_images_are_named(tmp_path):
    write_image(tmp_path / "ok.png", 0)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.png"):
        data.load("folder", tmp_path)
    write_image(tmp_path / "empty.png", 0, (64, 64))
    whole = (tmp_path / "empty.png").read_bytes()
    (tmp_path / "empty.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="empty.png"):
        data.load("folder", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load("folder", tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="none"):
        data.load("folder", tmp_path / "none")
