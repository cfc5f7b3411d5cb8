"""Names of weights in other projects' checkpoints: one table, used for reading and writing.

An entry pairs the start of a name in another project with its start in this one. What follows is
the same in both, since all use torchvision's names within a stage. `{a b c}` expands to three
names, and the words of the other side are paired with these in order.
"""

import functools
import re
from typing import NamedTuple

import torch
from torch import Tensor

from simsiam.models.backbones import IMAGENET_ARCHS
from simsiam.views.augment import NORMALISATION

RESNET = "{conv1 bn1 layer1 layer2 layer3 layer4}"
MLP = "{0 1 3 4 6 7}"  # the Linear and the BN of each layer of a head
# Names in this project.
BACKBONE, PROJECTOR, PREDICTOR = f"backbone.{RESNET}", f"projector.{MLP}", f"predictor.{MLP}"


class Layout(NamedTuple):
    """The names of weights in another project.

    `names`: pairs (start there, start here). None: the weights are dropped. Where a start here
    occurs twice, the first pair is written, and both are read.
    `within`: pairs of words that differ in the rest of a name.
    `normalisation`: mean and std of the project's images; None: those usual for the stem.
    `write_only`: files of the layout are written, and not read.
    """

    names: tuple[tuple[str | None, str | None], ...]
    within: tuple[tuple[str, str], ...] = ()
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    write_only: bool = False


# A Linear has no bias before a BN here; in a file with one the projector is another project's.
BIAS_FREE = "projector.{0.weight 1 3.weight 4 6.weight 7}"
LIGHTLY = (
    (f"projection_head.layers.{MLP}", PROJECTOR),
    (f"prediction_head.layers.{MLP}", PREDICTOR),
    (f"projection_mlp.layers.{MLP}", PROJECTOR),  # lightly.models.SimSiam
    (f"prediction_mlp.layers.{MLP}", PREDICTOR),
    ("projection_mlp.{0.0 0.1 1.0 1.1 2.0 2.1}", PROJECTOR),  # until version 1.1
    ("prediction_mlp.{0.0 0.1 1}", "predictor.{0 1 3}"),
    ("dummy_param", None),  # in benchmarks until version 1.4.1
)
LAYOUTS = {  # in the order of detection
    "torchvision": Layout(
        ((RESNET, BACKBONE), ("fc", "fc"), (None, "projector"), (None, "predictor"))
    ),
    "simsiam": Layout(
        ((BACKBONE, BACKBONE), (BIAS_FREE, BIAS_FREE), (PREDICTOR, PREDICTOR), ("fc", "fc"))
    ),
    "facebookresearch/simsiam": Layout(
        (
            (f"module.encoder.{RESNET}", BACKBONE),
            (f"module.encoder.fc.{MLP}", PROJECTOR),
            (f"module.predictor.{MLP}", PREDICTOR),
        )
    ),
    "facebookresearch/simsiam, linear": Layout(
        ((f"module.{RESNET}", BACKBONE), ("module.fc", "fc"))
    ),
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
            ("encoder.{0 1}", None),  # copies of backbone and projector
        ),
        within=(("shortcut", "downsample"),),  # in its second ResNet for CIFAR
        normalisation=NORMALISATION["imagenet"],
    ),
    "lightly": Layout(
        (("backbone.{0 1 4 5 6 7}", BACKBONE), *LIGHTLY),
        normalisation=NORMALISATION["imagenet"],
    ),
    "lightly, CIFAR benchmark": Layout(
        (("backbone.{0 1 2 3 4 5}", BACKBONE), *LIGHTLY),
        within=(("shortcut", "downsample"),),
        normalisation=NORMALISATION["imagenet"],
    ),
    "solo-learn": Layout(
        (
            (BACKBONE, BACKBONE),
            (f"encoder.{RESNET}", BACKBONE),  # in older versions
            (PROJECTOR, PROJECTOR),
            (PREDICTOR, PREDICTOR),
            ("classifier", None),  # an online probe
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
            (f"predictor.mlp.{MLP}", PREDICTOR),  # in version 1.1
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
        write_only=True,
    ),
}
# Buffers that thop.profile leaves in modules, in any layout.
THOP_COUNTERS = re.compile(r"(.+\.)?total_(ops|params)")
# Prefixes of a wrapped network: DataParallel, torch.compile.
WRAPPERS = re.compile(r"((module|_orig_mod)\.)+")
BLOCKS = {  # blocks in layer1 to layer4, and whether they are bottlenecks
    (2, 2, 2, 2, False): "resnet18",
    (3, 4, 6, 3, False): "resnet34",
    (3, 4, 6, 3, True): "resnet50",
    (3, 4, 23, 3, True): "resnet101",
    (3, 8, 36, 3, True): "resnet152",
}
# timm networks with the names and shapes of a torchvision ResNet, but other features.
TWINS = {"resnet18": "resnetblur18", "resnet50": "resnetaa50 and resnetblur50"}


