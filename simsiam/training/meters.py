"""Meters: running sums of the loss and other values over an epoch's steps, kept on the device."""

import math

import torch
from torch import Tensor

from simsiam.evaluation import metrics
from simsiam.runtime import distributed


class Meters:
    """Sums over an epoch's steps by name: "loss", "finite" and `names`.

    The sums stay on the device, so that `add` never waits for the device. "finite" counts the steps
    before the first loss that was not finite.
    """

    def __init__(self, device: torch.device, *names: str):
        self.names = ("loss", "finite", *names)
        self.values = torch.zeros(len(self.names), device=device)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[self.names.index(name)]

    def add(self, **values: Tensor) -> Tensor:
        """Add one step's scalars, among them its `loss`.

        Returns a fused optimizer's `found_inf`, a scalar on the device: 1, which makes the
        optimizer skip the step, if a loss of the epoch up to this one was not finite; else 0.
        """
        for name, value in values.items():
            self[name].add_(value)
        finite = self["loss"].isfinite().float()
        self["finite"].add_(finite)
        return 1 - finite

    def means(self, count: int) -> dict[str, float]:
        """Return each sum divided by `count` (steps or images). Waits for the device."""
        return dict(zip(self.names, (self.values / count).tolist(), strict=True))

    def first_bad_step(self) -> int | None:
        """Return the first step (from 0) whose loss was not finite, or None.

        Waits for the device.
        """
        sums = self.state_dict()
        return None if math.isfinite(sums["loss"]) else int(sums["finite"])

    def clear(self) -> None:
        """Reset all sums to 0, at the start of an epoch."""
        self.values.zero_()

    def state_dict(self) -> dict[str, float]:
        """Return the sums by name. Exact: every fp32 number is a Python float."""
        return dict(zip(self.names, self.values.tolist(), strict=True))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the sums of `state_dict()`. Raises ValueError if the names differ."""
        if state.keys() != set(self.names):
            raise ValueError("its meters are not those of this command")
        self.values.copy_(torch.tensor([state[name] for name in self.names]))


class TrainMeters(Meters):
    """Meters of pre-training: also "std", of z, and "window", std since the last `pop_window`."""

    def __init__(self, device: torch.device):
        super().__init__(device, "std", "window")

    def add(self, loss: Tensor, z: Tensor) -> Tensor:
        """Add one step's loss (a scalar) and std of its embeddings z (N x d), averaged over ranks.

        Returns the optimizer's `found_inf`, as `Meters.add` does.
        """
        values = torch.stack([loss.detach(), metrics.collapse_std(z)])
        loss, std = distributed.all_reduce(values) / distributed.world_size()
        return super().add(loss=loss, std=std, window=std)

    def pop_window(self, steps: int) -> float:
        """Return the mean std of the last `steps` steps and reset it. Waits for the device."""
        std = self["window"].item() / steps
        self["window"].zero_()
        return std
