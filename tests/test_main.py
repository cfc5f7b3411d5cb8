"""The commands: a run, what it writes, resume, refusals; and the shape of the tree."""

import ast
import inspect
import pathlib
import re
import socket
import sys
import time

import pandas
import pytest
import torch
import torch.distributed.run
from PIL import Image

import data
import linear
import main
import model

ROOT = pathlib.Path(__file__).parent.parent
TINY = "--data_name textures --train_size 200 --width 4 --feature_dim 16 --batch_size 32"


def run(tmp_path, flags):
    main.main([*TINY.split(), "--no-pictures", "--out", str(tmp_path), *flags.split()])


def refused(capsys, *argv):
    """Exit code 2, one line on stderr, and that line."""
    with pytest.raises(SystemExit) as stop:
        main.main([str(word) for word in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert err.startswith("main.py: ")
    return err


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
    assert list(table.columns) == (
        "epoch lr train_loss std rank collapse test_acc@1 test_acc@5 images_per_sec seconds".split()
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
    net = model.SimSiam("resnet8", feature_dim=16, width=4)
    assert round(result["params_m"] * 1e6) == sum(p.numel() for p in net.parameters())

    state = torch.load(tmp_path / "a_model.pth", weights_only=True)
    assert sorted(state) == (
        "args epoch history images_crc made_on model optimizer seconds step sums version".split()
    )
    net.load_state_dict(state["model"])
    for name in ("curves", "neighbours", "embedding", "confusion"):
        assert Image.open(tmp_path / f"a_{name}.png").size[0] > 400


def test_resume_ends_at_the_same_bits(tmp_path, capsys, monkeypatch):
    run(tmp_path, "--epochs 3 --name whole --seed 5")

    class Stop(Exception):
        pass

    real = main.train

    def train_one_epoch(*args):
        if args[4] == 1:
            raise Stop
        return real(*args)

    monkeypatch.setattr(main, "train", train_one_epoch)
    with pytest.raises(Stop):
        run(tmp_path, "--epochs 3 --name cut --seed 5")
    monkeypatch.undo()
    torch.manual_seed(123)
    run(tmp_path, "--epochs 3 --name cut --seed 5 --resume")
    assert "resumed after epoch 1 of 3" in capsys.readouterr().out

    whole, cut = (torch.load(tmp_path / f"{name}_model.pth") for name in ("whole", "cut"))
    for key, tensor in whole["model"].items():
        assert torch.equal(tensor, cut["model"][key]), key
    for i, state in whole["optimizer"]["state"].items():
        assert torch.equal(
            state["momentum_buffer"], cut["optimizer"]["state"][i]["momentum_buffer"]
        )
    tables = [pandas.read_csv(tmp_path / f"{name}_statistics.csv") for name in ("whole", "cut")]
    times = ["images_per_sec", "seconds"]
    assert tables[0].drop(columns=times).equals(tables[1].drop(columns=times))

    err = refused(
        capsys, *TINY.split(), "--out", tmp_path, "--name", "cut", "--epochs", 4, "--resume"
    )
    assert "epochs 3" in err
    assert "has 4" in err
    err = refused(capsys, "--out", tmp_path, "--name", "none", "--resume")
    assert "none_model.pth" in err


def test_seeds_differ_and_repeat(tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        run(tmp_path, f"--epochs 1 --name {name} --seed {seed}")
    a, b, c = (torch.load(tmp_path / f"{n}_model.pth")["model"] for n in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["backbone.conv1.weight"], c["backbone.conv1.weight"])


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


def test_unlabelled_folder_and_the_imagenet_recipe(tmp_path, capsys):
    images, _ = data.textures(24, seed=3)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).resize((40, 48)).save(tmp_path / f"{i}.png")
    main.main(
        f"--data_name folder --data_root {tmp_path} --recipe imagenet --arch resnet18 --stem cifar "
        f"--image_size 16 --feature_dim 16 --batch_size 8 --epochs 1 --out {tmp_path}/r".split()
    )
    assert "no kNN" in capsys.readouterr().out
    table = pandas.read_csv(tmp_path / "r" / "folder_resnet18_16_200_8_1_statistics.csv")
    assert table["test_acc@1"].isna().all()
    assert table["rank"].notna().all()
    assert not (tmp_path / "r" / "results.csv").exists()
    state = torch.load(tmp_path / "r" / "folder_resnet18_16_200_8_1_model.pth")
    assert state["args"]["blur_p"] == 0.5
    assert "projector.7.running_mean" in state["model"]  # three layers


def test_imagenet_from_files_to_a_judged_head(tmp_path, capsys, monkeypatch):
    """Whole, and stopped within an epoch and resumed with other workers: the same bits."""
    for split, number, seed in [("train", 120, 1), ("val", 40, 2)]:
        images, labels = data.textures(number, seed)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = tmp_path / split / data.TEXTURES[label] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((40 + i % 9, 40))
            image.convert(("RGB", "L", "CMYK")[i % 3]).save(path)
    flags = (
        f"--data_name imagenet --data_root {tmp_path} --arch resnet8 --stem cifar --image_size 32 "
        f"--feature_dim 16 --batch_size 32 --epochs 2 --bank_size 60 --k 5 --no-pictures "
        f"--out {tmp_path} --name"
    ).split()
    banks, real_knn = [], main.utils.knn
    monkeypatch.setattr(main.utils, "knn", lambda b, *a: banks.append(len(b)) or real_knn(b, *a))
    main.main([*flags, "whole", "--profile"])
    assert banks == [60, 60, 60, 60]  # two before the training, and one each epoch
    out = capsys.readouterr().out
    assert "imagenet: 120 training images, 40 test images, 10 classes, 32 pixels" in out
    parts = "loading views forward backward optimizer monitor checkpoint all".split()
    shares = {
        part: float(line.split()[-1].rstrip("%"))
        for part in parts
        for line in out.splitlines()
        if line.startswith(f"{part} ")
    }
    assert list(shares) == parts
    assert sum(shares.values()) == pytest.approx(200, abs=0.5)
    assert min(shares["views"], shares["forward"], shares["backward"], shares["monitor"]) > 0
    results = pandas.read_csv(tmp_path / "results.csv")
    assert results["protocol"].tolist() == ["KNN, bank of 60"]

    class Stop(Exception):
        pass

    real = main.utils.save_checkpoint

    def save_and_stop(*args, **state):
        real(*args, **state)
        if (state["epoch"], state["step"]) == (1, 2):
            raise Stop

    monkeypatch.setattr(main.utils, "save_checkpoint", save_and_stop)
    with pytest.raises(Stop):
        main.main([*flags, "cut", "--checkpoint_minutes", "0"])
    monkeypatch.undo()
    main.main([*flags, "cut", "--resume", "--num_workers", "0"])
    assert "and step 2 of 3" in capsys.readouterr().out
    whole, cut = (torch.load(tmp_path / f"{name}_model.pth")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)

    judge = f"--model_path {tmp_path}/whole_model.pth --out {tmp_path} --epochs 1 --batch_size 32"
    linear.main([*judge.split(), "--lr", "1", "0.1"])
    table = pandas.read_csv(tmp_path / "whole_linear_statistics.csv")
    capsys.readouterr()
    judged = f"--model_path {tmp_path}/whole_linear_model.pth"
    linear.main([*judged.split(), "--evaluate_only", "--out", str(tmp_path)])
    assert f"top-1 {table['test_acc@1'].iloc[-1]:.2f} %" in capsys.readouterr().out
    linear.main([*judged.split(), "--predict", f"{tmp_path}/val", "--out_csv", f"{tmp_path}/p.csv"])
    found = pandas.read_csv(tmp_path / "p.csv")
    right = found["class"] == found["file"].map(lambda path: path.split("/")[-2])
    assert 100 * right.mean() == pytest.approx(table["test_acc@1"].iloc[-1], abs=1e-3)


def test_the_first_epochs_seconds_are_its_own(tmp_path, monkeypatch):
    real, ends = main.monitor, []

    def slow_at_first(*args):
        time.sleep(0 if ends else 5)  # before the training; longer than drawing the curves takes
        row = real(*args)
        ends.append(time.perf_counter())
        return row

    monkeypatch.setattr(main, "monitor", slow_at_first)
    run(tmp_path, "--epochs 1 --name a")
    seconds = pandas.read_csv(tmp_path / "a_statistics.csv")["seconds"][1]
    assert 0 < seconds < time.perf_counter() - ends[0]


def test_a_bad_image_met_late_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    for i in range(20):
        path = tmp_path / "images" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(path)
    path.write_bytes(b"no image")
    flags = (
        f"--data_name imagenet --data_root {tmp_path}/images --arch resnet8 --stem cifar "
        f"--image_size 8 --feature_dim 16 --batch_size 4 --epochs 1 --out {tmp_path}/r"
    )
    monkeypatch.setattr(sys, "argv", ["main.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        main.utils.run_command(main.main, data.BadImage)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith(f"main.py: {path}: cannot be read")
    assert err.endswith("--bad_images skip\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "r").exists()
    main.main([*flags.split(), "--bad_images", "skip"])
    assert "19 training images" in capsys.readouterr().out


def test_fix_pred_lr_keeps_the_predictors_lr(tmp_path):
    for name, fixed in [("fixed", "--fix_pred_lr"), ("free", "--no-fix_pred_lr")]:
        run(tmp_path, f"--epochs 2 --name {name} {fixed}")
        groups = torch.load(tmp_path / f"{name}_model.pth")["optimizer"]["param_groups"]
        peak = main.SHORT["lr"] * 32 / 256
        assert groups[0]["lr"] < 0.1 * peak  # the cosine's end
        assert (groups[1]["lr"] == peak) == (name == "fixed")
        net = model.SimSiam("resnet8", feature_dim=16, width=4)
        assert len(groups[1]["params"]) == len(list(net.predictor.parameters()))


def test_compile_trains_the_same_network(tmp_path):
    run(tmp_path, "--epochs 1 --name eager")
    run(tmp_path, "--epochs 1 --name compiled --compile")
    a, b = (torch.load(tmp_path / f"{n}_model.pth")["model"] for n in ("eager", "compiled"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-2, rtol=1e-2)


COLLAPSING = "--stop_grad off --bn hidden --lr 2"


def test_a_collapse_is_said_once_with_its_cause(tmp_path, capsys):
    run(tmp_path, f"--epochs 6 --name a {COLLAPSING}")
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("warning: "))
    assert "std of z is 0." in line
    assert "--stop_grad off" in line
    assert "--bn hidden" in line
    assert "--batch_size" not in line
    rows = main.utils.read_csv(tmp_path / "a_statistics.csv")
    (found,) = (row for row in rows if "collapse" in row)
    assert found["collapse"] == 6 * found["epoch"]  # steps so far, of 6 an epoch
    assert f"epoch {found['epoch']}, step 6" in line
    low = [row["epoch"] for row in rows[1:] if row["std"] < 0.3]
    assert found["epoch"] == low[0]
    assert rows[-1]["std"] < 0.2

    run(tmp_path, "--epochs 2 --name healthy")
    assert "warning" not in capsys.readouterr().out


def test_stop_on_collapse_ends_the_run_and_resume_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main.utils, "WINDOW", 2)
    run(tmp_path, f"--epochs 3 --name whole --train_size 400 {COLLAPSING}")  # 12 steps an epoch
    flags = f"--epochs 3 --name cut --train_size 400 {COLLAPSING}"
    with pytest.raises(main.utils.RunError, match="--no-stop_on_collapse"):
        run(tmp_path, f"{flags} --stop_on_collapse")
    state = torch.load(tmp_path / "cut_model.pth")
    assert (state["epoch"], state["step"]) == (0, 6)  # at once, not at the epoch's end
    with pytest.raises(main.utils.RunError, match="--no-stop_on_collapse"):
        run(tmp_path, f"{flags} --resume")
    assert torch.load(tmp_path / "cut_model.pth")["step"] == 6
    run(tmp_path, f"{flags} --resume --no-stop_on_collapse")
    whole, cut = (
        pandas.read_csv(tmp_path / f"{name}_statistics.csv").drop(
            columns=["images_per_sec", "seconds"]
        )
        for name in ("whole", "cut")
    )
    assert whole.equals(cut)
    assert whole["collapse"].dropna().tolist() == [6]


def test_ablations_are_kept_in_the_checkpoint(tmp_path, capsys):
    flags = "--stop_grad off --predictor fixed --bn all --similarity cross_entropy"
    run(tmp_path, f"--epochs 1 --name a {flags} --loss asymmetric_2x")
    state = main.utils.load_checkpoint(tmp_path / "a_model.pth")
    net = model.pretrained(state)
    assert net.stop_grad is False
    assert net.D is model.cross_entropy
    assert net.looks == 4
    assert not any(p.requires_grad for p in net.predictor.parameters())
    torch.manual_seed(0)  # the predictor is as it started
    begun = model.simsiam(state["args"]).predictor.state_dict()
    for name, value in net.predictor.state_dict().items():
        assert torch.equal(value, begun[name]) == ("weight" in name or "bias" in name), name
    err = refused(capsys, "--resume", tmp_path / "a_model.pth", "--stop_grad", "on")
    assert "--stop_grad off" in err
    for name in (*model.ABLATIONS, "stop_grad"):  # a checkpoint of before there were any
        del state["args"][name]
    state["model"] = model.SimSiam("resnet8", "cifar", 16, 2, 4).state_dict()
    assert model.pretrained(state).stop_grad is True


def test_show_views_draws_what_the_network_would_get(tmp_path, capsys, monkeypatch):
    run(tmp_path, "--epochs 1 --name a")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    sheets = []
    real = main.figures.sheet
    monkeypatch.setattr(main.figures, "sheet", lambda *args: sheets.append(args) or real(*args))
    run(tmp_path, "--name a --show_views")
    assert "a_views.png" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert Image.open(tmp_path / "a_views.png").size[0] > 300
    found = torch.from_numpy(sheets[0][0]).permute(0, 1, 4, 2, 3)  # 8 x 3 of 3 x 32 x 32
    args = main.parse_args([*TINY.split(), "--name", "a"])[0]
    images, views = main.load_images(args).train_images, main.make_views(args)
    shown = found[:, 0]
    assert all((image == images).flatten(1).all(1).any() for image in shown)
    views.seed(0, 0)
    for i in (1, 2):
        undone = found[:, i] / 255
        expected = views(shown.contiguous())
        for c in range(3):
            wanted = expected[:, c] * views.std[c] + views.mean[c]
            torch.testing.assert_close(undone[:, c], wanted, atol=0.51 / 255, rtol=0)


def test_neighbours_and_map_of_test_images_or_of_the_users_own(tmp_path, monkeypatch):
    drawn = {}
    for name in ("neighbours", "embedding", "confusion"):
        monkeypatch.setattr(main.figures, name, lambda *args, n=name: drawn.update({n: args}))
    args = main.parse_args([*TINY.split(), "--name", "a"])[0]
    images, views = main.load_images(args), main.make_views(args)
    net = model.simsiam(vars(args))
    amp = torch.autocast("cpu", enabled=False)

    def found(part):
        """Brute force: features, in eval mode, normalised."""
        net.eval()
        with torch.no_grad():
            return torch.nn.functional.normalize(net.backbone(views.plain(part)), dim=1)

    main.draw(str(tmp_path / "a"), [{"epoch": 0, "rank": 1.0}], net, views, images, args, amp)
    tiles, similarity, right, names = drawn["neighbours"][:4]
    places = torch.linspace(0, 999, 8).long()
    cosine = found(images.test_images[places]) @ found(images.train_images).T
    best, nearest = cosine.sort(1, descending=True)
    torch.testing.assert_close(torch.from_numpy(similarity), best[:, :8], atol=1e-5, rtol=0)
    same = images.train_labels[nearest[:, :8]] == images.test_labels[places][:, None]
    assert (right == same.numpy()).all()
    assert names == [images.classes[i] for i in images.test_labels[places]]
    assert (tiles[3, 0] == images.test_images[places[3]].permute(1, 2, 0).numpy()).all()
    assert (tiles[3, 1] == images.train_images[nearest[3, 0]].permute(1, 2, 0).numpy()).all()
    matrix = torch.tensor(drawn["confusion"][0])
    assert matrix.sum(1).tolist() == images.test_labels.bincount().tolist()
    bank, queries = found(images.train_images), found(images.test_images)
    top1 = main.knn_accuracy(bank, queries, images, args)[0]
    assert 100 * matrix.trace() / matrix.sum() == pytest.approx(top1, abs=0.2)

    drawn.clear()
    images.train_labels, images.test_images, images.test_labels = (
        -1 - 0 * images.train_labels,
        None,
        None,
    )
    main.draw(str(tmp_path / "b"), [{"epoch": 0, "rank": 1.0}], net, views, images, args, amp)
    assert set(drawn) == {"neighbours", "embedding"}
    tiles, similarity, right, _ = drawn["neighbours"][:4]
    assert right is None
    cosine = bank @ bank.T
    cosine.fill_diagonal_(-2)  # an image is not its own neighbour
    places = torch.linspace(0, 199, 8).long()
    best = cosine[places].sort(1, descending=True).values[:, :8]
    torch.testing.assert_close(torch.from_numpy(similarity), best, atol=1e-5, rtol=0)
    assert drawn["embedding"][1] is None


def test_tensorboard_gets_scalars_pictures_and_features(tmp_path, capsys, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "--epochs 2 --name a --tensorboard --pictures")
    events = EventAccumulator(str(tmp_path / "a_tensorboard")).Reload()
    table = main.utils.read_csv(tmp_path / "a_statistics.csv")
    for column in ("train_loss", "std", "rank", "test_acc@1"):
        points = [(event.step, event.value) for event in events.Scalars(column)]
        wanted = [(row["epoch"], row[column]) for row in table[1:]]
        assert points == [pytest.approx(point, rel=1e-4) for point in wanted]
    assert set(events.Tags()["images"]) == {"curves", "neighbours", "embedding", "confusion"}
    folder = tmp_path / "a_tensorboard" / "00002" / "default"
    assert pandas.read_csv(folder / "tensors.tsv", sep="\t", header=None).shape == (1000, 16)
    metadata = (folder / "metadata.tsv").read_text().split()
    assert (len(metadata), set(metadata)) == (1000, set(data.TEXTURES))
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda name: None)
    assert "pip install tensorboard" in refused(capsys, *TINY.split(), "--tensorboard")


def test_a_month_on_the_cpu_is_said(tmp_path, capsys):
    run(tmp_path, "--epochs 1 --name short")
    assert "days" not in capsys.readouterr().out
    args = main.parse_args(["--epochs", "1000"])[0]
    with main.utils.Progress(0, args, 10**9, ("loss",), "--recipe short") as progress:
        progress(0, torch.zeros(1))
        progress(1, torch.zeros(1))
    out = capsys.readouterr().out
    assert "days" in out
    assert "--recipe short" in out


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
        ("--data_name imagnet", "--data_name imagnet"),
        ("--arch vgg16", "--arch vgg16"),
        ("--bn some", "--bn"),
        ("--stop_grad maybe", "--stop_grad"),
        ("--show_views --resume", "--show_views"),
        ("--recipe none", "--recipe none"),
        ("--stem wide", "--stem wide"),
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
        ("--name a/b", "--name: a/b"),
        ("--resume --overwrite", "--overwrite"),
        ("--resume=", "--resume: must be the path of a file"),
        ("--nonsense 1", "--nonsense"),
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


# ---- the tree -----------------------------------------------------------------------------------

ROOMS = {"model", "data", "utils", "figures"}
COMMANDS = {"main", "linear"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_the_arrows_of_the_design_hold():
    ours = ROOMS | COMMANDS | {"tools", "hubconf"}
    files = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
    assert {path.stem for path in files} >= ROOMS | {"main"}
    for path in files:
        name = "tools" if path.parent.name == "tools" else path.stem
        allowed = {"tools": ROOMS | COMMANDS | {"tools"}}.get(
            name, set() if name in ROOMS else ROOMS
        )
        found = set(imports(path)) & ours
        assert found <= allowed, f"{path.name} imports {found - allowed}"


def test_the_loop_fits_a_screen():
    assert len(inspect.getsource(main.train).splitlines()) <= 40


def test_the_readmes_flags_exist():
    lines = (ROOT / "README.md").read_text().splitlines()
    text = " ".join(line for line in lines if not line.startswith("#SBATCH"))
    known = set(torch.distributed.run.get_args_parser()._option_string_actions)
    known |= set(re.findall(r'"(--\w+)"', "".join(p.read_text() for p in ROOT.glob("tools/*.py"))))
    for command in (main, linear):
        known |= set(command.parse_args([])[1]._option_string_actions)
    for flag in {word.strip("`,.();:") for word in text.split() if word.startswith(("--", "`--"))}:
        assert flag in known, flag


if sys.platform == "linux":

    def test_the_kept_requirements_are_the_ones_imported():
        """No dependency that nothing imports, none imported that is not required."""

        def required(name):
            lines = (ROOT / name).read_text().splitlines()
            return {line.split(">=")[0].strip() for line in lines if line and line[0] not in "#-"}

        def imported(*files):
            found = {name for path in files for name in imports(path)}
            names = {"PIL": "Pillow", "sklearn": "scikit-learn"}
            ours = ROOMS | COMMANDS | {"tools"}
            third = found - set(sys.stdlib_module_names) - ours
            return {names.get(name, name) for name in third}

        kept, others = required("requirements.txt"), required("requirements-dev.txt")
        # These are optional: imported where they are used.
        assert imported(*ROOT.glob("*.py")) - {"timm", "webdataset"} == kept
        assert imported(*ROOT.glob("tools/*.py")) <= kept | others