# ---- renaming -----------------------------------------------------------------------------------


def expand(name: str) -> list[str]:
    """Expand the braces in a name: "f.{0 1}" -> ["f.0", "f.1"]."""
    start, _, rest = name.partition("{")
    words, brace, end = rest.partition("}")
    return [start + word + end for word in words.split()] if brace else [name]


@functools.cache
def expand_pairs(
    pairs: tuple[tuple[str | None, str | None], ...], write: bool
) -> list[tuple[str, str | None]]:
    """Expand pairs of the table to (old, new), longest first; the other way round if `write`."""
    expanded = []
    for pair in pairs:
        old, new = reversed(pair) if write else pair
        if old is not None:
            olds = expand(old)
            news = [None] * len(olds) if new is None else expand(new)
            expanded += zip(olds, news, strict=True)
    return sorted(expanded, key=lambda pair: -len(pair[0]))  # stable: equals keep their order


def rename_all(
    weights: dict[str, Tensor], layout: Layout, write: bool = False
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Rename weights from a layout to this project's names, or back if `write`.

    Also returns the names that are dropped, and those that are unknown or would occur twice.
    """
    renamed, dropped, unknown = {}, [], []
    names, within = (expand_pairs(pairs, write) for pairs in (layout.names, layout.within))
    for name, value in weights.items():
        pairs = (pair for pair in names if f"{name}.".startswith(f"{pair[0]}."))
        old, start = next(pairs, (None, None))
        if THOP_COUNTERS.fullmatch(name) or (old is not None and start is None):
            dropped.append(name)
        elif old is None:
            unknown.append(name)
        else:
            rest = name.removeprefix(old)
            for old_word, new_word in within:
                rest = rest.replace(f".{old_word}.", f".{new_word}.")
            if start + rest in renamed:
                unknown.append(name)
            else:
                renamed[start + rest] = value
    return renamed, dropped, unknown


# ---- reading ------------------------------------------------------------------------------------


def translate(
    weights: dict[str, Tensor], stem: str | None = None
) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Translate another project's weights to this project's names.

    Returns the weights, a dict of `checkpoint.ENCODER`, and notes for the user. `stem`: one of
    `STEMS`; by default the layout's.

    Biases before a BN are folded into its running mean, which is exact in eval mode. Raises
    ValueError that names what is unknown or missing.
    """
    layout, weights, dropped = detect_layout(from_paddle(weights))
    notes = [f"layout: {layout}"]
    if dropped:
        more = f" and {len(dropped) - 3} more" if len(dropped) > 3 else ""
        notes.append(f"not used: {', '.join(dropped[:3])}{more}")
    arch, width = detect_arch(weights)
    is_cifar = has_small_conv = weights["backbone.conv1.weight"].shape[-1] == 3
    if stem is not None:
        notes.append(f"stem {stem}, by --stem")
    else:
        is_bare = all(name.startswith("backbone.") for name in weights) and width is None
        stem, reason = default_stem(layout, has_small_conv, is_bare)
        notes += [reason] if reason else []
    if layout == "torchvision" and arch in TWINS:
        notes.append(f"assumed to be {arch}: timm's {TWINS[arch]} have its names and shapes, too")
    if layout == "PatrickHua/SimSiam" and "projector.6.weight" in weights:
        reason = unused_second_layer(weights, has_small_conv)
        if reason:
            is_cifar, weights = True, drop_second_layer(weights)
            notes.append(f"its second projector layer is left out: {reason}")
    mean, std = (
        LAYOUTS[layout].normalisation
        or NORMALISATION["imagenet" if stem == "imagenet" else "cifar"]
    )
    channels = weights["backbone.conv1.weight"].shape[1]
    if channels != len(mean):  # the file does not say
        mean, std = (0.5,) * channels, (0.25,) * channels
    encoder = {"arch": arch, "stem": stem, "width": width}
    encoder |= {"image_size": 32 if is_cifar else 224, "mean": mean, "std": std}
    return fold_bn_biases(weights), encoder, notes


def from_paddle(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert Paddle's BN names and transposed Linear weights; return other weights unchanged."""
    if not any(name.endswith("._mean") for name in weights):
        return weights
    return {
        name.replace("._mean", ".running_mean").replace("._variance", ".running_var"): (
            value.T.contiguous() if value.ndim == 2 else value
        )
        for name, value in weights.items()
    }


def detect_layout(weights: dict[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]]:
    """Return the first layout that knows all names, the renamed weights, and the dropped names.

    If there is none, the prefix of a wrapped network is removed. Raises ValueError that names what
    the nearest layout does not know.
    """
    nearest: tuple[str, list[str]] | None = None
    for candidate in (weights, strip_wrappers(weights)):
        for name, layout in LAYOUTS.items():
            renamed, dropped, unknown = rename_all(candidate, layout)
            if layout.write_only or "backbone.conv1.weight" not in renamed:
                continue
            if not unknown:
                return name, renamed, dropped
            if nearest is None or len(unknown) < len(nearest[1]):
                nearest = name, unknown
    if nearest is None:
        raise ValueError("its weights are not those of a ResNet in a known layout")
    name, unknown = nearest
    names = ", ".join(unknown[:5]) + ", ..." * (len(unknown) > 5)
    raise ValueError(f"its layout is like that of {name}, except for {names}")


def strip_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix of a wrapped network if all names have it."""
    prefixes = {match and match[0] for match in map(WRAPPERS.match, weights)}
    if None in prefixes or len(prefixes) != 1:
        return weights
    return {name.removeprefix(min(prefixes)): value for name, value in weights.items()}


def default_stem(layout: str, has_small_conv: bool, is_bare: bool) -> tuple[str, str | None]:
    """Return the stem of a project's networks, and a note where the file does not tell it.

    `has_small_conv`: conv1 is 3x3. `is_bare`: the file has a backbone only.
    """
    if has_small_conv and layout == "solo-learn":
        return "cifar_pad2", "conv1's padding is assumed to be solo-learn's, 2 (--stem)"
    if has_small_conv and layout == "simsiam" and is_bare:
        return "cifar", "conv1's padding is assumed to be 1; for solo-learn's 2: --stem cifar_pad2"
    if layout == "lightly, CIFAR benchmark":
        return "cifar_no_relu", "no ReLU after bn1 is assumed, as in that benchmark (--stem)"
    return "cifar" if has_small_conv else "imagenet", None


def unused_second_layer(weights: dict[str, Tensor], has_small_conv: bool) -> str | None:
    """Return the evidence that PatrickHua's network skips the projector's second layer, if any.

    The file always has three layers; with `proj_layers: 2` the second BN counts no batch.
    """
    counts = [weights.get(f"projector.{i}.num_batches_tracked") for i in (1, 4)]
    if None not in counts and counts[0].any():
        return None if counts[1].any() else "its BN has seen no batch"
    return "no BN counts batches, and runs on CIFAR skip it" if has_small_conv else None


def drop_second_layer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace a projector's second layer, `projector.3` and `.4`, by its third one."""
    return {
        name.replace("projector.6.", "projector.3.").replace("projector.7.", "projector.4."): value
        for name, value in weights.items()
        if not name.startswith(("projector.3.", "projector.4."))
    }


def detect_arch(weights: dict[str, Tensor]) -> tuple[str, int | None]:
    """Return the ResNet with these blocks; for those of He et al. for CIFAR also the width.

    Raises ValueError where there is none.
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
    raise ValueError(f"its backbone, of {blocks} blocks, is none of {', '.join(IMAGENET_ARCHS)}")


def fold_bn_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold each head's bias before a BN into the running mean; add BN counters where absent."""
    folded = dict(weights)
    for name in weights:
        bn, _, value = name.rpartition(".")
        if value != "running_mean":
            continue
        head, _, index = bn.rpartition(".")
        bias = f"{head}.{int(index) - 1}.bias" if index.isdigit() else None
        fits = bias in folded and folded[bias].shape == folded[name].shape  # else refused later on
        if fits and not head.startswith("backbone"):
            folded[name] = folded[name] - folded.pop(bias)
        folded.setdefault(f"{bn}.num_batches_tracked", torch.tensor(0))
    return folded
