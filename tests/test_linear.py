"""The linear evaluation: protocol, proof of the frozen encoder, evaluation, prediction."""

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
from simsiam.evaluation.linear import identity_features
from simsiam.models import backbones
from simsiam.models.classifier import Classifier, linear_head
from simsiam.models.flops import params_and_flops
from simsiam.training import checkpoint
from simsiam.training.meters import Meters
from simsiam.training.recipes import LinearConfig
from simsiam.training.run import Run
from simsiam.training.state import TrainState
from simsiam.views.augment import Augmentation, Batch, Views
from tests import helpers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Textures as a folder of images, four classes: 80 of each to train on, 20 to score with."""
    root = tmp_path_factory.mktemp("images")
    for split, number, seed in [("train", 800, 1), ("val", 200, 2)]:
        images, labels = make_textures(number, seed)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            if label in (0, 1, 2, 9):
                path = root / split / TEXTURE_CLASSES[label] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return root


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory):
    """A checkpoint of main.py, and its folder."""
    out = tmp_path_factory.mktemp("results")
    main.main(
        f"--data_name folder --data_root {folder} --recipe short --width 8 --feature_dim 32 "
        f"--epochs 2 --no-pictures --out {out} --name pre".split()
    )
    return out / "pre_model.pth"


class Stop(Exception):
    """Ends a run as a power cut would: nothing is written after it."""


def arguments(model_path, out, *flags):
    place = () if "--predict" in flags else ("--out", out)
    return [str(f) for f in ("--model_path", model_path, *place, *flags)]


def judge(model_path, out, *flags, on_step=None):
    linear.main(arguments(model_path, out, *flags), on_step)


def config_of(text):
    """The config of a command line of linear.py."""
    return utils.ConfigParser("linear.py", "", LinearConfig).read(text.split())[0]


def refused(capsys, *argv):
    err = helpers.refused(capsys, linear, *argv)
    assert err.startswith("linear.py: ")
    return err


def run_until(epoch, step, begin):
    """Call `begin(on_step)` with a hook that ends the run before this step is counted."""

    def stop(*now):
        if now == (epoch, step):
            raise Stop

    with pytest.raises(Stop):
        begin(stop)


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- a run, and how it goes on ------------------------------------------------------------------


def test_a_head_from_checkpoint_to_table(pretrained, tmp_path, capsys):
    judge(pretrained, tmp_path, "--epochs", 3)
    out = capsys.readouterr().out
    assert "raw pixels" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pre_linear_confusion.png",
        "pre_linear_curves.png",
        "pre_linear_model.pth",
        "pre_linear_statistics.csv",
        "results.csv",
    ]
    table = pandas.read_csv(tmp_path / "pre_linear_statistics.csv")
    assert list(table.columns) == (
        "epoch,lr,train_loss,train_acc@1,train_acc@5,test_loss,test_acc@1,test_acc@5,seconds"
    ).split(",")
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
    for name in ("data_name", "data_root"):  # the pre-training's, where they are not given
        assert state["config"][name] == before["config"][name]
    assert state["encoder"] == before["encoder"]
    encoder = {k: v for k, v in state["model"].items() if k.startswith("backbone.")}
    assert encoder
    assert all(torch.equal(value, before["model"][key]) for key, value in encoder.items())
    params = sum(v.numel() for k, v in state["model"].items() if "running" not in k)
    batches = sum("num_batches" in k for k in state["model"])
    assert round(row["params_m"] * 1e6) == params - batches


def test_resume_ends_at_the_same_bits(pretrained, tmp_path):
    flags = ("--epochs", 3, "--lr", 1e-9, 3, "--checkpoint_minutes", 0, "--no-pictures", "--name")
    judge(pretrained, tmp_path, *flags, "whole")
    run_until(2, 0, lambda hook: judge(pretrained, tmp_path, *flags, "cut", on_step=hook))
    state = torch.load(tmp_path / "cut_model.pth")
    assert (state["epoch"], state["step"]) == (2, 0)
    judge(pretrained, tmp_path, *flags, "cut", "--resume")
    whole, cut = (torch.load(tmp_path / f"{name}_model.pth") for name in ("whole", "cut"))
    assert same_bits(whole["model"], cut["model"])
    tables = [pandas.read_csv(tmp_path / f"{name}_statistics.csv") for name in ("whole", "cut")]
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))


def test_the_frozen_check_bites(pretrained, tmp_path):
    parser = utils.ConfigParser("linear.py", "", LinearConfig)
    argv = arguments(pretrained, tmp_path, "--epochs", 2, "--cached", "--name", "a")
    with Run("linear.py", *parser.read(argv), linear.STATISTICS) as run:
        state, work = linear.prepare(run, parser)

        def thaw(epoch, step):
            state.net.backbone.bn1.running_mean[0] += 1e-3

        with pytest.raises(RuntimeError, match="bn1.running_mean"):
            linear.fit_and_evaluate(run, state, work, thaw)
    assert torch.load(tmp_path / "a_model.pth")["epoch"] == 0


def test_the_frozen_check_sees_one_bit_of_any_tensor():
    backbone, _ = backbones.build_backbone("resnet8", width=4)
    off = torch.autocast("cpu", enabled=False)
    views = Views(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), Augmentation(), 1)
    encoder = linear.FrozenEncoder(backbone, views, off, compiled=False)
    images = make_textures(10, seed=1)[0]
    encoder.augmented(Batch.alone(images))
    encoder.plain(images)
    encoder.check()
    for name, value in backbone.state_dict().items():
        before = value.clone()
        value.flatten()[-1:] += 1 if value.dtype == torch.int64 else 1e-6
        with pytest.raises(RuntimeError, match=f"not frozen: {name} changed"):
            encoder.check()
        value.copy_(before)
    encoder.check()


def test_cached_several_lr_and_label_fraction(pretrained, tmp_path, capsys):
    several = ("--cached", "--no-pictures", "--epochs", 20, "--seed", 3, "--lr")
    judge(pretrained, tmp_path, *several, 1e-9, 30)
    out = capsys.readouterr().out
    assert "--lr 1e-09" in out
    assert "chosen: --lr 30" in out
    used = pandas.read_csv(tmp_path / "pre_linear_cached_statistics.csv")["lr"]
    assert 29 < used.iloc[0] < 30  # the cosine's beginning
    few = ("--cached", "--no-pictures", "--epochs", 5, "--label_fraction", 0.1)
    judge(pretrained, tmp_path, *few)
    assert "32 training images" in capsys.readouterr().out
    table = pandas.read_csv(tmp_path / "results.csv")
    assert table["protocol"].tolist() == ["Linear, cached", "Linear, cached, 10% of labels"]
    assert table["run"].tolist() == ["pre_linear_cached", "pre_linear_cached_0.1"]
    chosen = torch.load(tmp_path / "pre_linear_cached_model.pth")
    assert chosen["extra"].keys() == {"lr", "baseline"}
    assert chosen["extra"]["lr"] == 30
    judge(pretrained, tmp_path, *several, 30, "--name", "alone")
    assert same_bits(chosen["model"], torch.load(tmp_path / "alone_model.pth")["model"])


def test_the_choice_of_lr_never_sees_the_test_set(pretrained, folder, tmp_path, capsys):
    """With the test labels shuffled, the same lr with the same held-out accuracies is chosen."""
    classes = sorted(path.name for path in (folder / "val").iterdir())
    (tmp_path / "shuffled" / "val").mkdir(parents=True)
    (tmp_path / "shuffled" / "train").symlink_to(folder / "train")
    for name, other in zip(classes, classes[1:] + classes[:1], strict=True):
        (tmp_path / "shuffled" / "val" / name).symlink_to(folder / "val" / other)
    flags = ("--cached", "--epochs", 60, "--lr", 30, 3, 0.01, "--no-pictures", "--data_root")
    lines, top1 = [], []
    for name, root in (("a", folder), ("b", tmp_path / "shuffled")):
        judge(pretrained, tmp_path, *flags, root, "--name", name)
        out = capsys.readouterr().out.splitlines()
        lines.append([line for line in out if line.startswith(("--lr", "chosen"))])
        top1.append(pandas.read_csv(tmp_path / f"{name}_statistics.csv")["test_acc@1"].iloc[-1])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 4
    assert top1[1] + 10 < top1[0]  # they are other labels


def test_features_that_are_large_get_a_choice_of_smaller_lr(pretrained, tmp_path, capsys):
    """20 more in each of 32 features: a squared norm of 12,800 and more."""
    state = torch.load(pretrained)
    last = [name for name in state["model"] if name.startswith("backbone") and "bn2.bias" in name]
    state["model"][last[-1]] += 20
    torch.save(state, tmp_path / "large_model.pth")
    flags = ("--cached", "--epochs", 20, "--no-pictures")
    capsys.readouterr()
    judge(tmp_path / "large_model.pth", tmp_path, *flags)
    out = capsys.readouterr().out
    assert "--lr 30 3 0.3 0.03" in out
    scores = [line.split()[1:3] for line in out.splitlines() if line.startswith("--lr")]
    assert [lr for lr, _ in scores] == ["30:", "3:", "0.3:", "0.03:"]
    best = max(scores, key=lambda score: float(score[1]))[0]
    chosen = torch.load(tmp_path / "large_linear_cached_model.pth")["extra"]["lr"]
    assert chosen == float(best.strip(":"))
    judge(tmp_path / "large_model.pth", tmp_path, *flags, "--lr", 30, "--name", "told")
    judge(pretrained, tmp_path, *flags)
    assert "are large" not in capsys.readouterr().out


@pytest.mark.parametrize("cached", [True, False])
def test_an_lr_is_scored_by_a_tenth_that_its_head_never_saw(cached):
    """Each input's last number says which one it is."""
    torch.manual_seed(0)
    labels = torch.arange(80) % 4
    inputs = F.one_hot(labels, 5) + 0.1 * torch.randn(80, 5)
    inputs[:, 4] = torch.arange(80) / 1000
    config = config_of("--epochs 3 --batch_size 16 --lr 1e-9 10 1e-8")
    trained, scored = set(), []

    def embed(batch):
        trained.update((1000 * batch.images[:, 4]).round().int().tolist())
        return batch.images, batch.labels

    def extract(held_out):
        scored.extend((1000 * held_out[:, 4]).round().int().tolist())
        return held_out

    task, head = linear.Task(inputs, labels, embed), linear_head(5, 4)
    extract = None if cached else extract
    assert linear.best_lr_for_head(head, config.lr, task, extract, config) == 10
    rest = sorted(set(range(80)) - trained)
    assert labels[rest].bincount().tolist() == [2, 2, 2, 2]  # a tenth, balanced
    if not cached:
        assert scored == rest


