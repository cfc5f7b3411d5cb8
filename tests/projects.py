"""Networks of other projects, with their structure and names, and checkpoints of this one."""

import argparse
import functools
import pickle
from collections import OrderedDict

import lightly.models
import thop
import timm
import torch
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from torch import nn
from torchvision.models import resnet18

from simsiam.models.classifier import Classifier
from simsiam.models.simsiam import SimSiam
from simsiam.training import checkpoint
from simsiam.training.recipes import LinearConfig, PretrainConfig
from simsiam.views.augment import NORMALISATION


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


def headless(net):
    net.fc = nn.Identity()
    return net


def body(net):
    """A ResNet without its last layer."""
    return nn.Sequential(*list(net.children())[:-1], nn.Flatten())


def prediction_head():
    return shaken(mlp(64, 16, 64, last_bias=True, bn=False))


def torch_names(module, prefix=""):
    return OrderedDict((prefix + name, value) for name, value in module.state_dict().items())


@functools.cache
def authors():
    """facebookresearch/simsiam's builder.py."""
    encoder, predictor = resnet18(), prediction_head()
    encoder.fc = mlp(512, 512, 512, 64, last_bias=True, affine=False)
    encoder = shaken(encoder)
    state = torch_names(encoder, "module.encoder.") | torch_names(predictor, "module.predictor.")
    whole = {"epoch": 99, "arch": "resnet18", "state_dict": state}
    return whole, body(encoder), encoder.fc, predictor


def authors_linear():
    net, whole = shaken(resnet18()), {"epoch": 89, "best_acc1": torch.tensor(68.1)}
    return whole | {"state_dict": torch_names(net, "module.")}, body(net), None, None


@functools.cache
def leftthomas(linear=False, wrapped=False):
    """Its main.py and linear.py profile the network with thop before they train it."""
    children = small_stem(resnet18()).children()
    whole = nn.Module()
    whole.f = nn.Sequential(*(m for m in children if not isinstance(m, nn.Linear | nn.Identity)))
    if linear:
        whole.fc = nn.Linear(512, 10)
        whole.forward = lambda x: whole.fc(whole.f(x).flatten(1))
    else:
        whole.g, whole.h = mlp(512, 64, 64), mlp(64, 16, 64, last_bias=True, bn=False)
        whole.forward = lambda x: whole.h(whole.g(whole.f(x).flatten(1)))
    thop.profile(whole, inputs=(torch.zeros(1, 3, 32, 32),), verbose=False)
    whole = shaken(whole)
    state = torch_names(nn.DataParallel(whole) if wrapped else whole)
    heads = (None, None) if linear else (whole.g, whole.h)
    return state, nn.Sequential(whole.f, nn.Flatten()), *heads


def patrick_hua(layers=2, small=True, shortcut=False):
    """Its projector has three layers always, of which its network may skip the second."""
    net = shaken(headless(small_stem(resnet18()) if small else resnet18()))
    one, two, three = (
        shaken(nn.Sequential(nn.Linear(a, 64), nn.BatchNorm1d(64), *last))
        for a, last in ((512, [nn.ReLU()]), (64, [nn.ReLU()]), (64, []))
    )
    nn.init.normal_(two[0].weight)  # not the same as that of `three`
    if layers == 2:
        two[1].reset_running_stats()
    first = shaken(nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU()))
    second = shaken(nn.Linear(16, 64))
    projector = OrderedDict()
    for i, layer in enumerate((one, two, three), 1):
        projector |= torch_names(layer, f"layer{i}.")
    backbone = torch_names(net)
    if shortcut:  # kuangliu's, its second ResNet for CIFAR
        backbone = {name.replace("downsample", "shortcut"): v for name, v in backbone.items()}
    state = {}
    for prefix, part in (("backbone", backbone), ("projector", projector)):
        state |= {f"{prefix}.{name}": value for name, value in part.items()}
    for i, part in enumerate((backbone, projector)):
        state |= {f"encoder.{i}.{name}": value for name, value in part.items()}
    state |= torch_names(first, "predictor.layer1.") | torch_names(second, "predictor.layer2.")
    used = (one, three) if layers == 2 else (one, two, three)
    whole = {"epoch": 1, "state_dict": state}
    return whole, net, nn.Sequential(*used), nn.Sequential(first, second)


