"""Data sets in memory or in files, and the loader that deals out their batches.

Images are bytes (uint8, N x C x H x W) held on the device, or files whose crops workers cut.
"""

import atexit
import dataclasses
import itertools
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simsiam.runtime import distributed
from simsiam.data.decode import (
    DEFAULT_DECODE,
    SKIP_HINT,
    UnreadableImageError,
    ImageFile,
    DecodeOptions,
    resize_center_crop,
    decode_files,
    ignore_pil_warnings,
    imagenet_resize_size,
    read_image,
)
from simsiam.views.augment import Augmentation, Batch, Views, crop_boxes


@dataclasses.dataclass
class Data:
    """A data set. Images: uint8, N x C x H x W, or `ImageFiles`. Labels: int64, N; -1 is "no label".

    Without test images (or without labels) there is nothing to score: `test_images` is None.
    `unreadable`: the files that could not be read and were left out, each with the reason. `summary`: a
    line on how the files were read, or nothing. `train_files`: those of training images that were decoded
    from files of the user's own, before any was left out.
    """

    train_images: "Tensor | Files"
    train_labels: Tensor
    test_images: "Tensor | Files | None"
    test_labels: Tensor | None
    classes: list[str]
    unreadable: list[str] = dataclasses.field(default_factory=list)
    summary: str = ""
    train_files: Sequence[ImageFile] = ()

    def to(self, device: torch.device) -> "Data":
        """The same on `device`."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        there = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(self, **{name: x.to(device) for name, x in there.items()})

    def select(self, which: Tensor) -> "Data":
        """The training images that `which` (indices or a mask, on any device) says; all others."""
        which = which.to(self.train_labels.device)
        return dataclasses.replace(
            self, train_images=self.train_images[which], train_labels=self.train_labels[which]
        )

    def subset(self, size: int, seed: int, flag: str = "--train_size") -> "Data":
        """`size` of the training images, class-balanced and seeded; all test images."""
        return self.select(balanced_subset(self.train_labels.cpu(), size, seed, flag))

    def limit(self, size: int, seed: int) -> "Data":
        """A `balanced_subset` of `size`, or all if they are fewer."""
        return self.subset(size, seed) if len(self.train_images) > size else self


def balanced_subset(labels: Tensor, size: int, seed: int, flag: str = "--train_size") -> Tensor:
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


def evenly_spaced(number: int, most: int) -> Tensor:
    """The places of at most `most` out of `number`, evenly apart."""
    return torch.linspace(0, number - 1, min(number, most)).long()


# ---- images that stay in their files ------------------------------------------------------------


# Images under the test transform that a worker sends at once: small parts of a chunk, since two of
# each worker's wait in the shared memory.
EVAL_BATCH_SIZE = 64


class CropDataset(torch.utils.data.Dataset):
    """What a loader's worker makes of a file: uint8, views x size x size x C, or why it cannot.

    An item is (epoch, i): `views` random crops of file i, decoded once; their boxes are a function
    of (seed, epoch, i). With no views: the centre, as the test transform has it.
    """

    def __init__(self, files: "ImageFiles", views: int, augmentation: Augmentation, seed: int):
        self.files, self.views, self.augmentation, self.seed = files, views, augmentation, seed

    def __getitem__(self, item: tuple[int, int]) -> np.ndarray | str:
        epoch, i = item
        try:
            image = read_image(self.files.paths[i], self.files.decode)
            return self.crop(image, [self.seed, epoch, i])
        except ValueError as error:
            return str(error)

    def crop(self, image: Image.Image, chance: list[int]) -> np.ndarray:
        """The crops of an image, their boxes a function of `chance`."""
        size = self.files.size
        if not self.views:
            return resize_center_crop(image, size, imagenet_resize_size(size))[None]
        rng = np.random.default_rng(chance)
        scale, ratio = self.augmentation.crop_scale, self.augmentation.crop_ratio
        boxes = crop_boxes(rng, self.views, image.height, image.width, scale, ratio)
        # Cropped first: PIL's resize of a box would mix in pixels from outside of it.
        crops = (image.crop((x, y, x + w, y + h)) for y, x, h, w in boxes.tolist())
        bilinear = Image.Resampling.BILINEAR
        return np.stack([np.asarray(crop.resize((size, size), bilinear)) for crop in crops])


def collate_crops(items: list[np.ndarray | str]) -> Tensor | str:
    """A worker's batch; of one with a bad file only the reason."""
    bad = [item for item in items if isinstance(item, str)]
    return bad[0] if bad else torch.from_numpy(np.stack(items))


