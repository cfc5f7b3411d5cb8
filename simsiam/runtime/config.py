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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

# ---- kinds of values ----------------------------------------------------------------------------


class Kind:
    """The values that a setting takes. A subclass parses one word and checks a parsed value.

    `nargs`: the number of words on the command line, as of argparse (None: one).
    """

    nargs: int | str | None = None
    metavar: str | tuple[str, ...] | None = None

    def parse(self, text: str) -> object:
        """Return the value of a word of the command line. Raises ValueError."""
        return text

    def parse_words(self, words: str | list[str]) -> object:
        """Return the value of all words of a flag. Raises ValueError."""
        return self.parse(words)

    def check(self, value: object) -> None:
        """Raise ValueError, which says what is expected, for a value that is not of this kind."""
        raise NotImplementedError

    def words(self, value: object) -> list[str]:
        """Return a value as words of a command line."""
        return [str(value)]


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

    def parse(self, text: str) -> float:
        try:
            return self.kind(text)
        except ValueError:
            raise ValueError(f"must be {self.expected()}") from None

    def check(self, value: object) -> None:
        kinds = (int,) if self.kind is int else (int, float)
        if type(value) not in kinds or not (
            self.low <= value <= self.high and abs(value) < math.inf
        ):
            raise ValueError(f"must be {self.expected()}")

    def words(self, value: object) -> list[str]:
        return [repr(value)]


class Choice(Kind):
    """One of a few words."""

    def __init__(self, *choices: str):
        self.choices = choices
        self.metavar = "{" + ",".join(choices) + "}"

    def parse(self, text: str) -> str:
        self.check(text)
        return text

    def check(self, value: object) -> None:
        if not isinstance(value, str) or value not in self.choices:
            raise ValueError(f"choose one of {', '.join(self.choices)}")


class Entry(Kind):
    """A name in a registry, which may grow after this kind is made."""

    def __init__(self, registry: Mapping[str, object]):
        self.registry = registry

    @property
    def metavar(self) -> str:
        return "{" + ",".join(self.registry) + "}"

    def check(self, value: object) -> None:
        if not isinstance(value, str) or value not in self.registry:
            raise ValueError(f"choose one of {', '.join(self.registry)}")


class Text(Kind):
    """A string; `valid` raises ValueError for one that is not accepted, or returns a better one."""

    def __init__(self, metavar: str = "TEXT", valid: Callable[[str], str] = str):
        self.metavar, self.valid = metavar, valid

    def parse(self, text: str) -> str:
        return self.valid(text)

    def check(self, value: object) -> None:
        if not isinstance(value, str):
            raise ValueError("must be text")
        self.valid(value)


class Flag(Kind):
    """A boolean: --name and --no-name."""

    nargs = 0

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

    def parse_words(self, words: str | list[str]) -> tuple:
        return tuple(map(self.kind.parse, words))

    def check(self, value: object) -> None:
        if not isinstance(value, tuple) or not value or len(value) != (self.count or len(value)):
            raise ValueError(f"must be {self.count or 'one or more'} values")
        for one in value:
            self.kind.check(one)
        if self.increasing and any(a > b for a, b in itertools.pairwise(value)):
            raise ValueError("must not fall")

    def words(self, value: object) -> list[str]:
        return [word for one in value for word in self.kind.words(one)]


class Auto(Kind):
    """The word `auto`, or a value of another kind. `resolve` replaces `auto` when it is parsed."""

    def __init__(self, kind: Kind, resolve: Callable[[], object] | None = None):
        self.kind, self.resolve = kind, resolve
        self.nargs, self.metavar = kind.nargs, kind.metavar

    def parse_words(self, words: str | list[str]) -> object:
        if words in ("auto", ["auto"]):
            return self.resolve() if self.resolve else "auto"
        try:
            return self.kind.parse_words(words)
        except ValueError as error:
            raise ValueError(f"{error}, or auto") from None

    def check(self, value: object) -> None:
        if value != "auto" or self.resolve:
            try:
                self.kind.check(value)
            except ValueError as error:
                raise ValueError(f"{error}, or auto") from None

    def words(self, value: object) -> list[str]:
        return ["auto"] if value == "auto" else self.kind.words(value)


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


def shown(value: object) -> str:
    """Return a value as it is typed on a command line."""
    return " ".join(map(shown, value)) if isinstance(value, tuple) else str(value)


@dataclasses.dataclass
class Config:
    """The base of a command's settings. `recipes`: named sets of defaults for some of its fields.

    `resolve` builds a config from explicit settings, a recipe and the defaults; `from_dict` one
    from a checkpoint. Both validate. `selectors`: the settings on which others' defaults depend.
    `groups`: titles of the help's groups by their first field; fields before them are in `run`.
    """

    groups: ClassVar[dict[str, str]] = {}
    selectors: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def recipes(cls) -> Mapping[str, Mapping[str, object]]:
        """Return the recipes by name: defaults of some of the fields."""
        return {}

    @classmethod
    def resolve(cls, overrides: Mapping[str, object]) -> "Config":
        """Return the config of explicit settings, with defaults for the rest.

        Raises ConfigError for a setting that is invalid, or that does not go with another one.
        """
        return cls(**overrides)

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
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def command_line(self, leave_out: Iterable[str] = ()) -> list[str]:
        """Return the flags that resolve to these settings, without those that are defaults."""
        values = {k: v for k, v in self.as_dict().items() if v is not None}
        fields = {field.name: field for field in dataclasses.fields(self)}
        chosen = {k: values[k] for k in self.selectors if values.get(k) != fields[k].default}
        while True:
            usual = self.resolve(chosen).as_dict()
            more = {k: v for k, v in values.items() if k not in chosen and v != usual[k]}
            if not more:
                break
            chosen |= more
        words = []
        for name, value in chosen.items():
            if name in leave_out:
                continue
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", *fields[name].metadata["kind"].words(value)]
        return words


