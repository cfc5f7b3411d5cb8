"""Operations of the views: their hyperparameters, what they draw at random, and their arithmetic.

Images are fp32 from 0 to 1, N x C x H x W; parameters differ from image to image. The results equal
those of torchvision's functions. Saturation, hue and grayscale need three channels.

A new operation is a subclass of `Operation`. For a flag of its own it needs a field in
`Augmentation` and a place in `Augmentation.operations`; without one, pass it to `Views`.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from simsiam.runtime.config import Config, Number, Several, option

# ---- hyperparameters ----------------------------------------------------------------------------


def bounds(low: float, high: float) -> Several:
    """Return the kind of a range within bounds."""
    return Several(Number(float, low, high), 2, increasing=True, metavar=("LOW", "HIGH"))


class Strengths(Several):
    """Strengths of the colour jitter. A hue may turn by half of the circle, in both directions."""

    def check(self, value: object) -> None:
        super().check(value)
        if value[3] > 0.5:
            raise ValueError("the hue must be at most 0.5")


PROBABILITY = Number(float, 0, 1)
STRENGTHS = Strengths(
    Number(float, 0, 10), 4, metavar=("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE")
)


@dataclasses.dataclass
class Augmentation(Config):
    """Hyperparameters of the random views. Their defaults and bounds are here and nowhere else.

    The defaults are the paper's for ImageNet (App. A "Image augmentation"), but without the blur,
    which it leaves out on CIFAR (App. D). Raises ConfigError for a value out of bounds.
    """

    crop_scale: tuple[float, float] = option(
        bounds(1e-3, 1), (0.2, 1.0), "area of a crop over the image's"
    )
    crop_ratio: tuple[float, float] = option(
        bounds(1e-3, 1e3), (3 / 4, 4 / 3), "width of a crop over its height"
    )
    jitter: tuple[float, float, float, float] = option(
        STRENGTHS, (0.4, 0.4, 0.4, 0.1), "strengths of the colour jitter"
    )
    jitter_p: float = option(PROBABILITY, 0.8, "probability of colour jitter")
    gray_p: float = option(PROBABILITY, 0.2, "probability of grayscale")
    blur_p: float = option(PROBABILITY, 0.0, "probability of a Gaussian blur")
    blur_sigma: tuple[float, float] = option(
        bounds(1e-3, 100), (0.1, 2.0), "sigma of the blur, in pixels of the view"
    )
    hflip_p: float = option(PROBABILITY, 0.5, "probability of a flip left-right")
    vflip_p: float = option(PROBABILITY, 0.0, "probability of a flip up-down")
    rotate90_p: float = option(PROBABILITY, 0.0, "probability of a turn by 90, 180 or 270 degrees")
    solarize_p: float = option(PROBABILITY, 0.0, "probability of inverting bright pixels")

    def operations(self, compiled: bool = False) -> list["Operation"]:
        """Return the operations after the crop, in the order in which they are applied.

        `compiled`: run those on colours through torch.compile.
        """
        colour = COLOUR
        if compiled:  # one by one, since their order is another one in each batch
            colour = tuple(torch.compile(function, dynamic=False) for function in COLOUR)
        return [
            FlipLeftRight(self.hflip_p),
            FlipUpDown(self.vflip_p),
            Turn(self.rotate90_p),
            Jitter(self.jitter_p, self.jitter, colour),
            Grayscale(self.gray_p, colour[2]),
            Blur(self.blur_p, self.blur_sigma),
            Solarize(self.solarize_p),
        ]


# ---- the interface of an operation --------------------------------------------------------------

Params = dict[str, Any]  # parameters of one operation by name: see `Operation.sample`

# Two random generators that several operations share, see `Operation.stream`. Another division, or
# another order of the operations, would change the views of every seed.
FIRST_STREAM, SECOND_STREAM = (), (1,)


@dataclasses.dataclass(frozen=True)
class Operation:
    """A random operation on a batch of images. `p`: probability that it applies to an image.

    `draws_first`: draw the parameters before the images that the operation applies to.
    """

    p: float = 1.0
    draws_first: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The class's name: the key of the operation's parameters in `ViewParams`."""
        return type(self).__name__

    @property
    def stream(self) -> tuple[int, ...]:
        """Numbers that follow (seed, epoch, step) in the seed of the operation's generator.

        A new operation has a generator of its own: the others draw the same without it.
        """
        return 2, zlib.crc32(self.name.encode())

    def sample(self, rng: np.random.Generator, n: int) -> Params:
        """Draw the parameters of `n` images, by name.

        An array has a row per image; what is not an array holds for the whole batch.
        """
        return {}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Return the changed images, N x C x H x W; may overwrite `images`.

        `params`: those of `sample`, and `on`, N bool: images where it is false must stay as they
        are. Arrays have become tensors on the images' device, bool as before or else fp32.
        """
        raise NotImplementedError

    def describe(self, params: Params) -> list[str]:
        """Describe in words what the parameters of an image do to it, a line per change."""
        return [self.name.lower()]


def per_image(values: Tensor) -> Tensor:
    """Reshape N values to N x 1 x 1 x 1, so that they broadcast over images."""
    return values.view(-1, 1, 1, 1)


# ---- geometry -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Geometry:
    """Images with geometric changes, which `compute` makes in as few passes as possible.

    `images`: uint8. `size`: side of a crop. `rows`, `columns`: matrices of a crop and resize (see
    `resample`); None: the images keep their size. N bool each, None for no image: `left_right`,
    `up_down`: mirror an image; `exchanged`: then exchange its rows and columns.
    """

    images: Tensor
    size: int
    rows: Tensor | None = None
    columns: Tensor | None = None
    left_right: Tensor | None = None
    up_down: Tensor | None = None
    exchanged: Tensor | None = None

    def mirror(self, field: str, on: Tensor) -> None:
        """Mirror the images where `on` is true, once more. `field`: `left_right` or `up_down`."""
        before = getattr(self, field)
        setattr(self, field, on if before is None else before ^ on)

    def compute(self) -> Tensor:
        """Return the changed images, from 0 to 1."""
        if self.rows is None:
            x = by_channel(self.images).div_(255)
            x = flip(flip(x, self.left_right, -1), self.up_down, -2)
        else:  # flips of the matrices have fewer numbers to move
            rows, columns = flip(self.rows, self.up_down, 1), flip(self.columns, self.left_right, 1)
            x = resample(self.images, rows / 255, columns)
        if self.exchanged is None:
            return x
        planes = x.transpose(0, 1)  # as they lie in memory
        return torch.where(self.exchanged[:, None, None], planes.mT, planes).transpose(0, 1)


def flip(x: Tensor, on: Tensor | None, axis: int) -> Tensor:
    """Reverse an axis where `on`, N bool, is true; None: nowhere."""
    return x if on is None else torch.where(on.view(-1, *[1] * (x.dim() - 1)), x.flip(axis), x)


@dataclasses.dataclass(frozen=True)
class Crop:
    """Random resized crop. Unlike an `Operation` it depends on the size of the images.

    `scale`: range of the crop's area over the image's; `ratio`: of its width over its height.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    name: ClassVar[str] = "Crop"

    def sample(self, rng: np.random.Generator, n: int, height: int, width: int) -> Params:
        """Draw a box (top, left, height, width) in each of `n` images of one size."""
        boxes = crop_boxes(rng, n, height, width, self.scale, self.ratio)
        return {"box": boxes, "image_area": height * width}

    def apply(self, geometry: Geometry, params: Params) -> None:
        """Add the crop and resize."""
        top, left, tall, wide = params["box"].unbind(1)
        height, width = geometry.images.shape[2:]
        geometry.rows = resize_weights(top, tall, height, geometry.size)
        geometry.columns = resize_weights(left, wide, width, geometry.size)

    def describe(self, params: Params) -> list[str]:
        """Describe the crop of one image."""
        _, _, tall, wide = params["box"]
        return [f"crop {tall * wide / params['image_area']:.0%}: {wide} x {tall}"]


