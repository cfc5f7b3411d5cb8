"""Networks under the names of other projects, in their classes."""

import pickle
import shlex
from collections import OrderedDict
from types import SimpleNamespace

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
from simsiam.models.simsiam import SimSiam
from tests import projects
from tests.helpers import refused
from tests.projects import mlp, ours, same_weights, write
from tools import convert


def converted(source, to, *flags):
    target = source.with_suffix(f".{to}")
    target.unlink(missing_ok=True)
    convert.command([str(source), str(target), "--to", to, *flags])
    return target


class AuthorsSimSiam(nn.Module):
    """The names and shapes of facebookresearch/simsiam: hidden layers as wide as the encoder."""

    def __init__(self, base_encoder, dim, pred_dim):
        super().__init__()
        self.encoder = base_encoder(num_classes=dim)
        width = self.encoder.fc.in_features
        self.encoder.fc = mlp(width, width, width, dim, last_bias=True, affine=False)
        self.predictor = mlp(dim, pred_dim, dim, last_bias=True, bn=False)


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
    """The weights whose names begin with it, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def lincls_takes(state):
    """As main_lincls of facebookresearch/simsiam reads a pre-trained file, of a ResNet-18."""
    encoder = {k: v for k, v in part(state, "module.encoder.").items() if not k.startswith("fc")}
    missing = resnet18().load_state_dict(encoder, strict=False)
    return set(missing.missing_keys) == {"fc.weight", "fc.bias"} and not missing.unexpected_keys


def test_the_authors_class_takes_what_goes_out(tmp_path, capsys):
    """A width or a BN that it has not is refused, with the way on."""
    door = SimpleNamespace(main=convert.command)
    _, path = ours(tmp_path, d=512)
    state = torch.load(converted(path, "authors"))["state_dict"]
    net = nn.DataParallel(AuthorsSimSiam(resnet18, 512, 128))
    net.load_state_dict(state)
    assert lincls_takes(state)
    _, path = ours(tmp_path)  # d = 64, after 512 features
    line = refused(capsys, door, path, tmp_path / "out", "--to", "authors")
    assert "as wide as its encoder, 512, this one 64" in line
    assert "--encoder_only" in line
    state = torch.load(converted(path, "authors", "--encoder_only"))["state_dict"]
    assert all(name.startswith("module.encoder.") for name in state)
    assert lincls_takes(state)
    _, path = ours(tmp_path, stem="cifar", d=512)
    for flags in ((), ("--encoder_only",)):
        line = refused(capsys, door, path, tmp_path / "out", "--to", "authors", *flags)
        assert "7x7 conv1" in line
        assert "choose timm" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", [2, 3])
def test_an_affine_last_bn_goes_out_where_a_class_can_have_it(tmp_path, capsys, layers):
    """PatrickHua's, whose projector has one."""
    path = write(projects.patrick_hua(layers, small=False)[0], tmp_path, "a")
    door = SimpleNamespace(main=convert.command)
    flags = ("--stem", "imagenet", path, tmp_path / "out", "--to")
    line = refused(capsys, door, *flags, "lightly")
    assert "last BN is not affine" in line
    assert "--encoder_only" in refused(capsys, door, *flags, "authors")
    state = torch.load(converted(path, "mmpretrain"))["state_dict"]
    NonLinearNeck(512, 64, 64, layers, True).load_state_dict(part(state, "neck."))
    line = f"NonLinearNeck with num_layers={layers}, with_last_bn_affine=True"
    assert line in capsys.readouterr().out
    state = torch.load(converted(path, "lightly", "--encoder_only"))
    nn.Sequential(*list(resnet18().children())[:-1]).load_state_dict(part(state, "backbone."))
    assert all(name.startswith("backbone.") for name in state)


@torch.no_grad()
def test_mmpretrain_s_neck_of_two_layers(tmp_path, capsys):
    net, path = ours(tmp_path, stem="cifar", layers=2)
    state = torch.load(converted(path, "mmpretrain"))["state_dict"]
    neck = NonLinearNeck(512, 64, 64, 2, False)
    neck.load_state_dict(part(state, "neck."))
    x = torch.randn(3, 512)
    z = neck.eval().bn1(neck.fc1(neck.bn0(neck.fc0(x)).relu()))
    torch.testing.assert_close(z, net.projector(x))
    NonLinearNeck(64, 16, 64, 1, False).fc0.load_state_dict(part(state, "head.predictor.fc0."))
    out = capsys.readouterr().out
    assert "num_layers=2, with_last_bn_affine=False" in out
    assert "ResNet_CIFAR" in out
    same_weights(
        LoadedCheckpoint.open(path.with_suffix(".mmpretrain")).net.state_dict(), net.state_dict()
    )


