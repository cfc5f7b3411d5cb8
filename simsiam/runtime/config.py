"""Config: the settings of a command as a dataclass, from which its flags are made.

A field is declared once, with its default, its kind (what values it takes) and its help:

    class PretrainConfig(Config):
        batch_size: int = option(Number(int, 2), 512, "images per step")

The command line, a checkpoint and the library all go through `Config.validate`.
"""

import argparse
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

# ---- kinds of values ----------------------------------------------------------------------------


class Kind:
    """The values that a setting takes. `nargs`, `metavar`: of its flag, as in argparse."""

    nargs: int | str | None = None
    metavar: str | tuple[str, ...] | None = None

    def parse(self, words: str | list[str]) -> object:
        """Return the value of a flag's word or words, not checked yet. Raises ValueError."""
        return words

    def check(self, value: object) -> None:
        """Raise ValueError, which says what is expected, for a value that is not of this kind."""
        raise NotImplementedError

    def read(self, words: str | list[str]) -> object:
        """Parse the word or words of a flag and check the value. Raises ValueError."""
        value = self.parse(words)
        self.check(value)
        return value


class Number(Kind):
    """A finite `int` or `float` from `low` to `high`."""

    def __init__(self, kind: type, low: float = -math.inf, high: float = math.inf):
        self.kind, self.low, self.high = kind, low, high
        self.metavar = "N" if kind is int else "X"

    def expected(self) -> str:
        """Return the range in words."""
        noun = "a whole number" if self.kind is int else "a number"
        if self.high == math.inf:
            return noun if self.low == -math.inf else f"{noun} of at least {self.low:g}"
        return f"{noun} from {self.low:g} to {self.high:g}"

    def parse(self, words: str) -> float:
        try:
            return self.kind(words)
        except ValueError:
            raise ValueError(f"must be {self.expected()}") from None

    def check(self, value: object) -> None:
        is_number = type(value) in (self.kind, int)
        if not is_number or not (self.low <= value <= self.high and abs(value) < math.inf):
            raise ValueError(f"must be {self.expected()}")


class Choice(Kind):
    """One of some words, or a key of a registry, which may grow after this kind is made."""

    def __init__(self, choices: Collection[str]):
        self.choices = choices

    @property
    def metavar(self) -> str:
        return "{" + ",".join(self.choices) + "}"

    def check(self, value: object) -> None:
        if not isinstance(value, str) or value not in self.choices:
            raise ValueError(f"choose one of {', '.join(self.choices)}")


class Text(Kind):
    """A string; `check_text` raises ValueError for one that is not accepted."""

    def __init__(self, metavar: str = "TEXT", check_text: Callable[[str], object] = str):
        self.metavar, self.check_text = metavar, check_text

    def check(self, value: object) -> None:
        if not isinstance(value, str):
            raise ValueError("must be text")
        self.check_text(value)


class Flag(Kind):
    """A boolean: --name and --no-name."""

    def check(self, value: object) -> None:
        if type(value) is not bool:
            raise ValueError("must be true or false")


class Several(Kind):
    """A tuple of values of one kind: exactly `count` of them, or any number from one on."""

    def __init__(
        self,
        kind: Kind,
        count: int | None = None,
        increasing: bool = False,
        metavar: str | tuple[str, ...] | None = None,
    ):
        self.kind, self.count, self.increasing = kind, count, increasing
        self.nargs, self.metavar = count or "+", metavar or kind.metavar

    def parse(self, words: list[str]) -> tuple:
        return tuple(map(self.kind.parse, words))

    def check(self, value: object) -> None:
        if not isinstance(value, tuple) or not value or len(value) != (self.count or len(value)):
            raise ValueError(f"must be {self.count or 'one or more'} values")
        for one in value:
            self.kind.check(one)
        if self.increasing and any(a > b for a, b in itertools.pairwise(value)):
            raise ValueError("must not fall")


class Auto(Kind):
    """The word `auto`, or a value of another kind. `resolve`, if given, replaces `auto` at once."""

    def __init__(self, kind: Kind, resolve: Callable[[], object] = lambda: "auto"):
        self.kind, self.resolve = kind, resolve
        self.nargs, self.metavar = kind.nargs, kind.metavar

    def parse(self, words: str | list[str]) -> object:
        return self.resolve() if words in ("auto", ["auto"]) else self.kind.parse(words)

    def check(self, value: object) -> None:
        if not isinstance(value, str) or value != self.resolve():
            self.kind.check(value)


