"""Print a network: its layers, parameters and multiply-adds for one image.

python model.py --arch resnet50 --stem imagenet --projector_layers 3 --image_size 224
"""

from torch import nn

import utils
from simsiam.models.backbones import IMAGENET_ARCHS, STEMS, is_library_arch
from simsiam.models.classifier import Classifier
from simsiam.models.flops import params_and_flops
from simsiam.models.simsiam import SimSiam


def command(argv: list[str] | None = None) -> None:
    """Run the command line; `argv` defaults to the process's arguments."""
    parser = utils.Parser("model.py", __doc__)
    add = parser.add_argument
    add("--arch", default="resnet18", help="as in main.py (resnet18)")
    add("--stem", choices=STEMS, help="as in main.py (cifar; from resnet50 on: imagenet)")
    dim = utils.number(int, 4, 16384)
    add("--feature_dim", type=dim, default=2048, help="d, the width of z (2048)")
    layers = utils.number(int, 1, 8)
    add("--projector_layers", type=layers, help="(cifar stem: 2; imagenet: 3)")
    add("--width", type=utils.number(int, 1, 1024), help="of resnet8, resnet14, ... (16)")
    size = utils.number(int, 8, 1024)
    add("--image_size", type=size, help="pixels (cifar stem: 32; imagenet: 224)")
    args = parser.parse_args(argv)
    large = args.arch in IMAGENET_ARCHS[2:] or is_library_arch(args.arch)
    stem = args.stem or ("imagenet" if large else "cifar")
    layers = args.projector_layers or (3 if stem == "imagenet" else 2)
    size = args.image_size or (224 if stem == "imagenet" else 32)
    with parser.bad_input():
        net = SimSiam(args.arch, stem, args.feature_dim, layers, args.width)
    print(f"SimSiam, {args.arch}, stem {stem}, d = {args.feature_dim}, {size} pixels")
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
