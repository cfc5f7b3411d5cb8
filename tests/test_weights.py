"""Others' checkpoints, of modules with each project's own structure and names, in our model."""

import argparse
import dataclasses
import os
import pickle
import shlex
import subprocess
import sys
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

import hubconf
import linear
import main
from simsiam import checkpoint, images, layouts, weights
from simsiam.network import Classifier, SimSiam
from simsiam.textures import TEXTURES, textures
from simsiam.views import NORMALISATION, Augmentation, Views
from simsiam.weights import Predictor, Source
from tests.helpers import ROOT, refused
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
    nn.init.normal_(two[0].weight)  # not the same as that of `three`
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
    source = Source.open(write(state, tmp_path, name))
    net = source.net
    torch.manual_seed(1)
    x = torch.randn(4, 3, 64, 64)
    if source.is_linear:
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
    assert source.encoder["arch"] in ("resnet18", "resnet50")
    small = "leftthomas", "PatrickHua, CIFAR", "solo-learn", "lightly's CIFAR"
    assert (source.encoder["stem"] != "imagenet") == name.startswith(small)
    assert source.notes[0].startswith("layout: ")


def test_bare_weights_of_ours_are_one_of_the_layouts(tmp_path):
    net = shaken(SimSiam("resnet18", "cifar", 64))
    torch.save({"model": net.state_dict()}, tmp_path / "a.pth")
    source = Source.open(tmp_path / "a.pth")
    assert source.notes[0] == "layout: ours"
    assert [source.encoder[name] for name in ("arch", "stem", "width")] == [
        "resnet18",
        "cifar",
        None,
    ]
    same_weights(source.net.state_dict(), net.state_dict())


def test_a_bias_before_bn_tells_solo_learns_projector(tmp_path):
    """Also without the classifier that it trains beside the encoder."""
    state = solo_learn()[0]["state_dict"]
    state = {name: value for name, value in state.items() if not name.startswith("classifier")}
    source = Source.open(write(state, tmp_path, "a"))
    assert source.notes[0] == "layout: solo-learn"
    assert source.encoder["stem"] == "cifar_pad2"