class FlagOrPath(Kind):
    """--name alone is True, --name PATH is the path, neither is False."""

    nargs = "?"
    metavar = "PATH"

    def check(self, value: object) -> None:
        if not isinstance(value, bool | str) or value == "":
            raise ValueError("must be the path of a file")


# ---- configs ------------------------------------------------------------------------------------


def option(kind: Kind, default: object, help: str) -> Any:
    """Declare a field of a `Config`. A default of None means unset, and None is a valid value."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help})


class ConfigError(ValueError):
    """A setting with a value that it cannot have; the message names its flag."""


def words_of(value: object) -> list[str]:
    """Return a value as the words of a command line."""
    return list(map(str, value)) if isinstance(value, tuple) else [str(value)]


def shown(value: object) -> str:
    """Return a value as it is typed on a command line."""
    return " ".join(words_of(value))


@dataclasses.dataclass
class Config:
    """The base of a command's settings.

    `resolve` builds a config from explicit settings, a recipe and the defaults; `from_dict` one
    from a checkpoint. Both validate.

    `recipes`: named sets of defaults. `selectors`: the settings on which others' defaults depend.
    `groups`: titles of the help's groups by their first field; fields before them are in `run`.
    """

    recipes: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    selectors: ClassVar[tuple[str, ...]] = ()
    groups: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def resolve(cls, overrides: Mapping[str, object]) -> "Config":
        """Return the config of explicit settings, with defaults for the rest.

        Raises ConfigError for a setting that is invalid, or that does not go with another one.
        """
        return cls(**overrides)

    @classmethod
    def from_args(cls, args: Mapping[str, object]) -> "Config":
        """Return the config of those of `args` that are fields; None means the default."""
        names = {field.name for field in dataclasses.fields(cls)} & args.keys()
        return cls(**{name: args[name] for name in names if args[name] is not None})

    @classmethod
    def from_dict(cls, values: object) -> "Config":
        """Return the config with exactly these field values, which may come from any file.

        Lists count as tuples. Raises ConfigError for a missing, unknown or invalid field.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("its settings are missing")
        names = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(names ^ values.keys(), key=str):
            problem = "lack" if name in names else "have an unknown"
            raise ConfigError(f"its settings {problem} {name}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def validate(self) -> None:
        """Raise ConfigError for a field whose value is not of its kind."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            try:
                field.metadata["kind"].check(value)
            except ValueError as error:
                raise ConfigError(f"{self.flag(field.name)}: {error}") from None

    def flag(self, name: str) -> str:
        """Return a setting as its flag, for messages: `--lr 0.5`, `--ddp`."""
        value = getattr(self, name)
        return f"--{name}" if isinstance(value, bool) else f"--{name} {shown(value)}"

    def refuse(self, name: str, wrong: object, reason: str) -> None:
        """Raise ConfigError, which names a setting and its value, if something is `wrong`."""
        if wrong:
            raise ConfigError(f"{self.flag(name)}: {reason}")

    def as_dict(self) -> dict[str, object]:
        """Return the field values by name, as a checkpoint stores them."""
        return dict(vars(self))

    def command_line(self, leave_out: Iterable[str] = ()) -> list[str]:
        """Return the flags that resolve to these settings, without those that are defaults."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        chosen = {k: values[k] for k in self.selectors if values.get(k) != getattr(type(self), k)}
        usual = vars(self.resolve(chosen))
        chosen |= {name: value for name, value in values.items() if value != usual[name]}
        words = []
        for name in [name for name in chosen if name not in leave_out]:
            if isinstance(chosen[name], bool):
                words.append(f"--{name}" if chosen[name] else f"--no-{name}")
            else:
                words += [f"--{name}", *words_of(chosen[name])]
        return words


# ---- flags --------------------------------------------------------------------------------------


class StoreOption(argparse.Action):
    """Parse and check the words of a flag by the kind of its field."""

    def __init__(self, option_strings: Sequence[str], dest: str, kind: Kind, **settings: object):
        const = True if kind.nargs == "?" else None
        settings |= {"nargs": kind.nargs, "const": const, "metavar": kind.metavar}
        super().__init__(option_strings, dest, **settings)
        self.kind = kind

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        words: str | list[str] | bool,
        option_string: str | None = None,
    ) -> None:
        try:
            setattr(namespace, self.dest, self.kind.read(words))
        except ValueError as error:
            text = " ".join(words) if isinstance(words, list) else words
            parser.error(f"--{self.dest} {text}: {error}")


