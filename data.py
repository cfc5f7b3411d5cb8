"""The pixels: data sets, batched two-view augmentation, the loader.

Images are bytes (uint8, N x 3 x H x W) held on the device, or files whose crops workers cut; views
are made on the device, a batch at a time.
Nothing is drawn from a global RNG: what a step sees is a function of (seed, epoch, step, sample).
"""

import atexit
import csv
import dataclasses
import io
import itertools
import multiprocessing
import os
import random
import signal
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

# Images of so many pixels that PIL warns are refused here, and PIL need not say it too.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Nor that the notes beside the pixels, which are not read here, are damaged.
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)

DATA_NAMES = (
    "cifar10",
    "cifar100",
    "stl10",
    "svhn",
    "fashion_mnist",
    "folder",
    "imagenet",
    "webdataset",
    "textures",
)

NORMALISATION = {  # mean and std of each channel
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def usual_input(stem: str) -> dict:
    """Image size, mean and std of an encoder of which no more is known than its stem."""
    kind, size = ("imagenet", 224) if stem == "imagenet" else ("cifar", 32)
    mean, std = NORMALISATION[kind]
    return {"image_size": size, "mean": mean, "std": std}


@dataclasses.dataclass
class Data:
    """A data set. Images: uint8, N x 3 x H x W, or `Files`. Labels: int64, N; -1 is "no label".

    Without test images (or without labels) there is nothing to score: `test_images` is None.
    `bad`: the files that could not be read and were left out, each with the reason.
    """

    train_images: "Tensor | Files"
    train_labels: Tensor
    test_images: "Tensor | Files | None"
    test_labels: Tensor | None
    classes: list[str]
    bad: list[str] = dataclasses.field(default_factory=list)

    def to(self, device: torch.device) -> "Data":
        """The same on `device`."""
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        moved = (t if t is None else t.to(device) for t in tensors)
        return Data(*moved, self.classes, self.bad)

    def subset(self, size: int, seed: int, flag: str = "--train_size") -> "Data":
        """`size` of the training images, class-balanced and seeded; all test images."""
        chosen = subset(self.train_labels.cpu(), size, seed, flag).to(self.train_labels.device)
        return dataclasses.replace(
            self,
            train_images=self.train_images[chosen],
            train_labels=self.train_labels[chosen],
        )

    def at_most(self, size: int, seed: int) -> "Data":
        """A `subset` of `size`, or all if they are fewer."""
        return self.subset(size, seed) if len(self.train_images) > size else self


def load(
    name: str,
    root: str | Path,
    image_size: int | None = None,
    workers: int = 2,
    bad_images: str = "error",
    test_only: bool = False,
) -> Data:
    """The data set `name`, one of DATA_NAMES; torchvision's are downloaded once into `root`.

    `folder` takes the user's own images (see `load_folder`), decoded by `workers` threads;
    `imagenet` too, but keeps them as `Files`, which each epoch decodes again, and `webdataset`
    (see `load_shards`) as `Shards`.

    Raises ValueError for an unknown name, FileNotFoundError or ValueError (naming the file) for a
    folder that cannot be used, ConnectionError where a download fails.
    """
    if name == "textures":
        return Data(*textures(4000, seed=1), *textures(1000, seed=2), list(TEXTURES))
    if name in ("folder", "imagenet"):
        in_memory = name == "folder"
        return load_folder(Path(root), image_size, workers, bad_images, test_only, in_memory)
    if name == "webdataset":
        return load_shards(str(root), image_size, workers, bad_images, test_only)
    if name not in DATA_NAMES:
        raise ValueError(f"--data_name {name}: choose one of {', '.join(DATA_NAMES)}")
    return load_torchvision(name, Path(root))


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
    try:
        parts = [kind(root, download=True, **split) for split in splits]
    except ImportError as error:  # SVHN's reader
        raise ValueError(f"--data_name {name}: needs {error.name}: pip install scipy") from error
    except (OSError, RuntimeError) as error:  # torchvision: URLError, and RuntimeError at a bad MD5
        reason = getattr(error, "reason", error)
        raise ConnectionError(
            f"--data_name {name}: could not be downloaded ({reason}); put {archive} into "
            f"{place} yourself, or go on without a network: --data_name textures"
        ) from error
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
) -> Data:
    """The user's own images, decoded once or left as `Files`; if `test_only`, no training image.

    `root` is one of
    - a folder with `train/<class>/*` and, to score with, `test/<class>/*` or `val/<class>/*`;
    - a folder with `train.csv` and, to score with, `test.csv` or `val.csv`;
    - a CSV list: column `path` (relative to the list's folder), optional column `label`;
    - a folder of images at any depth, without labels.

    Each image's shorter side is resized to `image_size`, then its centre is cropped: the default
    is the median shorter side of (at most 100 of) the images, at most 96.

    A file that cannot be read is an error or, if `bad_images` is "skip", left out.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    test = None
    if root.suffix.lower() == ".csv":
        train = list_csv(root)
    elif not root.is_dir():
        raise FileNotFoundError(f"--data_root {root}: there is no such folder or .csv list")
    elif (root / "train").is_dir() or (root / "train.csv").is_file():
        for split in ("train", "val", "test"):  # test/ before val/ where there are both
            if (root / split).is_dir():
                found = list_folder(root / split, labelled=True)
            elif (root / f"{split}.csv").is_file():
                found = list_csv(root / f"{split}.csv")
            else:
                continue
            if split == "train":
                train = found
            else:
                test = found
    else:
        train = list_folder(root, labelled=False)

    files, names = train
    classes = sorted({name for name in names if name is not None})
    number = {name: i for i, name in enumerate(classes)} | {None: -1}
    if not classes:
        test = None
    if test:
        for path, name in zip(*test, strict=True):
            if name is None or name not in number:
                raise ValueError(f"{path}: its class {name} is not among the training classes")
    if image_size is None:
        image_size = usual_size(files[:: max(1, len(files) // 100)], bad_images)
    bad: list[str] = []

    def part(files: list[Path], names: list[str | None]) -> tuple[Tensor | Files, Tensor]:
        if in_memory:
            images, found = decode(files, image_size, workers, bad_images)
        else:
            good, found = readable([str(path) for path in files], workers, bad_images)
            images = Files(good, image_size, workers)
        bad.extend(found.values())
        good = [name for i, name in enumerate(names) if i not in found]
        return images, torch.tensor([number[name] for name in good], dtype=torch.int64)

    train = ([], []) if test_only and test else train
    return Data(*part(*train), *(part(*test) if test else (None, None)), classes, bad)


def readable(
    files: "list[str | Member]", workers: int, bad_images: str
) -> "tuple[list[str | Member], dict[int, str]]":
    """Those of `files` that can be decoded, and the others as `decode` names them.

    All are taken for good unless `bad_images` is "skip": what is to be skipped must be known
    before the first epoch, so that all files are decoded once.
    """
    bad = decode(files, 1, workers, "skip")[1] if bad_images == "skip" else {}
    return [path for i, path in enumerate(files) if i not in bad], bad


def usual_size(files: list[Path], bad_images: str) -> int:
    """The median shorter side of some images, at most 96."""
    sides = []
    for path in files:
        try:
            sides.append(min(open_image(path).size))
        except ValueError:
            if bad_images == "error":
                raise
    return min(96, int(np.median(sides))) if sides else 32


def list_folder(folder: Path, labelled: bool) -> tuple[list[Path], list[str | None]]:
    """Image files below `folder`, sorted, each with its class: the first folder's name, or None."""
    files = sorted(
        Path(place, name)
        for place, _, names in os.walk(folder, followlinks=True)  # as torchvision's ImageFolder
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS) and name[0] != "."
    )
    if not files:
        raise FileNotFoundError(f"{folder}: there are no images ({', '.join(IMG_EXTENSIONS)})")
    parts = [path.relative_to(folder).parts for path in files]
    return files, [part[0] if labelled and len(part) > 1 else None for part in parts]


