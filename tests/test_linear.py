"""linear.py: the protocol, the frozen encoder, evaluation of a linear model, prediction."""

import copy
import shutil

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

import linear
import main
import utils
from simsiam.data.textures import TEXTURE_CLASSES, make_textures
from simsiam.models import backbones
from simsiam.models.classifier import Classifier, linear_head
from simsiam.models.flops import params_and_flops
from simsiam.training import checkpoint
from simsiam.training.heads import (
    FrozenEncoder,
    HeadTask,
    choose_lr,
    evaluate,
    fit,
    identity_features,
    make_optimizer,
    train,
)
from simsiam.training.meters import Meters
from simsiam.training.recipes import LinearConfig
from simsiam.training.run import Run
from simsiam.training.state import TrainState
from simsiam.views.augment import Batch, Views
from tests import helpers
from tests.helpers import run_linear, same_bits

CLASSES = ["blobs", "columns", "diagonals", "rows"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ImageFolder of four classes: per class 80 training and 20 test images."""
    return helpers.texture_folder(tmp_path_factory.mktemp("images"), 800, 200, CLASSES)


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory):
    """A checkpoint of main.py on `folder`."""
    out = tmp_path_factory.mktemp("results")
    main.main(
        f"--data_name folder --data_root {folder} --recipe short --width 8 --feature_dim 32 "
        f"--epochs 2 --no-pictures --out {out} --name pre".split()
    )
    return out / "pre_model.pth"


@pytest.fixture(scope="module")
def fitted(pretrained, tmp_path_factory):
    """A linear model on cached features of `pretrained`."""
    out = tmp_path_factory.mktemp("fitted")
    run_linear(pretrained, out, "--cached", "--epochs", 60, "--lr", 3, "--no-pictures")
    return out / "pre_linear_cached_model.pth"


def config_of(flags):
    return utils.ConfigParser("linear.py", "", LinearConfig).read(flags.split())[0]


def refused(capsys, model_path, *flags):
    err = helpers.refused(capsys, linear, "--model_path", model_path, *flags)
    assert err.startswith("linear.py: ")
    return err


def weights(out, name):
    return torch.load(out / f"{name}_model.pth")["model"]


def statistics(out, name):
    return pandas.read_csv(out / f"{name}_statistics.csv")


# ---- a run --------------------------------------------------------------------------------------


def test_a_run_writes_its_files(pretrained, tmp_path, capsys):
    run_linear(pretrained, tmp_path, "--epochs", 3)
    assert "raw pixels" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pre_linear_confusion.png",
        "pre_linear_curves.png",
        "pre_linear_model.pth",
        "pre_linear_statistics.csv",
        "results.csv",
    ]
    table = statistics(tmp_path, "pre_linear")
    assert tuple(table.columns) == linear.STATISTICS
    assert table["epoch"].tolist() == [1, 2, 3]
    assert (table["test_acc@5"] == 100).all()  # of four classes
    row = pandas.read_csv(tmp_path / "results.csv").iloc[0]
    assert row["protocol"] == "Linear"
    assert row["top1"] == table["test_acc@1"].iloc[-1]
    assert row["best_top1"] == table["test_acc@1"].max()

    state = torch.load(tmp_path / "pre_linear_model.pth", weights_only=True)
    assert list(state) == list(checkpoint.FORMAT)
    assert state["command"] == "linear.py"
    assert LinearConfig.from_dict(state["config"]).as_dict() == state["config"]
    before = torch.load(pretrained, weights_only=True)
    for name in ("data_name", "data_root"):  # the pre-training's by default
        assert state["config"][name] == before["config"][name]
    assert state["encoder"] == before["encoder"]
    encoder = {k: v for k, v in state["model"].items() if k.startswith("backbone.")}
    assert same_bits(encoder, {k: v for k, v in before["model"].items() if k in encoder})
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    params = sum(v.numel() for k, v in state["model"].items() if not k.endswith(buffers))
    assert round(row["params_m"] * 1e6) == params


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 3 --lr 1e-9 3",
        "--epochs 3 --finetune",
        "--epochs 3 --finetune --optimizer adamw --mixup 0.2",
    ],
)
def test_resume_gives_the_same_bits(pretrained, tmp_path, flags):
    flags = [*flags.split(), "--batch_size", 64, "--checkpoint_minutes", 0, "--no-pictures"]
    run_linear(pretrained, tmp_path, *flags, "--name", "whole")
    flags += ["--name", "cut"]
    helpers.interrupt(linear, ["--model_path", pretrained, "--out", tmp_path, *flags], 1, 3)
    state = torch.load(tmp_path / "cut_model.pth")
    assert (state["epoch"], state["step"]) == (1, 3)
    run_linear(pretrained, tmp_path, *flags, "--resume")
    assert same_bits(weights(tmp_path, "whole"), weights(tmp_path, "cut"))
    whole, cut = (statistics(tmp_path, name).drop(columns="seconds") for name in ("whole", "cut"))
    assert whole.equals(cut)


def test_a_run_ends_if_its_encoder_changes(pretrained, tmp_path):
    parser = utils.ConfigParser("linear.py", "", LinearConfig)
    argv = f"--model_path {pretrained} --out {tmp_path} --epochs 2 --cached --name a".split()
    with Run("linear.py", *parser.read(argv), linear.STATISTICS) as run:
        state, evaluation = linear.prepare(run, parser)

        def thaw(epoch, step):
            state.net.backbone.bn1.running_mean[0] += 1e-3

        with pytest.raises(RuntimeError, match="bn1.running_mean"):
            linear.fit_and_evaluate(run, state, evaluation, thaw)
    assert torch.load(tmp_path / "a_model.pth")["epoch"] == 0


def test_check_frozen_sees_one_bit_of_any_tensor():
    backbone, _ = backbones.build_backbone("resnet8", width=4)
    views = Views(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), number=1)
    encoder = FrozenEncoder(backbone, views, torch.autocast("cpu", enabled=False))
    images = make_textures(10, seed=1)[0]
    encoder.augmented_features(Batch.alone(images))
    encoder.extract(images)
    encoder.check_frozen()
    for name, value in backbone.state_dict().items():
        before = value.clone()
        value.flatten()[-1:] += 1 if value.dtype == torch.int64 else 1e-6
        with pytest.raises(RuntimeError, match=name):
            encoder.check_frozen()
        value.copy_(before)
    encoder.check_frozen()


def test_compile_gives_the_same_head(pretrained, tmp_path):
    flags = ("--epochs", 1, "--batch_size", 160, "--no-pictures")  # two equal batches: one graph
    losses = []
    for name, more in (("eager", ()), ("compiled", ["--compile"])):
        run_linear(pretrained, tmp_path, *flags, "--name", name, *more)
        losses.append(statistics(tmp_path, name)[["train_loss", "test_loss"]].values)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_another_data_set(pretrained, tmp_path):
    flags = ("--cached", "--no-pictures", "--epochs", 1, "--data_name", "textures")
    run_linear(pretrained, tmp_path, *flags)
    state = torch.load(tmp_path / "pre_linear_cached_textures_model.pth")
    assert state["classes"] == list(TEXTURE_CLASSES)
    assert state["config"]["data_name"] == "textures"
    assert pandas.read_csv(tmp_path / "results.csv")["data"].tolist() == ["textures"]


# ---- the choice of the learning rate ------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "lr"), [("--cached --epochs 20", 30), ("--finetune --epochs 5", 1)]
)
def test_the_best_of_several_lr_is_used_as_if_it_was_alone(pretrained, tmp_path, flags, lr):
    flags = (*flags.split(), "--seed", 3, "--batch_size", 32, "--no-pictures", "--name")
    run_linear(pretrained, tmp_path, *flags, "several", "--lr", 1e-12, lr)
    run_linear(pretrained, tmp_path, *flags, "one", "--lr", lr)
    assert torch.load(tmp_path / "several_model.pth")["extra"]["lr"] == lr
    peak = lr * 32 / 256
    assert 0.9 * peak < statistics(tmp_path, "several")["lr"].iloc[0] < peak  # a cosine
    assert same_bits(weights(tmp_path, "several"), weights(tmp_path, "one"))


def test_label_fraction(pretrained, tmp_path, capsys):
    flags = ("--cached", "--no-pictures", "--epochs", 5, "--label_fraction", 0.1)
    run_linear(pretrained, tmp_path, *flags)
    assert "32 training images" in capsys.readouterr().out
    row = pandas.read_csv(tmp_path / "results.csv").iloc[0]
    assert row["protocol"] == "Linear, cached, 10% of labels"
    assert row["run"] == "pre_linear_cached_0.1"


def test_the_choice_of_lr_never_sees_the_test_set(pretrained, folder, tmp_path, capsys):
    """With the test labels permuted, the same lr with the same held-out accuracies is chosen."""
    permuted = tmp_path / "permuted"
    (permuted / "test").mkdir(parents=True)
    (permuted / "train").symlink_to(folder / "train")
    for name, other in zip(CLASSES, CLASSES[1:] + CLASSES[:1], strict=True):
        (permuted / "test" / name).symlink_to(folder / "test" / other)
    flags = ("--cached", "--epochs", 60, "--lr", 30, 3, 0.01, "--no-pictures", "--data_root")
    lines, top1 = [], []
    for root in (folder, permuted):
        run_linear(pretrained, tmp_path, *flags, root, "--name", root.name)
        out = capsys.readouterr().out.splitlines()
        lines.append([line for line in out if line.startswith(("--lr", "chosen"))])
        top1.append(statistics(tmp_path, root.name)["test_acc@1"].iloc[-1])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 4
    assert top1[1] + 10 < top1[0]


def test_for_large_features_smaller_lr_are_tried(pretrained, tmp_path, capsys):
    state = torch.load(pretrained)
    last = [name for name in state["model"] if name.startswith("backbone") and "bn2.bias" in name]
    state["model"][last[-1]] += 20  # of 32 features: a squared norm of 12,800 and more
    torch.save(state, tmp_path / "large_model.pth")
    flags = ("--cached", "--epochs", 20, "--no-pictures")
    capsys.readouterr()
    run_linear(tmp_path / "large_model.pth", tmp_path, *flags)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    scores = {float(words[1].strip(":")): float(words[2]) for words in lines if words[0] == "--lr"}
    assert list(scores) == [30, 3, 0.3, 0.03]
    chosen = torch.load(tmp_path / "large_linear_cached_model.pth")["extra"]["lr"]
    assert chosen == max(scores, key=scores.get)
    run_linear(tmp_path / "large_model.pth", tmp_path, *flags, "--lr", 30, "--name", "one_lr")
    run_linear(pretrained, tmp_path, *flags)
    assert "chosen" not in capsys.readouterr().out


@pytest.mark.parametrize("cached", [True, False])
def test_an_lr_is_scored_on_a_tenth_that_its_head_never_saw(cached):
    """Each input's last feature is its index."""
    torch.manual_seed(0)
    labels = torch.arange(80) % 4
    inputs = F.one_hot(labels, 5) + 0.1 * torch.randn(80, 5)
    inputs[:, 4] = torch.arange(80) / 1000
    config = config_of("--epochs 3 --batch_size 16 --lr 1e-9 10 1e-8")
    trained, scored = set(), []

    def feature_fn(batch):
        trained.update((1000 * batch.images[:, 4]).round().int().tolist())
        return batch.images, batch.labels

    def extract(images):
        scored.extend((1000 * images[:, 4]).round().int().tolist())
        return images

    task = HeadTask(inputs, labels, feature_fn, *() if cached else (extract,))
    assert choose_lr(config.lr, linear_head(5, 4), task, config) == 10
    held_out = sorted(set(range(80)) - trained)
    assert labels[held_out].bincount().tolist() == [2, 2, 2, 2]  # a tenth, balanced
    assert scored == ([] if cached else held_out)


# ---- training -----------------------------------------------------------------------------------


def test_a_cached_head_is_as_good_as_scikit_learns():
    torch.manual_seed(0)
    centres = torch.randn(5, 20)
    labels = torch.arange(1500) % 5
    features = centres[labels] + 1.2 * torch.randn(1500, 20)
    (x, x_test), (y, y_test) = features.split([1000, 500]), labels.split([1000, 500])
    (head,) = fit(linear_head(20, 5), (1.0,), HeadTask(x, y), config_of("--lr 1"))
    peer = LogisticRegression(max_iter=1000).fit(x, y)
    expected = 100 * peer.score(x_test, y_test)
    assert 50 < expected < 99
    assert evaluate(head, x_test, y_test)[1] > expected - 1


def test_heads_side_by_side_train_as_if_alone():
    torch.manual_seed(0)
    task = HeadTask(torch.randn(100, 6), torch.arange(100) % 3)
    first = linear_head(6, 3)
    initial = first.weight.clone()
    config = config_of("--epochs 3 --batch_size 32")
    together, (one,), (other,) = (
        fit(first, lrs, task, config) for lrs in ((3.0, 0.1), (3.0,), (0.1,))
    )
    assert torch.equal(together[0].weight, one.weight)
    assert torch.equal(together[1].weight, other.weight)
    assert not torch.equal(one.weight, other.weight)
    assert torch.equal(first.weight, initial)  # copies are trained


def test_the_means_of_an_epoch_count_every_image_once():
    torch.manual_seed(0)
    features, labels = torch.randn(100, 6), torch.arange(100) % 7
    head = linear_head(6, 7)
    nn.init.normal_(head.weight)
    config = config_of("--lr 1e-12 --batch_size 32 --epochs 1")  # the last batch has 4
    heads = nn.ModuleList([head])
    state = TrainState(
        net=heads,
        model=heads,
        optimizer=make_optimizer(config, heads, config.lr),
        loader=HeadTask(features, labels).loader(config),
        meters=Meters(torch.device("cpu"), "top1", "top5"),
        lr_at=lambda progress: 0.0,
    )
    assert list(train(state, identity_features, 0, config)) == [0, 1, 2, 3]
    loss, top1, top5 = evaluate(head, features, labels)
    means = state.meters.means(100)
    expected = {"loss": loss, "top1": top1 / 100, "top5": top5 / 100}
    assert {name: means[name] for name in expected} == pytest.approx(expected)
    assert top1 < top5 < 100


def test_a_step_of_lars_is_that_of_the_authors():
    """apex's LARC without clipping, which the authors' linear evaluation uses, written out."""
    torch.manual_seed(0)
    head = linear_head(6, 3)
    config = config_of("--optimizer lars")
    assert (config.batch_size, config.lr) == (4096, (0.1,))
    optimizer = make_optimizer(config, nn.ModuleList([head]), config.lr)
    assert optimizer.param_groups[0]["peak"] == pytest.approx(1.6)
    optimizer.param_groups[0]["lr"] = 1.6
    weight = head.weight.detach().clone()
    head(torch.randn(4, 6)).square().sum().backward()
    gradient = head.weight.grad.clone()
    optimizer.step()
    trust = 0.001 * weight.norm() / (gradient.norm() + 1e-8)
    torch.testing.assert_close(head.weight.detach(), weight - 1.6 * trust * gradient)


@pytest.mark.parametrize(
    ("arch", "stem", "classes", "params"),
    [("resnet18", "cifar", 10, 11_173_962), ("resnet50", "imagenet", 1000, 25_557_032)],
)
def test_params_of_the_linear_models(arch, stem, classes, params):
    net = Classifier(*backbones.build_backbone(arch, stem), classes)
    assert params_and_flops(net, 32)[0] == params


# ---- modes without training ---------------------------------------------------------------------


def predictions(model_path, out_csv, *files):
    words = ("--model_path", model_path, "--predict", *files, "--out_csv", out_csv)
    linear.main([str(word) for word in words])
    return pandas.read_csv(out_csv)


def test_evaluate_only_and_predict_agree(fitted, folder, tmp_path, capsys):
    top1 = statistics(fitted.parent, "pre_linear_cached")["test_acc@1"].iloc[-1]
    content = fitted.read_bytes()
    run_linear(fitted, tmp_path, "--evaluate_only")
    out = capsys.readouterr().out
    assert f"top-1 {top1:.2f} %" in out
    assert [path.name for path in tmp_path.iterdir()] == ["pre_linear_cached_confusion.png"]
    assert Image.open(tmp_path / "pre_linear_cached_confusion.png").size[0] > 300
    assert fitted.read_bytes() == content

    table = predictions(fitted, tmp_path / "p.csv", folder / "test")
    is_correct = table["class"] == table["file"].map(lambda path: path.split("/")[-2])
    assert 100 * is_correct.mean() == pytest.approx(top1, abs=1e-3)
    assert table["score"].between(0.25, 1).all()
    assert list(table.columns[:5]) == ["file", "class", "score", "class_2", "score_2"]
    of_class = 100 * is_correct[table["file"].str.contains("/blobs/")].mean()
    assert f"blobs: {of_class:.1f} % of 20" in out.splitlines()


def test_predict_takes_any_size_and_mode(fitted, tmp_path, capsys):
    gradient = np.linspace(0, 255, 40 * 50).reshape(40, 50)
    gray = Image.fromarray(gradient.astype(np.uint8))
    images = {mode: gray.convert("RGB").convert(mode) for mode in ("L", "RGB", "RGBA", "P", "1")}
    images |= {"LA": gray.convert("LA"), "CMYK": gray.convert("CMYK")}
    images["I_16"] = Image.fromarray((gradient * 256).astype(np.uint16))
    paths = [tmp_path / f"{mode}{'.jpg' if mode == 'CMYK' else '.png'}" for mode in images]
    for path, image in zip(paths, images.values(), strict=True):
        image.save(path)
    table = predictions(fitted, tmp_path / "p.csv", *paths)
    scores = dict(zip(images, table["score"], strict=True))
    assert scores["I_16"] == pytest.approx(scores["L"], abs=1e-3)  # 16 bits, not clipped to white
    assert scores["RGBA"] == pytest.approx(scores["L"], abs=1e-3)
    assert "none.png" in refused(capsys, fitted, "--predict", tmp_path / "none.png")


def test_classes_are_matched_by_name(fitted, folder, tmp_path, capsys):
    """In a folder with fewer classes the same classes have other indices."""
    assert torch.load(fitted)["classes"] == CLASSES
    run_linear(fitted, tmp_path, "--evaluate_only")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("rows:"))
    for split in ("train", "test"):
        (tmp_path / "few" / split).mkdir(parents=True)
        for name in ("rows", "columns"):
            (tmp_path / "few" / split / name).symlink_to(folder / split / name)
    few = ("--evaluate_only", "--data_root", tmp_path / "few")
    run_linear(fitted, tmp_path, *few)
    assert line in capsys.readouterr().out
    shutil.copytree(folder / "train" / "rows", tmp_path / "few" / "train" / "zebra")
    assert "zebra" in refused(capsys, fitted, *few)


