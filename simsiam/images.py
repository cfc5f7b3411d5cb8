"""Image files: open, decode, bring to RGB, cut the centre."""

import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

EXTENSIONS = tuple(IMG_EXTENSIONS)


class BadImage(Exception):
    """A file that could not be decoded in the middle of a run; says which, and what to do."""


@runtime_checkable
class Stored(Protocol):
    """An image file that lies in another file, or in memory. `str()` of it is its name."""

    def content(self) -> io.BytesIO:
        """The file's bytes."""


ImageFile = str | Path | Stored


def ignore_pil_warnings() -> None:
    """Add filters for two of PIL's warnings; for a process, or a context, that is ours.

    Images of so many pixels that PIL warns are refused here, so PIL need not say it too. Nor need
    it say that the notes beside the pixels (EXIF), which are not read here, are damaged.
    """
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)


def open_image(path: ImageFile) -> Image.Image:
    """PIL's image, not decoded yet.

    Raises ValueError naming the file; also for one of so many pixels that PIL warns of a bomb.
    """
    try:
        image = Image.open(path.content() if isinstance(path, Stored) else path)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        return image
    except Exception as error:  # a decoder fed with junk may raise anything
        reason = {
            FileNotFoundError: "it does not exist",
            PermissionError: "no permission",
            Image.DecompressionBombError: f"too large: {error}",
        }.get(type(error), "not an image")
        raise ValueError(f"{path}: cannot be read ({reason}); mend or remove it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; 16 bits a pixel to 8, where PIL's own conversion would clip."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        image = Image.fromarray((pixels // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def read_image(path: ImageFile) -> Image.Image:
    """A file's image in RGB, decoded. Raises ValueError naming the file."""
    try:
        return to_rgb(open_image(path))
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
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
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
) -> tuple[Tensor, dict[int, str]]:
    """Image files -> uint8, N x 3 x size x size, cut by `centre` (`shorter`: by default size).

    If `bad_images` is "skip", a file that cannot be read is left out, and the second result names
    it: its place in `files`, and why. Else it raises ValueError naming it, and so it does where no
    file is left, unless `allow_none`.
    """
    images = np.empty((len(files), size, size, 3), np.uint8)

    def one(i: int) -> str | None:
        try:
            images[i] = centre(read_image(files[i]), size, shorter or size)
        except ValueError as error:
            if bad_images == "error":
                raise
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
