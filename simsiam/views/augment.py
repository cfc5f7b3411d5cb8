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

    `operations`: in the order in which they are applied. `values`: by an operation's name, the
    parameters of `Operation.sample`, and `on`, to which images it applies.
    """

    operations: tuple[Crop | Operation, ...]
    values: dict[str, Params]

    def __getitem__(self, name: str) -> Params:
        """Return the parameters of an operation by its name."""
        return self.values[name]

    def to(self, device: torch.device, rows: slice) -> dict[str, Params]:
        """Copy the parameters of some rows to a device, in a single transfer."""
        params = {name: of_operation.copy() for name, of_operation in self.values.items()}
        columns = [
            (name, key, value[rows])
            for name, of_operation in params.items()
            for key, value in of_operation.items()
            if isinstance(value, np.ndarray)
        ]
        if not columns:
            return params
        parts = [value.reshape(len(value), -1) for *_, value in columns]
        packed = torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))
        if device.type == "cuda":  # the host does not wait; MPS would copy from freed memory
            packed = packed.pin_memory().to(device, non_blocking=True)
        split = packed.to(device).split([part.shape[1] for part in parts], dim=1)
        for (name, key, value), part in zip(columns, split, strict=True):
            part = part.view(value.shape)
            params[name][key] = part > 0 if value.dtype == bool else part
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
        self.streams: dict[tuple[int, ...], list[Operation]] = {}
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
        sampled, size = self.sample(batch), self.size_in(batch.epoch)
        is_cropped = batch.images.dim() == 5
        sources = batch.images.unbind(1) if is_cropped else [batch.images] * len(sampled)
        return [
            self._view(images, batch.rows, params, size)
            for images, params in zip(sources, sampled, strict=True)
        ]

    def size_in(self, epoch: int) -> int:
        """Return the side of the views in an epoch, in pixels."""
        return self.size_schedule[epoch] if self.size_schedule else self.size

    def remaining_work(self, epoch: int, epochs: int) -> float:
        """Return the pixels of the views of all epochs after `epoch`, relative to this epoch's."""
        return sum((self.size_in(i) / self.size_in(epoch)) ** 2 for i in range(epoch + 1, epochs))

    def sample(self, batch: Batch) -> list[ViewParams]:
        """Draw the parameters of each view of the global batch."""
        *_, height, width = batch.images.shape
        is_cropped = batch.images.dim() == 5
        active = [] if is_cropped else [self.crop]
        active += [operation for operation in self.operations if operation.p]
        key = [self.seed, batch.epoch, batch.step]
        rngs = {stream: np.random.default_rng([*key, *stream]) for stream in self.streams}
        views = []
        for _ in range(batch.images.shape[1] if is_cropped else self.number):
            values = {}
            if not is_cropped:
                rng = rngs[ops.FIRST_STREAM]
                values[self.crop.name] = self.crop.sample(rng, batch.size, height, width)
            # Operations that never apply draw, too: their stream's other draws depend on it.
            for stream, operations in self.streams.items():
                values |= sample_stream(rngs[stream], operations, batch.size)
            views.append(ViewParams(tuple(active), {op.name: values[op.name] for op in active}))
        return views

    def _view(self, images: Tensor, rows: slice, sampled: ViewParams, size: int) -> Tensor:
        """Return one view of `images`, n x C x H x W, which are `rows` of the global batch."""
        params = sampled.to(images.device, rows)
        geometric = [op for op in sampled.operations if isinstance(op, Crop | GeometricOperation)]
        x = ops.Geometry(images, size)
        for op in geometric:
            op.apply(x, params[op.name])
        x = x.compute()
        for op in sampled.operations:
            if op not in geometric:
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
