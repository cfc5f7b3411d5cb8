"""Backbones: their shapes, and those of timm and torchvision trained, resumed and exported."""

import types

import pandas
import pytest
import timm
import torch
import torchvision
from torch import nn

import linear
import main
from simsiam.data.textures import make_textures
from simsiam.interop.weights import LoadedCheckpoint, init_from_checkpoint
from simsiam.models import backbones
from simsiam.models.simsiam import SimSiam
from tests import helpers
from tools import convert

# ---- ResNets ------------------------------------------------------------------------------------


def test_cifar_stem_leaves_4x4_in_layer4():
    net, _ = backbones.build_backbone("resnet18")
    assert all((m.weight == 0).all() for n, m in net.named_modules() if n.endswith("bn2"))
    shapes = []
    net.layer4.register_forward_hook(lambda *io: shapes.append(io[2].shape))
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    assert shapes == [(2, 512, 4, 4)]


def test_cifar_resnets_have_the_papers_sizes():
    # He et al. 2016, Table 6, with the fc of 64 x 10 + 10.
    for depth, millions in [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]:
        net, features = backbones.build_backbone(f"resnet{depth}")
        params = sum(p.numel() for p in net.parameters()) + 650
        assert round(params / 1e6, 1 if depth == 110 else 2) == millions
        assert features == 64
        assert all((m.weight == 0).all() for n, m in net.named_modules() if n.endswith("bn2"))
    net, features = backbones.build_backbone("resnet8", width=32)
    assert net(torch.zeros(1, 3, 28, 28)).shape == (1, features) == (1, 128)


def test_stems_differ_in_padding_and_relu():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    nets = {stem: backbones.build_backbone("resnet18", stem)[0].eval() for stem in backbones.STEMS}
    cifar, no_relu = nets["cifar"], nets["cifar_no_relu"]
    assert (nets["imagenet"].conv1.kernel_size, nets["imagenet"].conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(nets["imagenet"].maxpool, nn.MaxPool2d)
    assert nets["cifar_pad2"].conv1(x).shape == (2, 64, 34, 34)
    for layer in cifar.modules():  # with zero_init_residual's weights a block is a ReLU itself
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1)
    no_relu.load_state_dict(cifar.state_dict())
    stem = cifar.bn1(cifar.conv1(x))
    rest = nn.Sequential(cifar.layer1, cifar.layer2, cifar.layer3, cifar.layer4)
    torch.testing.assert_close(no_relu(x), rest(stem).mean((2, 3)))
    torch.testing.assert_close(cifar(x), rest(stem.relu()).mean((2, 3)))
    assert (cifar(x) - no_relu(x)).abs().max() > 0.01


@pytest.mark.parametrize(
    "settings",
    [
        *({"arch": arch} for arch in ("resnet9", "resnet2", "vgg16", "")),
        {"stem": "some", "arch": "resnet18"},
        {"width": 8, "arch": "resnet18"},
        {"stem": "imagenet", "arch": "resnet8"},
    ],
)
def test_a_refused_setting_is_named(settings):
    flag, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"^--{flag} {value}: "):
        backbones.build_backbone(**settings)


# ---- timm and torchvision -----------------------------------------------------------------------

NETS = ("timm:test_vit", "torchvision:mobilenet_v3_small")
SMALL = "--data_name textures --train_size 64 --recipe fast --batch_size 32 --feature_dim 16 "
SMALL += "--view_sizes 1.0 --lr 0.01 --epochs 2 --k 5 --no-pictures"


def bare(arch):
    """The library's own network without its classifier, by the library's means alone."""
    library, name = arch.split(":")
    if library == "timm":
        return timm.create_model(name, num_classes=0)
    net = torchvision.models.get_model(name, weights=None)
    net.classifier[3] = nn.Identity()
    return net


@pytest.fixture(scope="module", params=NETS)
def run(request, tmp_path_factory):
    """A run of two epochs, and its backbone's name."""
    out = tmp_path_factory.mktemp("results")
    main.main(f"{SMALL} --arch {request.param} --out {out} --name a".split())
    return request.param, out


def test_a_run_that_was_cut_ends_at_the_same_bits(run):
    """Also of networks with dropout, which is off."""
    arch, out = run
    flags = f"{SMALL} --arch {arch} --out {out} --name cut".split()
    helpers.interrupt(main, flags, epoch=1)
    main.main([*flags, "--resume"])
    states = (torch.load(out / f"{name}_model.pth")["model"] for name in ("a", "cut"))
    assert helpers.same_bits(*states)


