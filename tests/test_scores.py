"""studies.scores: scores by hand, against plain formulas and lightly; rho by hand; its tables."""

import math
import types

import numpy as np
import pandas
import pytest
import torch
from lightly.loss.hypersphere_loss import HypersphereLoss

import main
from simsiam.data.datasets import load_dataset
from simsiam.evaluation import metrics
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.views.augment import Augmentation, Views
from studies import scores
from tests import helpers

COMMAND = types.SimpleNamespace(main=scores.command)
OFF = torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """The bootstrap takes most of these tests' time."""
    monkeypatch.setattr(scores, "RESAMPLES", 100)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- LiDAR --------------------------------------------------------------------------------------


def test_lidar_by_hand():
    """Along two axes the scatter of means is 9/2 and 4/2, that of views 2/2 and 3/2; delta 1/2.

    The eigenvalues are 4.5 / (1 + 0.5) = 3 and 2 / (1.5 + 0.5) = 1.
    """
    means = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    root2, root3 = 2**0.5, 3**0.5
    around = torch.tensor([[root2, 0.0], [-root2, 0.0], [0.0, root3], [0.0, -root3]])
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    score = scores.lidar(means[:, None] + around, delta=0.5)
    assert score == pytest.approx(math.exp(entropy), rel=1e-5)


@pytest.mark.parametrize(("n", "q", "d"), [(300, 3, 6), (6, 2, 20)])  # 300: two chunks
def test_lidar_equals_the_paper_s_formulas(n, q, d):
    scale = torch.linspace(0.1, 3, d)
    features = random(n, 1, d) * scale + random(n, q, d, seed=1) * scale.flip(0) * 0.3
    x = features.double().numpy()
    means = x.mean(1)
    between, within = np.zeros((d, d)), np.zeros((d, d))
    for i in range(n):
        between += np.outer(means[i] - means.mean(0), means[i] - means.mean(0)) / n
        for j in range(q):
            within += np.outer(x[i, j] - means[i], x[i, j] - means[i]) / (n * q)
    values, vectors = np.linalg.eigh(within + 1e-4 * np.eye(d))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    spectrum = np.linalg.eigh(root @ between @ root)[0].clip(0)
    p = spectrum / spectrum.sum() + 1e-7
    assert scores.lidar(features) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_lidar_of_equal_features_is_nan():
    assert math.isnan(scores.lidar(torch.ones(4, 3, 2)))


# ---- alpha-ReQ ----------------------------------------------------------------------------------


def with_spectrum(values, n=400):
    """Features whose covariance has these eigenvalues, rotated, and with a mean of 3."""
    d = len(values)
    columns = random(n, d).double()
    columns = torch.linalg.qr(columns - columns.mean(0)).Q * n**0.5  # covariance: the identity
    rotation = torch.linalg.qr(random(d, d, seed=9).double()).Q
    return columns * values.double().sqrt() @ rotation + 3


@pytest.mark.parametrize("alpha", [0.5, 1.5])
def test_alpha_of_a_power_law(alpha):
    spectrum = torch.arange(1, 131).double() ** -alpha
    assert scores.alpha_req(with_spectrum(spectrum)) == pytest.approx(alpha, rel=1e-6)
    assert scores.alpha_req(with_spectrum(spectrum[:20])) == pytest.approx(alpha, rel=1e-6)


def test_alpha_ignores_eigenvalues_that_are_rounding_errors():
    x = with_spectrum(torch.arange(1, 31).double() ** -1.5)
    dead_channels = torch.cat([x, torch.full((400, 40), 1 / 3)], dim=1)
    assert scores.alpha_req(dead_channels) == pytest.approx(1.5, rel=1e-6)
    assert scores.alpha_req(torch.cat([x, x, x], dim=1)) == pytest.approx(1.5, rel=1e-6)
    assert math.isnan(scores.alpha_req(x[:5]))  # 4 eigenvalues: one to fit to
    assert math.isfinite(scores.alpha_req(x[:6]))


# ---- uniformity ---------------------------------------------------------------------------------


def test_uniformity_by_hand():
    ends = torch.tensor([[3.0, 0.0], [-0.5, 0.0]])
    assert scores.uniformity(ends) == pytest.approx(-8)  # t |a - b|^2 = 2 * 4
    cross = torch.cat([torch.eye(2), -torch.eye(2)])  # 2 pairs of ends, 4 right angles
    expected = math.log((2 * math.exp(-8) + 4 * math.exp(-4)) / 6)
    assert scores.uniformity(cross) == pytest.approx(expected)
    assert scores.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)
    assert scores.uniformity(ends, t=1000) == pytest.approx(-4000)  # exp(-4000) is 0 in fp64


def test_alignment_and_uniformity_equal_lightly_s():
    x, y = random(50, 6), random(50, 6, seed=1)
    reference = HypersphereLoss(t=2.0, lam=1.0, alpha=2.0)(x.double(), y.double()).item()
    uniform = (scores.uniformity(x) + scores.uniformity(y)) / 2
    assert metrics.alignment(x, y) + uniform == pytest.approx(reference, rel=1e-9)


# ---- correlations -------------------------------------------------------------------------------


def row(knn, data="a", warned=False, **values):
    return {"data": data, "warned": warned, "knn": knn} | dict.fromkeys(scores.SIGNS, 1.0) | values


def rho(rows):
    return {(row["data"], row["runs"], row["score"]): row for row in scores.correlations(rows)}


