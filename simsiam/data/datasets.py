"""Data sets by name: torchvision's, the user's own folders and lists, shards, textures."""

import contextlib
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN, FashionMNIST

from simsiam.data import folders
from simsiam.data.decode import (
    DEFAULT_DECODE,
    FOLDER_DATA,
    IMAGE_EXTENSIONS,
    USER_DATA,
    DecodeOptions,
    decode_files,
    read_header,
)
from simsiam.data.loader import Data, ImageFiles, LoadOptions, filter_readable
from simsiam.data.shards import load_shards
from simsiam.data.textures import TEXTURE_CLASSES, make_textures
from simsiam.runtime import distributed


def load_dataset(
    name: str,
    root: str | Path,
    image_size: int | None = None,
    workers: int = 2,
    bad_images: str = "error",
    test_only: bool = False,
    decode: DecodeOptions = DEFAULT_DECODE,
    split_names: Sequence[str] | None = None,
) -> Data:
    """Load the data set `name`, a key of DATASETS; torchvision's are downloaded once into `root`.

    Images are uint8, N x C x H x W, or `ImageFiles` for imagenet and webdataset, which are decoded
    in each epoch. Labels are int64, N. The other arguments are for the user's own files:
    `image_size` in pixels, `workers` threads that decode, "skip" as `bad_images`, `test_only` to
    leave the training images out, and `split_names` (see `load_folder`).

    Raises ValueError for a wrong argument, FileNotFoundError or ValueError naming the file for
    unusable files, ConnectionError for a failed download.
    """
    if name not in DATASETS:
        raise ValueError(f"--data_name {name}: choose {', '.join(DATASETS)}")
    if decode.channels != 3 and name not in USER_DATA:
        raise ValueError(
            f"--data_name {name}: its images have 3 channels, but --channels is {decode.channels}: "
            f"choose {' or '.join(USER_DATA)}, or an encoder for 3"
        )
    if split_names and (name not in FOLDER_DATA or not Path(root).is_dir()):
        raise ValueError(
            f"--split_names {' '.join(split_names)}: needs a folder as --data_root, and "
            "--data_name folder or imagenet"
        )
    if name in TORCHVISION and len(folders.split_roots(root)) > 1:
        raise ValueError(f"--data_root {root}: several folders, but {name} has one")
    options = LoadOptions(image_size, workers, bad_images, test_only, decode, split_names)
    return DATASETS[name](root, options)


def check_data_root(name: str, root: str | Path) -> None:
    """Raise ValueError if `root` has images of the user's own, but `name` is torchvision's.

    To be called if the user gave --data_root without --data_name. Looks at 1,000 files.
    """
    if name in TORCHVISION and not any(Path(root, file).exists() for file in TORCHVISION[name][1]):
        files = itertools.islice(itertools.chain([Path(root)], Path(root).rglob("*")), 1000)
        if any(file.suffix.lower() in (*IMAGE_EXTENSIONS, ".csv") for file in files):
            raise ValueError(
                f"--data_root {root}: has images, but --data_name is {name}: add --data_name "
                f"folder, or --data_name {name} to download it there"
            )


def check_has_test(test: object, root: str | Path) -> None:
    """Raise ValueError if the data set at `root` has no test images: `test` is None."""
    if test is None:
        raise ValueError(f"--data_root {root}: has no labelled test images")


# ---- data sets without files of the user's own --------------------------------------------------


@functools.cache
def cached_textures() -> Data:
    """Generate the textures (15 MB) once per process."""
    return Data(*make_textures(4000, seed=1), *make_textures(1000, seed=2), list(TEXTURE_CLASSES))


def load_textures(*_: object) -> Data:
    """Return the textures: 4,000 training and 1,000 test images of 32 x 32 pixels."""
    return copy.deepcopy(cached_textures())  # a caller may change its own copy


# Class and, relative to the root, files of which one exists after the download.
TORCHVISION = {
    "cifar10": (CIFAR10, ("cifar-10-batches-py", "cifar-10-python.tar.gz")),
    "cifar100": (CIFAR100, ("cifar-100-python", "cifar-100-python.tar.gz")),
    "stl10": (STL10, ("stl10_binary", "stl10_binary.tar.gz")),
    "svhn": (SVHN, ("train_32x32.mat",)),
    "fashion_mnist": (FashionMNIST, ("FashionMNIST",)),
}


