"""A look at the training images before a run: what they are, and which flags would suit them."""

import hashlib
import math
from argparse import Namespace
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from simsiam.runtime import distributed
from simsiam.data.decode import DEFAULT_DECODE, DecodeOptions, head_of
from simsiam.data.loader import Data, Files
from simsiam.data.loader import evenly_spaced
from simsiam.views.augment import LEAST_STD

SAMPLE = 1000  # images that a survey looks at, evenly apart
MEASURED = 10000  # images in files that --mean auto decodes: to read all of ImageNet takes an hour
FLAT_IMAGES = 8  # mean std over the images of a pixel, of 255, below which these hardly differ
GRAY = 8  # levels of 255 by which the channels of a gray image may differ: JPEG's rounding
SMALLEST_CROP = 8  # pixels: of a smaller one a network sees little
SIXTEEN_BITS = ("I;16", "uint16")  # modes of PIL and of arrays
DARK = 128  # of 255: below it half of the levels of 16 bits, and more, are not used
FAR = 0.15  # of a channel's mean from --mean, of the range from 0 to 1


# ---- mean and std of the channels ---------------------------------------------------------------


def measured(images: Tensor | Files) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel over all pixels, as numbers from 0 to 1.

    Of images in files at most `MEASURED`. The sums are whole numbers, so that the result is the
    same to the bit on any machine.
    """
    if isinstance(images, Files):
        images = images[evenly_spaced(len(images), MEASURED)]
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for part in images.split(512):
        for channel, count in zip(part.unbind(1), counts, strict=True):
            count += torch.bincount(channel.flatten().cpu(), minlength=256)
    share = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


def colours(args: Namespace, images: Tensor | Files) -> dict:
    """`mean` and `std` as --mean and --std say, measured on the training images where they are
    `auto`.

    Raises ValueError where a channel has no contrast to divide by.
    """
    found = {"mean": args.mean, "std": args.std}
    names = [name for name, value in found.items() if value == "auto"]
    if names:
        mean, std = distributed.broadcast_from_rank0(lambda: measured(images))
        if "std" in names and min(std) < LEAST_STD:
            raise ValueError(
                "--std auto: a channel has one value in all training images: give numbers"
            )
        found |= {name: value for name, value in (("mean", mean), ("std", std)) if name in names}
        told = (f"{name} {' '.join(f'{x:.4f}' for x in found[name])}" for name in names)
        distributed.log(f"measured on the training images: {', '.join(told)}")
    return found


# ---- what the images are ------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a survey has seen of a sample of `looked` out of `number` images.

    `sizes`: width and height of each file that can be opened; `modes`: PIL's, and how many have
    it. `side`: of the images as they are trained on. `gray`: how many have no colour. `copies`:
    how many have the pixels of another before them. `varied`: the std of a pixel over the images,
    mean over all pixels, of 255. `classes`: images of each, of all. `mean`: of the channels, from
    0 to 1. `brightest`: the largest value of a pixel.
    """

    number: int
    looked: int
    sizes: list[tuple[int, int]]
    modes: Counter
    side: int
    gray: int
    copies: int
    varied: float
    classes: dict[str, int]
    mean: tuple[float, ...]
    brightest: int = 255


def see(images: Data, reading: DecodeOptions = DEFAULT_DECODE) -> Seen:
    """Look at the heads of the training images' files, and at their pixels."""
    sizes, modes, files = [], Counter(), images.files
    for i in evenly_spaced(len(files), SAMPLE).tolist() if files else ():
        try:
            head = head_of(files[i], reading)
            sizes.append(head.size)
            modes[head.mode] += 1
        except ValueError:  # the run has said what it makes of it
            continue
    some = images.train_images[evenly_spaced(len(images.train_images), SAMPLE)]
    colour = some.amax(1).short() - some.amin(1)  # M x H x W: how much of it a pixel has
    labels = images.train_labels[images.train_labels >= 0]
    counts = torch.bincount(labels, minlength=len(images.classes)).tolist()
    distinct = {hashlib.sha1(image.numpy().tobytes()).digest() for image in some}
    return Seen(
        number=len(images.train_images),
        looked=len(some),
        sizes=sizes,
        modes=modes,
        side=some.shape[-1],
        gray=int((colour.flatten(1).amax(1) <= GRAY).sum()),
        copies=len(some) - len(distinct),
        varied=some.float().std(0).mean().item() if len(some) > 1 else math.inf,
        classes=dict(zip(images.classes, counts, strict=True)),
        mean=measured(some)[0],
        brightest=int(some.max()),
    )