@pytest.mark.parametrize("stem", ["cifar_pad2", "cifar_no_relu", "cifar"])
def test_a_stem_that_no_name_tells_is_said(tmp_path, capsys, stem):
    _, path = ours(tmp_path, stem=stem, layers=2)
    for to in ("timm", "lightly", "mmpretrain", "safetensors"):
        converted(path, to)
        said = [line for line in capsys.readouterr().out.splitlines() if f"stem is {stem}" in line]
        assert len(said) == (stem != "cifar")


def test_main_lincls_goes_on_from_a_linear_model(tmp_path):
    """As its --resume does, which reads best_acc1 and the optimizer too."""
    _, path = ours(tmp_path, classes=7)
    saved = torch.load(converted(path, "authors"))
    assert (saved["epoch"], saved["arch"]) == (2, "resnet18")
    assert saved["best_acc1"].to("cpu") == 61.5  # of the better epoch
    net = nn.DataParallel(resnet18(num_classes=7))
    net.load_state_dict(saved["state_dict"])
    optimizer = torch.optim.SGD(net.module.fc.parameters(), 0.1, momentum=0.9, weight_decay=0.0)
    optimizer.load_state_dict(saved["optimizer"])
    net.module.fc(torch.randn(2, 512)).sum().backward()
    optimizer.step()
    state = torch.load(converted(path, "authors", "--encoder_only"))
    assert "best_acc1" not in state
    assert lincls_takes(state["state_dict"])


def test_the_encoder_alone_goes_out(tmp_path):
    net, path = ours(tmp_path, stem="cifar", layers=2, classes=7)
    with safetensors.safe_open(converted(path, "safetensors", "--encoder_only"), "pt") as file:
        assert set(file.keys()) == {f"backbone.{name}" for name in net.backbone.state_dict()}
    state = torch.load(converted(path, "timm", "--encoder_only"))
    assert state.keys() == net.backbone.state_dict().keys()
    session = pytest.importorskip("onnxruntime").InferenceSession(
        converted(path, "onnx", "--encoder_only")
    )
    x = torch.randn(2, 3, 48, 48)
    assert session.run(None, {"images": x.numpy()})[0].shape == (2, 512)


@pytest.mark.parametrize("to", ["torchvision", "timm", "authors", "lightly", "mmpretrain"])
def test_there_and_back_is_the_same_to_the_bit(tmp_path, to):
    net, path = ours(tmp_path, d=512)
    source = LoadedCheckpoint.open(converted(path, to))
    assert [source.encoder[name] for name in ("arch", "stem")] == ["resnet18", "imagenet"]
    mine = net.state_dict()
    heads = () if to in ("torchvision", "timm") else ("projector", "predictor")
    expected = {key: mine[key] for key in mine if key.startswith(("backbone", *heads))}
    same_weights(source.net.state_dict(), expected)


def test_modules_of_other_projects_load_strictly(tmp_path):
    _, path = ours(tmp_path, d=512)
    fc_free = resnet18()
    fc_free.fc = nn.Identity()
    fc_free.load_state_dict(torch.load(converted(path, "torchvision")))
    encoder = resnet18()
    encoder.fc = mlp(512, 512, 512, 512, last_bias=True, affine=False)
    state = torch.load(converted(path, "authors"))
    encoder.load_state_dict(part(state["state_dict"], "module.encoder."))
    predictor = mlp(512, 128, 512, last_bias=True, bn=False)
    predictor.load_state_dict(part(state["state_dict"], "module.predictor."))
    assert (state["epoch"], state["arch"]) == (2, "resnet18")
    words = shlex.split(state["meta"]["command"])  # to be run again, as a new run
    assert words[:2] == ["python", "main.py"]
    assert words[words.index("--name") + 1] == "my run"
    assert {"--no-pictures", "--compile"} <= set(words)
    assert not {"--ddp", "--resume"} & set(words)
    state = torch.load(converted(path, "lightly"))
    for prefix, module in [
        ("backbone.", nn.Sequential(*list(resnet18().children())[:-1])),
        ("projection_head.", SimSiamProjectionHead(512, 512, 512)),
        ("prediction_head.", SimSiamPredictionHead(512, 128, 512)),
    ]:
        module.load_state_dict(part(state, prefix))
    state = torch.load(converted(path, "mmpretrain"))
    names = OrderedDict.fromkeys(key.rsplit(".", 1)[0] for key in state["state_dict"])
    heads = [name for name in names if not name.startswith("backbone")]
    assert heads[:6] == [f"neck.{layer}{i}" for i in range(3) for layer in ("fc", "bn")]
    assert heads[6:] == [f"head.predictor.{layer}" for layer in ("fc0", "bn0", "fc1")]