def test_files_are_replaced_only_with_overwrite(fitted, folder, tmp_path, capsys):
    """A picture of other data has its own name, and stays as predictions do."""
    run_linear(fitted, tmp_path, "--evaluate_only")
    own, other = (tmp_path / f"pre_linear_cached{x}_confusion.png" for x in ("", "_on_folder_few"))
    content = own.read_bytes()
    (tmp_path / "few" / "test").mkdir(parents=True)
    (tmp_path / "few" / "train").symlink_to(folder / "train")
    (tmp_path / "few" / "test" / "rows").symlink_to(folder / "test" / "rows")
    few = ("--evaluate_only", "--data_root", tmp_path / "few", "--out", tmp_path)
    run_linear(fitted, tmp_path, *few)
    assert own.read_bytes() == content != other.read_bytes()
    run_linear(fitted, tmp_path, "--evaluate_only")  # the same picture again
    table = tmp_path / "p.csv"
    table.write_text("mine\n")
    for flags, file in (
        (few, other),
        (("--predict", folder / "test" / "rows", "--out_csv", table), table),
    ):
        content = file.read_bytes()
        err = refused(capsys, fitted, *flags)
        assert str(file) in err
        assert "--overwrite" in err
        assert file.read_bytes() == content
        argv = ("--model_path", fitted, *flags, "--overwrite")
        linear.main([str(word) for word in argv])
    assert len(pandas.read_csv(table)) == 20
    nowhere = ("--predict", folder / "test" / "rows", "--out_csv", tmp_path / "none" / "p.csv")
    assert "none" in refused(capsys, fitted, *nowhere)


