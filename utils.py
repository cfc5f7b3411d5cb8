"""What the commands have in common: flags, errors in one line, the progress."""

import argparse
import contextlib
import glob
import math
import os
import re
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch

from simsiam.data.decode import UnreadableImageError, ignore_pil_warnings
from simsiam.data.folders import split_roots
from simsiam.data.loader import Data
from simsiam.models.backbones import STEMS
from simsiam.models.classifier import Classifier
from simsiam.models.simsiam import SimSiam
from simsiam.runtime import distributed
from simsiam.runtime.files import RunError
from simsiam.training.run import run_of

# ---- errors in one line -------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr and exit code 2, without the usage.

    `description`: a module's docstring, of which the first line is told; None under python -OO.
    """

    def __init__(self, prog: str, description: str | None, **more: object):
        about = (description or "").split("\n")[0]
        super().__init__(prog, description=about, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        """Of what all ranks meet alike, the first speaks."""
        first = not distributed.launched_by_torchrun() or os.environ["RANK"] == "0"
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n" if first else None)

    @contextlib.contextmanager
    def bad_input(self) -> Iterator[None]:
        """Around a run's set-up: ValueError and OSError are the user's to mend, said in one line.

        Our own mistakes show in other exceptions, and in the loop, and keep their traceback.
        An error on one rank, even if on that one alone, ends all, and the first such rank says it.
        """
        found = None
        try:
            yield
        except (ValueError, OSError) as error:
            found = " ".join(str(error).split())
        for i, error in enumerate(distributed.all_gather_objects(found)):
            if error is not None:
                line = f"{self.prog}: {distributed.rank_prefix(i)}{error}\n"
                self.exit(2, line if i == distributed.rank() else None)


def is_memory(error: Exception) -> bool:
    """Whether memory could not be had, of a device or of the machine."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "DefaultCPUAllocator" in str(error)  # a RuntimeError of no type of its own
    )


