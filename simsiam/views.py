"""Views: the random augmentation of SimSiam and the test transform, in batches on the device.

Nothing is drawn from a global RNG: what a step sees is a function of (seed, epoch, step, sample).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NORMALISATION = {  # mean and std of each channel
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What chance does to a view: the one place of its defaults. Recipes and checkpoints hold one.

    The defaults are the paper's for ImageNet (App. A, "Image augmentation"), less the blur, which
    it leaves out on CIFAR (App. D).

    `crop_scale`: the crop's area over the image's, from and to; `crop_ratio`: its width over its
    height. `jitter`: strengths for brightness, contrast, saturation, hue. `blur_sigma`: pixels.
    Names that end in `_p` are probabilities.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    flip_p: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError that names what cannot be."""
        tiny = 1e-3  # a crop of no area or width, and a blur over nothing, cannot be computed
        limits = {
            "crop_scale": (tiny, 1),
            "crop_ratio": (tiny, 1 / tiny),
            "jitter": (0, 10),
            "blur_sigma": (tiny, 100),
        }
        for name, value in vars(self).items():
            usual = getattr(type(self), name)
            several = isinstance(usual, tuple)
            least, most = limits.get(name, (0, 1))
            numbers = value if several and isinstance(value, tuple) else (value,)
            if len(numbers) != (len(usual) if several else 1) or not all(
                type(number) in (int, float) and least <= number <= most for number in numbers
            ):
                raise ValueError(f"its augmentation's {name} is not one of this program")
        ranges = (self.crop_scale, self.crop_ratio, self.blur_sigma)
        if any(start > end for start, end in ranges) or self.jitter[3] > 0.5:
            raise ValueError(
                "its augmentation's crop_scale, crop_ratio or blur_sigma falls, or its hue is "
                "above 0.5"
            )

    @classmethod
    def read(cls, saved: object) -> "Augmentation":
        """From a checkpoint's dict of its fields. Raises ValueError where it cannot be one."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(saved, dict) or saved.keys() != names:
            raise ValueError("its augmentation is not one of this program")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


class Batch(NamedTuple):
    """A rank's part of a global batch, and which one it is.

    `images`: uint8, n x 3 x H x W; or n x views x 3 x size x size, crops that workers have cut.
    `labels`: int64, of the whole global batch, or None. `size`: images in the global batch, of
    which `rows` are these.
    """

    epoch: int
    step: int
    images: Tensor
    labels: Tensor | None
    size: int
    rows: slice

    @classmethod
    def alone(cls, images: Tensor, epoch: int = 0, step: int = 0) -> "Batch":
        """All `images` as one batch of one process."""
        return cls(epoch, step, images, None, len(images), slice(0, len(images)))


def crop_boxes(
    rng: np.random.Generator,
    number: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Boxes of torchvision's RandomResizedCrop: int64, `number` x 4 (top, left, height, width).

    Ten tries of a random area and aspect ratio; where none fits, the whole image, cut centrally to
    the nearest ratio allowed.
    """
    area = height * width * rng.uniform(*scale, (number, 10))
    aspect = np.exp(rng.uniform(*np.log(ratio), (number, 10)))
    tries = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=-1).round()
    fits = ((tries > 0) & (tries <= (height, width))).all(-1)  # number x 10
    sides = tries[np.arange(number), fits.argmax(1)]
    fallback = (min(height, round(width / ratio[0])), min(width, round(height * ratio[1])))
    some = fits.any(1)
    sides = np.where(some[:, None], sides, fallback)
    room = (height, width) - sides
    corner = np.floor(rng.random((number, 2)) * (room + 1))
    corner = np.where(some[:, None], corner, room // 2)
    return np.concatenate([corner, sides], axis=1).astype(np.int64)


def resize_weights(start: Tensor, length: Tensor, before: int, after: int) -> Tensor:
    """One axis of a crop and resize as matrices: N starts and lengths -> N x after x before.

    Bilinear with antialiasing, as torchvision's `resize`: a triangle as wide as the step between
    output pixels (but at least an input pixel), over the pixels of the crop only.
    """
    step = length[:, None, None] / after
    out = torch.arange(after, device=start.device)[:, None] + 0.5
    pixel = torch.arange(before, device=start.device) + 0.5 - start[:, None, None]  # N x 1 x before
    weights = (1 - (pixel - step * out).abs() / step.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel > 0) & (pixel < length[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def blur_weights(sigma: Tensor, size: int, taps: int) -> Tensor:
    """One axis of a Gaussian blur as matrices: N sigmas (pixels) -> N x size x size.

    `taps` wide, reflected at the borders, as torchvision's `gaussian_blur`. Sigma near 0: identity.
    """
    pixel = torch.arange(size, device=sigma.device)
    out = pixel[:, None]
    last = size - 1

    def gauss(offset: Tensor) -> Tensor:
        bell = torch.exp(-0.5 * (offset / sigma[:, None, None]) ** 2)
        return bell * (offset.abs() <= taps // 2)

    weights = gauss(pixel - out)
    weights = weights + gauss(-pixel - out) * (pixel > 0)
    weights = weights + gauss(2 * last - pixel - out) * (pixel < last)
    return weights / weights.sum(-1, keepdim=True)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Two matrix products a channel: N x 3 x H x W, N x h x H, N x w x W -> N x 3 x h x w.

    The result is fp32, and in memory channel by channel: each one's N x h x w numbers lie
    together, which the colour operations below run through several times faster.
    """
    n, channels = images.shape[:2]
    x = by_channel(images)
    found = x.new_empty(channels, n, rows.shape[1], columns.shape[1])
    for plane, out in zip(x.unbind(1), found, strict=True):
        torch.bmm(rows, plane @ columns.mT, out=out)
    return found.transpose(0, 1)


def by_channel(images: Tensor) -> Tensor:
    """N x 3 x H x W -> the same in fp32, laid out in memory as by `resample`; copied if need be."""
    planes = images.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.contiguous().transpose(0, 1)


def to_gray(x: Tensor) -> Tensor:
    """ITU-R 601 luma as torchvision rounds it: N x 3 x H x W -> N x 1 x H x W."""
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


# The colour operations: images in [0, 1], N x 3 x H x W, and a factor an image, N x 1 x 1 x 1.
# A factor of 1 (hue: 0) leaves an image as it is.


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Toward black (below 1) or away from it."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Toward the image's mean gray (below 1) or away from it."""
    mean = to_gray(x).flatten(1).mean(1).view_as(factor)
    return (x * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Toward each pixel's gray (below 1) or away from it."""
    return (x * factor).add_(to_gray(x).mul_(1 - factor)).clamp_(0, 1)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV by `turns` of the colour circle, value and chroma kept."""
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
    found = torch.empty_like(x)
    # Each channel's part of the chroma is a trapezoid over the circle.
    trapezoids = (3, 1, -1), (2, -1, 2), (4, -1, 2)
    for out, (centre, slope, offset) in zip(found.unbind(1), trapezoids, strict=True):
        part = (hue - centre).abs_().mul_(slope).add_(offset).clamp_(0, 1)
        torch.addcmul(lowest, chroma, part, out=out)
    return found


COLOUR = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
# The area of a local view's crop over the image's: DINO (Caron et al. 2021, arXiv 2104.14294), sec.
# 3.1 and its code.
LOCAL_SCALE = (0.05, 0.4)


class Views:
    """The augmented views of SimSiam, made in batches on the images' device.

    Random resized crop to `size`, flip, colour jitter, grayscale, Gaussian blur, normalise: what
    the authors' torchvision pipeline does an image at a time (paper, App. A "Image augmentation").
    Parameters are drawn an image, with torchvision's distributions; the order of the four jitter
    operations is drawn a batch. All is drawn for the global batch, so that views do not depend on
    the number of ranks.

    `size`: pixels. `mean`, `std`: of each channel, from 0 to 1. `number`: views an image.
    `compiled`: the colour operations, each by torch.compile, which then runs through the images
    once or twice for each instead of five to twenty times; the last bits differ.
    `sides`: the views' side in each epoch, in pixels, where it is not `size` throughout; the test
    transform keeps to `size`. `local`: so many views more, of crops of `LOCAL_SCALE`, `local_size`
    pixels wide.
    """

    def __init__(
        self,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: Augmentation = Augmentation(),
        number: int = 2,
        seed: int = 0,
        compiled: bool = False,
        sides: Sequence[int] = (),
        local: int = 0,
        local_size: int = 0,
    ):
        self.size, self.mean, self.std, self.sides = size, mean, std, sides
        self.local, self.local_size = local, local_size
        # Each for itself: their order is another one in each batch.
        self.colour = list(COLOUR)
        if compiled:
            self.colour = [torch.compile(adjust, dynamic=False) for adjust in COLOUR]
        self.augmentation, self.number, self.seed = augmentation, number, seed

    def __call__(self, batch: Batch) -> list[Tensor]:
        """`number` views an image, then `local` ones: each normalised float32, n x 3 x side x side.

        A function of the seed and the batch. The first of two views does not depend on `number`.
        """
        rng = np.random.default_rng([self.seed, batch.epoch, batch.step])
        a, images = self.augmentation, batch.images
        if images.dim() == 5:
            return [self.view(part, batch, rng, a, None) for part in images.unbind(1)]
        side = self.sides[batch.epoch] if self.sides else self.size
        local = dataclasses.replace(a, crop_scale=LOCAL_SCALE)
        kinds = [(a, side)] * self.number + [(local, self.local_size)] * self.local
        return [self.view(images, batch, rng, *kind) for kind in kinds]

    def view(
        self,
        images: Tensor,
        batch: Batch,
        rng: np.random.Generator,
        a: Augmentation,
        side: int | None,
    ) -> Tensor:
        """One view of `images`, n x 3 x H x W, by `a`, `side` pixels wide.

        Without a `side` they are random crops already, and keep their size.
        """
        n, cut = batch.size, side is None
        _, _, height, width = images.shape
        boxes = np.zeros((n, 4))
        if not cut:
            boxes = crop_boxes(rng, n, height, width, a.crop_scale, a.crop_ratio)
        strength = np.asarray(a.jitter)
        factors = rng.uniform(-strength, strength, (n, 4)) + np.array([1, 1, 1, 0])
        order = rng.permutation(4)
        flip, jitter, gray, blur = (
            rng.random((n, 4)) < (a.flip_p, a.jitter_p, a.gray_p, a.blur_p)
        ).T
        sigma = rng.uniform(*a.blur_sigma, n)
        factors[~jitter] = (1, 1, 1, 0)
        drawn = np.column_stack(
            [boxes, flip, factors, 1 - gray, np.where(blur, sigma, 1e-3)]
        ).astype(np.float32)
        n = len(images)
        # One transfer a view, and an asynchronous one: the device is never waited for.
        table = torch.from_numpy(drawn[batch.rows])
        cuda = images.device.type == "cuda"  # mps would copy from memory that is gone
        table = (table.pin_memory() if cuda else table).to(images.device, non_blocking=cuda)
        top, left, tall, wide, flip, *factors, colour, sigma = table.unbind(1)

        flip = flip[:, None, None] > 0
        if cut:
            x = by_channel(images).div_(255)
            x = torch.where(flip[..., None], x.flip(-1), x)
        else:
            rows = resize_weights(top, tall, height, side)
            columns = resize_weights(left, wide, width, side)
            columns = torch.where(flip, columns.flip(1), columns)
            x = resample(images, rows / 255, columns)
        if a.jitter_p:
            for i in order:
                x = self.colour[i](x, factors[i].view(n, 1, 1, 1))
        if a.gray_p:
            saturate = self.colour[COLOUR.index(adjust_saturation)]
            x = saturate(x, colour.view(n, 1, 1, 1))  # factor 0: grayscale
        if a.blur_p:
            # The kernel is a tenth of the image wide, as in SimCLR (arXiv 2002.05709, App. A).
            side = x.shape[-1]
            weights = blur_weights(sigma, side, side // 20 * 2 + 1)
            x = resample(x, weights, weights)
        return self.normalise(x)

    def plain(self, images: Tensor) -> Tensor:
        """The test transform: no chance, the whole image; uint8, N x 3 x H x W -> as a view."""
        height, width = images.shape[2:]
        if (height, width) == (self.size, self.size):
            return self.normalise(images.float().div_(255))
        zero = torch.zeros(len(images), device=images.device)
        rows = resize_weights(zero, zero + height, height, self.size)
        columns = resize_weights(zero, zero + width, width, self.size)
        return self.normalise(resample(images, rows / 255, columns))

    def normalise(self, x: Tensor) -> Tensor:
        """[0, 1] -> zero mean and unit variance over the data set, channels_last; overwrites x."""
        # In place and by scalars: a tensor made of `mean` each step would make the host wait.
        for channel, mean, std in zip(x.unbind(1), self.mean, self.std, strict=True):
            channel.sub_(mean).div_(std)
        return x.contiguous(memory_format=torch.channels_last)
