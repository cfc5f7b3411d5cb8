"""Images in shards: tar files in webdataset's layout, read from end to end."""

import io
import itertools
import random
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from simsiam.data.decode import DEFAULT_DECODE, IMAGE_EXTENSIONS, DecodeOptions, read_image
from simsiam.data.loader import CropDataset, Data, ImageFiles, filter_readable, collate_crops
from simsiam.views.augment import Views

# Images that a worker keeps, as the bytes of their files, to draw the next one from.
SHUFFLE_BUFFER = 1000
MAX_LABEL_BYTES = 1000  # bytes of a label's file that are read


class ShardMember(NamedTuple):
    """An image file within a tar file; printed as a path."""

    shard: str
    offset: int
    key: str  # webdataset's: the name as far as its first dot
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}"

    def open(self) -> io.BytesIO:
        """The file's bytes."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


class ShardSample(NamedTuple):
    """An image file that is already read; printed as a path."""

    name: str
    bytes: bytes

    def __str__(self) -> str:
        return self.name

    def open(self) -> io.BytesIO:
        """The file's bytes."""
        return io.BytesIO(self.bytes)


class Shards(ImageFiles):
    """`ImageFiles` within tar files, which pre-training reads from their beginnings to their ends.

    All else (test images, the kNN's bank, linear evaluation) goes to single members, as if they
    were files.
    """

    def crop_batches(
        self, views: Views, seed: int, batch_size: int, rows: slice, ordered: bool
    ) -> Callable[[int, int, list[Tensor]], Iterator[Tensor]]:
        """As of `ImageFiles`; unless `ordered`, from the beginnings of the tar files to their ends.

        Raises ValueError where there are more workers than shards.
        """
        if ordered:
            return super().crop_batches(views, seed, batch_size, rows, ordered)
        size = rows.stop - rows.start  # the same on all ranks
        cutter = CropDataset(self, views.number, views.augmentation, seed)
        return StreamLoader(self, ShardStream(cutter, size, rows.start // size, batch_size // size))


class StreamLoader:
    """What `stream` gives, on the device; called as `Crops` are, but in an order of its own."""

    def __init__(self, files: Shards, stream: "ShardStream"):
        if stream.ranks * max(1, files.workers) > len(stream.shards):
            raise ValueError(
                f"--num_workers {files.workers}: on {stream.ranks} ranks these would be more than "
                f"the {len(stream.shards)} shards, each of which one worker reads"
            )
        self.files, self.loader = files, files.make_dataloader(stream, batch_size=None)

    def __call__(self, epoch: int, start: int, places: list[Tensor]) -> Iterator[Tensor]:
        self.loader.dataset.epoch = epoch
        self.loader.dataset.steps = range(start, len(places))
        return self.files.load_batches(self.loader)


class ShardStream(torch.utils.data.IterableDataset):
    """The batches of one rank in an epoch, from step `start` on, `size` images each.

    The order of the shards is drawn an epoch, and they are dealt out to the ranks, then to a rank's
    workers, whose batches take turns; a worker draws each image from `SHUFFLE_BUFFER` ones. One that has
    come to its last shard's end, before the others, begins with its first again.

    All of it is a function of (seed, epoch, step) and of the numbers of ranks and workers.
    """

    def __init__(self, cutter: CropDataset, size: int, rank: int, ranks: int):
        self.cutter, self.size, self.rank, self.ranks = cutter, size, rank, ranks
        self.members: dict[str, list[ShardMember]] = {}  # of each shard, in their order there
        for member in sorted(cutter.files.paths):
            self.members.setdefault(member.shard, []).append(member)
        self.shards = list(self.members)
        self.epoch, self.steps = 0, range(0)

    def __iter__(self) -> Iterator[Tensor | str]:
        import webdataset

        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        worker = (worker + self.steps.start) % workers  # whose turn it is at the first of the steps
        chance = [self.cutter.seed, self.epoch]
        order = np.random.default_rng(chance).permutation(len(self.shards))
        order = order[self.rank :: self.ranks][worker::workers]
        rng = random.Random(repr([*chance, self.rank, worker]))
        samples = webdataset.DataPipeline(
            lambda: self.read([self.shards[i] for i in order]),
            webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng),
        ).repeat()
        before = len(range(worker, self.steps.start, workers))  # its batches before the first step
        samples = itertools.islice(samples, before * self.size, None)
        for _ in range(worker + before * workers, self.steps.stop, workers):
            yield collate_crops([self.cut(sample) for sample in itertools.islice(samples, self.size)])

    def read(self, shards: list[str]) -> Iterator["ShardSample"]:
        """The images of shards, from their beginnings to their ends.

        The shards are opened here, and always as files: webdataset would take a name that begins
        with `pipe:` for a command, and run it.
        """
        for shard in shards:
            with open(shard, "rb") as file:
                for member in self.members[shard]:
                    file.seek(member.offset)
                    yield ShardSample(str(member), file.read(member.size))

    def cut(self, sample: "ShardSample") -> np.ndarray | str:
        """What the cutter makes of an image file."""
        name = "/".join(Path(sample.name).parts[-2:])
        chance = zlib.crc32(name.encode("utf-8", "surrogateescape"))
        try:
            image = read_image(sample, self.cutter.files.decode)
        except ValueError as error:
            return str(error)
        return self.cutter.crop(image, [self.cutter.seed, self.epoch, chance])


def load_shards(
    root: str,
    image_size: int | None,
    workers: int,
    bad_images: str,
    test_only: bool,
    decode: DecodeOptions = DEFAULT_DECODE,
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
        for name in train:
            if re.match(r"[A-Za-z][\w.+-]+:", name) and not Path(name).exists():
                raise ValueError(f"--data_root {name}: shards must be files, no addresses")
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
        good, found = filter_readable(members, workers, bad_images, decode)
        bad.extend(found.values())
        if not numbers:  # the training set's classes, where it is listed
            classes = sorted(set(labels) - {None}, key=lambda text: (len(text), text))
            numbers.update({name: i for i, name in enumerate(classes)})
        for member, label in zip(members, labels, strict=True):
            if label is not None and label not in numbers:
                raise ValueError(f"{member}: its class {label} is not among the training classes")
        labels = [-1 if name is None else numbers[name] for name in labels]
        kept = torch.tensor([i not in found for i in range(len(members))], dtype=torch.bool)
        images = Shards(good, image_size or 224, workers, decode)
        return images, torch.tensor(labels, dtype=torch.int64)[kept]

    train_part = part([] if test_only and test else train)
    test_part = part(test) if test and numbers else (None, None)
    return Data(*train_part, *test_part, list(numbers), bad)


def list_shard(shard: str) -> dict[ShardMember, str | None]:
    """The images of a tar file, each with its label."""
    if not Path(shard).is_file():
        raise FileNotFoundError(f"--data_root {shard}: there is no such file")
    length = Path(shard).stat().st_size
    found, labels = {}, {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                if info.size < 0 or (info.isreg() and info.offset_data + info.size > length):
                    raise ValueError(f"a size in it is {info.size}")
                end = info.name.rpartition("/")[2].partition(".")[2]
                key = info.name[: len(info.name) - len(end) - 1]
                if info.isreg() and f".{end.lower()}" in IMAGE_EXTENSIONS:
                    found.setdefault(key, ShardMember(shard, info.offset_data, key, info.size))
                elif info.isreg() and end.lower() == "cls":
                    labels[key] = archive.extractfile(info).read(MAX_LABEL_BYTES).decode().strip()
                archive.members = []
    except OSError:
        raise
    except Exception as error:  # a parser fed with junk may raise anything
        raise ValueError(f"{shard}: is no tar file of images ({error})") from error
    if not found:
        raise ValueError(f"{shard}: there are no images in it")
    return {member: labels.get(key) for key, member in found.items()}
