"""Names of weights in other projects' checkpoints: one table, read in both directions.

Its names begin like theirs, or like those of this program; what follows is the same in both, for
all have torchvision's names within a stage. `{a b c}` stands for one word after the other, and a
word on one side for the word at the same place on the other side.
"""

import functools
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simsiam.network import IMAGENET_ARCHS, Classifier

RESNET = "{conv1 bn1 layer1 layer2 layer3 layer4}"
MLP = "{0 1 3 4 6 7}"  # a Linear and its BN, of each layer of a head
# The names of this program, for the right-hand sides.
BACKBONE, PROJECTOR, PREDICTOR = f"backbone.{RESNET}", f"projector.{MLP}", f"predictor.{MLP}"


class Layout(NamedTuple):
    """A project's names. In each pair the first is theirs, and the second is of this program.

    `names`: how names begin. None stands for nowhere: such weights are left out. Where names of
    this program stand twice, the first pair is for the way out, and the second is read too.
    `within`: words that differ in what follows.
    `out_only`: whether files of it are written only.
    """

    names: tuple[tuple[str | None, str | None], ...]
    within: tuple[tuple[str, str], ...] = ()
    out_only: bool = False


# This program's own Linear has no bias before a BN, and so a bias tells other projects' heads.
BIAS_FREE = "projector.{0.weight 1 3.weight 4 6.weight 7}"
PATRICK_HUA = (
    (BACKBONE, BACKBONE),
    ("predictor.{layer1.0 layer1.1 layer2}", "predictor.{0 1 3}"),
    ("encoder.{0 1}", None),  # backbone and projector again
)
LIGHTLY_HEADS = (
    (f"projection_head.layers.{MLP}", PROJECTOR),
    (f"prediction_head.layers.{MLP}", PREDICTOR),
)
LAYOUTS = {  # in the order in which they are tried
    "torchvision": Layout(
        ((RESNET, BACKBONE), ("fc", "fc"), (None, "projector"), (None, "predictor"))
    ),
    "ours": Layout(
        ((BACKBONE, BACKBONE), (BIAS_FREE, BIAS_FREE), (PREDICTOR, PREDICTOR), ("fc", "fc"))
    ),
    "the authors'": Layout(
        (
            (f"module.encoder.{RESNET}", BACKBONE),
            (f"module.encoder.fc.{MLP}", PROJECTOR),
            (f"module.predictor.{MLP}", PREDICTOR),
        )
    ),
    "the authors' linear": Layout(((f"module.{RESNET}", BACKBONE), ("module.fc", "fc"))),
    "leftthomas/SimSiam": Layout(
        (
            ("f.{0 1 3 4 5 6}", BACKBONE),
            (f"g.{MLP}", PROJECTOR),
            (f"h.{MLP}", PREDICTOR),
            ("fc", "fc"),
        )
    ),
    "PatrickHua/SimSiam": Layout(
        (*PATRICK_HUA, ("projector.layer{1.0 1.1 2.0 2.1 3.0 3.1}", PROJECTOR))
    ),
    "lightly": Layout((("backbone.{0 1 4 5 6 7}", BACKBONE), *LIGHTLY_HEADS)),
    "lightly's CIFAR benchmark": Layout(
        (("backbone.{0 1 2 3 4 5}", BACKBONE), *LIGHTLY_HEADS), within=(("shortcut", "downsample"),)
    ),
    "solo-learn": Layout(
        (
            (BACKBONE, BACKBONE),
            (f"encoder.{RESNET}", BACKBONE),  # of older versions
            (PROJECTOR, PROJECTOR),
            (PREDICTOR, PREDICTOR),
            ("classifier", None),  # trained beside the encoder, on all of the labels
        )
    ),
    "mmpretrain": Layout(
        (
            (BACKBONE, BACKBONE),
            ("neck.{fc0 bn0 fc1 bn1 fc2 bn2}", PROJECTOR),
            ("head.predictor.{fc0 bn0 fc1 bn1 fc2 bn2}", PREDICTOR),
            ("head.fc", "fc"),
        )
    ),
    "PASSL": Layout(
        (
            (f"encoder.{RESNET}", BACKBONE),
            (f"encoder.fc.{MLP}", PROJECTOR),
            (f"predictor.{MLP}", PREDICTOR),
            (f"predictor.mlp.{MLP}", PREDICTOR),  # of version 1.1
        )
    ),
    "detectron2": Layout(
        (
            ("{stem.conv1 stem.conv1.norm res2 res3 res4 res5}", BACKBONE),
            (None, "projector"),
            (None, "predictor"),
            (None, "fc"),
        ),
        within=(
            ("conv{1 2 3}.norm", "bn{1 2 3}"),
            ("shortcut.norm", "downsample.1"),
            ("shortcut", "downsample.0"),
        ),
        out_only=True,
    ),
}
# PatrickHua's file for CIFAR stores three layers of the projector, and its network skips layer2.
PATRICK_HUA_CIFAR = Layout(
    (*PATRICK_HUA, ("projector.layer{1.0 1.1 3.0 3.1}", "projector.{0 1 3 4}"))
)
EXPORTS = {  # the formats of `exported`, and the layout of each
    "torchvision": "torchvision",
    "authors": "the authors'",
    "lightly": "lightly",
    "mmpretrain": "mmpretrain",
    "detectron2": "detectron2",
    "timm": "torchvision",
}
BLOCKS = {  # of layer1 to layer4, and whether they are bottlenecks
    (2, 2, 2, 2, False): "resnet18",
    (3, 4, 6, 3, False): "resnet34",
    (3, 4, 6, 3, True): "resnet50",
    (3, 4, 23, 3, True): "resnet101",
    (3, 8, 36, 3, True): "resnet152",
}


