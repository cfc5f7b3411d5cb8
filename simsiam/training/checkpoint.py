"""Checkpoints: the one place for what a checkpoint of a run holds, and how it is read back."""

import io
import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simsiam.data.arrays import MAX_CHANNELS
from simsiam.models.backbones import backbone
from simsiam.models.classifier import Classifier
from simsiam.models.methods import build_model
from simsiam.models.simsiam import SimSiam
from simsiam.runtime import distributed, reader
from simsiam.runtime.files import RunError, atomic_write
from simsiam.training.recipes import flags_of
from simsiam.views.augment import Augmentation

VERSION = 2
# What `<run>_model.pth` holds: plain tensors and Python types only. torch.load reads it with
# weights_only=True, too.
FORMAT = {
    "version": (int, f"{VERSION}: of this format; another one is refused"),
    "command": (str, "main.py or linear.py, whichever wrote it"),
    "model": (dict, "the network's state_dict: backbone.*, projector.*, predictor.*, or fc.*"),
    "optimizer": (dict, "the optimizer's state_dict"),
    "args": (dict, "the value of each flag"),
    "encoder": (dict, "the backbone's arch, stem and width; its images' image_size, mean and std"),
    "augmentation": (dict, "the fields of simsiam.views.Augmentation"),
    "images_crc": (int, "a checksum of the training images"),
    "classes": (list, "their classes' names"),
    "epoch": (int, "epochs that are finished"),
    "step": (int, "steps that are finished in the epoch after them"),
    "tally": (dict, "the sums over these steps, by name"),
    "seconds": (float, "what these steps took"),
    "history": (list, "a dict for each row of the statistics"),
    "facts": (dict, "what a run found out, and keeps: the step of a collapse, a chosen lr, ..."),
    "made_on": (dict, "device, threads, versions, ...: what the last bits depend on"),
    "probe": (dict, "the tensors of main.py's online probe, by name; without one it is empty"),
}
# Flags that are newer than this version, with what was done before there were any.
OF_READING = {"exif": False, "background": "none", "exclude": None, "levels": None}
BEFORE = {
    "main.py": OF_READING | {"probe": False, "optimizer": "sgd", "channels": 3},
    "linear.py": OF_READING,
}
# What newer fields of the augmentation are in a checkpoint that has none.
OF_AUGMENTATION = {"vflip_p": 0.0, "rotate90_p": 0.0, "solarize_p": 0.0}


class NotOursError(ValueError):
    """A file that is damaged, or not a checkpoint of this program."""


def save(path: str, previous: str | None, net: nn.Module, optimizer: Optimizer, **state) -> None:
    """Write a checkpoint of `FORMAT`; the one before it stays as `previous`.

    `state`: what of FORMAT is not of the network and the optimizer. Only the first rank writes.
    Raises RunError where the file cannot be written or the weights are not finite: then the
    checkpoint before stays.
    """
    if distributed.rank() > 0:
        return
    weights, probe = on_cpu(net.state_dict()), on_cpu(state["probe"])
    if not all(value.isfinite().all() for value in (*weights.values(), *probe.values())):
        raise RunError(f"the weights are not finite; {path} keeps those before. {DIVERGED}")
    state |= {
        "version": VERSION,
        "model": weights,
        "probe": probe,
        "optimizer": on_cpu(optimizer.state_dict()),
        "made_on": environment(net),
    }
    content = io.BytesIO()  # whole in memory first: torch.save hides why a write failed
    torch.save({name: state[name] for name in FORMAT}, content)
    try:
        with atomic_write(path, previous) as file:
            file.write(content.getbuffer())
    except OSError as error:
        before = "the checkpoint before it is intact: mend that, and give the same command with"
        before += " --resume"
        if not os.path.exists(path):
            before = "there is none before it: mend that, and give the same command"
        raise RunError(f"{path}: could not be written ({error.strerror}); {before}") from error


def on_cpu(state: object) -> object:
    """A state_dict whose tensors are on the CPU, where any machine can load them."""
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {name: on_cpu(value) for name, value in state.items()}
    return state


DIVERGED = (
    "--resume would only meet it again: try a lower --lr, --warmup_epochs 10 or --amp off, under "
    "another --name or with --overwrite"
)


def environment(net: nn.Module) -> dict:
    """What the last bits of a run depend on, besides its flags."""
    device = next(net.parameters()).device
    found = {"device": device.type, "threads": torch.get_num_threads()}
    found |= {"torch": str(torch.__version__)}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device)}
        found |= {"cudnn": torch.backends.cudnn.version()}
    return found | ({"ranks": distributed.world_size()} if distributed.world_size() > 1 else {})


def load(path: str | Path) -> dict:
    """Return what `save` wrote, its tensors on the CPU; no code of the file is run.

    Raises FileNotFoundError, or as `parse`; the message names the file.
    """
    try:
        state = reader.read(path)
    except ValueError as error:
        raise NotOursError(f"{path}: {NOT_OURS}") from error
    try:
        return parse(state)
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from error


