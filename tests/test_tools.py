"""tools.plot and tools.ablate: what they draw and write is of the runs."""

import shutil

import numpy as np
import pandas
import pytest
from PIL import Image

import linear
import main
import utils
from tools import ablate, plot

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


def test_plot_draws_a_run_from_its_checkpoint(runs, capsys):
    before = {path: path.read_bytes() for path in runs.iterdir()}
    plot.command([str(runs / "a_model.pth")])
    assert "wrote" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    drawn = sorted(path.name for path in runs.glob("a_*.png"))
    assert drawn == [f"a_{name}.png" for name in "confusion curves embedding neighbours".split()]
    plot.command([str(runs / "a_linear_model.pth")])
    assert (runs / "a_linear_confusion.png").exists()
    assert (runs / "a_linear_curves.png").exists()


def test_plot_lays_runs_over_one_another(runs, capsys, monkeypatch):
    found = []
    real = plot.figures.curves
    monkeypatch.setattr(
        plot.figures, "curves", lambda runs, file: found.append(runs) or real(runs, file)
    )
    plot.command([f"{runs}/a", f"{runs}/b_statistics.csv", "--out", f"{runs}/both.png"])
    assert Image.open(runs / "both.png").size[0] > 1000
    for name in "ab":
        table = pandas.read_csv(runs / f"{name}_statistics.csv")
        rows = found[0][name]
        assert [row["rank"] for row in rows] == table["rank"].tolist()
        assert "train_loss" not in rows[0]
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
    monkeypatch.setitem(ablate.STUDIES, "ablations", settings)
    monkeypatch.setitem(ablate.STUDIES, "collapse", settings)
    flags = f"--train_size 100 --epochs 2 --seeds 3 --out {tmp_path}".split()
    ablate.command([*flags, "--study", "collapse"])
    assert (tmp_path / "collapse.png").exists()
    table = pandas.read_csv(tmp_path / "collapse.csv")
    assert table["collapses"].tolist() == [False, True]
    shutil.copytree(tmp_path / "collapse", tmp_path / "ablations")  # they would be the same runs

    def no_more(*args, **kwargs):
        raise AssertionError("a run was done again")

    monkeypatch.setattr(ablate.subprocess, "Popen", no_more)
    ablate.command(flags)
    out = capsys.readouterr().out
    assert "the paper's, ImageNet" in out
    table = pandas.read_csv(tmp_path / "ablations.csv")
    assert table["setting"].tolist() == ["default", "no stop-gradient"]
    assert table["seed"].tolist() == [3, 3]
    for i, name in enumerate(("default", "no_stop-gradient")):
        run = tmp_path / "ablations" / f"textures__100_images_2_{name}_3"
        rows = utils.read_csv(f"{run}_statistics.csv")
        for column, theirs in (("loss", "train_loss"), ("std", "std"), ("knn", "test_acc@1")):
            assert table[column][i] == rows[-1][theirs]
        assert table["untrained_knn"][i] == rows[0]["test_acc@1"]
        args = utils.load_checkpoint(f"{run}_model.pth")["args"]
        assert (args["stop_grad"], args["seed"]) == (["on", "off"][i], 3)
    assert np.asarray(Image.open(tmp_path / "ablations.png")).std() > 5

    ablate.command(flags)
    assert pandas.read_csv(tmp_path / "ablations.csv").equals(table)
    monkeypatch.undo()
    (tmp_path / "ablations" / "textures__100_images_2_default_3_statistics.csv").unlink()
    monkeypatch.setattr(ablate, "STUDIES", {"ablations": (ablate.Setting("default", "--bn all"),)})
    with pytest.raises(utils.RunError, match="--bn default"):  # a run of that name with other flags
        ablate.command(flags)
