"""Data sets by name: torchvision's, the user's own folders and lists, shards, textures."""

import copy
import functools
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from simsiam.data import folders
from simsiam.runtime import distributed
from simsiam.data.decode import DEFAULT_DECODE, SKIP_HINT, USER_DATA, DecodeOptions, decode_files, read_header, imagenet_resize_size
from simsiam.data.loader import Data, ImageFiles, filter_readable
from simsiam.data.shards import load_shards
from simsiam.data.textures import TEXTURE_CLASSES, make_textures

DATA_NAMES = tuple(
    ("cifar10 cifar100 stl10 svhn fashion_mnist folder imagenet webdataset textures").split()
)

# What torchvision has downloaded: a folder of it holds one of these.
TORCHVISION_FILES = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    "stl10": ("stl10_binary", "stl10_binary.tar.gz"),
    "svhn": ("train_32x32.mat",),
    "fashion_mnist": ("FashionMNIST",),
}


def check_data_root(name: str, root: str | Path) -> None:
    """Raises ValueError where `root` holds images of the user's own, not the data set `name`.

    For where the user gave the one and not the other.
    """
    there = any(Path(root, part).exists() for part in TORCHVISION_FILES.get(name, ()))
    if name in TORCHVISION_FILES and not there and folders.has_images(Path(root)):
        raise ValueError(
            f"--data_root {root}: holds images, and the data set is {name}: add --data_name "
            f"folder; or --data_name {name}, which is then downloaded there"
        )


def check_has_test(test: object, root: str | Path) -> None:
    """Raises ValueError where the data set at `root` has no part `test` to score with: None."""
    if test is None:
        raise ValueError(f"--data_root {root}: has no labelled test images to score with")


def resize_size(name: str, size: int) -> int:
    """What the test transform of the data set `name` resizes to before its centre crop of `size`.

    ImageNet's custom is 256 for a crop of 224; elsewhere no margin is cut off.
    """
    return imagenet_resize_size(size) if name in ("imagenet", "webdataset") else size


def load_dataset(
    name: str,
    root: str | Path,
    image_size: int | None = None,
    workers: int = 2,
    bad_images: str = "error",
    test_only: bool = False,
    decode: DecodeOptions = DEFAULT_DECODE,
    split_names: list[str] | None = None,
) -> Data:
    """The data set `name`, one of DATA_NAMES; torchvision's are downloaded once into `root`.

    Images are uint8, N x C x H x W, `image_size` pixels a side where it is given; labels int64, N.
    `folder` takes the user's own images (see `load_folder`), of one root or several, decoded by
    `workers` threads; `imagenet` too, but keeps them as `ImageFiles`, which each epoch decodes again,
    and `webdataset` (see `load_shards`) as `Shards`. `decode` and `split_names` are for these.

    Raises ValueError for an unknown name, FileNotFoundError or ValueError (naming the file) for a
    folder that cannot be used, ConnectionError where a download fails.
    """
    if decode.channels != 3 and name not in USER_DATA:
        raise ValueError(
            f"--data_name {name}: its images have 3 channels, not {decode.channels}: give "
            f"{', '.join(USER_DATA)} or another encoder"
        )
    if split_names and (name not in ("folder", "imagenet") or not Path(root).is_dir()):
        raise ValueError("--split_names: goes with --data_name folder or imagenet, and a folder")
    if name in TORCHVISION_FILES and len(folders.split_roots(root)) > 1:
        raise ValueError(f"--data_root: {name} has one; several are for --data_name folder")
    if name == "textures":
        return copy.deepcopy(load_textures())  # what one run does to them is not another's
    if name in ("folder", "imagenet"):
        how = (image_size, workers, bad_images, test_only, name == "folder", decode, split_names)
        return load_folder(Path(root), *how)
    if name == "webdataset":
        return load_shards(str(root), image_size, workers, bad_images, test_only, decode)
    if name not in DATA_NAMES:
        raise ValueError(f"--data_name {name}: choose one of {', '.join(DATA_NAMES)}")
    return load_torchvision(name, Path(root))


@functools.cache
def load_textures() -> Data:
    """The textures, made once a process: many runs of it may ask for them, and they are 15 MB."""
    return Data(*make_textures(4000, seed=1), *make_textures(1000, seed=2), list(TEXTURE_CLASSES))


