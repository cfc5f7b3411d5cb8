"""Checkpoints: the entries of `<run>_model.pth`, writing, and reading with validation."""

import io
import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from simsiam.data.arrays import MAX_CHANNELS
from simsiam.models.backbones import build_backbone
from simsiam.models.classifier import Classifier
from simsiam.models.methods import build_model
from simsiam.models.simsiam import SimSiam
from simsiam.runtime import distributed, reader
from simsiam.runtime.config import Number, Several
from simsiam.runtime.files import RunError, atomic_write, error_prefix
from simsiam.training.recipes import LinearConfig, PretrainConfig

VERSION = 3
# The entries of a checkpoint: plain tensors and Python types only, so that
# torch.load(weights_only=True) reads it too.
FORMAT = {
    "version": (int, f"{VERSION}, of this format; another one is refused"),
    "command": (str, "main.py or linear.py, the command that wrote it"),
    "config": (dict, "the value of each flag, `auto` and defaults resolved"),
    "encoder": (dict, "the backbone's arch, stem and width; its images' image_size, mean and std"),
    "classes": (list, "names of the training images' classes"),
    "images_checksum": (int, "CRC of the training images, or of their files' names"),
    "model": (dict, "the network's state_dict: backbone.*, projector.*, predictor.*, or fc.*"),
    "optimizer": (dict, "the optimizer's state_dict"),
    "scaler": (dict, "the GradScaler's state_dict; empty except in fp16"),
    "meters": (dict, "sums over the steps of the current epoch, by name"),
    "probe": (dict, "the online probe's state_dict; empty without a probe"),
    "epoch": (int, "finished epochs"),
    "step": (int, "finished steps of the current epoch"),
    "seconds": (float, "seconds spent on the current epoch"),
    "history": (list, "a dict per row of the statistics"),
    "extra": (
        dict,
        "numbers that a resumed run needs: the step of a collapse, a chosen lr",
    ),
    "environment": (dict, "device, threads and versions, on which the last bits of a run depend"),
}
CONFIGS = {"main.py": PretrainConfig, "linear.py": LinearConfig}
ENCODER = ("arch", "stem", "width", "image_size", "mean", "std")

DIVERGED = (
    "--resume would end in the same way: try a lower --lr, --warmup_epochs 10 or --amp off, under "
    "another --name or with --overwrite"
)


class NotOursError(ValueError):
    """A file that is damaged, or not a checkpoint of this program."""

    def __init__(self, message: str = "is damaged, or not a checkpoint of this program"):
        super().__init__(message)


# ---- writing ------------------------------------------------------------------------------------


def save(path: str, previous: str | None, state: dict) -> None:
    """Write a checkpoint, on rank 0; the checkpoint that it replaces is moved to `previous`.

    `state`: the entries of FORMAT, except for the version. Raises RunError, and leaves an existing
    file, if the new one cannot be written or if a weight is not finite.
    """
    if distributed.rank() > 0:
        return
    state = to_cpu(state) | {"version": VERSION}
    for value in (*state["model"].values(), *state["probe"].values()):
        if not is_finite(value):
            raise RunError(f"the weights are not finite; {path} is from before. {DIVERGED}")
    content = io.BytesIO()  # whole in memory first: torch.save hides why a write failed
    torch.save({name: state[name] for name in FORMAT}, content)
    try:
        with atomic_write(path, previous) as file:
            file.write(content.getbuffer())
    except OSError as error:
        before, resume = "there is no previous one", ""
        if os.path.exists(path):
            before, resume = "the previous one is intact", " with --resume"
        raise RunError(
            f"{path}: could not be written ({error.strerror}); {before}: free the path, and give "
            f"the same command{resume}"
        ) from error


def to_cpu(state: object) -> object:
    """Return a state_dict with its tensors on the CPU, where any machine can load them."""
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {name: to_cpu(value) for name, value in state.items()}
    return state


def environment(net: nn.Module) -> dict[str, object]:
    """Return the environment that affects bitwise results."""
    device = next(net.parameters()).device
    values = {"device": device.type, "threads": torch.get_num_threads()}
    values["torch"] = str(torch.__version__)
    if device.type == "cuda":
        values["gpu"] = torch.cuda.get_device_name(device)
        values["cudnn"] = torch.backends.cudnn.version()
    if distributed.world_size() > 1:
        values["ranks"] = distributed.world_size()
    return values


# ---- reading ------------------------------------------------------------------------------------


def load(path: str | Path) -> dict:
    """Return a checkpoint, its tensors on the CPU; no code of the file is run.

    Raises FileNotFoundError, and ValueError, which names the file, as `reader.read` and `parse`.
    """
    with error_prefix(str(path)):
        return parse(reader.read(path))


