"""The network and its names: backbones, heads, loss, Params/FLOPs, others' checkpoints.

The symbols are the paper's: x a view, z = projector(backbone(x)), p = predictor(z).
Chen & He, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566.
"""

import copy
import math
import pickle
import re
import types
import zipfile
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import thop
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

IMAGENET_ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# First layers of those. For CIFAR: conv1 of 3x3, no max-pool (paper, App. D); in solo-learn's conv1
# has a padding of 2, in lightly's benchmark there is no ReLU after bn1.
STEMS = ("cifar", "imagenet", "cifar_pad2", "cifar_no_relu")


class PadShortcut(nn.Module):
    """He et al. 2016, option A: every second pixel, zeros for the new channels; no parameters."""

    def __init__(self, new_channels: int):
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016, sec. 4.2, without its fc: depth 6n+2, three stages.

    The stages are `width`, 2 `width` and 4 `width` channels wide (the paper: 16, 32, 64).
    Parameters carry torchvision's names. N x 3 x H x W -> N x 4 `width`.
    """

    def __init__(self, depth: int, width: int = 16):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(BasicBlock(width, width) for _ in range(blocks)))
        self.layer2 = self._stage(width, 2 * width, blocks)
        self.layer3 = self._stage(2 * width, 4 * width, blocks)
        # As torchvision's ResNet with zero_init_residual=True.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    @staticmethod
    def _stage(before: int, after: int, blocks: int) -> nn.Sequential:
        first = BasicBlock(before, after, stride=2, downsample=PadShortcut(after - before))
        return nn.Sequential(first, *(BasicBlock(after, after) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.mean(dim=(2, 3))


def backbone(arch: str, stem: str = "cifar", width: int | None = None) -> tuple[nn.Module, int]:
    """A randomly initialised ResNet that ends in its pooled features, and their number.

    `arch` is one of torchvision's ResNets, `resnet18` to `resnet152`, with one of `STEMS`; or
    `resnet{6n+2}` (`resnet8`, `resnet14`, `resnet20`, ...) of He et al. 2016, sec. 4.2, `width`
    (16) channels wide at its start, which always has the CIFAR stem. (`resnet50` and `resnet152`
    would fit both families: they are torchvision's.)

    Raises ValueError for an unknown `arch` or `stem`, or one that does not go with the other flags.
    """
    if stem not in STEMS:
        raise ValueError(f"--stem {stem}: choose one of {', '.join(STEMS)}")
    if arch in IMAGENET_ARCHS:
        if width is not None:
            raise ValueError(
                f"--width {width}: {arch} has its own; it is for resnet8, resnet14, ..."
            )
        net = getattr(torchvision.models, arch)(zero_init_residual=True)
        features = net.fc.in_features
        net.fc = nn.Identity()
        if stem != "imagenet":
            padding = 2 if stem == "cifar_pad2" else 1
            net.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        if stem == "cifar_no_relu":
            net.relu = nn.Identity()  # that of the stem: blocks have their own
        return net, features
    depth = re.fullmatch(r"resnet(\d{1,4})", arch)
    if not depth or int(depth[1]) < 8 or int(depth[1]) % 6 != 2:
        raise ValueError(
            f"--arch {arch}: choose one of {', '.join(IMAGENET_ARCHS)}, or a CIFAR ResNet "
            "resnet8, resnet14, resnet20, ... (depth 6n+2)"
        )
    if stem != "cifar":
        raise ValueError(f"--stem {stem}: {arch} has the CIFAR stem only; use --stem cifar")
    net = CifarResNet(int(depth[1]), width or 16)
    return net, 4 * net.conv1.out_channels


def D(p: Tensor, z: Tensor) -> Tensor:
    """Negative cosine similarity, Eq. 1 of the paper, mean over the batch: N x d, N x d -> scalar.

    In fp32 whatever autocast says: bf16 cannot tell -0.999 from -1.
    """
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()


def cross_entropy(p: Tensor, z: Tensor) -> Tensor:
    """In the place of D (sec. 4.5): -softmax(z) . log softmax(p), over the channels.

    N x d, N x d -> scalar, the mean over the batch, in fp32; from 0 to about log d.
    """
    return -(z.float().softmax(1) * p.float().log_softmax(1)).sum(1).mean()


SIMILARITIES = {"cosine": D, "cross_entropy": cross_entropy}
# Which view's p meets which view's z, by --loss (sec. 4.6).
PAIRS = {
    "symmetric": ((0, 1), (1, 0)),
    "asymmetric": ((0, 1),),
    "asymmetric_2x": ((0, 1), (2, 3)),
}
PREDICTORS = ("mlp", "none", "fixed")
BN = ("default", "none", "hidden", "all")


def mlp(widths: list[int], hidden_bn: bool, output_bn: bool, affine: bool = True) -> nn.Sequential:
    """Linear layers from width to width, with BN if so asked, and ReLU after all but the last.

    A Linear has a bias where no BN follows, which would cancel it. `affine`: the output's BN.
    Layers have the same numbers, and parameters the same names, with BN and without.
    """
    *hidden, (before, d) = pairwise(widths)
    layers: list[nn.Module] = []
    for inputs, outputs in hidden:
        layers += [
            nn.Linear(inputs, outputs, bias=not hidden_bn),
            nn.BatchNorm1d(outputs) if hidden_bn else nn.Identity(),
            nn.ReLU(inplace=True),
        ]
    layers.append(nn.Linear(before, d, bias=not output_bn))
    if output_bn:
        layers.append(nn.BatchNorm1d(d, affine=affine))
    return nn.Sequential(*layers)


class SimSiam(nn.Module):
    """A backbone f, a projection MLP (with it the paper's "encoder") and a prediction MLP h.

    `feature_dim` is d, the width of z and of the projector's hidden layers. The predictor is a
    bottleneck of d/4 (sec. 3). The paper has 3 projector layers on ImageNet, 2 on CIFAR (App. D).

    The rest are the paper's ablations:
    `stop_grad`: False lets the gradient through z as well (sec. 4.1, Fig. 2).
    `predictor`: `none`, h is the identity; `fixed`, h keeps its random weights (sec. 4.2, Table 1;
    its third row, a constant learning rate, is main.py's --fix_pred_lr).
    `bn`: BN in the heads (sec. 4.4, Table 3). `none`; `hidden` layers of both; `default`, these and
    the projector's output; `all`, and the predictor's output, affine there.
    `similarity`: `cosine`, `D`; or `cross_entropy` (sec. 4.5).
    `loss`: `symmetric`, Eq. 4; `asymmetric`, p of the first view only; `asymmetric_2x`, that of two
    pairs of views an image (sec. 4.6).
    `looks` is how many views of an image a step takes.

    Raises ValueError for an unknown value, or a `feature_dim` below 4.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        stem: str = "cifar",
        feature_dim: int = 2048,
        projector_layers: int = 2,
        width: int | None = None,
        stop_grad: bool = True,
        predictor: str = "mlp",
        bn: str = "default",
        similarity: str = "cosine",
        loss: str = "symmetric",
    ):
        super().__init__()
        if feature_dim < 4:
            raise ValueError(f"--feature_dim {feature_dim}: must be at least 4")
        for name, value, known in (
            ("predictor", predictor, PREDICTORS),
            ("bn", bn, BN),
            ("similarity", similarity, SIMILARITIES),
            ("loss", loss, PAIRS),
        ):
            if value not in known:
                raise ValueError(f"--{name} {value}: choose one of {', '.join(known)}")
        d = feature_dim
        hidden_bn, output_bn = bn != "none", bn in ("default", "all")
        self.backbone, self.features = backbone(arch, stem, width)
        widths = [self.features] + [d] * projector_layers
        self.projector = mlp(widths, hidden_bn, output_bn, affine=False)
        self.predictor = mlp([d, d // 4, d], hidden_bn, bn == "all")
        if predictor == "none":
            self.predictor = nn.Identity()
        self.predictor.requires_grad_(predictor != "fixed")
        self.stop_grad, self.D, self.pairs = stop_grad, SIMILARITIES[similarity], PAIRS[loss]
        self.looks = 1 + max(max(pair) for pair in self.pairs)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """All but the predictor's, which may have a learning rate of its own."""
        return [*self.backbone.parameters(), *self.projector.parameters()]

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """`looks` views, N x 3 x H x W each -> the loss (a scalar), and z1, detached, N x d.

        The loss is Eq. 4's, (D(p1, sg(z2)) + D(p2, sg(z1))) / 2, or what the ablations make of it.
        Each view is its own forward pass: BN statistics are per view, as in the authors' code.
        """
        z = [self.projector(self.backbone(x)) for x in views]
        target = [one.detach() for one in z] if self.stop_grad else z  # detach: the stop-gradient
        D = [self.D(self.predictor(z[i]), target[j]) for i, j in self.pairs]
        return sum(D) / len(D), z[0].detach()


# What of main.py's arguments makes a SimSiam; of a checkpoint of before, the last ones are missing.
NETWORK = ("arch", "stem", "feature_dim", "projector_layers", "width")
ABLATIONS = ("predictor", "bn", "similarity", "loss")


def simsiam(args: Mapping) -> SimSiam:
    """The network of main.py's flags. Raises ValueError as `SimSiam` does; KeyError."""
    flags = {name: args[name] for name in NETWORK}
    flags |= {name: args[name] for name in ABLATIONS if name in args}
    return SimSiam(**flags, stop_grad=args.get("stop_grad", "on") == "on")


def linear_head(features: int, classes: int) -> nn.Linear:
    """The head of linear evaluation as the authors start it: weight ~ N(0, 0.01), bias 0."""
    head = nn.Linear(features, classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


class Classifier(nn.Module):
    """A backbone and a linear head on its pooled features: N x 3 x H x W -> N x classes."""

    def __init__(self, backbone: nn.Module, features: int, classes: int):
        super().__init__()
        self.backbone, self.features = backbone, features
        self.fc = linear_head(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


def params_and_flops(net: SimSiam | Classifier, image_size: int) -> tuple[int, int]:
    """Parameters, and multiply-adds for one image through all parts of the network, in turn.

    thop counts multiply-adds, also where others say FLOPs and count each one twice. Profiled is a
    deep copy, since thop leaves `total_ops` and `total_params` buffers in what it profiles.
    """
    whole = copy.deepcopy(nn.Sequential(*net.children())).cpu().float()
    image = torch.zeros(1, 3, image_size, image_size)
    flops, params = thop.profile(whole, inputs=(image,), verbose=False)
    return int(params), int(flops)


# ---- checkpoints --------------------------------------------------------------------------------


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


def pretrained(state: dict) -> SimSiam:
    """The network in a checkpoint of main.py. Raises ValueError where weights and arguments differ.

    It is built on `meta`, so that nothing is allocated at a size that only the arguments claim.
    """
    args = state["args"]
    try:
        if args["projector_layers"] not in range(1, 9):
            raise ValueError(f"its arguments are not main.py's: {args['projector_layers']} layers")
        with torch.device("meta"):
            net = simsiam(args)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"its arguments are not main.py's: {error}") from error
    load_strictly(net, state["model"])
    return net


def classifier(state: dict) -> Classifier:
    """The classifier in a checkpoint of linear.py. Raises ValueError as `pretrained` does."""
    args, classes = encoder_arguments(state["args"].get("encoder")), state.get("classes")
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError("its classes are not linear.py's")
    try:
        with torch.device("meta"):
            body, features = backbone(args["arch"], args["stem"], args["width"])
            net = Classifier(body, features, len(classes))
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"its arguments are not linear.py's: {error}") from error
    load_strictly(net, state["model"])
    return net


def encoder_arguments(args: object) -> dict:
    """What of a checkpoint's arguments an encoder needs: its network and its input.

    Raises ValueError where they cannot be those of one.
    """
    names = ("arch", "stem", "width", "image_size", "mean", "std")
    if not (isinstance(args, dict) and args.keys() >= set(names)):
        raise ValueError("its arguments are not main.py's or linear.py's")
    size, mean, std = args["image_size"], args["mean"], args["std"]
    triples = [
        triple
        for triple in (mean, std)
        if isinstance(triple, list | tuple)
        and len(triple) == 3
        and all(type(value) is float and math.isfinite(value) for value in triple)
    ]
    if type(size) is not int or not 1 <= size <= 1024 or len(triples) < 2 or min(std) <= 0:
        raise ValueError("its image size or normalisation is not main.py's")
    return {name: args[name] for name in names}


# ---- others' checkpoints ------------------------------------------------------------------------

# The names in other projects' checkpoints, as regular expressions, and ours; None: of no use here.
T = r"((?:conv1|bn1|layer[1-4])\..+)"  # torchvision's of a ResNet without its fc
MLP = r"(\d\..+)"
Names = tuple[tuple[str, str | Callable[[re.Match], str] | None], ...]
LAYOUTS: dict[str, Names] = {
    "torchvision": ((T, r"backbone.\1"), (r"(fc\..+)", r"\1")),
    "ours": (
        (rf"backbone\.{T}", r"backbone.\1"),
        (r"(projector\.(?:[036]\.weight|[147]\..+))", r"\1"),
        (r"((?:predictor|fc)\..+)", r"\1"),
    ),
    "the authors'": (
        (rf"module\.encoder\.{T}", r"backbone.\1"),
        (rf"module\.encoder\.fc\.{MLP}", r"projector.\1"),
        (rf"module\.predictor\.{MLP}", r"predictor.\1"),
    ),
    "the authors' linear": ((rf"module\.{T}", r"backbone.\1"), (r"module\.(fc\..+)", r"\1")),
    "leftthomas/SimSiam": (
        (r"f\.0\.(.+)", r"backbone.conv1.\1"),
        (r"f\.1\.(.+)", r"backbone.bn1.\1"),
        (r"f\.([3-6])\.(.+)", lambda m: f"backbone.layer{int(m[1]) - 2}.{m[2]}"),
        (rf"g\.{MLP}", r"projector.\1"),
        (rf"h\.{MLP}", r"predictor.\1"),
        (r"(fc\..+)", r"\1"),
    ),
    "PatrickHua/SimSiam": (
        (rf"backbone\.{T}", r"backbone.\1"),
        (
            r"projector\.layer([123])\.([01])\.(.+)",
            lambda m: f"projector.{3 * int(m[1]) - 3 + int(m[2])}.{m[3]}",
        ),
        (r"predictor\.layer1\.(.+)", r"predictor.\1"),
        (r"predictor\.layer2\.(.+)", r"predictor.3.\1"),
        (r"encoder\.[01]\..+", None),  # backbone and projector again
    ),
    "lightly": (
        (r"backbone\.0\.(.+)", r"backbone.conv1.\1"),
        (r"backbone\.1\.(.+)", r"backbone.bn1.\1"),
        (r"backbone\.([4-7])\.(.+)", lambda m: f"backbone.layer{int(m[1]) - 3}.{m[2]}"),
        (rf"projection_head\.layers\.{MLP}", r"projector.\1"),
        (rf"prediction_head\.layers\.{MLP}", r"predictor.\1"),
    ),
    "lightly's CIFAR benchmark": (
        (r"backbone\.0\.(.+)", r"backbone.conv1.\1"),
        (r"backbone\.1\.(.+)", r"backbone.bn1.\1"),
        (
            r"backbone\.([2-5])\.(.+)",
            lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2].replace('shortcut', 'downsample')}",
        ),
        (rf"projection_head\.layers\.{MLP}", r"projector.\1"),
        (rf"prediction_head\.layers\.{MLP}", r"predictor.\1"),
    ),
    "solo-learn": (
        (rf"(?:backbone|encoder)\.{T}", r"backbone.\1"),
        (rf"projector\.{MLP}", r"projector.\1"),
        (rf"predictor\.{MLP}", r"predictor.\1"),
        (r"classifier\..+", None),  # trained beside the encoder, on all of the labels
    ),
    "mmpretrain": (
        (rf"backbone\.{T}", r"backbone.\1"),
        (r"neck\.fc(\d)\.(.+)", lambda m: f"projector.{3 * int(m[1])}.{m[2]}"),
        (r"neck\.bn(\d)\.(.+)", lambda m: f"projector.{3 * int(m[1]) + 1}.{m[2]}"),
        (r"head\.predictor\.fc(\d)\.(.+)", lambda m: f"predictor.{3 * int(m[1])}.{m[2]}"),
        (r"head\.predictor\.bn(\d)\.(.+)", lambda m: f"predictor.{3 * int(m[1]) + 1}.{m[2]}"),
        (r"head\.(fc\..+)", r"\1"),
    ),
    "PASSL": (
        (rf"encoder\.{T}", r"backbone.\1"),
        (rf"encoder\.fc\.{MLP}", r"projector.\1"),
        (rf"predictor\.(?:mlp\.)?{MLP}", r"predictor.\1"),
    ),
}
BLOCKS = {  # of layer1 to layer4, and whether they are bottlenecks
    (2, 2, 2, 2, False): "resnet18",
    (3, 4, 6, 3, False): "resnet34",
    (3, 4, 6, 3, True): "resnet50",
    (3, 4, 23, 3, True): "resnet101",
    (3, 8, 36, 3, True): "resnet152",
}


class Left:
    """What stands for an object of a checkpoint that is no array, dict, list, number or text."""

    def __init__(self, *args: object, **more: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """As of a list's subclass."""

    def extend(self, values: object) -> None:
        """As of a list's subclass."""


class ArraysOnly(pickle.Unpickler):
    """An unpickler that calls nothing but what makes tensors and NumPy arrays."""

    ALLOWED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),  # of NumPy's bytes in old pickles
        }
    )

    def find_class(self, module: str, name: str) -> object:
        """The class or function of that name, if it is allowed."""
        return super().find_class(module, name) if (module, name) in self.ALLOWED else Left


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of another project's checkpoint by their names there; runs no code of the file's.

    PyTorch's, old ones too, with or without things around the `state_dict`, and Paddle's
    `.pdparams`. Raises FileNotFoundError, or ValueError for a file that has none.
    """
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("a checksum is wrong")
        with open(path, "rb") as file:
            if str(path).endswith(".pdparams"):
                state = ArraysOnly(file, encoding="latin1").load()
            else:
                reader = types.ModuleType("arrays_only")
                reader.Unpickler = ArraysOnly
                reader.load = lambda content, **how: ArraysOnly(content, **how).load()
                state = torch.load(file, "cpu", pickle_module=reader, weights_only=False)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # an unpickler fed with junk may raise anything
        raise ValueError("is damaged, or no checkpoint") from error
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    arrays = {}
    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(value)
        if isinstance(name, str) and isinstance(value, Tensor):
            arrays[name] = value.detach().float() if value.is_floating_point() else value.detach()
    if not arrays:
        raise ValueError("has no weights")
    return arrays


def renamed(name: str, names: Names) -> str | None:
    """A weight's name in another layout, None if it is left out there; KeyError if it has none."""
    for pattern, to in names:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(to) if isinstance(to, str) else to and to(match)
    raise KeyError(name)


