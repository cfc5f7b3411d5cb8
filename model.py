"""The network and its names: backbones, heads, loss, Params/FLOPs.

The symbols are the paper's: x a view, z = projector(backbone(x)), p = predictor(z).
Chen & He, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566.
"""

import copy
import math
import re

import thop
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

IMAGENET_ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


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

    `arch` is one of torchvision's ResNets, `resnet18` to `resnet152`, with the `stem` "cifar"
    (conv1 3x3 stride 1, no max-pool; the paper's App. D) or "imagenet" (torchvision's own); or
    `resnet{6n+2}` (`resnet8`, `resnet14`, `resnet20`, ...) of He et al. 2016, sec. 4.2, `width`
    (16) channels wide at its start, which always has the CIFAR stem. (`resnet50` and `resnet152`
    would fit both families: they are torchvision's.)

    Raises ValueError for an unknown `arch` or `stem`, or one that does not go with the other flags.
    """
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"--stem {stem}: choose cifar or imagenet")
    if arch in IMAGENET_ARCHS:
        if width is not None:
            raise ValueError(
                f"--width {width}: {arch} has its own; it is for resnet8, resnet14, ..."
            )
        net = getattr(torchvision.models, arch)(zero_init_residual=True)
        features = net.fc.in_features
        net.fc = nn.Identity()
        if stem == "cifar":
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        return net, features
    depth = re.fullmatch(r"resnet(\d{1,4})", arch)
    if not depth or int(depth[1]) < 8 or int(depth[1]) % 6 != 2:
        raise ValueError(
            f"--arch {arch}: choose one of {', '.join(IMAGENET_ARCHS)}, or a CIFAR ResNet "
            "resnet8, resnet14, resnet20, ... (depth 6n+2)"
        )
    if stem == "imagenet":
        raise ValueError(f"--stem imagenet: {arch} has the CIFAR stem only; use --stem cifar")
    net = CifarResNet(int(depth[1]), width or 16)
    return net, 4 * net.conv1.out_channels


def D(p: Tensor, z: Tensor) -> Tensor:
    """Negative cosine similarity, Eq. 1 of the paper, mean over the batch: N x d, N x d -> scalar.

    In fp32 whatever autocast says: bf16 cannot tell -0.999 from -1.
    """
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()


class SimSiam(nn.Module):
    """A backbone f, a projection MLP (with it the paper's "encoder") and a prediction MLP h.

    `feature_dim` is d, the width of z and of the projector's hidden layers. The predictor is a
    bottleneck of d/4 (sec. 3). The paper has 3 projector layers on ImageNet, 2 on CIFAR (App. D).

    Raises ValueError for an unknown `arch` or `stem`, or a `feature_dim` below 4.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        stem: str = "cifar",
        feature_dim: int = 2048,
        projector_layers: int = 2,
        width: int | None = None,
    ):
        super().__init__()
        if feature_dim < 4:
            raise ValueError(f"--feature_dim {feature_dim}: must be at least 4")
        d = feature_dim
        self.backbone, previous = backbone(arch, stem, width)
        layers: list[nn.Module] = []
        for _ in range(projector_layers - 1):
            layers += [nn.Linear(previous, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(inplace=True)]
            previous = d
        layers += [nn.Linear(previous, d, bias=False), nn.BatchNorm1d(d, affine=False)]
        self.projector = nn.Sequential(*layers)
        self.predictor = nn.Sequential(
            nn.Linear(d, d // 4, bias=False),
            nn.BatchNorm1d(d // 4),
            nn.ReLU(inplace=True),
            nn.Linear(d // 4, d),
        )

    def encoder_parameters(self) -> list[nn.Parameter]:
        """All but the predictor's, which may have a learning rate of its own."""
        return [*self.backbone.parameters(), *self.projector.parameters()]

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Two views, N x 3 x H x W each -> the loss of Eq. 4 (a scalar), and z1, detached, N x d.

        Each view is its own forward pass: BN statistics are per view, as in the authors' code.
        """
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        loss = D(p1, z2.detach()) / 2 + D(p2, z1.detach()) / 2  # detach: the stop-gradient
        return loss, z1.detach()


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
        self.backbone = backbone
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
    names = ("arch", "stem", "feature_dim", "projector_layers", "width")
    try:
        if args["projector_layers"] not in range(1, 9):
            raise ValueError(f"its arguments are not main.py's: {args['projector_layers']} layers")
        with torch.device("meta"):
            net = SimSiam(*(args[name] for name in names))
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
