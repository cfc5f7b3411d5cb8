"""The run: command line, device and ranks, schedule, features, kNN, collapse, files."""

import argparse
import contextlib
import ctypes
import datetime
import io
import math
import os
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn

import filelock
import pandas
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# ---- command line -------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr and exit code 2, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Of what all ranks meet alike, the first speaks."""
        first = not under_torchrun() or os.environ["RANK"] == "0"
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n" if first else None)

    def parse(self, argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
        """All flags, and only those that the command line gives."""
        args, unset = self.parse_args(argv), object()
        self.defaults = vars(self.parse_args([]))
        given = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
        return args, {name: value for name, value in vars(given).items() if value is not unset}

    def as_argv(self, saved: dict) -> list[str]:
        """The command line of a checkpoint's arguments, to be looked through as any other is."""
        argv = []
        for name, default in self.defaults.items():
            value = saved.get(name)
            if value is None or value is default or name in ("resume", "overwrite", "ddp"):
                continue
            if isinstance(value, bool):
                argv.append(f"--{name}" if value else f"--no-{name}")
            elif isinstance(value, list | tuple):
                argv += [f"--{name}", *map(str, value)]
            else:
                argv.append(f"--{name}={value}")
        return argv

    @contextlib.contextmanager
    def bad_input(self) -> Iterator[None]:
        """Around a run's set-up: ValueError and OSError are the user's to mend, said in one line.

        Our own mistakes show in other exceptions, and in the loop, and keep their traceback.
        An error on one rank, even if on that one alone, ends all, and the first such rank says it.
        """
        found = None
        try:
            yield
        except (ValueError, OSError, argparse.ArgumentTypeError) as error:
            found = " ".join(str(error).split())
        errors = [found]
        if grouped():
            errors *= ranks()
            dist.all_gather_object(errors, found)
        for i, error in enumerate(errors):
            if error is not None:
                self.exit(2, f"{self.prog}: {on_rank(i)}{error}\n" if i == rank() else None)


class RunError(Exception):
    """What ends a run that was going well: said in one line, with exit code 1."""


def run_command(main: Callable[[], None], *bad_input: type[Exception]) -> None:
    """A command's `main`, its ends said in one line each; `bad_input`: what a run may meet late."""
    try:
        main()
    except RunError as error:
        if rank() == 0:  # all ranks meet it alike, or the first alone does
            print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(1)
    except bad_input as error:
        print(f"{os.path.basename(sys.argv[0])}: {on_rank(rank())}{error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not lost(error):
            raise
        print(f"{on_rank(rank())}another rank is gone", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # outside of the epochs, where `Keeper` listens
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def about(file: str) -> Iterator[None]:
    """A ValueError raised within is about `file`, which it then names first."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: a finite `kind` (int or float) from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and value < math.inf):
            limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {noun} {limits}, not {text}")
        return value

    return parse


def run_flags(parser: Parser) -> None:
    """The flags that every command has for its run."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of every random choice (0)")
    add("--device", default="auto", help="auto (cuda, mps, else cpu), or a device's name (auto)")
    add(
        "--amp",
        default="auto",
        choices=("auto", "bf16", "off"),
        help="auto: bf16 on cuda when supported, off elsewhere (auto)",
    )
    add("--ddp", action="store_true", help="share the work among the processes of torchrun")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--deterministic", action="store_true", help="PyTorch's deterministic algorithms, for cuda")
    add(
        "--num_workers",
        type=number(int, 0, 256),
        default=2,
        help="threads or processes that decode files (2)",
    )
    add(
        "--bad_images",
        default="error",
        choices=("error", "skip"),
        help="files that are no images: stop, or leave them out and list them (error)",
    )
    add(
        "--checkpoint_minutes",
        type=number(float, 0),
        default=10.0,
        help="write a checkpoint at least so often, besides each epoch's end (10)",
    )
    add(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw pictures at the end (yes)",
    )
    add("--out", default="results", help="folder of what a run writes (results)")
    add("--name", type=file_name, help="the run's name, instead of one made of its flags")
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--resume",
        nargs="?",
        type=file_path,
        const=True,
        default=False,
        metavar="PATH",
        help="go on with this run's checkpoint, or with the one at PATH",
    )
    one.add_argument("--overwrite", action="store_true", help="replace this run's files")


def file_name(text: str) -> str:
    """A type for argparse: the name of a file, without a folder."""
    if text != os.path.basename(text) or text in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"{text} must be a file name without a folder (see --out)")
    return text


def file_path(text: str) -> str:
    """A type for argparse: the path of a file; without it, an empty one would mean no file."""
    if not text:
        raise argparse.ArgumentTypeError("must be the path of a file")
    return text


def data_label(args: argparse.Namespace) -> str:
    """The data set's name in the results; for the user's own with whose images they are."""
    if args.data_name in ("folder", "webdataset"):
        return f"{args.data_name}:{Path(args.data_root).resolve().name}"
    return args.data_name


