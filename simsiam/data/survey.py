"""A survey of the training images before a run: channel statistics, a summary, suggested flags."""

import contextlib
import math
from argparse import Namespace
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from simsiam.data.decode import DEFAULT_DECODE, DecodeOptions, read_header
from simsiam.data.loader import Data, ImageFiles, evenly_spaced
from simsiam.runtime import distributed
from simsiam.views.augment import MIN_STD

SURVEY_SIZE = 1000  # images per survey, evenly spaced
STATS_SIZE = 10000  # images in files that --mean auto decodes: all of ImageNet would take an hour
FLAT_IMAGES = 8  # mean std of a pixel over the images, of 255, below which they hardly differ
GRAY_TOLERANCE = 8  # levels of 255 by which JPEG makes the channels of a gray image differ
SMALLEST_CROP = 8  # pixels; a smaller crop shows little
MEAN_TOLERANCE = 0.15  # distance of a channel's mean from --mean, of the range from 0 to 1


# ---- mean and std of the channels ---------------------------------------------------------------


def measure_channels(images: Tensor | ImageFiles) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of each channel over all pixels, from 0 to 1.

    Measures at most STATS_SIZE images in files. Sums integers, so that every machine gets the same
    bits.
    """
    if isinstance(images, ImageFiles):
        images = images[evenly_spaced(len(images), STATS_SIZE)]
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for part in images.split(512):
        for channel, count in zip(part.unbind(1), counts, strict=True):
            count += torch.bincount(channel.flatten().cpu(), minlength=256)
    frequencies = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = frequencies @ levels
    variance = (frequencies * (levels - mean[:, None]) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


def channel_stats(args: Namespace, images: Tensor | ImageFiles) -> dict:
    """Return `mean` and `std` of the flags, measured on the training images where they are "auto".

    Raises ValueError if the std of a channel is 0.
    """
    stats = {"mean": args.mean, "std": args.std}
    measured = [name for name, value in stats.items() if value == "auto"]
    if measured:
        mean, std = distributed.broadcast_from_rank0(lambda: measure_channels(images))
        if "std" in measured and min(std) < MIN_STD:
            raise ValueError("--std auto: a channel is constant in all training images: give --std")
        stats |= {name: x for name, x in (("mean", mean), ("std", std)) if name in measured}
        values = (f"{name} {' '.join(f'{x:.4f}' for x in stats[name])}" for name in measured)
        distributed.log(f"measured on the training images: {', '.join(values)}")
    return stats


# ---- the survey ---------------------------------------------------------------------------------


class Survey(NamedTuple):
    """Properties of a sample of the training images."""

    total: int  # training images
    sampled: int
    sizes: list[tuple[int, int]]  # width and height of the readable files
    modes: Counter  # files by PIL's mode, or such as "uint16 x 5"
    image_size: int  # side of the training images, in pixels
    gray_count: int  # sampled images without colour
    duplicates: int  # sampled images that equal an earlier one
    pixel_std: float  # std of a pixel over the images, of 255, averaged over the pixels
    class_sizes: dict[str, int]  # of all training images
    mean: tuple[float, ...]  # of each channel, from 0 to 1
    max_value: int = 255


def survey_images(data: Data, decode: DecodeOptions = DEFAULT_DECODE) -> Survey:
    """Survey the training images in memory and the headers of their files."""
    headers, files = [], data.train_files
    for i in evenly_spaced(len(files), SURVEY_SIZE).tolist() if files else ():
        with contextlib.suppress(ValueError):  # loading the data set has reported it
            headers.append(read_header(files[i], decode))
    images = data.train_images[evenly_spaced(len(data.train_images), SURVEY_SIZE)]
    colour = images.amax(1).short() - images.amin(1)  # N x H x W: spread of the channels
    labels = data.train_labels[data.train_labels >= 0]
    counts = torch.bincount(labels, minlength=len(data.classes)).tolist()
    return Survey(
        total=len(data.train_images),
        sampled=len(images),
        sizes=[size for size, _ in headers],
        modes=Counter(mode for _, mode in headers),
        image_size=images.shape[-1],
        gray_count=int((colour.flatten(1).amax(1) <= GRAY_TOLERANCE).sum()),
        duplicates=len(images) - len(images.flatten(1).unique(dim=0)),
        pixel_std=images.float().std(0).mean().item() if len(images) > 1 else math.inf,
        class_sizes=dict(zip(data.classes, counts, strict=True)),
        mean=measure_channels(images)[0],
        max_value=int(images.max()),
    )


def summarize(survey: Survey) -> str:
    """Summarize a survey in a line: sizes, modes, gray images, duplicates, class sizes."""
    parts = []
    if survey.sizes:
        smallest, largest = (end(survey.sizes, key=math.prod) for end in (min, max))
        sizes = dict.fromkeys(f"{width} x {height}" for width, height in (smallest, largest))
        shorter = sorted(map(min, survey.sizes))[len(survey.sizes) // 2]
        parts.append(f"{' to '.join(sizes)} pixels (median shorter side {shorter})")
        parts.append(
            ", ".join(f"{number:,} {mode}" for mode, number in survey.modes.most_common(4))
        )
    if len(survey.mean) == 3:
        number = f"{survey.gray_count:,}"
        gray = {0: "none", survey.sampled: "all"}.get(survey.gray_count, number)
        parts.append(f"{gray} grayscale")
    if survey.duplicates:
        parts.append(f"{survey.duplicates:,} exact duplicates")
    sizes = survey.class_sizes
    if sum(sizes.values()):
        small, large = (end(sizes, key=sizes.get) for end in (min, max))
        ends = f"{sizes[small]:,} ({small}) to {sizes[large]:,} ({large})"
        parts.append(f"{ends if sizes[small] < sizes[large] else f'{sizes[large]:,}'} per class")
    of_total = f" of {survey.total:,}" * (survey.sampled < survey.total)
    return f"sample of {survey.sampled:,}{of_total} training images: {'; '.join(parts)}"


def suggest_flags(survey: Survey, flags: dict) -> str:
    """Suggest other flags of main.py, each with the reason, in a line; "" if there is none."""
    suggestions = []
    brightness, contrast, *colour = flags["jitter"]
    is_gray = len(survey.mean) == 3 and survey.gray_count == survey.sampled
    if is_gray and (any(colour) or flags["gray_p"]):
        suggestions.append(
            f"--jitter {brightness:g} {contrast:g} 0 0 --gray_p 0, or --channels 1 (all images are "
            "grayscale, which saturation and hue do not change)"
        )
    size, (low, high) = survey.image_size, flags["crop_scale"]
    crop = size * math.sqrt(low)
    if crop < SMALLEST_CROP:
        enough = min(1, math.ceil(10 * (SMALLEST_CROP / size) ** 2) / 10)
        suggestions.append(
            f"--crop_scale {enough:g} {max(high, enough):g} (a crop of {low:g} of {size} x {size} "
            f"pixels is only {crop:.0f} pixels wide)"
        )
    if flags["mean"] != "auto":
        distances = (abs(a - b) for a, b in zip(survey.mean, flags["mean"], strict=True))
        if max(distances) > MEAN_TOLERANCE:
            mean = " ".join(f"{value:.2f}" for value in survey.mean)
            suggestions.append(f"--mean auto --std auto (the images' mean is {mean})")
    has_16_bits = any(mode.startswith(("I;16", "uint16")) for mode in survey.modes)
    if has_16_bits and not flags.get("levels") and survey.max_value < 128:
        used = survey.max_value + 1
        suggestions.append(
            f"--levels 0 {256 * used - 1} (all 16-bit values are below {256 * used:,}: only {used} "
            "of 256 levels are used)"
        )
    if survey.pixel_std < FLAT_IMAGES:
        suggestions.append(
            f"--show_views (the images differ by only {survey.pixel_std:.1f} of 255 levels)"
        )
    return f"suggested flags: {'; '.join(suggestions)}" if suggestions else ""


def print_survey(args: Namespace, data: Data) -> None:
    """Print the survey of a folder's images and the suggested flags."""
    if args.channels != 3:
        distributed.log(
            f"--channels {args.channels}: no saturation, hue and grayscale, which need 3"
        )
    if args.data_name == "folder" and distributed.rank() == 0:
        survey = survey_images(data, DecodeOptions.from_args(vars(args)))
        for line in (summarize(survey), suggest_flags(survey, vars(args))):
            if line:
                distributed.log(line)
