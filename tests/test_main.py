"""main.py: what a run writes, how it goes on, what it draws, says and refuses."""

import itertools
import os
import socket
import sys
import time
import types

import matplotlib.figure
import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import linear
import main
import utils
from simsiam.data.datasets import load_dataset
from simsiam.data.decode import DecodeOptions
from simsiam.data.loader import Data, ImageFiles
from simsiam.data.textures import TEXTURE_CLASSES, make_textures
from simsiam.evaluation import metrics
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.models.methods import build_model
from simsiam.models.simsiam import SimSiam, cross_entropy
from simsiam.plots.run import draw_run, draw_views
from simsiam.runtime.files import RunError, read_csv
from simsiam.training import checkpoint
from simsiam.training.collapse import Monitor
from simsiam.training.meters import TrainMeters
from simsiam.training.optim import make_optimizer
from simsiam.training.progress import Progress
from simsiam.training.recipes import RECIPES, PretrainConfig
from simsiam.training.run import Run
from simsiam.views.augment import NORMALISATION, Augmentation, Batch, Views
from tests import helpers

TINY = "--data_name textures --train_size 200 --width 4 --feature_dim 16 --batch_size 32"
TIMES = ["images_per_sec", "seconds"]


class Stop(Exception):
    """Ends a run as a power cut would: nothing is written after it."""


def run(tmp_path, flags, on_step=None):
    main.main([*TINY.split(), "--no-pictures", "--out", str(tmp_path), *flags.split()], on_step)


def run_until(epoch, step, begin):
    """Call `begin(on_step)` with a hook that ends the run before this step is counted."""

    def stop(*now):
        if now == (epoch, step):
            raise Stop

    with pytest.raises(Stop):
        begin(stop)


def config_of(flags):
    """The config of a command line of main.py."""
    return utils.ConfigParser("main.py", "", PretrainConfig).read(flags.split())[0]


def refused(capsys, *argv):
    err = helpers.refused(capsys, main, *argv)
    assert err.startswith("main.py: ")
    return err


def model_of(tmp_path, name):
    return torch.load(tmp_path / f"{name}_model.pth", weights_only=True)["model"]


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder as ImageNet's: 120 images to train on and 40 to score with, of three modes."""
    root = tmp_path_factory.mktemp("photos")
    for split, number, seed in [("train", 120, 1), ("val", 40, 2)]:
        images, labels = make_textures(number, seed)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = root / split / TEXTURE_CLASSES[label] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((40 + i % 9, 40))
            image.convert(("RGB", "L", "CMYK")[i % 3]).save(path)
    return root


def of_photos(photos, out, *more):
    flags = "--data_name imagenet --arch resnet8 --stem cifar --image_size 32 --feature_dim 16"
    flags += f" --batch_size 32 --bank_size 60 --k 5 --data_root {photos} --out {out}"
    return [*flags.split(), *map(str, more)]


# ---- a run, and how it goes on ------------------------------------------------------------------


def test_a_run_writes_what_the_readme_says(tmp_path, capsys):
    run(tmp_path, "--epochs 3 --knn_every 2 --name a --pictures")
    out = capsys.readouterr().out
    assert "raw pixels" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a_confusion.png",
        "a_curves.png",
        "a_embedding.png",
        "a_model.pth",
        "a_neighbours.png",
        "a_statistics.csv",
        "results.csv",
    ]
    table = pandas.read_csv(tmp_path / "a_statistics.csv")
    assert " ".join(table.columns) == (
        "epoch lr train_loss std rank alignment collapse test_acc@1 test_acc@5 probe_acc@1 "
        "images_per_sec seconds"
    )
    assert table["epoch"].tolist() == [0, 1, 2, 3]
    assert table["test_acc@1"].isna().tolist() == [False, True, False, False]
    assert table["train_loss"].isna().tolist() == [True, False, False, False]
    assert table["train_loss"].iloc[1:].between(-1, 1).all()
    assert table["std"].iloc[1:].between(0.5, 1.1).all()
    assert table["rank"].dropna().between(1, 16).all()
    result = pandas.read_csv(tmp_path / "results.csv").iloc[0]
    assert result["protocol"] == "KNN"
    assert result["top1"] == table["test_acc@1"].iloc[-1]
    assert result["best_top1"] == table["test_acc@1"].iloc[1:].max()
    known = {"arch": "resnet8", "width": 4, "seed": 0, "device": "cpu", "run": "a", "epochs": 3}
    state = torch.load(tmp_path / "a_model.pth", weights_only=True)
    known |= {"lr": state["config"]["lr"], "batch_size": state["config"]["batch_size"]}
    assert {name: result[name] for name in known} == known
    net = SimSiam("resnet8", feature_dim=16, width=4)
    assert round(result["params_m"] * 1e6) == sum(p.numel() for p in net.parameters())
    assert " ".join(sorted(state)) == (
        "classes command config encoder environment epoch extra history images_checksum meters "
        "model optimizer probe scaler seconds step version"
    )
    assert PretrainConfig.from_dict(state["config"]).as_dict() == state["config"]
    assert (state["command"], state["classes"]) == ("main.py", list(TEXTURE_CLASSES))
    mean, std = NORMALISATION["cifar"]
    encoder = {"arch": "resnet8", "stem": "cifar", "width": 4, "image_size": 32}
    assert state["encoder"] == encoder | {"mean": mean, "std": std}
    net.load_state_dict(state["model"])
    for name in ("curves", "neighbours", "embedding", "confusion"):
        assert Image.open(tmp_path / f"a_{name}.png").size[0] > 400