def lightly_example(heads=("projection_head", "prediction_head")):
    backbone = shaken(body(resnet18()))
    head = shaken(SimSiamProjectionHead(512, 512, 128))
    predictor = shaken(SimSiamPredictionHead(128, 64, 128))
    state = torch_names(backbone, "backbone.") | torch_names(head, f"{heads[0]}.")
    state |= torch_names(predictor, f"{heads[1]}.")
    return state, backbone, head, predictor


def lightly_of_1_1():
    """lightly.models.SimSiam of its first versions: layers in layers, the last BN affine."""
    state, backbone, *_ = lightly_example()
    state = {name: value for name, value in state.items() if name.startswith("backbone")}
    layers = [(512, 64, [nn.ReLU()]), (64, 64, [nn.ReLU()]), (64, 64, [])]
    head = nn.Sequential(
        *(nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), *last) for a, b, last in layers)
    )
    hidden = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU())
    head, predictor = shaken(head), shaken(nn.Sequential(hidden, nn.Linear(16, 64)))
    state |= torch_names(head, "projection_mlp.") | torch_names(predictor, "prediction_mlp.")
    return state, backbone, head, predictor


def lightly_cifar(dummy=False):
    """The CIFAR benchmark's: two layers, the last BN affine; with what it had until 1.4.1."""
    net = lightly.models.ResNetGenerator("resnet-18")
    backbone = shaken(nn.Sequential(*list(net.children())[:-1], nn.AdaptiveAvgPool2d(1)))
    blocks = [(512, 64, nn.BatchNorm1d(64), nn.ReLU()), (64, 64, nn.BatchNorm1d(64), None)]
    head = shaken(lightly.models.modules.heads.ProjectionHead(blocks))
    predictor = shaken(SimSiamPredictionHead(64, 16, 64))
    state = OrderedDict(dummy_param=nn.Parameter(torch.empty(0))) if dummy else OrderedDict()
    state |= torch_names(backbone, "backbone.") | torch_names(head, "projection_head.")
    state |= torch_names(predictor, "prediction_head.")
    whole = {"state_dict": state, "pytorch-lightning_version": "2.0", "callbacks": {}}
    return whole, nn.Sequential(backbone, nn.Flatten()), head, predictor


def solo_learn(prefix="backbone"):
    net, predictor = shaken(headless(small_stem(resnet18(), padding=2))), prediction_head()
    projector = shaken(mlp(512, 64, 64, 64, last_bias=True, affine=False))
    state = torch_names(net, f"{prefix}.") | torch_names(projector, "projector.")
    state |= torch_names(predictor, "predictor.") | torch_names(nn.Linear(512, 10), "classifier.")
    whole = {"state_dict": state, "hyper_parameters": argparse.Namespace(lr=0.5, devices=[0])}
    return whole, net, projector, predictor


def mmpretrain(linear=False):
    net = shaken(headless(resnet18()))
    state = torch_names(net, "backbone.")
    if linear:
        state |= torch_names(nn.Linear(512, 1000), "head.fc.")
        return {"meta": {"epoch": 90}, "state_dict": state}, net, None, None
    neck, predictor = shaken(mlp(512, 64, 64, 64, affine=False)), prediction_head()
    for module, prefix in ((neck, "neck."), (predictor, "head.predictor.")):
        for name, value in module.state_dict().items():
            place, rest = name.split(".")
            layer = f"{'bn' if int(place) % 3 else 'fc'}{int(place) // 3}"
            state[f"{prefix}{layer}.{rest}"] = value
    return {"meta": {"epoch": 100}, "state_dict": state}, net, neck, predictor


