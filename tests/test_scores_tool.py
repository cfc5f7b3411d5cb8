"""studies.scores: rho by hand, the rows against the library, and what is not done again."""

import math
import types

import pandas
import pytest
import torch

import main
from simsiam.data.datasets import load_dataset
from simsiam.evaluation import scores as library
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.views.augment import Augmentation, Views
from studies import scores
from tests import crash, helpers

DOOR = types.SimpleNamespace(main=scores.command)
OFF = torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)


def run(knn, data="a", warned=False, **more):
    same = dict.fromkeys(scores.BETTER, 1.0)
    return {"data": data, "warned": warned, "knn": knn} | same | more


def rho(rows):
    return {(row["data"], row["runs"], row["score"]): row for row in scores.correlations(rows)}


def test_rho_by_hand():
    """LiDAR orders five runs as the kNN does, the loss the other way, of RankMe two are swapped.

    Those two are neighbours: rho is 1 - 6 * (1 + 1) / (5 * 24) = 0.9.
    """
    rankme = [1, 2, 4, 3, 5]
    rows = [run(i, lidar=i**3, loss=i - 9.0, rankme=rankme[i]) for i in range(5)]
    found = rho(rows)
    assert found["a", "all", "lidar"]["rho"] == pytest.approx(1)
    assert found["a", "all", "lidar"]["low"] == pytest.approx(1)
    assert found["a", "all", "loss"]["rho"] == pytest.approx(-1)  # the lower, the better, is said
    assert found["a", "all", "rankme"]["rho"] == pytest.approx(0.9)
    assert found["a", "all", "rankme"]["low"] < 0.9 <= found["a", "all", "rankme"]["high"]
    assert math.isnan(found["a", "all", "std"]["rho"])  # all the same
    assert math.isnan(found["a", "all", "loss, lidar"]["rho"])  # opposite ranks: all the same
    assert found["a", "all", "loss"]["number"] == 5


def test_a_run_that_was_made_twice_counts_once():
    rows = [run(i, lidar=[1, 2, 4, 3, 5][i]) for i in range(5)]
    found, twice = rho(rows), rho([*rows, *rows[2:], run(0, "b")])
    assert str(twice) == str(found)  # nan is not nan
    assert found["a", "all", "lidar"]["number"] == 5


def test_alpha_is_best_near_one_and_no_number_is_worst():
    """From the worst: none, 3, 0, 1.5, 1."""
    alphas = [math.nan, 3.0, 0.0, 1.5, 1.0]
    rows = [run(knn, alpha_req=alpha) for knn, alpha in enumerate(alphas)]
    assert rho(rows)["a", "all", "alpha_req"]["rho"] == pytest.approx(1)
    del rows[0]["alpha_req"]  # as a blank cell is read
    assert rho(rows)["a", "all", "alpha_req"]["rho"] == pytest.approx(1)


def test_runs_with_a_warning_and_of_other_data_are_told_apart():
    healthy = [run(i, lidar=-i) for i in range(5)]
    warned = [run(-i, lidar=-9.0 - i, warned=True) for i in range(1, 40)]
    few = [run(i, data="b") for i in range(4)]
    unscored = [run(math.nan, data="c") for i in range(9)]
    found = rho(healthy + warned + few + unscored)
    assert {key[:2] for key in found} == {("a", "all"), ("a", "no warning")}
    assert found["a", "no warning", "lidar"]["rho"] == pytest.approx(-1)
    assert found["a", "all", "lidar"]["rho"] > 0.9
    assert found["a", "all", "lidar"]["number"] == 44


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    flags = "--data_name textures --train_size 200 --width 4 --feature_dim 16 --epochs 1"
    for seed in range(5):
        main.main(f"{flags} --no-pictures --out {out} --seed {seed} --name {seed}".split())
    return [str(out / f"{seed}_model.pth") for seed in range(5)]


def test_a_table_of_runs_is_the_library_s_and_is_gone_on_with(runs, tmp_path, capsys):
    out = tmp_path / "found.csv"
    scores.command([*runs[:2], "--out", str(out), "--amp", "off"])
    assert "give 5 runs or more" in capsys.readouterr().out
    table = pandas.read_csv(out)
    assert table.columns.tolist() == list(scores.COLUMNS)
    assert table["data"].tolist() == ["textures, 200 images"] * 2
    source = LoadedCheckpoint.open(runs[1])
    views = Views(32, *(source.encoder[key] for key in ("mean", "std")), Augmentation())
    images = load_dataset("textures", "").subset(200, 1).train_images
    wanted = library.unlabelled_scores(source.net, views, images, OFF, 0)
    for name, value in wanted.items():
        assert table[name][1] == pytest.approx(value, rel=1e-4, nan_ok=True), name
    end = source.state["history"][-1]
    assert table["loss"][1] == pytest.approx(end["train_loss"], rel=1e-4)
    assert table["knn"][1] == pytest.approx(end["test_acc@1"])
    table.loc[0, "lidar"] = 77.0
    table.to_csv(out, index=False)
    scores.command([*runs, "--out", str(out)])
    assert pandas.read_csv(out)["lidar"][0] == 77  # was there
    found = pandas.read_csv(tmp_path / "found_rho.csv")
    assert set(found["runs"]) == {"all"}
    assert set(found["number"]) == {5}


def test_images_that_are_read_otherwise_are_read_again(tmp_path):
    """Two runs on one folder, with other levels: the second's scores are of its own images."""
    crash.make_folder(tmp_path / "images", 40, 10)
    flags = f"--data_name folder --data_root {tmp_path}/images --width 4 --epochs 1"
    for name, levels in (("a", "0 255"), ("b", "0 60")):
        more = (
            f"--recipe short --feature_dim 16 --batch_size 20 --k 5 --levels {levels} --name {name}"
        )
        main.main(f"{flags} {more} --no-pictures --out {tmp_path}".split())
    models = [f"{tmp_path}/{name}_model.pth" for name in "ab"]
    scores.command([*models, "--out", f"{tmp_path}/both.csv"])
    scores.command([models[1], "--out", f"{tmp_path}/alone.csv"])
    both, alone = (pandas.read_csv(tmp_path / f"{name}.csv") for name in ("both", "alone"))
    assert both.iloc[1].equals(alone.iloc[0])


def test_bad_input_is_one_line(runs, tmp_path, capsys):
    out = tmp_path / "other.csv"
    assert "nowhere.pth" in helpers.refused(capsys, DOOR, "nowhere.pth", "--out", out)
    foreign = tmp_path / "weights.pth"
    torch.save(LoadedCheckpoint.open(runs[0]).net.state_dict(), foreign)
    err = helpers.refused(capsys, DOOR, foreign, "--out", out)
    assert f"{foreign}: give a checkpoint of main.py" in err
    assert not out.exists()
    out.write_text("a,b\n1,2\n")
    assert "is another table" in helpers.refused(capsys, DOOR, runs[0], "--out", out)
    assert out.read_text() == "a,b\n1,2\n"
