"""Checkpoints of other projects, made of modules with their structure and names."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.models import resnet
from torchvision.transforms.functional import normalize

import linear
from simsiam.interop import layouts
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.models.classifier import Classifier
from simsiam.models.simsiam import SimSiam
from simsiam.views.augment import NORMALISATION
from tests import projects
from tests.helpers import refused
from tests.projects import FORMATS, authors, same_weights, shaken, solo_learn, torch_names, write


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_features_z_and_p_are_the_project_s(tmp_path, name):
    state, *parts = FORMATS[name]()
    source = LoadedCheckpoint.open(write(state, tmp_path, name))
    net = source.net
    torch.manual_seed(1)
    x = torch.randn(4, 3, 64, 64)
    if source.is_linear:
        net.projector = net.predictor = ()
        state = state.get("state_dict", state)
        (weight,) = (value for key, value in state.items() if key.endswith("fc.weight"))
        (bias,) = (value for key, value in state.items() if key.endswith("fc.bias"))
        expected = parts[0](x) @ weight.T + bias
        torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    for i, part in enumerate((net.backbone, net.projector, net.predictor)):
        if parts[i] is None:
            assert len(part) == 0
            continue
        output, expected = part(x), parts[i](x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        x = expected
    assert source.encoder["arch"] in ("resnet18", "resnet50")
    small = "leftthomas", "PatrickHua, CIFAR", "solo-learn", "lightly's CIFAR"
    assert (source.encoder["stem"] != "imagenet") == name.startswith(small)
    assert source.notes[0].startswith("layout: ")


def test_counts_of_thop_and_wrappers_are_left_out(tmp_path):
    """Those that thop.profile leaves in a network, at every depth."""
    state = projects.leftthomas(wrapped=True)[0]
    assert {"module.total_ops", "module.f.3.0.total_params"} <= state.keys()
    source = LoadedCheckpoint.open(write(state, tmp_path, "a"))
    assert source.notes[0] == "layout: leftthomas/SimSiam"
    assert "total_ops" in source.notes[1]
    compiled = torch_names(torch.compile(shaken(torchvision.models.resnet18())))
    assert next(iter(compiled)).startswith("_orig_mod.")
    assert LoadedCheckpoint.open(write(compiled, tmp_path, "a")).notes[0] == "layout: torchvision"


@pytest.mark.parametrize(
    ("layers", "small", "counted", "left_out"),
    [
        (2, True, True, "its BN has seen no batch"),
        (3, True, True, None),
        (2, False, True, "its BN has seen no batch"),
        (3, False, True, None),
        (2, True, False, "runs on CIFAR skip it"),  # what else can be known
        (3, False, False, None),
    ],
)
def test_the_file_tells_whether_its_second_projector_layer_was_used(
    layers, small, counted, left_out
):
    state = projects.patrick_hua(layers, small)[0]["state_dict"]
    if not counted:
        state = {name: value for name, value in state.items() if "num_batches" not in name}
    weights, encoder, notes = layouts.translate(state)
    lines = [line for line in notes if "second projector layer" in line]
    assert bool(lines) == bool(left_out)
    assert not left_out or left_out in lines[0]
    assert ("projector.6.weight" in weights) == (not left_out)
    name = "projector.layer3.0.weight"
    assert torch.equal(weights[f"projector.{3 if left_out else 6}.weight"], state[name])
    assert encoder["image_size"] == (32 if small or left_out else 224)


def test_a_file_s_ending_means_nothing(tmp_path):
    """PASSL 1.1 writes .pd; timm's hub and this project export safetensors."""
    for name, end in (("PASSL 1.1", "pd"), ("PASSL", "pth"), ("timm", "pth")):
        state = FORMATS[name]()[0]
        path = write(state, tmp_path, name)
        if name == "timm":
            save_file(state, path, metadata={"format": "pt"})
        source = LoadedCheckpoint.open(path.rename(tmp_path / f"model.{end}"))
        assert source.notes[0] == f"layout: {name.split()[0].replace('timm', 'torchvision')}"


@pytest.mark.parametrize(
    ("arch", "stem", "width"), [("resnet18", "cifar", None), ("resnet14", "cifar", 8)]
)
def test_bare_weights_of_this_project(tmp_path, arch, stem, width):
    state = shaken(SimSiam(arch, stem, 16, width=width)).state_dict()
    torch.save({"model": state}, tmp_path / "a.pth")
    save_file(state, tmp_path / "b.pth")
    for path in (tmp_path / "a.pth", tmp_path / "b.pth"):
        source = LoadedCheckpoint.open(path)
        assert source.notes[0] == "layout: simsiam"
        expected = {"arch": arch, "stem": stem, "width": width}
        assert source.encoder == source.encoder | expected
        same_weights(source.net.state_dict(), state)


IMAGENET, CIFAR = NORMALISATION["imagenet"], NORMALISATION["cifar"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "mean", "std", "size"),
    [
        ("leftthomas", CIFAR[0], (0.2023, 0.1994, 0.2010), 32),
        ("PatrickHua, CIFAR", *IMAGENET, 32),
        ("lightly's CIFAR benchmark", *IMAGENET, 32),
        ("lightly's example", *IMAGENET, 224),
        ("solo-learn", *CIFAR, 32),
        ("authors", *IMAGENET, 224),
    ],
)
def test_images_are_normalised_as_in_their_project(tmp_path, name, mean, std, size):
    state, backbone, *_ = FORMATS[name]()
    path = write(state, tmp_path, name)
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    other = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
    for settings in ({"mean": mean, "std": std}, other):
        source = LoadedCheckpoint.open(path, **(settings if settings is other else {}))
        assert source.encoder == source.encoder | settings | {"image_size": size}
        features = source.features(pixels, torch.autocast("cpu", enabled=False))
        expected = backbone(normalize(pixels / 255, **settings))
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
        (line,) = (note for note in source.notes if note.startswith("assumed input: "))
        assert f"{size} pixels, normalised by mean {settings['mean'][0]}" in line


