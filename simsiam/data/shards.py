"""Images in shards: tar files in webdataset's layout, read sequentially."""

import io
import itertools
import random
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from simsiam.data.decode import IMAGE_EXTENSIONS
from simsiam.data.loader import (
    CropDataset,
    Data,
    ImageFiles,
    LoadOptions,
    filter_readable,
)
from simsiam.views.augment import Views

SHUFFLE_BUFFER = 1000  # encoded images per worker, of which the next one is drawn
MAX_LABEL_BYTES = 1000


class ShardMember(NamedTuple):
    """An image file in a tar file, with its content once it is read; `str()` gives a path."""

    shard: str
    offset: int
    key: str  # webdataset's: the name up to its first dot
    size: int
    content: bytes | None = None

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}"

    def open(self) -> io.BytesIO:
        """Return the content of the file."""
        if self.content is not None:
            return io.BytesIO(self.content)
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


class Shards(ImageFiles):
    """`ImageFiles` in tar files, which pre-training reads sequentially.

    Test images, the kNN's bank and linear evaluation read single members, as if they were files.
    """

    def train_dataset(
        self, views: Views, seed: int, batch_size: int, rows: slice, ordered: bool
    ) -> CropDataset:
        """Return random crops in the order of `ShardStream`, or of the loader if `ordered`.

        Raises ValueError if there are more workers than shards.
        """
        if ordered:
            return super().train_dataset(views, seed, batch_size, rows, ordered)
        size = rows.stop - rows.start  # the same on all ranks
        stream = ShardStream(self, views, seed, size, rows.start // size, batch_size // size)
        if stream.ranks * max(1, self.workers) > len(stream.shards):
            raise ValueError(
                f"--num_workers {self.workers}: {len(stream.shards)} shards are too few for the "
                f"workers of {stream.ranks} ranks, which need one each: use fewer workers"
            )
        return stream


class ShardStream(CropDataset, torch.utils.data.IterableDataset):
    """Batches of `size` crops of one rank, read from the shards sequentially.

    Each epoch shuffles the shards and deals them out to the ranks, then to a rank's workers, whose
    batches take turns. A worker draws each image from a buffer of SHUFFLE_BUFFER; when its shards
    end before those of others, it starts over. The result is a function of (seed, epoch, step) and
    the numbers of ranks and workers.
    """

    def __init__(self, files: Shards, views: Views, seed: int, size: int, rank: int, ranks: int):
        super().__init__(files, views.number, views.augmentation, seed)
        self.size, self.rank, self.ranks = size, rank, ranks
        self.members: dict[str, list[ShardMember]] = {}  # by shard, in the order of their offsets
        for member in sorted(files.paths):
            self.members.setdefault(member.shard, []).append(member)
        self.shards = list(self.members)
        self.epoch, self.steps = 0, range(0)

    def set_epoch(self, epoch: int, start: int, batches: list[Tensor]) -> None:
        """Continue an epoch from step `start` on; only the number of batches matters."""
        self.epoch, self.steps = epoch, range(start, len(batches))

    def __iter__(self) -> Iterator[Tensor | str]:
        import webdataset

        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        worker = (worker + self.steps.start) % workers  # torch asks worker 0 for the first step
        seed = [self.seed, self.epoch]
        order = np.random.default_rng(seed).permutation(len(self.shards))
        order = order[self.rank :: self.ranks][worker::workers]
        rng = random.Random(repr([*seed, self.rank, worker]))
        samples = webdataset.DataPipeline(
            lambda: self.read([self.shards[i] for i in order]),
            webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng),
        ).repeat()
        batches_before = len(range(worker, self.steps.start, workers))
        samples = itertools.islice(samples, batches_before * self.size, None)
        for _ in range(worker + batches_before * workers, self.steps.stop, workers):
            batch = list(itertools.islice(samples, self.size))
            names = ("/".join(Path(str(member)).parts[-2:]) for member in batch)
            numbers = [zlib.crc32(name.encode("utf-8", "surrogateescape")) for name in names]
            yield self.read_batch(list(zip(batch, numbers, strict=True)), self.epoch)

    def read(self, shards: list[str]) -> Iterator[ShardMember]:
        """Read the images of shards from beginning to end.

        Opens the shards as files: webdataset would run a name that begins with `pipe:`.
        """
        for shard in shards:
            with open(shard, "rb") as file:
                for member in self.members[shard]:
                    file.seek(member.offset)
                    yield member._replace(content=file.read(member.size))


# ---- loading ------------------------------------------------------------------------------------


def load_shards(root: str | Path, options: LoadOptions) -> Data:
    """Load tar files in webdataset's layout: `<key>.jpg` (or another image), `<key>.cls` (a label).

    `root` is a pattern of training shards, such as `shard-{000000..000099}.tar`, or a folder with
    `*train*.tar` and, for the scores, `*val*.tar` or `*test*.tar`. Raises FileNotFoundError or
    ValueError, naming the file.
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
        train = expand_urls(str(root))
        for name in train:
            if re.match(r"[A-Za-z][\w.+-]+:", name) and not Path(name).exists():
                raise ValueError(f"--data_root {name}: shards must be files, not addresses")
    if not train:
        raise FileNotFoundError(f"--data_root {root}: no *train*.tar in it")

    def read(members: list[ShardMember]) -> tuple[Shards, dict[int, str]]:
        workers, decode = options.workers, options.decode
        readable, reasons = filter_readable(members, workers, options.bad_images, decode)
        return Shards(readable, options.image_size or 224, workers, decode), reasons

    listing = list_shards(train)
    has_labels = any(label is not None for label in listing[1])
    test_listing = list_shards(test) if test and has_labels else None
    # By length first, which puts numbers in their order.
    return Data.from_files(
        listing, test_listing, read, options.test_only, class_order=lambda name: (len(name), name)
    )


def list_shards(shards: list[str]) -> tuple[list[ShardMember], list[str | None]]:
    """List the images of several shards, and their labels."""
    labels = {}
    for shard in shards:
        labels |= list_shard(shard)
    return list(labels), list(labels.values())


def list_shard(shard: str) -> dict[ShardMember, str | None]:
    """List the images of a tar file, each with its label."""
    if not Path(shard).is_file():
        raise FileNotFoundError(f"--data_root {shard}: no such file")
    length = Path(shard).stat().st_size
    members, labels = {}, {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                if info.size < 0 or (info.isreg() and info.offset_data + info.size > length):
                    raise ValueError(f"{info.name} has a size of {info.size} bytes")
                end = info.name.rpartition("/")[2].partition(".")[2]
                key = info.name[: len(info.name) - len(end) - 1]
                if info.isreg() and f".{end.lower()}" in IMAGE_EXTENSIONS:
                    members.setdefault(key, ShardMember(shard, info.offset_data, key, info.size))
                elif info.isreg() and end.lower() == "cls":
                    labels[key] = archive.extractfile(info).read(MAX_LABEL_BYTES).decode().strip()
                archive.members = []  # the archive would keep all of them in memory
    except OSError:
        raise
    except Exception as error:  # the parser may raise anything on a damaged file
        raise ValueError(f"{shard}: not a tar file of images ({error})") from error
    if not members:
        raise ValueError(f"{shard}: has no images")
    return {member: labels.get(key) for key, member in members.items()}