def say(text: str) -> None:
    """A line on stdout, above a progress bar if there is one. Of the ranks the first speaks."""
    if rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """A bar an epoch on a terminal, else a plain line a minute; and a word on runs of days.

    Called each step with the step and the sums so far of what `labels` names; the sums are read
    from the device at most once a second, and then their means returned. `smaller` is the command
    for who has no days. Ranks other than the first show nothing.
    """

    def __init__(
        self,
        epoch: int,
        args: argparse.Namespace,
        steps: int,
        labels: tuple[str, ...],
        smaller: str,
        start: int = 0,
    ):
        self.epoch, self.args, self.steps, self.start = epoch, args, steps, start
        self.labels, self.smaller = labels, smaller
        self.terminal = sys.stderr.isatty() and rank() == 0
        self.bar = tqdm(
            total=steps, leave=False, disable=not self.terminal, bar_format="{desc} |{bar}|"
        )
        self.read = self.shown = time.perf_counter()
        self.first_step = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def __call__(self, step: int, sums: Tensor) -> list[float] | None:
        now = time.perf_counter()
        if rank() > 0:
            return None
        if self.first_step is None:  # it holds the warm-up of kernels, or a compilation
            self.first_step = now
            return None
        done = step - self.start  # steps since the first
        if now - self.read < 1 and done != 1:
            return None
        means = (sums / (step + 1)).tolist()
        now = self.read = time.perf_counter()  # after the device has caught up
        seconds = (now - self.first_step) / done  # a step
        epoch_left = seconds * (self.steps - step - 1)
        run_left = epoch_left + seconds * self.steps * (self.args.epochs - self.epoch - 1)
        if done == 1 and self.epoch == 0 and run_left > 86400:
            say(
                f"note: at this speed the run takes {run_left / 86400:.0f} days on this machine. "
                f"A smaller one: {self.smaller}"
            )
        epoch_left, run_left = map(tqdm.format_interval, (epoch_left, run_left))
        values = " ".join(f"{n} {v:.3f}" for n, v in zip(self.labels, means, strict=True))
        text = (  # short enough for a terminal of 80 columns
            f"{self.epoch + 1}/{self.args.epochs} {values} "
            f"{self.args.batch_size / seconds:.0f} images/s, left {epoch_left}, run {run_left}"
        )
        self.bar.n = step + 1
        self.bar.set_description_str(text, refresh=True)
        if not self.terminal and now - self.shown >= 60:
            self.shown = now
            say(f"epoch {text} (step {step + 1} of {self.steps})")
        return means


class Marks:
    """Where a run's time goes, for --profile: called with the name of what was just done.

    The device is waited for at each mark, so that all of a part's work counts as its own.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def __call__(self, part: str) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0) + now - self.last
        self.last = now

    def table(self) -> str:
        """Seconds and shares of the parts."""
        whole = sum(self.seconds.values())
        lines = [f"{'part':12} seconds  share"]
        for part, seconds in (self.seconds | {"all": whole}).items():
            lines.append(f"{part:12} {seconds:7.1f} {100 * seconds / max(whole, 1e-9):5.1f}%")
        return "\n".join(lines)


def unmarked(part: str) -> None:
    """Marks without --profile."""


# ---- device -------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """`auto` is the accelerator torch finds (cuda, mps, ...), else cpu.

    Raises ValueError for a device that is not there.
    """
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        usable = device.type in ("cpu", accelerator.type if accelerator else "cpu")
        torch.zeros(1, device=device if usable else "cpu")
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        there = ["cpu"] + ([accelerator.type] if accelerator else [])
        raise ValueError(f"--device {name}: is not there; choose auto or {' or '.join(there)}")
    return device


def set_up(args: argparse.Namespace) -> tuple[torch.device, torch.autocast]:
    """The device of the flags and its autocast; `args.amp` auto is settled: bf16 or off.

    Each rank of a machine has a device of its own. Raises ValueError for one that is not there.
    """
    device = pick_device(args.device)
    if grouped() and device.type != "cpu":
        local = int(os.environ.get("LOCAL_RANK", 0))
        there = 0 if device.type == "mps" else torch.accelerator.device_count()
        if local >= there:
            raise ValueError(
                f"--ddp: this machine has {there} {device.type} devices that can take part: "
                f"--nproc_per_node {there}, or --device cpu"
            )
        device = torch.device(device.type, local)
        torch.accelerator.set_device_index(local)
    if args.amp == "auto":
        on = device.type == "cuda" and torch.cuda.is_bf16_supported()
        args.amp = "bf16" if on else "off"
    if args.deterministic:  # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.deterministic)
    if device.type == "cpu":
        keep_memory()
    return device, autocast(device, args.amp)


def keep_memory() -> None:
    """Let malloc keep what is freed, for a step needs the same memory as the one before.

    By default glibc gives large blocks back to the system, whose page faults then took a tenth of
    the time of a ResNet-18 step on two cores. Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """bf16 autocast if `amp` is bf16."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == "bf16")


# ---- ranks --------------------------------------------------------------------------------------


def under_torchrun() -> bool:
    """Whether torchrun, or what sets its environment, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def grouped() -> bool:
    """Whether this process is one of the ranks of --ddp."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number among the ranks, from 0 on; 0 without --ddp."""
    return dist.get_rank() if grouped() else 0