@pytest.mark.parametrize(
    "flags",
    [
        "--target mean --num_views 3 --covariance 0.04",
        "--recipe fast",
        "--optimizer muon --lr 0.08 --no-bn_decay",
    ],
)
def test_what_others_have_added_goes_on_to_the_same_bits(tmp_path, flags):
    flags = f"{flags} --epochs 2"
    run(tmp_path, f"{flags} --name whole")
    run_until(1, 1, lambda hook: run(tmp_path, f"{flags} --name cut --checkpoint_minutes 0", hook))
    path = tmp_path / "cut_model.pth"
    run(tmp_path, f"--resume {path}")
    assert same_bits(model_of(tmp_path, "whole"), model_of(tmp_path, "cut"))
    run(tmp_path, "--epochs 2 --name plain")
    assert not same_bits(model_of(tmp_path, "whole"), model_of(tmp_path, "plain"))


def test_bn_and_biases_have_no_decay_if_so_asked():
    net = SimSiam("resnet8", feature_dim=16, width=4)
    plain = make_optimizer(net, config_of("--recipe short"))
    assert [group["weight_decay"] for group in plain.param_groups] == [5e-4] * 2
    args = config_of("--recipe short --no-bn_decay --lr 0.5 --batch_size 256")
    apart = make_optimizer(net, args)
    decay = {id(p): g["weight_decay"] for g in apart.param_groups for p in g["params"]}
    assert len(decay) == sum(len(group["params"]) for group in apart.param_groups)
    for name, parameter in net.named_parameters():
        of_bn_or_bias = parameter.dim() < 2
        assert decay[id(parameter)] == (0.0 if of_bn_or_bias else 5e-4), name
    fixed = {id(p) for g in apart.param_groups if g["fix_lr"] for p in g["params"]}
    assert fixed == {id(p) for p in net.predictor.parameters()}
    for parameter in net.parameters():  # no gradient: what a step changes is the decay alone
        parameter.grad = torch.zeros_like(parameter)
    before = {name: value.clone() for name, value in net.named_parameters()}
    apart.step()
    for name, value in net.named_parameters():
        factor = 1 if value.dim() < 2 else 1 - 0.5 * 5e-4
        torch.testing.assert_close(value, factor * before[name], rtol=1e-6, atol=0)


def test_muon_turns_matrices_and_moves_the_rest_as_nadamw():
    """A first step: of a matrix all singular values move alike, of a vector all numbers."""
    torch.manual_seed(0)
    net = SimSiam("resnet8", feature_dim=16, width=4)
    flags = "--optimizer muon --lr 0.5 --batch_size 64 --weight_decay 0.2 --no-bn_decay"
    args = config_of(f"--recipe short {flags}")
    optimizer, lr = make_optimizer(net, args), 0.5 * 64 / 256
    assert {group["lr"] for group in optimizer.param_groups} == {lr}
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, value in net.named_parameters():
        if value.dim() < 2:  # a step of lr by the gradient's sign, and Nesterov's 0.9 of the next
            moved = (before[name] - value) / value.grad.sign()
            torch.testing.assert_close(
                moved, 1.9 * lr / 4 * torch.ones_like(moved), rtol=1e-4, atol=0
            )
            continue
        moved = (before[name] * (1 - lr * 0.2) - value).flatten(1)
        out, into = moved.shape
        # Jordan's iteration takes each singular value to about 0.7 to 1.2.
        found = torch.linalg.svdvals(moved) / (lr * max(1, out / into) ** 0.5)
        assert found.min() > 0.3, name
        assert found.max() < 1.3, name
        assert (moved * value.grad.flatten(1)).sum() > 0, name


