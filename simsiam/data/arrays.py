"""Images with any number of channels and any bit depth: NumPy files, TIFF, conversion to uint8."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

NUMPY_EXTENSIONS = (".npy",)
TIFF_EXTENSIONS = (".tif", ".tiff")
NUMPY_MAGIC = b"\x93NUMPY"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_CHANNELS = 32
PIL_CHANNELS = (1, 3)  # gray and RGB, which PIL converts into each other


class MultibandImage:
    """C uint8 bands, each a PIL image in mode L, with the methods `crop` and `resize` of PIL.

    np.asarray gives H x W x C.
    """

    def __init__(self, bands: Iterable[Image.Image]):
        self.bands = list(bands)
        self.size = self.width, self.height = self.bands[0].size

    def crop(self, box: tuple) -> "MultibandImage":
        """Crop every band to (left, top, right, bottom)."""
        return MultibandImage(band.crop(box) for band in self.bands)

    def resize(
        self, size: tuple[int, int], resample: int, box: tuple | None = None
    ) -> "MultibandImage":
        """Resize every band, or its part `box`, to (width, height)."""
        return MultibandImage(band.resize(size, resample, box) for band in self.bands)

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return np.stack([np.asarray(band) for band in self.bands], axis=-1)


def to_uint8(values: np.ndarray, levels: tuple[float, float] | None = None) -> np.ndarray:
    """Convert pixels of any type to uint8, mapping `levels` to 0 and 255.

    Without `levels`, uint8 stays as it is, uint16 loses its lower 8 bits, and floats are read as
    0 to 1 or, if any is above 1, as 0 to 255. Raises ValueError for any other type or range.
    """
    if values.dtype.kind not in "buif" or not values.size:
        raise ValueError(f"values of type {values.dtype} and shape {values.shape} are no image")
    if levels is not None:
        low, high = levels
        values = (values.astype(np.float64) - low) / (high - low) * 255
        if not np.isfinite(values).all():
            raise ValueError("some values are not finite")
        return values.clip(0, 255).round().astype(np.uint8)
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        return (values // 256).astype(np.uint8)
    low, high = values.min(), values.max()
    if values.dtype.kind != "f":
        raise ValueError(
            f"{values.dtype} values from {low} to {high}: give the values that become black and "
            f"white, such as --levels {low} {high}"
        )
    if not (low >= 0 and high <= 255):  # also true for NaN
        raise ValueError(
            f"float values from {low:g} to {high:g}: scale them to 0 to 1 or 0 to 255, or give the "
            "values that become black and white: --levels LOW HIGH"
        )
    return (values * 255).round().astype(np.uint8) if high <= 1 else values.astype(np.uint8)


def apply_levels(image: Image.Image, levels: tuple[float, float] | None) -> Image.Image:
    """Map `levels` of an 8-bit image to 0 and 255."""
    if levels is None:
        return image
    table = to_uint8(np.arange(256, dtype=np.uint8), levels).tolist()
    return image.point(table * len(image.getbands()))


def rgb_channels(channels: int) -> list[int]:
    """Return the indices of the channels drawn as red, green and blue: the first three."""
    return [min(i, channels - 1) for i in range(3)]


# ---- files --------------------------------------------------------------------------------------


def read_array(
    file: str | Path | io.BytesIO, channels: int, header_only: bool = False
) -> np.ndarray | None:
    """Read a NumPy file, or a TIFF with channels PIL cannot read: H x W x C; None for other files.

    A NumPy file may be H x W, H x W x C or C x H x W. With `header_only` only shape and type of
    the result are meaningful. Raises ValueError if the file is no image with `channels` channels.
    """
    in_memory = isinstance(file, io.BytesIO)
    start = bytes(file.getbuffer()[:6]) if in_memory else b""
    extension = "" if in_memory else Path(file).suffix.lower()
    if start[:4] in TIFF_MAGIC or extension in TIFF_EXTENSIONS:
        if channels in PIL_CHANNELS:
            return None
        values = read_tiff(file, header_only)
    elif start != NUMPY_MAGIC and extension not in NUMPY_EXTENSIONS:
        return None
    else:
        mode = None if in_memory else "r"
        values = np.load(file, mmap_mode=mode, allow_pickle=False)
        if not isinstance(values, np.ndarray) or values.ndim not in (2, 3):
            what = f"shape {values.shape}" if isinstance(values, np.ndarray) else "several arrays"
            raise ValueError(f"{what}: not an image; skip such files with --exclude '*.npy'")
        accepted = PIL_CHANNELS if channels in PIL_CHANNELS else (channels,)
        if values.ndim == 2:
            values = values[..., None]
        elif values.shape[2] not in accepted and values.shape[0] in accepted:
            values = np.moveaxis(values, 0, 2)
        elif values.shape[2] not in accepted:
            raise ValueError(f"shape {values.shape}, but --channels is {channels}")
    height, width, bands = values.shape
    if height * width > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"too large: {width} x {height} pixels")
    check_channels(bands, channels)
    return values


def read_tiff(file: str | Path | io.BytesIO, header_only: bool) -> np.ndarray:
    """Read the first series of a TIFF as H x W x C; its channels may be samples or pages."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("a multi-channel TIFF needs tifffile: pip install tifffile") from error
    with tifffile.TiffFile(file) as tiff:
        series = tiff.series[0]
        axes, shape = series.axes, series.shape
        if "Y" not in axes or "X" not in axes or len(set(axes)) < len(axes):
            raise ValueError(f"unsupported TIFF axes {axes}")
        # A broadcast zero has the shape and takes no memory.
        empty = np.broadcast_to(np.zeros((), series.dtype), shape)
        values = empty if header_only else series.asarray()
    values = np.moveaxis(values, (axes.index("Y"), axes.index("X")), (0, 1))
    return values.reshape(*values.shape[:2], -1)


def check_channels(bands: int, channels: int) -> None:
    """Raise ValueError if a file of `bands` channels cannot give an image of `channels`."""
    if bands != channels and not (bands in PIL_CHANNELS and channels in PIL_CHANNELS):
        number = "one channel" if bands == 1 else f"{bands} channels"
        raise ValueError(f"{number}, but --channels is {channels}")


def image_from_array(
    values: np.ndarray, channels: int, levels: tuple[float, float] | None
) -> Image.Image | MultibandImage:
    """Convert an array H x W x C to an RGB image (`channels` = 3) or a `MultibandImage`."""
    pixels = to_uint8(values, levels)
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(pixels, 2, 0)]
    if channels == 3:
        return Image.merge("RGB", bands if len(bands) == 3 else bands * 3)
    if channels == 1 and len(bands) == 3:
        return MultibandImage([Image.merge("RGB", bands).convert("L")])
    return MultibandImage(bands)