# ---- the table in use ---------------------------------------------------------------------------


def spelled(name: str) -> list[str]:
    """A name of the table with each of its words: "f.{0 1}" -> ["f.0", "f.1"]."""
    start, _, rest = name.partition("{")
    words, brace, end = rest.partition("}")
    return [start + word + end for word in words.split()] if brace else [name]


@functools.cache
def spelled_pairs(
    pairs: tuple[tuple[str | None, str | None], ...], out: bool
) -> list[tuple[str, str | None]]:
    """Pairs of the table spelled, as (from, to), longest first; to theirs if `out`."""
    found = []
    for pair in pairs:
        start, end = reversed(pair) if out else pair
        if start is not None:
            starts = spelled(start)
            ends = [None] * len(starts) if end is None else spelled(end)
            found += zip(starts, ends, strict=True)
    return sorted(found, key=lambda pair: -len(pair[0]))  # stable: of equals the first one stays


def renamed_one(name: str, layout: Layout, out: bool = False) -> str | None:
    """A name as in `renamed`, None if the layout leaves it out; KeyError if it does not know it."""
    for start, end in spelled_pairs(layout.names, out):
        if f"{name}.".startswith(f"{start}."):
            rest = name.removeprefix(start)
            for word, other in spelled_pairs(layout.within, out):
                rest = rest.replace(f".{word}.", f".{other}.")
            return None if end is None else end + rest
    raise KeyError(name)