# ---- fitting ------------------------------------------------------------------------------------


def test_a_cached_head_reaches_scikit_learns():
    torch.manual_seed(0)
    centres = torch.randn(5, 20)
    labels = torch.arange(1500) % 5
    features = centres[labels] + 1.2 * torch.randn(1500, 20)
    train, test = slice(0, 1000), slice(1000, None)
    config = config_of("--lr 1")
    task = linear.Task(features[train], labels[train], identity_features)
    (head,) = linear.fit(linear_head(20, 5), config.lr, task, config)
    peer = LogisticRegression(max_iter=1000).fit(features[train], labels[train])
    expected = 100 * peer.score(features[test], labels[test])
    assert 50 < expected < 99
    assert linear.evaluate(head, features[test], labels[test])[1] > expected - 1


def test_heads_side_by_side_are_as_if_alone():
    torch.manual_seed(0)
    task = linear.Task(torch.randn(100, 6), torch.arange(100) % 3, identity_features)
    first = linear_head(6, 3)
    begun = first.weight.clone()
    config = config_of("--epochs 3 --batch_size 32")
    together, (one,), (other,) = (
        linear.fit(first, lrs, task, config) for lrs in ((3.0, 0.1), (3.0,), (0.1,))
    )
    assert torch.equal(together[0].weight, one.weight)
    assert torch.equal(together[1].weight, other.weight)
    assert not torch.equal(one.weight, other.weight)
    assert torch.equal(first.weight, begun)  # they are copies


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
        optimizer=linear.make_optimizer(config, heads, config.lr),
        loader=linear.Task(features, labels, identity_features).loader(config),
        meters=Meters(torch.device("cpu"), "top1", "top5"),
        lr_at=lambda progress: 0.0,
    )
    assert list(linear.train(state, identity_features, 0, config)) == [0, 1, 2, 3]
    loss, top1, top5 = linear.evaluate(head, features, labels)
    means = state.meters.means(100)
    found = [means[name] for name in ("loss", "top1", "top5")]
    assert found == pytest.approx([loss, top1 / 100, top5 / 100])
    assert top1 < top5 < 100