def passl(mlp_name=""):
    """Paddle's arrays: Linear weights lie the other way round, BN's statistics have other names."""
    whole, *parts = authors()
    arrays = {"StructuredToParameterName@@": {"encoder.conv1.weight": "conv2d_0.w_0"}}
    for name, value in whole["state_dict"].items():
        if "num_batches" not in name:
            name = name.removeprefix("module.").replace("predictor.", f"predictor.{mlp_name}")
            name = name.replace("running_mean", "_mean").replace("running_var", "_variance")
            arrays[name] = (value.T if value.ndim == 2 else value).contiguous().numpy()
    return arrays, *parts


def torchvision_s():
    net = shaken(resnet18())
    return net.state_dict(), body(net), None, None


def timm_s():
    net = shaken(timm.create_model("resnet50"))
    features = lambda x: net.forward_head(net.forward_features(x), pre_logits=True)  # noqa: E731
    return net.state_dict(), features, None, None


FORMATS = {
    "authors": authors,
    "authors, linear": authors_linear,
    "leftthomas": leftthomas,
    "leftthomas, linear": lambda: leftthomas(linear=True),
    "leftthomas, DataParallel": lambda: leftthomas(wrapped=True),
    "PatrickHua, CIFAR": patrick_hua,
    "PatrickHua, CIFAR, 3 layers": lambda: patrick_hua(3),
    "PatrickHua, CIFAR, variant 2": lambda: patrick_hua(shortcut=True),
    "PatrickHua, ImageNet": lambda: patrick_hua(3, small=False),
    "PatrickHua, quick": lambda: patrick_hua(2, small=False),
    "lightly's example": lightly_example,
    "lightly's SimSiam": lambda: lightly_example(("projection_mlp", "prediction_mlp")),
    "lightly's SimSiam of 1.1": lightly_of_1_1,
    "lightly's CIFAR benchmark": lightly_cifar,
    "lightly's CIFAR benchmark of 1.4.1": lambda: lightly_cifar(dummy=True),
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
    path = folder / ("a.pdparams" if name.startswith("PASSL") else "a.pth")
    if name.startswith("PASSL"):
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization="older" not in name)
    return path


def same_weights(weights, expected):
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())


def ours(folder, arch="resnet18", stem="imagenet", layers=3, classes=None, d=64):
    """A checkpoint of main.py, or of linear.py, with nothing at its initial value."""
    net = shaken(SimSiam(arch, stem, d, layers))
    common = {"data_name": "textures", "name": "my run", "pictures": False, "compile": True}
    common |= {"ddp": True, "resume": True}
    command, config = "main.py", PretrainConfig
    more = {"arch": arch, "stem": stem, "feature_dim": d, "projector_layers": layers}
    if classes:
        net = shaken(Classifier(net.backbone, net.features, classes))
        command, config, more = "linear.py", LinearConfig, {"lr": (0.1, 0.2)}
        more |= {"exif": True, "background": "white"}
    encoder = {"arch": arch, "stem": stem, "width": None, "image_size": 48}
    encoder |= dict(zip(("mean", "std"), NORMALISATION["imagenet"], strict=True))
    rows = [
        {"epoch": i, "test_acc@1": (0.0, 61.5, 50.0)[i], "test_acc@5": 90.0, "seconds": 1.0}
        for i in range(1 if classes else 0, 3)
    ]
    state = {name: kind() for name, (kind, _) in checkpoint.FORMAT.items()}
    state |= {"command": command, "config": config(**common, **more).as_dict()}
    state |= {"encoder": encoder, "classes": [f"class {i}" for i in range(classes or 3)]}
    state |= {"model": net.state_dict(), "epoch": 2, "history": rows}
    checkpoint.save(str(folder / "ours.pth"), None, state)
    return net, folder / "ours.pth"
