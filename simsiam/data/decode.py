"""Image files: open, decode, bring to RGB or to other channels, cut the centre."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from simsiam.data import arrays
from simsiam.data.arrays import ImageHeader, MultibandImage

IMAGE_EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".gif", *arrays.NUMPY_EXTENSIONS)
# Pillow 11.3 has it. (To ask it would load all its decoders, and try them before JPEG's.)
IMAGE_EXTENSIONS += (".avif",) if importlib.util.find_spec("PIL._avif") else ()
BACKGROUNDS = ("white", "black", "none")
SKIP_HINT = ", or leave out what cannot be read: --bad_images skip"


class UnreadableImageError(Exception):
    """A file that could not be decoded in the middle of a run; says which, and what to do."""


@runtime_checkable
class StoredFile(Protocol):
    """An image file that lies in another file, or in memory. `str()` of it is its name."""

    def open(self) -> io.BytesIO:
        """The file's bytes."""


ImageFile = str | Path | StoredFile


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """Which files are read, and what is made of a file's pixels.

    `exif`: an image is turned as its EXIF orientation says. `background`, one of BACKGROUNDS, is
    what transparent pixels show; "none": the colours that the file has there, though nobody sees
    them. `exclude`: patterns of files and folders to leave out, as of `folders.excluded`.
    `channels`: of 3 RGB is made, of 1 gray; of others a file must have so many. `levels`: the
    values in a file that become 0 and 255; None: as `planes.as_bytes` takes them.
    """

    exif: bool = True
    background: str = "white"
    exclude: tuple[str, ...] = ()
    channels: int = 3
    levels: tuple[float, float] | None = None

    @classmethod
    def from_args(cls, args: Mapping) -> "DecodeOptions":
        """That of the flags of main.py. Raises ValueError for what cannot be such."""
        exif, background = args.get("exif"), args.get("background")
        exclude = args.get("exclude") or ()
        if not isinstance(exif, bool) or background not in BACKGROUNDS:
            raise ValueError("its --exif or --background is none of ours")
        if not isinstance(exclude, list | tuple) or not all(type(x) is str for x in exclude):
            raise ValueError("its --exclude is none of ours")
        channels, levels = args.get("channels", 3), args.get("levels")
        if type(channels) is not int or not 1 <= channels <= arrays.MAX_CHANNELS:
            raise ValueError(f"--channels: must be from 1 to {arrays.MAX_CHANNELS}")
        if levels is not None:
            numbers = isinstance(levels, list | tuple) and len(levels) == 2
            if not numbers or not all(type(x) in (int, float) and abs(x) < 1e9 for x in levels):
                raise ValueError("--levels: must be two numbers")
            if not levels[0] < levels[1]:
                raise ValueError("--levels: must rise: first what becomes black, then white")
        return cls(exif, background, tuple(exclude), channels, levels and tuple(levels))


DEFAULT_DECODE = DecodeOptions()  # as a viewer shows an image
# Data sets that are files of the user's own.
FOLDER_DATA, USER_DATA = ("folder", "imagenet"), ("folder", "imagenet", "webdataset")
EXCLUDE_HELP = "names or paths, with * and ?, of files and folders in --data_root to leave out"


def add_decode_options(add: Callable[..., None], pre_trained: bool) -> None:
    """The flags of a `DecodeOptions`; `add`: of utils.Flags.group. `pre_trained`: there was one before,
    which says how many channels there are, and the other flags where they are silent.
    """
    usual, end = (None, " (as in pre-training)") if pre_trained else (DEFAULT_DECODE, "")
    add("exif", "two", f"turn images as EXIF says{end}", usual and usual.exif)
    background = f"what transparent pixels show{end}; none: the colours below"
    add("background", BACKGROUNDS, background, usual and usual.background)
    add("exclude", str, EXCLUDE_HELP + end, nargs="+", metavar="PATTERN")
    if not pre_trained:
        add("channels", int, "of the images; others than 1 and 3: as in TIFF or .npy", 3)
    levels = f"values in files that become 0 and 255; None: the whole range of their type{end}"
    add("levels", float, levels, nargs=2, metavar=("LOW", "HIGH"))