def ranks() -> int:
    """How many ranks there are; 1 without --ddp."""
    return dist.get_world_size() if grouped() else 1


def on_rank(number: int) -> str:
    """How the lines of a rank begin."""
    return f"rank {number}: " if ranks() > 1 else ""


def restarts() -> int:
    """How many times torchrun has started the ranks again, after one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if grouped() else 0


def lost(error: RuntimeError) -> bool:
    """Whether an error says no more than that another rank is gone, whose own message tells why."""
    return grouped() and (isinstance(error, dist.DistError) or "gloo" in str(error))


@contextlib.contextmanager
def joined(args: argparse.Namespace, parser: Parser) -> Iterator[None]:
    """Around a command: with --ddp this process is one of torchrun's ranks.

    Tensors on the CPU go by gloo, those of an accelerator by its own backend (NCCL on CUDA).
    """
    if not args.ddp:
        if under_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
            parser.error(f"torchrun started {os.environ['WORLD_SIZE']} of it: add --ddp")
        yield
        return
    if not (dist.is_available() and under_torchrun()):
        command = " ".join(["torchrun --standalone --nproc_per_node 2", *sys.argv])
        parser.error(f"--ddp: is to be started by torchrun: {command}")
    if args.overwrite and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        parser.error(
            "--overwrite: a restart by torchrun could not tell the files to replace from its own: "
            "remove them yourself, or leave out --max_restarts"
        )
    backend = "gloo"
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        if kind != "mps":
            backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    # As long as one rank may need for what the others wait for: to look through all the files.
    timeout = datetime.timedelta(hours=2)
    # torchrun's store outlives a restart, and with it the addresses of processes that are gone.
    store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, None, timeout, ranks, rank, store)
    yield
    dist.destroy_process_group()


def cut(number: int, rank: int, ranks: int) -> slice:
    """Which of `number` rows one of the ranks gets: runs of rows, as equal as can be."""
    return slice(number * rank // ranks, number * (rank + 1) // ranks)


def share(number: int) -> slice:
    """This rank's rows of `number`; a row at least, for who has none works on the next one's."""
    mine = cut(number, rank(), ranks())
    return slice(mine.start, max(mine.stop, mine.start + 1))


def gathered(rows: Tensor, number: int) -> Tensor:
    """On every rank all `number` rows, in order, of which each rank brings its `share`."""
    if not grouped():
        return rows
    sizes = [len(range(number)[cut(number, i, ranks())]) for i in range(ranks())]
    sent = rows.new_zeros(max(sizes), *rows.shape[1:])  # as long on all ranks
    sent[: len(rows)] = rows[: len(sent)]
    received = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(received, sent)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])


def mean_of_ranks(x: Tensor) -> Tensor:
    """The mean over the ranks of a tensor that each has one of."""
    if grouped():
        dist.all_reduce(x)
        x /= ranks()
    return x


def from_first(make: Callable[[], object]) -> object:
    """What `make` gives on the first rank, on all of them; also its ValueError or OSError."""
    if not grouped():
        return make()
    found = [None, None]
    if rank() == 0:
        try:
            found = [make(), None]
        except (ValueError, OSError, argparse.ArgumentTypeError) as error:
            found = [None, error]
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def for_training(net: nn.Module, compiled: bool, image_size: int) -> nn.Module:
    """The SimSiam `net` as the loop needs it, with the same parameters: compiled, distributed.

    Under --ddp gradients are means over the ranks, and BN's statistics are of the global batch
    (SyncBatchNorm), on CPUs of each rank's part: PyTorch's needs an accelerator.
    """
    device = next(net.parameters()).device
    if ranks() > 1 and device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(net)  # in place
    elif ranks() > 1:
        say("note: on CPUs BN's statistics are of each rank's part of the batch (no SyncBatchNorm)")
    trained = torch.compile(net) if compiled else net
    if grouped():
        trained = nn.parallel.DistributedDataParallel(trained)
        # The first backward pass tells DDP in which order to pack gradients for sending, and from
        # three ranks on their sums' last bits depend on it. So that a run that goes on packs them
        # like one that was never stopped, here is a pass before the first step; it changes nothing.
        nothing = torch.zeros(2, 3, image_size, image_size, device=device)
        with torch.compiler.set_stance("force_eager"):  # not to compile for this
            trained.eval()(*[nothing] * net.looks)[0].backward()
        net.zero_grad()
    return trained


def buffers_of_first(net: nn.Module) -> None:
    """Give all ranks the first one's buffers: BN's running statistics, which checkpoints hold."""
    for buffer in net.buffers() if grouped() else ():
        dist.broadcast(buffer, 0)


# ---- schedule -----------------------------------------------------------------------------------


def schedule(progress: float, epochs: int, warmup_epochs: float = 0) -> float:
    """The learning rate as a share of its peak, `progress` epochs into a run of `epochs`.

    Linear warm-up, then a cosine to 0, a step at a time (the authors' code: an epoch at a time).
    """
    if progress < warmup_epochs:
        return progress / warmup_epochs
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup_epochs) / (epochs - warmup_epochs)))


# ---- features and kNN ---------------------------------------------------------------------------

# Similarities held at once, 205 MB of them however large the bank: queries, and images of the bank.
KNN_TILE = (1024, 50_000)


@torch.no_grad()
def features(
    backbone: nn.Module,
    transform: Callable[[Tensor], Tensor],
    images: Tensor,
    amp: torch.autocast,
    normalise: bool = True,
) -> Tensor:
    """Features of all `images`, in eval mode: N x 3 x H x W -> fp32, N x features.

    L2-normalised, as the kNN needs them, or as they are. The backbone is left in the mode it was
    in; no parameter or buffer of it changes. Ranks share the images, and each gets all features.
    """
    training = backbone.training
    backbone.eval()
    rows = []
    for chunk in images[share(len(images))].split(512):
        x = transform(chunk)
        with amp:
            rows.append(backbone(x).float())
    backbone.train(training)
    found = gathered(torch.cat(rows), len(images))
    return F.normalize(found, dim=1) if normalise else found


PIXELS_OF = 100_000  # training images for the baseline of raw pixels at most: 1.2 GB of them


def raw_pixels(image_size: int) -> nn.Module:
    """The baseline of every encoder: the normalised pixels, at most 3 x 32 x 32 of them."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(min(image_size, 32)), nn.Flatten())


@torch.no_grad()
def knn(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = 200,
    temperature: float = 0.1,
    top: int = 5,
) -> Tensor:
    """Classes of `queries` by weighted vote of their `k` nearest in the `bank`, best first.

    The vote of a neighbour is exp(cosine similarity / temperature) (Wu et al. 2018,
    arXiv 1805.01978, sec. 3.4). `bank` (N x d) and `queries` (M x d) are L2-normalised; `labels`
    (N) are of int64. k is clamped to the bank, `top` to the number of classes.
    Returns int64, M x top. Memory: a `KNN_TILE` of similarities, however large the bank.
    """
    k, classes = min(k, len(bank)), int(labels.max()) + 1
    rows, columns = KNN_TILE
    ranking = []
    for chunk in queries.split(rows):
        parts = []
        for i, part in enumerate(bank.split(columns)):
            values, nearest = largest(similarities(chunk, part), k)
            parts.append((values, nearest + i * columns))
        similarity, nearest = (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
        if len(parts) > 1:  # the nearest of each part's nearest
            similarity, best = similarity.topk(k, sorted=False)  # chunk x k
            nearest = nearest.gather(1, best)
        votes = similarity.new_zeros(len(chunk), classes)
        # One axis, of chunk x classes: that scatter has a deterministic form on CUDA.
        where = labels[nearest] + classes * torch.arange(len(chunk), device=labels.device)[:, None]
        votes.view(-1).scatter_add_(0, where.view(-1), (similarity / temperature).exp().view(-1))
        ranking.append(votes.topk(min(top, classes)).indices)
    return torch.cat(ranking)


def similarities(queries: Tensor, bank: Tensor) -> Tensor:
    """`queries @ bank.T`, M x N: on CPUs as a 1x1 convolution, since that goes to oneDNN.

    Against MKL's product 1.2 times as fast on an AMD EPYC with AVX512, for M = 1024, d = 512.
    """
    if queries.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return queries @ bank.T
    x = queries.contiguous().view(1, 1, *queries.shape).permute(0, 3, 1, 2)  # 1 x d x 1 x M
    return F.conv2d(x, bank[:, :, None, None])[0, :, 0].T


def largest(x: Tensor, k: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """`x.topk(k, sorted=False)`, M x N -> M x min(k, N), in half of its time for a large N.

    Returns values and indices. Of groups of `size` numbers each, only the k groups with the largest
    maxima are looked through: a number in another group has k larger ones, those maxima.
    """
    groups = x.shape[1] // size
    if groups <= 2 * k:
        return tuple(x.topk(min(k, x.shape[1]), sorted=False))
    # A group is every `groups`-th number, so that the maxima are taken over whole rows at a time.
    chosen = largest(x[:, : size * groups].unflatten(1, (size, groups)).amax(1), k, size)[1]
    rest = torch.arange(size * groups, x.shape[1], device=x.device)  # in no group
    places = [chosen + i * groups for i in range(size)] + [rest.expand(len(x), -1)]
    places = torch.cat(places, dim=1)  # M x about size k
    values, best = x.gather(1, places).topk(k, sorted=False)
    return values, places.gather(1, best)


def accuracy(ranking: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent of a ranking of classes: int64, M x (up to 5), and M."""
    hits = ranking == labels[:, None]
    return 100 * hits[:, 0].float().mean().item(), 100 * hits.any(1).float().mean().item()


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> list[list[int]]:
    """How often each class (rows) was taken for each (columns): int64, M and M."""
    pairs = labels * classes + predicted
    return pairs.bincount(minlength=classes**2).view(classes, classes).tolist()


# ---- collapse -----------------------------------------------------------------------------------


def collapse_std(z: Tensor) -> Tensor:
    """Mean over channels of the std of l2-normalised z, times sqrt(d): N x d -> scalar.

    About 1 when the z are spread evenly over the sphere, 0 when all are equal (paper, sec. 4.1,
    Fig. 2 middle, which shows it without the sqrt(d)).
    """
    return F.normalize(z.float(), dim=1).std(0).mean() * z.shape[1] ** 0.5


def effective_rank(bank: Tensor) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885, Eq. 1): N x d -> from 1 to min(N, d).

    The exponential of the entropy of the normalised singular values, which are the roots of the
    d x d Gram matrix's eigenvalues. In fp64, on the CPU (mps has no fp64). Ranks share the work.
    """
    mine = bank[cut(len(bank), rank(), ranks())].cpu()
    gram = sum(chunk.double().T @ chunk.double() for chunk in mine.split(4096))
    if grouped():
        dist.all_reduce(gram)
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum()
    return torch.special.entr(share).sum().exp().item()


# The thresholds are measured: see the README, "What you should see".
WINDOW = 25  # steps whose mean std is looked at: one wait for the device in so many
# A std of z below means total collapse where no BN is at its output: there runs begin at 0.75 or
# 0.4, by --bn, and end below 0.15. With that BN, see `least_std`.
COLLAPSED_STD = 0.3
# A rank of the bank's features below this share of the untrained encoder's means dimensional
# collapse, and so does one below 2 (images that are all alike have that from the start).
COLLAPSED_RANK, LOWEST_RANK = 0.6, 2


def least_std(bn: str, images: int) -> float:
    """The least healthy `collapse_std` of batches of so many `images`, by SimSiam's `bn`.

    The BN at the projector's output centres z, so that its std cannot fall to 0: all images but one
    get the same output, and that one the opposite, which is a std of 2/sqrt(images). Healthy is
    above 0.95, and the threshold in the middle of both, geometrically.
    """
    return (2 / images**0.5) ** 0.5 if bn in ("default", "all") else COLLAPSED_STD


def collapse(
    least: float, std: float, rank: float | None, start_rank: float, features: int
) -> tuple[str, str] | None:
    """What is seen of a collapse, if one is, and what to try against its kind.

    `least`: `least_std`; `std`: the mean over a window of steps; `rank`: the `effective_rank` of
    the bank's features, of which there are `features` (None: not measured); `start_rank`: that of
    the untrained encoder.
    """
    if std < least:
        return (
            f"std of z is {std:.2f}, below {least:.2f}: different images get the same output, so "
            "that the loss goes to -1 and nothing is learned (total collapse)",
            "Try a lower --lr, --warmup_epochs 10, a larger --batch_size",
        )
    if rank is not None and rank < max(COLLAPSED_RANK * start_rank, LOWEST_RANK):
        return (
            f"the rank of the features is {rank:.1f} of {features}, and was {start_rank:.1f} "
            f"before training: images are spread (std {std:.2f}), but over few dimensions "
            "(dimensional collapse)",
            "It comes where the network is small for the data (Li, Efros, Pathak, ECCV 2022), or "
            "lr is high: try a wider or deeper --arch, fewer --epochs, a lower --lr",
        )
    return None


SMALL_BATCH = 16  # on a rank, from which down BN's statistics alone can make a run fail
FLAT_IMAGES = 8  # mean std over the images of a pixel, of 255, below which these hardly differ


def likely_causes(args: argparse.Namespace, usual_lr: float, images: Tensor) -> list[str]:
    """What of a run is known to make it collapse, and what to try instead.

    `usual_lr`: the recipe's; `images`: some of the training images, uint8, N x 3 x H x W.
    """
    each, varied = args.batch_size // ranks(), images.float().std(0).mean().item()
    causes = {
        "--stop_grad off, the paper's own way to collapse (sec. 4.1): leave it on": (
            args.stop_grad == "off"
        ),
        f"--predictor {args.predictor} (sec. 4.2): choose mlp": args.predictor != "mlp",
        f"--bn {args.bn}, which does not keep z apart (sec. 4.4): choose default": (
            args.bn in ("none", "hidden")
        ),
        f"--lr {args.lr:g}, {args.lr / usual_lr:.3g} times the recipe's: try --lr {usual_lr:g}, or "
        "--warmup_epochs 10": args.lr > 2 * usual_lr,
        f"BN over no more than {each} images: try --batch_size {64 * ranks()}": (
            each <= SMALL_BATCH
        ),
        f"the images hardly differ (by {varied:.1f} of 255 levels): look at them, and at "
        "--show_views": varied < FLAT_IMAGES,
    }
    return [cause for cause, here in causes.items() if here]


# ---- signals ------------------------------------------------------------------------------------


class Keeper:
    """When to write a checkpoint: every `minutes`, and when SIGTERM or SIGINT arrives.

    A signal lets the step in flight end; a second one ends the process at once. Ranks agree on the
    step: a signal to one of them is one to all, and the first one's clock is everybody's.
    `good`: whether the run's newest checkpoint is one to fall back to, once there is a newer one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    class Stop(BaseException):
        """Raised by a signal where the work may be broken off."""

    def __init__(self, minutes: float, good: bool):
        self.seconds, self.good = 60 * minutes, good
        self.written = time.monotonic()
        self.signal: int | None = None
        self.ending: int | None = None  # the signal after which the next checkpoint is the last
        self.breakable = False

    def __enter__(self) -> "Keeper":
        self.before = [signal.signal(number, self.arrived) for number in self.SIGNALS]
        return self

    def __exit__(self, *error) -> None:
        for number, handler in zip(self.SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def arrived(self, number: int, frame: object) -> None:
        """The signals' handler."""
        signal.signal(number, signal.SIG_DFL)
        self.signal = number
        if self.breakable:
            raise self.Stop

    def due(self, seconds: float | None = None) -> bool:
        """Whether to write a checkpoint now: for its age in `seconds` (`minutes`), or a signal."""
        age = time.monotonic() - self.written
        late = rank() == 0 and age >= (self.seconds if seconds is None else seconds)
        both = torch.tensor([self.signal or 0, late], dtype=torch.int64)
        if grouped():
            dist.all_reduce(both, dist.ReduceOp.MAX)
        self.ending, late = both[0].item() or None, bool(both[1])
        return late or self.ending is not None

    def kept(self) -> None:
        """To be called when a checkpoint was written: after a signal, the process ends here."""
        self.written, self.good = time.monotonic(), True
        if self.ending is not None:
            say("stopped; the same command and --resume go on after this step")
            sys.exit(128 + self.ending)

    @contextlib.contextmanager
    def breaking_off(self, save: Callable[..., None], *when: int) -> Iterator[None]:
        """Around work that changes nothing of a run: a signal breaks it off to `save(*when)`."""
        self.breakable = True
        try:
            if self.signal is not None:
                raise self.Stop
            yield
            self.breakable = False
        except (self.Stop, RuntimeError) as error:
            self.breakable = False
            self.ending = self.signal
            # Another rank that has got the signal too may already be gone.
            if self.ending is None or not (isinstance(error, self.Stop) or lost(error)):
                raise
            save(*when)


# ---- files --------------------------------------------------------------------------------------


# How the names of a run's files go on after the run's own.
WRITTEN = (
    "model.pth",
    "statistics.csv",
    "bad_images.txt",
    "curves.png",
    "neighbours.png",
    "embedding.png",
    "confusion.png",
)


@contextlib.contextmanager
def one_writer(run: str, parser: Parser) -> Iterator[None]:
    """Around all that a run does: a second process at the same run is refused, naming the first.

    The lock is the operating system's, which takes it back from a process that dies; what such a
    process left half-written is removed. The folder is made, and removed if nothing came into it.
    Of the ranks the first one writes, and has the lock.
    """
    folder, name = os.path.split(run)
    path = Path(folder, f".{name}.lock")
    if rank() > 0:
        with parser.bad_input():
            pass  # the first rank's are this one's too
        yield
        return
    with parser.bad_input():
        made = not os.path.isdir(folder)
        os.makedirs(folder or ".", exist_ok=True)
        lock = filelock.FileLock(path)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise ValueError(
                f"{run}: process {path.read_text().strip()} is at work on it: wait for it, or "
                "choose another --name"
            ) from error
    try:
        path.write_text(f"{os.getpid()}\n")
        for end in WRITTEN:
            Path(folder, f".{name}_{end}.part").unlink(missing_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()  # while it is held: who waits for it sees that it is gone
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


@contextlib.contextmanager
def whole_file(path: str | Path, previous: str | Path | None = None) -> Iterator[IO[bytes]]:
    """A file that appears under `path` whole, and on the disk, or not at all.

    The file that it replaces is kept as `previous`. An OSError names `path`. Of the ranks only the
    first one writes.
    """
    if rank() > 0:
        yield io.BytesIO()
        return
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
        if os.name == "posix":  # the rename too is to outlive a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def remove(path: str | Path) -> None:
    """Remove a file, if it is there; of the ranks the first one does it."""
    if rank() == 0:
        Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def tried_again() -> Iterator[None]:
    """Around the writing of a file that the next epoch writes again: an error is only said."""
    try:
        yield
    except OSError as error:
        say(
            f"warning: {error.filename}: could not be written ({error.strerror}); the next epoch "
            "tries again"
        )


@contextlib.contextmanager
def last_try() -> Iterator[None]:
    """Around the last writing of files. Raises RunError that names the file."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename}: could not be written ({error.strerror}); the checkpoint is "
            "complete: mend that, and give the same command with --resume"
        ) from error


def save_checkpoint(
    run: str, net: nn.Module, optimizer: torch.optim.Optimizer, good: bool, **state
) -> None:
    """`<run>_model.pth`; the one before it, if it is a `good` one, as `<run>_model.prev.pth`.

    Plain tensors and Python types only, so that `weights_only=True` loads them. Raises RunError
    where the file cannot be written or the weights are not finite: the one before stays.
    """
    if rank() > 0:
        return
    path = f"{run}_model.pth"
    weights = net.state_dict()
    if not all(value.isfinite().all() for value in weights.values()):
        raise RunError(f"the weights are not finite; {path} keeps those before. {DIVERGED}")
    content = io.BytesIO()  # whole in memory first: torch.save hides why a write failed
    torch.save(
        {"model": weights, "optimizer": optimizer.state_dict(), "made_on": machine(net)}
        | state
        | {"version": 1},
        content,
    )
    try:
        with whole_file(path, previous=f"{run}_model.prev.pth" if good else None) as file:
            file.write(content.getbuffer())
    except OSError as error:
        raise RunError(
            f"{path}: could not be written ({error.strerror}); the checkpoint before it is intact: "
            "mend that, and give the same command with --resume"
        ) from error


DIVERGED = (
    "--resume would only meet it again: try a lower --lr, --warmup_epochs 10 or --amp off, under "
    "another --name or with --overwrite"
)


def machine(net: nn.Module) -> dict:
    """What the last bits of a run depend on, besides its flags."""
    return {
        "device": next(net.parameters()).device.type,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    } | ({"ranks": ranks()} if ranks() > 1 else {})


def load_checkpoint(path: str | Path) -> dict:
    """What `save_checkpoint` wrote, on the CPU, without running any code of the file's.

    Raises FileNotFoundError, or ValueError for a file that is damaged (torch.load itself does not
    look at the checksums) or not a checkpoint of ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of what is refused below
            stored = all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
            damaged = not stored or archive.testzip() is not None
            state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # an unpickler fed with junk may raise anything
        raise ValueError(f"{path}: is damaged, or not a checkpoint of this program") from error
    if damaged or not well_formed(state):
        raise ValueError(f"{path}: is damaged, or not a checkpoint of this program")
    return state


def well_formed(state: object) -> bool:
    """Whether a checkpoint has the parts of ours, each of its type."""
    return (
        isinstance(state, dict)
        and all(type(state.get(key)) is int and state[key] >= 0 for key in ("epoch", "step"))
        and all(isinstance(state.get(key), dict) for key in ("model", "optimizer", "args"))
        and all(isinstance(key, str) for key in (*state["model"], *state["args"]))
        and all(map(is_tensor, state["model"].values()))
        and isinstance(state.get("history"), list)
        and all(
            isinstance(row, dict) and all(type(value) in (int, float) for value in row.values())
            for row in state["history"]
        )
    )


def is_tensor(value: object) -> bool:
    """A dense tensor that holds all of the numbers that its shape claims."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


# What a run may be resumed with another value of.
FREE = (
    "data_root",
    "model_path",
    "num_workers",
    "bad_images",
    "device",
    "compile",
    "deterministic",
    "knn_every",
    "checkpoint_minutes",
    "profile",
    "stop_on_collapse",
    "pictures",
    "tensorboard",
)


def run_of(path: str) -> tuple[str, str]:
    """The folder and the name of the run whose checkpoint is at `path`."""
    folder, file = os.path.split(path)
    for end in ("_model.prev.pth", "_model.pth", ".pth"):
        file = file.removesuffix(end)
    return folder or ".", file


def earlier(run: str, args: argparse.Namespace) -> tuple[str, dict] | None:
    """The checkpoint to go on from, and its path, if --resume; refuses to replace a run unasked.

    Where the newest is missing or damaged, the one before it. Where torchrun has started the ranks
    again, what they have written is gone on from unasked. Raises ValueError, FileNotFoundError.
    """
    newest, previous = f"{run}_model.pth", f"{run}_model.prev.pth"
    path = newest if args.resume is True else args.resume
    if restarts() and (os.path.exists(newest) or os.path.exists(previous)):
        say(f"started again by torchrun (restart {restarts()})")
        path = newest
    for file in (newest, previous):
        if path and os.path.abspath(path) == os.path.abspath(file):
            path = file
    ours = path in (newest, previous)
    for file in () if ours or args.overwrite else (newest, previous, f"{run}_statistics.csv"):
        if os.path.exists(file):
            raise ValueError(
                f"{file} exists: go on with --resume, replace it with --overwrite, or choose "
                "another --name"
            )
    if not path:
        return None
    try:
        return path, load_checkpoint(path)
    except (FileNotFoundError, ValueError) as error:
        if not ours or not os.path.exists(previous):
            raise
        checkpoint = load_checkpoint(previous)
        say(f"{error}; going on with the one before it, {previous}")
        return previous, checkpoint


def merged(
    saved: argparse.Namespace, args: argparse.Namespace, given: dict, path: str, warming: bool
) -> argparse.Namespace:
    """A checkpoint's arguments with what a --resume may change of them, which is said.

    `args` and `given` are the command's; `warming`: no step was yet after the warm-up, so that the
    learning rates so far are those of any number of epochs. Raises ValueError for a conflict.
    """
    changed = []
    for name, now in given.items():
        before = getattr(saved, name)
        if now in (before, "auto") or name in ("resume", "overwrite", "out", "name", "ddp"):
            continue
        if name not in FREE and not (name == "epochs" and warming):
            cosine = "; the cosine schedule depends on it" if name == "epochs" else ""
            raise ValueError(
                f"--resume: {path} was made with --{name} {before}, this command has {now}"
                f"{cosine}: give the same, or another --name for a new run"
            )
        changed.append(f"--{name} {now} (was {before})")
        setattr(saved, name, now)
    for name in ("out", "name", "resume", "ddp"):
        setattr(saved, name, getattr(args, name))
    saved.overwrite = False
    if changed:
        say(f"resumed with {', '.join(changed)}")
    return saved


def restore(optimizer: torch.optim.Optimizer, checkpoint: dict, net: nn.Module) -> None:
    """The momentum of a checkpoint; says where the machine is another one.

    Raises ValueError where it does not fit the parameters.
    """
    state = optimizer.state_dict()
    saved = checkpoint["optimizer"].get("state")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fits = isinstance(saved, dict) and saved.keys() <= set(range(len(parameters)))
    for i, buffers in saved.items() if fits else ():
        fits = fits and isinstance(buffers, dict) and buffers.keys() == {"momentum_buffer"}
        momentum = buffers["momentum_buffer"] if fits else None
        fits = fits and (
            momentum is None
            or (
                is_tensor(momentum)
                and (momentum.shape, momentum.dtype) == (parameters[i].shape, parameters[i].dtype)
                and bool(momentum.isfinite().all())
            )
        )
    if not fits:
        raise ValueError("its optimizer does not fit its network")
    optimizer.load_state_dict(state | {"state": saved})
    made_on = checkpoint.get("made_on")
    if made_on and made_on != machine(net):
        say(f"note: made on {made_on}, now {machine(net)}: the last bits may differ from here on")


def list_bad_images(run: str, bad: list[str]) -> None:
    """Say and list what --bad_images skip left out."""
    if bad:
        path = f"{run}_bad_images.txt"
        with whole_file(path) as file:
            file.write("".join(f"{line}\n" for line in bad).encode())
        say(f"{len(bad)} files could not be read and were left out: {path} lists them")


STATISTICS = (
    "epoch",
    "lr",
    "train_loss",
    "std",
    "rank",
    "collapse",
    "test_acc@1",
    "test_acc@5",
    "images_per_sec",
    "seconds",
)
RESULTS = (
    "protocol",
    "data",
    "arch",
    "params_m",
    "flops_g",
    "feature_dim",
    "batch_size",
    "epochs",
    "k",
    "top1",
    "top5",
    "best_top1",
    "seconds",
    "device",
    "run",
)


def write_csv(path: str | Path, rows: list[dict], columns: tuple[str, ...]) -> None:
    """Rows as a CSV table of `columns`, six significant digits, blank where there is no value."""
    with whole_file(path) as file:
        pandas.DataFrame(rows, columns=columns).to_csv(file, index=False, float_format="%.6g")


def read_csv(path: str | Path) -> list[dict]:
    """Rows of a table that `write_csv` wrote; what was blank is missing."""
    rows = pandas.read_csv(path).to_dict("records")
    return [{name: value for name, value in row.items() if value == value} for row in rows]


def add_result(path: str | Path, row: dict) -> None:
    """Put a finished evaluation into the table; it replaces a row of its run and protocol."""
    if rank() > 0:
        return
    row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}  # as the others
    same = (row["protocol"], row["run"])
    path = Path(path)
    with filelock.FileLock(path.with_name(f".{path.name}.lock")) as lock:  # runs share the table
        rows = []
        if path.is_file():
            try:
                rows = pandas.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
                rows = [old for old in rows if (old["protocol"], old["run"]) != same]
            except (ValueError, KeyError) as error:
                raise RunError(
                    f"{path}: is not a table of results: move it away, and give the same command "
                    "with --resume"
                ) from error
        write_csv(path, [*rows, row], RESULTS)
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
