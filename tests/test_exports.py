"""Networks under the names of other projects, in their classes."""

import functools
import pickle
import shlex

import numpy as np
import pytest
import safetensors
import timm
import torch
import torchvision
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from torch import nn
from torchvision.models import resnet18

from simsiam.interop import export
from simsiam.interop.weights import LoadedCheckpoint, Predictor
from simsiam.models.classifier import Classifier
from simsiam.models.simsiam import SimSiam
from tests import projects
from tests.helpers import refused
from tests.projects import headless, mlp, ours, same_weights, write
from tools import convert


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return `ours`, in folders of their own; once for the same arguments."""
    folder = tmp_path_factory.mktemp
    return functools.cache(lambda *args, **flags: ours(folder("saved"), *args, **flags))


def converted(source, to, *flags):
    target = source.with_suffix(f".{to}")
    target.unlink(missing_ok=True)
    convert.command([str(source), str(target), "--to", to, *flags])
    return target


class NonLinearNeck(nn.Module):
    """The names and shapes of mmpretrain's class."""

    def __init__(self, in_channels, hid_channels, out_channels, num_layers, with_last_bn_affine):
        super().__init__()
        for i in range(num_layers):
            last = 0 < i == num_layers - 1
            width = out_channels if last else hid_channels
            affine = with_last_bn_affine if last else True
            self.add_module(f"fc{i}", nn.Linear(in_channels, width, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm1d(width, affine=affine))
            in_channels = width


def part(state, prefix):
    """The weights whose names begin with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def lincls_takes(state):
    """As main_lincls of facebookresearch/simsiam reads a pre-trained file, of a ResNet-18."""
    encoder = {k: v for k, v in part(state, "module.encoder.").items() if not k.startswith("fc")}
    missing = resnet18().load_state_dict(encoder, strict=False)
    return set(missing.missing_keys) == {"fc.weight", "fc.bias"} and not missing.unexpected_keys


def test_classes_of_other_projects_load_strictly(saved):
    """And what is written for them is read again to the same bits."""
    net, path = saved(d=512)
    formats = ("torchvision", "timm", "authors", "lightly", "mmpretrain")
    targets = {to: converted(path, to) for to in formats}
    for to, target in targets.items():
        source, expected = LoadedCheckpoint.open(target), net.state_dict()
        assert [source.encoder[name] for name in ("arch", "stem")] == ["resnet18", "imagenet"]
        if to in ("torchvision", "timm"):
            expected = {key: expected[key] for key in expected if key.startswith("backbone.")}
        same_weights(source.net.state_dict(), expected)
    headless(resnet18()).load_state_dict(torch.load(targets["torchvision"]))
    state = torch.load(targets["authors"])
    authors_net = nn.Module()
    authors_net.encoder = resnet18()
    authors_net.encoder.fc = mlp(512, 512, 512, 512, last_bias=True, affine=False)
    authors_net.predictor = mlp(512, 128, 512, last_bias=True, bn=False)
    nn.DataParallel(authors_net).load_state_dict(state["state_dict"])
    assert lincls_takes(state["state_dict"])
    assert (state["epoch"], state["arch"]) == (2, "resnet18")
    words = shlex.split(state["meta"]["command"])  # to be run again, as a new run
    assert words[:2] == ["python", "main.py"]
    assert words[words.index("--name") + 1] == "my run"
    assert {"--no-pictures", "--compile"} <= set(words)
    assert not {"--ddp", "--resume"} & set(words)
    state = torch.load(converted(path, "authors", "--encoder_only"))["state_dict"]
    assert all(name.startswith("module.encoder.") for name in state)
    assert lincls_takes(state)
    state = torch.load(targets["lightly"])
    for prefix, module in [
        ("backbone.", nn.Sequential(*list(resnet18().children())[:-1])),
        ("projection_head.", SimSiamProjectionHead(512, 512, 512)),
        ("prediction_head.", SimSiamPredictionHead(512, 128, 512)),
    ]:
        module.load_state_dict(part(state, prefix))
    state = torch.load(targets["mmpretrain"])["state_dict"]
    headless(resnet18()).load_state_dict(part(state, "backbone."))
    NonLinearNeck(512, 512, 512, 3, False).load_state_dict(part(state, "neck."))
    predictor = {name.rpartition(".")[0] for name in part(state, "head.predictor.")}
    assert predictor == {"fc0", "bn0", "fc1"}


@pytest.mark.parametrize("layers", [2, 3])
def test_an_affine_last_bn_is_exported_where_a_class_can_have_it(tmp_path, capsys, layers):
    """PatrickHua's, whose projector has one."""
    path = write(projects.patrick_hua(layers, small=False)[0], tmp_path, "a")
    for to in ("lightly", "authors"):
        line = refused(capsys, convert.command, path, tmp_path / "out", "--to", to)
        assert "--encoder_only" in line
    state = torch.load(converted(path, "mmpretrain"))["state_dict"]
    NonLinearNeck(512, 64, 64, layers, True).load_state_dict(part(state, "neck."))
    assert f"num_layers={layers}, with_last_bn_affine=True" in capsys.readouterr().out
    state = torch.load(converted(path, "lightly", "--encoder_only"))
    nn.Sequential(*list(resnet18().children())[:-1]).load_state_dict(part(state, "backbone."))
    assert all(name.startswith("backbone.") for name in state)


@torch.no_grad()
def test_mmpretrain_s_neck_of_two_layers(saved):
    net, path = saved(stem="cifar", layers=2)
    target = converted(path, "mmpretrain")
    neck = NonLinearNeck(512, 64, 64, 2, False)
    neck.load_state_dict(part(torch.load(target)["state_dict"], "neck."))
    x = torch.randn(3, 512)
    z = neck.eval().bn1(neck.fc1(neck.bn0(neck.fc0(x)).relu()))
    torch.testing.assert_close(z, net.projector(x))
    same_weights(LoadedCheckpoint.open(target).net.state_dict(), net.state_dict())


# ---- linear models, detectors, other formats ----------------------------------------------------


@torch.no_grad()
def test_a_linear_model_is_exported_with_its_classes(saved):
    net, path = saved(classes=7)
    x = torch.randn(2, 3, 48, 48)
    targets = {to: converted(path, to) for to in ("torchvision", "authors", "mmpretrain")}
    for target in targets.values():
        same_weights(LoadedCheckpoint.open(target).net.state_dict(), net.state_dict())
    their_net = resnet18(num_classes=7)
    their_net.load_state_dict(torch.load(targets["torchvision"]))
    torch.testing.assert_close(their_net.eval()(x), net(x), atol=1e-5, rtol=1e-5)
    assert "head.fc.bias" in torch.load(targets["mmpretrain"])["state_dict"]
    predictor = Predictor(LoadedCheckpoint.open(targets["torchvision"]))
    assert (predictor.size, predictor.resize) == (224, 256)
    assert predictor.predict(torch.rand(3, 300, 200))[0]["class"] in map(str, range(7))
    session = pytest.importorskip("onnxruntime").InferenceSession(converted(path, "onnx"))
    assert session.run(None, {"images": x.numpy()})[0].shape == (2, 7)


def test_main_lincls_continues_from_a_linear_model(saved):
    """As its --resume does, which reads best_acc1 and the optimizer too."""
    _, path = saved(classes=7)
    state = torch.load(converted(path, "authors"))
    assert (state["epoch"], state["arch"]) == (2, "resnet18")
    assert "python linear.py" in state["meta"]["command"]
    assert state["best_acc1"].to("cpu") == 61.5  # of the better epoch
    net = nn.DataParallel(resnet18(num_classes=7))
    net.load_state_dict(state["state_dict"])
    optimizer = torch.optim.SGD(net.module.fc.parameters(), 0.1, momentum=0.9, weight_decay=0.0)
    optimizer.load_state_dict(state["optimizer"])
    net.module.fc(torch.randn(2, 512)).sum().backward()
    optimizer.step()
    state = torch.load(converted(path, "authors", "--encoder_only"))
    assert "best_acc1" not in state
    assert lincls_takes(state["state_dict"])


@torch.no_grad()
def test_resnet50_in_timm_and_in_detectors(saved):
    net, path = saved("resnet50")
    weights = torch.load(converted(path, "timm"))
    their_net = timm.create_model("resnet50", num_classes=0)
    their_net.load_state_dict(weights)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(their_net.eval()(x), net.backbone(x), atol=1e-4, rtol=1e-4)
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5
    )
    detector.backbone.body.load_state_dict(weights)
    state = pickle.loads(converted(path, "detectron2").read_bytes())
    assert (state["__author__"], state["matching_heuristics"]) == ("SimSiam", True)
    mine = net.backbone.state_dict()
    for name, same in [
        ("stem.conv1.weight", "conv1.weight"),
        ("stem.conv1.norm.running_var", "bn1.running_var"),
        ("res2.0.shortcut.weight", "layer1.0.downsample.0.weight"),
        ("res4.0.shortcut.norm.bias", "layer3.0.downsample.1.bias"),
        ("res5.2.conv3.weight", "layer4.2.conv3.weight"),
        ("res3.3.conv2.norm.weight", "layer2.3.bn2.weight"),
    ]:
        assert np.array_equal(state["model"][name], mine[same].numpy())
    assert len(state["model"]) == len(mine)