# ---- bad input ----------------------------------------------------------------------------------


def test_bad_input_is_one_line(folder, pretrained, fitted, tmp_path, capsys):
    def err(*flags, path=pretrained):
        line = refused(capsys, path, "--out", tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists()
        return line

    state = torch.load(pretrained)
    other = copy.deepcopy(state)
    other["encoder"]["arch"] = "resnet14"
    torch.save(other, tmp_path / "arch.pth")
    torch.save(state | {"config": {"data_name": "textures"}}, tmp_path / "config.pth")
    (tmp_path / "cut.pth").write_bytes(pretrained.read_bytes()[:1000])
    for name in ("arch.pth", "config.pth", "cut.pth", "nowhere.pth"):
        assert name in err(path=tmp_path / name)
    assert "--predict" in err(path=fitted)  # a linear model has modes of its own
    assert str(folder / "train") in err("--data_root", folder / "train")
    assert str(pretrained) in err("--evaluate_only")
    assert str(pretrained) in refused(capsys, pretrained, "--predict", "x.png")
    for flags in (
        "--label_fraction 0",
        "--label_fraction 1.1",
        "--lr 0",
        "--epochs 0",
        "--optimizer adam",
        "--out_csv x.csv",
        "--data_name nothing",
        "--data_root /not/there --data_name folder",
        "--device cuda:99",
        "--predict x --evaluate_only",
        "--lr 3 --evaluate_only",
        "--predict x --cached",
    ):
        assert flags.split()[0] in err(*flags.split())
    again = ("--out", fitted.parent, "--cached", "--epochs", 1)
    assert "--overwrite" in refused(capsys, pretrained, *again)