def same_weights(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_flipped_bit_is_seen(tmp_path):
    """Also in a checkpoint of ours, which another reader refused before."""
    state = authors()[0]
    torch.save(state, tmp_path / "a.pth")
    first = state["state_dict"]["module.encoder.layer4.1.conv2.weight"].numpy().tobytes()[:64]
    net, path = ours(tmp_path)
    second = net.backbone.layer4[1].conv2.weight.detach().numpy().tobytes()[:64]
    for file, bits in ((tmp_path / "a.pth", first), (path, second)):
        content = bytearray(file.read_bytes())
        content[content.index(bits) + 5] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged") as refusal:
            Source.open(file)
        assert str(refusal.value).count(str(file)) == 1


def test_what_does_not_fit_is_named(tmp_path, capsys):
    path = tmp_path / "a.pth"
    state = authors()[0]
    strange = {"state_dict": state["state_dict"] | {"module.momentum": torch.zeros(1)}}
    missing = {k: v for k, v in state["state_dict"].items() if "layer2.0.bn1.weight" not in k}
    twice = solo_learn()[0]["state_dict"]
    twice |= {"encoder.conv1.weight": twice["backbone.conv1.weight"]}
    odd = {"module.encoder.fc.0.bias": torch.zeros(4)}  # not as long as BN's running mean
    wide = torch_names(torchvision.models.wide_resnet50_2(), "module.")
    cases = [
        (strange, "module.momentum"),
        ({"state_dict": missing}, "backbone.layer2.0.bn1.weight"),
        ({"state_dict": state["state_dict"] | odd}, "shape of projector.0.bias"),
        ({"state_dict": twice}, "like those of solo-learn, but for encoder.conv1.weight"),
        (torch_names(wide_blocks()), "none of resnet18"),
        ({"state_dict": wide}, "shape of"),
        (torch_names(torchvision.models.alexnet(num_classes=2)), "not those of a ResNet"),
        ({}, "has no weights"),
        ([1], "has no weights"),
        (None, "no checkpoint"),
    ]
    for content, words in cases:
        torch.save(content, path)
        if content is None:
            path.write_text("epoch,loss\n")
        with pytest.raises(ValueError, match=words) as refusal:
            Source.open(path)
        line = str(refusal.value)
        assert line.count(str(path)) == 1
        assert line.startswith(f"{path}: is damaged, or not a checkpoint of this program; nor one")
    flags = ("--data_name", "textures", "--out", tmp_path / "none")
    assert "no checkpoint" in refused(capsys, linear, "--model_path", path, *flags)
    torch.save(state, path)
    assert "add --data_name" in refused(capsys, linear, "--model_path", path)
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        Source.open(tmp_path / "nothing.pth")


def wide_blocks():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (f"{self.folder}/done",)


def test_no_code_of_a_file_is_run(tmp_path):
    state = {"state_dict": {}, "evil": Malicious(tmp_path)}
    for path in (tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "c.pdparams"):
        if path.suffix == ".pth":
            torch.save(state, path, _use_new_zipfile_serialization="b" not in path.stem)
        else:
            path.write_bytes(pickle.dumps(state))
        with pytest.raises(ValueError, match="has no weights"):
            Source.open(path)
        assert not (tmp_path / "done").exists()
    arrays = {"a": np.array([Malicious(tmp_path)], dtype=object)}  # one more way to hide it
    path.write_bytes(pickle.dumps(arrays))
    with pytest.raises(ValueError, match="nor one of another"):
        Source.open(path)
    assert not (tmp_path / "done").exists()


# ---- a checkpoint, opened -----------------------------------------------------------------------


def ours(folder, arch="resnet18", stem="imagenet", layers=3, classes=None):
    """A checkpoint of main.py, or of linear.py, with nothing at its initial value."""
    mean, std = NORMALISATION["imagenet"]
    encoder = {"arch": arch, "stem": stem, "width": None, "image_size": 48}
    args = {"data_name": "textures", "data_root": "my data", "train_size": None, "seed": 0}
    args |= {"feature_dim": 64, "projector_layers": layers, "predictor": "mlp", "bn": "default"}
    args |= {"similarity": "cosine", "loss": "symmetric", "stop_grad": "on", "name": "ours"}
    args |= {"lr": [0.1, 0.2], "pictures": False, "deterministic": False, "compile": True}
    args |= {"overwrite": True, "resume": "a.pth", "ddp": True}
    net = shaken(SimSiam(arch, stem, 64, layers))
    if classes:
        net = shaken(Classifier(net.backbone, net.features, classes))
    checkpoint.save(
        folder / "ours.pth",
        None,
        net,
        torch.optim.SGD(net.parameters(), lr=1.0),
        command="linear.py" if classes else "main.py",
        args=args,
        encoder=encoder | {"mean": mean, "std": std},
        augmentation=dataclasses.asdict(Augmentation()),
        images_crc=0,
        classes=[f"class {i}" for i in range(classes or 3)],
        epoch=2,
        step=0,
        tally={},
        seconds=0.0,
        history=[{"epoch": i} for i in range(1 if classes else 0, 3)],
        facts={},
    )
    return net, folder / "ours.pth"


@torch.no_grad()
@pytest.mark.parametrize("classes", [None, 4])
def test_a_source_of_ours(tmp_path, classes):
    net, path = ours(tmp_path, "resnet8", "cifar", 2, classes)
    source = pickle.loads(pickle.dumps(Source.open(path)))  # as ranks send it to each other
    same_weights(source.net.state_dict(), net.state_dict())
    assert not source.net.training
    assert source.encoder.keys() == set(checkpoint.ENCODER)
    assert source.state["args"]["data_root"] == "my data"
    assert source.state.keys() == checkpoint.FORMAT.keys() - {"model", "optimizer"}
    assert (source.is_linear, source.notes, source.data_name) == (bool(classes), [], "textures")
    assert source.classes == ([f"class {i}" for i in range(classes)] if classes else [])
    pixels = textures(5, seed=3)[0]
    off = torch.autocast("cpu", enabled=False)
    expected = net.backbone(Views(48, *NORMALISATION["imagenet"]).plain(pixels))
    torch.testing.assert_close(source.features(pixels, off), expected)
    lengths = source.to("cpu").features(pixels, off, normalise=True).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(5))
    for flags in ({"stem": "cifar_pad2"}, {"image_size": 32}):
        with pytest.raises(ValueError, match=f"--{next(iter(flags))}: .* is ours, and has its own"):
            Source.open(path, **flags)


