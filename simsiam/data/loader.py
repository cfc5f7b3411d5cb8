"""Data sets in memory or in files, and the loader of their shuffled batches.

Images are uint8 tensors on the device, or files whose crops are made by worker processes.
"""

import atexit
import dataclasses
import itertools
import multiprocessing.util
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simsiam.data.decode import (
    DEFAULT_DECODE,
    SKIP_HINT,
    DecodeOptions,
    ImageFile,
    UnreadableImageError,
    decode_files,
    ignore_pil_warnings,
    read_image,
    resize_center_crop,
    resize_size,
)
from simsiam.runtime import distributed
from simsiam.views.augment import Batch, Views
from simsiam.views.ops import Augmentation, crop_boxes


class LoadOptions(NamedTuple):
    """The arguments of `datasets.load_dataset` after the root."""

    image_size: int | None
    workers: int
    bad_images: str
    test_only: bool
    decode: DecodeOptions
    split_names: Sequence[str] | None


@dataclasses.dataclass
class Data:
    """A data set. Images: uint8, N x C x H x W, or `ImageFiles`. Labels: int64, N; -1 is "none".

    `test_images` is None without labelled test images. `unreadable`: the files left out, with
    reasons. `summary`: a line about the files read, or "". `train_files`: the user's files of the
    training images that are in memory, including unreadable ones.
    """

    train_images: "Tensor | ImageFiles"
    train_labels: Tensor
    test_images: "Tensor | ImageFiles | None"
    test_labels: Tensor | None
    classes: list[str]
    unreadable: list[str] = dataclasses.field(default_factory=list)
    summary: str = ""
    train_files: Sequence[ImageFile] = ()

    @classmethod
    def from_files(
        cls,
        train: tuple[Sequence[ImageFile], Sequence[str | None]],
        test: tuple[Sequence[ImageFile], Sequence[str | None]] | None,
        read: Callable[[Sequence], tuple["Tensor | ImageFiles", dict[int, str]]],
        test_only: bool,
        class_order: Callable[[str], Any] | None = None,
    ) -> "Data":
        """Build a data set from files and their class names, or None.

        `read` returns the images of files, and the reasons of unreadable ones by index. Where there
        are test images, `test_only` reads no training image. `class_order`: a sort key. Raises
        ValueError for a test image of an unknown class or without one.
        """
        classes = sorted(set(train[1]) - {None}, key=class_order)
        index = {name: i for i, name in enumerate(classes)}
        for file, name in zip(*test, strict=True) if test else ():
            if name not in index:
                reason = f"its class {name} has no training image" if name else "it needs a class"
                raise ValueError(f"{file}: is a test image, and {reason}")
        unreadable = []

        def read_part(files: Sequence, names: Sequence) -> "tuple[Tensor | ImageFiles, Tensor]":
            images, reasons = read(files)
            unreadable.extend(reasons.values())
            labels = [index.get(name, -1) for i, name in enumerate(names) if i not in reasons]
            return images, torch.tensor(labels, dtype=torch.int64)

        train_part = read_part([], []) if test_only and test else read_part(*train)
        test_part = read_part(*test) if test else (None, None)
        return cls(*train_part, *test_part, classes, unreadable)

    def to(self, device: torch.device) -> "Data":
        """Move images and labels to `device`."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(self, **{name: x.to(device) for name, x in values.items()})

    def select(self, which: Tensor) -> "Data":
        """Select training images by indices or a mask; keep all test images."""
        which = which.to(self.train_labels.device)
        return dataclasses.replace(
            self, train_images=self.train_images[which], train_labels=self.train_labels[which]
        )

    def subset(self, size: int, seed: int, flag: str = "--train_size") -> "Data":
        """Select `size` training images with `balanced_subset`."""
        return self.select(balanced_subset(self.train_labels.cpu(), size, seed, flag))

    def limit(self, size: int, seed: int) -> "Data":
        """Select at most `size` training images."""
        return self.subset(size, seed) if len(self.train_images) > size else self


def balanced_subset(labels: Tensor, size: int, seed: int, flag: str = "--train_size") -> Tensor:
    """Return sorted indices of `size` samples, drawn with `seed`, balanced over the classes.

    A class with too few samples gives all it has. Samples without a label count as one class.
    Raises ValueError, which names `flag`, if there are fewer samples.
    """
    if not 0 < size <= len(labels):
        raise ValueError(f"{flag} {size}: must be from 1 to {len(labels)}, the number of images")
    order = np.random.default_rng([seed, 0]).permutation(len(labels))
    shuffled = labels.numpy()[order]
    rank_in_class = np.empty(len(labels), int)
    for label in np.unique(shuffled):
        rank_in_class[shuffled == label] = np.arange((shuffled == label).sum())
    chosen = order[np.argsort(rank_in_class, kind="stable")[:size]]
    return torch.from_numpy(np.sort(chosen))


def evenly_spaced(number: int, maximum: int) -> Tensor:
    """Return at most `maximum` indices below `number`, evenly spaced."""
    return torch.linspace(0, number - 1, min(number, maximum)).long()


# ---- images that stay in their files ------------------------------------------------------------


# Images per worker message under the test transform. Two messages of each worker wait in the
# shared memory, so a message must be small.
EVAL_BATCH_SIZE = 64


class CropDataset(torch.utils.data.Dataset):
    """Batches of crops of image files: uint8, n x views x size x size x C.

    An item is an epoch and the indices of the batch's files; where one is unreadable, it gives the
    reason. A file gets `num_views` random crops, whose boxes are a function of (seed, epoch,
    index); or its centre crop under the test transform if `num_views` is 0.
    """

    def __init__(self, files: "ImageFiles", num_views: int, augmentation: Augmentation, seed: int):
        self.files, self.num_views = files, num_views
        self.augmentation, self.seed = augmentation, seed

    def __getitem__(self, item: tuple[int, np.ndarray]) -> Tensor | str:
        epoch, indices = item
        return self.read_batch([(self.files.paths[i], i) for i in indices.tolist()], epoch)

    def read_batch(self, samples: list[tuple[ImageFile, int]], epoch: int) -> Tensor | str:
        """Return the crops of files, each with the number of its random stream; or a reason."""
        crops = []
        for file, number in samples:
            try:
                image = read_image(file, self.files.decode)
                crops.append(self.crop(image, [self.seed, epoch, number]))
            except ValueError as error:
                return str(error)
        return torch.from_numpy(np.stack(crops))

    def crop(self, image: Image.Image, seed: list[int]) -> np.ndarray:
        """Crop an image, at random unless `num_views` is 0: uint8, views x size x size x C."""
        size = self.files.size
        if not self.num_views:
            return resize_center_crop(image, size, resize_size("imagenet", size))[None]
        rng = np.random.default_rng(seed)
        scale, ratio = self.augmentation.crop_scale, self.augmentation.crop_ratio
        boxes = crop_boxes(rng, self.num_views, image.height, image.width, scale, ratio)
        # Crop, then resize: PIL's resize of a box would mix in pixels from outside of it.
        crops = (image.crop((x, y, x + w, y + h)) for y, x, h, w in boxes.tolist())
        bilinear = Image.Resampling.BILINEAR
        return np.stack([np.asarray(crop.resize((size, size), bilinear)) for crop in crops])


class BatchSampler(list):
    """The items of a `CropDataset` in an epoch."""

    def set_epoch(self, epoch: int, start: int, batches: list[Tensor]) -> None:
        """Continue with the indices of an epoch's batches from step `start` on."""
        self[:] = [(epoch, batch.numpy()) for batch in batches[start:]]


