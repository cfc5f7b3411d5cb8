"""Views: the random augmentation of SimSiam and the test transform, in batches on the device.

Nothing is drawn from a global RNG: what a step sees is a function of (seed, epoch, step, sample).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from simsiam.views.ops import (
    COLOUR,
    adjust_saturation,
    blur_weights,
    by_channel,
    exchange_axes,
    resample,
    resize_weights,
    solarize,
)

NORMALISATION = {  # mean and std of each channel
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


TINY = 1e-3  # a crop of no area or width, and a blur over nothing, cannot be computed
# What the numbers of an Augmentation may be, from and to; those that have no place here are
# probabilities. Those of RANGES are a range.
LIMITS = {
    "crop_scale": (TINY, 1),
    "crop_ratio": (TINY, 1 / TINY),
    "jitter": (0, 10),
    "blur_sigma": (TINY, 100),
}
RANGES = ("crop_scale", "crop_ratio", "blur_sigma")
LEAST_STD = 1e-3  # by which pixels from 0 to 1 can be divided
LARGEST_HUE = 0.5  # half of the colour circle: it goes both ways


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What chance does to a view: the one place of its defaults. Recipes and checkpoints hold one.

    The defaults are the paper's for ImageNet (App. A, "Image augmentation"), less the blur, which
    it leaves out on CIFAR (App. D).

    `crop_scale`: the crop's area over the image's, from and to; `crop_ratio`: its width over its
    height. `jitter`: strengths for brightness, contrast, saturation, hue. `blur_sigma`: pixels.
    Names that end in `_p` are probabilities: `flip_p` from left to right, `vflip_p` from top to
    bottom; `rotate90_p` by 90, 180 or 270 degrees; `solarize_p` inverts what is brighter than half.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    flip_p: float = 0.5
    vflip_p: float = 0.0
    rotate90_p: float = 0.0
    solarize_p: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError that names what cannot be."""
        for name, value in vars(self).items():
            usual = getattr(type(self), name)
            several = isinstance(usual, tuple)
            least, most = LIMITS.get(name, (0, 1))
            numbers = value if several and isinstance(value, tuple) else (value,)
            if len(numbers) != (len(usual) if several else 1) or not all(
                type(number) in (int, float) and least <= number <= most for number in numbers
            ):
                raise ValueError(f"its augmentation's {name} is not one of this program")
        ranges = [getattr(self, name) for name in RANGES]
        if any(start > end for start, end in ranges) or self.jitter[3] > LARGEST_HUE:
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

    `images`: uint8, n x C x H x W; or n x views x C x size x size, crops that workers have cut.
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