def translated(
    weights: dict[str, Tensor], stem: str | None = None
) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Another project's weights under our names, an encoder's arch and stem, and what to know.

    `stem`: one of `STEMS`, if it is known; by default what the layout suggests.

    Every name is translated or is one that the layout knows to leave out. Biases before a BN are
    folded into its running mean, which changes nothing in eval mode. Raises ValueError that names
    what is unknown or missing.
    """
    if any(name.endswith("._mean") for name in weights):  # Paddle's
        weights = {
            name.replace("._mean", ".running_mean").replace("._variance", ".running_var"): (
                value.T.contiguous() if value.ndim == 2 else value
            )
            for name, value in weights.items()
        }
    nearest: tuple[int, str, list[str]] | None = None
    for layout, names in LAYOUTS.items():
        ours, unknown, left = {}, [], []
        for key, value in weights.items():
            try:
                name = renamed(key, names)
            except KeyError:
                unknown.append(key)
                continue
            if name is None:
                left.append(key)
            else:
                ours[name] = value
        if "backbone.conv1.weight" in ours:
            if not unknown:
                break
            if nearest is None or len(unknown) < nearest[0]:
                nearest = len(unknown), layout, unknown
    else:
        if nearest is None:
            raise ValueError("its weights are not those of a ResNet in a layout that is known")
        _, layout, unknown = nearest
        some = ", ".join(unknown[:5]) + ", ..." * (len(unknown) > 5)
        raise ValueError(f"its names are like those of {layout}, but for {some}")

    notes = [f"layout: {layout}"]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        notes.append(f"left out, as of no use here: {', '.join(left[:3])}{more}")
    small = ours["backbone.conv1.weight"].shape[-1] == 3
    if stem is not None:
        notes.append(f"taken to have the stem {stem}, as --stem says")
    elif small and layout == "solo-learn":
        stem = "cifar_pad2"
        notes.append("its names cannot tell conv1's padding: taken for solo-learn's, 2 (--stem)")
    elif layout == "lightly's CIFAR benchmark":
        stem = "cifar_no_relu"
        notes.append("taken to have no ReLU after bn1, as that benchmark (--stem)")
    else:
        stem = "cifar" if small else "imagenet"
    if layout == "PatrickHua/SimSiam" and "projector.6.weight" in ours and small:
        notes.append("its second projector layer is left out, as in its runs on CIFAR")
        ours = {name: value for name, value in ours.items() if not name.startswith("projector.3.")}
        ours = {name: value for name, value in ours.items() if not name.startswith("projector.4.")}
        shift = {"projector.6.": "projector.3.", "projector.7.": "projector.4."}
        ours = {shift.get(name[:12], name[:12]) + name[12:]: value for name, value in ours.items()}
    blocks = [0] * 4
    for name in ours:
        match = re.match(r"backbone\.layer([1-4])\.(\d+)\.", name)
        if match:
            blocks[int(match[1]) - 1] = max(blocks[int(match[1]) - 1], int(match[2]) + 1)
    arch = BLOCKS.get((*blocks, "backbone.layer1.0.conv3.weight" in ours))
    if arch is None:
        raise ValueError(
            f"its backbone, of {blocks} blocks, is none of {', '.join(IMAGENET_ARCHS)}"
        )
    for name in [name for name in ours if name.endswith(".running_mean")]:
        start, _, place = name.removesuffix(".running_mean").rpartition(".")
        bias = f"{start}.{int(place) - 1}.bias" if place.isdigit() else None
        if bias in ours and not start.startswith("backbone"):
            ours[name] = ours[name] - ours.pop(bias)
        ours.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return ours, {"arch": arch, "stem": stem, "width": None}, notes


def head(weights: dict[str, Tensor], name: str) -> nn.Sequential:
    """A projector or predictor of the shapes of its weights; its last BN is affine if theirs is."""
    layers: list[nn.Module] = []
    for i in (0, 3, 6):
        if f"{name}.{i}.weight" not in weights:
            break
        layers += [nn.ReLU(inplace=True)] if i else []
        outputs, inputs = weights[f"{name}.{i}.weight"].shape
        layers.append(nn.Linear(inputs, outputs, bias=f"{name}.{i}.bias" in weights))
        if f"{name}.{i + 1}.running_mean" in weights:
            layers.append(nn.BatchNorm1d(outputs, affine=f"{name}.{i + 1}.weight" in weights))
    return nn.Sequential(*layers)


def foreign(
    path: str | Path, stem: str | None = None
) -> tuple[SimSiam | Classifier, dict, list[str]]:
    """The network in another project's checkpoint, its arch, stem and width, and what to know.

    `stem` as in `translated`. With an fc it is a classifier; a projector or predictor that the file
    does not have is empty. Raises FileNotFoundError or ValueError.
    """
    weights, args, notes = translated(read_weights(path), stem)
    with torch.device("meta"):
        net = SimSiam(args["arch"], args["stem"], 4)
        net.projector, net.predictor = head(weights, "projector"), head(weights, "predictor")
        if "fc.weight" in weights:
            net = Classifier(net.backbone, net.features, len(weights["fc.weight"]))
    load_strictly(net, weights)
    return net, args, notes


def initialise(net: SimSiam, path: str | Path) -> list[str]:
    """Give `net` the weights of a checkpoint, of ours or another project's; what to know of it.

    Heads that the file does not have stay as they are. Raises FileNotFoundError, or ValueError that
    names what does not fit.
    """
    weights, notes, mine = read_weights(path), [], net.state_dict()
    if weights.keys() != mine.keys():
        weights, args, notes = translated(weights)
        if args["stem"] != "imagenet":
            notes.append(f"its --stem is {args['stem']}")
    for part in ("backbone", "projector", "predictor"):
        theirs = {name: weights[name] for name in weights if name.startswith(f"{part}.")}
        ours = {name for name in mine if name.startswith(f"{part}.")}
        if not theirs:
            notes.append(f"it has no {part}: that starts at random")
            continue
        for name in sorted(ours ^ theirs.keys()) or sorted(ours):
            if name not in ours or name not in theirs or mine[name].shape != theirs[name].shape:
                raise ValueError(f"its {part} does not fit the flags of the network: {name}")
        mine |= theirs
    load_strictly(net, mine)
    return notes


def load_any(path: str | Path, state: dict | None) -> tuple[SimSiam | Classifier, dict, list[str]]:
    """The network in a checkpoint: ours, whose content is `state`, or else another project's.

    Also its arch, stem and width, and what to know. Raises FileNotFoundError or ValueError.
    """
    if state is None:
        return foreign(path)
    if "encoder" in state["args"]:
        return classifier(state), state["args"]["encoder"], []
    return pretrained(state), encoder_arguments(state["args"]), []


# Our names as regular expressions, and those of other projects.
EXPORTS: dict[str, Names] = {
    "torchvision": ((r"backbone\.(.+)", r"\1"), (r"(fc\..+)", r"\1"), (r"pr.+", None)),
    "authors": (
        (r"backbone\.(.+)", r"module.encoder.\1"),
        (r"projector\.(.+)", r"module.encoder.fc.\1"),
        (r"predictor\.(.+)", r"module.predictor.\1"),
    ),
    "lightly": (
        (r"backbone\.conv1\.(.+)", r"backbone.0.\1"),
        (r"backbone\.bn1\.(.+)", r"backbone.1.\1"),
        (r"backbone\.layer([1-4])\.(.+)", lambda m: f"backbone.{int(m[1]) + 3}.{m[2]}"),
        (r"projector\.(.+)", r"projection_head.layers.\1"),
        (r"predictor\.(.+)", r"prediction_head.layers.\1"),
    ),
    "mmpretrain": (
        (r"(backbone\..+)", r"\1"),
        (r"projector\.([036])\.(.+)", lambda m: f"neck.fc{int(m[1]) // 3}.{m[2]}"),
        (r"projector\.([147])\.(.+)", lambda m: f"neck.bn{int(m[1]) // 3}.{m[2]}"),
        (r"predictor\.([03])\.(.+)", lambda m: f"head.predictor.fc{int(m[1]) // 3}.{m[2]}"),
        (r"predictor\.([14])\.(.+)", lambda m: f"head.predictor.bn{int(m[1]) // 3}.{m[2]}"),
        (r"(fc\..+)", r"head.\1"),
    ),
    "detectron2": (
        (r"backbone\.layer([1-4])\.(\d+)\.(.+)", lambda m: f"res{int(m[1]) + 1}.{m[2]}.{m[3]}"),
        (r"backbone\.(.+)", r"stem.\1"),
        (r"(?:projector|predictor|fc)\..+", None),
    ),
}
EXPORTS["timm"] = EXPORTS["torchvision"]
# Within detectron2's blocks.
CAFFE = (
    (r"\bbn([123])\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)


def exported(net: SimSiam | Classifier, args: dict, to: str) -> dict[str, Tensor]:
    """The network's weights under the names of another project, one of `EXPORTS`.

    Raises ValueError where that project has no such network.
    """
    arch, stem, layers = args["arch"], args["stem"], net.state_dict()
    if arch not in IMAGENET_ARCHS:
        raise ValueError(f"{to} has no {arch}: choose safetensors or onnx")
    if stem != "imagenet" and to in ("torchvision", "detectron2"):
        raise ValueError(
            f"{to}'s {arch} has another stem (7x7 conv1, max-pool) than this one's, {stem}: choose "
            "timm, for its names with this conv1, or safetensors or onnx"
        )
    three = "projector.6.weight" in layers
    if to == "authors" and isinstance(net, Classifier):
        return {f"module.{name.removeprefix('backbone.')}": value for name, value in layers.items()}
    if to in ("authors", "mmpretrain") and not isinstance(net, Classifier) and not three:
        raise ValueError(f"{to}'s projector has three layers, this one does not")
    heads = r"projector\.[036]\.bias|predictor\.0\.bias|predictor\.4\..+"
    other = "projector.0.weight" in layers and "predictor.0.weight" not in layers
    if to in ("authors", "lightly", "mmpretrain") and (
        other or any(re.fullmatch(heads, name) for name in layers)
    ):
        raise ValueError(
            f"{to}'s SimSiam has other heads than this one, by --bn or --predictor: choose timm or "
            "torchvision, for the encoder alone, or safetensors"
        )
    if to == "lightly" and isinstance(net, Classifier):
        raise ValueError("lightly has no names for a linear classifier: choose timm")
    found = {}
    for name, value in layers.items():
        try:
            theirs = renamed(name, EXPORTS[to])
        except KeyError as error:
            raise ValueError(f"{to} has no name for {name}") from error
        if theirs is not None:
            found[theirs] = value
    if to == "authors":  # theirs has a bias there, which does not matter before a BN
        found["module.encoder.fc.6.bias"] = torch.zeros_like(layers["projector.7.running_mean"])
    if to == "detectron2":
        for pattern, theirs in CAFFE:
            found = {re.sub(pattern, theirs, name): value for name, value in found.items()}
    return found