def renamed(
    weights: dict[str, Tensor], layout: Layout, out: bool = False
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Weights of a `layout` under the names of this program or, if `out`, the other way round.

    Also the names that the layout leaves out, and those that it does not know, or has twice.
    """
    found, left, unknown = {}, [], []
    for name, value in weights.items():
        try:
            new = renamed_one(name, layout, out)
        except KeyError:
            unknown.append(name)
            continue
        if new is None:
            left.append(name)
        elif new in found:
            unknown.append(name)
        else:
            found[new] = value
    return found, left, unknown


# ---- in -----------------------------------------------------------------------------------------


def translated(
    weights: dict[str, Tensor], stem: str | None = None
) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Another project's weights under the names of this program, and what they are.

    Returns the weights, a dict of the encoder's arch, stem and width, and lines to say about them.
    `stem`: one of `STEMS`, if it is known; by default what the layout suggests.

    Each name is translated or is one that the layout leaves out. Biases before a BN are folded
    into its running mean, which changes nothing in eval mode. Raises ValueError that names what is
    unknown or missing.
    """
    weights = from_paddle(weights)
    layout, found, left = recognised(weights)
    notes = [f"layout: {layout}"]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        notes.append(f"left out, as of no use here: {', '.join(left[:3])}{more}")
    small = found["backbone.conv1.weight"].shape[-1] == 3
    if stem is not None:
        notes.append(f"taken to have the stem {stem}, as --stem says")
    else:
        stem, reason = usual_stem(layout, small)
        notes += [reason] if reason else []
    if layout == "PatrickHua/SimSiam" and "projector.6.weight" in found and small:
        found, _, _ = renamed(weights, PATRICK_HUA_CIFAR)
        notes.append("its second projector layer is left out, as in its runs on CIFAR")
    encoder = {"arch": recognised_arch(found), "stem": stem, "width": None}
    return without_bn_biases(found), encoder, notes


def from_paddle(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Paddle's arrays as PyTorch has them (its Linear weights are in x out), others as they are."""
    if not any(name.endswith("._mean") for name in weights):
        return weights
    return {
        name.replace("._mean", ".running_mean").replace("._variance", ".running_var"): (
            value.T.contiguous() if value.ndim == 2 else value
        )
        for name, value in weights.items()
    }


def recognised(weights: dict[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]]:
    """The first layout that knows all names, the weights renamed, and the names left out.

    Raises ValueError that names what the nearest layout does not know.
    """
    nearest: tuple[str, list[str]] | None = None
    for name, layout in LAYOUTS.items():
        found, left, unknown = renamed(weights, layout)
        if layout.out_only or "backbone.conv1.weight" not in found:
            continue
        if not unknown:
            return name, found, left
        if nearest is None or len(unknown) < len(nearest[1]):
            nearest = name, unknown
    if nearest is None:
        raise ValueError("its weights are not those of a ResNet in a layout that is known")
    name, unknown = nearest
    some = ", ".join(unknown[:5]) + ", ..." * (len(unknown) > 5)
    raise ValueError(f"its names are like those of {name}, but for {some}")


def usual_stem(layout: str, small: bool) -> tuple[str, str | None]:
    """The stem of a project's networks, and what to say of it. `small`: whether conv1 is 3x3."""
    if small and layout == "solo-learn":
        reason = "its names cannot tell conv1's padding: taken for solo-learn's, 2 (--stem)"
        return "cifar_pad2", reason
    if layout == "lightly's CIFAR benchmark":
        return "cifar_no_relu", "taken to have no ReLU after bn1, as that benchmark (--stem)"
    return "cifar" if small else "imagenet", None


def recognised_arch(weights: dict[str, Tensor]) -> str:
    """The torchvision ResNet that has these blocks. Raises ValueError where none has."""
    blocks = [0] * 4
    for name in weights:
        match = re.match(r"backbone\.layer([1-4])\.(\d+)\.", name)
        if match:
            stage, block = int(match[1]) - 1, int(match[2])
            blocks[stage] = max(blocks[stage], block + 1)
    arch = BLOCKS.get((*blocks, "backbone.layer1.0.conv3.weight" in weights))
    if arch is None:
        known = ", ".join(IMAGENET_ARCHS)
        raise ValueError(f"its backbone, of {blocks} blocks, is none of {known}")
    return arch


def without_bn_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in eval mode without a bias before a BN of the heads, and with BN's counters."""
    found = dict(weights)
    for name in weights:
        bn, _, value = name.rpartition(".")
        if value != "running_mean":
            continue
        head, _, place = bn.rpartition(".")
        bias = f"{head}.{int(place) - 1}.bias" if place.isdigit() else None
        fits = bias in found and found[bias].shape == found[name].shape  # else refused later on
        if fits and not head.startswith("backbone"):
            found[name] = found[name] - found.pop(bias)
        found.setdefault(f"{bn}.num_batches_tracked", torch.tensor(0))
    return found


# ---- out ----------------------------------------------------------------------------------------


def exported(net: nn.Module, encoder: dict, to: str) -> dict[str, Tensor]:
    """The weights of a SimSiam or Classifier under the names of another project, for `EXPORTS`.

    `encoder`: its arch and stem. Raises ValueError where that project has no such network.
    """
    weights, layout = net.state_dict(), EXPORTS[to]
    refuse_other_encoders(encoder["arch"], encoder["stem"], to)
    if isinstance(net, Classifier):
        if to == "lightly":
            raise ValueError("lightly has no names for a linear classifier: choose timm")
        if to == "authors":
            layout = "the authors' linear"
    else:
        refuse_other_heads(weights, to)
        if to == "authors":  # theirs has a bias there, which does not matter before a BN
            weights["projector.6.bias"] = torch.zeros_like(weights["projector.7.running_mean"])
    found, _, unknown = renamed(weights, LAYOUTS[layout], out=True)
    if unknown:
        raise ValueError(f"{to} has no name for {unknown[0]}")
    return found


def refuse_other_encoders(arch: str, stem: str, to: str) -> None:
    """Raises ValueError where the project `to` has no such backbone."""
    if arch not in IMAGENET_ARCHS:
        raise ValueError(f"{to} has no {arch}: choose safetensors or onnx")
    if stem != "imagenet" and to in ("torchvision", "detectron2"):
        raise ValueError(
            f"{to}'s {arch} has another stem (7x7 conv1, max-pool) than this one's, {stem}: choose "
            "timm, for its names with this conv1, or safetensors or onnx"
        )


def refuse_other_heads(weights: dict[str, Tensor], to: str) -> None:
    """Raises ValueError where the project `to` has no such projector or predictor."""
    if to in ("authors", "mmpretrain") and "projector.6.weight" not in weights:
        raise ValueError(f"{to}'s projector has three layers, this one does not")
    strange = r"projector\.[036]\.bias|predictor\.0\.bias|predictor\.4\..+"
    alone = "projector.0.weight" in weights and "predictor.0.weight" not in weights
    if to in ("authors", "lightly", "mmpretrain") and (
        alone or any(re.fullmatch(strange, name) for name in weights)
    ):
        raise ValueError(
            f"{to}'s SimSiam has other heads than this one, by --bn or --predictor: choose timm or "
            "torchvision, for the encoder alone, or safetensors"
        )