def parse(value: object) -> dict:
    """Validate a value from `reader.read` as a checkpoint; its `config` becomes a Config.

    Raises NotOursError for another value; ValueError for one of another version, or with settings
    that cannot be. The message does not name the file.
    """
    if isinstance(value, dict) and value.keys() >= {"version", "model", "history"}:
        version = value["version"]
        if type(version) is int and version != VERSION:
            raise ValueError(
                f"has version {version} of the format, and this program reads {VERSION}: take its "
                "weights with main.py --init"
            )
    if not is_well_formed(value):
        raise NotOursError()
    config = CONFIGS[value["command"]].from_dict(value["config"])
    encoder = check_encoder(value["encoder"])
    if isinstance(config, PretrainConfig):
        if any(encoder[name] != getattr(config, name) for name in ("arch", "stem", "width")):
            raise ValueError("its encoder is not that of its settings")
        is_consistent = bool(value["probe"]) == (config.probe is True)
    else:
        is_tested = all("test_acc@1" in row for row in value["history"])
        is_consistent = not value["probe"] and (config.finetune or is_tested)
    if not is_consistent:
        raise NotOursError()
    return value | {"config": config}


def is_well_formed(value: object) -> bool:
    """Return whether a value has the entries of FORMAT, each of its type and of plain values."""
    return (
        isinstance(value, dict)
        and all(type(value.get(name)) is kind for name, (kind, _) in FORMAT.items())
        and value["command"] in CONFIGS
        and min(value["epoch"], value["step"]) >= 0
        and math.isfinite(value["seconds"])
        and all(isinstance(name, str) for name in (*value["model"], *value["classes"]))
        and all(
            isinstance(one, Tensor) for one in (*value["model"].values(), *value["probe"].values())
        )
        and is_history(value["history"], value["epoch"], value["command"])
        and all(
            is_number(one) and math.isfinite(one)
            for one in (*value["extra"].values(), *value["scaler"].values())
        )
        and all(type(one) is float and math.isfinite(one) for one in value["meters"].values())
    )


def is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite; a finite sum, ten times as fast, proves it."""
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def is_number(value: object) -> bool:
    """Return whether a value is an int or a float, and no bool."""
    return type(value) in (int, float)


def is_history(rows: list, epochs: int, command: str) -> bool:
    """Return whether there is a row of numbers per epoch, and for main.py one of epoch 0.

    An epoch has both accuracies or none.
    """
    first = int(command == "linear.py")
    return len(rows) == epochs + 1 - first and all(
        isinstance(row, dict)
        and all(map(is_number, row.values()))
        and row.get("epoch") == i
        and (i == 0 or ("seconds" in row and ("test_acc@1" in row) == ("test_acc@5" in row)))
        for i, row in enumerate(rows, first)
    )


def check_encoder(encoder: dict) -> dict:
    """Return a checkpoint's `encoder` if it has the entries of ENCODER. Raises ValueError.

    The arguments of the backbone are checked when it is built.
    """
    if encoder.keys() != set(ENCODER):
        raise ValueError("its encoder is not one of this program")
    size, mean, std = encoder["image_size"], encoder["mean"], encoder["std"]
    with error_prefix("its image size or normalisation"):
        Number(int, 1, 1024).check(size)
        Several(Number(float)).check(tuple(mean) if isinstance(mean, list) else mean)
        Several(Number(float, 1e-12)).check(tuple(std) if isinstance(std, list) else std)
        if not len(mean) == len(std) <= MAX_CHANNELS:
            raise ValueError(f"must be of 1 to {MAX_CHANNELS} channels")
    return encoder


# ---- the network in a checkpoint ----------------------------------------------------------------


def backbone_args(encoder: dict) -> tuple[str, str, int | None, int]:
    """Return the arguments of `build_backbone`; there is a mean per channel."""
    return encoder["arch"], encoder["stem"], encoder["width"], len(encoder["mean"])


def network(state: dict) -> SimSiam | Classifier:
    """Return the network in a checkpoint: main.py's SimSiam, or linear.py's Classifier.

    The network is built on the meta device: no memory is allocated for sizes that the settings
    claim and the weights lack. Raises ValueError if weights and settings differ.
    """
    encoder, config = state["encoder"], state["config"]
    try:
        with torch.device("meta"):
            if state["command"] == "linear.py":
                body, features = build_backbone(*backbone_args(encoder))
                net = Classifier(body, features, len(state["classes"]))
            else:
                net = build_model(vars(config))
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"its settings are not {state['command']}'s: {error}") from error
    load_strictly(net, state["model"])
    return net


def load_strictly(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights into `net`, which may be on the meta device.

    Raises ValueError naming the weight that is missing, unknown, misshapen or not finite.
    """
    expected = net.state_dict()
    for name in sorted(expected.keys() ^ weights.keys()):
        raise ValueError(f"its weights do not fit its settings: {name}")
    for name, value in weights.items():
        if (value.shape, value.dtype) != (expected[name].shape, expected[name].dtype):
            raise ValueError(f"its weights do not fit its settings: shape of {name}")
        if not is_finite(value):
            raise ValueError(f"its weights are not finite: {name}")
    net.load_state_dict(weights, assign=True)