def load_torchvision(name: str, root: Path) -> Data:
    """CIFAR-10/100, STL-10, SVHN or Fashion-MNIST at their native size, as `Data`.

    STL-10's training images are its labelled and its unlabelled ones; Fashion-MNIST's one channel
    is repeated three times. Raises ConnectionError where the download fails.
    """
    sets = torchvision.datasets
    kinds = {
        "cifar10": sets.CIFAR10,
        "cifar100": sets.CIFAR100,
        "stl10": sets.STL10,
        "svhn": sets.SVHN,
        "fashion_mnist": sets.FashionMNIST,
    }
    kind, place = kinds[name], root
    splits = [{"train": True}, {"train": False}]
    if name in ("stl10", "svhn"):
        splits = [{"split": "train+unlabeled" if name == "stl10" else "train"}, {"split": "test"}]
    if name == "svhn":
        archive = "train_32x32.mat and test_32x32.mat"
    elif name == "fashion_mnist":
        archive, place = "its four *-ubyte.gz files", root / "FashionMNIST" / "raw"
    else:
        archive = kind.filename

    def downloaded() -> list[torch.utils.data.Dataset]:
        try:
            return [kind(root, download=True, **split) for split in splits]
        except ImportError as error:  # SVHN's reader
            raise ValueError(
                f"--data_name {name}: needs {error.name}: pip install scipy"
            ) from error
        except (OSError, RuntimeError) as error:  # URLError; RuntimeError at a bad MD5
            reason = getattr(error, "reason", error)
            raise ConnectionError(
                f"--data_name {name}: could not be downloaded ({reason}); put {archive} into "
                f"{place} yourself, or go on without a network: --data_name textures"
            ) from error

    parts = distributed.rank0_first(downloaded)
    tensors = []
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


def load_folder(
    root: Path,
    image_size: int | None = None,
    workers: int = 2,
    bad_images: str = "error",
    test_only: bool = False,
    in_memory: bool = True,
    decode: DecodeOptions = DEFAULT_DECODE,
    split_names: list[str] | None = None,
) -> Data:
    """The user's own images, decoded once or left as `ImageFiles`; if `test_only`, no training image.

    `root` is one of
    - a folder with `train/<class>/*` and, to score with, `test/<class>/*` or `val/<class>/*`;
    - a folder with `train.csv` and, to score with, `test.csv` or `val.csv`;
    - a CSV list: column `path` (relative to the list's folder), optional column `label`;
    - a folder of images at any depth, without labels;
    - Kaggle's ImageNet, as it is unpacked.

    In the place of `train`, `test` and `val` there may be one of `folders.SPLIT_NAMES`; `split_names`
    says which to take. `decode`: of the files, and which of them to leave out.

    Each image's shorter side is resized to `image_size`, then its centre is cropped: the default
    is the median shorter side of (at most 100 of) the images, at most 96.

    A file that cannot be read is an error or, if `bad_images` is "skip", left out.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    train, test, line, _ = folders.find_images(root, split_names, exclude=decode.exclude)
    files, names = train.files, train.labels
    classes = sorted({name for name in names if name is not None})
    number = {name: i for i, name in enumerate(classes)} | {None: -1}
    if test:
        for path, name in zip(test.files, test.labels, strict=True):
            if name is None:
                raise ValueError(f"{path}: has no class, and is to be scored with")
            if name not in number:
                raise ValueError(f"{path}: its class {name} is not among the training classes")
    if image_size is None:
        image_size = default_image_size(files[:: max(1, len(files) // 100)], bad_images, decode)
    bad: list[str] = []

    def part(files: list[Path], names: list[str | None]) -> tuple[Tensor | ImageFiles, Tensor]:
        if in_memory:
            images, found = decode_files(files, image_size, workers, bad_images, options=decode)
        else:
            good, found = filter_readable(list(map(str, files)), workers, bad_images, decode)
            images = ImageFiles(good, image_size, workers, decode)
        bad.extend(found.values())
        good = [name for i, name in enumerate(names) if i not in found]
        return images, torch.tensor([number[name] for name in good], dtype=torch.int64)

    trained = part([], []) if test_only and test else part(files, names)
    tested = part(test.files, test.labels) if test else (None, None)
    return Data(*trained, *tested, classes, bad, line, files if in_memory else ())


def default_image_size(files: list[Path], bad_images: str, decode: DecodeOptions) -> int:
    """The median shorter side of some images, at most 96."""
    sides = []
    for path in files:
        try:
            sides.append(min(read_header(path, decode).size))
        except ValueError as error:
            if bad_images == "error":
                raise ValueError(f"{error}{SKIP_HINT}") from error
    return min(96, int(np.median(sides))) if sides else 32
