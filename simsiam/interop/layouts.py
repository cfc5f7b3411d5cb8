"""Names of weights in other projects' checkpoints: one table, read in both directions.

Its names begin like theirs, or like those of this program; what follows is the same in both, for
all have torchvision's names within a stage. `{a b c}` stands for one word after the other, and a
word on one side for the word at the same place on the other side.
"""

import functools
import re
from typing import NamedTuple

import torch
from torch import Tensor

from simsiam.models.backbones import IMAGENET_ARCHS
from simsiam.views.augment import NORMALISATION

RESNET = "{conv1 bn1 layer1 layer2 layer3 layer4}"
MLP = "{0 1 3 4 6 7}"  # a Linear and its BN, of each layer of a head
# The names of this program, for the right-hand sides.
BACKBONE, PROJECTOR, PREDICTOR = f"backbone.{RESNET}", f"projector.{MLP}", f"predictor.{MLP}"


class Layout(NamedTuple):
    """A project's names. In each pair the first is theirs, and the second is of this program.

    `names`: how names begin. None stands for nowhere: such weights are left out. Where names of
    this program stand twice, the first pair is for the way out, and the second is read too.
    `within`: words that differ in what follows.
    `normalisation`: mean and std of its images, if it has one for all; None: those of the stem.
    `out_only`: whether files of it are written only.
    """

    names: tuple[tuple[str | None, str | None], ...]
    within: tuple[tuple[str, str], ...] = ()
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    out_only: bool = False