class ViewParams(NamedTuple):
    """What chance has drawn for a view, a row for each image of the global batch.

    `boxes`: n x 4, the crop's top, left, height and width; None where it was cut before.
    `factors`: n x 4, of COLOUR, whose operations come in this `order`. `sigma`: of the blur; 0 is
    none. `turns`: by 90 degrees, counter-clockwise. The others: n, whether that happens. `newer`:
    whether any of the last three can happen.
    """

    boxes: np.ndarray | None
    factors: np.ndarray
    order: np.ndarray
    flip: np.ndarray
    gray: np.ndarray
    sigma: np.ndarray
    vflip: np.ndarray
    turns: np.ndarray
    solarize: np.ndarray
    newer: bool

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        later: np.random.Generator | None,
        n: int,
        a: Augmentation,
        whole: tuple[int, int] | None,
    ) -> "ViewParams":
        """For `n` images of `whole` height and width, if they are not cut yet, by `a`.

        `later` draws what is newer than the first checkpoints, whose runs go on as they began; it
        is None where none of that happens.
        """
        boxes = crop_boxes(rng, n, *whole, a.crop_scale, a.crop_ratio) if whole else None
        strength = np.asarray(a.jitter)
        factors = rng.uniform(-strength, strength, (n, 4)) + np.array([1, 1, 1, 0])
        order = rng.permutation(4)
        flip, jitter, gray, blur = (
            rng.random((n, 4)) < (a.flip_p, a.jitter_p, a.gray_p, a.blur_p)
        ).T
        sigma = np.where(blur, rng.uniform(*a.blur_sigma, n), 0)
        factors[~jitter] = (1, 1, 1, 0)
        vflip = turns = solarize = np.zeros(n, bool)
        if later:  # all are drawn, so that none depends on whether another is on
            vflip, turn, solarize = (
                later.random((n, 3)) < (a.vflip_p, a.rotate90_p, a.solarize_p)
            ).T
            turns = np.where(turn, later.integers(1, 4, n), 0)
        return cls(boxes, factors, order, flip, gray, sigma, vflip, turns, solarize, bool(later))

    def table(self) -> np.ndarray:
        """What `Views.view` takes of it: float32, n x 14.

        A turn by 90 degrees is a flip and an exchange of rows and columns, so that flips and turns
        together are `flip` and `vflip` (columns 4 and 5), and then `turned` (column 6).
        """
        found = np.zeros((len(self.flip), 14), np.float32)
        if self.boxes is not None:
            found[:, :4] = self.boxes
        found[:, 4] = self.flip
        found[:, 7:11] = self.factors
        found[:, 11] = ~self.gray  # the factor of the saturation
        found[:, 12] = np.maximum(self.sigma, TINY)
        if self.newer:
            one, two, three = (self.turns == quarter for quarter in (1, 2, 3))
            found[:, 4] = self.flip ^ one ^ two
            found[:, 5] = self.vflip ^ two ^ three
            found[:, 6] = one | three
            found[:, 13] = self.solarize
        return found

    def describe(self, i: int, area: int) -> list[str]:
        """What happens to image `i`, of `area` pixels, a line each, in this order."""
        found = []
        if self.boxes is not None:
            tall, wide = self.boxes[i, 2:]
            found.append(f"crop {tall * wide / area:.0%}: {wide} x {tall}")
        found += ["flip left-right"] * bool(self.flip[i]) + ["flip up-down"] * bool(self.vflip[i])
        found += [f"turn {90 * self.turns[i]} degrees"] * bool(self.turns[i])
        for k in self.order:
            name, factor = COLOUR[k].__name__.removeprefix("adjust_"), self.factors[i, k]
            if factor != (name != "hue"):
                found.append(f"{name} {factor:+.2f}" if name == "hue" else f"{name} x {factor:.2f}")
        found += ["gray"] * bool(self.gray[i])
        found += [f"blur {self.sigma[i]:.1f} px"] * bool(self.sigma[i])
        return found + ["solarize"] * bool(self.solarize[i])


