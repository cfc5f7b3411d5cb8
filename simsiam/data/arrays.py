"""Images of any number of channels and any depth: arrays of NumPy, TIFF, and what becomes bytes."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

NUMPY_EXTENSIONS = (".npy",)
TIFF_EXTENSIONS = (".tif", ".tiff")
NUMPY_MAGIC = b"\x93NUMPY"  # how an array begins, where its file has no name
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_CHANNELS = 32
PIL_CHANNELS = (1, 3)  # numbers of channels of which one is made of the other, as PIL does


class MultibandImage:
    """An image of any number of channels: PIL's images of bytes, cut and resized alike.

    It has those methods of PIL's images that are used here; as an array it is H x W x channels.
    """

    def __init__(self, planes: Iterable[Image.Image]):
        self.planes = list(planes)
        self.size = self.width, self.height = self.planes[0].size

    def crop(self, box: tuple) -> "MultibandImage":
        """The part of the image within left, top, right, bottom."""
        return MultibandImage(plane.crop(box) for plane in self.planes)

    def resize(self, size: tuple[int, int], resample: int, box: tuple | None = None) -> "MultibandImage":
        """The image, or a part of it, in another width and height."""
        return MultibandImage(plane.resize(size, resample, box) for plane in self.planes)

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return np.stack([np.asarray(plane) for plane in self.planes], axis=-1)


def to_uint8(values: np.ndarray, levels: tuple[float, float] | None = None) -> np.ndarray:
    """Pixels of any type as uint8: of `levels` the first becomes 0, the second 255.

    Without `levels` bytes stay as they are, 16 bits lose the lower 8, and floats are taken for 0 to
    1 or, where some are above 1, for 0 to 255. Raises ValueError for what is not known.
    """
    if values.dtype.kind not in "buif" or not values.size:
        raise ValueError(f"its values are {values.dtype} of shape {values.shape}")
    if levels is not None:
        low, high = levels
        values = (values.astype(np.float64) - low) / (high - low) * 255
        if not np.isfinite(values).all():
            raise ValueError("it has values that are not finite")
        return values.clip(0, 255).round().astype(np.uint8)
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # in any order of the two bytes
        return (values // 256).astype(np.uint8)
    low, high = values.min(), values.max()
    if values.dtype.kind != "f":
        raise ValueError(
            f"its values are {values.dtype}, from {low} to {high}: say which become black and "
            f"white: --levels {low} {high}"
        )
    if not (low >= 0 and high <= 255):  # nor NaN
        raise ValueError(
            f"its floats are from {low:g} to {high:g}: make them 0 to 1, or 0 to 255, or say which "
            "become black and white: --levels LOW HIGH"
        )
    return (values * 255).round().astype(np.uint8) if high <= 1 else values.astype(np.uint8)


def rgb_channels(channels: int) -> list[int]:
    """Which of an image's channels are red, green and blue in pictures: the first three."""
    return [min(i, channels - 1) for i in range(3)]


# ---- files of arrays ----------------------------------------------------------------------------


class ImageHeader(NamedTuple):
    """What a file says of its image before it is decoded: width and height, and its kind."""

    size: tuple[int, int]
    mode: str


def array_format(name: str, content: io.BytesIO | None) -> str:
    """`npy` or `tiff`, by a file's name or, where it lies in memory, its first bytes; else ""."""
    if content is None:
        end = Path(name).suffix.lower()
        return "npy" if end in NUMPY_EXTENSIONS else "tiff" if end in TIFF_EXTENSIONS else ""
    first = bytes(content.getbuffer()[:6])
    return "npy" if first == NUMPY_MAGIC else "tiff" if first[:4] in TIFF_MAGIC else ""