def test_its_weights_load_strictly_there_and_give_the_same_features(run, tmp_path):
    """Through the library, and through torch.hub."""
    arch, out = run
    library, path = arch.split(":")[0], out / "a_model.pth"
    convert.command(f"{path} {tmp_path}/encoder.pth --to {library} --encoder_only".split())
    net = bare(arch).eval()
    net.load_state_dict(torch.load(tmp_path / "encoder.pth"), strict=True)
    if arch == "timm:test_vit":
        net.set_input_size((32, 32))  # made for 160 pixels
    encoder = torch.hub.load(str(helpers.ROOT), "encoder", source="local", checkpoint=str(path))
    source, images = LoadedCheckpoint.open(path), make_textures(4, seed=3)[0]
    features = source.features(images, torch.autocast("cpu", enabled=False))
    x = source.views.eval_transform(images)
    with torch.no_grad():
        assert torch.allclose(features, net(x), atol=1e-4)
        assert torch.allclose(features, encoder(x), atol=1e-4)


def test_a_head_is_fitted_exported_and_the_network_tuned(run, tmp_path):
    arch, out = run
    library, name = arch.split(":")
    path = ["--model_path", f"{out}/a_model.pth", "--out", str(tmp_path), "--no-pictures"]
    linear.main([*path, "--cached", "--epochs", "1", "--lr", "1"])
    linear.main([*path, "--finetune", "--epochs", "1"])
    for kind in ("linear_cached", "finetune"):
        rows = pandas.read_csv(tmp_path / f"a_{kind}_statistics.csv")
        assert rows["test_acc@1"].between(0, 100).all()
    exported = tmp_path / "whole.pth"
    convert.command([f"{tmp_path}/a_linear_cached_model.pth", str(exported), "--to", library])
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    make(name, num_classes=10).load_state_dict(torch.load(exported), strict=True)


def test_it_starts_from_the_library_s_own_file(run, tmp_path):
    """The file has a classifier, which is not taken; more than that is refused."""
    arch, _ = run
    library, name = arch.split(":")
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    weights, path = make(name).state_dict(), tmp_path / "a.pth"
    torch.save(weights, path)
    net = SimSiam(arch, "imagenet", 16)
    init_from_checkpoint(net, path)
    backbone = net.backbone.state_dict()
    assert backbone.keys() < weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in backbone.items())
    torch.save(weights | {"other.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="layout|known|weights"):
        init_from_checkpoint(net, path)


def test_settings_that_differ_from_the_library_s():
    """torchvision's MobileNetV3 has a BN momentum of 0.01 and dropout of 0.2."""
    net, _ = backbones.build_backbone("torchvision:mobilenet_v3_small", "imagenet")
    layers = list(net.modules())
    assert {layer.momentum for layer in layers if isinstance(layer, nn.BatchNorm2d)} == {0.1}
    assert {layer.p for layer in layers if isinstance(layer, nn.Dropout)} == {0}
    net, features = backbones.build_backbone("timm:test_convnext", "imagenet")
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, features)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--arch timm:convnext_tinny", ["--arch timm:convnext_tinny", "convnext_tiny"]),
        ("--arch torchvision:resnet19", ["torchvision has no such model", "resnet18"]),
        ("--arch torchvision:squeezenet1_0", ["does not end in one linear layer"]),
        ("--arch timm:test_vit --image_size 30", ["--image_size 30", "refuses it"]),
        ("--arch timm:test_vit --stem cifar", ["--stem cifar", "leave it out"]),
        ("--arch timm:test_vit --width 8", ["--width 8"]),
        ("--arch alexnet", ["timm:NAME"]),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, flags, words):
    flags = ["--data_name", "textures", "--out", tmp_path / "out", *flags.split()]
    err = helpers.refused(capsys, main, *flags)
    assert all(word in err for word in words), err


def test_an_export_to_another_library_is_refused(run, capsys, tmp_path):
    arch, out = run
    other = "torchvision" if arch.startswith("timm") else "timm"
    command = types.SimpleNamespace(main=convert.command)
    target = tmp_path / "out.pth"
    err = helpers.refused(capsys, command, out / "a_model.pth", target, "--to", other)
    assert f"{other} has no {arch}" in err
    assert not target.exists()
