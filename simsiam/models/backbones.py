"""Backbones by name, without their classifiers: ours, torchvision's and timm's. They give features.

`resnet18` to `resnet152` and `resnet8`, `resnet14`, ... are those of the paper; `timm:NAME` and
`torchvision:NAME` are any classification model of these libraries, with random weights.
"""

import difflib
import re

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

IMAGENET_ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# First layers of those. For CIFAR: conv1 of 3x3, no max-pool (paper, App. D); in solo-learn's conv1
# has a padding of 2, in lightly's benchmark there is no ReLU after bn1.
STEMS = ("cifar", "imagenet", "cifar_pad2", "cifar_no_relu")
LIBRARIES = ("timm", "torchvision")
# torchvision's that give more than logits in training: theirs is a loss of its own.
WITH_AUXILIARY = ("googlenet", "inception_v3")
BN_MOMENTUM = 0.1  # PyTorch's


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
    Parameters carry torchvision's names. N x `channels` x H x W -> N x 4 `width`.
    """

    def __init__(self, depth: int, width: int = 16, channels: int = 3):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
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


def build_backbone(
    arch: str, stem: str = "cifar", width: int | None = None, channels: int = 3
) -> tuple[nn.Module, int]:
    """A randomly initialised backbone that ends in its pooled features, and their number.

    It takes images of so many `channels`.

    `arch` is one of torchvision's ResNets, `resnet18` to `resnet152`, with one of `STEMS`; or
    `resnet{6n+2}` (`resnet8`, `resnet14`, `resnet20`, ...) of He et al. 2016, sec. 4.2, `width`
    (16) channels wide at its start, which always has the CIFAR stem. (`resnet50` and `resnet152`
    would fit both families: they are torchvision's.) Or it is `timm:NAME` or `torchvision:NAME`, as
    `build_library_backbone` has it, whose stem is called `imagenet`.

    Raises ValueError for an unknown `arch` or `stem`, or one that does not go with the other flags.
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
        with torch.device("cpu"):  # buffers that no checkpoint has would stay on meta
            return build_library_backbone(arch, channels)
    if arch in IMAGENET_ARCHS:
        net = getattr(torchvision.models, arch)(zero_init_residual=True)
        features = net.fc.in_features
        net.fc = nn.Identity()
        if stem != "imagenet":
            padding = 2 if stem == "cifar_pad2" else 1
            net.conv1 = nn.Conv2d(channels, 64, 3, padding=padding, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        elif channels != 3:
            replace_first_conv(net, channels)
        if stem == "cifar_no_relu":
            net.relu = nn.Identity()  # that of the stem: blocks have their own
        return net, features
    depth = re.fullmatch(r"resnet(\d{1,4})", arch)
    if not depth or int(depth[1]) < 8 or int(depth[1]) % 6 != 2:
        raise ValueError(
            f"--arch {arch}: choose one of {', '.join(IMAGENET_ARCHS)}, a CIFAR ResNet resnet8, "
            "resnet14, resnet20, ... (depth 6n+2), timm:NAME or torchvision:NAME"
        )
    if stem != "cifar":
        raise ValueError(f"--stem {stem}: {arch} has the CIFAR stem only; use --stem cifar")
    net = CifarResNet(int(depth[1]), width or 16, channels)
    return net, 4 * net.conv1.out_channels


def is_library_arch(arch: str) -> bool:
    """Whether a backbone is timm's or torchvision's, by its name."""
    return any(arch.startswith(f"{library}:") for library in LIBRARIES)


def build_library_backbone(arch: str, channels: int = 3) -> tuple[nn.Module, int]:
    """`timm:NAME` or `torchvision:NAME` with random weights and no classifier; its features.

    Parameters carry their library's names. BN's running statistics move by a tenth a step at least:
    by a hundredth, as in torchvision's MobileNets, they lag so far behind in a short run that in
    eval mode the network is another one. Dropout and stochastic depth are off: they would draw at
    random from more than seed, epoch, step and sample, and a resumed run would be another one.
    timm's vision transformers take any size that their patches divide. Raises ValueError.
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


def build_timm(name: str, channels: int = 3) -> tuple[nn.Module, int]:
    """timm's model without its classifier, and its features. Raises ValueError."""
    import timm  # here: it takes a second

    check_model_name("timm", name, timm.list_models())
    try:
        net = timm.create_model(name, num_classes=0, in_chans=channels, dynamic_img_size=True)
    except TypeError:  # it is no transformer, and takes any size
        net = timm.create_model(name, num_classes=0, in_chans=channels)
    return net, getattr(net, "head_hidden_size", None) or net.num_features


def build_torchvision(name: str, channels: int = 3) -> tuple[nn.Module, int]:
    """torchvision's model, its last linear layer an Identity; its features. Raises ValueError."""
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


def input_channels(net: nn.Module) -> int:
    """How many channels the images of a network have; 3 where no convolution tells."""
    found = (module.in_channels for module in net.modules() if isinstance(module, nn.Conv2d))
    return next(found, 3)


def replace_first_conv(net: nn.Module, channels: int) -> None:
    """Give torchvision's network a first convolution of so many `channels`, as He et al. start it.

    (Delving Deep into Rectifiers, arXiv 1502.01852, Eq. 14, as torchvision does.)
    """
    named = net.named_modules()
    name, old = next((name, layer) for name, layer in named if isinstance(layer, nn.Conv2d))
    shape = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation")}
    new = nn.Conv2d(channels, old.out_channels, **shape, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    net.set_submodule(name, new)


def find_classifier(net: nn.Module) -> str | None:
    """The name of torchvision's last linear layer, of 1,000 classes; None where there is none."""
    names = [
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 1000
    ]
    return names[-1] if names else None


def check_model_name(library: str, name: str, known: list[str]) -> None:
    """Raises ValueError for a name that a library has not, with the nearest that it has."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.4)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise ValueError(f"--arch {library}:{name}: {library} has no such model{hint}")


def classifier_name(arch: str) -> str:
    """What its library calls the classifier of a backbone `build_library_backbone`."""
    library, _, name = arch.partition(":")
    if library == "timm":
        import timm

        found = timm.get_pretrained_cfg(name).classifier
        if not isinstance(found, str):  # of a distilled one there are two
            raise ValueError(f"timm's {name} has no single classifier: add --encoder_only")
        return found
    return find_classifier(torchvision.models.get_model(name, weights=None))


def has_batchnorm(net: nn.Module) -> bool:
    """Whether a network has a BN layer (sec. 4.4: it keeps outputs apart)."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