def described(seen: Seen) -> str:
    """A line: number, sizes, modes, gray images, copies, the balance of the classes."""
    of = f" of {seen.number:,}" * (seen.looked < seen.number)
    parts = []
    if seen.sizes:
        shorter = sorted(map(min, seen.sizes))
        (w, h), (wide, high) = (end(seen.sizes, key=math.prod) for end in (min, max))
        size = f"{w} x {h}" + f" to {wide} x {high}" * ((w, h) != (wide, high)) + " pixels"
        parts.append(f"{size} (median shorter side {shorter[len(shorter) // 2]})")
        parts.append(", ".join(f"{count:,} {mode}" for mode, count in seen.modes.most_common(4)))
    gray = {0: "none", seen.looked: "all"}.get(seen.gray, f"{seen.gray:,}")
    parts += [f"{gray} grayscale"] * (len(seen.mean) == 3)
    parts.append(f"{seen.copies or 'no'} exact " + ("copy" if seen.copies == 1 else "copies"))
    if sum(seen.classes.values()):
        few, many = (end(seen.classes, key=seen.classes.get) for end in (min, max))
        least, most = seen.classes[few], seen.classes[many]
        unequal = f"classes of {least:,} ({few}) to {most:,} ({many}) images"
        parts.append(unequal if least < most else f"{most:,} images of each class")
    return f"a look at {seen.looked:,}{of} training images: " + "; ".join(parts)


def advice(seen: Seen, flags: dict) -> str:
    """Which other flags of main.py would suit, each with why, in a line; nothing if none would."""
    found = []
    brightness, contrast, *colour = flags["jitter"]
    if len(seen.mean) == 3 and seen.gray == seen.looked and (any(colour) or flags["gray_p"]):
        found.append(
            "all images are grayscale: colour jitter of saturation and hue does nothing: "
            f"--jitter {brightness:g} {contrast:g} 0 0 --gray_p 0, or --channels 1"
        )
    least, most = flags["crop_scale"]
    smallest = seen.side * math.sqrt(least)
    if smallest < SMALLEST_CROP:
        enough = min(1, math.ceil(10 * (SMALLEST_CROP / seen.side) ** 2) / 10)
        found.append(
            f"the images are tiny: a crop of {least:g} of {seen.side} x {seen.side} pixels is "
            f"{smallest:.0f} wide: --crop_scale {enough:g} {max(most, enough):g}"
        )
    if flags["mean"] != "auto" and any(
        abs(own - given) > FAR for own, given in zip(seen.mean, flags["mean"], strict=True)
    ):
        own = " ".join(f"{value:.2f}" for value in seen.mean)
        found.append(f"their mean, {own}, is far from --mean: --mean auto --std auto")
    deep = any(mode.startswith(SIXTEEN_BITS) for mode in seen.modes)
    if deep and not flags.get("levels") and seen.brightest < DARK:
        found.append(
            f"the values of 16 bits are below {256 * (seen.brightest + 1):,}, so that only "
            f"{seen.brightest + 1} of 256 levels are used: --levels 0 "
            f"{256 * (seen.brightest + 1) - 1}"
        )
    if seen.varied < FLAT_IMAGES:
        found.append(
            f"the images hardly differ (by {seen.varied:.1f} of 255 levels): look at --show_views"
        )
    return "; ".join(found)


def say(args: Namespace, images: Data) -> None:
    """What a folder's images are, and which flags would suit them, in at most two lines."""
    if args.channels != 3:
        number = "one channel" if args.channels == 1 else f"{args.channels} channels"
        distributed.log(f"{number}: no saturation, hue and grayscale, which need three")
    if args.data_name == "folder" and distributed.rank() == 0:
        seen = see(images, DecodeOptions.of(vars(args)))
        for line in (described(seen), advice(seen, vars(args))):
            if line:
                distributed.log(line)
