"""tools.plot, studies.ablate and tools.bench: what they draw and write is of the runs."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas
import pytest
from PIL import Image

import linear
import main
from simsiam.data.datasets import load_dataset
from simsiam.models.flops import params_and_flops
from simsiam.models.simsiam import SimSiam
from simsiam.runtime.files import RunError, read_csv
from simsiam.training import checkpoint
from studies import ablate, speedrun
from tests.helpers import ROOT, refused
from tools import bench, features, plot

TINY = (
    "--data_name textures --train_size 200 --width 4 --feature_dim 16 --batch_size 32 --no-pictures"
)

WAYS = ("script", "module")
PLOT = types.SimpleNamespace(main=plot.command)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs and a linear one, without pictures."""
    folder = tmp_path_factory.mktemp("runs")
    for name in "ab":
        flags = f"{TINY} --epochs 2 --seed {ord(name)} --out {folder} --name {name}"
        main.main(flags.split())
    flags = f"--model_path {folder}/a_model.pth --out {folder} --epochs 2 --cached --no-pictures"
    linear.main(f"{flags} --name a_linear".split())
    assert not list(folder.glob("*.png"))
    return folder


def test_plot_draws_a_run_from_its_checkpoint(runs, tmp_path, capsys):
    before = {path: path.read_bytes() for path in runs.iterdir()}
    plot.command([str(runs / "a_model.pth")])
    assert "wrote" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    drawn = sorted(path.name for path in runs.glob("a_*.png"))
    assert drawn == [f"a_{name}.png" for name in "confusion curves embedding neighbours".split()]
    plot.command([str(runs / "a_linear_model.pth")])
    assert "--evaluate_only" in capsys.readouterr().out
    # They are the pictures that the runs themselves would have drawn.
    for name in ("a", "a_linear"):
        shutil.copy(runs / f"{name}_model.pth", tmp_path)
    main.main(f"--resume {tmp_path}/a_model.pth --pictures".split())
    linear.main(f"--resume {tmp_path}/a_linear_model.pth --pictures".split())
    for name in ("a_confusion", "a_neighbours", "a_curves", "a_linear_curves"):
        drawn = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert np.array_equal(drawn, np.asarray(Image.open(runs / f"{name}.png")))


def picture_of(path):
    """The format of a picture, by its first bytes."""
    start = path.read_bytes()[:12]
    names = {b"\x89PNG": "png", b"%PDF": "pdf", b"<?xm": "svg", b"\xff\xd8\xff\xe0": "jpg"}
    return names.get(start[:4]) or start[8:].decode().lower()


def test_plot_replaces_nothing_unasked_and_its_ending_is_its_format(runs, tmp_path, capsys):
    """Of a run without its checkpoint the table is left: it does not know of the raw pixels."""
    for name in ("a_statistics.csv", "b_statistics.csv"):
        shutil.copy(runs / name, tmp_path)
    good = tmp_path / "a_curves.png"
    good.write_bytes(b"a better one")
    err = refused(capsys, PLOT, tmp_path / "a")
    assert f"{good}: exists: replace it with --overwrite" in err
    assert good.read_bytes() == b"a better one"
    plot.command([f"{tmp_path}/a", "--overwrite"])
    assert picture_of(good) == "png"
    both = [f"{tmp_path}/{name}" for name in "ab"]
    for end in ("png", "PDF", "svg", "jpg", "webp"):
        out = tmp_path / f"x.{end}"
        plot.command([*both, "--out", str(out)])
        assert picture_of(out) == end.lower()
        assert "exists" in refused(capsys, PLOT, *both, "--out", out)
    for end in (".xyz", "", ".pgf"):
        err = refused(capsys, PLOT, *both, "--out", f"{tmp_path}/y{end}")
        assert "--out" in err
        assert ".pdf" in err


