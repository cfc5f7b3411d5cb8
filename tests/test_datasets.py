"""Data sets: images of any mode, textures, torchvision's files, folders and lists of one's own."""

import hashlib
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as T

from simsiam.data.datasets import DATA_NAMES, load_dataset, load_torchvision, resize_size
from simsiam.data.decode import (
    UnreadableImageError,
    decode_files,
    ignore_pil_warnings,
    open_image,
    read_image,
    resize_center_crop,
    to_rgb,
)
from simsiam.data.loader import images_checksum
from simsiam.data.textures import SINE, TEXTURE_CLASSES, make_textures
from tests.helpers import ROOT


def write_image(path, color, size=(12, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


# ---- images -------------------------------------------------------------------------------------

PROGRAM = """
import ast, importlib, pathlib, warnings

rooms = sorted(pathlib.Path("simsiam").glob("*/[a-z]*.py"))
for room in rooms:  # what others do to the filters, when they are imported, is theirs
    for node in ast.parse(room.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom) and "simsiam" not in ast.unparse(node):
            exec(ast.unparse(node))
filters = list(warnings.filters)
for room in rooms:
    importlib.import_module(f"simsiam.{room.parent.name}.{room.stem}")
assert warnings.filters == filters, set(warnings.filters) ^ set(filters)
print(len(rooms))
"""


def test_importing_the_library_leaves_the_warnings_filters_alone():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15


def test_pil_s_warnings_are_ignored_where_it_is_asked_for():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ignore_pil_warnings()
        warnings.warn("so many pixels", Image.DecompressionBombWarning, stacklevel=1)
        warnings.warn("Corrupt EXIF data.  Expecting to read 4 bytes", UserWarning, stacklevel=1)
        warnings.warn("another one", UserWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == ["another one"]


def test_every_mode_becomes_rgb():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"):
        assert to_rgb(Image.fromarray(gray).convert(mode)).mode == "RGB"
    assert (np.asarray(to_rgb(Image.fromarray(gray))) == gray[..., None]).all()
    # 16 bits: the upper 8 of them, and no clipping.
    for dtype in (np.uint16, np.int32):
        deep = (gray.astype(dtype) << 8) + 255
        assert (np.asarray(to_rgb(Image.fromarray(deep))) == gray[..., None]).all()


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (50, 50), (32, 90)])
def test_the_centre_equals_torchvision(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    found = resize_center_crop(
        image, 28, 32
    )  # the longer side becomes 48 or 90: margins are whole pixels
    theirs = T.center_crop(T.resize(image, [32]), [28])
    assert np.abs(found - np.asarray(theirs).astype(int)).max() <= 1


def test_why_an_image_cannot_be_read(tmp_path, monkeypatch):
    write_image(tmp_path / "large.png", 0, (40, 30))
    (tmp_path / "text.png").write_bytes(b"no image")
    cut = (tmp_path / "large.png").read_bytes()[:-30]
    (tmp_path / "cut.png").write_bytes(cut)
    for name, reason in [("none.png", "does not exist"), ("text.png", "not an image")]:
        with pytest.raises(ValueError, match=f"{name}: cannot be read .*{reason}"):
            open_image(tmp_path / name)
    assert open_image(tmp_path / "cut.png").size == (40, 30)  # only its head is read
    with pytest.raises(ValueError, match="cut.png: cannot be read"):
        read_image(tmp_path / "cut.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert read_image(tmp_path / "large.png").size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with warnings.catch_warnings():
        ignore_pil_warnings()
        with pytest.raises(ValueError, match="large.png: cannot be read .*40 x 30 pixels"):
            read_image(tmp_path / "large.png")


def test_bad_files_are_left_out_and_named(tmp_path):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", (i, 0, 0), (10, 12 + i))
    (tmp_path / "2.png").write_bytes(b"no image")
    files = [tmp_path / f"{i}.png" for i in range(4)]
    with pytest.raises(ValueError, match="2.png: cannot be read"):
        decode_files(files, 8)
    images, bad = decode_files(files, 8, bad_images="skip")
    assert images.shape == (3, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [0, 1, 3]
    assert list(bad) == [2]
    assert "2.png: cannot be read" in bad[2]
    with pytest.raises(ValueError, match="2.png"):  # none is left
        decode_files(files[2:3], 8, bad_images="skip")
    images, bad = decode_files(files[2:3], 8, bad_images="skip", allow_empty=True)
    assert (len(images), list(bad)) == (0, [0])


# ---- textures -----------------------------------------------------------------------------------


def test_textures_are_the_same_bytes_everywhere():
    images, labels = make_textures(500, seed=1)
    assert images.shape == (500, 3, 32, 32)
    assert labels.bincount().tolist() == [50] * 10
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert digest[:16] == "49e08b7e6b4abc98"
    # Rounding the sine is safe: no value lies so near a tie that a libm could round it otherwise.
    exact = np.sin(2 * np.pi * np.arange(4096) / 4096) * 2**15
    assert np.abs(exact - np.floor(exact) - 0.5).min() > 1e-6
    assert (np.round(exact) / 2**15 == SINE).all()


def test_textures_need_no_files():
    found = load_dataset("textures", "/nowhere")
    assert found.train_images.shape == (4000, 3, 32, 32)
    assert found.test_images.shape == (1000, 3, 32, 32)
    assert found.train_labels.bincount().tolist() == [400] * 10
    assert found.classes == list(TEXTURE_CLASSES)
    assert not (found.train_images[:1000] == found.test_images).flatten(1).all(1).any()
    before = found.test_images.clone()
    found.test_images.zero_()  # what is done to them is not done to those of others
    found.classes.clear()
    again = load_dataset("textures", "/nowhere")
    assert torch.equal(again.test_images, before)
    assert again.classes == list(TEXTURE_CLASSES)


# ---- torchvision's ------------------------------------------------------------------------------


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
def test_torchvision_s_data_sets(tmp_path, monkeypatch, name, train, test, size, classes):
    write_torchvision_files(name, tmp_path)
    skip_checksums(monkeypatch)
    found = load_dataset(name, tmp_path)
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
        load_dataset("svhn", tmp_path)


def test_a_data_set_that_is_none_is_refused():
    with pytest.raises(ValueError, match="--data_name imagnet: choose one of cifar10, .*textures"):
        load_dataset("imagnet", "/nowhere")
    assert len(set(DATA_NAMES)) == 9


@pytest.mark.parametrize("name", ["cifar10", "svhn", "fashion_mnist"])
def test_a_failed_download_says_what_to_put_where(tmp_path, monkeypatch, name):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(ConnectionError) as error:
        load_torchvision(name, tmp_path)
    place = tmp_path / "FashionMNIST" / "raw" if name == "fashion_mnist" else tmp_path
    archive = {
        "cifar10": "cifar-10-python.tar.gz",
        "svhn": "train_32x32.mat and test_32x32.mat",
        "fashion_mnist": "its four",
    }[name]
    assert f"--data_name {name}: could not be downloaded" in str(error.value)
    assert f"put {archive}" in str(error.value)
    assert f"into {place} yourself" in str(error.value)
    assert "--data_name textures" in str(error.value)


# ---- folders ------------------------------------------------------------------------------------


def test_folder_with_classes(tmp_path):
    for split, number in [("train", 3), ("val", 2)]:
        for name, color in [("cat", (255, 0, 0)), ("dog", (0, 0, 255))]:
            for i in range(number):
                write_image(tmp_path / split / name / f"{i}.png", color)
    found = load_dataset("folder", tmp_path)
    assert found.classes == ["cat", "dog"]
    assert found.train_images.shape == (6, 3, 12, 12)
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test_labels.tolist() == [0, 0, 1, 1]
    assert found.train_images[0, :, 0, 0].tolist() == [255, 0, 0]
    assert found.test_images[3, :, 0, 0].tolist() == [0, 0, 255]
    write_image(tmp_path / "test" / "cow" / "0.png", 0)
    with pytest.raises(ValueError, match="class cow"):
        load_dataset("folder", tmp_path)


def test_flat_folder_of_mixed_sizes_and_modes(tmp_path):
    write_image(tmp_path / "a.png", 100, (40, 20), "L")
    write_image(tmp_path / "b.jpg", (9, 9, 9), (20, 60))
    write_image(tmp_path / "deep" / "c.png", (1, 2, 3, 4), (30, 20), "RGBA")
    found = load_dataset("folder", tmp_path)
    assert found.train_images.shape == (3, 3, 20, 20)
    assert found.test_images is None
    assert found.classes == []
    assert found.train_labels.tolist() == [-1, -1, -1]
    assert load_dataset("folder", tmp_path, image_size=8).train_images.shape[-1] == 8


def test_csv_list(tmp_path):
    for i in range(3):
        write_image(tmp_path / "img" / f"{i}.png", i)
    (tmp_path / "list.csv").write_text("path,label\nimg/2.png,x\nimg/0.png,\nimg/1.png,a\n")
    found = load_dataset("folder", tmp_path / "list.csv")
    assert found.classes == ["a", "x"]
    assert found.train_labels.tolist() == [1, -1, 0]
    assert found.train_images[:, 0, 0, 0].tolist() == [2, 0, 1]
    (tmp_path / "list.csv").rename(tmp_path / "train.csv")
    (tmp_path / "test.csv").write_text("path,label\nimg/0.png,a\n")
    found = load_dataset("folder", tmp_path)
    assert found.test_labels.tolist() == [0]
    (tmp_path / "test.csv").write_text("file\nimg/0.png\n")
    with pytest.raises(ValueError, match="column `path`"):
        load_dataset("folder", tmp_path)


def test_bad_images_are_named(tmp_path):
    write_image(tmp_path / "ok.png", 0)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.png"):
        load_dataset("folder", tmp_path)
    write_image(tmp_path / "empty.png", 0, (64, 64))
    whole = (tmp_path / "empty.png").read_bytes()
    (tmp_path / "empty.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="empty.png"):
        load_dataset("folder", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_dataset("folder", tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="none"):
        load_dataset("folder", tmp_path / "none")


def test_imagenet_is_a_folder_left_in_its_files(tmp_path):
    for split, number in [("train", 6), ("val", 4)]:
        for i in range(number):
            write_image(tmp_path / split / ("cat", "dog")[i % 2] / f"{i}.png", (i, 0, 0))
    found = load_dataset("imagenet", tmp_path, 8)
    assert found.train_images.shape == (6, 3, 8, 8)
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.cat(list(found.test_images.split(3)))[:, 0, 0, 0].tolist() == [0, 2, 1, 3]
    half = found.subset(2, seed=0)
    assert len(half.train_images) == 2
    assert half.train_labels.tolist() == [0, 1]
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match="2.png"):
        list(load_dataset("imagenet", tmp_path, 8).train_images.split(9))
    found = load_dataset("imagenet", tmp_path, 8, bad_images="skip")
    assert found.train_labels.tolist() == [0, 0, 1, 1, 1]
    assert len(next(iter(found.train_images.split(9)))) == 5
    assert len(found.unreadable) == 1
    other = load_dataset("imagenet", tmp_path, 8)
    assert images_checksum(other.train_images) != images_checksum(found.train_images)


def test_tests_alone_decode_no_training_image(tmp_path):
    for split, number in [("train", 2), ("val", 3)]:
        for i in range(number):
            write_image(tmp_path / split / ("cat", "dog")[i % 2] / f"{i}.png", (i, 0, 0))
    (tmp_path / "train" / "cat" / "bad.png").write_bytes(b"no image")
    for name in ("folder", "imagenet"):
        found = load_dataset(name, tmp_path, 12, test_only=True)
        assert len(found.train_images) == len(found.train_labels) == 0
        assert found.test_labels.tolist() == [0, 0, 1]
        assert found.classes == ["cat", "dog"]  # of the training images' folders all the same
    with pytest.raises(ValueError, match="bad.png"):
        load_dataset("folder", tmp_path, 12)


def test_test_is_taken_before_val_and_links_are_followed(tmp_path):
    for i, split in enumerate(("train", "val", "test")):
        write_image(tmp_path / split / "cat" / "0.png", (i, 0, 0))
    write_image(tmp_path / "elsewhere" / "1.PNG", (9, 0, 0))
    write_image(tmp_path / "train" / "cat" / ".hidden.png", (5, 0, 0))
    os.symlink(tmp_path / "elsewhere", tmp_path / "train" / "dog")
    found = load_dataset("folder", tmp_path)
    assert found.classes == ["cat", "dog"]
    assert found.train_images[:, 0, 0, 0].tolist() == [0, 9]
    assert found.test_images[:, 0, 0, 0].tolist() == [2]


def test_what_the_test_transform_resizes_to():
    assert resize_size("imagenet", 224) == resize_size("webdataset", 224) == 256
    assert resize_size("imagenet", 112) == 128
    assert resize_size("folder", 224) == resize_size("cifar10", 224) == 224
