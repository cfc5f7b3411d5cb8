"""Checkpoints of any project and version: opened, as a start of training, as features, by hub."""

import pickle
import subprocess
import sys

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torchvision import transforms

import hubconf
import linear
import main
from simsiam.data import decode
from simsiam.data.textures import make_textures
from simsiam.interop import weights
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.models.simsiam import SimSiam
from simsiam.training import checkpoint
from simsiam.training.recipes import INIT_PARTS
from simsiam.views.augment import NORMALISATION, Views
from tests.helpers import ROOT, refused, texture_folder
from tests.projects import (
    FORMATS,
    authors,
    authors_linear,
    leftthomas,
    ours,
    same_weights,
    shaken,
    write,
)
from tools import features

OFF = torch.autocast("cpu", enabled=False)


def test_a_flipped_bit_is_seen(tmp_path):
    own, path = ours(tmp_path, "resnet8", "cifar", 2)
    files = {path: own.backbone.conv1.weight.detach()}
    foreign = leftthomas()[0]
    files[write(foreign, tmp_path, "a")] = foreign["f.0.weight"]
    for file, weight in files.items():
        content = bytearray(file.read_bytes())
        content[content.index(weight.numpy().tobytes()) + 5] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{file}: "):
            LoadedCheckpoint.open(file)


# ---- a checkpoint, opened -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("classes", [None, 4])
def test_a_checkpoint_of_this_project(tmp_path, classes):
    """Also as ranks send it to each other."""
    net, path = ours(tmp_path, "resnet8", "cifar", 2, classes)
    source = pickle.loads(pickle.dumps(LoadedCheckpoint.open(path)))
    same_weights(source.net.state_dict(), net.state_dict())
    assert not source.net.training
    assert source.encoder.keys() == set(checkpoint.ENCODER)
    assert source.config.name == "my run"
    assert (source.is_linear, source.notes, source.data_name) == (bool(classes), [], "textures")
    assert source.classes == ([f"class {i}" for i in range(classes)] if classes else [])
    pixels = make_textures(5, seed=3)[0]
    expected = net.backbone(Views(48, *NORMALISATION["imagenet"]).eval_transform(pixels))
    torch.testing.assert_close(source.features(pixels, OFF), expected)
    lengths = source.to("cpu").features(pixels, OFF, normalise=True).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(5))
    three = (0.5, 0.5, 0.5)
    for flags in ({"stem": "cifar_pad2"}, {"image_size": 32}, {"mean": three}, {"std": three}):
        with pytest.raises(ValueError, match=f"^{path}: --{next(iter(flags))}: "):
            LoadedCheckpoint.open(path, **flags)


def test_what_another_project_s_file_does_not_say(tmp_path):
    """It follows from the layout and the stem, or from arguments."""
    source = LoadedCheckpoint.open(write(authors_linear()[0], tmp_path, "a"))
    assert (source.views.size, source.resize, source.data_name) == (224, 256, "imagenet")
    assert source.classes == [str(i) for i in range(1000)]
    assert source.state is source.config is None
    path = write(leftthomas()[0], tmp_path, "b")
    source = LoadedCheckpoint.open(path)
    assert (source.views.size, source.resize, source.data_name) == (32, 32, "")
    mean = (0.4914, 0.4822, 0.4465)
    assert (source.encoder["mean"], source.encoder["std"]) == (mean, (0.2023, 0.1994, 0.2010))
    source = LoadedCheckpoint.open(path, "cifar_pad2", 24, std=[0.5, 0.25, 1])
    assert (source.encoder["stem"], source.views.size) == ("cifar_pad2", 24)
    assert (source.encoder["mean"], source.encoder["std"]) == (mean, (0.5, 0.25, 1.0))
    with pytest.raises(ValueError, match="conv1"):
        LoadedCheckpoint.open(path, "imagenet")