def run_command(main: Callable[[], None]) -> None:
    """A command's `main`, each of its ends said in one line."""
    command = os.path.basename(sys.argv[0])
    # A closed one is None, and a file of the run's could get its number.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # a name may have what a terminal has not
    try:
        main()
    except RunError as error:
        if distributed.rank() == 0:  # all ranks meet it alike, or the first alone does
            print(f"{command}: {error}", file=sys.stderr)
        sys.exit(1)
    except UnreadableImageError as error:
        print(f"{command}: {distributed.rank_prefix(distributed.rank())}{error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        first = distributed.rank_prefix(distributed.rank())
        if is_memory(error):
            line = f"{command}: {first}there is too little memory for this run: give a smaller "
            line += (
                "--batch_size or --bank_size, or --amp bf16; a checkpoint that is there is intact"
            )
            print(line, file=sys.stderr)
        elif distributed.is_peer_failure(error):
            print(f"{first}another rank is gone", file=sys.stderr)
        else:
            raise
        sys.exit(1)
    except KeyboardInterrupt:  # outside of the steps, where `Run` listens
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def joined(args: Namespace, parser: Parser) -> Iterator[None]:
    """Around a command: with --ddp this process is one of torchrun's ranks."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        ignore_pil_warnings()
        with parser.bad_input():
            if args.ddp:
                stack.enter_context(distributed.process_group(args.overwrite))
            elif distributed.launched_by_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
                raise ValueError(f"torchrun started {os.environ['WORLD_SIZE']} of it: add --ddp")
        yield


# ---- flags --------------------------------------------------------------------------------------


class Flags(Parser):
    """The flags of a command that has runs: what is given, apart from the defaults.

    `fill(flags, given)` gets the given flags over the defaults of all, and those alone: it fills in
    what depends on other flags, and raises ValueError for what does not go together. `recipes`:
    defaults by name, told in the help.
    """

    def __init__(
        self,
        prog: str,
        description: str | None,
        fill: Callable[[dict, dict], dict],
        recipes: dict[str, dict],
    ):
        names = f"(by recipe: ...): the defaults of {', '.join(recipes)}, in this order."
        super().__init__(prog, description, argument_default=argparse.SUPPRESS, epilog=names)
        self.fill, self.recipes, self.defaults, self.about = fill, recipes, {}, ""

    def error(self, message: str) -> NoReturn:
        """As of `Parser`; while a checkpoint's flags are looked through, ValueError naming it."""
        if self.about:
            raise ValueError(f"{self.about}: {message}")
        super().error(message)

    def group(self, title: str) -> Callable[..., None]:
        """A function that adds flags to a new group: `add(name, kind, help, default, **more)`.

        `kind`: a type; a tuple of choices; "switch" for a flag alone; "two" for --name and
        --no-name. `more` as of add_argument. The help's end tells the default.
        """
        group = self.add_argument_group(title)

        def add(name: str, kind: object, help: str, default: object = None, **more: object) -> None:
            self.defaults[name] = default
            if name in next(iter(self.recipes.values())):
                values = [told(recipe[name]) for recipe in self.recipes.values()]
                one = len(set(values)) == 1
                help += f" ({values[0]})" if one else f" (by recipe: {', '.join(values)})"
            elif default is not None and kind != "switch":
                help += f" ({ {True: 'yes', False: 'no'}[default] if kind == 'two' else default })"
            if kind == "switch":
                more["action"] = "store_true"
            elif kind == "two":
                more["action"] = argparse.BooleanOptionalAction
            else:
                more["choices" if isinstance(kind, tuple) else "type"] = kind
            group.add_argument(f"--{name}", help=help, **more)

        return add

    def read(self, argv: list[str] | None) -> tuple[Namespace, dict]:
        """All flags, and those alone that the command line gives. Exits where they are wrong."""
        given = vars(self.parse_args(argv))
        try:
            return self.complete(given), given
        except ValueError as error:
            self.error(str(error))

    def complete(self, given: dict) -> Namespace:
        """Flags, filled up with their defaults. Raises ValueError."""
        return Namespace(**self.fill(self.defaults | given, given))

    def checked(self, saved: dict, path: str) -> dict:
        """The flags of the checkpoint at `path`, looked through as the command line is.

        Raises ValueError where they cannot be flags of this command.
        """
        self.about = path
        try:
            return vars(self.parse_args(self.as_argv(saved)))
        finally:
            self.about = ""

    def as_argv(self, saved: dict) -> list[str]:
        """The command line of a checkpoint's flags."""
        told = (name for name, default in self.defaults.items() if saved.get(name) is not default)
        return [word for name in told for word in words(name, saved.get(name))]


# The flags of both commands that are of kind "two".
TWO_FORMS = ("bn_decay", "exif", "fix_pred_lr", "pictures", "probe", "stop_on_collapse")


def words(name: str, value: object) -> list[str]:
    """How a command line gives a flag a value; nothing for None."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    several = isinstance(value, list | tuple)
    return [f"--{name}", *map(str, value)] if several else [f"--{name}={value}"]


def told(value: object) -> str:
    """A flag's value as one types it."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


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


def side(text: str) -> float:
    """A type for argparse: a view's side, in pixels or, up to 1, as a part of the image's."""
    value = number(float, 0.1, 1024)(text)
    if value > 1 and (value < 8 or value != int(value)):
        raise argparse.ArgumentTypeError(f"must be pixels, 8 or more, or from 0.1 to 1, not {text}")
    return int(value) if value > 1 else value


def workers(text: str) -> int:
    """A type for argparse: how many workers; `auto`: as many as there are cores for a rank.

    A number from the start, since what a run draws from shards depends on it.
    """
    if text != "auto":
        return number(int, 0, 256)(text)
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this machine
    return min(max(1, len(usable) // neighbours), 16)


def file_name(text: str) -> str:
    """A type for argparse: the name of a run, with which its files' names begin."""
    if len(os.fsencode(text)) > 180:  # of the 255 that most file systems allow
        raise argparse.ArgumentTypeError(f"{text} is too long: 180 bytes at most")
    if text != os.path.basename(text) or text in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"{text} must be a file name without a folder (see --out)")
    return text


def file_path(text: str) -> str:
    """A type for argparse: the path of a file; without it, an empty one would mean no file."""
    if not text:
        raise argparse.ArgumentTypeError("must be the path of a file")
    return text


def data_place(text: str) -> str:
    """A type for argparse: where a data set is, wherever it is asked for; an address stays one."""
    return text if re.match(r"[A-Za-z][\w.+-]+:", text) else os.path.abspath(text)


class Places(argparse.Action):
    """A flag of one place or several, joined as in PATH; they are one data set.

    A pattern with *, ? or [] that the shell has left as it is stands for what it matches, in order.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: Namespace,
        values: list[str],
        option: str | None = None,
    ) -> None:
        found = [[text] if os.path.exists(text) else sorted(glob.glob(text)) for text in values]
        places = [one for text, some in zip(values, found, strict=True) for one in some or [text]]
        setattr(namespace, self.dest, os.pathsep.join(places))


TEXTURES_HAVE_NO_ROOT = (
    "--data_root: textures are made, not read: leave it out or, for images of your own, add "
    "--data_name folder"
)


AMP = ("auto", "bf16", "fp16", "off")


def run_flags(flags: Flags, out: str | None = None) -> None:
    """The flags that every command has for its run. `out`: the default folder, in words."""
    add = flags.group("run")
    add("seed", number(int, 0, 2**32 - 1), "of every random choice", 0)
    add("device", str, "auto (cuda, mps, else cpu), or a device's name", "auto")
    amp = "autocast; auto: bf16 where that is faster (cuda and, in training, CPUs that have it)"
    add("amp", AMP, amp, "auto")
    add("ddp", "switch", "divide the work among the processes of torchrun", False)
    add("compile", "switch", "torch.compile the network", False)
    add("deterministic", "switch", "the same bits in each run, also on cuda (slower)", False)
    decoders = "threads or processes that decode files; auto: a rank's cores, 16 at most"
    add("num_workers", workers, decoders, workers("auto"))
    bad = "files that are no images: stop, or leave them out and list them"
    add("bad_images", ("error", "skip"), bad, "error")
    minutes = "write a checkpoint at least so often; 0: after each step"
    add("checkpoint_minutes", number(float, 0), minutes, 10.0)
    add("pictures", "two", "draw pictures at the end", True)
    folder = "folder of what a run writes"
    add("out", str, f"{folder} ({out})" if out else folder, None if out else "results")
    add("name", file_name, "the run's name, instead of one made of its flags")
    resume = "go on with this run's checkpoint, or with the one at PATH"
    more = {"nargs": "?", "const": True, "metavar": "PATH"}
    add("resume", file_path, resume, False, **more)
    add("overwrite", "switch", "replace this run's files", False)


EACH = {"nargs": "+", "metavar": "N"}
# What another project's file does not say of its encoder: name, kind, help, and more.
OF_SOURCE = (
    ("stem", STEMS, "its first layers (what its layout suggests)", {}),
    ("image_size", number(int, 8, 1024), "side of the images that it sees (32 or 224)", {}),
    ("mean", number(float, 0, 1), "of its images' channels, from 0 to 1 (its project's)", EACH),
    ("std", number(float, 0.001, 1), "as --mean, their standard deviation", EACH),
)


def source_flags(parser: Parser) -> None:
    """The flags OF_SOURCE, for a tool."""
    group = parser.add_argument_group("another project's encoder")
    for name, kind, text, more in OF_SOURCE:
        how = {"choices" if isinstance(kind, tuple) else "type": kind}
        group.add_argument(f"--{name}", help=text, **how, **more)


def of_source(args: Namespace) -> dict:
    """What the flags OF_SOURCE say, as arguments of `weights.Source.open`."""
    return {name: getattr(args, name) for name, *_ in OF_SOURCE}


def place_of_run(flags: dict, given: dict) -> dict:
    """`flags` with the folder and name of the run at --resume PATH, if there is one.

    Raises ValueError for flags that exclude each other.
    """
    if flags["resume"] and flags["overwrite"]:
        raise ValueError("--overwrite: does not go with --resume")
    if flags["resume"] in (True, False):
        return flags
    folder, name = run_of(flags["resume"])
    return flags | {"out": given.get("out", folder), "name": given.get("name", name)}


def check_new(what: str, path: str, overwrite: bool) -> None:
    """Raises ValueError for a file that is there, unless it is to be replaced, or cannot be one."""
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"{what} {path}: exists: replace it with --overwrite, or choose another")
    if os.path.isdir(path):
        raise ValueError(f"{what} {path}: is a folder")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"{what} {path}: there is no such folder")


def data_label(name: str, root: str) -> str:
    """The data set's name in the results; for the user's own with whose images they are."""
    if name not in ("folder", "webdataset"):
        return name
    places = split_roots(root) if name == "folder" else [root]
    return f"{name}:{'+'.join(Path(place).resolve().name for place in places)}"


def print_summary(
    what: str,
    net: SimSiam | Classifier,
    counts: tuple[int, int],
    images: Data,
    name: str,
    size: int,
    device: torch.device,
    amp: str,
) -> dict:
    """Say what a run is about; the columns of results.csv for its network and its images.

    `counts`: the network's `params_and_flops`.
    """
    on = f"{device}, {amp}" if amp != "off" else device
    params, flops = counts
    found = f"{images.summary}\n" if images.summary else ""
    tests = 0 if images.test_images is None else len(images.test_images)
    distributed.log(
        f"{what}: {params / 1e6:.2f}M parameters, {flops / 1e6:.2f}M multiply-adds an image "
        f"(thop's FLOPs), on {on}\n{found}{name}: {len(images.train_images)} training images, "
        f"{tests} test images, {len(images.classes)} classes, {size} pixels"
    )
    known = {"train_size": len(images.train_images)}
    if hasattr(net.backbone, "conv1"):
        known["width"] = net.backbone.conv1.out_channels
    known |= {"params_m": params / 1e6, "flops_g": flops / 1e9}
    return known | {"device": device.type}
