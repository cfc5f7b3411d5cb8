"""Others' checkpoints, of modules with each project's own structure and names, in our model."""

import argparse
import os
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import lightly.models
import numpy as np
import pandas
import pytest
import safetensors
import timm
import torch
import torchvision
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from PIL import Image
from torch import nn
from torchvision.models import resnet18

import data
import linear
import main
import model
from tests import crash
from tests.test_safety import ROOT, refused
from tools import convert, features


def shaken(module):
    """Nothing at its initial value: BN statistics, affine parameters, biases."""
    torch.manual_seed(0)
    for name, value in module.state_dict().items():
        if "running_var" in name:
            value.uniform_(0.5, 1.5)
        elif "num_batches" in name:
            value.fill_(7)
        elif value.ndim == 1:
            value.normal_(0.5 * ("weight" in name), 0.3)
    return module.eval()


def mlp(*widths, bias=False, last_bias=False, affine=True, bn=True):
    """Linear, BN, ReLU; Linear, BN, ReLU; ..., Linear and, if `bn`, a last BN."""
    layers = []
    for i in range(1, len(widths)):
        last = i + 1 == len(widths)
        layers.append(nn.Linear(widths[i - 1], widths[i], bias=last_bias if last else bias))
        if not last:
            layers += [nn.BatchNorm1d(widths[i]), nn.ReLU()]
        elif bn:
            layers.append(nn.BatchNorm1d(widths[i], affine=affine))
    return nn.Sequential(*layers)


def small_stem(net, padding=1):
    net.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
    net.maxpool = nn.Identity()
    return net


def torch_names(module, prefix=""):
    return OrderedDict((prefix + name, value) for name, value in module.state_dict().items())


def authors():
    """facebookresearch/simsiam's builder.py."""
    encoder = resnet18()
    width = encoder.fc.in_features
    encoder.fc = mlp(width, width, width, 64, last_bias=True, affine=False)
    encoder, predictor = shaken(encoder), shaken(mlp(64, 16, 64, last_bias=True, bn=False))
    state = torch_names(encoder, "module.encoder.") | torch_names(predictor, "module.predictor.")
    backbone = nn.Sequential(*list(encoder.children())[:-1], nn.Flatten())
    return {"epoch": 99, "arch": "resnet18", "state_dict": state}, backbone, encoder.fc, predictor


def authors_linear():
    net = shaken(resnet18())
    state = {
        "epoch": 89,
        "best_acc1": torch.tensor(68.1),
        "state_dict": torch_names(net, "module."),
    }
    return state, nn.Sequential(*list(net.children())[:-1], nn.Flatten()), None, None


def leftthomas(linear=False):
    parts = [
        module
        for module in small_stem(resnet18()).children()
        if not isinstance(module, nn.Linear | nn.Identity)
    ]
    f = shaken(nn.Sequential(*parts))
    g, h = shaken(mlp(512, 64, 64)), shaken(mlp(64, 16, 64, last_bias=True, bn=False))
    if linear:
        state = torch_names(f, "f.") | torch_names(nn.Linear(512, 10), "fc.")
        return state, nn.Sequential(f, nn.Flatten()), None, None
    state = torch_names(f, "f.") | torch_names(g, "g.") | torch_names(h, "h.")
    return state, nn.Sequential(f, nn.Flatten()), g, h


def patrick_hua(layers=2):
    net = small_stem(resnet18()) if layers == 2 else resnet18()
    net.fc = nn.Identity()
    net = shaken(net)
    one, two, three = (
        shaken(nn.Sequential(nn.Linear(a, 64), nn.BatchNorm1d(64), *last))
        for a, last in ((512, [nn.ReLU()]), (64, [nn.ReLU()]), (64, []))
    )
    first = shaken(nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU()))
    second = shaken(nn.Linear(16, 64))
    projector = OrderedDict()
    for i, layer in enumerate((one, two, three), 1):
        projector |= torch_names(layer, f"layer{i}.")
    state = torch_names(net, "backbone.") | {f"projector.{k}": v for k, v in projector.items()}
    state |= torch_names(net, "encoder.0.") | {f"encoder.1.{k}": v for k, v in projector.items()}
    state |= torch_names(first, "predictor.layer1.") | torch_names(second, "predictor.layer2.")
    used = (one, three) if layers == 2 else (one, two, three)
    return (
        {"epoch": 1, "state_dict": state},
        net,
        nn.Sequential(*used),
        nn.Sequential(first, second),
    )


