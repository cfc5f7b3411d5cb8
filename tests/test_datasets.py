"""Data sets by name: textures, torchvision's files, folders, lists and the registry."""

import hashlib
import io
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from simsiam.data.datasets import DATASETS, load_dataset
from simsiam.data.decode import UnreadableImageError, resize_size
from simsiam.data.loader import Data, images_checksum
from simsiam.data.textures import SINE, TEXTURE_CLASSES, make_textures


def write_image(path, color, size=(12, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


# ---- the registry -------------------------------------------------------------------------------


def test_a_data_set_is_one_entry_of_the_registry(monkeypatch):
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    data = Data(images, torch.zeros(3, dtype=torch.int64), None, None, ["zero"])
    monkeypatch.setitem(DATASETS, "zeros", lambda root, *_: data)
    assert load_dataset("zeros", "anywhere") is data
    with pytest.raises(ValueError, match="--data_name imagnet: .*cifar10.*zeros"):
        load_dataset("imagnet", "/nowhere")
    with pytest.raises(ValueError, match="--split_names"):
        load_dataset("textures", ".", split_names=["train"])


def test_the_test_transform_has_a_margin_for_imagenet():
    assert resize_size("imagenet", 224) == resize_size("webdataset", 224) == 256
    assert resize_size("imagenet", 112) == 128
    assert resize_size("folder", 224) == resize_size("cifar10", 224) == 224


# ---- textures -----------------------------------------------------------------------------------


def test_textures_are_the_same_bytes_everywhere():
    images, labels = make_textures(500, seed=1)
    assert images.shape == (500, 3, 32, 32)
    assert labels.bincount().tolist() == [50] * 10
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert digest[:16] == "49e08b7e6b4abc98"
    # No value of the table is so near a tie that another libm could round it otherwise.
    exact = np.sin(2 * np.pi * np.arange(4096) / 4096) * 2**15
    assert np.abs(exact - np.floor(exact) - 0.5).min() > 1e-6
    assert (np.round(exact) / 2**15 == SINE).all()


def test_textures_need_no_files():
    data = load_dataset("textures", "/nowhere")
    assert data.train_images.shape == (4000, 3, 32, 32)
    assert data.test_images.shape == (1000, 3, 32, 32)
    assert data.train_labels.bincount().tolist() == [400] * 10
    assert not (data.train_images[:1000] == data.test_images).flatten(1).all(1).any()
    before = data.test_images.clone()
    data.test_images.zero_()  # changes this copy only
    data.classes.clear()
    again = load_dataset("textures", "/nowhere")
    assert torch.equal(again.test_images, before)
    assert again.classes == list(TEXTURE_CLASSES)


# ---- torchvision --------------------------------------------------------------------------------


def write_torchvision_files(name, root):
    """Write torchvision's files with a few images; pixel (c, y, x) of image i is 10 c + y + i."""

    def pixels(number, size):
        c, y, _ = np.mgrid[0:3, 0:size, 0:size]
        return np.stack([10 * c + y + i for i in range(number)]).astype(np.uint8)

    def put(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    if name == "cifar10":
        folder = root / "cifar-10-batches-py"
        for part in ["data_batch_1", *(f"data_batch_{i}" for i in range(2, 6)), "test_batch"]:
            content = {"data": pixels(1, 32).reshape(1, -1), "labels": [7]}
            put(folder / part, pickle.dumps(content))
        put(folder / "batches.meta", pickle.dumps({"label_names": list("abcdefghij")}))
    elif name == "cifar100":
        folder = root / "cifar-100-python"
        for part in ("train", "test"):
            content = {"data": pixels(2, 32).reshape(2, -1), "fine_labels": [7, 99]}
            put(folder / part, pickle.dumps(content))
        put(folder / "meta", pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    elif name == "stl10":
        folder = root / "stl10_binary"
        for part, number in [("train", 2), ("unlabeled", 3), ("test", 2)]:
            # STL-10 stores columns first.
            put(folder / f"{part}_X.bin", pixels(number, 96).transpose(0, 1, 3, 2).tobytes())
            put(folder / f"{part}_y.bin", np.array([8] * number, np.uint8).tobytes())
        put(folder / "class_names.txt", b"a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n")
    elif name == "svhn":
        root.mkdir(exist_ok=True)
        for part in ("train", "test"):
            images = pixels(2, 32).transpose(2, 3, 1, 0)
            content = {"X": images, "y": np.array([[7], [10]], np.uint8)}
            scipy.io.savemat(root / f"{part}_32x32.mat", content)
    else:
        folder = root / "FashionMNIST" / "raw"
        for part in ("train", "t10k"):
            head = bytes([0, 0, 8, 3]) + np.array([2, 28, 28], ">i4").tobytes()
            put(folder / f"{part}-images-idx3-ubyte", head + pixels(2, 28)[:, 0].tobytes())
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
def test_torchvision_data_sets(tmp_path, monkeypatch, name, train, test, size, classes):
    write_torchvision_files(name, tmp_path)
    skip_checksums(monkeypatch)
    data = load_dataset(name, tmp_path)
    assert data.train_labels.tolist() == train
    assert data.test_labels.tolist() == test
    assert len(data.classes) == classes
    for images, number in [(data.train_images, len(train)), (data.test_images, len(test))]:
        assert images.shape == (number, 3, size, size)
        assert images.dtype == torch.uint8
    assert data.test_images[0, 2, 5, 9] == (0 if name == "fashion_mnist" else 20) + 5


def test_svhn_names_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    write_torchvision_files("svhn", tmp_path)
    skip_checksums(monkeypatch)
    with pytest.raises(ValueError, match="pip install scipy"):
        load_dataset("svhn", tmp_path)


@pytest.mark.parametrize(
    ("name", "archive", "folder"),
    [
        ("cifar10", "cifar-10-python.tar.gz", ""),
        ("svhn", "test_32x32.mat", ""),
        ("fashion_mnist", "ubyte", "FashionMNIST/raw"),
    ],
)
def test_a_failed_download_names_what_to_put_where(tmp_path, monkeypatch, name, archive, folder):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(ConnectionError) as error:
        load_dataset(name, tmp_path)
    for part in (f"--data_name {name}", "no route to host", archive, str(tmp_path / folder)):
        assert part in str(error.value)


# ---- folders, lists and shards ------------------------------------------------------------------


def test_folder_with_classes(tmp_path):
    write_image(tmp_path / "train" / "cat" / "0.png", (255, 0, 0))
    write_image(tmp_path / "elsewhere" / "1.PNG", (0, 0, 9))
    os.symlink(tmp_path / "elsewhere", tmp_path / "train" / "eel")
    write_image(tmp_path / "val" / "cat" / "0.png", (7, 0, 0))
    write_image(tmp_path / "test" / "eel" / "0.png", (8, 0, 0))  # test takes precedence over val
    data = load_dataset("folder", tmp_path)
    assert (data.classes, data.train_labels.tolist()) == (["cat", "eel"], [0, 1])
    assert data.train_images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 9]]
    assert data.test_images[:, 0, 0, 0].tolist() == [8]
    write_image(tmp_path / "test" / "cow" / "0.png", 0)
    with pytest.raises(ValueError, match="class cow"):
        load_dataset("folder", tmp_path)


def test_flat_folder_of_mixed_sizes_and_modes(tmp_path):
    write_image(tmp_path / "a.png", 100, (40, 20), "L")
    write_image(tmp_path / "b.jpg", (9, 9, 9), (20, 60))
    write_image(tmp_path / "deep" / "c.png", (1, 2, 3, 4), (30, 20), "RGBA")
    data = load_dataset("folder", tmp_path)
    assert data.train_images.shape == (3, 3, 20, 20)
    assert (data.test_images, data.classes) == (None, [])
    assert data.train_labels.tolist() == [-1, -1, -1]
    assert load_dataset("folder", tmp_path, image_size=8).train_images.shape[-1] == 8


def test_csv_list(tmp_path):
    for i in range(3):
        write_image(tmp_path / "img" / f"{i}.png", i)
    (tmp_path / "list.csv").write_text("path,label\nimg/2.png,x\nimg/0.png,\nimg/1.png,a\n")
    data = load_dataset("folder", tmp_path / "list.csv")
    assert data.classes == ["a", "x"]
    assert data.train_labels.tolist() == [1, -1, 0]
    assert data.train_images[:, 0, 0, 0].tolist() == [2, 0, 1]
    (tmp_path / "list.csv").rename(tmp_path / "train.csv")
    (tmp_path / "test.csv").write_text("path,label\nimg/0.png,a\n")
    assert load_dataset("folder", tmp_path).test_labels.tolist() == [0]
    (tmp_path / "test.csv").write_text("path,label\nimg/0.png,\nimg/1.png,a\n")
    with pytest.raises(ValueError, match="0.png"):  # a test image needs a class
        load_dataset("folder", tmp_path)


def test_imagenet_stays_in_its_files(tmp_path):
    for split, number in [("train", 6), ("val", 4)]:
        for i in range(number):
            write_image(tmp_path / split / ("cat", "dog")[i % 2] / f"{i}.png", (i, 0, 0))
    data = load_dataset("imagenet", tmp_path, 8)
    assert data.train_images.shape == (6, 3, 8, 8)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.cat(list(data.test_images.split(3)))[:, 0, 0, 0].tolist() == [0, 2, 1, 3]
    half = data.subset(2, seed=0)
    assert len(half.train_images) == 2
    assert half.train_labels.tolist() == [0, 1]
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"no image")
    unread = load_dataset("imagenet", tmp_path, 8)
    with pytest.raises(UnreadableImageError, match="2.png"):
        list(unread.train_images.split(9))
    data = load_dataset("imagenet", tmp_path, 8, bad_images="skip")
    assert data.train_labels.tolist() == [0, 0, 1, 1, 1]
    assert len(next(iter(data.train_images.split(9)))) == 5
    assert len(data.unreadable) == 1
    assert images_checksum(unread.train_images) != images_checksum(data.train_images)


@pytest.mark.parametrize("name", ["folder", "imagenet", "webdataset"])
def test_test_only_decodes_no_training_image(tmp_path, name):
    for split, number in [("train", 2), ("val", 3)]:
        for i in range(number):
            write_image(tmp_path / split / "01"[i % 2] / f"{i}.png", (i, 0, 0))
    (tmp_path / "train" / "0" / "bad.png").write_bytes(b"no image")
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as shard:
            for path in sorted((tmp_path / split).rglob("*.png")):
                shard.add(path, path.name)
                label = tarfile.TarInfo(f"{path.stem}.cls")
                label.size = 1
                shard.addfile(label, io.BytesIO(path.parent.name.encode()))
    data = load_dataset(name, tmp_path, 12, test_only=True, bad_images="skip")
    assert len(data.train_images) == len(data.train_labels) == 0
    assert data.test_labels.tolist() == [0, 0, 1]
    assert data.classes == ["0", "1"]  # of the training images all the same
    assert data.unreadable == []
    data = load_dataset(name, tmp_path, 12, bad_images="skip")
    assert (len(data.train_images), len(data.unreadable)) == (2, 1)