def init_worker(worker: int) -> None:
    """Ignore signals in a worker: the run handles them, and needs its workers until a step ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ignore_pil_warnings()


def kill_workers() -> None:
    """Kill the workers at exit: they ignore SIGTERM, and Python would wait for them forever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their death
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@dataclasses.dataclass
class ImageFiles:
    """Image files in place of a uint8 tensor N x C x size x size.

    `workers` processes decode them whenever they are needed; the crops go to `device`.
    """

    paths: Sequence[ImageFile]
    size: int
    workers: int = 2
    decode: DecodeOptions = DEFAULT_DECODE
    device: torch.device | str = "cpu"

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.paths), self.decode.channels, self.size, self.size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, which: Tensor | slice) -> "ImageFiles":
        """Select files by indices, a mask or a slice."""
        which = which.cpu().numpy() if isinstance(which, Tensor) else which
        indices = np.arange(len(self))[which].tolist()
        return dataclasses.replace(self, paths=[self.paths[i] for i in indices])

    def to(self, device: torch.device) -> "ImageFiles":
        """Set the device of the images."""
        return dataclasses.replace(self, device=device)

    def split(self, size: int) -> Iterator[Tensor]:
        """Iterate over chunks under the test transform, as Tensor.split: uint8, n x C x H x W."""
        chunks = [chunk.split(EVAL_BATCH_SIZE) for chunk in torch.arange(len(self)).split(size)]
        batches = list(itertools.chain(*chunks))
        crops = EpochCrops(CropDataset(self, 0, Augmentation(), 0))(0, 0, batches)
        for parts in chunks:
            yield torch.cat([images[:, 0] for images in itertools.islice(crops, len(parts))])

    def train_dataset(
        self, views: Views, seed: int, batch_size: int, rows: slice, ordered: bool
    ) -> CropDataset:
        """Return the random crops of a `Loader`: `rows` of each global batch on this rank.

        With `ordered` the images follow the loader's order, which its labels need.
        """
        return CropDataset(self, views.number, views.augmentation, seed)