def test_views_grow_over_a_run(tmp_path, capsys, monkeypatch):
    flags = "--epochs 4 --view_sizes 16 24 32 --warmup_epochs 3"
    sides, step = [], SimSiam.forward

    def watched(net, views):
        sides.append(views[0].shape[-1])
        return step(net, views)

    monkeypatch.setattr(SimSiam, "forward", watched)
    run(tmp_path, f"{flags} --name whole")
    steps = len(sides) // 4
    # Epochs 0 to 3 have the sizes 0 * 3 // 4 = 0, 1 * 3 // 4 = 0, 2 * 3 // 4 = 1, 3 * 3 // 4 = 2.
    assert sides == [16] * 2 * steps + [24] * steps + [32] * steps
    cut = f"{flags} --name cut --checkpoint_minutes 0"
    run_until(2, 1, lambda hook: run(tmp_path, cut, hook))
    again = f"{TINY} --no-pictures --out {tmp_path} --name cut --resume"
    for flag, value in (("--view_sizes", "16"), ("--epochs", "8")):  # even in the warm-up
        assert flag in refused(capsys, *again.split(), flag, value)
    run(tmp_path, f"{cut} --resume")
    assert same_bits(model_of(tmp_path, "whole"), model_of(tmp_path, "cut"))
    assert config_of("--recipe fast").view_sizes == (0.5, 0.625, 0.75)
    assert config_of("--recipe fast --epochs 2").view_sizes == (0.625, 0.75)
    assert config_of("--recipe fast --view_sizes 16").view_sizes == (16,)
    assert config_of("--recipe short").view_sizes is None
    images = types.SimpleNamespace(train_images=torch.empty(1, 3, 64, 64))
    for size, sides in ((32, [16, 16, 20, 20, 24]), (64, [32, 32, 40, 40, 48])):
        args = config_of("--recipe fast --epochs 5" + " --image_size 32" * (size == 32))
        views = main.make_views(args, main.encoder_config(args, images), 2)
        assert [views.sizes_in(epoch) for epoch in range(5)] == [[side] * 2 for side in sides]
    for wrong in ("0.05", "7", "20.5", "2000"):
        assert "--view_sizes" in refused(capsys, "--view_sizes", wrong)
    err = refused(capsys, *TINY.split(), "--epochs", "2", *"--view_sizes 8 16 32".split())
    assert "--view_sizes 8 16 32" in err
    files = f"--data_name imagenet --data_root {tmp_path} --view_sizes 16 32".split()
    assert "--view_sizes" in refused(capsys, *files)