def test_a_source_of_others(tmp_path):
    """What their files do not say is by the stem, or by flags."""
    source = Source.open(write(authors_linear()[0], tmp_path, "a"))
    assert (source.encoder["image_size"], source.shorter, source.data_name) == (
        224,
        256,
        "imagenet",
    )
    assert source.classes == [str(i) for i in range(1000)]
    assert source.state is None
    path = write(leftthomas()[0], tmp_path, "b")
    source = Source.open(path)
    assert (source.encoder["image_size"], source.shorter, source.data_name) == (32, 32, "")
    assert (source.encoder["mean"], source.encoder["std"]) == NORMALISATION["cifar"]
    assert source.notes[-1].startswith("taken to see 32 pixels")
    source = Source.open(path, "cifar_pad2", 24)
    assert (source.encoder["stem"], source.views.size) == ("cifar_pad2", 24)
    assert "taken to have the stem cifar_pad2, as --stem says" in source.notes
    with pytest.raises(ValueError, match="conv1"):
        Source.open(path, "imagenet")


def test_another_version_is_refused_as_such(tmp_path, capsys):
    """Not read as another project's file; but --init takes its weights."""
    net, path = ours(tmp_path, "resnet18", "cifar", 2)
    state = torch.load(path)
    old = {name: state[name] for name in ("model", "args", "history", "epoch", "step")}
    torch.save(old | {"version": 1}, path)
    with pytest.raises(ValueError, match="has version 1 of the format") as refusal:
        Source.open(path)
    assert str(refusal.value).count(str(path)) == 1
    assert "\n" not in str(refusal.value)
    flags = ("--data_name", "textures", "--out", tmp_path / "none")
    assert "version 1" in refused(capsys, linear, "--model_path", path, *flags)
    new = SimSiam("resnet18", "cifar", 64, 2)
    assert weights.initialise(new, path) == []
    same_weights(new.state_dict(), net.state_dict())


def test_init_takes_the_parts_that_are_there(tmp_path, capsys):
    state, *_ = leftthomas()
    state = {name: value for name, value in state.items() if name[0] == "f"}
    path = write(state, tmp_path, "a")
    net = SimSiam("resnet18", "cifar", 16)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    notes = weights.initialise(net, path)
    assert "it has no projector: that starts at random" in notes
    assert "its --stem is cifar" in notes
    found = net.state_dict()
    assert torch.equal(found["backbone.layer4.1.conv2.weight"], state["f.6.1.conv2.weight"])
    assert all(torch.equal(found[name], before[name]) for name in found if name[:2] == "pr")
    for other in (SimSiam("resnet18", "imagenet", 16), SimSiam("resnet34", "cifar", 16)):
        with pytest.raises(ValueError, match="its backbone does not fit the flags of the network"):
            weights.initialise(other, path)
    flags = ("--data_name", "textures", "--out", tmp_path / "none", "--arch", "resnet18")
    line = refused(capsys, main, *flags, "--init", path, "--stem", "imagenet")
    assert "its backbone does not fit the flags of the network" in line
    assert line.count(str(path)) == 1
    assert "none.pth" in refused(capsys, main, *flags, "--init", tmp_path / "none.pth")


@pytest.mark.parametrize("classes", [None, 4])
def test_init_takes_checkpoints_of_ours(tmp_path, classes):
    """All of the same network; the backbone of a linear model."""
    net, path = ours(tmp_path, "resnet18", "cifar", 2, classes)
    new = SimSiam("resnet18", "cifar", 64)
    notes = weights.initialise(new, path)
    if classes:
        assert "it has no projector: that starts at random" in notes
        same_weights(new.backbone.state_dict(), net.backbone.state_dict())
    else:
        assert notes == []
        same_weights(new.state_dict(), net.state_dict())