@torch.no_grad()
def test_resnet50_goes_to_timm_and_to_detectors(tmp_path):
    net, path = ours(tmp_path, "resnet50")
    weights = torch.load(converted(path, "timm"))
    theirs = timm.create_model("resnet50", num_classes=0)
    theirs.load_state_dict(weights)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs.eval()(x), net.backbone(x), atol=1e-4, rtol=1e-4)
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5
    ).eval()
    detector.backbone.body.load_state_dict(weights)
    found = detector([torch.rand(3, 64, 64)])
    assert set(found[0]) == {"boxes", "labels", "scores"}
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
def test_onnx_and_safetensors_have_the_numbers_and_the_source(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, path = ours(tmp_path, "resnet18", "cifar_no_relu", 2)
    session = onnxruntime.InferenceSession(converted(path, "onnx"))
    for number in (1, 5):
        x = torch.randn(number, 3, 48, 48)
        found = session.run(None, {"images": x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), net.backbone(x), atol=1e-4, rtol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert (about["arch"], about["data"], about["epochs"]) == ("resnet18", "textures", "2")
    with safetensors.safe_open(converted(path, "safetensors"), "pt") as file:
        assert file.metadata()["command"] == about["command"]
        assert set(file.keys()) == net.state_dict().keys()
        assert all(torch.equal(file.get_tensor(k), v) for k, v in net.state_dict().items())


def test_a_linear_model_goes_out_with_its_classes(tmp_path):
    net, path = ours(tmp_path, classes=7)
    assert "python linear.py" in convert.metadata(LoadedCheckpoint.open(path).state)["command"]
    theirs = resnet18(num_classes=7)
    theirs.load_state_dict(torch.load(converted(path, "torchvision")))
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(theirs.eval()(x), net(x), atol=1e-5, rtol=1e-5)
    assert "module.fc.bias" in torch.load(converted(path, "authors"))["state_dict"]
    assert "head.fc.bias" in torch.load(converted(path, "mmpretrain"))["state_dict"]
    for to in ("torchvision", "authors", "mmpretrain"):
        same_weights(LoadedCheckpoint.open(converted(path, to)).net.state_dict(), net.state_dict())
    predictor = Predictor(LoadedCheckpoint.open(converted(path, "torchvision")))
    assert (predictor.size, predictor.resize) == (224, 256)
    assert predictor.predict(torch.rand(3, 300, 200))[0]["class"] in map(str, range(7))
    session = pytest.importorskip("onnxruntime").InferenceSession(converted(path, "onnx"))
    assert session.run(None, {"images": x.numpy()})[0].shape == (2, 7)


def test_what_cannot_go_out_is_said(tmp_path, capsys):
    door = SimpleNamespace(main=convert.command)
    _, path = ours(tmp_path, classes=3)
    assert "lightly" in refused(capsys, door, path, tmp_path / "out", "--to", "lightly")
    for arch, stem, layers, to, words in [
        ("resnet18", "cifar", 3, "torchvision", "choose timm"),
        ("resnet18", "cifar", 3, "detectron2", "choose timm"),
        ("resnet18", "imagenet", 2, "authors", "projector of 3 layers, this one 2"),
        ("resnet18", "imagenet", 4, "lightly", "projector of 1 or 2 or 3 layers, this one 4"),
        ("resnet8", "cifar", 3, "timm", "no resnet8"),
    ]:
        _, path = ours(tmp_path, arch, stem, layers)
        line = refused(capsys, door, path, tmp_path / "out", "--to", to)
        assert words in line
        assert line.count(str(path)) == 1
    (tmp_path / "out").write_text("mine")
    assert "out exists" in refused(capsys, door, path, tmp_path / "out", "--to", "safetensors")
    path.write_text("no weights")
    assert "no checkpoint" in refused(capsys, door, path, tmp_path / "new", "--to", "timm")
    line = refused(capsys, door, tmp_path / "none.pth", tmp_path / "new", "--to", "timm")
    assert "none.pth: there is no such checkpoint" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.pth", "out"]


@pytest.mark.parametrize(
    "flags", [{"bn": "none"}, {"bn": "hidden"}, {"bn": "all"}, {"predictor": "none"}]
)
def test_heads_of_ablations_do_not_go_out_under_names_of_others(flags):
    net = SimSiam("resnet18", "imagenet", 16, 3, **flags)
    args = {"arch": "resnet18", "stem": "imagenet"}
    for to in ("authors", "lightly", "mmpretrain"):
        with pytest.raises(ValueError, match="--predictor"):
            export.export_weights(net, args, to)
    assert len(export.export_weights(net, args, "timm")) == len(net.backbone.state_dict())


def test_hidden_layers_of_two_widths_have_no_class(tmp_path):
    net = SimSiam("resnet18", "imagenet", 64, 3)
    net.projector = mlp(512, 32, 48, 64, affine=False)
    for to in ("authors", "lightly", "mmpretrain"):
        with pytest.raises(ValueError, match="this one 32:|this one .32, 48"):
            export.export_weights(net, {"arch": "resnet18", "stem": "imagenet"}, to)
