"""Backbones by name, without their classifiers: images -> pooled features.

`resnet18` to `resnet152` are torchvision's, `resnet8`, `resnet14`, ... those of He et al. 2016 for
CIFAR; `timm:NAME` and `torchvision:NAME` are any classification model of a library. All weights are
random.
"""

import difflib
import re

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

IMAGENET_ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# First layers of the ResNets. `cifar`: a 3x3 conv1 with stride 1, no max-pool (paper, App. D);
# `cifar_pad2`: conv1 has a padding of 2 (solo-learn); `cifar_no_relu`: no ReLU after bn1 (lightly's
# benchmark).
STEMS = ("cifar", "imagenet", "cifar_pad2", "cifar_no_relu")
LIBRARIES = ("timm", "torchvision")
# Models of torchvision that return auxiliary logits in training, beside those of their last layer.
WITH_AUXILIARY = ("googlenet", "inception_v3")
BN_MOMENTUM = 0.1  # PyTorch's default


class PadShortcut(nn.Module):
    """Parameter-free shortcut (He et al. 2016, option A): stride 2, zeros for the new channels."""

    def __init__(self, new_channels: int):
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


class CifarResNet(nn.Module):
    """ResNet for CIFAR (He et al. 2016, sec. 4.2) without its fc: depth 6n+2, three stages.

    The stages have `width`, 2 `width` and 4 `width` channels (16, 32, 64 in that paper). Parameters
    have torchvision's names. N x `channels` x H x W -> N x 4 `width`.
    """

    def __init__(self, depth: int, width: int = 16, channels: int = 3):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(BasicBlock(width, width) for _ in range(blocks)))
        self.layer2 = self._stage(width, 2 * width, blocks)
        self.layer3 = self._stage(2 * width, 4 * width, blocks)
        # The initialisation of torchvision's ResNet with zero_init_residual=True.
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


def build_backbone(
    arch: str, stem: str = "cifar", width: int | None = None, channels: int = 3
) -> tuple[nn.Module, int]:
    """Build a randomly initialised backbone for images with `channels` channels.

    Returns the network, N x `channels` x H x W -> N x features, and the number of features.

    `arch`: one of `IMAGENET_ARCHS`, with any of `STEMS`; another `resnet{6n+2}`, which is a
    `CifarResNet`, with the `cifar` stem and a `width` (default: 16); or `timm:NAME` or
    `torchvision:NAME`, with the `imagenet` stem. Raises ValueError for an unknown `arch` or `stem`,
    or a `stem` or `width` that `arch` does not have.
    """
    if stem not in STEMS:
        raise ValueError(f"--stem {stem}: choose one of {', '.join(STEMS)}")
    if not isinstance(arch, str):
        raise TypeError("arch must be a name")
    library = is_library_arch(arch)
    if width is not None and (library or arch in IMAGENET_ARCHS):
        raise ValueError(f"--width {width}: {arch} has its own; it is for resnet8, resnet14, ...")
    if library:
        if stem != "imagenet":
            raise ValueError(f"--stem {stem}: {arch} has first layers of its own: leave it out")
        with torch.device("cpu"):  # under `meta`, non-persistent buffers would have no values
            return build_library_backbone(arch, channels)
    if arch in IMAGENET_ARCHS:
        return build_resnet(arch, stem, channels)
    depth = re.fullmatch(r"resnet(\d{1,4})", arch)
    if not depth or int(depth[1]) < 8 or int(depth[1]) % 6 != 2:
        raise ValueError(
            f"--arch {arch}: choose one of {', '.join(IMAGENET_ARCHS)}, a CIFAR ResNet resnet8, "
            "resnet14, resnet20, ... (depth 6n+2), timm:NAME or torchvision:NAME"
        )
    if stem != "cifar":
        raise ValueError(f"--stem {stem}: {arch} has the CIFAR stem only: use --stem cifar")
    net = CifarResNet(int(depth[1]), width or 16, channels)
    return net, 4 * net.conv1.out_channels


