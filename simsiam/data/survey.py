"""A look at the training images before a run: what they are, and which flags would suit them."""

import hashlib
import math
from argparse import Namespace
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from simsiam.runtime import distributed
from simsiam.data.decode import DEFAULT_DECODE, DecodeOptions, read_header
from simsiam.data.loader import Data, ImageFiles
from simsiam.data.loader import evenly_spaced
from simsiam.views.augment import LEAST_STD

SURVEY_SIZE = 1000  # images that a survey looks at, evenly apart
STATS_SIZE = 10000  # images in files that --mean auto decodes: to read all of ImageNet takes an hour
FLAT_IMAGES = 8  # mean std over the images of a pixel, of 255, below which these hardly differ
GRAY_TOLERANCE = 8  # levels of 255 by which the channels of a gray image may differ: JPEG's rounding
SMALLEST_CROP = 8  # pixels: of a smaller one a network sees little
SIXTEEN_BITS = ("I;16", "uint16")  # modes of PIL and of arrays
DARK = 128  # of 255: below it half of the levels of 16 bits, and more, are not used
MEAN_TOLERANCE = 0.15  # of a channel's mean from --mean, of the range from 0 to 1


# ---- mean and std of the channels ---------------------------------------------------------------


def measure_channels(images: Tensor | ImageFiles) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel over all pixels, as numbers from 0 to 1.

    Of images in files at most `STATS_SIZE`. The sums are whole numbers, so that the result is the
    same to the bit on any machine.
    """
    if isinstance(images, ImageFiles):
        images = images[evenly_spaced(len(images), STATS_SIZE)]
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for part in images.split(512):
        for channel, count in zip(part.unbind(1), counts, strict=True):
            count += torch.bincount(channel.flatten().cpu(), minlength=256)
    share = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


def channel_stats(args: Namespace, images: Tensor | ImageFiles) -> dict:
    """`mean` and `std` as --mean and --std say, measured on the training images where they are
    `auto`.

    Raises ValueError where a channel has no contrast to divide by.
    """
    found = {"mean": args.mean, "std": args.std}
    names = [name for name, value in found.items() if value == "auto"]
    if names:
        mean, std = distributed.broadcast_from_rank0(lambda: measure_channels(images))
        if "std" in names and min(std) < LEAST_STD:
            raise ValueError(
                "--std auto: a channel has one value in all training images: give numbers"
            )
        found |= {name: value for name, value in (("mean", mean), ("std", std)) if name in names}
        told = (f"{name} {' '.join(f'{x:.4f}' for x in found[name])}" for name in names)
        distributed.log(f"measured on the training images: {', '.join(told)}")
    return found


# ---- what the images are ------------------------------------------------------------------------


class Survey(NamedTuple):
    """What a survey has seen of a sample of `sampled` out of `total` images.

    `sizes`: width and height of each file that can be opened; `modes`: PIL's, and how many have
    it. `image_size`: of the images as they are trained on. `gray_count`: how many have no colour. `duplicates`:
    how many have the pixels of another before them. `pixel_std`: the std of a pixel over the images,
    mean over all pixels, of 255. `class_sizes`: images of each, of all. `mean`: of the channels, from
    0 to 1. `max_value`: the largest value of a pixel.
    """

    total: int
    sampled: int
    sizes: list[tuple[int, int]]
    modes: Counter
    image_size: int
    gray_count: int
    duplicates: int
    pixel_std: float
    class_sizes: dict[str, int]
    mean: tuple[float, ...]
    max_value: int = 255


def survey_images(images: Data, decode: DecodeOptions = DEFAULT_DECODE) -> Survey:
    """Look at the heads of the training images' files, and at their pixels."""
    sizes, modes, files = [], Counter(), images.train_files
    for i in evenly_spaced(len(files), SURVEY_SIZE).tolist() if files else ():
        try:
            head = read_header(files[i], decode)
            sizes.append(head.size)
            modes[head.mode] += 1
        except ValueError:  # the run has said what it makes of it
            continue
    some = images.train_images[evenly_spaced(len(images.train_images), SURVEY_SIZE)]
    colour = some.amax(1).short() - some.amin(1)  # M x H x W: how much of it a pixel has
    labels = images.train_labels[images.train_labels >= 0]
    counts = torch.bincount(labels, minlength=len(images.classes)).tolist()
    distinct = {hashlib.sha1(image.numpy().tobytes()).digest() for image in some}
    return Survey(
        total=len(images.train_images),
        sampled=len(some),
        sizes=sizes,
        modes=modes,
        image_size=some.shape[-1],
        gray_count=int((colour.flatten(1).amax(1) <= GRAY_TOLERANCE).sum()),
        duplicates=len(some) - len(distinct),
        pixel_std=some.float().std(0).mean().item() if len(some) > 1 else math.inf,
        class_sizes=dict(zip(images.classes, counts, strict=True)),
        mean=measure_channels(some)[0],
        max_value=int(some.max()),
    )