def list_csv(path: Path) -> tuple[list[Path], list[str | None]]:
    """The files and labels of a CSV list (columns `path`, optional `label`)."""
    if not path.is_file():
        raise FileNotFoundError(f"--data_root {path}: there is no such list")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "path" not in rows[0]:
        raise ValueError(f"{path}: needs a header with a column `path`, and at least one row")
    return [path.parent / row["path"] for row in rows], [row.get("label") or None for row in rows]


def open_image(path: "str | Path | Member | Sample") -> Image.Image:
    """PIL's image, not decoded yet.

    Raises ValueError naming the file; also for one of so many pixels that PIL warns of a bomb.
    """
    try:
        image = Image.open(path.content() if isinstance(path, Member | Sample) else path)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        return image
    except Exception as error:  # a decoder fed with junk may raise anything
        reason = {
            FileNotFoundError: "it does not exist",
            PermissionError: "no permission",
            Image.DecompressionBombError: f"too large: {error}",
        }.get(type(error), "not an image")
        raise ValueError(f"{path}: cannot be read ({reason}); mend or remove it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; 16 bits a pixel to 8, where PIL's own conversion would clip."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        image = Image.fromarray((pixels // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def shorter_side(name: str, size: int) -> int:
    """What the test transform of the data set `name` resizes to before its centre crop of `size`.

    ImageNet's custom is 256 for a crop of 224; elsewhere no margin is cut off.
    """
    return round(size * 256 / 224) if name in ("imagenet", "webdataset") else size


def read_image(path: "str | Path | Member | Sample") -> Image.Image:
    """A file's image in RGB, decoded. Raises ValueError naming the file."""
    try:
        return to_rgb(open_image(path))
    except Exception as error:  # a decoder fed with junk may raise anything
        reason = str(error)
        if not reason.startswith(str(path)):
            reason = f"{path}: cannot be read ({reason}); mend or remove it"
        raise ValueError(reason) from error


def centre(image: Image.Image, size: int, shorter: int) -> np.ndarray:
    """Shorter side resized to `shorter`, then the centre cropped: uint8, size x size x 3."""
    width, height = image.size
    if min(width, height) != shorter:
        scale = shorter / min(width, height)
        width, height = max(shorter, round(width * scale)), max(shorter, round(height * scale))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def decode(
    files: "list[str] | list[Path] | list[Member]",
    size: int,
    workers: int = 2,
    bad_images: str = "error",
    shorter: int | None = None,
) -> tuple[Tensor, dict[int, str]]:
    """Image files -> uint8, N x 3 x size x size, cut by `centre` (`shorter`: by default size).

    If `bad_images` is "skip", a file that cannot be read is left out, and the second result names
    it: its place in `files`, and why. Else it raises ValueError naming it.
    """
    images = np.empty((len(files), size, size, 3), np.uint8)

    def one(i: int) -> str | None:
        try:
            images[i] = centre(read_image(files[i]), size, shorter or size)
        except ValueError as error:
            if bad_images == "error":
                raise
            return str(error)
        return None

    with ThreadPoolExecutor(max(1, workers)) as pool:
        done = pool.map(one, range(len(files)))  # disable=None: a bar on a terminal only
        bar = tqdm(done, "decoding", len(files), leave=False, disable=None, unit="image")
        try:
            bad = {i: reason for i, reason in enumerate(bar) if reason}
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise
    if files and len(bad) == len(files):
        raise ValueError(next(iter(bad.values())))
    if bad:
        images = np.delete(images, list(bad), axis=0)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), bad


def subset(labels: Tensor, size: int, seed: int, flag: str = "--train_size") -> Tensor:
    """Sorted indices of `size` samples, class-balanced as far as the classes reach, seeded.

    Images without a label count as one class. Raises ValueError for a size out of range,
    naming the `flag` that it is of.
    """
    if not 0 < size <= len(labels):
        raise ValueError(f"{flag} {size}: must be from 1 to {len(labels)}, the images there")
    order = np.random.default_rng([seed, 0]).permutation(len(labels))
    shuffled = labels.numpy()[order]
    turn = np.empty(len(labels), int)  # a sample's place within its class
    for label in np.unique(shuffled):
        turn[shuffled == label] = np.arange((shuffled == label).sum())
    return torch.from_numpy(np.sort(order[np.argsort(turn, kind="stable")[:size]]))


# ---- images that stay in their files ------------------------------------------------------------


class BadImage(Exception):
    """A file that could not be decoded in the middle of a run; says which, and what to do."""


class Cutter(torch.utils.data.Dataset):
    """What a loader's worker makes of a file: uint8, looks x size x size x 3, or why it cannot.

    An item is (epoch, i): `looks` random crops of file i, decoded once; their boxes are a function
    of (seed, epoch, i). Without looks: the centre, as the test transform has it.
    """

    def __init__(self, files: "Files", looks: int, crop_scale: tuple[float, float], seed: int):
        self.files, self.looks, self.crop_scale, self.seed = files, looks, crop_scale, seed

    def __getitem__(self, item: tuple[int, int]) -> np.ndarray | str:
        epoch, i = item
        try:
            return self.cut(read_image(self.files.paths[i]), [self.seed, epoch, i])
        except ValueError as error:
            return str(error)

    def cut(self, image: Image.Image, chance: list[int]) -> np.ndarray:
        """The crops of an image, their boxes a function of `chance`."""
        size = self.files.size
        if not self.looks:
            return centre(image, size, shorter_side("imagenet", size))[None]
        rng = np.random.default_rng(chance)
        boxes = crop_boxes(rng, self.looks, image.height, image.width, self.crop_scale)
        # Cropped first: PIL's resize of a box would mix in pixels from outside of it.
        crops = (image.crop((x, y, x + w, y + h)) for y, x, h, w in boxes.tolist())
        bilinear = Image.Resampling.BILINEAR
        return np.stack([np.asarray(crop.resize((size, size), bilinear)) for crop in crops])


def stack(items: list[np.ndarray | str]) -> Tensor | str:
    """A worker's batch; of one with a bad file only the reason."""
    bad = [item for item in items if isinstance(item, str)]
    return bad[0] if bad else torch.from_numpy(np.stack(items))


class Batches:
    """The items of a DataLoader, a batch at a time; others in each epoch."""

    def __init__(self):
        self.epoch, self.parts = 0, ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for part in self.parts:
            yield [(self.epoch, i) for i in part.tolist()]


def heed_no_signals(worker: int) -> None:
    """A worker leaves signals to the run, which needs it to the end of its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers() -> None:
    """At the process's exit, which would wait forever for workers that heed no SIGTERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@dataclasses.dataclass
class Files:
    """Image files in the place of a uint8 tensor of images, N x 3 x size x size.

    They are decoded when needed, by `workers` processes, and what those cut goes to the device.
    """

    paths: "list[str] | list[Member]"
    size: int
    workers: int = 2
    device: torch.device | str = "cpu"

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.paths), 3, self.size, self.size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, chosen: Tensor | slice) -> "Files":
        """A part of the files: indices, a mask or a slice, as of a tensor."""
        chosen = chosen.cpu().numpy() if isinstance(chosen, Tensor) else chosen
        chosen = np.arange(len(self))[chosen].tolist()
        return dataclasses.replace(self, paths=[self.paths[i] for i in chosen])

    def to(self, device: torch.device) -> "Files":
        """The same, to be brought to `device`."""
        return dataclasses.replace(self, device=device)

    def split(self, number: int) -> Iterator[Tensor]:
        """As of a tensor: chunks under the test transform, uint8, `number` x 3 x size x size."""
        loader = self.loader(0, (1.0, 1.0), 0)
        loader.batch_sampler.parts = torch.arange(len(self)).split(number)
        for images in self.read(loader):
            yield images[:, 0]

    def loader(
        self, looks: int, crop_scale: tuple[float, float], seed: int
    ) -> torch.utils.data.DataLoader:
        """A DataLoader, whose batch_sampler is a `Batches`; its workers stay between epochs."""
        return self.started(
            Cutter(self, looks, crop_scale, seed),
            batch_sampler=Batches(),
            collate_fn=stack,
            persistent_workers=self.workers > 0 and looks > 0,
        )

    def started(
        self, dataset: torch.utils.data.Dataset, **settings: object
    ) -> torch.utils.data.DataLoader:
        """A DataLoader with the settings that all of ours share."""
        return torch.utils.data.DataLoader(
            dataset,
            num_workers=self.workers,
            pin_memory=torch.device(self.device).type == "cuda",
            worker_init_fn=heed_no_signals,
            generator=torch.Generator(),  # else it would draw from the global one
            **settings,
        )

    def read(self, loader: torch.utils.data.DataLoader) -> Iterator[Tensor]:
        """What the workers cut, on the device: uint8, n x looks x 3 x size x size."""
        batches = iter(loader)
        atexit.unregister(end_workers)
        atexit.register(end_workers)  # the last one to be registered is the first to be called
        for found in batches:
            if isinstance(found, str):
                raise BadImage(f"{found}, or leave out what cannot be read: --bad_images skip")
            found = found.to(self.device, non_blocking=True)
            yield found.permute(0, 1, 4, 2, 3)