def in_old_version(path, version):
    """Rewrite a checkpoint as version 1 or 2 had it, with parts that networks no longer have."""
    state = torch.load(path)
    entries = ("model", "history", "epoch", "step", "optimizer", "classes", "command")
    old = {name: state[name] for name in entries} | {"version": version}
    new = ("exif", "background", "exclude", "levels", "channels", "probe")
    args = {name: value for name, value in state["config"].items() if name not in new}
    args |= {"local_views": 0, "target_momentum": 0.99, "k": "junk", "batch_size": [1]}
    removed = ("momentum_encoder.0.conv1.weight", "local_predictor.0.weight")
    old["model"] = old["model"] | dict.fromkeys(removed, torch.ones(1))
    if version == 2:
        old |= {"encoder": state["encoder"], "facts": {}, "tally": {"loss": 0.0}, "probe": {}}
    else:  # the encoder was among the arguments
        linear = old.pop("command") == "linear.py"
        args |= {"encoder": state["encoder"]} if linear else state["encoder"]
    torch.save(old | {"args": args}, path)


@pytest.mark.parametrize("version", range(1, checkpoint.VERSION))
@pytest.mark.parametrize("classes", [None, 4])
def test_the_weights_of_older_versions_are_used_everywhere(tmp_path, capsys, version, classes):
    """But no run is resumed from them."""
    net, path = ours(tmp_path, "resnet8", "cifar", 2, classes)
    in_old_version(path, version)
    source = LoadedCheckpoint.open(path)
    same_weights(source.net.state_dict(), net.state_dict())
    assert source.encoder["image_size"] == 48
    assert (source.is_linear, source.data_name) == (bool(classes), "textures")
    assert source.classes == ([f"class {i}" for i in range(classes)] if classes else [])
    assert (source.decode.exif, source.decode.background) == (False, "none")  # as it was then
    assert f"version {version}" in source.notes[0]
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(from_hub("encoder", checkpoint=str(path))(x), net.backbone(x))
    new = SimSiam("resnet8", "cifar", 64)
    assert f"version {version}" in weights.init_from_checkpoint(new, path)[0]
    same_weights(new.backbone.state_dict(), net.backbone.state_dict())
    line = refused(capsys, linear if classes else main, "--resume", path)
    assert f"version {version}" in line
    assert str(path) in line
    if not classes:
        flags = f"--model_path {path} --cached --epochs 1 --lr 1 --no-pictures --out {tmp_path}"
        linear.main(flags.split())
        assert LoadedCheckpoint.open(tmp_path / "ours_linear_cached_model.pth").is_linear


@pytest.mark.parametrize("bn", ["none", "hidden", "all"])
def test_an_older_version_s_heads_are_those_of_its_weights(tmp_path, bn):
    net, path = ours(tmp_path, "resnet8", "cifar", 2)
    state = torch.load(path)
    net = shaken(SimSiam("resnet8", "cifar", 16, 3, bn=bn))
    torch.save(state | {"model": net.state_dict()}, path)
    in_old_version(path, 1)
    source, x = LoadedCheckpoint.open(path), torch.randn(4, 64)
    same_weights(source.net.state_dict(), net.state_dict())
    z = net.projector(x)
    assert torch.equal(source.net.projector(x), z)
    assert torch.equal(source.net.predictor(z), net.predictor(z))


@pytest.mark.parametrize("version", [0, -1, 99])
def test_an_unknown_version_is_refused(tmp_path, version):
    _, path = ours(tmp_path, "resnet8", "cifar", 2)
    torch.save(torch.load(path) | {"version": version}, path)
    with pytest.raises(ValueError, match=f"^{path}: .*version {version}"):
        LoadedCheckpoint.open(path)


# ---- the start of a training --------------------------------------------------------------------


def test_init_takes_the_parts_that_are_there(tmp_path, capsys):
    state = {name: value for name, value in leftthomas()[0].items() if name[0] == "f"}
    path = write(state, tmp_path, "a")
    net = SimSiam("resnet18", "cifar", 16)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    notes = weights.init_from_checkpoint(net, path)
    assert len([line for line in notes if "at random" in line]) == 2
    assert any("--stem" in line for line in notes)
    after = net.state_dict()
    assert torch.equal(after["backbone.layer4.1.conv2.weight"], state["f.6.1.conv2.weight"])
    assert all(torch.equal(after[name], before[name]) for name in after if name[:2] == "pr")
    for arch, stem in (("resnet18", "imagenet"), ("resnet34", "cifar")):
        with torch.device("meta"):
            other = SimSiam(arch, stem, 16)
        with pytest.raises(ValueError, match="backbone .*--arch resnet18 --stem cifar"):
            weights.init_from_checkpoint(other, path)
    flags = ("--data_name", "textures", "--out", tmp_path / "none", "--arch", "resnet18")
    line = refused(capsys, main, *flags, "--init", path, "--stem", "imagenet")
    assert line.count(str(path)) == 1
    assert "none.pth" in refused(capsys, main, *flags, "--init", tmp_path / "none.pth")


