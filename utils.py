"""The run: command line, device, schedule, features, kNN, collapse, files."""

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn

import pandas
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# ---- command line -------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr and exit code 2, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    @contextlib.contextmanager
    def bad_input(self) -> Iterator[None]:
        """Around a run's set-up: ValueError and OSError are the user's to mend, said in one line.

        Our own mistakes show in other exceptions, and in the loop, and keep their traceback.
        """
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(str(error))


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: a finite `kind` (int or float) from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and math.isfinite(value)):
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
    add("--compile", action="store_true", help="torch.compile the network")
    add("--num_workers", type=number(int, 0), default=2, help="threads that decode a folder (2)")
    add("--out", default="results", help="folder of what a run writes (results)")
    add("--name", type=file_name, help="the run's name, instead of one made of its flags")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--resume", action="store_true", help="go on with this run's checkpoint")
    one.add_argument("--overwrite", action="store_true", help="replace this run's files")


def file_name(text: str) -> str:
    """A type for argparse: the name of a file, without a folder."""
    if text != os.path.basename(text) or text in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"{text} must be a file name without a folder (see --out)")
    return text


def data_label(args: argparse.Namespace) -> str:
    """The data set's name in the results; for a folder with whose images they are."""
    if args.data_name == "folder":
        return f"folder:{Path(args.data_root).resolve().name}"
    return args.data_name


def say(text: str) -> None:
    """A line on stdout, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """A bar an epoch on a terminal, else a plain line a minute; and a word on runs of days.

    Called each step with the step and the sums so far of what `labels` names; the sums are read
    from the device at most once a second. `smaller` is the command for who has no days.
    """

    def __init__(
        self,
        epoch: int,
        args: argparse.Namespace,
        steps: int,
        labels: tuple[str, ...],
        smaller: str,
    ):
        self.epoch, self.args, self.steps = epoch, args, steps
        self.labels, self.smaller = labels, smaller
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, leave=False, disable=not self.terminal, bar_format="{desc} |{bar}|"
        )
        self.shown = time.perf_counter()
        self.first_step = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def __call__(self, step: int, sums: Tensor) -> None:
        now = time.perf_counter()
        if self.first_step is None:  # it holds the warm-up of kernels, or a compilation
            self.first_step = now
            return
        if now - self.shown < (1 if self.terminal else 60) and step != 1:
            return
        means = (sums / (step + 1)).tolist()
        now = self.shown = time.perf_counter()  # after the device has caught up
        seconds = (now - self.first_step) / step  # a step
        epoch_left = seconds * (self.steps - step - 1)
        run_left = epoch_left + seconds * self.steps * (self.args.epochs - self.epoch - 1)
        if step == 1 and self.epoch == 0 and run_left > 86400:
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
        if not self.terminal and step > 1:
            say(f"epoch {text} (step {step + 1} of {self.steps})")


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


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """bf16 autocast where `amp` says so; `auto`: on CUDA devices that support it."""
    on = amp == "bf16" or (
        amp == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)


# ---- schedule -----------------------------------------------------------------------------------


def schedule(progress: float, epochs: int, warmup_epochs: float = 0) -> float:
    """The learning rate as a share of its peak, `progress` epochs into a run of `epochs`.

    Linear warm-up, then a cosine to 0, a step at a time (the authors' code: an epoch at a time).
    """
    if progress < warmup_epochs:
        return progress / warmup_epochs
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup_epochs) / (epochs - warmup_epochs)))


# ---- features and kNN ---------------------------------------------------------------------------

KNN_FLOATS = 2**26  # similarities held at once: 256 MB of them, whatever the size of the bank


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
    in; no parameter or buffer of it changes.
    """
    training = backbone.training
    backbone.eval()
    rows = []
    for chunk in images.split(512):
        x = transform(chunk)
        with amp:
            rows.append(backbone(x).float())
    backbone.train(training)
    found = torch.cat(rows)
    return F.normalize(found, dim=1) if normalise else found


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
    Returns int64, M x top. Its similarities are held `KNN_FLOATS` at a time.
    """
    k, classes = min(k, len(bank)), int(labels.max()) + 1
    ranking = []
    # similarities: chunk x N floats
    for chunk in queries.split(max(1, KNN_FLOATS // len(bank))):
        similarity, nearest = (chunk @ bank.T).topk(k)  # chunk x k
        votes = similarity.new_zeros(len(chunk), classes)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        ranking.append(votes.topk(min(top, classes)).indices)
    return torch.cat(ranking)


def accuracy(ranking: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent of a ranking of classes: int64, M x (up to 5), and M."""
    hits = ranking == labels[:, None]
    return 100 * hits[:, 0].float().mean().item(), 100 * hits.any(1).float().mean().item()


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
    d x d Gram matrix's eigenvalues. In fp64, on the CPU (mps has no fp64).
    """
    gram = sum(chunk.double().T @ chunk.double() for chunk in bank.cpu().split(4096))
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum()
    return torch.special.entr(share).sum().exp().item()


# ---- files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file that appears under `path` whole, and on the disk, or not at all."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":  # the rename too is to outlive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save_checkpoint(path: str | Path, **state: object) -> None:
    """Plain tensors and Python types only, so that `weights_only=True` loads them."""
    with whole_file(path) as file:
        torch.save(state | {"version": 1}, file)


def load_checkpoint(path: str | Path) -> dict:
    """What `torch.save` wrote, on the CPU, without running any code of the file's.

    Raises FileNotFoundError, or ValueError for a file that is not a checkpoint of ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # an unpickler fed with junk may raise anything
        raise ValueError(f"{path}: is damaged, or not a checkpoint of this program") from error
    if not (isinstance(state, dict) and {"model", "epoch", "history", "args"} <= state.keys()):
        raise ValueError(f"{path}: is not a checkpoint of this program")
    return state


# What a run may be resumed with another value of.
FREE = ("data_root", "num_workers", "device", "compile", "out", "name", "resume", "overwrite")


def earlier(run: str, args: argparse.Namespace) -> dict | None:
    """The checkpoint to go on from, if --resume; refuses to write over an earlier run's files.

    A flag left open (None) takes the checkpoint's value. Raises ValueError, FileNotFoundError.
    """
    files = [f"{run}_model.pth", f"{run}_statistics.csv"]
    if args.resume:
        checkpoint = load_checkpoint(files[0])
        for name, before in checkpoint["args"].items():
            now = getattr(args, name, None)
            if now is None:
                setattr(args, name, before)
            elif now != before and name not in FREE:
                raise ValueError(
                    f"--resume: {files[0]} was made with {name} {before}, this command has {now}: "
                    "give the same, or another --name for a new run"
                )
        return checkpoint
    there = [file for file in files if os.path.exists(file)]
    if there and not args.overwrite:
        raise ValueError(
            f"{there[0]} exists: go on with --resume, replace it with --overwrite, or choose "
            "another --name"
        )
    return None


STATISTICS = (
    "epoch",
    "lr",
    "train_loss",
    "std",
    "rank",
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


def add_result(path: str | Path, row: dict) -> None:
    """Put a finished evaluation into the table; it replaces a row of its run and protocol."""
    rows = []
    if Path(path).is_file():
        rows = pandas.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    same = lambda old: (old["protocol"], old["run"]) == (row["protocol"], row["run"])  # noqa: E731
    row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}  # as the others
    write_csv(path, [old for old in rows if not same(old)] + [row], RESULTS)