def test_compile_gives_the_same_head(pretrained, tmp_path):
    flags = ("--epochs", 1, "--batch_size", 160, "--no-pictures")  # two equal batches: one graph
    for name, more in [("eager", ()), ("compiled", ("--compile",))]:
        judge(pretrained, tmp_path, *flags, "--name", name, *more)
    tables = [pandas.read_csv(tmp_path / f"{n}_statistics.csv") for n in ("eager", "compiled")]
    columns = ["train_loss", "test_loss"]
    assert tables[0][columns].values == pytest.approx(tables[1][columns].values, rel=1e-3)


def test_lars_step_is_the_authors():
    """apex's LARC without clipping, which the authors' linear evaluation uses, written out."""
    torch.manual_seed(0)
    head = linear_head(6, 3)
    config = config_of("--optimizer lars")
    assert (config.batch_size, config.lr) == (4096, (0.1,))
    optimizer = linear.make_optimizer(config, nn.ModuleList([head]), config.lr)
    assert optimizer.param_groups[0]["peak"] == pytest.approx(1.6)
    optimizer.param_groups[0]["lr"] = 1.6
    weight = head.weight.detach().clone()
    head(torch.randn(4, 6)).square().sum().backward()
    gradient = head.weight.grad.clone()
    optimizer.step()
    trust = 0.001 * weight.norm() / (gradient.norm() + 1e-8)
    torch.testing.assert_close(head.weight.detach(), weight - 1.6 * trust * gradient)