NOT_OURS = "is damaged, or not a checkpoint of this program"


def parse(state: object) -> dict:
    """Validate a value from `reader.read` as a checkpoint of `FORMAT`; fill in its newer parts.

    Raises NotOursError for another value; ValueError for another VERSION. Neither names the file.
    """
    if isinstance(state, dict) and state.keys() >= {"version", "model", "args", "history"}:
        version = state["version"]
        if type(version) is int and version != VERSION:
            raise ValueError(
                f"has version {version} of the format, and this program reads {VERSION}: "
                "take its weights with main.py --init"
            )
    if isinstance(state, dict):
        state.setdefault("probe", {})  # newer than this version, too
    if not well_formed(state):
        raise NotOursError(NOT_OURS)
    for name, value in BEFORE[state["command"]].items():
        state["args"].setdefault(name, value)
    state["augmentation"] = OF_AUGMENTATION | state["augmentation"]
    return state


def arguments(state: dict) -> dict:
    """The flags of a checkpoint that is `check_resumable`.

    Those of the views are what the run began with, whatever a recipe has become since, and also of
    a run from before there were such flags. linear.py has no flags for its views.
    """
    if state["command"] != "main.py":
        return state["args"]
    args = state["args"] | flags_of(Augmentation.read(state["augmentation"]))
    measured = [name for name in ("mean", "std") if args.get(name) == "auto"]
    return args | {n: state["encoder"][n] for n in ("mean", "std") if n not in measured}


def well_formed(state: object) -> bool:
    """Whether a checkpoint has the parts of `FORMAT`, each of its type."""
    return (
        isinstance(state, dict)
        and all(isinstance(state.get(name), kind) for name, (kind, _) in FORMAT.items())
        and not any(isinstance(state[name], bool) for name in FORMAT)
        and state["command"] in ("main.py", "linear.py")
        and min(state["epoch"], state["step"]) >= 0
        and math.isfinite(state["seconds"])
        and all(isinstance(key, str) for key in (*state["model"], *state["args"]))
        and all(map(is_flag, state["args"].values()))
        and isinstance(state["args"].get("data_name"), str)
        and all(isinstance(value, Tensor) for value in state["model"].values())
        and all(isinstance(value, Tensor) for value in state["probe"].values())
        and bool(state["probe"]) == (state["args"].get("probe") is True)
        and all(isinstance(name, str) for name in state["classes"])
        and is_history(state["history"], state["epoch"], state["command"] == "linear.py")
        and all(is_number(value) and math.isfinite(value) for value in state["facts"].values())
        and all(type(value) is float and math.isfinite(value) for value in state["tally"].values())
    )


def is_number(value: object) -> bool:
    """An int or a float, but no bool."""
    return type(value) in (int, float)


def is_flag(value: object) -> bool:
    """What the flag of a run can be: a word of it cannot be taken for another flag."""
    if isinstance(value, list | tuple):
        return all(is_number(one) or (isinstance(one, str) and one[:1] != "-") for one in value)
    return value is None or isinstance(value, bool | str) or is_number(value)


def is_history(rows: list, epoch: int, linear: bool) -> bool:
    """A row of numbers an epoch, also for epoch 0 unless `linear`."""
    return len(rows) == epoch + (not linear) and all(
        isinstance(row, dict) and all(map(is_number, row.values())) and row.get("epoch") == i
        for i, row in enumerate(rows, int(linear))
    )


def load_strictly(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """A checkpoint's weights as the parameters and buffers of `net`, which may be on `meta`.

    Raises ValueError naming what is missing, strange, misshapen or not finite.
    """
    ours = net.state_dict()
    for name in sorted(ours.keys() ^ weights.keys()):
        raise ValueError(f"its weights do not fit its arguments: {name}")
    for name, value in weights.items():
        if (value.shape, value.dtype) != (ours[name].shape, ours[name].dtype):
            raise ValueError(f"its weights do not fit its arguments: shape of {name}")
        if not value.isfinite().all():
            raise ValueError(f"its weights are not finite: {name}")
    net.load_state_dict(weights, assign=True)


def network(state: dict) -> SimSiam | Classifier:
    """The network in a checkpoint: main.py's SimSiam, or linear.py's Classifier.

    It is built on `meta`, so that nothing is allocated at a size that only the arguments claim.
    Raises ValueError where weights and arguments differ.
    """
    encoder, args = read_encoder(state["encoder"]), state["args"]
    try:
        with torch.device("meta"):
            if state["command"] == "linear.py":
                body, features = backbone(*backbone_args(encoder))
                net = Classifier(body, features, len(state["classes"]))
            elif args["projector_layers"] not in range(1, 9):
                raise ValueError(f"its arguments claim {args['projector_layers']} projector layers")
            else:
                net = build_model(args | encoder | {"channels": len(encoder["mean"])})
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"its arguments are not {state['command']}'s: {error}") from error
    load_strictly(net, state["model"])
    return net


