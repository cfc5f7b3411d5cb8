"""The views of a batch: sampling and applying the operations of `ops`, and the test transform.

No global random generator is used: a view is a function of (seed, epoch, step, image).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from simsiam.views import ops
from simsiam.views.ops import Augmentation, Crop, GeometricOperation, Operation, Params

NORMALISATION = {  # mean and std of each channel
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
MIN_STD = 1e-3  # of pixels from 0 to 1, for a division by it


class Batch(NamedTuple):
    """One rank's part of a global batch.

    `epoch`, `step`: which batch it is; the views depend on them. `images`: uint8, n x C x H x W, or
    n x views x C x size x size where the loader's workers have cropped them. `labels`: int64, of
    the whole global batch, or None. `size`: number of images in the global batch. `rows`: which of
    them `images` are.
    """

    epoch: int
    step: int
    images: Tensor
    labels: Tensor | None
    size: int
    rows: slice

    @classmethod
    def alone(cls, images: Tensor, epoch: int = 0, step: int = 0) -> "Batch":
        """Return all `images` as the global batch of a single process."""
        return cls(epoch, step, images, None, len(images), slice(0, len(images)))


@dataclasses.dataclass(frozen=True)
class ViewParams:
    """Sampled parameters of one view of a global batch.

    `operations`: in the order in which they are applied. `values`: the parameters of each, by its
    name: those of `Operation.sample`, and `on`, to which images it applies.
    """

    operations: tuple[Crop | Operation, ...]
    values: dict[str, Params]

    def __getitem__(self, name: str) -> Params:
        """Return the parameters of an operation by its name."""
        return self.values[name]

    def to(self, device: torch.device, rows: slice) -> dict[str, Params]:
        """Copy the parameters of some rows to a device, as fp32 and in a single transfer."""
        columns = [
            (operation.name, key, value[rows])
            for operation in self.operations
            for key, value in self[operation.name].items()
            if isinstance(value, np.ndarray)
        ]
        params = {operation.name: self[operation.name].copy() for operation in self.operations}
        if not columns:
            return params
        n = len(columns[0][2])
        parts = [value.reshape(n, -1) for *_, value in columns]
        packed = torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))
        if device.type == "cuda":  # the host does not wait; MPS would copy from freed memory
            packed = packed.pin_memory().to(device, non_blocking=True)
        split = packed.to(device).split([part.shape[1] for part in parts], dim=1)
        for (name, key, value), part in zip(columns, split, strict=True):
            params[name][key] = part.view(value.shape)
        return params

    def describe(self, i: int) -> list[str]:
        """Describe in words what happens to image `i`, a line per change, in this order."""
        lines = []
        for operation in self.operations:
            params = {
                key: value[i] if isinstance(value, np.ndarray) else value
                for key, value in self[operation.name].items()
            }
            lines += operation.describe(params) if params.get("on", True) else []
        return lines


def sample_stream(
    rng: np.random.Generator, operations: Sequence[Operation], n: int
) -> dict[str, Params]:
    """Draw the parameters of operations that share a generator, for `n` images, by their names.

    One draw for all of them decides which operation applies to which image.
    """
    params = {op.name: op.sample(rng, n) for op in operations if op.draws_first}
    applies = rng.random((n, len(operations))) < [op.p for op in operations]
    params |= {op.name: op.sample(rng, n) for op in operations if not op.draws_first}
    for op, on in zip(operations, applies.T, strict=True):
        for key, neutral in op.neutral.items():
            params[op.name][key][~on] = neutral
        params[op.name]["on"] = on
    return params


class Views:
    """Random views of a batch of images, computed on the images' device.

    Random resized crop, flips, turn, colour jitter, grayscale, Gaussian blur, solarize, normalise.
    Without vertical flips, turns and solarize these are the transforms of the authors' code (paper,
    App. A "Image augmentation"), with torchvision's distributions per image; only the order of the
    jitter's four operations is drawn per batch. Parameters are drawn for the global batch, so that
    views do not depend on the number of ranks.

    `size`: side of a view in pixels. `mean`, `std`: of each channel, from 0 to 1. `number`: views
    per image. `compiled`: run the colour operations through torch.compile; each then reads the
    images once or twice instead of five to twenty times, and the last bits differ.
    `size_schedule`: side of the views in each epoch; empty: `size` in all. The test transform uses
    `size` throughout. `operations`: further ones, applied last before the normalisation. Each draws
    from a random generator of its own, so that it does not change what the others draw.
    """

    def __init__(
        self,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: Augmentation | None = None,
        number: int = 2,
        seed: int = 0,
        compiled: bool = False,
        size_schedule: Sequence[int] = (),
        operations: Sequence[Operation] = (),
    ):
        self.size, self.mean, self.std, self.size_schedule = size, mean, std, size_schedule
        augmentation = augmentation or Augmentation()
        self.augmentation, self.number, self.seed = augmentation, number, seed
        self.crop = Crop(augmentation.crop_scale, augmentation.crop_ratio)
        self.operations = [*augmentation.operations(compiled), *operations]
        self.streams: dict[tuple[int, ...], list[Operation]] = {ops.FIRST_STREAM: []}
        for operation in self.operations:
            self.streams.setdefault(operation.stream, []).append(operation)
        if len({operation.name for operation in self.operations}) < len(self.operations):
            raise ValueError("operations: two have the same name; make one a subclass")

    def __call__(self, batch: Batch) -> list[Tensor]:
        """Return the views of a batch: `number` times n x C x size x size, normalised fp32.

        They are a function of the seed and the batch; the first do not depend on `number`. Crops
        from the loader's workers keep their size. Raises ValueError if an operation needs three
        channels and the images have another number.
        """
        a = self.augmentation
        if len(self.mean) != 3 and (a.gray_p or (a.jitter_p and any(a.jitter[2:]))):
            raise ValueError(
                f"saturation, hue and grayscale need three channels, not {len(self.mean)}: set "
                "jitter=(0.4, 0.4, 0.0, 0.0) and gray_p=0.0"
            )
        params, size = self.sample(batch), self.sizes_in(batch.epoch)[0]
        is_cropped = batch.images.dim() == 5
        sources = batch.images.unbind(1) if is_cropped else [batch.images] * len(params)
        return [
            self._view(images, batch.rows, one, size)
            for images, one in zip(sources, params, strict=True)
        ]

    def sizes_in(self, epoch: int) -> list[int]:
        """Return the side of each view of an image in an epoch, in pixels."""
        return [self.size_schedule[epoch] if self.size_schedule else self.size] * self.number

    def remaining_work(self, epoch: int, epochs: int) -> float:
        """Return the pixels of the views of all epochs after `epoch`, relative to this epoch's."""
        pixels = [sum(side**2 for side in self.sizes_in(i)) for i in range(epoch, epochs)]
        return sum(pixels[1:]) / pixels[0]

    def sample(self, batch: Batch) -> list[ViewParams]:
        """Draw the parameters of each view of the global batch."""
        crop = [self.crop] if batch.images.dim() == 4 else []
        number = self.number if crop else batch.images.shape[1]
        height_width = batch.images.shape[-2:]
        key = [self.seed, batch.epoch, batch.step]
        streams = [
            (np.random.default_rng([*key, *stream]), operations)
            for stream, operations in self.streams.items()
            # The crop draws from the first stream, too.
            if stream == ops.FIRST_STREAM or any(operation.p for operation in operations)
        ]
        views = []
        for _ in range(number):
            values = {op.name: op.sample(streams[0][0], batch.size, *height_width) for op in crop}
            for rng, operations in streams:
                values |= sample_stream(rng, operations, batch.size)
            active = (*crop, *(operation for operation in self.operations if operation.p))
            views.append(ViewParams(active, values))
        return views

    def _view(self, images: Tensor, rows: slice, sampled: ViewParams, size: int) -> Tensor:
        """Return one view of `images`, n x C x H x W, which are `rows` of the global batch."""
        params = sampled.to(images.device, rows)
        x = ops.Geometry(images)
        for op in sampled.operations:
            if isinstance(op, Crop):
                x = op.apply(x, params[op.name], size)
            elif isinstance(op, GeometricOperation):
                x = op.apply(x, params[op.name])
        x = x.compute()
        for op in sampled.operations:
            if not isinstance(op, Crop | GeometricOperation):
                x = op.apply(x, params[op.name])
        return ops.normalise(x, self.mean, self.std)

    def eval_transform(self, images: Tensor) -> Tensor:
        """Resize whole images to `size` and normalise them: uint8, N x C x H x W -> as a view."""
        height, width = images.shape[2:]
        if (height, width) == (self.size, self.size):
            return ops.normalise(images.float().div_(255), self.mean, self.std)
        zero = torch.zeros(len(images), device=images.device)
        rows = ops.resize_weights(zero, zero + height, height, self.size)
        columns = ops.resize_weights(zero, zero + width, width, self.size)
        return ops.normalise(ops.resample(images, rows / 255, columns), self.mean, self.std)
