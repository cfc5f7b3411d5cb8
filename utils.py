"""Shared parts of the commands: parsers, errors in one line, ranks, labels and summaries."""

import argparse
import contextlib
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from simsiam.data.decode import UnreadableImageError, ignore_pil_warnings
from simsiam.data.folders import split_roots
from simsiam.data.loader import Data
from simsiam.runtime import distributed
from simsiam.runtime.config import Config, Kind, Number, RunConfig, add_option, add_options
from simsiam.runtime.files import RunError
from simsiam.training.recipes import SOURCE_OPTIONS, LinearConfig

# ---- parsers, and errors in one line ------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line on stderr and exit code 2, without the usage.

    `description`: a module's docstring, whose first line is shown; None under python -OO.
    """

    def __init__(self, prog: str, description: str | None, **settings: object):
        first_line = (description or "").split("\n")[0]
        super().__init__(prog, description=first_line, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2; of an error that all ranks meet alike, rank 0 prints the line."""
        is_first = not distributed.launched_by_torchrun() or os.environ["RANK"] == "0"
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n" if is_first else None)

    @contextlib.contextmanager
    def bad_input(self) -> Iterator[None]:
        """Enclose the set-up of a run: a ValueError or OSError is one line, and exit code 2.

        Other exceptions are bugs, and keep their traceback. An error on one rank ends all ranks;
        the first rank that has one prints its line.
        """
        message = None
        try:
            yield
        except (ValueError, OSError) as error:
            message = " ".join(str(error).split())
        for rank, error in enumerate(distributed.all_gather_objects(message)):
            if error is not None:
                line = f"{self.prog}: {distributed.rank_prefix()}{error}\n"
                self.exit(2, line if rank == distributed.rank() else None)


class ConfigParser(Parser):
    """The parser of a command whose flags are the fields of a config class."""

    def __init__(self, prog: str, description: str | None, config: type[Config]):
        usage = f"python {prog} [--flag value ...]"
        super().__init__(prog, description, usage=usage, argument_default=argparse.SUPPRESS)
        self.config = config
        add_options(self, config)

    def read(self, argv: list[str] | None = None) -> tuple[Config, dict]:
        """Return the config of a command line, and the settings that it gives. Exits if wrong."""
        overrides = vars(self.parse_args(argv))
        try:
            return self.config.resolve(overrides), overrides
        except ValueError as error:
            self.error(str(error))


def argument(kind: Kind) -> Callable[[str], object]:
    """Return an argparse type for values of a kind."""

    def parse(text: str) -> object:
        try:
            return kind.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text}: {error}") from None

    return parse


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type for a finite int or float from `low` to `high`."""
    return argument(Number(kind, low, high))


def add_source_options(parser: Parser) -> None:
    """Add the flags that describe an encoder whose file, of another project, does not."""
    group = parser.add_argument_group("another project's encoder")
    for name in SOURCE_OPTIONS:
        add_option(group, name, **LinearConfig.__dataclass_fields__[name].metadata)
    parser.set_defaults(**dict.fromkeys(SOURCE_OPTIONS))


def source_settings(args: argparse.Namespace | RunConfig) -> dict:
    """Return the flags of `add_source_options` as arguments of `LoadedCheckpoint.open`."""
    return {name: getattr(args, name) for name in SOURCE_OPTIONS}


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and report each way it can end in one line."""
    command = os.path.basename(sys.argv[0])
    # A closed stream is None, and a file of the run could get its number.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # a name may have what a terminal has not
    try:
        main()
    except RunError as error:
        if distributed.rank() == 0:  # raised on all ranks, or on rank 0 alone
            print(f"{command}: {error}", file=sys.stderr)
        sys.exit(1)
    except UnreadableImageError as error:
        print(f"{command}: {distributed.rank_prefix()}{error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if (
            isinstance(error, MemoryError | torch.OutOfMemoryError)
            or "DefaultCPUAllocator" in str(error)  # a RuntimeError of no type of its own
        ):
            print(
                f"{command}: {distributed.rank_prefix()}too little memory for this run: give "
                "a smaller --batch_size or --bank_size, or --amp bf16; an existing checkpoint is "
                "intact",
                file=sys.stderr,
            )
        elif distributed.is_peer_failure(error):
            print(f"{distributed.rank_prefix()}another rank is gone", file=sys.stderr)
        else:
            raise
        sys.exit(1)
    except KeyboardInterrupt:  # outside of the steps, where `Run` handles it
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def on_ranks(config: RunConfig, parser: Parser) -> Iterator[None]:
    """Enclose a command: with --ddp this process is one of torchrun's ranks."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        ignore_pil_warnings()
        with parser.bad_input():
            if config.ddp:
                stack.enter_context(distributed.process_group(config.overwrite))
            elif distributed.launched_by_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
                raise ValueError(
                    f"torchrun started {os.environ['WORLD_SIZE']} processes: add --ddp"
                )
        yield


# ---- files, labels, summaries -------------------------------------------------------------------


def check_new(flag: str, path: str, overwrite: bool) -> None:
    """Raise ValueError for an output file that exists, unless `overwrite`, or cannot be written."""
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"{flag} {path}: exists: replace it with --overwrite, or choose another")
    if os.path.isdir(path):
        raise ValueError(f"{flag} {path}: is a folder")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"{flag} {path}: there is no such folder")


def data_label(name: str, root: str) -> str:
    """Return the data set's name in the results; for the user's own with its folders' names."""
    if name not in ("folder", "webdataset"):
        return name
    roots = split_roots(root) if name == "folder" else [root]
    return f"{name}:{'+'.join(Path(place).resolve().name for place in roots)}"


def print_summary(
    title: str,
    net: nn.Module,
    counts: tuple[int, int],
    images: Data,
    encoder: dict,
    config: RunConfig,
    device: torch.device,
) -> dict:
    """Log what a run trains and on what; return its columns of results.csv.

    `counts`: the network's `params_and_flops`. `encoder`: as in a checkpoint. `config`: with the
    resolved data_name, data_root and amp.
    """
    params, flops = counts
    where = f"{device}, {config.amp}" if config.amp != "off" else device
    summary = f"{images.summary}\n" if images.summary else ""
    tests = 0 if images.test_images is None else len(images.test_images)
    distributed.log(
        f"{title}: {params / 1e6:.2f}M parameters, {flops / 1e6:.2f}M multiply-adds per image "
        f"(thop's FLOPs), on {where}\n{summary}{config.data_name}: {len(images.train_images)} "
        f"training images, {tests} test images, {len(images.classes)} classes, "
        f"{encoder['image_size']} pixels"
    )
    columns = {"data": data_label(config.data_name, config.data_root), "arch": encoder["arch"]}
    columns |= {"train_size": len(images.train_images), "device": device.type}
    if hasattr(net.backbone, "conv1"):
        columns["width"] = net.backbone.conv1.out_channels
    return columns | {"params_m": params / 1e6, "flops_g": flops / 1e9}