class Views:
    """The augmented views of SimSiam, made in batches on the images' device.

    Random resized crop to `size`, flips, turn, colour jitter, grayscale, Gaussian blur, solarize,
    normalise: what the authors' torchvision pipeline, without turns, vertical flips and solarize,
    does an image at a time (paper, App. A "Image augmentation").
    Parameters are drawn an image, with torchvision's distributions; the order of the four jitter
    operations is drawn a batch. All is drawn for the global batch, so that views do not depend on
    the number of ranks.

    `size`: pixels. `mean`, `std`: of each channel, from 0 to 1. `number`: views an image.
    `compiled`: the colour operations, each by torch.compile, which then runs through the images
    once or twice for each instead of five to twenty times; the last bits differ.
    `size_schedule`: the views' side in each epoch, in pixels, where it is not `size` throughout;
    the test transform keeps to `size`.
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
        size_schedule: Sequence[int] = (),
    ):
        self.size, self.mean, self.std, self.size_schedule = size, mean, std, size_schedule
        # Each for itself: their order is another one in each batch.
        self.colour = list(COLOUR)
        if compiled:
            self.colour = [torch.compile(adjust, dynamic=False) for adjust in COLOUR]
        self.augmentation, self.number, self.seed = augmentation, number, seed

    def __call__(self, batch: Batch) -> list[Tensor]:
        """`number` views per image: each normalised float32, n x C x side x side.

        A function of the seed and the batch. The first of two views does not depend on `number`.
        Raises ValueError where colours of other channels than three are to change.
        """
        a = self.augmentation
        if len(self.mean) != 3 and (a.gray_p or (a.jitter_p and any(a.jitter[2:]))):
            raise ValueError(
                "colours of other channels than three: say jitter=(0.4, 0.4, 0.0, 0.0), gray_p=0.0"
            )
        sides = self.sizes_in(batch.epoch)
        images = [batch.images] * len(sides)
        if batch.images.dim() == 5:  # the workers have cut the crops of each view
            images = batch.images.unbind(1)
            sides = [self.size] * len(images)
        parts = zip(images, self.sample(batch), sides, strict=True)
        return [self.view(some, batch.rows, chance, side) for some, chance, side in parts]

    def sizes_in(self, epoch: int) -> list[int]:
        """The side of each view of an image in an epoch, in pixels."""
        side = self.size_schedule[epoch] if self.size_schedule else self.size
        return [side] * self.number

    def remaining_work(self, epoch: int, epochs: int) -> float:
        """The pixels of all views in the epochs after this one of `epochs`, over this one's."""
        pixels = [sum(side**2 for side in self.sizes_in(i)) for i in range(epoch, epochs)]
        return sum(pixels[1:]) / pixels[0]

    def sample(self, batch: Batch) -> list[ViewParams]:
        """What is drawn for each view of a batch."""
        start, a = [self.seed, batch.epoch, batch.step], self.augmentation
        rng, newer = np.random.default_rng(start), a.vflip_p or a.rotate90_p or a.solarize_p
        later = np.random.default_rng([*start, 1]) if newer else None
        number, whole = self.number, batch.images.shape[2:]
        if batch.images.dim() == 5:
            number, whole = batch.images.shape[1], None
        return [ViewParams.draw(rng, later, batch.size, a, whole) for _ in range(number)]

    def view(self, images: Tensor, rows: slice, chance: ViewParams, side: int) -> Tensor:
        """One view of `images`, n x C x H x W, which are `rows` of the global batch.

        It is `side` pixels wide; of images that are crops already, as wide as they.
        """
        n, a = len(images), self.augmentation
        _, _, height, width = images.shape
        # One transfer a view, and an asynchronous one: the device is never waited for.
        table = torch.from_numpy(chance.table()[rows])
        cuda = images.device.type == "cuda"  # mps would copy from memory that is gone
        table = (table.pin_memory() if cuda else table).to(images.device, non_blocking=cuda)
        top, left, tall, wide, flip, vflip, turned, *factors, colour, sigma, inverted = (
            table.unbind(1)
        )

        flip, vflip, turned = (on.view(n, 1, 1) > 0 for on in (flip, vflip, turned))
        upside = a.vflip_p or a.rotate90_p
        if chance.boxes is None:
            x = by_channel(images).div_(255)
            x = torch.where(flip[..., None], x.flip(-1), x)
            x = torch.where(vflip[..., None], x.flip(-2), x) if upside else x
        else:
            down = resize_weights(top, tall, height, side)
            down = torch.where(vflip, down.flip(1), down) if upside else down
            across = resize_weights(left, wide, width, side)
            across = torch.where(flip, across.flip(1), across)
            x = resample(images, down / 255, across)
        if a.rotate90_p:
            x = exchange_axes(x, turned)
        if a.jitter_p:
            for i in chance.order:
                if a.jitter[i]:
                    x = self.colour[i](x, factors[i].view(n, 1, 1, 1))
        if a.gray_p:
            saturate = self.colour[COLOUR.index(adjust_saturation)]
            x = saturate(x, colour.view(n, 1, 1, 1))  # factor 0: grayscale
        if a.blur_p:
            # The kernel is a tenth of the image wide, as in SimCLR (arXiv 2002.05709, App. A).
            side = x.shape[-1]
            weights = blur_weights(sigma, side, side // 20 * 2 + 1)
            x = resample(x, weights, weights)
        if a.solarize_p:
            x = solarize(x, inverted.view(n, 1, 1, 1) > 0)
        return self.normalise(x)

    def eval_transform(self, images: Tensor) -> Tensor:
        """The test transform: no chance, the whole image; uint8, N x C x H x W -> as a view."""
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