# ---- a linear model that is there ---------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(pretrained, tmp_path_factory):
    """A linear model on cached features, and its results."""
    out = tmp_path_factory.mktemp("fitted")
    judge(pretrained, out, "--cached", "--epochs", 60, "--lr", 3, "--no-pictures")
    return out / "pre_linear_cached_model.pth"


def test_evaluate_only_and_predict_agree(fitted, folder, tmp_path, capsys):
    table = pandas.read_csv(fitted.with_name("pre_linear_cached_statistics.csv"))
    bytes_before = fitted.read_bytes()
    judge(fitted, tmp_path, "--evaluate_only")
    out = capsys.readouterr().out
    top1 = table["test_acc@1"].iloc[-1]
    assert f"top-1 {top1:.2f} %" in out
    assert [path.name for path in tmp_path.iterdir()] == ["pre_linear_cached_confusion.png"]
    assert Image.open(tmp_path / "pre_linear_cached_confusion.png").size[0] > 300
    assert fitted.read_bytes() == bytes_before

    judge(fitted, tmp_path, "--predict", folder / "val", "--out_csv", tmp_path / "p.csv")
    found = pandas.read_csv(tmp_path / "p.csv")
    true = found["file"].map(lambda path: path.split("/")[-2])
    assert 100 * (found["class"] == true).mean() == pytest.approx(top1, abs=1e-3)
    assert found["score"].between(0.25, 1).all()
    assert list(found.columns[:5]) == ["file", "class", "score", "class_2", "score_2"]
    each = [line for line in out.splitlines() if line.startswith("blobs:")]
    share = 100 * (found["class"] == true)[true == "blobs"].mean()
    assert each == [f"blobs: {share:.1f} % of 20"]