class EpochBatchSampler:
    """The items of a DataLoader, a batch at a time; others in each epoch."""

    def __init__(self):
        self.epoch, self.parts = 0, ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for part in self.parts:
            yield [(self.epoch, i) for i in part.tolist()]


def init_worker(worker: int) -> None:
    """A worker leaves signals to the run, which needs it to the end of its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ignore_pil_warnings()


def kill_workers() -> None:
    """At the process's exit, which would wait forever for workers that heed no SIGTERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@dataclasses.dataclass
class ImageFiles:
    """Image files in the place of a uint8 tensor of images, N x C x size x size.

    They are decoded when needed, by `workers` processes, and what those cut goes to the device.
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

    def __getitem__(self, chosen: Tensor | slice) -> "ImageFiles":
        """A part of the files: indices, a mask or a slice, as of a tensor."""
        chosen = chosen.cpu().numpy() if isinstance(chosen, Tensor) else chosen
        chosen = np.arange(len(self))[chosen].tolist()
        return dataclasses.replace(self, paths=[self.paths[i] for i in chosen])

    def to(self, device: torch.device) -> "ImageFiles":
        """The same, to be brought to `device`."""
        return dataclasses.replace(self, device=device)

    def split(self, number: int) -> Iterator[Tensor]:
        """As of a tensor: chunks under the test transform, uint8, `number` x C x size x size."""
        chunks = [chunk.split(EVAL_BATCH_SIZE) for chunk in torch.arange(len(self)).split(number)]
        crops = CropLoader(self, 0, Augmentation(), 0)
        found = crops(0, 0, list(itertools.chain(*chunks)))
        for parts in chunks:
            yield torch.cat([images[:, 0] for images in itertools.islice(found, len(parts))])

    def crop_batches(
        self, views: Views, seed: int, batch_size: int, rows: slice, ordered: bool
    ) -> "Callable[[int, int, list[Tensor]], Iterator[Tensor]]":
        """What a `Loader` calls in each epoch for the crops of its batches; see `CropLoader`.

        `rows` of the global `batch_size` are this rank's. `ordered`: whether the images must come
        in the loader's order (labels are looked up by an image's place).
        """
        return CropLoader(self, views.number, views.augmentation, seed)

    def make_dataloader(
        self, dataset: torch.utils.data.Dataset, **settings: object
    ) -> torch.utils.data.DataLoader:
        """A DataLoader with the settings that all of ours have."""
        return torch.utils.data.DataLoader(
            dataset,
            num_workers=self.workers,
            pin_memory=torch.device(self.device).type == "cuda",
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # else it would draw from the global one
            **settings,
        )

    def load_batches(self, loader: torch.utils.data.DataLoader) -> Iterator[Tensor]:
        """What the workers cut, on the device: uint8, n x views x C x size x size."""
        distributed.wait_before_fork()
        batches = iter(loader)  # forks the workers
        pinned = loader.pin_memory  # only then the copy has its memory until it is done
        atexit.unregister(kill_workers)
        atexit.register(kill_workers)  # the last one to be registered is the first to be called
        for found in batches:
            if isinstance(found, str):
                raise UnreadableImageError(f"{found}{SKIP_HINT}")
            found = found.to(self.device, non_blocking=pinned)
            yield found.permute(0, 1, 4, 2, 3)


class CropLoader:
    """The crops of chosen `files`, a batch at a time; its workers stay between epochs.

    Called with the epoch, the first step and, for each step of the epoch, the places of its files.
    """

    def __init__(self, files: ImageFiles, views: int, augmentation: Augmentation, seed: int):
        self.files = files
        self.loader = files.make_dataloader(
            CropDataset(files, views, augmentation, seed),
            batch_sampler=EpochBatchSampler(),
            collate_fn=collate_crops,
            persistent_workers=files.workers > 0 and views > 0,
        )

    def __call__(self, epoch: int, start: int, places: list[Tensor]) -> Iterator[Tensor]:
        self.loader.batch_sampler.epoch = epoch
        self.loader.batch_sampler.parts = places[start:]
        return self.files.load_batches(self.loader)


def filter_readable(
    files: Sequence[ImageFile], workers: int, bad_images: str, decode: DecodeOptions = DEFAULT_DECODE
) -> tuple[Sequence[ImageFile], dict[int, str]]:
    """Those of `files` that can be decoded, and the others as `decode_files` names them.

    All are taken for good unless `bad_images` is "skip": what is to be skipped must be known
    before the first epoch, so that all files are decoded once. The ranks share them.
    """
    if bad_images != "skip":
        return files, {}
    mine = distributed.slice_for_rank(len(files), distributed.rank(), distributed.world_size())
    bad = decode_files(files[mine], 1, workers, "skip", allow_none=True, options=decode)[1]
    parts = distributed.all_gather_objects({mine.start + i: reason for i, reason in bad.items()})
    bad = {i: reason for part in parts for i, reason in part.items()}
    if files and len(bad) == len(files):
        raise ValueError(bad[0])
    return [path for i, path in enumerate(files) if i not in bad], bad


def check_shared_memory(batch: int, workers: int) -> None:
    """Whether the shared memory holds the batches, of so many bytes, that wait in it.

    Raises ValueError, where else a worker would die of a bus error in the middle of a run.
    """
    if os.path.isdir("/dev/shm") and workers:
        there = os.statvfs("/dev/shm")
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this machine
        free, needed = there.f_bavail * there.f_frsize, 2 * workers * neighbours * batch
        if free < needed:
            raise ValueError(
                f"--num_workers {workers}: their batches need {needed / 1e6:.0f} MB in /dev/shm, "
                f"which has {free / 1e6:.0f}: docker run --shm-size gives more; or fewer workers"
            )


def images_checksum(images: Tensor | ImageFiles) -> int:
    """A checksum of the training images: a run goes on with those that it began with.

    Of files, the names below their common folder (which may have moved) are taken.
    """
    if isinstance(images, ImageFiles):
        names = [str(path) for path in images.paths]
        common = os.path.commonpath(names)
        names = "\n".join(os.path.relpath(name, common) for name in names)
        return zlib.crc32(names.encode("utf-8", "surrogateescape"))
    return zlib.crc32(images.contiguous().numpy())


class Loader:
    """Shuffled batches of images, and of labels if you like, on the images' device.

    The last, incomplete batch is left out unless `keep_last`. `len(loader)`: the steps an epoch.
    Of `ImageFiles` a batch is their crops, which `views` then make into views.
    `batch_size` is that of all ranks together: of a batch's n images `share(n)` are this rank's,
    while labels come whole. Raises ValueError for a batch that the images or ranks do not fit.
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
        self.crop_loader = None
        if isinstance(images, ImageFiles):
            rows = local_slice(batch_size)
            # What waits there in an epoch, or while the kNN looks at the images.
            crops = max(views.number * (rows.stop - rows.start), EVAL_BATCH_SIZE)
            check_shared_memory(crops * images.shape[1] * images.size**2, images.workers)
            self.crop_loader = images.crop_batches(views, seed, batch_size, rows, labels is not None)

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches from step `start` on; their order is a function of (seed, epoch)."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        order = torch.from_numpy(order[: self.steps * self.batch_size])
        places = order.split(self.batch_size)
        rows = [self.local_slice(len(part)) for part in places]
        # To the device at once: a transfer a step would let the host wait for it in each.
        device = self.images.device if self.labels is None else self.labels.device
        on_device = order.to(device).split(self.batch_size)
        if self.crop_loader is None:
            found = (self.images[on_device[step][rows[step]]] for step in range(start, self.steps))
        else:
            mine = [part[those] for part, those in zip(places, rows, strict=True)]
            found = self.crop_loader(epoch, start, mine)
        for step, images in enumerate(found, start):
            labels = None if self.labels is None else self.labels[on_device[step]]
            yield Batch(epoch, step, images, labels, len(places[step]), rows[step])