@torch.no_grad()
def test_onnx_and_safetensors_have_the_numbers_and_the_source(saved):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, path = saved("resnet8", "cifar", 2)
    session = onnxruntime.InferenceSession(converted(path, "onnx"))
    for number in (1, 5):
        x = torch.randn(number, 3, 48, 48)
        features = session.run(None, {"images": x.numpy()})[0]
        expected = net.backbone(x)
        torch.testing.assert_close(torch.from_numpy(features), expected, atol=1e-4, rtol=1e-4)
    meta = session.get_modelmeta().custom_metadata_map
    assert (meta["arch"], meta["data"], meta["epochs"]) == ("resnet8", "textures", "2")
    with safetensors.safe_open(converted(path, "safetensors"), "pt") as file:
        assert file.metadata()["command"] == meta["command"]
        same_weights({name: file.get_tensor(name) for name in file.keys()}, net.state_dict())  # noqa: SIM118


def test_the_encoder_of_a_linear_model_is_exported(saved):
    net, path = saved("resnet8", "cifar", 2, classes=7)
    with safetensors.safe_open(converted(path, "safetensors", "--encoder_only"), "pt") as file:
        assert set(file.keys()) == {f"backbone.{name}" for name in net.backbone.state_dict()}
    net, path = saved(classes=7)
    state = torch.load(converted(path, "timm", "--encoder_only"))
    assert state.keys() == net.backbone.state_dict().keys()