def test_a_run_starts_from_the_weights_of_init(tmp_path):
    net, path = ours(tmp_path, "resnet8", "cifar", 2)
    flags = f"--data_name textures --train_size 64 --batch_size 32 --epochs 1 --out {tmp_path} "
    flags += f"--init {path} --arch resnet8 --feature_dim 64 --lr 1e-9 --no-pictures --name a "
    main.main((flags + "--projector_layers 2 --bank_size 32 --k 5 --image_size 16").split())
    found = torch.load(tmp_path / "a_model.pth")["model"]
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), atol=1e-5, rtol=1e-5)


def texture_folder(root):
    """Textures as files, some of them to score with."""
    for split, number in (("train", 40), ("test", 20)):
        pixels, labels = textures(number, seed=number)
        for i, label in enumerate(labels.tolist()):
            place = root / split / TEXTURES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    return root


def test_a_linear_head_on_others_weights(tmp_path, capsys):
    path = tmp_path / "theirs.pth"
    torch.save(leftthomas()[0], path)
    root = texture_folder(tmp_path / "images")
    flags = f"--model_path {path} --data_name folder --data_root {root} --cached --no-pictures"
    linear.main([*flags.split(), "--epochs", "2", "--out", str(tmp_path)])
    more = ("--epochs", "1", "--out", tmp_path, "--name", "other")
    linear.main([*flags.split(), *map(str, more), "--stem", "cifar_pad2", "--image_size", "24"])
    found = torch.load(tmp_path / "other_model.pth")["encoder"]
    assert (found["stem"], found["image_size"]) == ("cifar_pad2", 24)
    out = capsys.readouterr().out
    assert "layout: leftthomas/SimSiam" in out
    assert "taken to see 32 pixels" in out
    line = refused(capsys, linear, *flags.split(), "--stem", "imagenet", "--out", tmp_path / "none")
    assert "conv1" in line
    head = tmp_path / "theirs_linear_cached_model.pth"
    linear.main(["--model_path", str(head), "--evaluate_only", "--out", str(tmp_path)])


# ---- out ----------------------------------------------------------------------------------------


def converted(source, to):
    target = source.with_suffix(f".{to}")
    target.unlink(missing_ok=True)
    convert.command([str(source), str(target), "--to", to])
    return target


def names_of(net):
    """Its state_dict without memory for it."""
    with torch.device("meta"):
        return net().state_dict()


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_the_table_is_read_both_ways(name):
    """What goes out under a layout's names comes in again under the same names of ours."""
    layout = layouts.LAYOUTS[name]
    for net in (
        lambda: SimSiam("resnet50", "imagenet", 64, 3),
        lambda: Classifier(SimSiam("resnet50", "imagenet", 8).backbone, 2048, 5),
    ):
        mine = names_of(net)
        out, left, nameless = layouts.renamed(mine, layout, out=True)
        again, *rest = layouts.renamed(out, layout)
        assert rest == [[], []]
        assert again.keys() == mine.keys() - {*left, *nameless}
        assert all(again[key] is mine[key] for key in again)
        assert len(again) == len(out) >= 318  # the backbone's, at least
        whole = set(left) | set(nameless)
        assert all(key.startswith(("projector.", "predictor.", "fc.")) for key in whole)


