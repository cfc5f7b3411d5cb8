"""The linear evaluation: protocol, proof of the frozen encoder, evaluation, prediction."""

import copy

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

import data
import linear
import main
import model
import utils


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Textures as a folder of images, four classes."""
    root = tmp_path_factory.mktemp("images")
    for split, number, seed in [("train", 800, 1), ("val", 200, 2)]:
        images, labels = data.textures(number, seed)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            if label in (0, 1, 2, 9):
                path = root / split / data.TEXTURES[label] / f"{i}.png"
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


def judge(model_path, out, *flags):
    place = () if "--predict" in flags else ("--out", out)
    linear.main([str(f) for f in ("--model_path", model_path, *place, *flags)])


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        linear.main([str(word) for word in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert err.startswith("linear.py: ")
    return err


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
    before = torch.load(pretrained, weights_only=True)["model"]
    encoder = {k: v for k, v in state["model"].items() if k.startswith("backbone.")}
    assert encoder
    assert all(torch.equal(value, before[key]) for key, value in encoder.items())
    params = sum(v.numel() for k, v in state["model"].items() if "running" not in k)
    batches = sum("num_batches" in k for k in state["model"])
    assert round(row["params_m"] * 1e6) == params - batches


def test_resume_ends_at_the_same_bits(pretrained, tmp_path, monkeypatch):
    judge(pretrained, tmp_path, "--epochs", 3, "--name", "whole")

    class Stop(Exception):
        pass

    real, ticks = (
        linear.train,
        map(float, range(0, 10**9, 60)),
    )  # a minute a look: every epoch is saved
    monkeypatch.setattr(linear.time, "perf_counter", lambda: next(ticks))

    def stop_at_epoch_2(heads, optimizer, loader, embed, epoch, *rest):
        if epoch == 2 and loader.tensors[0].dtype == torch.uint8:
            raise Stop
        return real(heads, optimizer, loader, embed, epoch, *rest)

    monkeypatch.setattr(linear, "train", stop_at_epoch_2)
    with pytest.raises(Stop):
        judge(pretrained, tmp_path, "--epochs", 3, "--name", "cut")
    monkeypatch.undo()
    judge(pretrained, tmp_path, "--epochs", 3, "--name", "cut", "--resume")
    whole, cut = (torch.load(tmp_path / f"{name}_model.pth") for name in ("whole", "cut"))
    assert all(torch.equal(whole["model"][key], cut["model"][key]) for key in whole["model"])
    tables = [pandas.read_csv(tmp_path / f"{name}_statistics.csv") for name in ("whole", "cut")]
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))


def test_the_frozen_check_bites(pretrained, tmp_path, monkeypatch):
    real = linear.train
    state = {}
    frozen = linear.Frozen.__init__

    def remember(self, net):
        frozen(self, net)
        state["encoder"] = net

    monkeypatch.setattr(linear.Frozen, "__init__", remember)

    def thaw(heads, optimizer, loader, embed, *rest):
        means = real(heads, optimizer, loader, embed, *rest)
        if loader.tensors[0].dtype == torch.uint8:  # not the baseline's pixels
            state["encoder"].bn1.running_mean[0] += 1e-3
        return means

    monkeypatch.setattr(linear, "train", thaw)
    with pytest.raises(RuntimeError, match="bn1.running_mean"):
        judge(pretrained, tmp_path, "--epochs", 2)
    assert torch.load(tmp_path / "pre_linear_model.pth")["epoch"] == 0


def test_cached_several_lr_and_label_fraction(pretrained, tmp_path, capsys):
    judge(pretrained, tmp_path, "--cached", "--epochs", 20, "--lr", 30, 1e-9, "--seed", 3)
    out = capsys.readouterr().out
    assert "--lr 1e-09" in out
    assert "chosen: --lr 30" in out
    judge(pretrained, tmp_path, "--cached", "--epochs", 5, "--label_fraction", 0.1)
    assert "32 training images" in capsys.readouterr().out
    table = pandas.read_csv(tmp_path / "results.csv")
    assert table["protocol"].tolist() == ["Linear, cached", "Linear, cached, 10% of labels"]
    assert table["run"].tolist() == ["pre_linear_cached", "pre_linear_cached_0.1"]
    state = torch.load(tmp_path / "pre_linear_cached_model.pth")
    assert state["lr"] == 30


def test_the_choice_of_lr_never_sees_the_test_set(pretrained, tmp_path, capsys, monkeypatch):
    """With the test labels shuffled, the same lr with the same held-out accuracies is chosen."""
    flags = ("--cached", "--epochs", 5, "--lr", 30, 1, 0.01)

    def lines(name):
        judge(pretrained, tmp_path, *flags, "--name", name)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("--lr")]

    seen, evaluate = [], linear.evaluate

    def remember(head, features, labels):
        seen.append(labels.bincount().tolist())
        return evaluate(head, features, labels)

    monkeypatch.setattr(linear, "evaluate", remember)
    honest = lines("a")
    assert seen.count([8, 8, 8, 8]) == 3  # a tenth of the training set, balanced: each lr's score
    monkeypatch.undo()
    real = linear.load_images

    def shuffled(*args):
        images = real(*args)
        images.test_labels = images.test_labels.flip(0)
        return images

    monkeypatch.setattr(linear, "load_images", shuffled)
    assert lines("b") == honest
    assert len(honest) == 3


def test_a_cached_head_reaches_scikit_learns():
    torch.manual_seed(0)
    centres = torch.randn(5, 20)
    labels = torch.arange(1500) % 5
    features = centres[labels] + 1.2 * torch.randn(1500, 20)
    train, test = slice(0, 1000), slice(1000, None)
    args, *_ = linear.parse_args(["--lr", "1"])
    head = model.linear_head(20, 5)
    heads = nn.ModuleList([head])
    loader = linear.make_loader(features[train], labels[train], args)
    optimizer = linear.make_optimizer(args, heads, args.lr)
    linear.fit(heads, optimizer, loader, lambda x, *when: x, args)
    judge = LogisticRegression(max_iter=1000).fit(features[train], labels[train])
    theirs = 100 * judge.score(features[test], labels[test])
    ours = linear.evaluate(head, features[test], labels[test])[1]
    assert 50 < theirs < 99
    assert ours > theirs - 1


def test_heads_side_by_side_are_as_if_alone():
    torch.manual_seed(0)
    features, labels = torch.randn(100, 6), torch.arange(100) % 3
    first = model.linear_head(6, 3)
    args, *_ = linear.parse_args(["--epochs", "3", "--batch_size", "32"])
    loader = linear.make_loader(features, labels, args)

    def fitted(lrs):
        heads = nn.ModuleList(copy.deepcopy(first) for _ in lrs)
        optimizer = linear.make_optimizer(args, heads, lrs)
        linear.fit(heads, optimizer, loader, lambda x, *when: x, args)
        return [head.weight for head in heads]

    together = fitted([3.0, 0.1])
    assert torch.equal(together[0], fitted([3.0])[0])
    assert torch.equal(together[1], fitted([0.1])[0])


def test_the_means_of_an_epoch_count_every_image_once():
    torch.manual_seed(0)
    features, labels = torch.randn(100, 6), torch.arange(100) % 7
    head = model.linear_head(6, 7)
    nn.init.normal_(head.weight)
    args, *_ = linear.parse_args(["--lr", "1e-12", "--batch_size", "32"])  # the last batch has 4
    loader = linear.make_loader(features, labels, args)
    heads = nn.ModuleList([head])
    optimizer = linear.make_optimizer(args, heads, args.lr)
    sums = torch.zeros(1, 3)
    linear.train(
        heads, optimizer, loader, lambda x, *when: x, 0, 0, sums, 1, lambda step, means: None
    )
    loss, top1, top5 = linear.evaluate(head, features, labels)
    assert (sums[0] / 100).tolist() == pytest.approx([loss, top1 / 100, top5 / 100])
    assert top1 < top5 < 100


def test_compile_gives_the_same_head(pretrained, tmp_path):
    for name, more in [("eager", ()), ("compiled", ("--compile",))]:
        judge(pretrained, tmp_path, "--epochs", 1, "--name", name, *more)
    tables = [pandas.read_csv(tmp_path / f"{n}_statistics.csv") for n in ("eager", "compiled")]
    columns = ["train_loss", "test_loss"]
    assert tables[0][columns].values == pytest.approx(tables[1][columns].values, rel=1e-3)


def test_lars_step_is_the_authors():
    """apex's LARC without clipping, which the authors' linear evaluation uses, written out."""
    torch.manual_seed(0)
    head = model.linear_head(6, 3)
    args, *_ = linear.parse_args(["--optimizer", "lars"])
    assert (args.batch_size, args.lr) == (4096, [0.1])
    optimizer = linear.make_optimizer(args, nn.ModuleList([head]), args.lr)
    assert optimizer.param_groups[0]["peak"] == pytest.approx(1.6)
    optimizer.param_groups[0]["lr"] = 1.6
    weight = head.weight.detach().clone()
    head(torch.randn(4, 6)).square().sum().backward()
    gradient = head.weight.grad.clone()
    optimizer.step()
    trust = 0.001 * weight.norm() / (gradient.norm() + 1e-8)
    torch.testing.assert_close(head.weight.detach(), weight - 1.6 * trust * gradient)


def test_evaluate_only_and_predict_agree(pretrained, folder, tmp_path, capsys):
    judge(pretrained, tmp_path, "--cached", "--epochs", 5)
    table = pandas.read_csv(tmp_path / "pre_linear_cached_statistics.csv")
    capsys.readouterr()
    saved = tmp_path / "pre_linear_cached_model.pth"
    bytes_before = saved.read_bytes()
    judge(saved, tmp_path, "--evaluate_only")
    out = capsys.readouterr().out
    top1 = table["test_acc@1"].iloc[-1]
    assert f"top-1 {top1:.2f} %" in out
    assert Image.open(tmp_path / "pre_linear_cached_confusion.png").size[0] > 300
    assert saved.read_bytes() == bytes_before

    judge(saved, tmp_path, "--predict", folder / "val", "--out_csv", tmp_path / "p.csv")
    found = pandas.read_csv(tmp_path / "p.csv")
    true = found["file"].map(lambda path: path.split("/")[-2])
    assert 100 * (found["class"] == true).mean() == pytest.approx(top1, abs=1e-3)
    assert found["score"].between(0.25, 1).all()
    assert list(found.columns[:5]) == ["file", "class", "score", "class_2", "score_2"]
    each = [line for line in out.splitlines() if line.startswith("blobs:")]
    share = 100 * (found["class"] == true)[true == "blobs"].mean()
    assert each == [f"blobs: {share:.1f} % of 20"]


def test_predict_takes_any_size_and_mode(pretrained, tmp_path, capsys):
    judge(pretrained, tmp_path, "--cached", "--epochs", 1)
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
    saved = tmp_path / "pre_linear_cached_model.pth"
    judge(saved, tmp_path, "--predict", *names, "--out_csv", tmp_path / "p.csv")
    found = pandas.read_csv(tmp_path / "p.csv").set_index("file")["score"]
    assert len(found) == len(files)
    of = dict(zip(files, found, strict=True))
    assert of["I;16"] == pytest.approx(of["L"], abs=1e-3)  # 16 bits are not clipped to white
    assert of["RGBA"] == pytest.approx(of["L"], abs=1e-3)
    err = refused(capsys, "--model_path", saved, "--predict", tmp_path / "none.png")
    assert "none.png" in err


def test_class_order_survives(pretrained, folder, tmp_path, capsys):
    """A folder with fewer classes, so other numbers, is scored by name."""
    judge(pretrained, tmp_path, "--cached", "--epochs", 5)
    saved = tmp_path / "pre_linear_cached_model.pth"
    assert torch.load(saved)["classes"] == ["blobs", "columns", "diagonals", "rows"]
    capsys.readouterr()
    judge(saved, tmp_path, "--evaluate_only")
    whole = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rows:")]
    for split in ("train", "val"):
        (tmp_path / "few" / split).mkdir(parents=True)
        (tmp_path / "few" / split / "rows").symlink_to(folder / split / "rows")
        (tmp_path / "few" / split / "columns").symlink_to(folder / split / "columns")
    judge(saved, tmp_path, "--evaluate_only", "--data_root", tmp_path / "few")
    assert whole[0] in capsys.readouterr().out
    (tmp_path / "few" / "train" / "zebra").symlink_to(folder / "train" / "rows")
    args = ("--model_path", saved, "--evaluate_only", "--data_root", tmp_path / "few")
    assert "zebra" in refused(capsys, *args)


def test_transfer_to_another_data_set(pretrained, tmp_path):
    judge(pretrained, tmp_path, "--cached", "--epochs", 1, "--data_name", "textures")
    state = torch.load(tmp_path / "pre_linear_cached_textures_model.pth")
    assert state["classes"] == list(data.TEXTURES)
    assert pandas.read_csv(tmp_path / "results.csv")["data"].tolist() == ["textures"]


@pytest.mark.parametrize(
    ("arch", "stem", "classes", "params"),
    [("resnet18", "cifar", 10, 11_173_962), ("resnet50", "imagenet", 1000, 25_557_032)],
)
def test_params_of_the_linear_models(arch, stem, classes, params):
    net = model.Classifier(*model.backbone(arch, stem), classes)
    assert model.params_and_flops(net, 32)[0] == params


def test_bad_input_is_one_line(pretrained, tmp_path, capsys):
    def err(*flags, path=pretrained):
        found = refused(capsys, "--model_path", path, "--out", tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists()
        return found

    state = torch.load(pretrained)
    other = copy.deepcopy(state)
    other["args"]["arch"] = "resnet14"
    torch.save(other, tmp_path / "arch.pth")
    assert "arch.pth: its weights do not fit" in err(path=tmp_path / "arch.pth")
    other["args"] = {"data_name": "textures"}
    torch.save(other, tmp_path / "args.pth")
    assert "not main.py's" in err(path=tmp_path / "args.pth")
    (tmp_path / "cut.pth").write_bytes(pretrained.read_bytes()[:1000])
    assert "cut.pth" in err(path=tmp_path / "cut.pth")
    assert "nowhere.pth" in err(path=tmp_path / "nowhere.pth")
    assert "is not a linear model" in err("--evaluate_only")
    predict = ("--model_path", pretrained, "--predict", "x.png")
    assert "is not a linear model" in refused(capsys, *predict)
    for flags, named in [
        ("--label_fraction 0", "--label_fraction"),
        ("--label_fraction 1.1", "--label_fraction"),
        ("--lr 0", "--lr"),
        ("--epochs 0", "--epochs"),
        ("--optimizer adam", "--optimizer"),
        ("--out_csv x.csv", "--out_csv"),
        ("--data_name nothing", "--data_name nothing"),
        ("--data_name folder --data_root /not/there", "/not/there"),
        ("--device cuda:99", "--device cuda:99"),
        ("--evaluate_only --predict x", "--predict"),
        ("--evaluate_only --lr 3", "--lr: does not go with --evaluate_only"),
        ("--predict x --cached", "does not go with --predict"),
    ]:
        assert named in err(*flags.split())
    judge(pretrained, tmp_path, "--cached", "--epochs", 1)
    assert utils.load_checkpoint(tmp_path / "pre_linear_cached_model.pth")
    again = ("--model_path", pretrained, "--out", tmp_path, "--cached", "--epochs", 1)
    assert "--overwrite" in refused(capsys, *again)
    linear_path = tmp_path / "pre_linear_cached_model.pth"
    assert "is a linear model" in refused(capsys, "--model_path", linear_path)