# ---- what a project has no class for ------------------------------------------------------------

WIDTHS = mlp(512, 32, 48, 64, affine=False)
HEADS, EXACT = ("authors", "lightly", "mmpretrain"), ("authors", "torchvision", "detectron2")


@pytest.mark.parametrize(
    ("settings", "formats", "named"),
    [
        ({}, ("authors",), "512, this one 64.*--encoder_only"),  # hidden widths
        ({"projector_layers": 2}, ("authors",), "this one 2.*--encoder_only"),
        ({"projector_layers": 4}, ("lightly",), "this one 4.*--encoder_only"),
        ({"heads": (WIDTHS, mlp(64, 16, 64, last_bias=True, bn=False))}, HEADS, "this one .?32"),
        *(({"bn": bn}, HEADS, "--predictor.*--encoder_only") for bn in ("none", "hidden", "all")),
        ({"predictor": "none"}, HEADS, "--predictor.*--encoder_only"),
        ({"stem": "cifar"}, EXACT, "stem cifar.* timm"),
        ({"arch": "resnet8", "stem": "cifar"}, tuple(export.EXPORTS), "resnet8.* safetensors"),
    ],
)
def test_networks_without_a_class_are_refused(settings, formats, named):
    settings = {"arch": "resnet18", "stem": "imagenet", "projector_layers": 3} | settings
    with torch.device("meta"):
        net = SimSiam(feature_dim=64, **settings)
    for to in formats:
        with pytest.raises(ValueError, match=named):
            export.export_weights(net, settings, to)
        if settings["stem"] == "imagenet":
            assert export.export_weights(net, settings, to, encoder_only=True)
            assert len(export.export_weights(net, settings, "timm")) == 120
        else:
            with pytest.raises(ValueError, match=named):
                export.export_weights(net, settings, to, encoder_only=True)


@pytest.mark.parametrize("stem", ["cifar_pad2", "cifar_no_relu", "cifar"])
def test_a_stem_that_no_name_tells_is_noted(stem):
    with torch.device("meta"):
        net = SimSiam("resnet18", stem, 64, 2)
    for to in ("timm", "lightly", "mmpretrain", "safetensors"):
        notes = export.export_notes(net, {"arch": "resnet18", "stem": stem}, to)
        assert any(stem in note for note in notes) == (stem != "cifar")
        assert any("ResNet_CIFAR" in note for note in notes) == (to == "mmpretrain")
        assert any("num_layers=2" in note for note in notes) == (to == "mmpretrain")


def test_the_command_refuses_in_one_line(saved, tmp_path, capsys):
    with torch.device("meta"):
        net = SimSiam("resnet18", "imagenet", 64)
        net = Classifier(net.backbone, net.features, 3)
    with pytest.raises(ValueError, match="lightly.*--encoder_only"):
        export.export_weights(net, {"arch": "resnet18", "stem": "imagenet"}, "lightly")
    _, path = saved("resnet8", "cifar", 2)
    line = refused(capsys, convert.command, path, tmp_path / "new", "--to", "timm")
    assert line.count(str(path)) == 1
    (tmp_path / "out").write_text("mine")
    (tmp_path / "junk.pth").write_text("no weights")
    for source, target, named in [
        (path, "out", "out"),
        (tmp_path / "junk.pth", "new", "junk.pth"),
        (tmp_path / "none.pth", "new", "none.pth"),
    ]:
        line = refused(capsys, convert.command, source, tmp_path / target, "--to", "safetensors")
        assert named in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["junk.pth", "out"]
    assert (tmp_path / "out").read_text() == "mine"