def room_between_processes(batch: int, workers: int) -> None:
    """Whether the shared memory holds the batches, of so many bytes, that wait in it.

    Raises ValueError, where else a worker would die of a bus error in the middle of a run.
    """
    if os.path.isdir("/dev/shm") and workers:
        there = os.statvfs("/dev/shm")
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this machine
        free, needed = there.f_bavail * there.f_frsize, 2 * workers * ranks * batch  # two in work
        if free < needed:
            raise ValueError(
                f"--num_workers {workers}: their batches need {needed / 1e6:.0f} MB in /dev/shm, "
                f"which has {free / 1e6:.0f}: docker run --shm-size gives more; or fewer workers"
            )


def crc(images: Tensor | Files) -> int:
    """A checksum of the training images: a run goes on with those that it began with.

    Of files, the names below their common folder (which may have moved) are taken.
    """
    if isinstance(images, Files):
        names = [str(path) for path in images.paths]
        common = os.path.commonpath(names)
        return zlib.crc32("\n".join(os.path.relpath(name, common) for name in names).encode())
    return zlib.crc32(images.contiguous().numpy())


# ---- images in shards ---------------------------------------------------------------------------

# Images that a worker keeps, as the bytes of their files, to draw the next one from.
SHUFFLED = 1000


class Member(NamedTuple):
    """An image file within a tar file; printed as a path."""

    shard: str
    key: str  # webdataset's: the name as far as its first dot
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}"

    def content(self) -> io.BytesIO:
        """The file's bytes."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


class Sample(NamedTuple):
    """An image file that is already read; printed as a path."""

    name: str
    bytes: bytes

    def __str__(self) -> str:
        return self.name

    def content(self) -> io.BytesIO:
        """The file's bytes."""
        return io.BytesIO(self.bytes)