INIT = {  # of which project, and the flags that it fits
    "leftthomas": {"projector_affine": True},
    "PatrickHua, CIFAR": {"projector_affine": True},
    "lightly's CIFAR benchmark": {"projector_affine": True, "stem": "cifar_no_relu"},
    "solo-learn": {"projector_layers": 3, "stem": "cifar_pad2"},
    "mmpretrain": {"projector_layers": 3, "stem": "imagenet"},
}


@torch.no_grad()
@pytest.mark.parametrize("name", INIT)
def test_init_takes_all_parts_of_another_project(tmp_path, name):
    state, *parts = FORMATS[name]()
    net = SimSiam(**{"arch": "resnet18", "feature_dim": 64} | INIT[name]).eval()
    weights.init_from_checkpoint(net, write(state, tmp_path, name), "all")
    x = torch.randn(4, 3, 32, 32)
    for mine, part in zip((net.backbone, net.projector, net.predictor), parts, strict=True):
        expected = part(x)
        torch.testing.assert_close(mine(x), expected, atol=1e-5, rtol=1e-5)
        x = expected


def test_init_names_the_flags_that_would_fit(tmp_path):
    state = leftthomas()[0]
    path = write(state, tmp_path, "a")
    net = SimSiam("resnet18", "cifar", 64)
    before = {name: value.clone() for name, value in net.projector.state_dict().items()}
    flags = "--feature_dim 64 --projector_layers 2 --projector_affine"
    assert weights.init_from_checkpoint(net, path)[-1].endswith(flags)
    same_weights(net.projector.state_dict(), before)
    assert torch.equal(net.backbone.conv1.weight, state["f.0.weight"])
    assert torch.equal(net.predictor[0].weight, state["h.0.weight"])
    with pytest.raises(ValueError, match=f"{flags}; --init_parts fitting"):
        weights.init_from_checkpoint(net, path, "all")
    # The projector of facebookresearch/simsiam is as wide as the encoder: no flag makes one.
    path = write(authors()[0], tmp_path, "a")
    lines = weights.init_from_checkpoint(SimSiam("resnet18", "imagenet", 64, 3), path)
    assert not [line for line in lines if "--feature_dim" in line]


@pytest.mark.parametrize("parts", INIT_PARTS)
def test_init_parts(tmp_path, parts):
    saved, path = ours(tmp_path, "resnet8", "cifar", 2)
    other = SimSiam("resnet8", "cifar", 32)  # with heads of another width
    before = {name: value.clone() for name, value in other.state_dict().items()}
    if parts == "all":
        with pytest.raises(ValueError, match="--feature_dim 64 "):
            weights.init_from_checkpoint(other, path, parts)
        return
    notes = weights.init_from_checkpoint(other, path, parts)
    assert len(notes) == (0 if parts == "backbone" else 2)
    same_weights(other.backbone.state_dict(), saved.backbone.state_dict())
    after = other.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "pr" in name)
    same = SimSiam("resnet8", "cifar", 64)
    heads = {name: value.clone() for name, value in same.projector.state_dict().items()}
    weights.init_from_checkpoint(same, path, parts)
    expected = heads if parts == "backbone" else saved.projector.state_dict()
    same_weights(same.projector.state_dict(), expected)
    without = SimSiam("resnet8", "cifar", 64, predictor="none")
    (note,) = weights.init_from_checkpoint(without, path, "fitting")
    assert "predictor" in note
    _, path = ours(tmp_path, "resnet8", "cifar", 2, classes=4)  # a linear model
    notes = weights.init_from_checkpoint(same, path, parts)
    assert len(notes) == (0 if parts == "backbone" else 2)