def summarize(seen: Survey) -> str:
    """A line: number, sizes, modes, gray images, copies, the balance of the classes."""
    of = f" of {seen.total:,}" * (seen.sampled < seen.total)
    parts = []
    if seen.sizes:
        shorter = sorted(map(min, seen.sizes))
        (w, h), (wide, high) = (end(seen.sizes, key=math.prod) for end in (min, max))
        size = f"{w} x {h}" + f" to {wide} x {high}" * ((w, h) != (wide, high)) + " pixels"
        parts.append(f"{size} (median shorter side {shorter[len(shorter) // 2]})")
        parts.append(", ".join(f"{count:,} {mode}" for mode, count in seen.modes.most_common(4)))
    gray = {0: "none", seen.sampled: "all"}.get(seen.gray_count, f"{seen.gray_count:,}")
    parts += [f"{gray} grayscale"] * (len(seen.mean) == 3)
    parts.append(f"{seen.duplicates or 'no'} exact " + ("copy" if seen.duplicates == 1 else "copies"))
    if sum(seen.class_sizes.values()):
        few, many = (end(seen.class_sizes, key=seen.class_sizes.get) for end in (min, max))
        least, most = seen.class_sizes[few], seen.class_sizes[many]
        unequal = f"classes of {least:,} ({few}) to {most:,} ({many}) images"
        parts.append(unequal if least < most else f"{most:,} images of each class")
    return f"a look at {seen.sampled:,}{of} training images: " + "; ".join(parts)


def suggest_flags(seen: Survey, flags: dict) -> str:
    """Which other flags of main.py would suit, each with why, in a line; nothing if none would."""
    found = []
    brightness, contrast, *colour = flags["jitter"]
    if len(seen.mean) == 3 and seen.gray_count == seen.sampled and (any(colour) or flags["gray_p"]):
        found.append(
            "all images are grayscale: colour jitter of saturation and hue does nothing: "
            f"--jitter {brightness:g} {contrast:g} 0 0 --gray_p 0, or --channels 1"
        )
    least, most = flags["crop_scale"]
    smallest = seen.image_size * math.sqrt(least)
    if smallest < SMALLEST_CROP:
        enough = min(1, math.ceil(10 * (SMALLEST_CROP / seen.image_size) ** 2) / 10)
        found.append(
            f"the images are tiny: a crop of {least:g} of {seen.image_size} x {seen.image_size} pixels is "
            f"{smallest:.0f} wide: --crop_scale {enough:g} {max(most, enough):g}"
        )
    if flags["mean"] != "auto" and any(
        abs(own - given) > MEAN_TOLERANCE for own, given in zip(seen.mean, flags["mean"], strict=True)
    ):
        own = " ".join(f"{value:.2f}" for value in seen.mean)
        found.append(f"their mean, {own}, is far from --mean: --mean auto --std auto")
    deep = any(mode.startswith(SIXTEEN_BITS) for mode in seen.modes)
    if deep and not flags.get("levels") and seen.max_value < DARK:
        found.append(
            f"the values of 16 bits are below {256 * (seen.max_value + 1):,}, so that only "
            f"{seen.max_value + 1} of 256 levels are used: --levels 0 "
            f"{256 * (seen.max_value + 1) - 1}"
        )
    if seen.pixel_std < FLAT_IMAGES:
        found.append(
            f"the images hardly differ (by {seen.pixel_std:.1f} of 255 levels): look at --show_views"
        )
    return "; ".join(found)


def print_survey(args: Namespace, images: Data) -> None:
    """What a folder's images are, and which flags would suit them, in at most two lines."""
    if args.channels != 3:
        number = "one channel" if args.channels == 1 else f"{args.channels} channels"
        distributed.log(f"{number}: no saturation, hue and grayscale, which need three")
    if args.data_name == "folder" and distributed.rank() == 0:
        seen = survey_images(images, DecodeOptions.from_args(vars(args)))
        for line in (summarize(seen), suggest_flags(seen, vars(args))):
            if line:
                distributed.log(line)