def read_array(
    path: str | Path, content: io.BytesIO | None, channels: int, head: bool = False
) -> np.ndarray | None:
    """The values of an array's file, or of a TIFF that PIL cannot take: H x W x its channels.

    None for a file that PIL opens. `content`: of a file that lies in memory. With `head` the values
    need not be those of the file. Raises ValueError where they are no image of `channels`.
    """
    kind = array_format(str(path), content)
    if not kind or (kind == "tiff" and channels in PIL_CHANNELS):
        return None
    if kind == "tiff":
        values = read_tiff(path if content is None else content, head)
    else:
        values = np.load(content or path, mmap_mode=None if content else "r", allow_pickle=False)
        wanted = PIL_CHANNELS if channels in PIL_CHANNELS else (channels,)
        if not isinstance(values, np.ndarray) or values.ndim not in (2, 3):
            found = f"shape {values.shape}" if isinstance(values, np.ndarray) else "several arrays"
            raise ValueError(f"{found} is no image; to leave such files out: --exclude '*.npy'")
        if values.ndim == 2:
            values = values[..., None]
        elif values.shape[2] not in wanted and values.shape[0] in wanted:
            values = np.moveaxis(values, 0, 2)
        elif values.shape[2] not in wanted:
            raise ValueError(f"it has shape {values.shape}, and --channels is {channels}")
    if values.shape[0] * values.shape[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"too large: {values.shape[1]} x {values.shape[0]} pixels")
    check_channels(values.shape[2], channels)
    return values


def check_channels(found: int, channels: int) -> None:
    """Raises ValueError where an image of `channels` cannot be made of one of `found`."""
    if found != channels and not (found in PIL_CHANNELS and channels in PIL_CHANNELS):
        number = "one channel" if found == 1 else f"{found} channels"
        raise ValueError(f"it has {number}, and --channels is {channels}")


def read_tiff(file: str | Path | io.BytesIO, head: bool) -> np.ndarray:
    """The first series of a TIFF: H x W x channels, whether these are samples or pages."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("TIFF of so many channels: pip install tifffile") from error
    with tifffile.TiffFile(file) as tiff:
        series = tiff.series[0]
        axes, shape = series.axes, series.shape
        if "Y" not in axes or "X" not in axes or len(set(axes)) < len(axes):
            raise ValueError(f"its axes are {axes}")
        # A head's values cost no memory.
        values = np.broadcast_to(np.zeros((), series.dtype), shape) if head else series.asarray()
    y, x = axes.index("Y"), axes.index("X")
    values = np.moveaxis(values, (y, x), (0, 1))
    return values.reshape(*values.shape[:2], -1)


def array_header(values: np.ndarray) -> ImageHeader:
    """Of an array H x W x channels; its kind as "uint16 x 5"."""
    return ImageHeader((values.shape[1], values.shape[0]), f"{values.dtype} x {values.shape[2]}")


def image_from_array(
    values: np.ndarray, channels: int, levels: tuple[float, float] | None
) -> Image.Image | MultibandImage:
    """The image of an array H x W x channels: RGB of three, else `MultibandImage`."""
    pixels = to_uint8(values, levels)
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(pixels, 2, 0)]
    if channels == 3:
        return Image.merge("RGB", planes if len(planes) == 3 else planes * 3)
    if channels == 1 and len(planes) == 3:
        return MultibandImage([Image.merge("RGB", planes).convert("L")])
    return MultibandImage(planes)


def image_from_bands(image: Image.Image, channels: int, levels: tuple[float, float] | None) -> MultibandImage:
    """The bands of PIL's image as they are. Raises ValueError where they are not so many."""
    check_channels(len(image.getbands()), channels)
    return MultibandImage(apply_levels(band, levels) for band in image.split())


def apply_levels(image: Image.Image, levels: tuple[float, float] | None) -> Image.Image:
    """An image of bytes, of which `levels` become 0 and 255."""
    if levels is None:
        return image
    table = to_uint8(np.arange(256, dtype=np.uint8), levels).tolist()
    return image.point(table * len(image.getbands()))