def test_runs_start_from_the_weights_of_init(tmp_path, capsys):
    net, path = ours(tmp_path, "resnet8", "cifar", 2)
    flags = "--data_name textures --train_size 64 --batch_size 32 --epochs 1 --k 5 --image_size 16 "
    flags += f"--bank_size 32 --no-pictures --arch resnet8 --out {tmp_path} --name a "
    assert "--init" in refused(capsys, main, *flags.split(), "--init_parts", "all")
    foreign = ("--init", write(leftthomas()[0], tmp_path, "a"), "--init_parts", "all")
    assert "--arch resnet18 --stem cifar" in refused(capsys, main, *flags.split(), *foreign)
    more = f"--init {path} --feature_dim 64 --projector_layers 2 --lr 1e-9"
    main.main([*flags.split(), *more.split()])
    model = torch.load(tmp_path / "a_model.pth")["model"]
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(model[name], parameter.detach(), atol=1e-5, rtol=1e-5)
    main.main([*flags.split(), "--feature_dim", "16", "--projector_affine", "--overwrite"])
    assert LoadedCheckpoint.open(tmp_path / "a_model.pth").net.projector[4].affine


def test_a_linear_head_on_another_project_s_weights(tmp_path, capsys):
    path = write(leftthomas()[0], tmp_path, "a")
    texture_folder(tmp_path / "images", 40, 20)
    flags = f"--model_path {path} --data_name folder --data_root {tmp_path}/images --cached "
    flags = [*flags.split(), "--no-pictures", "--epochs", "1", "--out", str(tmp_path)]
    linear.main(flags)
    out = capsys.readouterr().out
    assert "layout: leftthomas/SimSiam" in out
    assert "assumed input: 32 pixels" in out
    linear.main([*flags, "--name", "other", "--stem", "cifar_pad2", "--image_size", "24"])
    encoder = torch.load(tmp_path / "other_model.pth")["encoder"]
    assert (encoder["stem"], encoder["image_size"]) == ("cifar_pad2", 24)
    assert "conv1" in refused(capsys, linear, *flags, "--name", "b", "--stem", "imagenet")
    head = f"{tmp_path}/a_linear_cached_model.pth"
    linear.main(["--model_path", head, "--evaluate_only", "--out", str(tmp_path)])


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
    net, path = ours(tmp_path, "resnet8", "cifar", 2)
    root = pictures(tmp_path / "images")
    for end in features.FORMATS:
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
    images, _ = decode.decode_files(list(arrays["files"]), 48, resize_size=48)
    expected = net.backbone(Views(48, *NORMALISATION["imagenet"]).eval_transform(images))
    expected = net.projector(expected) if layer == "projector" else expected
    np.testing.assert_allclose(arrays["features"], expected.numpy(), atol=1e-5)


@torch.no_grad()
def test_features_of_a_foreign_encoder_are_of_the_authors_transform(tmp_path):
    """Shorter side 256, centre crop 224: in the tool and in the hub; and as the flags have it."""
    state, backbone, *_ = authors()
    path, root = write(state, tmp_path, "a"), pictures(tmp_path / "images")
    (root / "2.png").unlink()  # see-through
    mean, std = NORMALISATION["imagenet"]
    flags = f"--model_path {path} --data_root {root} --out {tmp_path}/f.npz"
    for more, shorter, size in (("", 256, 224), (" --image_size 112 --mean 0 0 0", 128, 112)):
        features.command((flags + more).split())
        arrays = np.load(tmp_path / "f.npz")
        (tmp_path / "f.npz").unlink()
        steps = [transforms.Resize(shorter), transforms.CenterCrop(size), transforms.ToTensor()]
        steps.append(transforms.Normalize((0.0, 0.0, 0.0) if more else mean, std))
        for name, row in zip(arrays["files"], arrays["features"], strict=True):
            x = transforms.Compose(steps)(Image.open(name).convert("RGB"))[None]
            np.testing.assert_allclose(row, backbone(x)[0].numpy(), atol=1e-3)
    source = LoadedCheckpoint.open(path)
    assert (source.resize, source.views.size) == (256, 224)