@dataclasses.dataclass
class Shards(Files):
    """`Files` within tar files, which pre-training reads from their beginnings to their ends.

    All else (test images, the kNN's bank, linear evaluation) goes to single members, as if they
    were files. `number`: the images in all of the tar files, of which `paths` may be a part.
    """

    number: int = 0


class Stream(torch.utils.data.IterableDataset):
    """The batches of one rank in an epoch, from step `start` on, `size` images each.

    The order of the shards is drawn an epoch, and they are dealt out to the ranks, then to a rank's
    workers, whose batches take turns; a worker draws each image from `SHUFFLED` ones. One that has
    come to its last shard's end, before the others, begins with its first again.

    All of it is a function of (seed, epoch, step) and of the numbers of ranks and workers.
    """

    def __init__(self, cutter: Cutter, size: int, rank: int, ranks: int):
        self.cutter, self.size, self.rank, self.ranks = cutter, size, rank, ranks
        self.shards = sorted({member.shard for member in cutter.files.paths})
        self.epoch, self.steps = 0, range(0)

    def __iter__(self) -> Iterator[Tensor | str]:
        import webdataset

        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        worker = (worker + self.steps.start) % workers  # whose turn it is at the first of the steps
        files, chance = self.cutter.files, [self.cutter.seed, self.epoch]
        order = np.random.default_rng(chance).permutation(len(self.shards))
        order = order[self.rank :: self.ranks][worker::workers]
        rng = random.Random(repr([*chance, self.rank, worker]))
        part = None  # where not all of the shards' images are wanted
        if len(files) < files.number:
            part = {(path.shard, path.key) for path in files.paths}

        def wanted(sample: dict) -> bool:
            named = part is None or (sample["__url__"], sample["__key__"]) in part
            return named and image_of(sample) is not None

        samples = webdataset.DataPipeline(
            webdataset.SimpleShardList([self.shards[i] for i in order]),
            webdataset.tarfile_to_samples(),
            webdataset.select(wanted),
            webdataset.shuffle(SHUFFLED, initial=SHUFFLED, rng=rng),
        ).repeat()
        before = len(range(worker, self.steps.start, workers))  # its batches before the first step
        samples = itertools.islice(samples, before * self.size, None)
        for _ in range(worker + before * workers, self.steps.stop, workers):
            yield stack([self.cut(sample) for sample in itertools.islice(samples, self.size)])

    def cut(self, sample: dict) -> np.ndarray | str:
        """What the cutter makes of one of webdataset's samples."""
        name = f"{sample['__url__']}/{sample['__key__']}"
        chance = zlib.crc32("/".join(Path(name).parts[-2:]).encode())
        try:
            image = read_image(Sample(name, sample[image_of(sample)]))
        except ValueError as error:
            return str(error)
        return self.cutter.cut(image, [self.cutter.seed, self.epoch, chance])