def lightly_example():
    backbone = shaken(nn.Sequential(*list(resnet18().children())[:-1]))
    head = shaken(SimSiamProjectionHead(512, 512, 128))
    predictor = shaken(SimSiamPredictionHead(128, 64, 128))
    state = torch_names(backbone, "backbone.") | torch_names(head, "projection_head.")
    state |= torch_names(predictor, "prediction_head.")
    return state, nn.Sequential(backbone, nn.Flatten()), head, predictor


def lightly_cifar():
    """The CIFAR benchmark's: two layers, of which lightly's head makes the last BN affine-free."""
    net = lightly.models.ResNetGenerator("resnet-18")
    backbone = shaken(nn.Sequential(*list(net.children())[:-1], nn.AdaptiveAvgPool2d(1)))
    blocks = [(512, 64, nn.BatchNorm1d(64), nn.ReLU()), (64, 64, nn.BatchNorm1d(64), None)]
    head = shaken(lightly.models.modules.heads.ProjectionHead(blocks))
    predictor = shaken(SimSiamPredictionHead(64, 16, 64))
    state = torch_names(backbone, "backbone.") | torch_names(head, "projection_head.")
    state |= torch_names(predictor, "prediction_head.")
    whole = {"state_dict": state, "pytorch-lightning_version": "2.0", "callbacks": {}}
    return whole, nn.Sequential(backbone, nn.Flatten()), head, predictor


def solo_learn(prefix="backbone"):
    net = small_stem(resnet18(), padding=2)
    net.fc = nn.Identity()
    net = shaken(net)
    projector = shaken(mlp(512, 64, 64, 64, last_bias=True, affine=False))
    predictor = shaken(mlp(64, 16, 64, last_bias=True, bn=False))
    state = torch_names(net, f"{prefix}.") | torch_names(projector, "projector.")
    state |= torch_names(predictor, "predictor.") | torch_names(nn.Linear(512, 10), "classifier.")
    whole = {"state_dict": state, "hyper_parameters": argparse.Namespace(lr=0.5, devices=[0])}
    return whole, net, projector, predictor


def mmpretrain(linear=False):
    net = resnet18()
    net.fc = nn.Identity()
    net = shaken(net)
    state = torch_names(net, "backbone.")
    if linear:
        state |= torch_names(nn.Linear(512, 1000), "head.fc.")
        return {"meta": {"epoch": 90}, "state_dict": state}, net, None, None
    neck = shaken(mlp(512, 64, 64, 64, affine=False))
    predictor = shaken(mlp(64, 16, 64, last_bias=True, bn=False))
    for module, prefix in ((neck, "neck."), (predictor, "head.predictor.")):
        for name, value in module.state_dict().items():
            place, rest = name.split(".")
            layer = f"{'bn' if int(place) % 3 else 'fc'}{int(place) // 3}"
            state[f"{prefix}{layer}.{rest}"] = value
    return {"meta": {"epoch": 100}, "state_dict": state}, net, neck, predictor


