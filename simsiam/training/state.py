"""TrainState: the objects that a training run changes in each step, with one state_dict."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simsiam.data.loader import Loader
from simsiam.runtime import distributed
from simsiam.training import checkpoint
from simsiam.training.meters import Meters
from simsiam.training.probe import Probe
from simsiam.views.augment import Views

ADAMW = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's state of a parameter


@dataclasses.dataclass
class TrainState:
    """The objects of a training run.

    `net`: the network, whose weights a checkpoint stores. `model`: `net` as the loop calls it,
    compiled or distributed. `lr_at`: the learning rate after a number of epochs. `epoch`, `step`:
    finished epochs, and finished steps of the current one.
    """

    net: nn.Module
    optimizer: Optimizer
    loader: Loader
    meters: Meters
    lr_at: Callable[[float], float]
    model: nn.Module | None = None
    views: Views | None = None
    autocast: torch.autocast | None = None
    scaler: torch.amp.GradScaler | None = None
    probe: Probe | None = None
    epoch: int = 0
    step: int = 0

    def state_dict(self) -> dict[str, object]:
        """Return the entries of a checkpoint with which a run resumes at the same bits."""
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "meters": self.meters.state_dict(),
            "probe": self.probe.state_dict() if self.probe else {},
            "epoch": self.epoch,
            "step": self.step,
        }

    def load_state_dict(self, state: dict) -> None:
        """Load all but the weights of `net`, which come with the network of a checkpoint.

        Raises ValueError for values that do not fit the network, the optimizer or the loader.
        """
        steps, epochs = len(self.loader), state["config"].epochs
        if state["epoch"] + (state["step"] > 0) > epochs or state["step"] > steps:
            raise ValueError("its epoch and step are beyond the end of the run")
        load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler is not None:
            load_scaler(self.scaler, state["scaler"])
        self.meters.load_state_dict(state["meters"])
        if self.probe is not None:
            self.probe.load_state_dict(state["probe"])
        self.epoch, self.step = state["epoch"], state["step"]
        here = checkpoint.environment(self.net)
        if state["environment"] != here:
            distributed.log(
                f"note: the checkpoint is of {state['environment']}, and this is {here}: from here "
                "on the last bits may differ"
            )


def load_optimizer(optimizer: Optimizer, saved: dict) -> None:
    """Load the momentum of a checkpoint; the hyperparameters stay those of the config.

    Raises ValueError if it does not fit the parameters.
    """
    state = saved.get("state")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fits = isinstance(state, dict) and state.keys() <= set(range(len(parameters)))
    for i, entries in state.items() if fits else ():
        fits = fits and fits_parameter(optimizer, entries, parameters[i])
    if not fits:
        raise ValueError("its optimizer does not fit its network")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def fits_parameter(optimizer: Optimizer, entries: object, parameter: Tensor) -> bool:
    """Return whether `entries` can be the optimizer's state of a parameter."""
    if not isinstance(entries, dict):
        return False
    entries, names = dict(entries), {"momentum_buffer"}
    is_muon = "fallback_lr_scale" in optimizer.defaults  # timm's, with NAdamW for vectors
    if is_muon:
        uses_muon = entries.pop("use_muon", None)
        if type(uses_muon) is not bool or (uses_muon and parameter.dim() < 2):
            return False
        names = names if uses_muon else ADAMW
    elif isinstance(optimizer, torch.optim.AdamW):
        names = ADAMW
    elif entries == {"momentum_buffer": None}:  # before the first step
        return True
    return entries.keys() == names and all(
        isinstance(value, Tensor)
        and (value.numel() == 1 if name == "step" else value.shape == parameter.shape)
        and (name == "step" or value.dtype == parameter.dtype)
        and bool(value.isfinite().all())
        for name, value in entries.items()
    )


def load_scaler(scaler: torch.amp.GradScaler, saved: dict) -> None:
    """Load the loss scale of a run in fp16. Raises ValueError if it is missing."""
    expected = scaler.state_dict()
    if saved.keys() != expected.keys() or not all(value >= 0 for value in saved.values()):
        raise ValueError("its loss scale is not one of a run in this precision")
    scaler.load_state_dict(saved)