def test_rho_by_hand():
    """LiDAR orders five runs as the kNN does, the loss the other way, RankMe swaps two neighbours.

    Then rho is 1 - 6 * (1 + 1) / (5 * 24) = 0.9.
    """
    rankme = [1, 2, 4, 3, 5]
    rows = [row(i, lidar=i**3, loss=i - 9.0, rankme=rankme[i]) for i in range(5)]
    table = rho(rows)
    assert table["a", "all", "lidar"]["rho"] == pytest.approx(1)
    assert table["a", "all", "lidar"]["low"] == pytest.approx(1)
    assert table["a", "all", "loss"]["rho"] == pytest.approx(-1)  # a lower loss is better
    assert table["a", "all", "rankme"]["rho"] == pytest.approx(0.9)
    assert table["a", "all", "rankme"]["low"] < 0.9 <= table["a", "all", "rankme"]["high"]
    assert math.isnan(table["a", "all", "std"]["rho"])  # the same in all runs
    assert math.isnan(table["a", "all", "loss, lidar"]["rho"])  # so are the sums of the ranks
    again = rho([*rows, *rows[2:], row(0, "b")])
    assert str(again) == str(table)  # a run that was made twice counts once; nan is not nan


def test_alpha_is_best_near_one_and_nan_is_worst():
    alphas = [math.nan, 3.0, 0.0, 1.5, 1.0]  # from the worst to the best
    rows = [row(knn, alpha_req=alpha) for knn, alpha in enumerate(alphas)]
    assert rho(rows)["a", "all", "alpha_req"]["rho"] == pytest.approx(1)
    del rows[0]["alpha_req"]  # a blank cell of a table
    assert rho(rows)["a", "all", "alpha_req"]["rho"] == pytest.approx(1)


def test_groups_of_runs():
    """Runs with a warning, of other data, and without a kNN."""
    healthy = [row(i, lidar=-i) for i in range(5)]
    warned = [row(-i, lidar=-9.0 - i, warned=True) for i in range(1, 40)]
    few = [row(i, data="b") for i in range(4)]
    unscored = [row(math.nan, data="c") for i in range(9)]
    table = rho(healthy + warned + few + unscored)
    assert {key[:2] for key in table} == {("a", "all"), ("a", "no warning")}
    assert table["a", "no warning", "lidar"]["rho"] == pytest.approx(-1)
    assert table["a", "all", "lidar"]["rho"] > 0.9
    assert table["a", "all", "lidar"]["number"] == 44


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    flags = "--data_name textures --train_size 200 --width 4 --feature_dim 16 --epochs 1"
    for seed in range(3):
        main.main(f"{flags} --no-pictures --out {out} --seed {seed} --name {seed}".split())
    return [str(out / f"{seed}_model.pth") for seed in range(3)]


def test_the_table_and_its_continuation(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "MIN_RUNS", 3)
    out = tmp_path / "table.csv"
    scores.command([*runs[:2], "--out", str(out), "--amp", "off"])
    assert not (tmp_path / "table_rho.csv").exists()  # two runs are too few
    table = pandas.read_csv(out)
    assert table.columns.tolist() == list(scores.COLUMNS)
    assert table["data"].tolist() == ["textures, 200 images"] * 2
    source = LoadedCheckpoint.open(runs[1])
    views = Views(32, *(source.encoder[key] for key in ("mean", "std")), Augmentation())
    images = load_dataset("textures", "").subset(200, 1).train_images
    bank = metrics.extract_features(source.net.backbone, views.eval_transform, images, OFF)
    assert table["rankme"][1] == pytest.approx(metrics.effective_rank(bank), rel=1e-4)
    expected = scores.unlabelled_scores(source.net, views, images, OFF, 0)
    for name, value in expected.items():
        assert table[name][1] == pytest.approx(value, rel=1e-4, nan_ok=True), name
    end = source.state["history"][-1]
    assert table["loss"][1] == pytest.approx(end["train_loss"], rel=1e-4)
    assert table["knn"][1] == pytest.approx(end["test_acc@1"])
    table.loc[0, "lidar"] = 77.0
    table.to_csv(out, index=False)
    scores.command([*runs, "--out", str(out)])
    assert pandas.read_csv(out)["lidar"][0] == 77  # not computed again
    table = pandas.read_csv(tmp_path / "table_rho.csv")
    assert set(table["runs"]) == {"all"}
    assert set(table["number"]) == {3}


def test_runs_with_other_decode_options_read_their_images_again(tmp_path):
    helpers.texture_folder(tmp_path / "images", 40, 10)
    flags = f"--data_name folder --data_root {tmp_path}/images --width 4 --epochs 1 --recipe short "
    flags += f"--feature_dim 16 --batch_size 20 --k 5 --no-pictures --out {tmp_path}"
    for name, levels in (("a", "0 255"), ("b", "0 60")):
        main.main(f"{flags} --levels {levels} --name {name}".split())
    models = [f"{tmp_path}/{name}_model.pth" for name in "ab"]
    scores.command([*models, "--out", f"{tmp_path}/both.csv"])
    scores.command([models[1], "--out", f"{tmp_path}/alone.csv"])
    both, alone = (pandas.read_csv(tmp_path / f"{name}.csv") for name in ("both", "alone"))
    assert both.iloc[1].equals(alone.iloc[0])


def test_bad_input_is_one_line(runs, tmp_path, capsys):
    out = tmp_path / "other.csv"
    assert "nowhere.pth" in helpers.refused(capsys, COMMAND, "nowhere.pth", "--out", out)
    foreign = tmp_path / "weights.pth"
    torch.save(LoadedCheckpoint.open(runs[0]).net.state_dict(), foreign)
    assert str(foreign) in helpers.refused(capsys, COMMAND, foreign, "--out", out)
    assert not out.exists()
    out.write_text("a,b\n1,2\n")
    assert f"--out {out}" in helpers.refused(capsys, COMMAND, runs[0], "--out", out)
    assert out.read_text() == "a,b\n1,2\n"
