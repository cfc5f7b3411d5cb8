"""Recipes of main.py: the defaults of its flags, and the views, by name; the flags of the views."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping

from simsiam.views.augment import (
    LARGEST_HUE,
    LEAST_STD,
    LIMITS,
    NORMALISATION,
    RANGES,
    Augmentation,
)

CIFAR = {  # paper, App. D
    "arch": "resnet18",
    "stem": "cifar",
    "image_size": None,  # the data set's own
    "view_sizes": None,  # image_size throughout
    "feature_dim": 2048,
    "projector_layers": 2,
    "covariance": 0.0,
    "optimizer": "sgd",
    "batch_size": 512,
    "epochs": 800,
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "bn_decay": True,
    "warmup_epochs": 0.0,
    "fix_pred_lr": False,
}
IMAGENET = CIFAR | {  # paper, sec. 3 and App. A; the predictor's lr as in the authors' command
    "arch": "resnet50",
    "stem": "imagenet",
    "image_size": 224,
    "projector_layers": 3,
    "epochs": 100,
    "lr": 0.05,
    "weight_decay": 1e-4,
    "fix_pred_lr": True,
}
SHORT = CIFAR | {  # ours, for minutes to hours on a CPU: see docs/results.md
    "arch": "resnet8",
    "feature_dim": 512,
    "batch_size": 64,
    "epochs": 20,
    "lr": 1.0,
    "fix_pred_lr": True,
}
FAST = SHORT | {  # ours: the most accuracy a minute of what docs/results.md compares
    "view_sizes": (0.5, 0.625, 0.75),
    "covariance": 0.01,
    "optimizer": "muon",
    "batch_size": 128,
    "lr": 0.08,
    "momentum": 0.95,
    "weight_decay": 0.01,
    # With decay BN's weights in the projector shrink until, at a tenth, the run blows up.
    "bn_decay": False,
    "fix_pred_lr": False,
}
# What the views of a recipe are, and mean and std of the images.
VIEWS = {
    "cifar": (Augmentation(), *NORMALISATION["cifar"]),
    "imagenet": (Augmentation(blur_p=0.5), *NORMALISATION["imagenet"]),
    "short": (Augmentation(), *NORMALISATION["cifar"]),
    "fast": (Augmentation(), *NORMALISATION["cifar"]),
}
# A field of Augmentation has a flag of its name, but for this one.
FLAG_OF = {"flip_p": "hflip_p"}


def flags_of(augmentation: Augmentation) -> dict:
    """The fields of an augmentation, by the names of their flags."""
    return {FLAG_OF.get(name, name): value for name, value in vars(augmentation).items()}


def augmentation_of(flags: Mapping) -> Augmentation:
    """What the flags say of the views."""
    names = [field.name for field in dataclasses.fields(Augmentation)]
    return Augmentation(**{name: flags[FLAG_OF.get(name, name)] for name in names})


OTHERS = {"cifar": CIFAR, "imagenet": IMAGENET, "short": SHORT, "fast": FAST}
RECIPES = {
    name: OTHERS[name] | flags_of(augmentation) | {"mean": mean, "std": std}
    for name, (augmentation, mean, std) in VIEWS.items()
}
USUAL_RECIPE = {"textures": "short", "imagenet": "imagenet", "webdataset": "imagenet"}


# ---- flags of the views -------------------------------------------------------------------------


class Numbers(argparse.Action):
    """A flag of so many numbers (a tuple; one: a number), looked through; or, of some, `auto`.

    `count`: None where there may be any number.
    """

    def __init__(self, *args: object, count: int | None = 1, auto: bool = False, **more: object):
        super().__init__(*args, nargs=None if count == 1 else "+", **more)
        self.count, self.auto = count, auto

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        words: list[str] | str,
        option: str | None = None,
    ) -> None:
        words = [words] if isinstance(words, str) else words
        value = words[0]
        if not (self.auto and words == ["auto"]):
            try:
                value = numbers(self.dest, words, self.count)
            except ValueError as error:
                raise argparse.ArgumentError(self, f"{error}{', or auto' * self.auto}") from error
        setattr(namespace, self.dest, value)


def numbers(name: str, words: list[str], count: int | None) -> tuple[float, ...] | float:
    """The value of the flag `name` of the views. Raises ValueError that says what it must be."""
    least, most = (LIMITS | {"std": (LEAST_STD, 1)}).get(name, (0, 1))
    try:
        found = tuple(map(float, words))
    except ValueError:
        found = (math.nan,)
    wrong = count is not None and len(found) != count
    if wrong or not all(least <= value <= most for value in found):
        what = "a number" if count == 1 else f"{count} numbers" if count else "numbers"
        raise ValueError(f"must be {what} from {least:g} to {most:g}, not {' '.join(words)}")
    if name in RANGES and found[0] > found[1]:
        raise ValueError(f"must rise, not fall from {words[0]} to {words[1]}")
    if name == "jitter" and found[3] > LARGEST_HUE:
        raise ValueError(f"must end with a hue of at most {LARGEST_HUE}, not {words[3]}")
    return found[0] if count == 1 else found


def view_flags(add: Callable[..., None]) -> None:
    """The flags of what chance does to a view, and of mean and std; `add`: of utils.Flags.group."""
    one = {"action": Numbers, "metavar": "P"}
    two = {"action": Numbers, "count": 2, "metavar": "N"}
    add("crop_scale", str, "area of a crop over the image's, from and to", **two)
    add("crop_ratio", str, "width of a crop over its height, from and to", **two)
    strengths = "strengths for brightness, contrast, saturation, hue; 0: none"
    four = {"action": Numbers, "count": 4, "metavar": "N"}
    add("jitter", str, strengths, **four)
    add("jitter_p", str, "probability of colour jitter", **one)
    add("gray_p", str, "probability of grayscale", **one)
    add("blur_p", str, "probability of a Gaussian blur", **one)
    add("blur_sigma", str, "of the blur, from and to, in pixels of the view", **two)
    add("hflip_p", str, "probability of a flip from left to right", **one)
    add("vflip_p", str, "probability of a flip from top to bottom", **one)
    turn = "probability of a turn by 90, 180 or 270 degrees (microscopes, satellites)"
    add("rotate90_p", str, turn, **one)
    add("solarize_p", str, "probability of inverting what is brighter than half", **one)
    each = {"action": Numbers, "count": None, "auto": True, "metavar": "N"}
    mean = "of each channel, from 0 to 1; auto (other --channels than 3): measured on the images"
    add("mean", str, mean, **each)
    add("std", str, "as --mean, their standard deviation", **each)


def for_channels(flags: dict, given: dict) -> dict:
    """The flags where there may be other --channels than three, which recipes and colours are for.

    `given`: those that are no recipe's. Raises ValueError for what does not go with the number.
    """
    number = flags["channels"]
    for name in ("mean", "std"):
        if isinstance(given.get(name), tuple) and len(given[name]) != number:
            raise ValueError(f"--{name}: must be auto, or {number} numbers, one a channel")
    if number == 3:
        return flags
    brightness, contrast, *colour = flags["jitter"]
    wrong = {"jitter": any(colour), "gray_p": bool(flags["gray_p"])}
    told = [name for name, uses in wrong.items() if uses and name in given]
    if told:
        raise ValueError(
            f"--{told[0]}: saturation, hue and grayscale need three channels, not {number}: "
            f"--jitter {brightness:g} {contrast:g} 0 0 --gray_p 0"
        )
    measured = {name: given.get(name, "auto") for name in ("mean", "std")}
    return flags | measured | {"jitter": (brightness, contrast, 0.0, 0.0), "gray_p": 0.0}