@pytest.mark.parametrize("to", layouts.EXPORTS)
def test_every_format_comes_in_under_the_names_it_left_with(to):
    encoder = {"arch": "resnet50", "stem": "imagenet"}
    with torch.device("meta"):
        net = SimSiam("resnet50", "imagenet", 64, 3)
        nets = net, Classifier(net.backbone, net.features, 5)
    for net in nets:
        heads = ("projector.", "predictor.") if isinstance(net, SimSiam) else ("fc.",)
        if to == "lightly" and isinstance(net, Classifier):
            with pytest.raises(ValueError, match="no names for a linear classifier"):
                layouts.exported(net, encoder, to)
            continue
        out = layouts.exported(net, encoder, to)
        kept = ("backbone.",)
        if to == "detectron2":
            found, *_ = layouts.renamed(out, layouts.LAYOUTS[to])
            with pytest.raises(ValueError, match="not those of a ResNet"):
                layouts.translated(out)
        else:
            found, again, notes = layouts.translated(out)
            assert again == encoder | {"width": None}
            assert len(notes) == 1
            if to not in ("torchvision", "timm") or isinstance(net, Classifier):
                kept += heads
        assert found.keys() == {name for name in net.state_dict() if name.startswith(kept)}


@pytest.mark.parametrize("to", ["torchvision", "timm", "authors", "lightly", "mmpretrain"])
def test_there_and_back_is_the_same_to_the_bit(tmp_path, to):
    net, path = ours(tmp_path)
    source = Source.open(converted(path, to))
    assert [source.encoder[name] for name in ("arch", "stem")] == ["resnet18", "imagenet"]
    mine = net.state_dict()
    heads = () if to in ("torchvision", "timm") else ("projector", "predictor")
    expected = {key: mine[key] for key in mine if key.startswith(("backbone", *heads))}
    same_weights(source.net.state_dict(), expected)


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
    words = shlex.split(state["meta"]["command"])  # spaces, lists, switches; nothing of one start
    assert {"--data_root=my data", "--no-pictures", "--compile", "--seed=0"} <= set(words)
    assert words[words.index("--lr") :][:3] == ["--lr", "0.1", "0.2"]
    one_start = ("--train_size", "--deterministic", "--overwrite", "--resume", "--ddp")
    assert not [word for word in words if word.startswith(one_start)]
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
    assert "python linear.py" in convert.metadata(Source.open(path).state)["command"]
    theirs = resnet18(num_classes=7)
    theirs.load_state_dict(torch.load(converted(path, "torchvision")))
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(theirs.eval()(x), net(x), atol=1e-5, rtol=1e-5)
    assert "module.fc.bias" in torch.load(converted(path, "authors"))["state_dict"]
    assert "head.fc.bias" in torch.load(converted(path, "mmpretrain"))["state_dict"]
    for to in ("torchvision", "authors", "mmpretrain"):
        same_weights(Source.open(converted(path, to)).net.state_dict(), net.state_dict())
    predictor = Predictor(Source.open(converted(path, "torchvision")))
    assert (predictor.size, predictor.shorter) == (224, 256)
    assert predictor.predict(torch.rand(3, 300, 200))[0]["class"] in map(str, range(7))
    session = pytest.importorskip("onnxruntime").InferenceSession(converted(path, "onnx"))
    assert session.run(None, {"images": x.numpy()})[0].shape == (2, 7)


