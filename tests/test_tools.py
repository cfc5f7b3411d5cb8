"""tools.plot, features and bench, studies.ablate and speedrun, on runs of a few seconds."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas
import pytest
import torch
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of main.py and one of linear.py, without pictures."""
    folder = tmp_path_factory.mktemp("runs")
    for name in "ab":
        flags = f"{TINY} --epochs 2 --seed {ord(name)} --out {folder} --name {name}"
        main.main(flags.split())
    flags = f"--model_path {folder}/a_model.pth --out {folder} --epochs 2 --cached --no-pictures"
    linear.main(f"{flags} --name a_linear".split())
    return folder


def pixels(path):
    return np.asarray(Image.open(path))


# ---- tools.plot ---------------------------------------------------------------------------------


def test_plot_draws_what_the_runs_themselves_draw(runs, tmp_path, capsys):
    before = {path: path.read_bytes() for path in runs.iterdir()}
    plot.command([str(runs / "a_model.pth")])
    assert {path: path.read_bytes() for path in before} == before
    names = {path.name for path in runs.glob("a_*.png")}
    assert names == {f"a_{name}.png" for name in "confusion curves embedding neighbours".split()}
    capsys.readouterr()
    plot.command([str(runs / "a_linear_model.pth")])
    assert "--evaluate_only" in capsys.readouterr().out
    for name in ("a", "a_linear"):
        shutil.copy(runs / f"{name}_model.pth", tmp_path)
    main.main(f"--resume {tmp_path}/a_model.pth --pictures".split())
    linear.main(f"--resume {tmp_path}/a_linear_model.pth --pictures".split())
    for name in ("a_confusion", "a_neighbours", "a_curves", "a_linear_curves"):
        assert np.array_equal(pixels(tmp_path / f"{name}.png"), pixels(runs / f"{name}.png"))


def picture_format(path):
    """The format of a picture, by its first bytes."""
    start = path.read_bytes()[:12]
    formats = {b"\x89PNG": "png", b"%PDF": "pdf", b"<?xm": "svg", b"\xff\xd8\xff\xe0": "jpg"}
    return formats.get(start[:4]) or start[8:].decode().lower()


def test_plot_from_tables(runs, tmp_path, capsys):
    """It replaces no picture unasked, and the ending of a picture is its format."""
    for name in ("a_statistics.csv", "b_statistics.csv"):
        shutil.copy(runs / name, tmp_path)
    curves = tmp_path / "a_curves.png"
    curves.write_bytes(b"a better one")
    err = refused(capsys, plot.command, tmp_path / "a")
    assert str(curves) in err
    assert "--overwrite" in err
    assert curves.read_bytes() == b"a better one"
    plot.command([f"{tmp_path}/a", "--overwrite"])
    assert f"{tmp_path}/a_model.pth" in capsys.readouterr().out
    assert picture_format(curves) == "png"
    both = [f"{tmp_path}/a", f"{tmp_path}/b_statistics.csv"]
    for ending in ("png", "PDF", "svg", "jpg", "webp"):
        out = tmp_path / f"x.{ending}"
        plot.command([*both, "--out", str(out)])
        assert picture_format(out) == ending.lower()
        assert str(out) in refused(capsys, plot.command, *both, "--out", out)
    for flags, word in (
        ((*both, "--out", f"{tmp_path}/y.xyz"), ".pdf"),
        ((*both, "--out", f"{tmp_path}/y"), ".pdf"),
        ((f"{tmp_path}/none",), "none"),
        ((both[0], "--out", f"{tmp_path}/c.png"), "--out"),
        ((*both, "--data_root", "x"), "--data_root"),
    ):
        assert word in refused(capsys, plot.command, *flags)


def test_plot_tells_runs_of_one_name_apart_by_their_folders():
    names = plot.unique_names(["/x/1/run", "/x/2/run", "/y/2/run", "/y/a"])
    assert list(names.values()) == ["1/run", "x/2/run", "y/2/run", "a"]