class EpochCrops:
    """Batches of crops from worker processes; called with an epoch, its first step and its batches.

    A batch is the indices of its files. An iterable `dataset` gets the arguments of the call by
    `set_epoch`, and chooses the files itself.
    """

    def __init__(self, dataset: CropDataset):
        files = dataset.files
        is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
        self.order, self.device = dataset if is_stream else BatchSampler(), files.device
        self.loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=None,  # an item is a batch
            sampler=None if is_stream else self.order,
            num_workers=files.workers,
            pin_memory=torch.device(files.device).type == "cuda",
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # without it, the global generator would advance
            # A stream's worker copies the dataset, with its epoch, when it starts.
            persistent_workers=files.workers > 0 and dataset.num_views > 0 and not is_stream,
        )
        # For a child process of multiprocessing, which calls no atexit handlers.
        multiprocessing.util.Finalize(None, kill_workers, exitpriority=0)

    def __call__(self, epoch: int, start: int, batches: list[Tensor]) -> Iterator[Tensor]:
        """Iterate over crops on the device: uint8, n x views x C x size x size."""
        self.order.set_epoch(epoch, start, batches)
        distributed.wait_before_fork()
        iterator = iter(self.loader)  # forks the workers
        atexit.unregister(kill_workers)
        atexit.register(kill_workers)  # registered last, called first
        for crops in iterator:
            if isinstance(crops, str):
                raise UnreadableImageError(f"{crops}{SKIP_HINT}")
            # Only pinned memory stays valid until an asynchronous copy is done.
            crops = crops.to(self.device, non_blocking=self.loader.pin_memory)
            yield crops.permute(0, 1, 4, 2, 3)


def filter_readable(
    files: Sequence[ImageFile],
    workers: int,
    bad_images: str,
    decode: DecodeOptions = DEFAULT_DECODE,
) -> tuple[Sequence[ImageFile], dict[int, str]]:
    """Return the readable files, and the reasons of the unreadable ones by index.

    With `bad_images` "skip", the ranks decode all files once, since the files of a run must be
    known before its first epoch; otherwise all of them pass unread.
    """
    if bad_images != "skip":
        return files, {}
    rows = distributed.slice_for_rank(len(files), distributed.rank(), distributed.world_size())
    bad = decode_files(files[rows], 1, workers, "skip", allow_empty=True, options=decode)[1]
    parts = distributed.all_gather_objects({rows.start + i: reason for i, reason in bad.items()})
    reasons = {i: reason for part in parts for i, reason in part.items()}
    if files and len(reasons) == len(files):
        raise ValueError(reasons[0])
    return [path for i, path in enumerate(files) if i not in reasons], reasons


