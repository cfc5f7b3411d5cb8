"""Print a network: its layers, parameters and multiply-adds for one image.

python model.py --arch resnet50 --stem imagenet --projector_layers 3 --image_size 224
"""

import argparse

from torch import nn

import utils
from simsiam.models.backbones import IMAGENET_ARCHS, is_library_arch
from simsiam.models.classifier import Classifier
from simsiam.models.flops import params_and_flops
from simsiam.models.methods import build_model
from simsiam.runtime.config import add_option
from simsiam.training.recipes import RECIPES, PretrainConfig

OPTIONS = ("arch", "stem", "feature_dim", "projector_layers", "width", "image_size")


def command(argv: list[str] | None = None) -> None:
    """Run the command line; `argv` defaults to the process's arguments."""
    parser = utils.Parser("model.py", __doc__, argument_default=argparse.SUPPRESS)
    for name in OPTIONS:
        add_option(parser, name, **PretrainConfig.__dataclass_fields__[name].metadata)
    overrides = vars(parser.parse_args(argv))
    arch = overrides.get("arch", PretrainConfig.arch)
    is_large = arch in IMAGENET_ARCHS[2:] or is_library_arch(arch)
    stem = overrides.get("stem", "imagenet" if is_large else "cifar")
    recipe = RECIPES["imagenet" if stem == "imagenet" else "cifar"]
    config = recipe | overrides | {"arch": arch, "stem": stem}
    size = config["image_size"] or 32
    with parser.bad_input():
        net = build_model(config)
    print(f"SimSiam, {arch}, stem {stem}, d = {config['feature_dim']}, {size} pixels")
    print(f"{'part':12} {'Params':>12} {'FLOPs (multiply-adds, by thop)':>32}")
    for name, part in (
        ("backbone", nn.ModuleDict({"backbone": net.backbone})),
        ("SimSiam", net),
        ("linear, 1000", Classifier(net.backbone, net.features, 1000)),
    ):
        params, flops = params_and_flops(part, size)
        print(f"{name:12} {params / 1e6:10.2f} M {flops / 1e9:30.3f} G")
    print(net)


if __name__ == "__main__":
    command()