def build_resnet(arch: str, stem: str, channels: int) -> tuple[nn.Module, int]:
    """Build one of `IMAGENET_ARCHS` with one of `STEMS`; returns it and its number of features."""
    net = getattr(torchvision.models, arch)(zero_init_residual=True)
    features = net.fc.in_features
    net.fc = nn.Identity()
    if stem == "imagenet":
        if channels != 3:
            replace_first_conv(net, channels)
        return net, features
    padding = 2 if stem == "cifar_pad2" else 1
    net.conv1 = nn.Conv2d(channels, 64, 3, padding=padding, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    if stem == "cifar_no_relu":
        net.relu = nn.Identity()  # the blocks have their own
    return net, features


# ---- timm and torchvision -----------------------------------------------------------------------


def is_library_arch(arch: str) -> bool:
    """Return whether `arch` names a model of timm or torchvision."""
    return any(arch.startswith(f"{library}:") for library in LIBRARIES)


def build_library_backbone(arch: str, channels: int = 3) -> tuple[nn.Module, int]:
    """Build `timm:NAME` or `torchvision:NAME` without its classifier; returns it and its features.

    Parameters have the library's names. timm's vision transformers take any image size that their
    patches divide. Two settings differ from the library's:
    - BN's momentum is at least 0.1. With 0.01, as in torchvision's MobileNets, running statistics
      lag so far behind in a short run that eval mode computes something else.
    - Dropout and stochastic depth are off: their random numbers are not a function of (seed, epoch,
      step), so that a resumed run would differ.
    Raises ValueError.
    """
    library, _, name = arch.partition(":")
    net, features = (build_timm if library == "timm" else build_torchvision)(name, channels)
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | torchvision.ops.StochasticDepth):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):  # timm's DropPath
            module.drop_prob = 0.0
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, BN_MOMENTUM)
    return net, features


def build_timm(name: str, channels: int) -> tuple[nn.Module, int]:
    """Build a model of timm without its classifier; returns it and its number of features."""
    import timm  # here: it takes a second

    check_model_name("timm", name, timm.list_models())
    try:
        net = timm.create_model(name, num_classes=0, in_chans=channels, dynamic_img_size=True)
    except TypeError:  # not a transformer: it takes any size as it is
        net = timm.create_model(name, num_classes=0, in_chans=channels)
    return net, getattr(net, "head_hidden_size", None) or net.num_features


def build_torchvision(name: str, channels: int) -> tuple[nn.Module, int]:
    """Build a model of torchvision without its last layer; returns it and its features."""
    check_model_name("torchvision", name, torchvision.models.list_models(torchvision.models))
    net = torchvision.models.get_model(name, weights=None) if name not in WITH_AUXILIARY else None
    last = find_classifier(net) if net else None
    if last is None:
        raise ValueError(f"--arch torchvision:{name}: does not end in one linear layer")
    features = net.get_submodule(last).in_features
    net.set_submodule(last, nn.Identity())
    if channels != 3:
        replace_first_conv(net, channels)
    return net, features


def check_model_name(library: str, name: str, choices: list[str]) -> None:
    """Raise ValueError, which suggests similar names, for a name that is not in `choices`."""
    if name not in choices:
        near = difflib.get_close_matches(name, choices, 3, 0.4)
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise ValueError(f"--arch {library}:{name}: {library} has no such model{hint}")


def find_classifier(net: nn.Module) -> str | None:
    """Return the name of the last linear layer with 1000 outputs, None if there is none."""
    linear = [(name, module) for name, module in net.named_modules() if type(module) is nn.Linear]
    return next((name for name, module in linear[::-1] if module.out_features == 1000), None)


def classifier_name(arch: str) -> str:
    """Return the classifier's parameter prefix in the library of `timm:NAME`, `torchvision:NAME`.

    Raises ValueError for a model with several classifiers.
    """
    library, _, name = arch.partition(":")
    if library == "torchvision":
        return find_classifier(torchvision.models.get_model(name, weights=None))
    import timm

    prefix = timm.get_pretrained_cfg(name).classifier
    if not isinstance(prefix, str):  # a distilled model has two
        raise ValueError(f"timm's {name} has no single classifier: add --encoder_only")
    return prefix


# ---- any network --------------------------------------------------------------------------------


def input_channels(net: nn.Module) -> int:
    """Return the image channels of a network, those of its first convolution; 3 without any."""
    convolutions = (module for module in net.modules() if isinstance(module, nn.Conv2d))
    return next((conv.in_channels for conv in convolutions), 3)


def replace_first_conv(net: nn.Module, channels: int) -> None:
    """Replace the first convolution of a network by a new one with `channels` input channels.

    The initialisation is torchvision's: He et al. 2015, arXiv 1502.01852, Eq. 14.
    """
    modules = net.named_modules()
    name, old = next((name, layer) for name, layer in modules if isinstance(layer, nn.Conv2d))
    shape = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation")}
    new = nn.Conv2d(channels, old.out_channels, **shape, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    net.set_submodule(name, new)


def has_batchnorm(net: nn.Module) -> bool:
    """Return whether a network has a BN layer; without any, a collapse is likelier (sec. 4.4)."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