def passl(mlp_name=""):
    """Paddle's arrays: Linear weights lie the other way round, BN's statistics have other names."""
    _, backbone, projector, predictor = authors()
    net = resnet18()
    for mine, theirs in zip(list(net.children())[:-1], backbone.children(), strict=False):
        mine.load_state_dict(theirs.state_dict())
    net.fc = nn.Identity()
    state = torch_names(net, "encoder.") | torch_names(projector, "encoder.fc.")
    state |= torch_names(predictor, f"predictor.{mlp_name}")
    arrays = {"StructuredToParameterName@@": {"encoder.conv1.weight": "conv2d_0.w_0"}}
    for name, value in state.items():
        if "num_batches" not in name:
            name = name.replace("running_mean", "_mean").replace("running_var", "_variance")
            arrays[name] = (value.T if value.ndim == 2 else value).contiguous().numpy()
    return arrays, backbone, projector, predictor


def torchvision_s():
    net = shaken(resnet18())
    return net.state_dict(), nn.Sequential(*list(net.children())[:-1], nn.Flatten()), None, None


def timm_s():
    net = shaken(timm.create_model("resnet50"))
    return net.state_dict(), TimmFeatures(net), None, None


class TimmFeatures(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True)


FORMATS = {
    "authors": authors,
    "authors, linear": authors_linear,
    "leftthomas": leftthomas,
    "leftthomas, linear": lambda: leftthomas(linear=True),
    "PatrickHua, CIFAR": patrick_hua,
    "PatrickHua, ImageNet": lambda: patrick_hua(3),
    "lightly's example": lightly_example,
    "lightly's CIFAR benchmark": lightly_cifar,
    "solo-learn": solo_learn,
    "solo-learn, older": lambda: solo_learn("encoder"),
    "mmpretrain": mmpretrain,
    "mmpretrain, linear": lambda: mmpretrain(linear=True),
    "PASSL": passl,
    "PASSL 1.1": lambda: passl("mlp."),
    "torchvision": torchvision_s,
    "timm": timm_s,
}


