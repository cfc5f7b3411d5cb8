"""tools.plot, tools.ablate and tools.bench: what they draw and write is of the runs."""

import json
import shutil
import subprocess
import time

import numpy as np
import pandas
import pytest
from PIL import Image

import linear
import main
from simsiam import checkpoint
from simsiam.files import RunError, read_csv
from tests.helpers import ROOT
from tools import ablate, bench, plot

TINY = (
    "--data_name textures --train_size 200 --width 4 --feature_dim 16 --batch_size 32 --no-pictures"
)


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
    assert (runs / "a_linear_curves.png").exists()
    # They are the pictures that the run itself would have drawn.
    shutil.copy(runs / "a_model.pth", tmp_path)
    main.main(f"--resume {tmp_path}/a_model.pth --pictures".split())
    for name in ("confusion", "neighbours"):
        drawn = np.asarray(Image.open(tmp_path / f"a_{name}.png"))
        assert np.array_equal(drawn, np.asarray(Image.open(runs / f"a_{name}.png")))


def test_plot_lays_runs_over_one_another(runs, capsys):
    plot.command([f"{runs}/a", f"{runs}/b_statistics.csv", "--out", f"{runs}/both.png"])
    both = np.asarray(Image.open(runs / "both.png"))
    assert both.shape[1] > 1000
    plot.command([f"{runs}/a", f"{runs}/a_statistics.csv", "--out", f"{runs}/same.png"])
    assert not np.array_equal(both, np.asarray(Image.open(runs / "same.png")))
    (runs / "b_model.pth").rename(runs / "c_model.pth")  # only the table is left
    plot.command([f"{runs}/b"])
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