def load_torchvision(name: str, root: str | Path, *_: object) -> Data:
    """Load a data set of torchvision at its native size; download it if necessary.

    STL-10's training images include the unlabelled ones. Fashion-MNIST's channel is repeated three
    times. Raises ConnectionError if the download fails.
    """
    cls, (*_, archive) = TORCHVISION[name]
    folder = Path(root)
    splits = [{"train": True}, {"train": False}]
    if name in ("stl10", "svhn"):
        splits = [{"split": "train+unlabeled" if name == "stl10" else "train"}, {"split": "test"}]
    if name == "svhn":
        archive = "train_32x32.mat and test_32x32.mat"
    elif name == "fashion_mnist":
        archive, folder = "its four *-ubyte.gz files", folder / "FashionMNIST" / "raw"

    def download() -> list[torch.utils.data.Dataset]:
        try:
            return [cls(root, download=True, **split) for split in splits]
        except ImportError as error:  # SVHN is read with SciPy
            raise ValueError(
                f"--data_name {name}: needs {error.name}: pip install scipy"
            ) from error
        except (OSError, RuntimeError) as error:  # URLError; RuntimeError for a wrong checksum
            reason = getattr(error, "reason", error)
            raise ConnectionError(
                f"--data_name {name}: could not be downloaded ({reason}): put {archive} into "
                f"{folder}, or use a data set that needs no network: --data_name textures"
            ) from error

    tensors = []
    parts = distributed.rank0_first(download)
    for part in parts:
        images = torch.as_tensor(np.asarray(part.data))
        if name.startswith("cifar"):
            images = images.permute(0, 3, 1, 2)  # N x H x W x 3 -> N x 3 x H x W
        elif name == "fashion_mnist":
            images = images[:, None].expand(-1, 3, -1, -1)
        labels = part.targets if hasattr(part, "targets") else part.labels
        tensors += [images.contiguous(), torch.as_tensor(np.asarray(labels)).long()]
    return Data(*tensors, list(getattr(parts[0], "classes", map(str, range(10)))))


# ---- the user's own images ----------------------------------------------------------------------


def load_folder(root: str | Path, options: LoadOptions, in_memory: bool = True) -> Data:
    """Load images of the user's own: decoded once, or as `ImageFiles` unless `in_memory`.

    `root` is one of these, or several of them joined by a colon:
    - a folder with `train/<class>/*` and, for the scores, `test/<class>/*` or `val/<class>/*`;
    - a folder with `train.csv` and, for the scores, `test.csv` or `val.csv`;
    - a CSV list with a column `path` (relative to the list) and, optionally, `label`;
    - a folder of images at any depth, without labels;
    - Kaggle's ImageNet as unpacked.

    Splits may have other usual names (`folders.SPLIT_NAMES`), or those given as `split_names`.
    `image_size` defaults to the median shorter side of up to 100 images, at most 96 pixels.
    Raises FileNotFoundError or ValueError, naming the file.
    """
    decode, workers, bad_images = options.decode, options.workers, options.bad_images
    train, test, summary, _ = folders.find_images(
        Path(root), options.split_names, exclude=decode.exclude
    )
    size = options.image_size or default_image_size(train.files, decode)

    def read(files: list[Path]) -> tuple[Tensor | ImageFiles, dict[int, str]]:
        if in_memory:
            return decode_files(files, size, workers, bad_images, options=decode)
        readable, reasons = filter_readable(list(map(str, files)), workers, bad_images, decode)
        return ImageFiles(readable, size, workers, decode), reasons

    data = Data.from_files(train[:2], test and test[:2], read, options.test_only)
    return dataclasses.replace(data, summary=summary, train_files=train.files if in_memory else ())


def default_image_size(files: list[Path], decode: DecodeOptions) -> int:
    """Return the median shorter side of up to 100 images, at most 96 pixels."""
    sides = []
    for path in files[:: max(1, len(files) // 100)]:
        with contextlib.suppress(ValueError):  # reported when the file is decoded
            sides.append(min(read_header(path, decode)[0]))
    return min(96, int(np.median(sides))) if sides else 32


# The functions that load a data set, by its name, from its root and `LoadOptions`.
DATASETS: dict[str, Callable[..., Data]] = {
    **{name: functools.partial(load_torchvision, name) for name in TORCHVISION},
    "folder": load_folder,
    "imagenet": functools.partial(load_folder, in_memory=False),
    "webdataset": load_shards,
    "textures": load_textures,
}