def image_of(sample: dict) -> str | None:
    """Which of a sample's parts is its image."""
    return next((end[1:] for end in IMG_EXTENSIONS if end[1:] in sample), None)


def load_shards(
    root: str, image_size: int | None, workers: int, bad_images: str, test_only: bool
) -> Data:
    """Tar files in webdataset's layout: `<key>.jpg` (or another image) and, of labels, `<key>.cls`.

    `root` is a pattern of the training set's, as `shard-{000000..000099}.tar`, or a folder of
    `*train*.tar` and, to score with, `*val*.tar` or `*test*.tar`. They must be files: what is in
    them is listed before the first epoch. Raises FileNotFoundError or ValueError, naming the file.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ValueError("--data_name webdataset: pip install webdataset") from error
    folder, test = Path(root), []
    if folder.is_dir():
        train, val, test = (
            sorted(map(str, folder.glob(f"*{split}*.tar"))) for split in ("train", "val", "test")
        )
        test = test or val
    else:
        train = expand_urls(root)
    if not train:
        raise FileNotFoundError(f"--data_root {root}: there is no *train*.tar")
    numbers: dict[str, int] = {}
    bad: list[str] = []

    def part(shards: list[str]) -> tuple[Shards, Tensor]:
        members, labels = [], []
        for shard in shards:
            found = list_shard(shard)
            members += found
            labels += found.values()
        good, found = readable(members, workers, bad_images)
        bad.extend(found.values())
        if not numbers:  # the training set's classes, where it is listed
            classes = sorted(set(labels) - {None}, key=lambda text: (len(text), text))
            numbers.update({name: i for i, name in enumerate(classes)})
        for member, label in zip(members, labels, strict=True):
            if label is not None and label not in numbers:
                raise ValueError(f"{member}: its class {label} is not among the training classes")
        labels = [-1 if name is None else numbers[name] for name in labels]
        kept = torch.tensor([i not in found for i in range(len(members))], dtype=torch.bool)
        images = Shards(good, image_size or 224, workers, number=len(members))
        return images, torch.tensor(labels, dtype=torch.int64)[kept]

    train_part = part([] if test_only and test else train)
    test_part = part(test) if test and numbers else (None, None)
    return Data(*train_part, *test_part, list(numbers), bad)


def list_shard(shard: str) -> dict[Member, str | None]:
    """The images of a tar file, each with its label."""
    try:
        found, labels = {}, {}
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                end = info.name.rpartition("/")[2].partition(".")[2]
                key = info.name[: len(info.name) - len(end) - 1]
                if info.isreg() and f".{end.lower()}" in IMG_EXTENSIONS:
                    found.setdefault(key, Member(shard, key, info.offset_data, info.size))
                elif info.isreg() and end.lower() == "cls":
                    labels[key] = archive.extractfile(info).read().decode().strip()
                archive.members = []
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--data_root {shard}: there is no such file") from error
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise ValueError(f"{shard}: is no tar file of images ({error})") from error
    if not found:
        raise ValueError(f"{shard}: there are no images in it")
    return {member: labels.get(key) for key, member in found.items()}


# ---- textures, the embedded data set ------------------------------------------------------------

TEXTURES = (
    "rows",
    "columns",
    "diagonals",
    "checks",
    "grid",
    "dots",
    "rings",
    "bricks",
    "zigzag",
    "blobs",
)
# A sine of 4096 steps, rounded: the rounding and the exact operations below (+ - * / floor sqrt)
# give every machine the same bytes, which libm's sine does not promise.
SINE = np.round(np.sin(2 * np.pi * np.arange(4096) / 4096) * 2**15) / 2**15


def wave(cycles: np.ndarray) -> np.ndarray:
    """Sine of `cycles` turns, in [-1, 1]."""
    return SINE[np.floor(cycles * 4096).astype(np.int64) & 4095]


def textures(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """`number` generated 32 x 32 images of ten texture classes in turn, and their labels.

    Phase, scale, contrast, polarity, lighting and tint vary in every class alike, so that neither
    single pixels nor colours tell the class; the arrangement does, and no view changes that.
    The same bytes on every machine.
    """
    rng = np.random.default_rng([seed, number])
    u = rng.random((number, 16, 1, 1))
    corners = rng.random((number, 14, 14))
    grain = rng.random((number, 32, 32)) - 0.5
    labels = np.arange(number) % len(TEXTURES)
    field = np.empty((number, 32, 32))
    for label, name in enumerate(TEXTURES):
        of = labels == label
        field[of] = texture(name, u[of], corners[of])
    y, x = np.mgrid[0:32, 0:32].astype(float)
    field *= np.where(u[:, 7] < 0.5, 1.0, -1.0) * (0.10 + 0.25 * u[:, 8])  # polarity, contrast
    field += 0.3 * ((u[:, 9] - 0.5) * (x - 15.5) + (u[:, 10] - 0.5) * (y - 15.5)) / 16  # lighting
    tint = 0.35 + 0.3 * u[:, 11] + 0.2 * (u[:, 12:15, 0] - 0.5)  # N x 3 x 1
    images = tint[..., None] + (field + 0.12 * grain)[:, None]
    pixels = np.clip(np.floor(images * 256), 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def texture(name: str, u: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Brightness in [-1, 1], N x 32 x 32, of one class, from its N x 16 random numbers."""
    y, x = np.mgrid[0:32, 0:32].astype(float)
    period = 5 + 6 * u[:, 0]  # pixels
    # Slightly turned, sheared by the same slope: exact, and as good as a rotation here.
    slope = 0.3 * (u[:, 1] - 0.5)
    a = (x + slope * y) / period + u[:, 2]  # in periods
    b = (y - slope * x) / period + u[:, 3]
    side = np.where(u[:, 4] < 0.5, 1.0, -1.0)

    def line(t: np.ndarray) -> np.ndarray:  # 0 on lines one period apart, 1 midway between them
        return np.abs(t - np.floor(t) - 0.5) * 2

    if name == "rows":
        field = wave(b)
    elif name == "columns":
        field = wave(a)
    elif name == "diagonals":
        field = wave((a + side * b) * 0.7)
    elif name == "checks":
        field = 1.5 * wave(a / 1.4) * wave(b / 1.4)
    elif name == "grid":
        field = 1 - 2.4 * np.minimum(line(a), line(b))
    elif name == "dots":
        field = 2.2 - 4.5 * np.sqrt((line(a) / 2) ** 2 + (line(b) / 2) ** 2)
    elif name == "rings":
        field = wave(np.sqrt((x - 32 * u[:, 5]) ** 2 + (y - 32 * u[:, 6]) ** 2) / period)
    elif name == "bricks":
        field = 1 - 2.4 * np.minimum(2 * line(a / 2 + 0.5 * (np.floor(b) % 2)), line(b))
    elif name == "zigzag":
        field = wave(b + 0.6 * line(a / 2))
    elif name == "blobs":
        # Random values on a grid of half a period, joined bilinearly. Sums, not a matrix product:
        # two neighbours and zeros add up the same in every order.
        cell = np.arange(32)[:, None] / (0.55 * period)
        down = np.clip(1 - np.abs(cell + u[:, 2] - np.arange(14)), 0, None)  # N x 32 x 14
        across = np.clip(1 - np.abs(cell + u[:, 3] - np.arange(14)), 0, None)
        mixed = (down[..., None] * corners[:, None]).sum(2)  # N x 32 x 14
        field = 4.5 * ((mixed[:, :, None] * across[:, None]).sum(3) - 0.5)
    return np.clip(field, -1, 1)