def test_plot_tells_runs_of_one_name_by_their_folders(runs, tmp_path):
    for folder in ("x/1", "x/2", "y/2"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(runs / "a_statistics.csv", tmp_path / folder / "run_statistics.csv")
    shutil.copy(runs / "a_statistics.csv", tmp_path)
    places = [f"{tmp_path}/{place}" for place in ("x/1/run", "x/2/run", "y/2/run_curves.png", "a")]
    plot.command([*places, "--out", f"{tmp_path}/all.svg"])
    drawn = (tmp_path / "all.svg").read_text()
    shown = re.findall(r"<!-- (.*?) -->", drawn)
    assert [name for name in shown if "run" in name or name == "a"] == [
        "1/run",
        "x/2/run",
        "y/2/run",
        "a",
    ]


def test_plot_says_in_one_line_what_is_wrong_with_a_table(tmp_path, capsys):
    table = tmp_path / "a_statistics.csv"
    header = b"epoch,lr,train_loss,std,rank\n"
    for content, word in (
        (b"", "No columns"),
        (header, "none of"),
        (b"name,size\na,1\n", "none of"),
        (header + b"1,0.1,-0.5,1,2,3,4\n2,0.1\n", ""),
        (header + b"1,0.1,much,1,2\n", "much for train_loss"),
        (header + b",0.1,-0.5,1,2\n", "epoch None"),
        (header + b"one,0.1,-0.5,1,2\n", "epoch one"),
        (header + b"1e300,0.1,-0.5,1,2\n", "epoch 1e+300"),
        (header + b"1,0.1,inf,1,2\n", "inf for train_loss"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", ""),
        ("epoch,std\n1,é".encode("utf-16"), ""),
    ):
        table.write_bytes(content)
        err = refused(capsys, PLOT, tmp_path / "a")
        assert "a_statistics.csv: " in err
        assert word in err
        assert not (tmp_path / "a_curves.png").exists()


def test_plot_draws_the_run_s_own_images_alone(runs, tmp_path, capsys):
    """Other images would make other pictures, over those of the run."""
    for split in ("train", "test"):
        for name in ("p", "q"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(10):
                pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    flags = f"{TINY} --epochs 1 --batch_size 8 --out {tmp_path} --name f --k 5"
    flags = flags.replace("textures --train_size 200", f"folder --data_root {tmp_path}")
    main.main([*flags.split(), "--arch", "resnet8"])
    (tmp_path / "train" / "p" / "9.png").unlink()
    err = refused(capsys, PLOT, tmp_path / "f")
    assert "not the images that" in err


def test_plot_lays_runs_over_one_another(runs, capsys):
    plot.command([f"{runs}/a", f"{runs}/b_statistics.csv", "--out", f"{runs}/both.png"])
    both = np.asarray(Image.open(runs / "both.png"))
    assert both.shape[1] > 1000
    plot.command([f"{runs}/a", f"{runs}/a_statistics.csv", "--out", f"{runs}/same.png"])
    assert not np.array_equal(both, np.asarray(Image.open(runs / "same.png")))
    (runs / "b_model.pth").rename(runs / "c_model.pth")  # only the table is left
    plot.command([f"{runs}/b", "--overwrite"])
    assert "b_model.pth is not there" in capsys.readouterr().out
    assert (runs / "b_curves.png").exists()
    for wrong, word in (
        ([f"{runs}/none"], "none"),
        ([f"{runs}/a", "--out", f"{runs}/c.png"], "--out"),
        ([f"{runs}/a", f"{runs}/b", "--data_root", "x"], "--data_root"),
    ):
        with pytest.raises(SystemExit) as stop:
            plot.command(wrong)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert word in err
        assert err.count("\n") == 1


def test_speedrun_trains_each_for_its_minutes_and_tables_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the tool sets it to the cores; undone at the end
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # or threads spin, on busy cores for long
    flags = "--train_size 200 --width 4 --budget 0.02 --points 2 --out".split()
    own = "fast --feature_dim 16 --batch_size 32"
    speedrun.command([own, "plain", *flags, str(tmp_path)])
    rows, out = read_csv(tmp_path / "speedrun.csv"), capsys.readouterr().out
    assert [row["recipe"] for row in rows] == [own, "plain"]
    for row in rows:  # so that who waits knows how long
        assert f"{row['recipe']}, seed 0: {row['epochs']} epochs, for 0.02 minutes\n" in out
    assert f"plain, seed 0: {rows[1]['seconds'] / 60:.1f} minutes so far, kNN " in out
    for row, batch in zip(rows, (32, 128), strict=True):
        curve = json.loads(row["curve"])
        assert curve[-1][1] == pytest.approx(row["knn"], abs=0.01)
        assert curve[-1][0] == pytest.approx(row["seconds"] / 60, abs=0.001)
        assert row["steps"] == row["epochs"] * (200 // batch)
        assert row["images"] == row["steps"] * batch
        assert row["seconds"] > 60 * 0.02 / 4  # so few steps tell the speed roughly only
        net = SimSiam("resnet8", feature_dim=int(row["feature_dim"]), width=4)
        sizes = (16, 20, 24) if batch == 32 else (32,)
        sides = [sizes[i * len(sizes) // row["epochs"]] for i in range(row["epochs"])]
        adds = sum(2 * params_and_flops(net, side)[1] for side in sides)
        images = row["images"] / row["epochs"]
        assert row["tera_adds"] == pytest.approx(adds * images / 1e12, rel=1e-5)
    name = "fast_feature_dim_16_batch_size_32_0_0_02"
    ours = read_csv(tmp_path / "speedrun" / f"{name}_statistics.csv")
    assert len(ours) == 1 + rows[0]["epochs"]
    assert rows[0]["epochs"] >= 3  # one of each size
    assert ours[-1]["test_acc@1"] == pytest.approx(rows[0]["knn"])
    assert 0 < rows[0]["linear"] <= 100
    assert f"--epochs {rows[0]['epochs']}" in rows[0]["command"]
    assert Image.open(tmp_path / "speedrun.png").size[0] > 800
    capsys.readouterr()
    (tmp_path / "speedrun.png").unlink()
    speedrun.command([own, *flags, str(tmp_path)])
    assert "is in the table" in capsys.readouterr().out
    assert read_csv(tmp_path / "speedrun.csv") == rows
    assert Image.open(tmp_path / "speedrun.png").size[0] > 800  # with a table put together by hand
    runner = types.SimpleNamespace(main=speedrun.command)
    for wrong, word in (("slow", "slow"), ("plain --lr 1", "plain"), ("fast --lr x", "--lr")):
        assert word in refused(capsys, runner, wrong, *flags, tmp_path)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_contenders_side_by_side_keep_to_their_own_cores(monkeypatch):
    mine = min(os.sched_getaffinity(0))
    program = "import os; print(sorted(os.sched_getaffinity(0)))"

    def of_a_child():
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    with ThreadPoolExecutor(
        1, initializer=speedrun.keep_to_next, initargs=(iter([[mine]]),)
    ) as pool:
        assert pool.submit(of_a_child).result().stdout == f"[{mine}]\n"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1, 8, 5})
    assert speedrun.shares_of_cores(1) == [[1, 3, 5, 8]]
    assert speedrun.shares_of_cores(2) == [[1, 3], [5, 8]]
    assert speedrun.shares_of_cores(3) == [[1], [3], [5]]
    assert speedrun.shares_of_cores(6) == [[1], [3], [5], [8], [1], [3]]


def test_ablate_runs_each_setting_once_and_tables_it(tmp_path, capsys, monkeypatch):
    small = "--width 4 --feature_dim 16"
    settings = (
        ablate.Setting("default", small),
        ablate.Setting("no stop-gradient", f"{small} --stop_grad off", "0.1", "", True),
    )
    monkeypatch.setitem(ablate.STUDIES, "ablations", settings)  # a table, and short
    monkeypatch.setitem(ablate.STUDIES, "collapse", settings)
    flags = f"--train_size 100 --epochs 2 --seeds 3 --out {tmp_path}".split()
    ablate.command([*flags, "--study", "collapse"])
    assert (tmp_path / "collapse.png").exists()
    table = pandas.read_csv(tmp_path / "collapse.csv")
    assert table["collapses"].tolist() == [False, True]
    shutil.copytree(tmp_path / "collapse", tmp_path / "ablations")  # they would be the same runs
    begun = time.time()
    ablate.command(flags)
    out = capsys.readouterr().out
    assert "the paper's, ImageNet" in out
    models = list((tmp_path / "ablations").glob("*_model.pth"))
    assert len(models) == 2
    assert all(path.stat().st_mtime < begun for path in models)  # no run was done again
    table = pandas.read_csv(tmp_path / "ablations.csv")
    assert table["setting"].tolist() == ["default", "no stop-gradient"]
    assert table["seed"].tolist() == [3, 3]
    for i, name in enumerate(("default", "no_stop-gradient")):
        run = tmp_path / "ablations" / f"textures__100_images_2_{name}_3"
        rows = read_csv(f"{run}_statistics.csv")
        for column, theirs in (("loss", "train_loss"), ("std", "std"), ("knn", "test_acc@1")):
            assert table[column][i] == rows[-1][theirs]
        assert table["untrained_knn"][i] == rows[0]["test_acc@1"]
        args = checkpoint.load(f"{run}_model.pth")["args"]
        assert (args["stop_grad"], args["seed"]) == (["on", "off"][i], 3)
    for name in ("ablations.png", "ablations_curves.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 5

    ablate.command(flags)
    assert pandas.read_csv(tmp_path / "ablations.csv").equals(table)
    (tmp_path / "ablations" / "textures__100_images_2_default_3_statistics.csv").unlink()
    monkeypatch.setitem(ablate.STUDIES, "ablations", (ablate.Setting("default", "--bn all"),))
    with pytest.raises(RunError, match="--bn default"):  # a run of that name with other flags
        ablate.command(flags)


def test_a_run_leaves_a_clone_clean(tmp_path, monkeypatch):
    def git(*words, place=tmp_path):
        return subprocess.run(["git", *words], cwd=place, check=True, capture_output=True).stdout

    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    git("init", "--quiet")
    git("add", ".gitignore")
    monkeypatch.chdir(tmp_path)
    main.main([*TINY.split(), "--epochs", "1"])  # with the default --out
    assert len(list((tmp_path / "results").iterdir())) == 3
    assert git("status", "--short") == b"A  .gitignore\n"
    assert git("ls-files", "results", place=ROOT) == b""  # no shipped table lies where runs write


def test_features_label_as_training_and_replace_nothing_unasked(runs, tmp_path, capsys):
    """Splits are told apart, and the class of a file is the first folder of its split."""
    root, pixels = tmp_path / "images", np.zeros((32, 32, 3), np.uint8)
    for name in ("train/cat/day/1", "train/cat/2", "train/dog/3", "test/cat/4"):
        file = root / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels + len(name)).save(file)
    tables = {end: tmp_path / f"f{end}" for end in features.FORMATS}
    flags = ("--model_path", runs / "a_model.pth", "--data_root", root)
    for table in tables.values():
        features.command([*map(str, flags), "--out", str(table)])
    found = [pandas.read_csv(tables[".csv"]), pandas.read_parquet(tables[".parquet"])]
    arrays = np.load(tables[".npz"])
    found.append(
        pandas.DataFrame({name: arrays[f"{name}s"] for name in ("file", "split", "label")})
    )
    data = load_dataset("folder", root)
    classes = [data.classes[i] for i in (*data.train_labels, *data.test_labels)]
    for table in found:
        assert table["split"].tolist() == ["train"] * 3 + ["test"]
        assert table["label"].tolist() == classes == ["cat", "cat", "dog", "cat"]
        assert [path[-5:] for path in table["file"]] == ["2.png", "1.png", "3.png", "4.png"]
    door = types.SimpleNamespace(main=features.command)
    for table in tables.values():
        before = table.read_bytes()
        assert "--overwrite" in refused(capsys, door, *flags, "--out", table)
        assert table.read_bytes() == before
    again = ["--out", str(tables[".csv"]), "--overwrite"]
    features.command([*map(str, flags[:3]), f"{root}/train", *again])
    table = pandas.read_csv(tables[".csv"])
    assert "split" not in table
    assert table["label"].tolist() == ["cat", "cat", "dog"]
    features.command([*map(str, flags), "--split_names", "test", *again])
    assert pandas.read_csv(tables[".csv"])["label"].tolist() == ["cat"]
    assert "folder" in refused(capsys, door, *flags, "--out", tmp_path / "none" / "f.csv")


PROGRAM = """
import contextlib, io, os, runpy, sys
root, names = sys.argv[1], sys.argv[2:]  # names: folder/name
paths = sys.path[1:]
for way in ("script", "module"):
    for name in names:
        for module in list(sys.modules):
            if module.split(".")[0] in "utils main linear model simsiam tools studies".split():
                del sys.modules[module]
        # What Python puts first: a script's folder, or for -m the current one.
        sys.path[:] = [f"{root}/{name.split('/')[0]}" if way == "script" else root, *paths]
        sys.argv = [f"{root}/{name}.py", "--help"]
        said = io.TextIOWrapper(io.BytesIO())
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            if way == "script":
                runpy.run_path(sys.argv[0], run_name="__main__")
            else:
                runpy.run_module(name.replace("/", "."), run_name="__main__")
        said.seek(0)
        print(way, name, said.read().split()[:2])
"""


def test_tools_run_as_scripts_and_as_modules(tmp_path):
    """From any folder, as `python tools/plot.py`, and as `python -m tools.plot`."""
    names = [
        f"tools/{name}" for name in "bench convert features plot similar transfer worth".split()
    ]
    names += ["studies/ablate", "studies/scores", "studies/speedrun"]
    command = [sys.executable, "-c", PROGRAM, ROOT, *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    wanted = [
        f"{way} {name} ['usage:', '{name.replace('/', '.')}']" for way in WAYS for name in names
    ]
    assert done.stdout.splitlines() == wanted, done.stderr


def test_profile_writes_a_trace_and_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench.command(["profile", "--trace", "trace.json", *TINY.split()])
    out = capsys.readouterr().out
    assert "Self CPU" in out
    assert "3 steps; wrote trace.json" in out
    events = {
        event.get("name")
        for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    }
    assert "aten::conv2d" in events
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    for wrong in (["none"], ["views", "--data_name", "textures"]):
        with pytest.raises(SystemExit) as stop:
            bench.command(wrong)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_bench_start_gets_to_the_first_step(tmp_path):
    small = "--train_size 128 --width 4 --batch_size 64".split()
    command = [sys.executable, "-c", bench.STAGES, tmp_path, *small]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    stages = [line.split(maxsplit=2)[1:] for line in out.splitlines() if line[:6] == "STAGE "]
    when = [float(seconds) for seconds, _ in stages]
    assert when == sorted(when)
    names = [name for _, name in stages]
    assert (names[0], names[-1]) == ("python", "first step")
    assert {"network", "images"} < set(names)


def test_bench_gpu_runs_on_a_cpu(tmp_path):
    """Small, so that it cannot rot; its rows tell the device, and rows of another one stay."""
    path = tmp_path / "b.csv"
    other = {"benchmark": "gpu views", "ours": "1", "unit": "views/s", "device": "Some GPU"}
    pandas.DataFrame([other], columns=bench.COLUMNS).to_csv(path, index=False)
    bench.command(["gpu", "--device", "cpu", "--csv", str(path), "--quick"])
    table = pandas.read_csv(path).set_index(["device", "benchmark"])
    assert table.loc[("Some GPU", "gpu views"), "ours"] == 1
    rows = table.loc["cpu"]
    assert (rows["ours"] > 0).all()
    # Views are read as bytes and written as fp32: 5 bytes a number of 3 x 32 x 32.
    views, traffic = rows.loc["gpu views", "ours"], rows.loc["gpu views: read and written"]
    assert traffic["ours"] == pytest.approx(views * 5 * 3 * 32 * 32, rel=1e-4)
    assert traffic["peer"] == pytest.approx(rows.loc["gpu: a copy", "ours"], rel=1e-4)
    # ResNet-8 of width 8: each step is 2 views, forward and twice that backward, 2 FLOP each.
    net = SimSiam("resnet8", feature_dim=64, width=8)
    flop = 2 * 2 * 3 * params_and_flops(net, 32)[1]
    speed, rate = (rows.loc[f"gpu step, off{end}", "ours"] for end in ("", ": FLOP/s"))
    assert rate == pytest.approx(speed * flop, rel=1e-4)