def test_mean_and_std_are_flags(tmp_path, capsys):
    path = write(projects.leftthomas()[0], tmp_path, "a")
    flags = ("--model_path", path, "--data_name", "textures", "--out", tmp_path / "none")
    for flag, *values in (("--std", "58.4", "57.1", "57.4"), ("--mean", "0.5")):
        assert flag in refused(capsys, linear, *flags, flag, *values)


def test_what_tells_the_stem_of_a_cifar_network():
    """A bias before a BN is solo-learn's, also without its classifier."""
    state = solo_learn()[0]["state_dict"]
    heads = {name: value for name, value in state.items() if not name.startswith("classifier")}
    alone = {name: value for name, value in state.items() if name.startswith("backbone.")}
    ours = shaken(SimSiam("resnet18", "cifar", 64)).state_dict()
    for weights, stem, layout, expected, hint in [
        (heads, None, "solo-learn", "cifar_pad2", "--stem"),
        (alone, None, "simsiam", "cifar", "--stem cifar_pad2"),
        (alone, "cifar_pad2", "simsiam", "cifar_pad2", "--stem"),
        (ours, None, "simsiam", "cifar", None),
    ]:
        _, encoder, notes = layouts.translate(weights, stem)
        assert encoder["stem"] == expected
        assert notes[0] == f"layout: {layout}"
        assert (hint is None) == (len(notes) == 1)
        assert hint is None or hint in notes[-1]


def test_timm_networks_with_the_names_of_a_torchvision_resnet_are_named():
    """All that have its names and shapes, and other features."""
    same = set()
    with torch.device("meta"):
        names = timm.list_models(["resnetaa*", "resnetblur*", "resnet18", "resnet34", "resnet50"])
        for name in names:
            state = timm.create_model(name).state_dict()
            arch = name.replace("aa", "").replace("blur", "")
            expected = getattr(torchvision.models, arch, torchvision.models.resnet18)().state_dict()
            if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in expected.items()}:
                continue
            same.add(name)
            doubt = [line for line in layouts.translate(state)[2] if "timm's" in line]
            assert len(doubt) == (arch != "resnet34")
            assert name == arch or name in doubt[0]
    assert same == set("resnet18 resnet34 resnet50 resnetaa50 resnetblur18 resnetblur50".split())


def test_what_does_not_fit_is_named(tmp_path, capsys):
    path = tmp_path / "a.pth"
    state = authors()[0]
    strange = {"state_dict": state["state_dict"] | {"module.momentum": torch.zeros(1)}}
    missing = {k: v for k, v in state["state_dict"].items() if "layer2.0.bn1.weight" not in k}
    twice = solo_learn()[0]["state_dict"]
    twice |= {"encoder.conv1.weight": twice["backbone.conv1.weight"]}
    odd = {"module.encoder.fc.0.bias": torch.zeros(4)}  # not as long as BN's running mean
    few_blocks = torchvision.models.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    narrow = torchvision.models.ResNet(resnet.Bottleneck, [3, 4, 6, 3], width_per_group=4)
    cases = [
        (strange, "module.momentum"),
        ({"state_dict": missing}, "backbone.layer2.0.bn1.weight"),
        ({"state_dict": state["state_dict"] | odd}, "shape of projector.0.bias"),
        ({"state_dict": twice}, "solo-learn, except for encoder.conv1.weight"),
        (torch_names(few_blocks), "none of resnet18"),
        (torch_names(narrow, "module."), "shape of"),
        (torch_names(torchvision.models.squeezenet1_1()), "not those of a ResNet"),
        ({}, "has no weights"),
        ([1], "has no weights"),
        (None, "no checkpoint"),
    ]
    for content, words in cases:
        torch.save(content, path)
        if content is None:
            path.write_text("epoch,loss\n")
        with pytest.raises(ValueError, match=words) as refusal:
            LoadedCheckpoint.open(path)
        line = str(refusal.value)
        assert line.count(str(path)) == 1
        assert line.startswith(f"{path}: ")
    flags = ("--data_name", "textures", "--out", tmp_path / "none")
    assert "no checkpoint" in refused(capsys, linear, "--model_path", path, *flags)
    torch.save(state, path)
    assert "add --data_name" in refused(capsys, linear, "--model_path", path)
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        LoadedCheckpoint.open(tmp_path / "nothing.pth")


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_the_table_is_read_both_ways(name):
    """What is written under a layout's names comes back under this project's."""
    layout = layouts.LAYOUTS[name]
    with torch.device("meta"):
        net = SimSiam("resnet50", "imagenet", 64, 3)
        nets = net, Classifier(net.backbone, net.features, 5)
    for net in nets:
        weights = net.state_dict()
        out, dropped, unknown = layouts.rename_all(weights, layout, write=True)
        again, *rest = layouts.rename_all(out, layout)
        assert rest == [[], []]
        assert again.keys() == weights.keys() - {*dropped, *unknown}
        assert all(again[key] is weights[key] for key in again)
        assert len(again) == len(out) >= 318  # the backbone's, at least
        heads = ("projector.", "predictor.", "fc.")
        assert all(key.startswith(heads) for key in (*dropped, *unknown))
