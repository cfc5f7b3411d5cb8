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
    main.main([*TINY.split(), "--out", str(tmp_path), *flags.split()])


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
    run(tmp_path, "--epochs 3 --knn_every 2 --name a")
    out = capsys.readouterr().out
    assert "raw pixels" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a_curves.png",
        "a_model.pth",
        "a_statistics.csv",
        "results.csv",
    ]
    table = pandas.read_csv(tmp_path / "a_statistics.csv")
    assert list(table.columns) == (
        "epoch,lr,train_loss,std,rank,test_acc@1,test_acc@5,images_per_sec,seconds".split(",")
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
    assert Image.open(tmp_path / "a_curves.png").size[0] > 600


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
        f"--feature_dim 16 --batch_size 32 --epochs 2 --bank_size 60 --k 5 --out {tmp_path} --name"
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


def test_collapse_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main.utils, "collapse_std", lambda z: torch.tensor(0.01))
    run(tmp_path, "--epochs 1 --name a")
    assert "warning: std of z is 0.01" in capsys.readouterr().out


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