def test_resume_ends_at_the_same_bits(tmp_path, capsys):
    run(tmp_path, "--epochs 3 --name whole --seed 5")
    cut = "--epochs 3 --name cut --seed 5"
    run_until(1, 0, lambda hook: run(tmp_path, f"{cut} --checkpoint_minutes 0", hook))
    torch.manual_seed(123)
    run(tmp_path, f"{cut} --resume")
    assert "resumed after epoch 1 of 3" in capsys.readouterr().out

    assert same_bits(model_of(tmp_path, "whole"), model_of(tmp_path, "cut"))
    whole, cut = (
        torch.load(tmp_path / f"{name}_model.pth")["optimizer"]["state"]
        for name in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    for i, state in whole.items():
        assert torch.equal(state["momentum_buffer"], cut[i]["momentum_buffer"])
    tables = [pandas.read_csv(tmp_path / f"{name}_statistics.csv") for name in ("whole", "cut")]
    assert tables[0].drop(columns=TIMES).equals(tables[1].drop(columns=TIMES))

    err = refused(
        capsys, *TINY.split(), "--out", tmp_path, "--name", "cut", "--epochs", 4, "--resume"
    )
    assert "epochs 3" in err
    assert "epochs 4" in err
    err = refused(capsys, "--out", tmp_path, "--name", "none", "--resume")
    assert "none_model.pth" in err


def test_seeds_differ_and_repeat(tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        run(tmp_path, f"--epochs 1 --name {name} --seed {seed}")
    a, b, c = (model_of(tmp_path, name) for name in "abc")
    assert same_bits(a, b)
    assert not torch.equal(a["backbone.conv1.weight"], c["backbone.conv1.weight"])
    a, b, c = (main.initial_network(config_of(f"{TINY} --seed {seed}")) for seed in "112")
    assert same_bits(a.state_dict(), b.state_dict())
    assert not torch.equal(a.backbone.conv1.weight, c.backbone.conv1.weight)


def test_an_existing_run_is_refused_and_overwritten_on_demand(tmp_path, capsys):
    run(tmp_path, "--epochs 1 --name a")
    before = (tmp_path / "a_model.pth").read_bytes()
    err = refused(capsys, *TINY.split(), "--epochs", 1, "--name", "a", "--out", tmp_path)
    assert "--resume" in err
    assert "--overwrite" in err
    assert (tmp_path / "a_model.pth").read_bytes() == before
    run(tmp_path, "--epochs 1 --name a --seed 3 --overwrite")
    assert (tmp_path / "a_model.pth").read_bytes() != before
    assert len(pandas.read_csv(tmp_path / "results.csv")) == 1


def test_seconds_are_of_an_epoch_s_own_steps(tmp_path, monkeypatch):
    """The seconds before training do not count; those of all steps do, across restarts."""
    now = [0.0]
    eigvalsh = torch.linalg.eigvalsh

    def slow(gram):  # a part of each kNN
        now[0] += 1000
        return eigvalsh(gram)

    monkeypatch.setattr(torch.linalg, "eigvalsh", slow)
    argv = f"{TINY} --no-pictures --epochs 3 --knn_every 3 --checkpoint_minutes 0 --name a".split()
    parser = utils.ConfigParser("main.py", "", PretrainConfig)

    def train(*flags, stop=None):
        def on_step(*step):
            now[0] += 1
            if step == stop:
                raise Stop

        config, overrides = parser.read([*argv, "--out", str(tmp_path), *flags])
        clock = lambda: now[0]  # noqa: E731
        with Run("main.py", config, overrides, main.STATISTICS, clock) as entered:
            state, monitor, result = main.prepare(entered, parser)
            if entered.checkpoint:
                entered.resume(state)
            main.pretrain(entered, state, monitor, result, on_step)

    with pytest.raises(Stop):
        train(stop=(1, 3))  # with the third of six steps saved
    now[0] = 1e6
    train("--resume")
    table = pandas.read_csv(tmp_path / "a_statistics.csv")[1:]
    assert table["seconds"].tolist() == [6, 6, 1006]  # a kNN is its epoch's
    assert table["images_per_sec"].tolist() == [32, 32, 32]  # and not of the steps
    assert pandas.read_csv(tmp_path / "results.csv")["seconds"].tolist() == [1018]


def test_fix_pred_lr_keeps_the_predictors_lr(tmp_path):
    for name, fixed in [("fixed", "--fix_pred_lr"), ("free", "--no-fix_pred_lr")]:
        run(tmp_path, f"--epochs 2 --name {name} {fixed}")
        groups = torch.load(tmp_path / f"{name}_model.pth")["optimizer"]["param_groups"]
        peak = RECIPES["short"]["lr"] * 32 / 256
        assert groups[0]["lr"] < 0.1 * peak  # the cosine's end
        assert (groups[1]["lr"] == peak) == (name == "fixed")
        net = SimSiam("resnet8", feature_dim=16, width=4)
        assert len(groups[1]["params"]) == len(list(net.predictor.parameters()))


def test_compile_trains_the_same_network(tmp_path):
    run(tmp_path, "--epochs 1 --name eager")
    run(tmp_path, "--epochs 1 --name compiled --compile --cuda_graphs")
    a, b = (model_of(tmp_path, name) for name in ("eager", "compiled"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-2, rtol=1e-2)


# ---- images in files ----------------------------------------------------------------------------


def test_unlabelled_folder_and_the_imagenet_recipe(tmp_path, capsys):
    images, _ = make_textures(24, seed=3)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).resize((40, 48)).save(tmp_path / f"{i}.png")
    main.main(
        f"--data_name folder --data_root {tmp_path} --recipe imagenet --arch resnet18 --stem cifar "
        f"--image_size 16 --feature_dim 16 --batch_size 8 --epochs 1 --out {tmp_path}/r".split()
    )
    out = capsys.readouterr().out
    assert "no kNN" in out
    table = pandas.read_csv(tmp_path / "r" / "folder_resnet18_16_200_8_1_statistics.csv")
    assert table["test_acc@1"].isna().all()
    encoder = LoadedCheckpoint.open(tmp_path / "r" / "folder_resnet18_16_200_8_1_model.pth")
    of_photos_alone = DecodeOptions(exclude=("r",))  # not of the pictures that the run has drawn
    images = load_dataset("folder", tmp_path, 16, decode=of_photos_alone).train_images
    config = config_of("--recipe imagenet")
    views, seen = Views(16, config.mean, config.std, config.augmentation, number=1), []
    for epoch in range(2):  # two views of each image
        with torch.no_grad():
            features = encoder.net.backbone(views(Batch.alone(images, epoch))[0])
        seen.append(F.normalize(features, dim=1))
    start, end = table["alignment"]
    assert end == pytest.approx((seen[0] - seen[1]).square().sum(1).mean().item(), rel=1e-3)
    assert f"alignment {end:.3f}, untrained encoder {start:.3f}: a score without labels" in out
    assert table["rank"].notna().all()
    assert not (tmp_path / "r" / "results.csv").exists()
    state = torch.load(tmp_path / "r" / "folder_resnet18_16_200_8_1_model.pth")
    assert state["config"]["blur_p"] == 0.5
    assert state["config"]["fix_pred_lr"] is True
    assert state["encoder"]["mean"] == NORMALISATION["imagenet"][0]
    assert "projector.7.running_mean" in state["model"]  # three layers


def test_imagenet_from_files_to_a_judged_head(photos, tmp_path, capsys):
    """Whole, and stopped within an epoch and resumed with other workers: the same bits."""
    flags = of_photos(photos, tmp_path, "--epochs", 2, "--no-pictures", "--name")
    main.main([*flags, "whole"])
    out = capsys.readouterr().out
    assert "imagenet: 120 training images, 40 test images, 10 classes, 32 pixels" in out
    results = pandas.read_csv(tmp_path / "results.csv")
    assert results["protocol"].tolist() == ["KNN, bank of 60"]

    cut = [*flags, "cut", "--checkpoint_minutes", "0"]
    run_until(1, 2, lambda hook: main.main(cut, hook))
    main.main([*flags, "cut", "--resume", "--num_workers", "0"])
    assert "and step 2 of 3" in capsys.readouterr().out
    assert same_bits(model_of(tmp_path, "whole"), model_of(tmp_path, "cut"))

    judge = f"--model_path {tmp_path}/whole_model.pth --out {tmp_path} --epochs 1 --batch_size 32"
    linear.main([*judge.split(), "--lr", "1", "0.1"])
    table = pandas.read_csv(tmp_path / "whole_linear_statistics.csv")
    capsys.readouterr()
    judged = f"--model_path {tmp_path}/whole_linear_model.pth"
    linear.main([*judged.split(), "--evaluate_only", "--out", str(tmp_path)])
    assert f"top-1 {table['test_acc@1'].iloc[-1]:.2f} %" in capsys.readouterr().out
    linear.main([*judged.split(), "--predict", f"{photos}/val", "--out_csv", f"{tmp_path}/p.csv"])
    found = pandas.read_csv(tmp_path / "p.csv")
    right = found["class"] == found["file"].map(lambda path: path.split("/")[-2])
    assert 100 * right.mean() == pytest.approx(table["test_acc@1"].iloc[-1], abs=1e-3)


def test_pictures_look_at_no_image_for_its_features_again(photos, tmp_path, monkeypatch):
    """How many files are opened: the steps', the kNNs', and of the pictures those shown."""
    opened = []
    usual = Image.open

    def counting(path, *args):
        opened.append(str(path))
        return usual(path, *args)

    monkeypatch.setattr(Image, "open", counting)
    flags = of_photos(photos, tmp_path, "--epochs", 2, "--num_workers", 0, "--name")
    main.main([*flags, "plain", "--no-pictures"])
    # Two epochs of three steps; the bank and the test images for the untrained encoder, for the
    # raw pixels, and after each epoch.
    assert len(opened) == 2 * 3 * 32 + 4 * (60 + 40)
    opened.clear()
    main.main([*flags, "drawn", "--pictures"])
    assert len(opened) == 2 * 3 * 32 + 4 * (60 + 40) + 8 + 8 * 8  # queries and neighbours
    assert (tmp_path / "drawn_confusion.png").exists()
    opened.clear()
    main.main([*flags, "drawn", "--pictures", "--resume"])  # finished: only to be drawn again
    assert len(opened) == 60 + 40 + 8 + 8 * 8
    assert same_bits(model_of(tmp_path, "plain"), model_of(tmp_path, "drawn"))


def test_a_bad_image_met_late_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    for i in range(20):
        path = tmp_path / "images" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(path)
    path.write_bytes(b"no image")
    flags = (
        f"--data_name imagenet --data_root {tmp_path}/images --arch resnet8 --stem cifar "
        "--image_size 8 --feature_dim 16 --batch_size 4 --epochs 1 --no-pictures "
        f"--out {tmp_path}/r"
    )
    monkeypatch.setattr(sys, "argv", ["main.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        utils.run_command(main.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith(f"main.py: {path}: cannot be read")
    assert err.endswith("--bad_images skip\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "r").exists()
    main.main([*flags.split(), "--bad_images", "skip"])
    assert "19 training images" in capsys.readouterr().out


# ---- a collapse, and the ablations --------------------------------------------------------------

COLLAPSING = "--stop_grad off --bn hidden --lr 2"


def test_a_collapse_is_said_once_with_its_cause(tmp_path, capsys):
    run(tmp_path, f"--epochs 6 --knn_every 6 --name a {COLLAPSING}")
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("warning: "))
    assert "std of z is 0." in line
    assert "--stop_grad off" in line
    assert "--bn hidden" in line
    assert "--batch_size" not in line
    rows = read_csv(tmp_path / "a_statistics.csv")
    (found,) = (row for row in rows if "collapse" in row)
    assert found["collapse"] == 6 * found["epoch"]  # steps so far, of 6 an epoch
    assert f"epoch {found['epoch']}, step 6" in line
    low = [row["epoch"] for row in rows[1:] if row["std"] < 0.3]
    assert found["epoch"] == low[0]
    assert rows[-1]["std"] < 0.2

    run(tmp_path, "--epochs 2 --name healthy")
    assert "warning" not in capsys.readouterr().out


def test_a_healthy_run_resumed_within_a_window_is_not_warned(tmp_path, capsys):
    """The std of a window's first steps is in the checkpoint: 20 of 25 here, of small batches."""
    flags = f"--train_size 240 --batch_size 8 --epochs 1 --out {tmp_path} --name a --no-pictures"
    flags = [*TINY.split(), *flags.split(), "--checkpoint_minutes", "0"]
    run_until(0, 20, lambda hook: main.main(flags, hook))
    assert torch.load(tmp_path / "a_model.pth")["step"] == 20
    main.main([*flags, "--resume"])
    out = capsys.readouterr().out
    assert "and step 20 of 30" in out
    assert "warning" not in out
    assert "collapse" not in read_csv(tmp_path / "a_statistics.csv")[1]


def test_stop_on_collapse_ends_the_run_and_resume_goes_on(tmp_path, capsys):
    collapsing = f"--epochs 1 --train_size 1000 {COLLAPSING}"  # 31 steps an epoch
    run(tmp_path, f"{collapsing} --name whole")
    with pytest.raises(RunError, match="--no-stop_on_collapse"):
        run(tmp_path, f"{collapsing} --name cut --stop_on_collapse")
    state = torch.load(tmp_path / "cut_model.pth")
    assert (state["epoch"], state["step"]) == (0, 25)  # at once, not at the epoch's end
    assert state["extra"] == {"collapse": 25}
    with pytest.raises(RunError, match="--no-stop_on_collapse"):
        run(tmp_path, f"{collapsing} --name cut --resume")
    assert torch.load(tmp_path / "cut_model.pth")["step"] == 25
    capsys.readouterr()
    run(tmp_path, f"{collapsing} --name cut --resume --no-stop_on_collapse")
    assert "warning" not in capsys.readouterr().out  # it was said
    whole, cut = (
        pandas.read_csv(tmp_path / f"{name}_statistics.csv").drop(columns=TIMES)
        for name in ("whole", "cut")
    )
    assert whole.equals(cut)
    assert whole["collapse"].dropna().tolist() == [25]
    assert same_bits(model_of(tmp_path, "whole"), model_of(tmp_path, "cut"))


def test_ablations_are_kept_in_the_checkpoint(tmp_path, capsys):
    flags = "--stop_grad off --predictor fixed --bn all --similarity cross_entropy"
    run(tmp_path, f"--epochs 1 --name a {flags} --loss asymmetric_2x")
    state = checkpoint.load(tmp_path / "a_model.pth")
    net = checkpoint.network(state)
    assert net.stop_grad is False
    assert net.criterion is cross_entropy
    assert net.num_views == 4
    assert not any(p.requires_grad for p in net.predictor.parameters())
    torch.manual_seed(0)  # the predictor is as it started
    begun = build_model(vars(state["config"])).predictor.state_dict()
    for name, value in net.predictor.state_dict().items():
        assert torch.equal(value, begun[name]) == ("weight" in name or "bias" in name), name
    err = refused(capsys, "--resume", tmp_path / "a_model.pth", "--stop_grad", "on")
    assert "--stop_grad off" in err


# ---- pictures -----------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, by the names of their files."""
    figures = {}
    save = matplotlib.figure.Figure.savefig

    def savefig(self, file, **how):
        kind = os.path.basename(file.name).split("_")[-1].split(".")[0]  # .a_curves.png.part
        figures[kind] = self
        save(self, file, **how)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return figures


def tiles_in(figure, columns):
    """The images in a figure, that are 32 pixels wide: rows x columns x 3 x 32 x 32 of uint8."""
    canvas = torch.from_numpy(figure.axes[0].images[0].get_array().data.copy())
    pitch = (canvas.shape[1] - 32) // (columns - 1)
    return canvas.unfold(0, 32, pitch).unfold(1, 32, pitch)


def test_show_views_draws_what_the_network_would_get(tmp_path, capsys, drawn):
    run(tmp_path, "--epochs 1 --name a")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    run(tmp_path, "--name a --show_views")
    assert "a_views.png" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert Image.open(tmp_path / "a_views.png").size[0] > 300
    found = tiles_in(drawn["views"], columns=5)  # the third and the last are of words
    assert found.shape == (8, 5, 3, 32, 32)
    assert found[:, [2, 4]].eq(255).all()
    found = found[:, [0, 1, 3]]
    args = config_of(f"{TINY} --name a")
    images = main.load_images(args).train_images
    shown = found[:, 0].contiguous()
    assert all((image == images).flatten(1).all(1).any() for image in shown)
    views, batch = Views(32, *NORMALISATION["cifar"]), Batch.alone(shown)  # of epoch 0, step 0
    texts = {text.get_position(): text.get_text() for text in drawn["views"].axes[0].texts}
    for i, chance in enumerate(views.sample(batch)):
        for row in range(8):  # 32 pixels, and a gap of 2
            assert texts[34 * (2 + 2 * i), 34 * row].split("\n") == chance.describe(row)
    for i, expected in enumerate(views(batch), 1):
        for c in range(3):
            wanted = expected[:, c] * views.std[c] + views.mean[c]
            undone = found[:, i, c] / 255
            torch.testing.assert_close(undone, wanted, atol=0.51 / 255, rtol=0)


SMALL = {"size_schedule": (20,)}


@pytest.mark.parametrize(("in_files", "more"), [(False, {}), (True, {}), (False, SMALL)])
def test_views_stand_beside_their_own_image(tmp_path, in_files, more):
    """Each image has one colour, and chance leaves it: in the PNG there is a row of such tiles."""
    colours = [(15 * i, 255 - 15 * i, 100) for i in range(16)]
    images = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].repeat(1, 1, 32, 32)
    if in_files:
        for i, colour in enumerate(colours):
            Image.new("RGB", (32, 32), colour).save(tmp_path / f"{i}.png")
        images = ImageFiles([tmp_path / f"{i}.png" for i in range(16)], 32, workers=0)
    views = Views(32, *NORMALISATION["cifar"], Augmentation(jitter_p=0.0, gray_p=0.0), **more)
    path = tmp_path / "a_views.png"
    draw_views(str(path), "a", images, views, 0)
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())
    places = [pixels.eq(torch.tensor(colour)).all(2).nonzero() for colour in colours]
    shown = [place for place in places if len(place)]
    assert len(shown) == 8
    height, width, _ = pixels.shape
    for place in shown:
        (top, left), (bottom, right) = place.min(0).values, place.max(0).values
        assert bottom - top < height / 8  # one row
        assert right - left > 0.65 * width  # of all tiles but the last one's words
        assert len(place) > 0.9 * 3 * (bottom - top) ** 2


def test_neighbours_map_and_confusion_of_test_images_or_of_the_users_own(tmp_path, drawn):
    args = config_of(f"{TINY} --name a")
    images, views = main.load_images(args), Views(32, *NORMALISATION["cifar"])
    images.test_images, images.test_labels = images.test_images[:123], images.test_labels[:123]
    net, history = (
        build_model(vars(args)),
        [{"epoch": 0, "rank": 1.0}, {"epoch": 1, "rank": 2.0}],
    )

    def draw(name):
        drawn.clear()
        monitor = Monitor(net, views, images, args, 1.0, torch.autocast("cpu", enabled=False))
        draw_run(str(tmp_path / name), name, history, monitor)
        return monitor

    def features(part):
        """Brute force: in eval mode, normalised."""
        net.eval()
        with torch.no_grad():
            return F.normalize(net.backbone(views.eval_transform(part)), dim=1)

    def numbers(axes):
        """The cosines that are written below the neighbours."""
        return torch.tensor([float(text.get_text()) for text in axes.texts]).view(8, 8)

    def check_tiles(places, queries, cosine):
        """That these are the queries, and their neighbours those that brute force finds."""
        axes, tiles = drawn["neighbours"].axes[0], tiles_in(drawn["neighbours"], columns=9)
        best, nearest = cosine.sort(1, descending=True)
        torch.testing.assert_close(numbers(axes), best[:, :8], atol=6e-4, rtol=0)
        assert torch.equal(tiles[:, 0], queries[places])
        shown = tiles[:, 1:].reshape(64, 1, -1)
        same = (shown == images.train_images.flatten(1)).all(2)
        assert (same.sum(1) == 1).all()
        found = cosine.gather(1, same.long().argmax(1).view(8, 8))
        torch.testing.assert_close(found, best[:, :8], atol=1e-5, rtol=0)
        return axes, nearest[:, :8]

    monitor = draw("a")
    assert set(drawn) == {"curves", "neighbours", "embedding", "confusion"}
    bank, queries = features(images.train_images), features(images.test_images)
    places = torch.linspace(0, 122, 8).long()
    axes, nearest = check_tiles(places, images.test_images, queries[places] @ bank.T)
    right = images.train_labels[nearest] == images.test_labels[places][:, None]
    framed = torch.zeros(8, 9)
    for patch in axes.patches:
        framed[round(patch.get_y() / 42), round(patch.get_x() / 42)] += 1  # 32 pixels, 10 between
    assert torch.equal(framed[:, 1:], right.float())
    assert framed[:, 0].sum() == 0
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [images.classes[i] for i in images.test_labels[places]]

    numbers_of_classes = images.test_labels.bincount()
    shares = torch.from_numpy(drawn["confusion"].axes[0].images[0].get_array().data)
    matrix = (shares / 100 * numbers_of_classes[:, None]).round().long()
    ranking = monitor.knn().ranking
    assert matrix.tolist() == metrics.confusion_matrix(images.test_labels, ranking[:, 0], 10)
    top1 = monitor.measure()["test_acc@1"]
    assert 100 * matrix.trace() / 123 == pytest.approx(top1, abs=1e-3)
    assert f"top-1 {top1:.2f} % of 123 images" in drawn["confusion"].get_suptitle()
    points = [len(part.get_offsets()) for part in drawn["embedding"].axes[0].collections]
    assert points == numbers_of_classes.tolist()

    nobody = torch.full_like(images.train_labels, -1)
    images = Data(images.train_images, nobody, None, None, images.classes)
    draw("b")
    assert set(drawn) == {"curves", "neighbours", "embedding"}
    cosine = bank @ bank.T
    cosine.fill_diagonal_(-2)  # an image is not its own neighbour
    places = torch.linspace(0, 199, 8).long()
    axes, _ = check_tiles(places, images.train_images, cosine[places])
    assert not axes.patches
    (points,) = drawn["embedding"].axes[0].collections  # of one colour
    assert len(points.get_offsets()) == 200


def check_scalars(events, table):
    """TensorBoard has each row of a run's table once, from before the training on."""
    for column in ("train_loss", "std", "rank", "test_acc@1"):
        points = [(event.step, event.value) for event in events.Scalars(column)]
        wanted = [(row["epoch"], row[column]) for row in table if column in row]
        assert points == [pytest.approx(point, rel=1e-4) for point in wanted]
    assert [event.step for event in events.Scalars("rank")] == [0, 1, 2]


def test_tensorboard_has_the_epochs_before_a_resume_once(photos, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = of_photos(photos, tmp_path, "--epochs", 2, "--name", "a", "--no-pictures")
    main.main(flags)
    assert not (tmp_path / "a_tensorboard").exists()
    for _ in range(3):
        main.main([*flags, "--resume", "--tensorboard"])
        events = EventAccumulator(str(tmp_path / "a_tensorboard")).Reload()
        check_scalars(events, read_csv(tmp_path / "a_statistics.csv"))


def test_tensorboard_gets_scalars_pictures_and_features(photos, tmp_path, capsys, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = of_photos(photos, tmp_path, "--epochs", 2, "--name", "a", "--tensorboard")
    main.main(flags)
    events = EventAccumulator(str(tmp_path / "a_tensorboard")).Reload()
    table = read_csv(tmp_path / "a_statistics.csv")
    check_scalars(events, table)
    assert set(events.Tags()["images"]) == {"curves", "neighbours", "embedding", "confusion"}
    folder = tmp_path / "a_tensorboard" / "00002" / "default"
    found = pandas.read_csv(folder / "tensors.tsv", sep="\t", header=None).values
    net = checkpoint.network(checkpoint.load(tmp_path / "a_model.pth")).eval()
    (images,) = main.load_images(config_of(" ".join(flags))).test_images.split(40)
    with torch.no_grad():
        features = net.backbone(Views(32, *NORMALISATION["imagenet"]).eval_transform(images))
    wanted = F.normalize(features, dim=1)
    torch.testing.assert_close(torch.tensor(found).float(), wanted, atol=1e-4, rtol=0)
    metadata = (folder / "metadata.tsv").read_text().split()
    assert metadata == sorted(metadata)  # as the folders are
    assert {name: metadata.count(name) for name in metadata} == dict.fromkeys(TEXTURE_CLASSES, 4)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    assert "pip install tensorboard" in refused(capsys, *TINY.split(), "--tensorboard")


# ---- what it says -------------------------------------------------------------------------------


def test_a_month_on_the_cpu_is_said(tmp_path, capsys):
    run(tmp_path, "--epochs 1 --name short")
    assert "days" not in capsys.readouterr().out
    args, tally = config_of("--epochs 1000"), TrainMeters(torch.device("cpu"))
    with Progress(0, args, 10**9, {"loss": "loss"}, "--recipe short") as progress:
        progress(0, tally)
        progress(1, tally)
    out = capsys.readouterr().out
    assert "days" in out
    assert "--recipe short" in out


def test_larger_views_to_come_count_in_what_a_run_takes(tmp_path, capsys, monkeypatch):
    """By a clock that goes on by 36 minutes whenever it is read."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, 2160).__next__)
    for sizes, told in (("8 8", False), ("8 32", True)):  # the second epoch: 16 times the pixels
        run(tmp_path, f"--epochs 2 --view_sizes {sizes} --name {told}")
        assert ("the run takes" in capsys.readouterr().out) == told


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "svhn", "fashion_mnist"])
def test_no_network(tmp_path, capsys, monkeypatch, name):
    def no_network(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    err = refused(capsys, "--data_name", name, "--data_root", tmp_path / "d", "--out", tmp_path)
    assert "could not be downloaded" in err
    assert "--data_name textures" in err
    assert str(tmp_path / "d") in err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--data_name imagnet", "--data_name imagnet: choose"),
        ("--arch vgg16", "--arch vgg16"),
        ("--bn some", "--bn some: choose"),
        ("--stop_grad maybe", "--stop_grad maybe: choose"),
        ("--show_views --resume", "--show_views"),
        ("--recipe none", "--recipe none: choose"),
        ("--stem wide", "--stem wide: choose"),
        ("--stem imagenet", "--stem"),
        ("--batch_size 5000", "--batch_size 5000"),
        ("--batch_size 1", "--batch_size"),
        ("--batch_size -8", "--batch_size"),
        ("--epochs 0", "--epochs"),
        ("--epochs x", "--epochs"),
        ("--feature_dim 0", "--feature_dim"),
        ("--k 0", "--k"),
        ("--temperature 0", "--temperature"),
        ("--temperature nan", "--temperature"),
        ("--lr -1", "--lr"),
        ("--lr inf", "--lr"),
        ("--width 0", "--width"),
        ("--arch resnet18 --width 32", "--width 32"),
        ("--train_size 0", "--train_size"),
        ("--train_size 1000000", "--train_size 1000000"),
        ("--bank_size 0", "--bank_size"),
        ("--bank_size 1000000", "--bank_size 1000000"),
        ("--warmup_epochs 900 --epochs 800", "--warmup_epochs 900"),
        ("--device cuda:99", "--device cuda:99"),
        ("--device toaster", "--device toaster"),
        ("--amp fp8", "--amp"),
        ("--name a/b", "--name a/b"),
        ("--resume --overwrite", "--overwrite"),
        ("--resume=", "--resume"),
        ("--nonsense 1", "--nonsense"),
        ("--profile", "--profile"),
        ("--data_name folder --data_root /does/not/exist", "/does/not/exist"),
        ("--out /dev/null/x", "/dev/null"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, flags, named):
    err = refused(capsys, "--data_name", "textures", "--out", tmp_path, *flags.split())
    assert named in err
    assert not list(tmp_path.iterdir())


def test_an_unreadable_image_is_named(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.jpg").write_text("not an image")
    flags = ["--data_name", "folder", "--data_root", tmp_path / "images", "--out", tmp_path / "r"]
    assert "notes.jpg" in refused(capsys, *flags)
    (tmp_path / "images" / "notes.jpg").unlink()
    assert str(tmp_path / "images") in refused(capsys, *flags)  # an empty folder