def write(state, folder, name):
    if name.startswith("PASSL"):
        path = folder / "a.pdparams"
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        path = folder / "a.pth"
        torch.save(state, path, _use_new_zipfile_serialization="older" not in name)
    return path


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_features_z_and_p_are_theirs(tmp_path, name):
    state, *theirs = FORMATS[name]()
    net, args, notes = model.foreign(write(state, tmp_path, name))
    net.eval()
    torch.manual_seed(1)
    x = torch.randn(4, 3, 64, 64)
    if isinstance(net, model.Classifier):
        net.projector = net.predictor = ()
        state = state.get("state_dict", state)
        (weight,) = (value for key, value in state.items() if key.endswith("fc.weight"))
        (bias,) = (value for key, value in state.items() if key.endswith("fc.bias"))
        expected = theirs[0](x) @ weight.T + bias
        torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    for i, part in enumerate((net.backbone, net.projector, net.predictor)):
        if theirs[i] is None:
            assert len(part) == 0
            continue
        mine, expected = part(x), theirs[i](x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
        x = expected
    assert args["arch"] in ("resnet18", "resnet50")
    small = "leftthomas", "PatrickHua, CIFAR", "solo-learn", "lightly's CIFAR"
    assert (args["stem"] != "imagenet") == name.startswith(small)
    assert notes[0].startswith("layout: ")


def test_a_checkpoint_of_ours_is_one_of_the_layouts(tmp_path):
    net = shaken(model.SimSiam("resnet18", "cifar", 64))
    torch.save({"model": net.state_dict()}, tmp_path / "a.pth")
    found, args, _ = model.foreign(tmp_path / "a.pth")
    assert args == {"arch": "resnet18", "stem": "cifar", "width": None}
    assert found.state_dict().keys() == net.state_dict().keys()
    assert all(
        torch.equal(value, net.state_dict()[key]) for key, value in found.state_dict().items()
    )


def test_a_flipped_bit_is_seen(tmp_path):
    """Also in a checkpoint of ours, which another reader refused before."""
    state = authors()[0]
    torch.save(state, tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    weights = state["state_dict"]["module.encoder.layer4.1.conv2.weight"].numpy().tobytes()
    content[content.index(weights[:64]) + 5] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        model.foreign(tmp_path / "a.pth")


def test_what_does_not_fit_is_named(tmp_path, capsys):
    path, flags = tmp_path / "a.pth", ("--data_name", "textures", "--out", tmp_path / "none")
    state = authors()[0]
    strange = {"state_dict": state["state_dict"] | {"module.momentum": torch.zeros(1)}}
    missing = {k: v for k, v in state["state_dict"].items() if "layer2.0.bn1.weight" not in k}
    wide = torch_names(torchvision.models.wide_resnet50_2(), "module.")
    cases = [
        (strange, "module.momentum"),
        ({"state_dict": missing}, "backbone.layer2.0.bn1.weight"),
        (torch_names(wide_blocks()), "none of resnet18"),
        ({"state_dict": wide}, "shape of"),
        (torch_names(torchvision.models.alexnet(num_classes=2)), "not those of a ResNet"),
        ({}, "has no weights"),
        ([1], "has no weights"),
    ]
    for content, words in cases:
        torch.save(content, path)
        line = refused(capsys, linear, "--model_path", path, *flags)
        assert words in line
        assert str(path) in line
    path.write_text("epoch,loss\n")
    assert "no checkpoint" in refused(capsys, linear, "--model_path", path, *flags)
    torch.save(state, path)
    assert "add --data_name" in refused(capsys, linear, "--model_path", path)
    assert not (tmp_path / "none").exists()


def wide_blocks():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (f"{self.folder}/done",)


def test_no_code_of_a_file_is_run(tmp_path, capsys):
    state = {"state_dict": {}, "evil": Malicious(tmp_path)}
    for path in (tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "c.pdparams"):
        if path.suffix == ".pth":
            torch.save(state, path, _use_new_zipfile_serialization="b" not in path.stem)
        else:
            path.write_bytes(pickle.dumps(state))
        line = refused(capsys, linear, "--model_path", path, "--data_name", "textures")
        assert "has no weights" in line
        assert not (tmp_path / "done").exists()
    arrays = {"a": np.array([Malicious(tmp_path)], dtype=object)}  # one more way to hide it
    path.write_bytes(pickle.dumps(arrays))
    refused(capsys, linear, "--model_path", path, "--data_name", "textures")
    assert not (tmp_path / "done").exists()


def test_a_linear_head_on_others_weights(tmp_path, capsys):
    torch.save(leftthomas()[0], tmp_path / "theirs.pth")
    crash.make_folder(tmp_path / "images")
    flags = f"--model_path {tmp_path}/theirs.pth --data_name folder --data_root {tmp_path}/images"
    linear.main([*flags.split(), "--cached", "--epochs", "2", "--out", str(tmp_path)])
    more = ("--cached", "--epochs", "1", "--out", tmp_path, "--name", "other")
    linear.main([*flags.split(), *map(str, more), "--stem", "cifar_pad2", "--image_size", "24"])
    found = torch.load(tmp_path / "other_model.pth")["args"]["encoder"]
    assert (found["stem"], found["image_size"]) == ("cifar_pad2", 24)
    out = capsys.readouterr().out
    assert "layout: leftthomas/SimSiam" in out
    assert "taken to see 32 pixels" in out
    line = refused(capsys, linear, *flags.split(), "--stem", "imagenet", "--out", tmp_path / "none")
    assert "conv1" in line
    head = tmp_path / "theirs_linear_cached_model.pth"
    linear.main(["--model_path", str(head), "--evaluate_only", "--out", str(tmp_path)])


def test_init_starts_from_a_checkpoints_weights(tmp_path, capsys, monkeypatch):
    path = tmp_path / "theirs.pth"
    state, *_ = leftthomas()
    state = {name: value for name, value in state.items() if name[0] == "f"}
    torch.save(state, path)
    flags = f"--data_name textures --train_size 64 --batch_size 32 --epochs 1 --out {tmp_path} "
    flags += f"--init {path} --arch resnet18 --feature_dim 16 --lr 1e-9 --no-pictures --name a"
    watched = {"rank": 1.0, "test_acc@1": 1.0, "test_acc@5": 1.0}
    monkeypatch.setattr(main, "monitor", lambda *args: watched)
    monkeypatch.setattr(main, "raw_pixels_accuracy", lambda *args: 1.0)
    monkeypatch.setattr(main, "train", lambda *args: args[6].add_(1))
    main.main(flags.split())
    assert "it has no projector: that starts at random" in capsys.readouterr().out
    found = torch.load(tmp_path / "a_model.pth")["model"]
    assert torch.equal(found["backbone.layer4.1.conv2.weight"], state["f.6.1.conv2.weight"])
    for more, words in [
        (("--stem", "imagenet"), "its backbone does not fit the flags of the network"),
        (("--arch", "resnet34"), "its backbone does not fit the flags of the network"),
        (("--init", tmp_path / "none.pth"), "none.pth"),
    ]:
        assert words in refused(capsys, main, *flags.split(), "--name", "b", *more)
    torch.save(torch.load(tmp_path / "a_model.pth"), tmp_path / "ours.pth")
    main.main([*flags.split(), "--name", "c", "--init", str(tmp_path / "ours.pth")])
    again = torch.load(tmp_path / "c_model.pth")["model"]
    assert all(torch.equal(value, again[key]) for key, value in found.items())


# ---- out ----------------------------------------------------------------------------------------


def ours(folder, arch="resnet18", stem="imagenet", layers=3, classes=None):
    """A checkpoint of main.py, or of linear.py, with nothing at its initial value."""
    flags = f"--data_name textures --recipe imagenet --arch {arch} --stem {stem} --feature_dim 64"
    flags += f" --projector_layers {layers} --image_size 48"
    args = main.parse_args(flags.split())[0]
    net = shaken(model.SimSiam(arch, stem, 64, layers))
    state = {"epoch": 2, "step": 0, "optimizer": {}, "history": [{"epoch": i} for i in range(3)]}
    state |= {"model": net.state_dict(), "args": vars(args)}
    if classes:
        net = shaken(model.Classifier(net.backbone, net.features, classes))
        encoder = model.encoder_arguments(vars(args))
        state["args"] = vars(linear.parse_args([])[0]) | {
            "encoder": encoder,
            "data_name": "textures",
        }
        state |= {"model": net.state_dict(), "classes": [str(i) for i in range(classes)]}
    torch.save(state, folder / "ours.pth")
    return net, folder / "ours.pth"


def converted(source, to):
    target = source.with_suffix(f".{to}")
    target.unlink(missing_ok=True)
    convert.command([str(source), str(target), "--to", to])
    return target


@pytest.mark.parametrize("to", ["torchvision", "timm", "authors", "lightly", "mmpretrain"])
def test_there_and_back_is_the_same_to_the_bit(tmp_path, to):
    net, path = ours(tmp_path)
    again, args, _ = model.foreign(converted(path, to))
    assert args == {"arch": "resnet18", "stem": "imagenet", "width": None}
    found, mine = again.state_dict(), net.state_dict()
    heads = () if to in ("torchvision", "timm") else ("projector", "predictor")
    assert found.keys() == {key for key in mine if key.startswith(("backbone", *heads))}
    assert all(torch.equal(value, mine[key]) for key, value in found.items())


def test_their_modules_take_ours_strictly(tmp_path):
    _, path = ours(tmp_path)
    fc_free = resnet18()
    fc_free.fc = nn.Identity()
    fc_free.load_state_dict(torch.load(converted(path, "torchvision")))
    theirs = resnet18()
    theirs.fc = mlp(512, 64, 64, 64, last_bias=True, affine=False)
    state = torch.load(converted(path, "authors"))
    names = {k.removeprefix("module.encoder."): v for k, v in state["state_dict"].items()}
    predictor = {
        k.removeprefix("module.predictor."): names.pop(k) for k in list(names) if k[0] == "m"
    }
    theirs.load_state_dict(names)
    mlp(64, 16, 64, last_bias=True, bn=False).load_state_dict(predictor)
    assert (state["epoch"], state["arch"]) == (2, "resnet18")
    assert "python main.py --data_name=textures" in state["meta"]["command"]
    state = torch.load(converted(path, "lightly"))
    for prefix, module in [
        ("backbone.", nn.Sequential(*list(resnet18().children())[:-1])),
        ("projection_head.", SimSiamProjectionHead(512, 64, 64)),
        ("prediction_head.", SimSiamPredictionHead(64, 16, 64)),
    ]:
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        module.load_state_dict(part)
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
    theirs = resnet18(num_classes=7)
    theirs.load_state_dict(torch.load(converted(path, "torchvision")))
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(theirs.eval()(x), net(x), atol=1e-5, rtol=1e-5)
    assert "module.fc.bias" in torch.load(converted(path, "authors"))["state_dict"]
    assert "head.fc.bias" in torch.load(converted(path, "mmpretrain"))["state_dict"]
    for to in ("torchvision", "authors", "mmpretrain"):
        again = model.foreign(converted(path, to))[0].state_dict()
        assert again.keys() == net.state_dict().keys()
        assert all(torch.equal(value, again[key]) for key, value in net.state_dict().items())
    predicted = torch.hub.load(
        str(ROOT), "classifier", source="local", checkpoint=str(converted(path, "torchvision"))
    ).predict(torch.rand(3, 300, 200))
    assert predicted[0]["class"] in map(str, range(7))
    session = pytest.importorskip("onnxruntime").InferenceSession(converted(path, "onnx"))
    assert session.run(None, {"images": x.numpy()})[0].shape == (2, 7)


def test_what_cannot_go_out_is_said(tmp_path, capsys):
    door = SimpleNamespace(main=convert.command)
    for arch, stem, layers, to, words in [
        ("resnet18", "cifar", 3, "torchvision", "choose timm"),
        ("resnet18", "cifar", 3, "detectron2", "choose timm"),
        ("resnet18", "imagenet", 2, "authors", "three layers"),
        ("resnet8", "cifar", 3, "timm", "no resnet8"),
    ]:
        _, path = ours(tmp_path, arch, stem, layers)
        line = refused(capsys, door, path, tmp_path / "out", "--to", to)
        assert words in line
        assert str(path) in line
    (tmp_path / "out").write_text("mine")
    assert "out exists" in refused(capsys, door, path, tmp_path / "out", "--to", "safetensors")
    path.write_text("no weights")
    assert "no checkpoint" in refused(capsys, door, path, tmp_path / "new", "--to", "timm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.pth", "out"]


@pytest.mark.parametrize(
    "flags", [{"bn": "none"}, {"bn": "hidden"}, {"bn": "all"}, {"predictor": "none"}]
)
def test_heads_of_ablations_do_not_go_out_under_names_of_others(flags):
    net = model.SimSiam("resnet18", "imagenet", 16, 3, **flags)
    args = {"arch": "resnet18", "stem": "imagenet"}
    for to in ("authors", "lightly", "mmpretrain"):
        with pytest.raises(ValueError, match="other heads"):
            model.exported(net, args, to)
    assert len(model.exported(net, args, "timm")) == len(net.backbone.state_dict())


# ---- features, hub ------------------------------------------------------------------------------


def pictures(folder):
    """Of several sizes and modes, in two classes and in none."""
    for i, (mode, size) in enumerate([("RGB", (40, 60)), ("L", (50, 30)), ("RGBA", (48, 48))]):
        place = folder / ("cats", "dogs", ".")[i]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").convert(mode).save(place / f"{i}.png")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("layer", ["backbone", "projector"])
def test_features_of_files(tmp_path, layer):
    net, path = ours(tmp_path, stem="cifar", layers=2)
    root = pictures(tmp_path / "images")
    for end in features.ENDS:
        flags = f"--model_path {path} --data_root {root} --out {tmp_path}/f{end} --layer {layer}"
        if end == ".parquet":
            pytest.importorskip("pyarrow")
        features.command(flags.split())
    arrays = np.load(tmp_path / "f.npz")
    tables = [pandas.read_csv(tmp_path / "f.csv"), pandas.read_parquet(tmp_path / "f.parquet")]
    for table in tables:
        assert list(table["file"]) == list(arrays["files"])
        assert list(table["label"].fillna("")) == list(arrays["labels"])
        np.testing.assert_allclose(table.iloc[:, 2:].to_numpy(), arrays["features"], rtol=1e-5)
    assert sorted(arrays["labels"]) == ["", "cats", "dogs"]
    views = data.Views(48, *data.NORMALISATION["imagenet"])
    for name, found in zip(arrays["files"], arrays["features"], strict=True):
        cut = data.centre(data.read_image(name), 48, 48)
        x = net.backbone(views.plain(torch.from_numpy(cut.copy()).permute(2, 0, 1)[None]))
        expected = net.projector(x) if layer == "projector" else x
        np.testing.assert_allclose(found, expected[0].numpy(), atol=1e-5)


def test_features_refuse_in_one_line(tmp_path, capsys):
    _, path = ours(tmp_path, classes=3)
    door, root = SimpleNamespace(main=features.command), pictures(tmp_path / "images")
    flags = ("--model_path", path, "--data_root", root, "--out")
    assert "--out" in refused(capsys, door, *flags, tmp_path / "f.txt")
    assert "--layer" in refused(capsys, door, *flags, tmp_path / "f.csv", "--layer", "projector")
    (root / "cats" / "junk.png").write_text("junk")
    assert "junk.png" in refused(capsys, door, *flags, tmp_path / "f.csv")
    assert not (tmp_path / "f.csv").exists()
    features.command([*map(str, flags), f"{tmp_path}/f.csv", "--bad_images", "skip"])
    assert len(pandas.read_csv(tmp_path / "f.csv")) == 3


def test_hub(tmp_path):
    net, path = ours(tmp_path)
    load = lambda name, **more: torch.hub.load(str(ROOT), name, source="local", **more)  # noqa: E731
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(load("encoder", checkpoint=str(path))(x), net.backbone(x))
    loss, z = load("simsiam", checkpoint=str(path))(x, x.flip(3))
    assert torch.equal(loss, net(x, x.flip(3))[0])
    assert z.shape == (2, 64)
    assert load("simsiam", arch="resnet8", feature_dim=16).predictor[0].in_features == 16
    with pytest.raises(ValueError, match="not a linear model"):
        load("classifier", checkpoint=str(path))
    net, path = ours(tmp_path, stem="cifar", classes=4)
    found = load("classifier", checkpoint=str(path))
    files = sorted(pictures(tmp_path / "images").rglob("*.png"))
    images = [Image.open(file) for file in files]
    predicted = found.predict(images)
    linear.main(
        ["--model_path", str(path), "--predict", *map(str, files), "--out_csv", f"{tmp_path}/p.csv"]
    )
    table = pandas.read_csv(tmp_path / "p.csv", dtype={"class": str})
    assert [one["class"] for one in predicted] == list(table["class"])
    assert [one["score"] for one in predicted] == pytest.approx(list(table["score"]), abs=1e-5)
    pixels = torch.from_numpy(np.array(images[0].convert("RGB"))).permute(2, 0, 1)
    for tensor in (pixels, pixels[None], pixels / 255, [pixels]):
        assert found.predict(tensor)[0]["score"] == pytest.approx(predicted[0]["score"], abs=1e-6)
    assert sum(predicted[0]["scores"].values()) == pytest.approx(1, abs=1e-5)
