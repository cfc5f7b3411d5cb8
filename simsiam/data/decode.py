"""Image files: open, decode, convert to the wanted channels, resize and crop."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from simsiam.data import arrays
from simsiam.data.arrays import MultibandImage
from simsiam.runtime.config import Choice, Config, ConfigError, Flag, Number, Several, Text, option

IMAGE_EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".gif", *arrays.NUMPY_EXTENSIONS)
# Pillow reads AVIF from 11.3 on. Asking Pillow itself would load all of its decoders.
IMAGE_EXTENSIONS += (".avif",) if importlib.util.find_spec("PIL._avif") else ()
SKIP_HINT = ", or skip unreadable files: --bad_images skip"
# Data sets that read the user's own files; the first two read folders.
FOLDER_DATA, USER_DATA = ("folder", "imagenet"), ("folder", "imagenet", "webdataset")


class UnreadableImageError(Exception):
    """A file cannot be decoded in the middle of a run; the message names it and the remedy."""


class StoredFile(Protocol):
    """An image file inside another file or in memory; `str()` gives its name."""

    def open(self) -> io.BytesIO:
        """Return the content of the file."""


ImageFile = str | Path | StoredFile


# ---- options ------------------------------------------------------------------------------------

BACKGROUNDS = ("white", "black", "none")
NAMES = Several(Text("NAME"))
LEVELS = Several(Number(float, -1e9, 1e9), 2, metavar=("LOW", "HIGH"))


@dataclasses.dataclass(unsafe_hash=True)
class DecodeOptions(Config):
    """How image files are read. Raises ConfigError naming the flag for an invalid value.

    `background` "none" keeps the colours stored behind transparent pixels. `exclude`: shell
    patterns of files and folders. `channels`: 3 gives RGB and 1 gray from any image; for other
    numbers a file must have as many channels. `levels` None: see `arrays.to_uint8`.
    """

    exif: bool = option(Flag(), True, "turn images as EXIF says")
    background: str = option(Choice(BACKGROUNDS), "white", "colour behind transparent pixels")
    exclude: tuple | None = option(NAMES, None, "names or paths in --data_root to leave out (*, ?)")
    channels: int = option(
        Number(int, 1, arrays.MAX_CHANNELS), 3, "of an image; not 1 or 3: TIFF, .npy"
    )
    levels: tuple | None = option(LEVELS, None, "values in files that become 0 and 255")

    def validate(self) -> None:
        super().validate()
        is_empty = self.levels is not None and self.levels[0] >= self.levels[1]
        self.refuse("levels", is_empty, "the first must be below the second")


DEFAULT_DECODE = DecodeOptions()


def check_decode_options(flags: Mapping, data_name: str) -> None:
    """Raise ConfigError for flags of `DecodeOptions` that the data set `data_name` does not use."""
    for flag, names in (("exclude", FOLDER_DATA), ("levels", USER_DATA)):
        if flags[flag] and data_name not in names:
            raise ConfigError(f"--{flag}: needs --data_name {' or '.join(names)}")


# ---- files --------------------------------------------------------------------------------------


def ignore_pil_warnings() -> None:
    """Add warning filters for the whole process: large images and damaged EXIF data.

    `open_image` refuses images so large that PIL warns, so the warning says nothing new.
    """
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)


@contextlib.contextmanager
def file_errors(path: ImageFile) -> Iterator[None]:
    """Turn any exception into a ValueError that names the file and the reason."""
    try:
        yield
    except Exception as error:  # a decoder may raise anything on a damaged file
        tiff = str(path).lower().endswith(arrays.TIFF_EXTENSIONS)
        what = {
            FileNotFoundError: "it does not exist",
            PermissionError: "no permission",
            Image.DecompressionBombError: f"too large: {error}",
            UnidentifiedImageError: "not an image" + ", or not one of 1 or 3 --channels" * tiff,
        }.get(type(error), str(error) or type(error).__name__)
        raise ValueError(f"{path}: cannot be read ({what}); repair or remove it") from error


def file_source(path: ImageFile) -> str | Path | io.BytesIO:
    """Return what PIL and NumPy open: a path or a stream. Raises ValueError for a special file."""
    if not isinstance(path, str | Path):
        return path.open()
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for its writer
        raise ValueError("not a regular file")
    return path


def open_image(source: str | Path | io.BytesIO) -> Image.Image:
    """Open an image without decoding it.

    Raises ValueError for EPS, and DecompressionBombError for an image so large that PIL warns.
    """
    image = Image.open(source)
    if image.format == "EPS":  # PIL would run Ghostscript
        raise ValueError("EPS is a program, not an image")
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    return image


def read_header(
    path: ImageFile, options: DecodeOptions = DEFAULT_DECODE
) -> tuple[tuple[int, int], str]:
    """Read a file's width and height, and its PIL mode or, for an array, such as "uint16 x 5".

    Raises ValueError naming the file.
    """
    with file_errors(path):
        source = file_source(path)
        values = arrays.read_array(source, options.channels, header_only=True)
        if values is not None:
            height, width, channels = values.shape
            return (width, height), f"{values.dtype} x {channels}"
        with open_image(source) as image:
            return image.size, image.mode


def read_image(
    path: ImageFile, options: DecodeOptions = DEFAULT_DECODE
) -> Image.Image | MultibandImage:
    """Decode a file: RGB if `channels` is 3, else `MultibandImage`. Raises ValueError naming it."""
    with file_errors(path):
        source = file_source(path)
        values = arrays.read_array(source, options.channels)
        if values is not None:
            return arrays.image_from_array(values, options.channels, options.levels)
        return convert_channels(open_image(source), options)


# ---- pixels -------------------------------------------------------------------------------------

METADATA_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}


def load_upright(image: Image.Image, exif: bool) -> Image.Image:
    """Decode an image and, with `exif`, rotate it as its EXIF orientation says."""
    image.load()  # rotates a TIFF, and removes its orientation
    if exif and not METADATA_KEYS.isdisjoint(image.info):  # most have none, which saves time
        with contextlib.suppress(Exception):  # the parser may raise anything on damaged metadata
            return ImageOps.exif_transpose(image)
    return image


def to_rgb(image: Image.Image, options: DecodeOptions = DEFAULT_DECODE) -> Image.Image:
    """Convert an image of any mode to RGB: upright, on the background, with `options.levels`.

    16 bits become the upper 8 of them, where PIL's conversion would clip. Raises ValueError for
    floats of an unknown range.
    """
    image = load_upright(image, options.exif)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode != "F" and options.levels is None:  # PIL stores 16 bits in wider types, too
            values = values.clip(0, 65535).astype(np.uint16)
        image = Image.fromarray(arrays.to_uint8(values, options.levels)).convert("RGB")
    else:
        if options.background != "none" and image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, options.background)
            canvas.alpha_composite(image.convert("RGBA"))
            image = canvas
        image = arrays.apply_levels(image.convert("RGB"), options.levels)
    return image


def convert_channels(
    image: Image.Image, options: DecodeOptions = DEFAULT_DECODE
) -> Image.Image | MultibandImage:
    """Convert an image to `options.channels`: RGB for 3, gray for 1, its own bands otherwise.

    Raises ValueError if the image has another number of bands.
    """
    if options.channels == 3:
        return to_rgb(image, options)
    if options.channels == 1:
        return MultibandImage([to_rgb(image, options).convert("L")])
    image = load_upright(image, options.exif)
    arrays.check_channels(len(image.getbands()), options.channels)
    return MultibandImage(arrays.apply_levels(band, options.levels) for band in image.split())


def resize_size(data_name: str, crop_size: int) -> int:
    """Return the shorter side, in pixels, before the centre crop of the test transform.

    256 for ImageNet's crop of 224, and in proportion; elsewhere the crop has no margin.
    """
    return round(crop_size * 256 / 224) if data_name in ("imagenet", "webdataset") else crop_size


def resize_center_crop(
    image: Image.Image | MultibandImage, crop_size: int, resize_size: int
) -> np.ndarray:
    """Resize the shorter side, then crop the centre: uint8, crop_size x crop_size x C."""
    width, height = image.size
    if min(width, height) != resize_size:
        scale = resize_size / min(width, height)
        width = max(resize_size, round(width * scale))
        height = max(resize_size, round(height * scale))
    left, top = (width - crop_size) // 2, (height - crop_size) // 2
    if width * height > Image.MAX_IMAGE_PIXELS:  # extreme aspect ratio: resize only the centre
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + crop_size) * x, (top + crop_size) * y)
        return np.asarray(image.resize((crop_size, crop_size), Image.Resampling.BILINEAR, box))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + crop_size, top + crop_size)))


def decode_files(
    files: Sequence[ImageFile],
    crop_size: int,
    workers: int = 2,
    bad_images: str = "error",
    resize_size: int | None = None,
    allow_empty: bool = False,
    options: DecodeOptions = DEFAULT_DECODE,
) -> tuple[Tensor, dict[int, str]]:
    """Decode files with `resize_center_crop`: uint8, N x C x crop_size x crop_size.

    `workers`: threads. `resize_size` defaults to `crop_size`. With `bad_images` "skip", unreadable
    files are left out and the second result maps their indices to the reasons; otherwise the first
    one raises ValueError naming it. Raises ValueError if no file is readable, unless `allow_empty`.
    """
    images = np.empty((len(files), crop_size, crop_size, options.channels), np.uint8)

    def decode_one(i: int) -> str | None:
        try:
            image = read_image(files[i], options)
            images[i] = resize_center_crop(image, crop_size, resize_size or crop_size)
        except ValueError as error:
            if bad_images == "error":
                raise ValueError(f"{error}{SKIP_HINT}") from error
            return str(error)
        return None

    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = pool.map(decode_one, range(len(files)))  # disable=None: a bar on terminals only
        bar = tqdm(results, "decoding", len(files), leave=False, disable=None, unit="image")
        try:
            reasons = {i: reason for i, reason in enumerate(bar) if reason}
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise
    if files and len(reasons) == len(files) and not allow_empty:
        raise ValueError(next(iter(reasons.values())))
    if reasons:
        images = np.delete(images, list(reasons), axis=0)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), reasons


# ---- images in memory ---------------------------------------------------------------------------


def as_list(images: object) -> Sequence:
    """Return a sequence of images, given one image or several (`to_pil` lists the types)."""
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        return images
    return images if isinstance(images, list | tuple) else [images]


def preprocess(images: object, options: DecodeOptions, crop_size: int, resize_size: int) -> Tensor:
    """Apply `to_pil` and `resize_center_crop`: uint8, N x C x crop_size x crop_size.

    Raises ValueError for what is not an image, naming a file.
    """
    images = as_list(images)
    pixels = np.empty((len(images), crop_size, crop_size, options.channels), np.uint8)
    for i, image in enumerate(images):
        pixels[i] = resize_center_crop(to_pil(image, options), crop_size, resize_size)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def to_pil(image: object, options: DecodeOptions) -> Image.Image | MultibandImage:
    """Convert a PIL image, a path, an array H x W x C or a tensor C x H x W.

    Arrays and tensors are uint8, or floats from 0 to 1. Raises ValueError for anything else.
    """
    if isinstance(image, Image.Image):
        return convert_channels(image, options)
    if isinstance(image, str | Path):
        return read_image(image, options)
    pixels = image
    if isinstance(image, Tensor) and image.ndim == 3:
        pixels = image.detach().cpu().permute(1, 2, 0).numpy()
    channels = options.channels
    valid = isinstance(pixels, np.ndarray) and pixels.ndim == 3 and pixels.shape[2] == channels
    if valid and pixels.dtype.kind == "f" and pixels.size:
        valid = pixels.min() >= 0 and pixels.max() <= 1
        pixels = (255 * pixels).round().astype(np.uint8) if valid else pixels
    if not valid or pixels.dtype != np.uint8 or not pixels.size:
        what = type(image).__name__
        if isinstance(image, Tensor | np.ndarray):
            what = f"{image.dtype} of shape {tuple(image.shape)}"
        raise ValueError(
            f"{what} is not an image: expected a PIL image, a path, an array H x W x {channels} or "
            f"a tensor {channels} x H x W, uint8 or float from 0 to 1"
        )
    return arrays.image_from_array(pixels, channels, None)