ENCODER = ("arch", "stem", "width", "image_size", "mean", "std")


def backbone_args(encoder: dict) -> tuple[str, str, int | None, int]:
    """The arguments of `backbone`: mean and std tell how many channels there are."""
    return encoder["arch"], encoder["stem"], encoder["width"], len(encoder["mean"])


def read_encoder(encoder: dict) -> dict:
    """What a checkpoint says of its encoder: `ENCODER`'s names. Raises ValueError if it cannot be.

    Its network's arguments are looked through where the network is built.
    """
    if encoder.keys() != set(ENCODER):
        raise ValueError("its encoder is not one of this program")
    size, mean, std = encoder["image_size"], encoder["mean"], encoder["std"]
    fits = all(
        isinstance(several, list | tuple)
        and 1 <= len(several) <= MAX_CHANNELS
        and all(type(value) is float and math.isfinite(value) for value in several)
        for several in (mean, std)
    )
    fits = fits and len(mean) == len(std) and min(std) > 0
    if type(size) is not int or not 1 <= size <= 1024 or not fits:
        raise ValueError("its image size or normalisation is not one of this program")
    return encoder


def check_resumable(state: dict) -> None:
    """Raises ValueError where a run cannot go on, or its end not be told, from a checkpoint."""
    read_encoder(state["encoder"])
    Augmentation.read(state["augmentation"])
    scores = {"test_acc@1", "test_acc@5"}
    # A kNN is not in each epoch, nor is the test of a network that is tuned.
    frozen = state["command"] == "linear.py" and state["args"].get("finetune") is not True
    whole = (2,) if frozen else (0, 2)
    for row in state["history"]:
        if row["epoch"] and not ("seconds" in row and len(row.keys() & scores) in whole):
            raise ValueError(f"its history lacks numbers of epoch {row['epoch']}")


ADAMW = {"step", "exp_avg", "exp_avg_sq"}  # what it keeps of a parameter


def fits_optimizer(optimizer: Optimizer, kept: object, parameter: Tensor) -> bool:
    """Whether an optimizer can have kept this, a dict, of a parameter."""
    names, kept = {"momentum_buffer"}, dict(kept) if isinstance(kept, dict) else {}
    muon = "fallback_lr_scale" in optimizer.defaults  # timm's, with NAdamW for vectors
    if muon:
        orthogonal = kept.pop("use_muon", None)
        if type(orthogonal) is not bool or (orthogonal and parameter.dim() < 2):
            return False
        names = names if orthogonal else ADAMW
    elif isinstance(optimizer, torch.optim.AdamW):
        names = ADAMW
    if "step" in names and not (isinstance(kept.get("step"), Tensor) and kept["step"].numel() == 1):
        return False
    shapes = dict.fromkeys(names, parameter) | {"step": kept.get("step")}
    return kept.keys() == names and all(
        (value is None and name == "momentum_buffer" and not muon)  # before the first step
        or (
            isinstance(value, Tensor)
            and (value.shape, value.dtype) == (shapes[name].shape, shapes[name].dtype)
            and bool(value.isfinite().all())
        )
        for name, value in kept.items()
    )


def restore(optimizer: Optimizer, state: dict, net: nn.Module) -> None:
    """The momentum of a checkpoint; says so where the machine is another one.

    Raises ValueError where it does not fit the parameters.
    """
    mine, saved = optimizer.state_dict(), state["optimizer"].get("state")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fits = isinstance(saved, dict) and saved.keys() <= set(range(len(parameters)))
    for i, kept in saved.items() if fits else ():
        fits = fits and fits_optimizer(optimizer, kept, parameters[i])
    if not fits:
        raise ValueError("its optimizer does not fit its network")
    optimizer.load_state_dict(mine | {"state": saved})
    if state["made_on"] != environment(net):
        distributed.log(
            f"note: made on {state['made_on']}, now {environment(net)}: the last bits may "
            "differ from here on"
        )


# Facts of a run in fp16, and what a GradScaler calls them.
SCALE = {"scale": "scale", "scale_steps": "_growth_tracker"}


def scale(scaler: torch.amp.GradScaler | None) -> dict:
    """By what a scaler multiplies gradients, and for how many steps already: facts of a run."""
    state = scaler.state_dict() if scaler else {}
    return {name: state[of] for name, of in SCALE.items() if state}


def restore_scale(scaler: torch.amp.GradScaler | None, facts: dict) -> None:
    """Take what `scale` gave. Raises ValueError where it is missing."""
    if scaler and scaler.is_enabled():
        if not SCALE.keys() <= facts.keys():
            raise ValueError("is damaged, or not a checkpoint of a run in fp16")
        saved = {of: facts[name] for name, of in SCALE.items()}
        scaler.load_state_dict(scaler.state_dict() | saved)