def test_predict_takes_any_size_and_mode(fitted, tmp_path, capsys):
    gradient = np.linspace(0, 255, 40 * 50).reshape(40, 50)
    gray = Image.fromarray(gradient.astype(np.uint8))
    files = {}
    for mode in ("L", "RGB", "RGBA", "P", "LA", "1"):
        files[mode] = gray.convert("RGB").convert(mode)
    files["I;16"] = Image.fromarray((gradient * 256).astype(np.uint16))
    files["CMYK"] = gray.convert("CMYK")
    names = []
    for i, (mode, image) in enumerate(files.items()):
        names.append(tmp_path / f"{i}{'.jpg' if mode == 'CMYK' else '.png'}")
        image.save(names[-1])
    judge(fitted, tmp_path, "--predict", *names, "--out_csv", tmp_path / "p.csv")
    found = pandas.read_csv(tmp_path / "p.csv").set_index("file")["score"]
    assert len(found) == len(files)
    of = dict(zip(files, found, strict=True))
    assert of["I;16"] == pytest.approx(of["L"], abs=1e-3)  # 16 bits are not clipped to white
    assert of["RGBA"] == pytest.approx(of["L"], abs=1e-3)
    err = refused(capsys, "--model_path", fitted, "--predict", tmp_path / "none.png")
    assert "none.png" in err


def test_class_order_survives(fitted, folder, tmp_path, capsys):
    """A folder with fewer classes, so other numbers, is scored by name."""
    assert torch.load(fitted)["classes"] == ["blobs", "columns", "diagonals", "rows"]
    judge(fitted, tmp_path, "--evaluate_only")
    whole = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rows:")]
    for split in ("train", "val"):
        (tmp_path / "few" / split).mkdir(parents=True)
        (tmp_path / "few" / split / "rows").symlink_to(folder / split / "rows")
        (tmp_path / "few" / split / "columns").symlink_to(folder / split / "columns")
    judge(fitted, tmp_path, "--evaluate_only", "--data_root", tmp_path / "few")
    assert whole[0] in capsys.readouterr().out
    shutil.copytree(folder / "train" / "rows", tmp_path / "few" / "train" / "zebra")
    args = ("--model_path", fitted, "--evaluate_only", "--data_root", tmp_path / "few")
    assert "zebra" in refused(capsys, *args)


def test_what_is_there_is_replaced_only_if_asked(fitted, folder, tmp_path, capsys):
    """The picture of other data has its own name; predictions and that picture stay."""
    judge(fitted, tmp_path, "--evaluate_only")
    own, other = (tmp_path / f"pre_linear_cached{x}_confusion.png" for x in ("", "_on_folder_few"))
    before = own.read_bytes()
    (tmp_path / "few" / "val").mkdir(parents=True)
    (tmp_path / "few" / "train").symlink_to(folder / "train")
    (tmp_path / "few" / "val" / "rows").symlink_to(folder / "val" / "rows")
    few = ("--evaluate_only", "--data_root", tmp_path / "few")
    judge(fitted, tmp_path, *few)
    assert own.read_bytes() == before != other.read_bytes()
    judge(fitted, tmp_path, "--evaluate_only")  # the same picture again
    table = tmp_path / "p.csv"
    table.write_text("mine\n")
    predict = ("--predict", folder / "val" / "rows", "--out_csv", table)
    for mode, file in ((few, other), (predict, table)):
        before = file.read_bytes()
        out = () if mode is predict else ("--out", tmp_path)
        err = refused(capsys, "--model_path", fitted, *mode, *out)
        assert str(file) in err
        assert "--overwrite" in err
        assert file.read_bytes() == before
        linear.main([str(word) for word in ("--model_path", fitted, *mode, *out, "--overwrite")])
    assert len(pandas.read_csv(table)) == 20
    nowhere = ("--predict", folder / "val" / "rows", "--out_csv", tmp_path / "none" / "p.csv")
    assert "none" in refused(capsys, "--model_path", fitted, *nowhere)


