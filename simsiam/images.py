"""Image files: open, decode, bring to RGB, cut the centre."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import stat
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".gif")
# Pillow 11.3 has it. (To ask it would load all its decoders, and try them before JPEG's.)
EXTENSIONS += (".avif",) if importlib.util.find_spec("PIL._avif") else ()
BACKGROUNDS = ("white", "black", "none")
OR_SKIP = ", or leave out what cannot be read: --bad_images skip"


class BadImage(Exception):
    """A file that could not be decoded in the middle of a run; says which, and what to do."""


@runtime_checkable
class Stored(Protocol):
    """An image file that lies in another file, or in memory. `str()` of it is its name."""

    def content(self) -> io.BytesIO:
        """The file's bytes."""


ImageFile = str | Path | Stored


@dataclasses.dataclass(frozen=True)
class Reading:
    """Which files are read, and what is made of a file's pixels besides RGB.

    `exif`: an image is turned as its EXIF orientation says. `background`, one of BACKGROUNDS, is
    what transparent pixels show; "none": the colours that the file has there, though nobody sees
    them. `exclude`: patterns of files and folders to leave out, as of `folders.excluded`.
    """

    exif: bool = True
    background: str = "white"
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, args: Mapping) -> "Reading":
        """That of the flags of main.py. Raises ValueError for what cannot be such."""
        exif, background = args.get("exif"), args.get("background")
        exclude = args.get("exclude") or ()
        if not isinstance(exif, bool) or background not in BACKGROUNDS:
            raise ValueError("its --exif or --background is none of ours")
        if not isinstance(exclude, list | tuple) or not all(type(x) is str for x in exclude):
            raise ValueError("its --exclude is none of ours")
        return cls(exif, background, tuple(exclude))


AS_SEEN = Reading()  # as a viewer shows an image

# Where PIL keeps what may tell an orientation; and what makes such an image upright.
NOTES = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def ignore_pil_warnings() -> None:
    """Add filters for two of PIL's warnings; for a process, or a context, that is ours.

    Images of so many pixels that PIL warns are refused here, so PIL need not say it too. Nor need
    it say that the notes beside the pixels (EXIF) are damaged.
    """
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)


def open_image(path: ImageFile) -> Image.Image:
    """PIL's image, not decoded yet.

    Raises ValueError naming the file; also for one of so many pixels that PIL warns of a bomb.
    """
    try:
        in_file = isinstance(path, str | Path)
        if in_file and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a file")  # to open a FIFO would be to wait for its writer
        image = Image.open(path if in_file else path.content())
        if image.format == "EPS":  # PIL would run Ghostscript on it
            raise ValueError("EPS is a program, not pixels")
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        return image
    except Exception as error:  # a decoder fed with junk may raise anything
        reason = {
            FileNotFoundError: "it does not exist",
            PermissionError: "no permission",
            Image.DecompressionBombError: f"too large: {error}",
            ValueError: str(error),
        }.get(type(error), "not an image")
        raise ValueError(f"{path}: cannot be read ({reason}); mend or remove it") from error


def to_rgb(image: Image.Image, reading: Reading = AS_SEEN) -> Image.Image:
    """Any mode to RGB, upright, on a background, as `reading` says.

    16 bits a pixel become 8, where PIL's own conversion would clip. Floats from 0 to 1 become 0 to
    255; those from 0 to 255 are taken as they are. Raises ValueError for other floats.
    """
    image.load()  # PIL itself turns a TIFF, and then takes its orientation away
    turn = upright(image) if reading.exif else None
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        image = Image.fromarray((pixels // 256).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = of_floats(np.asarray(image))
    elif reading.background != "none" and image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, reading.background)
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # it is upright now, and does not say otherwise
    return image


def upright(image: Image.Image) -> Image.Transpose | None:
    """How to turn an image as its EXIF orientation says; None where it has none, or is upright."""
    if NOTES.isdisjoint(image.info) and image.format != "TIFF":  # most images: it saves time
        return None
    with contextlib.suppress(Exception):  # a parser fed with junk may raise anything
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    return None


def of_floats(pixels: np.ndarray) -> Image.Image:
    """The gray image of floats, H x W. Raises ValueError for a range that is not known."""
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 255):  # nor NaN
        raise ValueError(f"its floats are from {low:g} to {high:g}: make them 0 to 1, or 0 to 255")
    return Image.fromarray((pixels * 255).round().astype(np.uint8) if high <= 1 else pixels)


def read_image(path: ImageFile, reading: Reading = AS_SEEN) -> Image.Image:
    """A file's image in RGB, decoded. Raises ValueError naming the file."""
    try:
        return to_rgb(open_image(path), reading)
    except Exception as error:  # a decoder fed with junk may raise anything
        reason = str(error)
        if not reason.startswith(str(path)):
            reason = f"{path}: cannot be read ({reason}); mend or remove it"
        raise ValueError(reason) from error


def centre(image: Image.Image, size: int, shorter: int) -> np.ndarray:
    """Shorter side resized to `shorter`, then the centre cropped: uint8, size x size x 3."""
    width, height = image.size
    if min(width, height) != shorter:
        scale = shorter / min(width, height)
        width, height = max(shorter, round(width * scale)), max(shorter, round(height * scale))
    left, top = (width - size) // 2, (height - size) // 2
    if width * height > Image.MAX_IMAGE_PIXELS:  # a line of pixels: its centre alone is resized
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def imagenet_shorter(size: int) -> int:
    """The shorter side before ImageNet's centre crop of `size`: 256 for 224, in this ratio."""
    return round(size * 256 / 224)


def decode(
    files: Sequence[ImageFile],
    size: int,
    workers: int = 2,
    bad_images: str = "error",
    shorter: int | None = None,
    allow_none: bool = False,
    reading: Reading = AS_SEEN,
) -> tuple[Tensor, dict[int, str]]:
    """Image files -> uint8, N x 3 x size x size, cut by `centre` (`shorter`: by default size).

    If `bad_images` is "skip", a file that cannot be read is left out, and the second result names
    it: its place in `files`, and why. Else it raises ValueError naming it, and so it does where no
    file is left, unless `allow_none`.
    """
    images = np.empty((len(files), size, size, 3), np.uint8)

    def one(i: int) -> str | None:
        try:
            images[i] = centre(read_image(files[i], reading), size, shorter or size)
        except ValueError as error:
            if bad_images == "error":
                raise ValueError(f"{error}{OR_SKIP}") from error
            return str(error)
        return None

    with ThreadPoolExecutor(max(1, workers)) as pool:
        done = pool.map(one, range(len(files)))  # disable=None: a bar on a terminal only
        bar = tqdm(done, "decoding", len(files), leave=False, disable=None, unit="image")
        try:
            bad = {i: reason for i, reason in enumerate(bar) if reason}
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise
    if files and len(bad) == len(files) and not allow_none:
        raise ValueError(next(iter(bad.values())))
    if bad:
        images = np.delete(images, list(bad), axis=0)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), bad