def check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Check that /dev/shm can hold the prefetched batches, where a worker would die of a bus error.

    Raises ValueError.
    """
    if os.path.isdir("/dev/shm") and workers:
        memory = os.statvfs("/dev/shm")
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun
        free, needed = memory.f_bavail * memory.f_frsize, 2 * workers * local_ranks * batch_bytes
        if free < needed:
            raise ValueError(
                f"--num_workers {workers}: the prefetched batches need {needed / 1e6:.0f} MB in "
                f"/dev/shm, but {free / 1e6:.0f} MB are free: use fewer workers, or a larger "
                "docker run --shm-size"
            )


def images_checksum(images: Tensor | ImageFiles) -> int:
    """Return a CRC-32 of images, by which a resumed run recognizes its training images.

    That of `ImageFiles` is of their names below their common folder, which may have moved.
    """
    if isinstance(images, ImageFiles):
        names = [str(path) for path in images.paths]
        common = os.path.commonpath(names)
        names = "\n".join(os.path.relpath(name, common) for name in names)
        return zlib.crc32(names.encode("utf-8", "surrogateescape"))
    return zlib.crc32(images.contiguous().numpy())


class Loader:
    """Shuffled batches of images, and of labels if given; `len` is the number of steps per epoch.

    `batch_size` is the global one: of the n images of a batch, this rank gets the rows
    `local_slice(n)`, but all n labels. `ImageFiles` give crops, which `views` turn into views. The
    last, incomplete batch is dropped unless `keep_last`. Raises ValueError for a batch size that
    does not fit the images or the ranks.
    """

    def __init__(
        self,
        images: Tensor | ImageFiles,
        batch_size: int,
        seed: int = 0,
        labels: Tensor | None = None,
        keep_last: bool = False,
        views: Views | None = None,
        local_slice: Callable[[int], slice] = distributed.local_slice,
    ):
        number = len(images)
        if not 0 < batch_size <= number:
            raise ValueError(
                f"--batch_size {batch_size}: must be from 1 to {number}, the training images"
            )
        self.images, self.labels, self.local_slice = images, labels, local_slice
        self.batch_size, self.seed = batch_size, seed
        self.steps = -(-number // batch_size) if keep_last else number // batch_size
        self.crops = None
        if isinstance(images, ImageFiles):
            rows = local_slice(batch_size)
            # The larger of the batches of an epoch and of the evaluation.
            crops = max(views.number * (rows.stop - rows.start), EVAL_BATCH_SIZE)
            check_shared_memory(crops * images.shape[1] * images.size**2, images.workers)
            ordered = labels is not None
            self.crops = EpochCrops(images.train_dataset(views, seed, batch_size, rows, ordered))

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over an epoch from step `start` on; the order is a function of (seed, epoch)."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        order = torch.from_numpy(order[: self.steps * self.batch_size])
        batches = order.split(self.batch_size)
        rows = [self.local_slice(len(batch)) for batch in batches]
        # One transfer per epoch: one per step would make the host wait for the device.
        device = self.images.device if self.labels is None else self.labels.device
        on_device = order.to(device).split(self.batch_size)
        if self.crops is None:
            images = (self.images[on_device[step][rows[step]]] for step in range(start, self.steps))
        else:
            local = [batch[part] for batch, part in zip(batches, rows, strict=True)]
            images = self.crops(epoch, start, local)
        for step, part in enumerate(images, start):
            labels = None if self.labels is None else self.labels[on_device[step]]
            yield Batch(epoch, step, part, labels, len(batches[step]), rows[step])