# ---- flags --------------------------------------------------------------------------------------


class StoreOption(argparse.Action):
    """Parse and check the words of a flag by the kind of its field."""

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        kind: Kind,
        help: str,
        default: object = argparse.SUPPRESS,
    ):
        super().__init__(
            option_strings,
            dest,
            nargs=kind.nargs,
            const=True if kind.nargs == "?" else None,
            default=default,
            help=help,
            metavar=self.metavar_of(kind),
        )
        self.kind = kind

    @staticmethod
    def metavar_of(kind: Kind) -> str | tuple[str, ...] | None:
        """argparse wants a metavar for each word of a fixed number, else one for all."""
        if isinstance(kind.nargs, int) and isinstance(kind.metavar, str):
            return (kind.metavar,) * kind.nargs
        return kind.metavar

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        words: str | list[str] | bool,
        option_string: str | None = None,
    ) -> None:
        try:
            value = True if words is True else self.kind.parse_words(words)
            self.kind.check(value)
        except ValueError as error:
            text = " ".join(words) if isinstance(words, list) else words
            parser.error(f"--{self.dest} {text}: {error}")
        setattr(namespace, self.dest, value)


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
    fields, title = dataclasses.fields(config), "run"
    title_of = {f.name: (title := config.groups.get(f.name, title)) for f in fields}
    titles = list(dict.fromkeys([*config.groups.values(), "run"]))
    groups = {title: parser.add_argument_group(title) for title in titles}
    for field in sorted(fields, key=lambda field: titles.index(title_of[field.name])):
        text, default = field.metadata["help"], field.default
        values = {
            name: shown(recipe[field.name])
            for name, recipe in config.recipes().items()
            if recipe.get(field.name) is not None
        }
        recipes = sum(field.name in recipe for recipe in config.recipes().values())
        if len(set(values.values())) > 1 or 0 < len(values) < recipes:
            listed = ", ".join(f"{name} {value}" for name, value in values.items())
            text += f" (by recipe: {listed})"
        elif values or (default is not None and default is not False):
            value = next(iter(values.values()), shown(default))
            text += f" ({ {'True': 'yes', 'False': 'no'}.get(value, value) })"
        text = text.replace("%", "%%")
        add_option(groups[title_of[field.name]], field.name, field.metadata["kind"], text)


# ---- settings that every training run has -------------------------------------------------------

AMP = ("auto", "bf16", "fp16", "off")


def default_workers() -> int:
    """Return the number of usable cores per local rank, at most 16.

    A number from the start, since what a run draws from shards depends on it.
    """
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(1, len(usable) // local_world_size), 16)


def run_name(text: str) -> str:
    """Return the name of a run, with which its files' names begin. Raises ValueError."""
    if len(os.fsencode(text)) > 180:  # of the 255 that most file systems allow
        raise ValueError("is too long: 180 bytes at most")
    if text != os.path.basename(text) or text in ("", ".", ".."):
        raise ValueError("must be a file name without a folder (see --out)")
    return text


def file_path(text: str) -> str:
    """Return the path of a file. Raises ValueError for an empty one, which would mean no file."""
    if not text:
        raise ValueError("must be the path of a file")
    return text


WORKERS, PATH = Auto(Number(int, 0, 256), default_workers), Text("PATH", file_path)
BAD_IMAGES = Choice("error", "skip")


@dataclasses.dataclass
class RunConfig(Config):
    """The settings of a run that do not depend on what it trains."""

    seed: int = option(Number(int, 0, 2**32 - 1), 0, "seed of every random choice")
    device: str = option(Text("DEVICE"), "auto", "auto (cuda, mps, else cpu), or a device's name")
    amp: str = option(Choice(*AMP), "auto", "autocast dtype; auto: bf16 where that is faster")
    ddp: bool = option(Flag(), False, "train on the ranks that torchrun starts")
    compile: bool = option(Flag(), False, "torch.compile the network")
    deterministic: bool = option(Flag(), False, "the same bits in each run, also on cuda (slower)")
    num_workers: int = option(
        WORKERS, default_workers(), "threads or processes that decode files; auto: cores per rank"
    )
    bad_images: str = option(
        BAD_IMAGES, "error", "on files that are no images: stop, or leave them out and list them"
    )
    checkpoint_minutes: float = option(
        Number(float, 0), 10.0, "minutes between checkpoints at most; 0: one per step"
    )
    pictures: bool = option(Flag(), True, "draw pictures at the end")
    out: str = option(Text("FOLDER"), "results", "folder of the run's files")
    name: str | None = option(Text("NAME", run_name), None, "name of the run")
    resume: bool | str = option(FlagOrPath(), False, "resume this run, or the one of a checkpoint")
    overwrite: bool = option(Flag(), False, "replace this run's files")