def check_decode_options(flags: Mapping, name: str) -> None:
    """Raises ValueError for flags of a `DecodeOptions` that cannot be, or not with --data_name `name`."""
    for flag, names in (("exclude", FOLDER_DATA), ("levels", USER_DATA)):
        if flags[flag] and name not in names:
            last = f"{', '.join(names[:-1])} or {names[-1]}"
            raise ValueError(f"--{flag}: goes with --data_name {last}")
    told = {flag: flags[flag] for flag in ("channels", "levels") if flag in flags}
    DecodeOptions.from_args(vars(DEFAULT_DECODE) | told)


# Where PIL keeps what may tell an orientation; and what makes such an image upright.
METADATA_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
ORIENTATION_TRANSPOSE = {
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


def check_regular(path: str | Path) -> None:
    """Raises ValueError for a FIFO, since to open it would be to wait for its writer; OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a file")


@contextlib.contextmanager
def file_errors(path: ImageFile, otherwise: str | None = None) -> Iterator[None]:
    """Whatever goes wrong becomes a ValueError that names the file, and why, or `otherwise`."""
    try:
        yield
    except Exception as error:  # a decoder fed with junk may raise anything
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        reason = {
            FileNotFoundError: "it does not exist",
            PermissionError: "no permission",
            Image.DecompressionBombError: f"too large: {error}",
            ValueError: str(error),
        }.get(type(error), otherwise or str(error))
        raise ValueError(f"{path}: cannot be read ({reason}); mend or remove it") from error


def open_image(path: ImageFile) -> Image.Image:
    """PIL's image, not decoded yet.

    Raises ValueError naming the file; also for one of so many pixels that PIL warns of a bomb.
    """
    tiff = str(path).lower().endswith(arrays.TIFF_EXTENSIONS)
    with file_errors(path, "not an image" + ", or of other --channels than 1 and 3" * tiff):
        in_file = isinstance(path, str | Path)
        if in_file:
            check_regular(path)
        image = Image.open(path if in_file else path.open())
        if image.format == "EPS":  # PIL would run Ghostscript on it
            raise ValueError("EPS is a program, not pixels")
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        return image


def to_rgb(image: Image.Image, options: DecodeOptions = DEFAULT_DECODE) -> Image.Image:
    """Any mode to RGB, upright, on a background, with the levels that `options` says.

    16 bits a pixel become 8, where PIL's own conversion would clip. Raises ValueError for floats of
    a range that is not known.
    """
    image.load()  # PIL itself turns a TIFF, and then takes its orientation away
    turn = exif_transpose(image) if options.exif else None
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode != "F" and options.levels is None:  # PIL has 16 bits in more, too
            values = values.clip(0, 65535).astype(np.uint16)
        image = Image.fromarray(arrays.to_uint8(values, options.levels)).convert("RGB")
    else:
        if options.background != "none" and image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, options.background)
            canvas.alpha_composite(image.convert("RGBA"))
            image = canvas
        image = arrays.apply_levels(image.convert("RGB"), options.levels)
    return transpose_image(image, turn)


def transpose_image(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """An image as `exif_transpose` says; then it is upright, and does not say otherwise."""
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}
    return image


def convert_channels(image: Image.Image, options: DecodeOptions = DEFAULT_DECODE) -> Image.Image | MultibandImage:
    """An image of the channels of `options`: RGB of three, else `MultibandImage`.

    Of one it is the gray that PIL makes of RGB. Raises ValueError where an image has others.
    """
    if options.channels == 3:
        return to_rgb(image, options)
    if options.channels == 1:
        return MultibandImage([to_rgb(image, options).convert("L")])
    image.load()
    image = transpose_image(image, exif_transpose(image) if options.exif else None)
    return arrays.image_from_bands(image, options.channels, options.levels)


def exif_transpose(image: Image.Image) -> Image.Transpose | None:
    """How to turn an image as its EXIF orientation says; None where it has none, or is upright."""
    if METADATA_KEYS.isdisjoint(image.info) and image.format != "TIFF":  # most images: it saves time
        return None
    with contextlib.suppress(Exception):  # a parser fed with junk may raise anything
        return ORIENTATION_TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation))
    return None


def read_array_file(path: ImageFile, options: DecodeOptions, head: bool = False) -> np.ndarray | None:
    """As `planes.read_array`; None for a file that PIL opens."""
    in_file = isinstance(path, str | Path)
    if not in_file:
        return arrays.read_array("", path.open(), options.channels, head)
    if arrays.array_format(str(path), None):
        check_regular(path)
        return arrays.read_array(path, None, options.channels, head)
    return None


def read_header(path: ImageFile, options: DecodeOptions = DEFAULT_DECODE) -> ImageHeader:
    """What a file says of its image, which is not decoded. Raises ValueError naming the file."""
    with file_errors(path):
        values = read_array_file(path, options, head=True)
    if values is not None:
        return arrays.array_header(values)
    with open_image(path) as image:
        return ImageHeader(image.size, image.mode)


def read_image(path: ImageFile, options: DecodeOptions = DEFAULT_DECODE) -> Image.Image | MultibandImage:
    """A file's image, decoded: RGB of three channels. Raises ValueError naming the file."""
    with file_errors(path):
        values = read_array_file(path, options)
        if values is not None:
            return arrays.image_from_array(values, options.channels, options.levels)
        return convert_channels(open_image(path), options)


def resize_center_crop(image: Image.Image | MultibandImage, size: int, shorter: int) -> np.ndarray:
    """Shorter side resized to `shorter`, then the centre cropped: uint8, size x size x channels."""
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


def imagenet_resize_size(size: int) -> int:
    """The shorter side before ImageNet's centre crop of `size`: 256 for 224, in this ratio."""
    return round(size * 256 / 224)


def decode_files(
    files: Sequence[ImageFile],
    size: int,
    workers: int = 2,
    bad_images: str = "error",
    shorter: int | None = None,
    allow_none: bool = False,
    options: DecodeOptions = DEFAULT_DECODE,
) -> tuple[Tensor, dict[int, str]]:
    """Image files -> uint8, N x channels x size x size, cut by `resize_center_crop` (`shorter`: else size).

    If `bad_images` is "skip", a file that cannot be read is left out, and the second result names
    it: its place in `files`, and why. Else it raises ValueError naming it, and so it does where no
    file is left, unless `allow_none`.
    """
    images = np.empty((len(files), size, size, options.channels), np.uint8)

    def one(i: int) -> str | None:
        try:
            images[i] = resize_center_crop(read_image(files[i], options), size, shorter or size)
        except ValueError as error:
            if bad_images == "error":
                raise ValueError(f"{error}{SKIP_HINT}") from error
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


# ---- images of any kind -------------------------------------------------------------------------


def as_list(images: object) -> Sequence:
    """One image, as `to_pil` takes it, or many: those many, which a tensor or array may hold."""
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        return images
    return images if isinstance(images, list | tuple) else [images]


def preprocess(images: object, options: DecodeOptions, size: int, shorter: int) -> Tensor:
    """What `to_pil` takes, or many of them, cut by `resize_center_crop`: uint8, N x channels x size x size.

    Raises ValueError for what is no image, naming a file.
    """
    many = as_list(images)
    pixels = np.empty((len(many), size, size, options.channels), np.uint8)
    for i, image in enumerate(many):
        pixels[i] = resize_center_crop(to_pil(image, options), size, shorter)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def to_pil(image: object, options: DecodeOptions) -> Image.Image | MultibandImage:
    """An image in the channels of `options`, of PIL's, of a file's path, of an array or a tensor.

    Arrays are H x W x channels, tensors channels x H x W, of bytes or of floats from 0 to 1. Raises
    ValueError for all else.
    """
    if isinstance(image, Image.Image):
        return convert_channels(image, options)
    if isinstance(image, str | Path):
        return read_image(image, options)
    pixels = image
    if isinstance(image, Tensor) and image.ndim == 3:
        pixels = image.detach().cpu().permute(1, 2, 0).numpy()
    channels = options.channels
    fits = isinstance(pixels, np.ndarray) and pixels.ndim == 3 and pixels.shape[2] == channels
    if fits and pixels.dtype.kind == "f" and pixels.size:
        fits = pixels.min() >= 0 and pixels.max() <= 1
        pixels = (255 * pixels).round().astype(np.uint8) if fits else pixels
    if not fits or pixels.dtype != np.uint8 or not pixels.size:
        what = type(image).__name__
        if isinstance(image, Tensor | np.ndarray):
            what = f"{image.dtype} of shape {tuple(image.shape)}"
        raise ValueError(
            f"cannot take {what}: give a PIL image, a file's path, an array H x W x {channels} or "
            f"a tensor {channels} x H x W, of bytes or of floats from 0 to 1"
        )
    return arrays.image_from_array(pixels, channels, None)