def crop_boxes(
    rng: np.random.Generator,
    n: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Return boxes of torchvision's RandomResizedCrop: int64, n x 4 (top, left, height, width).

    Each is the first that fits of ten with a random area and aspect ratio. If none fits, it is the
    largest central one with the nearest allowed ratio.
    """
    area = height * width * rng.uniform(*scale, (n, 10))
    aspect = np.exp(rng.uniform(*np.log(ratio), (n, 10)))
    tries = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=-1).round()
    fits = ((tries > 0) & (tries <= (height, width))).all(-1)  # n x 10
    is_random = fits.any(1, keepdims=True)
    fallback = (min(height, round(width / ratio[0])), min(width, round(height * ratio[1])))
    sides = np.where(is_random, tries[np.arange(n), fits.argmax(1)], fallback)
    margin = (height, width) - sides
    corner = np.floor(rng.random((n, 2)) * (margin + 1))
    corner = np.where(is_random, corner, margin // 2)
    return np.concatenate([corner, sides], axis=1).astype(np.int64)


class GeometricOperation(Operation):
    """An operation on `Geometry` instead of pixels, which costs next to nothing.

    All of these come before the operations on pixels.
    """

    def apply(self, geometry: Geometry, params: Params) -> None:
        """Add the operation to the geometry."""
        raise NotImplementedError


class FlipLeftRight(GeometricOperation):
    """Mirror an image left to right."""

    stream: ClassVar = FIRST_STREAM

    def apply(self, geometry: Geometry, params: Params) -> None:
        geometry.mirror("left_right", params["on"])

    def describe(self, params: Params) -> list[str]:
        return ["flip left-right"]


class FlipUpDown(GeometricOperation):
    """Mirror an image top to bottom."""

    stream: ClassVar = SECOND_STREAM

    def apply(self, geometry: Geometry, params: Params) -> None:
        geometry.mirror("up_down", params["on"])

    def describe(self, params: Params) -> list[str]:
        return ["flip up-down"]


class Turn(GeometricOperation):
    """Turn a square image counter-clockwise by 90, 180 or 270 degrees. Comes after the flips."""

    stream: ClassVar = SECOND_STREAM

    def sample(self, rng: np.random.Generator, n: int) -> Params:
        return {"quarters": rng.integers(1, 4, n)}

    def apply(self, geometry: Geometry, params: Params) -> None:
        # A turn by 90 degrees is a flip left-right, then an exchange of rows and columns.
        one, two, three = (params["on"] & (params["quarters"] == i) for i in (1, 2, 3))
        geometry.mirror("left_right", one | two)
        geometry.mirror("up_down", two | three)
        geometry.exchanged = one | three

    def describe(self, params: Params) -> list[str]:
        return [f"turn {90 * params['quarters']} degrees"]


def resize_weights(start: Tensor, length: Tensor, before: int, after: int) -> Tensor:
    """Return one axis of a crop and resize as matrices: N starts, N lengths -> N x after x before.

    Bilinear with antialiasing, as torchvision's `resize`: a triangle as wide as the step between
    output pixels (but at least an input pixel), over the pixels of the crop only.
    """
    step = length[:, None, None] / after
    out = torch.arange(after, device=start.device)[:, None] + 0.5
    pixel = torch.arange(before, device=start.device) + 0.5 - start[:, None, None]  # N x 1 x before
    weights = (1 - (pixel - step * out).abs() / step.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel > 0) & (pixel < length[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply a matrix per axis: N x C x H x W, N x h x H, N x w x W -> N x C x h x w, fp32.

    In memory the N x h x w numbers of a channel lie together, which makes the operations on colours
    several times faster.
    """
    n, channels = images.shape[:2]
    x = by_channel(images)
    resampled = x.new_empty(channels, n, rows.shape[1], columns.shape[1])
    for plane, out in zip(x.unbind(1), resampled, strict=True):
        torch.bmm(rows, plane @ columns.mT, out=out)
    return resampled.transpose(0, 1)


def by_channel(images: Tensor) -> Tensor:
    """Convert N x C x H x W to fp32 and to the memory layout of `resample`."""
    planes = images.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.contiguous().transpose(0, 1)


# ---- colours ------------------------------------------------------------------------------------


def to_gray(x: Tensor) -> Tensor:
    """Return the luma (ITU-R 601, with torchvision's digits): N x 3 x H x W -> N x 1 x H x W.

    For other numbers of channels it is their mean.
    """
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


# These overwrite their images. Factors are N x 1 x 1 x 1; 1 (hue: 0) leaves an image as it is.


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale toward black (factor below 1) or away from it."""
    return x.mul_(factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale toward the image's mean gray (factor below 1) or away from it."""
    mean = to_gray(x).flatten(1).mean(1).view_as(factor)
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Scale toward each pixel's gray (factor below 1) or away from it."""
    gray = to_gray(x).mul_(1 - factor)
    return x.mul_(factor).add_(gray).clamp_(0, 1)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV by `turns` of the colour circle; value and chroma stay."""
    red, green, blue = x.unbind(1)  # N x H x W
    # Arithmetic instead of three cases by the largest channel, since `where` is slow. With green
    # and blue in order, and then the larger of them and red, hue in sixths of the circle is
    # |start + (middle - rest) / chroma|, `start` telling which were exchanged.
    larger, smaller = torch.maximum(green, blue), torch.minimum(green, blue)
    value, middle = torch.maximum(red, larger), torch.minimum(red, larger)
    lowest = torch.minimum(middle, smaller)
    chroma = value - lowest
    exchanged = (green < blue).float()
    start = (exchanged * 12).sub_(2).mul_(red < larger).sub_(exchanged, alpha=6)
    # No chroma, no hue: 0 / tiny is 0.
    hue = (middle.sub_(smaller)).div_(chroma.clamp(min=1e-12)).add_(start).abs_()
    hue = hue.add_(6 * turns[:, 0]).remainder_(6)
    # Each channel's part of the chroma is a trapezoid over the circle.
    trapezoids = (3, 1, -1), (2, -1, 2), (4, -1, 2)
    for out, (centre, slope, offset) in zip(x.unbind(1), trapezoids, strict=True):
        part = (hue - centre).abs_().mul_(slope).add_(offset).clamp_(0, 1)
        torch.addcmul(lowest, chroma, part, out=out)
    return x


COLOUR = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
NEUTRAL = (1.0, 1.0, 1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Jitter(Operation):
    """Change brightness, contrast, saturation and hue, in an order drawn per batch.

    `strength`: of each; factors are from 1 - strength to 1 + strength, hue turns from -strength to
    strength of the circle. `functions`: COLOUR, or their compiled versions.
    """

    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    functions: tuple[Callable, ...] = COLOUR
    stream: ClassVar = FIRST_STREAM
    draws_first: ClassVar[bool] = True

    def sample(self, rng: np.random.Generator, n: int) -> Params:
        strength = np.asarray(self.strength)
        factors = rng.uniform(-strength, strength, (n, 4)) + NEUTRAL
        return {"factors": factors, "order": tuple(rng.permutation(4).tolist())}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        for i in params["order"]:
            if self.strength[i]:
                factors = torch.where(params["on"], params["factors"][:, i], NEUTRAL[i])
                images = self.functions[i](images, per_image(factors))
        return images

    def describe(self, params: Params) -> list[str]:
        texts = ("brightness x {:.2f}", "contrast x {:.2f}", "saturation x {:.2f}", "hue {:+.2f}")
        factors = params["factors"]
        return [texts[i].format(factors[i]) for i in params["order"] if factors[i] != NEUTRAL[i]]


@dataclasses.dataclass(frozen=True)
class Grayscale(Operation):
    """Replace the three channels by their luma. `saturate`: adjust_saturation, or compiled."""

    saturate: Callable = adjust_saturation
    stream: ClassVar = FIRST_STREAM

    def apply(self, images: Tensor, params: Params) -> Tensor:
        return self.saturate(images, per_image((~params["on"]).float()))


@dataclasses.dataclass(frozen=True)
class Blur(Operation):
    """Gaussian blur. `sigma`: range in pixels.

    The kernel is a tenth of the image wide, as in SimCLR (arXiv 2002.05709, App. A).
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    stream: ClassVar = FIRST_STREAM

    def sample(self, rng: np.random.Generator, n: int) -> Params:
        return {"sigma": rng.uniform(*self.sigma, n)}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        size = images.shape[-1]
        weights = blur_weights(params["sigma"] * params["on"], size, size // 20 * 2 + 1)
        return resample(images, weights, weights)

    def describe(self, params: Params) -> list[str]:
        return [f"blur {params['sigma']:.1f} px"]


def blur_weights(sigma: Tensor, size: int, taps: int) -> Tensor:
    """Return one axis of a Gaussian blur as matrices: N sigmas (pixels) -> N x size x size.

    `taps` wide, reflected at the borders, as torchvision's `gaussian_blur`. Sigma 0: identity.
    """
    sigma, last = sigma.clamp(min=1e-3), size - 1
    pixel = torch.arange(size, device=sigma.device)
    out = pixel[:, None]

    def gauss(offset: Tensor) -> Tensor:
        bell = torch.exp(-0.5 * (offset / sigma[:, None, None]) ** 2)
        return bell * (offset.abs() <= taps // 2)

    weights = gauss(pixel - out)
    weights = weights + gauss(-pixel - out) * (pixel > 0)
    weights = weights + gauss(2 * last - pixel - out) * (pixel < last)
    return weights / weights.sum(-1, keepdim=True)


class Solarize(Operation):
    """Invert the values above 1/2."""

    stream: ClassVar = SECOND_STREAM

    def apply(self, images: Tensor, params: Params) -> Tensor:
        inverted = torch.minimum(images, 1 - images)  # above 1/2, 1 - x is the smaller one
        return torch.where(per_image(params["on"]), inverted, images)


def normalise(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract the mean and divide by the std of each channel, in place; return channels_last."""
    # By scalars: a tensor made of `mean` in each step would make the host wait for the device.
    for channel, of_mean, of_std in zip(x.unbind(1), mean, std, strict=True):
        channel.sub_(of_mean).div_(of_std)
    return x.contiguous(memory_format=torch.channels_last)