def add_option(
    group: argparse.ArgumentParser | argparse._ArgumentGroup, name: str, kind: Kind, help: str
) -> None:
    """Add the flag of a kind to a parser or to one of its groups; without a default."""
    if isinstance(kind, Flag):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=help)
    else:
        group.add_argument(f"--{name}", action=StoreOption, kind=kind, help=help)


def add_options(parser: argparse.ArgumentParser, config: type[Config]) -> None:
    """Add a flag for each field of a config class, in groups; the help ends with the default.

    The groups come in the order of `config.groups`, `run` last if it is not among them. The parser
    should suppress defaults: what it returns are the settings that the command line gives.
    """
    titles = dict.fromkeys([*config.groups.values(), "run"])
    groups = {title: parser.add_argument_group(title) for title in titles}
    title = "run"
    for field in dataclasses.fields(config):
        title = config.groups.get(field.name, title)
        values = {name: recipe.get(field.name) for name, recipe in config.recipes.items()}
        text = field.metadata["help"]
        if len(set(values.values())) > 1:
            listed = [f"{name} {shown(x)}" for name, x in values.items() if x is not None]
            text += f" (by recipe: {', '.join(listed)})"
        elif field.default is not None and field.default is not False:
            text += " (yes)" if field.default is True else f" ({shown(field.default)})"
        text = text.replace("%", "%%")
        add_option(groups[title], field.name, field.metadata["kind"], text)


# ---- settings that every training run has -------------------------------------------------------

AMP = ("auto", "bf16", "fp16", "off")


def default_workers() -> int:
    """Return the number of usable cores per local rank, at most 16.

    A number from the start, since what a run draws from shards depends on it.
    """
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(1, len(usable) // local_world_size), 16)


def check_run_name(text: str) -> None:
    """Raise ValueError for a name of a run with which no file's name can begin."""
    if len(os.fsencode(text)) > 180:  # of the 255 that most file systems allow
        raise ValueError("is too long: 180 bytes at most")
    if text != os.path.basename(text) or text in ("", ".", ".."):
        raise ValueError("must be a file name without a folder (see --out)")


def check_path(text: str) -> None:
    """Raise ValueError for an empty path, which would mean no file."""
    if not text:
        raise ValueError("must be the path of a file")


WORKERS, PATH = Auto(Number(int, 0, 256), default_workers), Text("PATH", check_path)


@dataclasses.dataclass
class RunConfig(Config):
    """The settings of a run that do not depend on what it trains."""

    seed: int = option(Number(int, 0, 2**32 - 1), 0, "seed of every random choice")
    device: str = option(Text("DEVICE"), "auto", "auto (cuda, mps, else cpu), or a device's name")
    amp: str = option(Choice(AMP), "auto", "autocast dtype; auto: bf16 where that is faster")
    ddp: bool = option(Flag(), False, "train on the ranks that torchrun starts")
    compile: bool = option(Flag(), False, "torch.compile the network")
    deterministic: bool = option(Flag(), False, "the same bits in each run, also on cuda (slower)")
    num_workers: int = option(
        WORKERS, default_workers(), "threads or processes that decode files; auto: cores per rank"
    )
    bad_images: str = option(
        Choice(("error", "skip")),
        "error",
        "on files that are no images: stop, or leave them out and list them",
    )
    checkpoint_minutes: float = option(
        Number(float, 0), 10.0, "minutes between checkpoints at most; 0: one per step"
    )
    pictures: bool = option(Flag(), True, "draw pictures at the end")
    out: str = option(Text("FOLDER"), "results", "folder of the run's files")
    name: str | None = option(Text("NAME", check_run_name), None, "name of the run")
    resume: bool | str = option(FlagOrPath(), False, "resume this run, or the one of a checkpoint")
    overwrite: bool = option(Flag(), False, "replace this run's files")
