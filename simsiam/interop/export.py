"""Weights for other projects: under their names, if their classes can hold them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from simsiam.interop.layouts import LAYOUTS, rename_all
from simsiam.models.backbones import IMAGENET_ARCHS, classifier_name, is_library_arch
from simsiam.models.classifier import Classifier

EXPORTS = {  # the formats of `export_weights`, and the layout of each
    "torchvision": "torchvision",
    "authors": "the authors'",
    "lightly": "lightly",
    "mmpretrain": "mmpretrain",
    "detectron2": "detectron2",
    "timm": "torchvision",
}
# Stems that no name and no shape tells from `cifar`.
STEM_NOTES = {
    "cifar_pad2": "conv1 has a padding of 2",
    "cifar_no_relu": "there is no ReLU after bn1",
}
INSTEAD = "add --encoder_only, or choose safetensors"


def export_weights(
    net: nn.Module, encoder: dict, to: str, encoder_only: bool = False
) -> dict[str, Tensor]:
    """The weights of a SimSiam or Classifier under the names of another project, for `EXPORTS`.

    `encoder`: its arch and stem. `encoder_only`: without heads or classifier. Raises ValueError
    where that project has no such network.
    """
    weights, layout = net.state_dict(), EXPORTS[to]
    if is_library_arch(encoder["arch"]):
        return export_library(weights, encoder["arch"], to, encoder_only)
    check_backbone(encoder["arch"], encoder["stem"], to)
    if encoder_only:
        weights = {name: weights[name] for name in weights if name.startswith("backbone.")}
    elif isinstance(net, Classifier):
        if to == "lightly":
            raise ValueError(
                "lightly has no names for a linear classifier: choose timm, or --encoder_only"
            )
        if to == "authors":
            layout = "the authors' linear"
    elif to in PROJECTORS:
        check_heads(weights, to)
        if to == "authors":  # theirs has a bias there, which does not matter before a BN
            weights["projector.6.bias"] = torch.zeros_like(weights["projector.7.running_mean"])
    found, _, unknown = rename_all(weights, LAYOUTS[layout], out=True)
    if unknown:
        raise ValueError(f"{to} has no name for {unknown[0]}: {INSTEAD}")
    return found


def export_library(
    weights: dict[str, Tensor], arch: str, to: str, encoder_only: bool
) -> dict[str, Tensor]:
    """The weights of a backbone of timm or torchvision, with its classifier, under its own names.

    timm.create_model and torchvision.models.get_model load them with strict=True: with a classifier
    where it is exported, else without one (num_classes=0; an Identity). Raises ValueError for
    another library, or for heads, of which it has none.
    """
    library = arch.partition(":")[0]
    if to != library:
        raise ValueError(f"{to} has no {arch}: choose {library}, safetensors or onnx")
    found = {}
    for name, value in weights.items():
        part, _, inner = name.partition(".")
        if part == "backbone":
            found[inner] = value
        elif not encoder_only:
            if part != "fc":
                raise ValueError(f"{library} has no name for {name}: {INSTEAD}")
            found[f"{classifier_name(arch)}.{inner}"] = value
    return found


def whose(to: str) -> str:
    """The project `to` as a possessive."""
    return "the authors'" if to == "authors" else f"{to}'s"


def check_backbone(arch: str, stem: str, to: str) -> None:
    """Raises ValueError where the project `to` has no such backbone."""
    if arch not in IMAGENET_ARCHS:
        raise ValueError(f"{to} has no {arch}: choose safetensors or onnx")
    if stem != "imagenet" and to in ("torchvision", "detectron2", "authors"):
        raise ValueError(
            f"{whose(to)} {arch} has another stem (7x7 conv1, max-pool) than this one's, {stem}: "
            "choose timm, for its names with this conv1, or safetensors or onnx"
        )


class ProjectorOptions(NamedTuple):
    """The projectors that a project's class can be: numbers of layers, and two options."""

    layers: tuple[int, ...]
    affine: bool = False  # whether its last BN can be affine
    as_encoder: bool = False  # whether its hidden layers are as wide as the encoder's output


PROJECTORS = {
    "authors": ProjectorOptions((3,), as_encoder=True),
    "lightly": ProjectorOptions((1, 2, 3)),
    "mmpretrain": ProjectorOptions((2, 3), affine=True),
}


def projector_shape(weights: dict[str, Tensor]) -> tuple[list[int], bool]:
    """The widths of a projector's layers, its input's first; whether its last BN is affine."""
    linear = [f"projector.{i}.weight" for i in range(0, 24, 3)]
    shapes = [weights[name].shape for name in linear if name in weights]
    widths = [shapes[0][1], *(shape[0] for shape in shapes)]
    return widths, f"projector.{3 * len(shapes) - 2}.bias" in weights


def check_heads(weights: dict[str, Tensor], to: str) -> None:
    """Raises ValueError where the project `to` has no such projector or predictor."""
    if "projector.0.weight" not in weights:
        return
    strange = {f"projector.{i}.bias" for i in range(0, 24, 3)} | {"predictor.0.bias"}
    strange |= {"predictor.4.running_mean"}
    if "predictor.0.weight" not in weights or strange & weights.keys():
        reason = f"{whose(to)} SimSiam has other heads than this one, by --bn or --predictor"
        raise ValueError(f"{reason}: {INSTEAD}")
    can, ((features, *hidden, _), affine) = PROJECTORS[to], projector_shape(weights)
    if len(hidden) + 1 not in can.layers:
        numbers = " or ".join(map(str, can.layers))
        reason = f"{whose(to)} projector has {numbers} layers, this one {len(hidden) + 1}"
    elif affine and not can.affine:
        reason = f"the last BN of {whose(to)} projector is not affine, and this one's is"
    elif can.as_encoder and set(hidden) != {features}:
        reason = f"{whose(to)} projector is {features} wide, as its encoder, this one {hidden[0]}"
    elif len(set(hidden)) > 1:
        reason = f"{whose(to)} projector has one hidden width, this one {hidden}"
    else:
        return
    raise ValueError(f"{reason}: {INSTEAD}")


def export_notes(net: nn.Module, encoder: dict, to: str, encoder_only: bool = False) -> list[str]:
    """What to know when a network goes out: what the names and shapes in the file do not tell."""
    lines, stem = [], encoder["stem"]
    if stem in STEM_NOTES and to != "onnx":
        lines.append(f"its stem is {stem}, which the names do not tell: {STEM_NOTES[stem]}")
    if to == "mmpretrain" and stem != "imagenet":
        lines.append("its backbone is mmpretrain's ResNet_CIFAR")
    weights = net.state_dict()
    if to == "mmpretrain" and not encoder_only and "projector.0.weight" in weights:
        widths, affine = projector_shape(weights)
        if len(widths) != 4 or affine:
            options = f"num_layers={len(widths) - 1}, with_last_bn_affine={affine}"
            lines.append(f"its neck is mmpretrain's NonLinearNeck with {options}")
    return lines
