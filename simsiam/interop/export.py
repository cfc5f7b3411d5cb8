"""Export weights under the names of other projects, where their classes can load them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from simsiam.interop.layouts import LAYOUTS, rename_all
from simsiam.models.backbones import IMAGENET_ARCHS, classifier_name, is_library_arch
from simsiam.models.classifier import Classifier

EXPORTS = {  # the layout of each format
    "torchvision": "torchvision",
    "authors": "facebookresearch/simsiam",
    "lightly": "lightly",
    "mmpretrain": "mmpretrain",
    "detectron2": "detectron2",
    "timm": "torchvision",
}
# Stems with the names and shapes of `cifar`.
STEM_NOTES = {
    "cifar_pad2": "conv1 has a padding of 2",
    "cifar_no_relu": "there is no ReLU after bn1",
}
HINT = "add --encoder_only, or choose safetensors"


def export_weights(
    net: nn.Module, encoder: dict, to: str, encoder_only: bool = False
) -> dict[str, Tensor]:
    """Return the weights of a SimSiam or Classifier under the names of a format of `EXPORTS`.

    `encoder`: its arch and stem. `encoder_only`: without heads or classifier. Raises ValueError
    where the project has no such network.
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
            layout = "facebookresearch/simsiam, linear"
    elif to in PROJECTORS:
        check_heads(weights, to)
        if to == "authors":  # its class has a bias there, which the BN cancels
            weights["projector.6.bias"] = torch.zeros_like(weights["projector.7.running_mean"])
    renamed, _, unknown = rename_all(weights, LAYOUTS[layout], write=True)
    if unknown:
        raise ValueError(f"{to} has no name for {unknown[0]}: {HINT}")
    return renamed


def export_library(
    weights: dict[str, Tensor], arch: str, to: str, encoder_only: bool
) -> dict[str, Tensor]:
    """Return the weights of a backbone of timm or torchvision under its library's names.

    The library's model loads them with strict=True: with a classifier if one is exported, else
    without one (num_classes=0; an Identity). Raises ValueError for another library, or for heads.
    """
    library = arch.partition(":")[0]
    if to != library:
        raise ValueError(f"{to} has no {arch}: choose {library}, safetensors or onnx")
    renamed = {}
    for name, value in weights.items():
        part, _, inner = name.partition(".")
        if part == "backbone":
            renamed[inner] = value
        elif not encoder_only:
            if part != "fc":
                raise ValueError(f"{library} has no name for {name}: {HINT}")
            renamed[f"{classifier_name(arch)}.{inner}"] = value
    return renamed


def check_backbone(arch: str, stem: str, to: str) -> None:
    """Raise ValueError where the project `to` has no such backbone."""
    if arch not in IMAGENET_ARCHS:
        raise ValueError(f"{to} has no {arch}: choose safetensors or onnx")
    if stem != "imagenet" and to in ("torchvision", "detectron2", "authors"):
        raise ValueError(
            f"{arch} of {EXPORTS[to]} has a 7x7 conv1 and a max-pool, this one the stem {stem}: "
            "choose timm, for the same names with this conv1, or safetensors or onnx"
        )


class ProjectorOptions(NamedTuple):
    """The projectors that a project's class can build."""

    layers: tuple[int, ...]
    affine: bool = False  # its last BN can be affine
    encoder_width: bool = False  # its hidden layers are as wide as the encoder's output


PROJECTORS = {
    "authors": ProjectorOptions((3,), encoder_width=True),
    "lightly": ProjectorOptions((1, 2, 3)),
    "mmpretrain": ProjectorOptions((2, 3), affine=True),
}


def projector_shape(weights: dict[str, Tensor]) -> tuple[list[int], bool]:
    """Return a projector's widths, from its input on, and whether its last BN is affine."""
    linear = [f"projector.{i}.weight" for i in range(0, 24, 3)]
    shapes = [weights[name].shape for name in linear if name in weights]
    widths = [shapes[0][1], *(shape[0] for shape in shapes)]
    return widths, f"projector.{3 * len(shapes) - 2}.bias" in weights


def check_heads(weights: dict[str, Tensor], to: str) -> None:
    """Raise ValueError where the project `to` has no such projector or predictor."""
    if "projector.0.weight" not in weights:
        return
    project = EXPORTS[to]
    strange = {f"projector.{i}.bias" for i in range(0, 24, 3)} | {"predictor.0.bias"}
    strange |= {"predictor.4.running_mean"}
    if "predictor.0.weight" not in weights or strange & weights.keys():
        raise ValueError(f"{project} has no heads like these (--bn, --predictor): {HINT}")
    options, ((features, *hidden, _), affine) = PROJECTORS[to], projector_shape(weights)
    if len(hidden) + 1 not in options.layers:
        numbers = " or ".join(map(str, options.layers))
        reason = f"has a projector of {numbers} layers, this one {len(hidden) + 1}"
    elif affine and not options.affine:
        reason = "has a projector whose last BN is not affine, and this one's is"
    elif options.encoder_width and set(hidden) != {features}:
        reason = f"has a projector as wide as its encoder, {features}, this one {hidden[0]}"
    elif len(set(hidden)) > 1:
        reason = f"has a projector of one hidden width, this one {hidden}"
    else:
        return
    raise ValueError(f"{project} {reason}: {HINT}")


def export_notes(net: nn.Module, encoder: dict, to: str, encoder_only: bool = False) -> list[str]:
    """Return what a user of the exported file must know, and its names and shapes do not tell."""
    notes, stem = [], encoder["stem"]
    if stem in STEM_NOTES and to != "onnx":
        notes.append(f"its stem is {stem}, which its names do not tell: {STEM_NOTES[stem]}")
    if to == "mmpretrain" and stem != "imagenet":
        notes.append("its backbone is mmpretrain's ResNet_CIFAR")
    weights = net.state_dict()
    if to == "mmpretrain" and not encoder_only and "projector.0.weight" in weights:
        widths, affine = projector_shape(weights)
        if len(widths) != 4 or affine:
            options = f"num_layers={len(widths) - 1}, with_last_bn_affine={affine}"
            notes.append(f"its neck is mmpretrain's NonLinearNeck with {options}")
    return notes