def test_features_refuse_in_one_line(tmp_path, capsys):
    _, path = ours(tmp_path, "resnet8", "cifar", 2, classes=3)
    root = pictures(tmp_path / "images")
    flags = ("--model_path", path, "--data_root", root, "--out")
    assert "--out" in refused(capsys, features.command, *flags, tmp_path / "f.txt")
    assert "--layer" in refused(
        capsys, features.command, *flags, tmp_path / "f.csv", "--layer", "projector"
    )
    (root / "cats" / "junk.png").write_text("junk")
    assert "junk.png" in refused(capsys, features.command, *flags, tmp_path / "f.csv")
    assert not (tmp_path / "f.csv").exists()
    features.command([*map(str, flags), f"{tmp_path}/f.csv", "--bad_images", "skip"])
    assert len(pandas.read_csv(tmp_path / "f.csv")) == 3


def from_hub(name, **more):
    return torch.hub.load(str(ROOT), name, source="local", **more)


def test_hub(tmp_path):
    net, path = ours(tmp_path, "resnet8", "cifar", 2)
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(from_hub("encoder", checkpoint=str(path))(x), net.backbone(x))
    loss, z, features = from_hub("simsiam", checkpoint=str(path))([x, x.flip(3)])
    assert torch.equal(loss, net([x, x.flip(3)]).loss)
    assert z.shape == (2, 64)
    assert torch.equal(features, net.backbone(x))
    assert from_hub("simsiam", arch="resnet8", feature_dim=16).predictor[0].in_features == 16
    with pytest.raises(ValueError, match=str(path)):
        from_hub("classifier", checkpoint=str(path))
    net, path = ours(tmp_path, "resnet8", "cifar", 2, classes=4)
    with pytest.raises(ValueError, match=str(path)):
        from_hub("simsiam", checkpoint=str(path))
    assert torch.equal(from_hub("encoder", checkpoint=str(path))(x), net.backbone(x))
    assert torch.equal(from_hub("classifier", checkpoint=str(path))(x), net(x))
    public = {name for name, value in vars(hubconf).items() if callable(value) and name[0] != "_"}
    assert public == {"simsiam", "encoder", "classifier"}  # what torch.hub lists
    path.write_text("no weights")
    with pytest.raises(ValueError, match=str(path)):
        from_hub("encoder", checkpoint=str(path))


def test_a_predictor(tmp_path):
    """Of images of any kind, as decode_files and `linear.py --predict` have them."""
    net, path = ours(tmp_path, "resnet8", "cifar", 2, classes=4)
    predictor = from_hub("classifier", checkpoint=str(path))
    files = sorted(pictures(tmp_path / "images").rglob("*.png"))
    pixels, _ = decode.decode_files(files, predictor.size, resize_size=predictor.resize)
    with torch.no_grad():
        x = Views(48, *NORMALISATION["imagenet"]).eval_transform(pixels)
        expected = net(x).softmax(1)
    torch.testing.assert_close(predictor.scores(pixels, OFF), expected)
    predictions = predictor.predict(list(map(Image.open, files)))
    assert predictions == predictor.predict(files)
    for prediction, row in zip(predictions, expected, strict=True):
        assert prediction["class"] == f"class {row.argmax().item()}"
        assert prediction["score"] == max(prediction["scores"].values())
        assert list(prediction["scores"]) == [f"class {i}" for i in range(4)]
        assert list(prediction["scores"].values()) == pytest.approx(row.tolist(), abs=1e-6)
    table = f"{tmp_path}/p.csv"
    linear.main(["--model_path", str(path), "--predict", *map(str, files), "--out_csv", table])
    table = pandas.read_csv(table)
    assert [one["class"] for one in predictions] == list(table["class"])
    assert [one["score"] for one in predictions] == pytest.approx(list(table["score"]), abs=1e-5)
    assert predictor.predict([]) == []
    with pytest.raises(ValueError, match=r"none\.png"):
        predictor.predict(str(tmp_path / "none.png"))


@pytest.mark.parametrize("order", ["the caller first", "the hub first"])
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
    script = ["import sys, torch", *(steps if order == "the caller first" else reversed(steps))]
    script += [
        f"assert all(sys.modules[name].mine for name in {names})",
        "assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 64)",
    ]
    command = [sys.executable, "-c", "\n".join(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