def test_transfer_to_another_data_set(pretrained, tmp_path):
    flags = ("--cached", "--no-pictures", "--epochs", 1, "--data_name", "textures")
    judge(pretrained, tmp_path, *flags)
    state = torch.load(tmp_path / "pre_linear_cached_textures_model.pth")
    assert state["classes"] == list(TEXTURE_CLASSES)
    assert state["config"]["data_name"] == "textures"
    assert pandas.read_csv(tmp_path / "results.csv")["data"].tolist() == ["textures"]


@pytest.mark.parametrize(
    ("arch", "stem", "classes", "params"),
    [("resnet18", "cifar", 10, 11_173_962), ("resnet50", "imagenet", 1000, 25_557_032)],
)
def test_params_of_the_linear_models(arch, stem, classes, params):
    net = Classifier(*backbones.build_backbone(arch, stem), classes)
    assert params_and_flops(net, 32)[0] == params


# ---- what it refuses ----------------------------------------------------------------------------


def test_bad_input_is_one_line(folder, pretrained, fitted, tmp_path, capsys):
    def err(*flags, path=pretrained):
        found = refused(capsys, "--model_path", path, "--out", tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists()
        return found

    state = torch.load(pretrained)
    other = copy.deepcopy(state)
    other["encoder"]["arch"] = "resnet14"
    torch.save(other, tmp_path / "arch.pth")
    assert "arch.pth" in err(path=tmp_path / "arch.pth")
    torch.save(state | {"config": {"data_name": "textures"}}, tmp_path / "config.pth")
    assert "config.pth" in err(path=tmp_path / "config.pth")
    (tmp_path / "cut.pth").write_bytes(pretrained.read_bytes()[:1000])
    assert "cut.pth" in err(path=tmp_path / "cut.pth")
    assert "nowhere.pth" in err(path=tmp_path / "nowhere.pth")
    assert "is not a linear model" in err("--evaluate_only")
    assert "no labelled test images" in err("--data_root", folder / "train")
    predict = ("--model_path", pretrained, "--predict", "x.png")
    assert "is not a linear model" in refused(capsys, *predict)
    for flags, named in [
        ("--label_fraction 0", "--label_fraction"),
        ("--label_fraction 1.1", "--label_fraction"),
        ("--lr 0", "--lr"),
        ("--epochs 0", "--epochs"),
        ("--optimizer adam", "--optimizer adam"),
        ("--out_csv x.csv", "--out_csv"),
        ("--data_name nothing", "--data_name nothing"),
        ("--data_name folder --data_root /not/there", "/not/there"),
        ("--device cuda:99", "--device cuda:99"),
        ("--evaluate_only --predict x", "--predict"),
        ("--evaluate_only --lr 3", "--lr"),
        ("--predict x --cached", "--predict"),
    ]:
        assert named in err(*flags.split())
    again = ("--model_path", pretrained, "--out", fitted.parent, "--cached", "--epochs", 1)
    assert "--overwrite" in refused(capsys, *again)
    assert "is a linear model" in err(path=fitted)