# This program's own Linear has no bias before a BN, and so a bias tells other projects' heads.
BIAS_FREE = "projector.{0.weight 1 3.weight 4 6.weight 7}"
LIGHTLY = (
    (f"projection_head.layers.{MLP}", PROJECTOR),
    (f"prediction_head.layers.{MLP}", PREDICTOR),
    (f"projection_mlp.layers.{MLP}", PROJECTOR),  # of lightly.models.SimSiam
    (f"prediction_mlp.layers.{MLP}", PREDICTOR),
    ("projection_mlp.{0.0 0.1 1.0 1.1 2.0 2.1}", PROJECTOR),  # the same until version 1.1
    ("prediction_mlp.{0.0 0.1 1}", "predictor.{0 1 3}"),
    ("dummy_param", None),  # of its benchmarks until version 1.4.1
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
        ),
        normalisation=((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    ),
    "PatrickHua/SimSiam": Layout(
        (
            (BACKBONE, BACKBONE),
            ("projector.layer{1.0 1.1 2.0 2.1 3.0 3.1}", PROJECTOR),
            ("predictor.{layer1.0 layer1.1 layer2}", "predictor.{0 1 3}"),
            ("encoder.{0 1}", None),  # backbone and projector again
        ),
        within=(("shortcut", "downsample"),),  # of its second ResNet for CIFAR
        normalisation=NORMALISATION["imagenet"],
    ),
    "lightly": Layout(
        (("backbone.{0 1 4 5 6 7}", BACKBONE), *LIGHTLY),
        normalisation=NORMALISATION["imagenet"],
    ),
    "lightly's CIFAR benchmark": Layout(
        (("backbone.{0 1 2 3 4 5}", BACKBONE), *LIGHTLY),
        within=(("shortcut", "downsample"),),
        normalisation=NORMALISATION["imagenet"],
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
# What thop.profile leaves in the modules that it has no rule for, whatever the layout.
THOP_COUNTERS = re.compile(r"(.+\.)?total_(ops|params)")
# What wraps a whole network: DataParallel, torch.compile.
WRAPPERS = re.compile(r"((module|_orig_mod)\.)+")
BLOCKS = {  # of layer1 to layer4, and whether they are bottlenecks
    (2, 2, 2, 2, False): "resnet18",
    (3, 4, 6, 3, False): "resnet34",
    (3, 4, 6, 3, True): "resnet50",
    (3, 4, 23, 3, True): "resnet101",
    (3, 8, 36, 3, True): "resnet152",
}
# timm's networks that have the same names and shapes as torchvision's, and other features.
TWINS = {"resnet18": "resnetblur18", "resnet50": "resnetaa50 and resnetblur50"}


# ---- the table in use ---------------------------------------------------------------------------


def expand(name: str) -> list[str]:
    """A name of the table with each of its words: "f.{0 1}" -> ["f.0", "f.1"]."""
    start, _, rest = name.partition("{")
    words, brace, end = rest.partition("}")
    return [start + word + end for word in words.split()] if brace else [name]


@functools.cache
def expand_pairs(
    pairs: tuple[tuple[str | None, str | None], ...], out: bool
) -> list[tuple[str, str | None]]:
    """Pairs of the table spelled, as (from, to), longest first; to theirs if `out`."""
    found = []
    for pair in pairs:
        start, end = reversed(pair) if out else pair
        if start is not None:
            starts = expand(start)
            ends = [None] * len(starts) if end is None else expand(end)
            found += zip(starts, ends, strict=True)
    return sorted(found, key=lambda pair: -len(pair[0]))  # stable: of equals the first one stays


def rename(name: str, layout: Layout, out: bool = False) -> str | None:
    """A name as in `rename_all`; None if the layout leaves it out. Raises KeyError."""
    if THOP_COUNTERS.fullmatch(name):
        return None
    for start, end in expand_pairs(layout.names, out):
        if f"{name}.".startswith(f"{start}."):
            rest = name.removeprefix(start)
            for word, other in expand_pairs(layout.within, out):
                rest = rest.replace(f".{word}.", f".{other}.")
            return None if end is None else end + rest
    raise KeyError(name)


def rename_all(
    weights: dict[str, Tensor], layout: Layout, out: bool = False
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Weights of a `layout` under the names of this program or, if `out`, the other way round.

    Also the names that the layout leaves out, and those that it does not know, or has twice.
    """
    found, left, unknown = {}, [], []
    for name, value in weights.items():
        try:
            new = rename(name, layout, out)
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


def translate(
    weights: dict[str, Tensor], stem: str | None = None
) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Another project's weights under the names of this program, and what they are.

    Returns the weights, a dict of `checkpoint.ENCODER`, and lines to say about them. `stem`: one of
    `STEMS`, if it is known; by default what the layout suggests.

    Each name is translated or is one that the layout leaves out. Biases before a BN are folded
    into its running mean, which changes nothing in eval mode. Raises ValueError that names what is
    unknown or missing.
    """
    layout, found, left = detect_layout(from_paddle(weights))
    notes = [f"layout: {layout}"]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        notes.append(f"left out, as of no use here: {', '.join(left[:3])}{more}")
    arch, width = detect_arch(found)
    small = found["backbone.conv1.weight"].shape[-1] == 3
    if stem is not None:
        notes.append(f"taken to have the stem {stem}, as --stem says")
    else:
        backbone_alone = all(name.startswith("backbone.") for name in found) and width is None
        stem, reason = default_stem(layout, small, backbone_alone)
        notes += [reason] if reason else []
    if layout == "torchvision" and arch in TWINS:
        twins = f"names and shapes are also those of timm's {TWINS[arch]}, whose features differ"
        notes.append(f"taken for a {arch}: {twins}")
    of_cifar = small
    if layout == "PatrickHua/SimSiam" and "projector.6.weight" in found:
        unused, reason = is_second_layer_unused(found, small)
        if unused:
            of_cifar, found = True, drop_second_layer(found)
            notes.append(f"its second projector layer is left out: {reason}")
    usual = LAYOUTS[layout].normalisation
    mean, std = usual or NORMALISATION["imagenet" if stem == "imagenet" else "cifar"]
    channels = found["backbone.conv1.weight"].shape[1]
    if channels != len(mean):  # nobody knows theirs
        mean, std = (0.5,) * channels, (0.25,) * channels
    encoder = {"arch": arch, "stem": stem, "width": width}
    encoder |= {"image_size": 32 if of_cifar else 224, "mean": mean, "std": std}
    return fold_bn_biases(found), encoder, notes


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


def detect_layout(weights: dict[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]]:
    """The first layout that knows all names, the weights renamed, and the names left out.

    If none does, one that knows them without the prefix of what wraps the network. Raises
    ValueError that names what the nearest layout does not know.
    """
    nearest: tuple[str, list[str]] | None = None
    for given in (weights, strip_wrappers(weights)):
        for name, layout in LAYOUTS.items():
            found, left, unknown = rename_all(given, layout)
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


def strip_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the prefix of what wraps the whole network, if all of them have one."""
    prefixes = {match and match[0] for match in map(WRAPPERS.match, weights)}
    if None in prefixes or len(prefixes) != 1:
        return weights
    return {name.removeprefix(min(prefixes)): value for name, value in weights.items()}


def default_stem(layout: str, small: bool, backbone_alone: bool) -> tuple[str, str | None]:
    """The stem of a project's networks, and what to say of it.

    `small`: whether conv1 is 3x3. `backbone_alone`: whether there is no more than a backbone.
    """
    if small and layout == "solo-learn":
        reason = "its names cannot tell conv1's padding: taken for solo-learn's, 2 (--stem)"
        return "cifar_pad2", reason
    if small and layout == "ours" and backbone_alone:
        reason = "conv1's padding is taken for 1; if it is solo-learn's, 2: --stem cifar_pad2"
        return "cifar", reason
    if layout == "lightly's CIFAR benchmark":
        return "cifar_no_relu", "taken to have no ReLU after bn1, as that benchmark (--stem)"
    return "cifar" if small else "imagenet", None


def is_second_layer_unused(found: dict[str, Tensor], small: bool) -> tuple[bool, str]:
    """Whether PatrickHua's network skipped the projector's second layer, and how that is known.

    Its files have three layers always; with `proj_layers: 2` the second one's BN counts no batch.
    """
    counts = [found.get(f"projector.{i}.num_batches_tracked") for i in (1, 4)]
    if None not in counts and counts[0].any():
        return not counts[1].any(), "its BN has seen no batch"
    return small, "no BN counts batches, and its runs on CIFAR skip it"


def drop_second_layer(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A projector's third layer in the place of the second."""
    names = {"projector.6": "projector.3", "projector.7": "projector.4"}
    rest = {name: value for name, value in found.items() if not name.startswith("projector.")}
    for name, value in found.items():
        start, _, end = name.rpartition(".")
        if name.startswith("projector.") and start not in names.values():
            rest[f"{names.get(start, start)}.{end}"] = value
    return rest


def detect_arch(weights: dict[str, Tensor]) -> tuple[str, int | None]:
    """The ResNet that has these blocks: torchvision's or, with its width, He et al.'s for CIFAR.

    Raises ValueError where none has.
    """
    blocks = [0] * 4
    for name in weights:
        match = re.match(r"backbone\.layer([1-4])\.(\d+)\.", name)
        if match:
            stage, block = int(match[1]) - 1, int(match[2])
            blocks[stage] = max(blocks[stage], block + 1)
    bottleneck = "backbone.layer1.0.conv3.weight" in weights
    if (*blocks, bottleneck) in BLOCKS:
        return BLOCKS[(*blocks, bottleneck)], None
    n = blocks[0]
    arch = f"resnet{6 * n + 2}"
    if n and blocks == [n, n, n, 0] and not bottleneck and arch not in IMAGENET_ARCHS:
        return arch, len(weights["backbone.conv1.weight"])
    known = ", ".join(IMAGENET_ARCHS)
    raise ValueError(f"its backbone, of {blocks} blocks, is none of {known}")


def fold_bn_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
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