# ---- views --------------------------------------------------------------------------------------


def whole(number: int) -> slice:
    """Which of `number` images of a batch a process gets that is alone: all."""
    return slice(0, number)


def crop_boxes(
    rng: np.random.Generator,
    number: int,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Boxes of torchvision's RandomResizedCrop: int64, `number` x 4 (top, left, height, width).

    Ten tries of a random area and aspect ratio; where none fits, the whole image, cut centrally to
    the nearest ratio allowed.
    """
    area = height * width * rng.uniform(*scale, (number, 10))
    aspect = np.exp(rng.uniform(*np.log(ratio), (number, 10)))
    tries = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=-1).round()
    fits = ((tries > 0) & (tries <= (height, width))).all(-1)  # number x 10
    sides = tries[np.arange(number), fits.argmax(1)]
    fallback = (
        min(height, round(width / ratio[0])),
        min(width, round(height * ratio[1])),
    )
    some = fits.any(1)
    sides = np.where(some[:, None], sides, fallback)
    room = (height, width) - sides
    corner = np.floor(rng.random((number, 2)) * (room + 1))
    corner = np.where(some[:, None], corner, room // 2)
    return np.concatenate([corner, sides], axis=1).astype(np.int64)


def resize_weights(start: Tensor, length: Tensor, before: int, after: int) -> Tensor:
    """One axis of a crop and resize as matrices: N starts and lengths -> N x after x before.

    Bilinear with antialiasing, as torchvision's `resize`: a triangle as wide as the step between
    output pixels (but at least an input pixel), over the pixels of the crop only.
    """
    step = length[:, None, None] / after
    out = torch.arange(after, device=start.device)[:, None] + 0.5
    pixel = torch.arange(before, device=start.device) + 0.5 - start[:, None, None]  # N x 1 x before
    weights = (1 - (pixel - step * out).abs() / step.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel > 0) & (pixel < length[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def blur_weights(sigma: Tensor, size: int, taps: int) -> Tensor:
    """One axis of a Gaussian blur as matrices: N sigmas (pixels) -> N x size x size.

    `taps` wide, reflected at the borders, as torchvision's `gaussian_blur`. Sigma near 0: identity.
    """
    pixel = torch.arange(size, device=sigma.device)
    out = pixel[:, None]
    last = size - 1

    def gauss(offset: Tensor) -> Tensor:
        bell = torch.exp(-0.5 * (offset / sigma[:, None, None]) ** 2)
        return bell * (offset.abs() <= taps // 2)

    weights = gauss(pixel - out)
    weights = weights + gauss(-pixel - out) * (pixel > 0)
    weights = weights + gauss(2 * last - pixel - out) * (pixel < last)
    return weights / weights.sum(-1, keepdim=True)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Two matrix products a channel: N x 3 x H x W, N x h x H, N x w x W -> N x 3 x h x w.

    The result is fp32, and in memory channel by channel: each one's N x h x w numbers lie
    together, which the colour operations below run through several times faster.
    """
    n, channels = images.shape[:2]
    x = by_channel(images)
    found = x.new_empty(channels, n, rows.shape[1], columns.shape[1])
    for plane, out in zip(x.unbind(1), found, strict=True):
        torch.bmm(rows, plane @ columns.mT, out=out)
    return found.transpose(0, 1)


def by_channel(images: Tensor) -> Tensor:
    """N x 3 x H x W -> the same in fp32, laid out in memory as by `resample`; copied if need be."""
    planes = images.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.contiguous().transpose(0, 1)


def to_gray(x: Tensor) -> Tensor:
    """ITU-R 601 luma as torchvision rounds it: N x 3 x H x W -> N x 1 x H x W."""
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


# The colour operations: images in [0, 1], N x 3 x H x W, and a factor an image, N x 1 x 1 x 1.
# A factor of 1 (hue: 0) leaves an image as it is.


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Toward black (below 1) or away from it."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Toward the image's mean gray (below 1) or away from it."""
    mean = to_gray(x).flatten(1).mean(1).view_as(factor)
    return (x * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Toward each pixel's gray (below 1) or away from it."""
    return (x * factor).add_(to_gray(x).mul_(1 - factor)).clamp_(0, 1)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV by `turns` of the colour circle, value and chroma kept."""
    red, green, blue = x.unbind(1)  # N x H x W
    # Arithmetic instead of three cases by the largest channel, since `where` is slow. With green
    # and blue in order, and then the larger of them and red, hue in sixths of the circle is
    # |start + (middle - rest) / chroma|, `start` telling which were exchanged.
    larger, smaller = torch.maximum(green, blue), torch.minimum(green, blue)
    value, middle = torch.maximum(red, larger), torch.minimum(red, larger)
    lowest = torch.minimum(middle, smaller)
    chroma = value - lowest
    exchanged = (green < blue).float()
    start = (exchanged * 12).sub_(2).mul_(red < larger).sub_(exchanged, alpha=6)
    # No chroma, no hue: 0 / tiny is 0.
    hue = (middle.sub_(smaller)).div_(chroma.clamp(min=1e-12)).add_(start).abs_()
    hue = hue.add_(6 * turns[:, 0]).remainder_(6)
    found = torch.empty_like(x)
    # Each channel's share of the chroma is a trapezoid over the circle.
    trapezoids = (3, 1, -1), (2, -1, 2), (4, -1, 2)
    for out, (centre, slope, offset) in zip(found.unbind(1), trapezoids, strict=True):
        share = (hue - centre).abs_().mul_(slope).add_(offset).clamp_(0, 1)
        torch.addcmul(lowest, chroma, share, out=out)
    return found


COLOUR = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


class Views:
    """The augmented views of SimSiam, made in batches on the images' device.

    Random resized crop to `size`, flip, colour jitter, grayscale, Gaussian blur, normalise: what
    the authors' torchvision pipeline does an image at a time (paper, sec. 4 "Baseline settings";
    App. D: no blur on CIFAR). Parameters are drawn an image, with torchvision's distributions;
    the order of the four jitter operations is drawn a batch. All is drawn for the global batch,
    of which `share(number)` are this rank's.
    `jitter`: the strengths for brightness, contrast, saturation, hue.
    """

    def __init__(
        self,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        crop_scale: tuple[float, float] = (0.2, 1.0),
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
        jitter_p: float = 0.8,
        gray_p: float = 0.2,
        blur_p: float = 0.0,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        flip_p: float = 0.5,
        seed: int = 0,
        share: Callable[[int], slice] = whole,
    ):
        self.size, self.mean, self.std = size, mean, std
        self.crop_scale, self.jitter, self.jitter_p = crop_scale, jitter, jitter_p
        self.gray_p, self.blur_p, self.blur_sigma, self.flip_p = gray_p, blur_p, blur_sigma, flip_p
        self.base_seed, self.share = seed, share
        self.seed(0, 0)

    def seed(self, epoch: int, step: int, number: int | None = None) -> None:
        """The next two calls make the two views of this step, of a global batch of `number`."""
        self.rng, self.look = np.random.default_rng([self.base_seed, epoch, step]), 0
        self.number = number

    def __call__(self, images: Tensor) -> Tensor:
        """A view an image: uint8, N x 3 x H x W -> normalised float32, N x 3 x size x size.

        Or of N x looks x 3 x size x size crops that a loader's workers cut: of the next look.
        """
        cut = images.dim() == 5
        if cut:
            images, self.look = images[:, self.look], self.look + 1
        _, _, height, width = images.shape
        n = self.number or len(images)
        rng = self.rng
        boxes = np.zeros((n, 4)) if cut else crop_boxes(rng, n, height, width, self.crop_scale)
        strength = np.asarray(self.jitter)
        factors = rng.uniform(-strength, strength, (n, 4)) + np.array([1, 1, 1, 0])
        order = rng.permutation(4)
        flip, jitter, gray, blur = (
            rng.random((n, 4)) < (self.flip_p, self.jitter_p, self.gray_p, self.blur_p)
        ).T
        sigma = rng.uniform(*self.blur_sigma, n)
        factors[~jitter] = (1, 1, 1, 0)
        drawn = np.column_stack(
            [boxes, flip, factors, 1 - gray, np.where(blur, sigma, 1e-3)]
        ).astype(np.float32)
        n = len(images)
        # One transfer a view, and an asynchronous one: the device is never waited for.
        table = torch.from_numpy(drawn[self.share(self.number or n)])
        if images.device.type == "cuda":
            table = table.pin_memory()
        top, left, tall, wide, flip, *factors, colour, sigma = table.to(
            images.device, non_blocking=True
        ).unbind(1)

        flip = flip[:, None, None] > 0
        if cut:
            x = by_channel(images).div_(255)
            x = torch.where(flip[..., None], x.flip(-1), x)
        else:
            rows = resize_weights(top, tall, height, self.size)
            columns = resize_weights(left, wide, width, self.size)
            columns = torch.where(flip, columns.flip(1), columns)
            x = resample(images, rows / 255, columns)
        if self.jitter_p:
            for i in order:
                x = COLOUR[i](x, factors[i].view(n, 1, 1, 1))
        if self.gray_p:
            x = adjust_saturation(x, colour.view(n, 1, 1, 1))  # factor 0: grayscale
        if self.blur_p:
            # The kernel is a tenth of the image wide, as in SimCLR (arXiv 2002.05709, App. A).
            weights = blur_weights(sigma, self.size, self.size // 20 * 2 + 1)
            x = resample(x, weights, weights)
        return self.normalise(x)

    def plain(self, images: Tensor) -> Tensor:
        """The test transform: no chance, the whole image. Shapes as in `__call__`."""
        height, width = images.shape[2:]
        if (height, width) == (self.size, self.size):
            return self.normalise(images.float().div_(255))
        zero = torch.zeros(len(images), device=images.device)
        rows = resize_weights(zero, zero + height, height, self.size)
        columns = resize_weights(zero, zero + width, width, self.size)
        return self.normalise(resample(images, rows / 255, columns))

    def normalise(self, x: Tensor) -> Tensor:
        """[0, 1] -> zero mean and unit variance over the data set, channels_last; overwrites x."""
        # In place and by scalars: a tensor made of `mean` each step would make the host wait.
        for channel, mean, std in zip(x.unbind(1), self.mean, self.std, strict=True):
            channel.sub_(mean).div_(std)
        return x.contiguous(memory_format=torch.channels_last)


class Loader:
    """Shuffled batches of images, and of labels if you like, on the images' device.

    The last, incomplete batch is left out unless `keep_last`. `len(loader)`: the steps an epoch.
    Of `Files` a batch is their crops, as the `views` have them, N x `looks` x 3 x size x size.
    `batch_size` is that of all ranks together: of a batch's n images `share(n)` are this rank's,
    while labels come whole.
    """

    def __init__(
        self,
        tensors: list[Tensor | Files],
        batch_size: int,
        seed: int = 0,
        keep_last: bool = False,
        views: Views | None = None,
        looks: int = 2,
        share: Callable[[int], slice] = whole,
    ):
        number = len(tensors[0])
        if not 0 < batch_size <= number:
            raise ValueError(
                f"--batch_size {batch_size}: must be from 1 to {number}, the training images"
            )
        self.tensors, self.batch_size, self.seed, self.share = tensors, batch_size, seed, share
        self.looks = looks
        self.device = tensors[0].device
        self.steps = -(-number // batch_size) if keep_last else number // batch_size
        images, *others = tensors
        if isinstance(images, Files):
            mine = len(range(batch_size)[share(batch_size)])
            room_between_processes(looks * 3 * images.size**2 * mine, images.workers)
        # Labels are looked up by an image's place in the list, which a stream does not tell.
        self.streaming = isinstance(images, Shards) and not others
        if self.streaming:
            mine = share(batch_size)  # of equal parts
            size = mine.stop - mine.start
            rank, ranks = mine.start // size, batch_size // size
            stream = Stream(Cutter(images, looks, views.crop_scale, seed), size, rank, ranks)
            if ranks * max(1, images.workers) > len(stream.shards):
                raise ValueError(
                    f"--num_workers {images.workers}: on {ranks} ranks these would be more than "
                    f"the {len(stream.shards)} shards, each of which one worker reads"
                )
            self.files = images.started(stream, batch_size=None)
        elif isinstance(images, Files):
            self.files = images.loader(looks, views.crop_scale, seed)

    def __len__(self) -> int:
        return self.steps

    def number(self, step: int) -> int:
        """Images in the global batch of a step: only the last one's may be fewer."""
        return min(self.batch_size, len(self.tensors[0]) - step * self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, list[Tensor]]]:
        """(step, batch) from step `start` on; the order is a function of (seed, epoch)."""
        if self.streaming:
            self.files.dataset.epoch = epoch
            self.files.dataset.steps = range(start, self.steps)
            for step, images in enumerate(self.tensors[0].read(self.files), start):
                yield step, [images]
            return
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.tensors[0]))
        order = torch.from_numpy(order[: self.steps * self.batch_size])
        batches = order.to(self.device).split(self.batch_size)[start:]
        images, *others = self.tensors
        if isinstance(images, Files):
            parts = order.split(self.batch_size)[start:]
            self.files.batch_sampler.epoch = epoch
            self.files.batch_sampler.parts = [part[self.share(len(part))] for part in parts]
            found = images.read(self.files)
        else:
            found = (images[batch[self.share(len(batch))]] for batch in batches)
        for step, (batch, chosen) in enumerate(zip(batches, found, strict=True), start):
            yield step, [chosen, *(tensor[batch] for tensor in others)]