def test_what_cannot_go_out_is_said(tmp_path, capsys):
    door = SimpleNamespace(main=convert.command)
    for arch, stem, layers, to, words in [
        ("resnet18", "cifar", 3, "torchvision", "choose timm"),
        ("resnet18", "cifar", 3, "detectron2", "choose timm"),
        ("resnet18", "imagenet", 2, "authors", "three layers"),
        ("resnet18", "imagenet", 4, "lightly", "no name for projector.9.weight"),
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
        with pytest.raises(ValueError, match="other heads"):
            layouts.exported(net, args, to)
    assert len(layouts.exported(net, args, "timm")) == len(net.backbone.state_dict())


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
    views = Views(48, *NORMALISATION["imagenet"])
    for name, found in zip(arrays["files"], arrays["features"], strict=True):
        cut = images.centre(images.read_image(name), 48, 48)
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


def from_hub(name, **more):
    return torch.hub.load(str(ROOT), name, source="local", **more)


def test_hub(tmp_path):
    net, path = ours(tmp_path)
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(from_hub("encoder", checkpoint=str(path))(x), net.backbone(x))
    loss, z = from_hub("simsiam", checkpoint=str(path))(x, x.flip(3))
    assert torch.equal(loss, net(x, x.flip(3))[0])
    assert z.shape == (2, 64)
    assert from_hub("simsiam", arch="resnet8", feature_dim=16).predictor[0].in_features == 16
    with pytest.raises(ValueError, match="not a linear model"):
        from_hub("classifier", checkpoint=str(path))
    net, path = ours(tmp_path, stem="cifar", classes=4)
    with pytest.raises(ValueError, match="is a linear model: choose classifier or encoder"):
        from_hub("simsiam", checkpoint=str(path))
    assert torch.equal(from_hub("encoder", checkpoint=str(path))(x), net.backbone(x))
    found = from_hub("classifier", checkpoint=str(path))
    assert torch.equal(found(x), net(x))
    public = {name for name, value in vars(hubconf).items() if callable(value) and name[0] != "_"}
    assert public == {"simsiam", "encoder", "classifier"}  # what torch.hub lists
    path.write_text("no weights")
    with pytest.raises(ValueError, match="is damaged"):
        from_hub("encoder", checkpoint=str(path))


def test_a_predictor_cuts_as_decode_does(tmp_path):
    net, path = ours(tmp_path, stem="cifar", classes=4)
    predictor = Predictor(Source.open(path))
    files = sorted(pictures(tmp_path / "images").rglob("*.png"))
    pixels, _ = images.decode(files, predictor.size, shorter=predictor.shorter)
    views = Views(48, *NORMALISATION["imagenet"])
    with torch.no_grad():
        expected = net(views.plain(pixels)).softmax(1)
    off = torch.autocast("cpu", enabled=False)
    torch.testing.assert_close(predictor.scores(pixels, off), expected)
    opened = [Image.open(file) for file in files]
    predicted = predictor.predict(opened)
    for one, row in zip(predicted, expected, strict=True):
        assert one["class"] == f"class {row.argmax().item()}"
        assert one["score"] == pytest.approx(row.max().item(), abs=1e-6)
        assert list(one["scores"]) == [f"class {i}" for i in range(4)]
        assert sum(one["scores"].values()) == pytest.approx(1, abs=1e-5)
    image = torch.from_numpy(np.array(opened[0].convert("RGB"))).permute(2, 0, 1)
    for tensor in (image, image[None], image / 255, [image]):
        score = predictor.predict(tensor)[0]["score"]
        assert score == pytest.approx(predicted[0]["score"], abs=1e-6)


def test_linear_predicts_as_the_hub_does(tmp_path):
    _, path = ours(tmp_path, stem="cifar", classes=4)
    files = sorted(pictures(tmp_path / "images").rglob("*.png"))
    predicted = from_hub("classifier", checkpoint=str(path)).predict(list(map(Image.open, files)))
    table = f"{tmp_path}/p.csv"
    linear.main(["--model_path", str(path), "--predict", *map(str, files), "--out_csv", table])
    table = pandas.read_csv(table)
    assert [one["class"] for one in predicted] == list(table["class"])
    assert [one["score"] for one in predicted] == pytest.approx(list(table["score"]), abs=1e-5)


@pytest.mark.parametrize("order", ["theirs first", "the hub first"])
def test_hub_leaves_modules_of_others_alone(tmp_path, order):
    """A caller's own `utils`, `model`, `data`, ... are those that they import, before or after."""
    _, path = ours(tmp_path, "resnet8", "cifar", 2)
    names = [file.stem for file in ROOT.glob("*.py") if file.stem != "hubconf"]
    assert {"utils", "model"} <= set(names)
    names = sorted({*names, "data"})
    for name in names:
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    steps = [
        f"import {', '.join(names)}",
        f"net = torch.hub.load({str(ROOT)!r}, 'encoder', source='local', checkpoint={str(path)!r})",
    ]
    script = ["import sys, torch", *(steps if order == "theirs first" else reversed(steps))]
    script += [
        f"assert all(sys.modules[name].mine for name in {names})",
        "assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 64)",
    ]
    command = [sys.executable, "-c", "\n".join(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