def test_plot_names_a_damaged_table(tmp_path, capsys):
    table = tmp_path / "a_statistics.csv"
    header = b"epoch,lr,train_loss,std,rank\n"
    for content, word in (
        (b"", ""),
        (b"name,size\na,1\n", ""),
        (header + b"1,0.1,-0.5,1,2,3,4\n2,0.1\n", ""),
        (header + b"1,0.1,much,1,2\n", "train_loss much"),
        (header + b"one,0.1,-0.5,1,2\n", "epoch one"),
        (header + b"1e300,0.1,-0.5,1,2\n", "epoch 1e+300"),
        (header + b"1,0.1,inf,1,2\n", "train_loss inf"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", ""),
    ):
        table.write_bytes(content)
        err = refused(capsys, plot.command, tmp_path / "a")
        assert "a_statistics.csv: " in err
        assert word in err
        assert not (tmp_path / "a_curves.png").exists()


def test_plot_refuses_other_images_than_the_run_s(runs, tmp_path, capsys):
    state = torch.load(runs / "b_model.pth")
    torch.save(state | {"images_checksum": 1}, tmp_path / "b_model.pth")
    assert "--data_root" in refused(capsys, plot.command, tmp_path / "b")


# ---- studies ------------------------------------------------------------------------------------


def test_speedrun_trains_each_contender_for_its_minutes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the tool sets it; undone at the end
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # or threads spin on busy cores
    flags = "--train_size 200 --width 4 --budget 0.02 --points 2 --out".split()
    recipe = "fast --feature_dim 16 --batch_size 32"
    speedrun.command([recipe, "plain", *flags, str(tmp_path)])
    rows, out = read_csv(tmp_path / "speedrun.csv"), capsys.readouterr().out
    assert [row["recipe"] for row in rows] == [recipe, "plain"]
    assert f"plain, seed 0: {rows[1]['seconds'] / 60:.1f} minutes so far, kNN " in out
    for row, batch_size in zip(rows, (32, 128), strict=True):
        assert f"{row['recipe']}, seed 0: {row['epochs']} epochs, for 0.02 minutes\n" in out
        curve = json.loads(row["curve"])
        assert curve[-1] == pytest.approx([row["seconds"] / 60, row["knn"]], abs=0.01)
        assert row["steps"] == row["epochs"] * (200 // batch_size)
        assert row["images"] == row["steps"] * batch_size
        assert row["seconds"] > 60 * 0.02 / 4  # the estimate from so few steps is rough
        net = SimSiam("resnet8", feature_dim=int(row["feature_dim"]), width=4)
        schedule = (16, 20, 24) if batch_size == 32 else (32,)
        sizes = [schedule[i * len(schedule) // row["epochs"]] for i in range(row["epochs"])]
        flops = sum(2 * params_and_flops(net, size)[1] for size in sizes)
        images = row["images"] / row["epochs"]
        assert row["tera_adds"] == pytest.approx(flops * images / 1e12, rel=1e-5)
    statistics = read_csv(
        tmp_path / "speedrun" / "fast_feature_dim_16_batch_size_32_0_0_02_statistics.csv"
    )
    assert len(statistics) == 1 + rows[0]["epochs"]
    assert rows[0]["epochs"] >= 3  # one of each size
    assert statistics[-1]["test_acc@1"] == pytest.approx(rows[0]["knn"])
    assert 0 < rows[0]["linear"] <= 100
    assert f"--epochs {rows[0]['epochs']}" in rows[0]["command"]
    (tmp_path / "speedrun.png").unlink()
    speedrun.command([recipe, *flags, str(tmp_path)])  # trains nothing, but draws
    assert read_csv(tmp_path / "speedrun.csv") == rows
    assert Image.open(tmp_path / "speedrun.png").size[0] > 800
    for wrong, word in (("slow", "slow"), ("plain --lr 1", "plain"), ("fast --lr x", "--lr")):
        assert word in refused(capsys, speedrun.command, wrong, *flags, tmp_path)


def test_ablate_runs_each_setting_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the study sets it; undone at the end
    small = "--width 4 --feature_dim 16"
    settings = (
        ablate.Setting("default", small),
        ablate.Setting("no stop-gradient", f"{small} --stop_grad off", "0.1", "", True),
    )
    for study in ("ablations", "collapse"):
        monkeypatch.setitem(ablate.STUDIES, study, settings)
    flags = f"--train_size 100 --epochs 2 --seeds 3 --out {tmp_path}".split()
    ablate.command([*flags, "--study", "collapse"])
    assert pandas.read_csv(tmp_path / "collapse.csv")["collapses"].tolist() == [False, True]
    shutil.copytree(tmp_path / "collapse", tmp_path / "ablations")  # the same runs
    start = time.time()
    ablate.command(flags)
    models = list((tmp_path / "ablations").glob("*_model.pth"))
    assert len(models) == 2
    assert all(path.stat().st_mtime < start for path in models)
    table = pandas.read_csv(tmp_path / "ablations.csv")
    assert table["setting"].tolist() == ["default", "no stop-gradient"]
    assert table["seed"].tolist() == [3, 3]
    for i, name in enumerate(("default", "no_stop-gradient")):
        run = tmp_path / "ablations" / f"textures__100_images_2_{name}_3"
        rows = read_csv(f"{run}_statistics.csv")
        for column, statistic in (("loss", "train_loss"), ("std", "std"), ("knn", "test_acc@1")):
            assert table[column][i] == rows[-1][statistic]
        assert table["untrained_knn"][i] == rows[0]["test_acc@1"]
        config = checkpoint.load(f"{run}_model.pth")["config"]
        assert (config.stop_grad, config.seed) == (["on", "off"][i], 3)
    for name in ("ablations.png", "ablations_curves.png", "collapse.png"):
        assert pixels(tmp_path / name).std() > 5
    ablate.command(flags)
    assert pandas.read_csv(tmp_path / "ablations.csv").equals(table)
    (tmp_path / "ablations" / "textures__100_images_2_default_3_statistics.csv").unlink()
    monkeypatch.setitem(ablate.STUDIES, "ablations", (ablate.Setting("default", "--bn all"),))
    with pytest.raises(RunError, match="--bn"):  # a run of that name with other flags
        ablate.command(flags)


# ---- tools.features -----------------------------------------------------------------------------


def test_features_have_the_labels_of_training(runs, tmp_path, capsys):
    """Splits are told apart, and the class of a file is the first folder of its split."""
    root, image = tmp_path / "images", np.zeros((32, 32, 3), np.uint8)
    for name in ("train/cat/day/1", "train/cat/2", "train/dog/3", "test/cat/4"):
        file = root / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image + len(name)).save(file)
    paths = {ending: tmp_path / f"f{ending}" for ending in features.FORMATS}
    flags = ("--model_path", runs / "a_model.pth", "--data_root", root)
    for path in paths.values():
        features.command([*map(str, flags), "--out", str(path)])
    arrays = np.load(paths[".npz"])
    tables = [
        pandas.read_csv(paths[".csv"]),
        pandas.read_parquet(paths[".parquet"]),
        pandas.DataFrame({name: arrays[f"{name}s"] for name in ("file", "split", "label")}),
    ]
    data = load_dataset("folder", root)
    classes = [data.classes[i] for i in (*data.train_labels, *data.test_labels)]
    for table in tables:
        assert table["split"].tolist() == ["train"] * 3 + ["test"]
        assert table["label"].tolist() == classes == ["cat", "cat", "dog", "cat"]
        assert [path[-5:] for path in table["file"]] == ["2.png", "1.png", "3.png", "4.png"]
    for path in paths.values():
        before = path.read_bytes()
        assert "--overwrite" in refused(capsys, features.command, *flags, "--out", path)
        assert path.read_bytes() == before
    flags = (*flags[:3], root / "train", "--out", paths[".csv"], "--overwrite")
    features.command([*map(str, flags)])
    table = pandas.read_csv(paths[".csv"])
    assert "split" not in table
    assert table["label"].tolist() == ["cat", "cat", "dog"]


# ---- all tools ----------------------------------------------------------------------------------

PROGRAM = """
import contextlib, io, runpy, sys
root, *names = sys.argv[1:]
paths = sys.path[1:]
for name in names:
    for module in list(sys.modules):
        if module.split(".")[0] in "utils main linear model simsiam tools studies".split():
            del sys.modules[module]
    sys.path[:] = [f"{root}/{name.split('/')[0]}", *paths]  # what Python puts first
    sys.argv = [f"{root}/{name}.py", "--help"]
    output = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    output.seek(0)
    print(output.read().split()[1])
"""


def test_tools_run_as_scripts(tmp_path):
    """From any folder, as `python tools/plot.py`."""
    names = [
        f"tools/{name}" for name in "bench convert features plot similar transfer worth".split()
    ]
    names += ["studies/ablate", "studies/scores", "studies/speedrun"]
    command = [sys.executable, "-c", PROGRAM, ROOT, *names]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout.split() == [name.replace("/", ".") for name in names], process.stderr


# ---- tools.bench --------------------------------------------------------------------------------


def test_profile_writes_a_trace_and_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench.command(["profile", "--trace", "trace.json", *TINY.split()])
    out = capsys.readouterr().out
    assert "Self CPU" in out
    assert "3 steps; wrote trace.json" in out
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert "aten::conv2d" in {event.get("name") for event in trace["traceEvents"]}
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    assert "none" in refused(capsys, bench.command, "none")
    assert "--data_name" in refused(capsys, bench.command, "views", "--data_name", "textures")


def test_bench_start_gets_to_the_first_step(tmp_path):
    small = "--train_size 128 --width 4 --batch_size 64".split()
    command = [sys.executable, "-c", bench.STAGES, tmp_path, *small]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    stages = [line.split(maxsplit=2)[1:] for line in out.splitlines() if line[:6] == "STAGE "]
    times = [float(seconds) for seconds, _ in stages]
    assert times == sorted(times)
    names = [name for _, name in stages]
    assert (names[0], names[-1]) == ("python", "first step")
    assert {"network", "images"} < set(names)


def test_bench_gpu_runs_on_a_cpu(tmp_path):
    """Its rows name the device, and rows of another device stay in the table."""
    path = tmp_path / "b.csv"
    other = {"benchmark": "gpu views", "ours": "1", "unit": "views/s", "device": "Some GPU"}
    pandas.DataFrame([other], columns=bench.COLUMNS).to_csv(path, index=False)
    bench.command(["gpu", "--device", "cpu", "--csv", str(path), "--quick"])
    table = pandas.read_csv(path).set_index(["device", "benchmark"])
    assert table.loc[("Some GPU", "gpu views"), "ours"] == 1
    rows = table.loc["cpu"]
    assert (rows["ours"] > 0).all()
    # A view of 3 x 32 x 32 is read as bytes and written as fp32: 5 bytes per number.
    views, traffic = rows.loc["gpu views", "ours"], rows.loc["gpu views: read and written"]
    assert traffic["ours"] == pytest.approx(views * 5 * 3 * 32 * 32, rel=1e-4)
    assert traffic["peer"] == pytest.approx(rows.loc["gpu: a copy", "ours"], rel=1e-4)
    # ResNet-8 of width 8: two views, forward and twice that backward, 2 FLOP per multiply-add.
    net = SimSiam("resnet8", feature_dim=64, width=8)
    flop = 2 * 2 * 3 * params_and_flops(net, 32)[1]
    speed, rate = (rows.loc[f"gpu step, off{suffix}", "ours"] for suffix in ("", ": FLOP/s"))
    assert rate == pytest.approx(speed * flop, rel=1e-4)
