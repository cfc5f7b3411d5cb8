"""Meters that stay on the device, detection of a collapse, and the monitor of a run."""

import argparse
import dataclasses
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simsiam.data.loader import Data, evenly_spaced
from simsiam.data.textures import TEXTURE_CLASSES, make_textures
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import knn
from simsiam.training import collapse
from simsiam.training.collapse import Monitor, collapse_threshold, likely_causes
from simsiam.training.meters import Meters, TrainMeters
from simsiam.views.augment import Views

CPU = torch.device("cpu")

# ---- meters -------------------------------------------------------------------------------------


def test_meters_by_hand():
    meters = Meters(CPU, "top1", "top5")
    meters.add(loss=torch.tensor(6.0), top1=torch.tensor(1), top5=torch.tensor(3))
    meters.add(loss=torch.tensor(2.0), top1=torch.tensor(3), top5=torch.tensor(4))
    assert meters.means(8) == {"loss": 1.0, "finite": 0.25, "top1": 0.5, "top5": 0.875}
    assert meters["top5"].item() == 7
    meters.clear()
    assert set(meters.state_dict().values()) == {0}


def test_train_meters_by_hand():
    meters, w = TrainMeters(CPU), torch.ones((), requires_grad=True)
    spread = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # std 1/sqrt(2) per channel, times sqrt(2)
    assert meters.add(-0.25 * w, spread).item() == 0
    meters.add(-0.75 * w, torch.ones(2, 2))
    assert meters.means(2) == pytest.approx({"loss": -0.5, "std": 0.5, "window": 0.5, "finite": 1})
    assert meters.pop_window(2) == pytest.approx(0.5)
    meters.add(-1 * w, spread)
    assert meters.pop_window(1) == pytest.approx(1)
    assert meters.means(3)["std"] == pytest.approx(2 / 3)
    assert not meters.values.requires_grad  # or the graphs of all steps would be kept


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_steps_from_the_first_bad_loss_on_are_skipped(bad):
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    meters, weights = TrainMeters(CPU), []
    for loss in (-0.5, -0.6, bad, -0.7):
        assert (meters.first_bad_step() is None) == (len(weights) < 3)
        weight.grad = -torch.ones(())
        optimizer.found_inf = meters.add(torch.tensor(loss), torch.randn(4, 4))
        optimizer.step()
        weights.append(weight.item())
    assert weights == [1, 2, 2, 2]
    assert meters.first_bad_step() == 2


def test_loaded_meters_continue_exactly(tmp_path):
    generator = torch.Generator().manual_seed(0)
    whole, resumed, path = TrainMeters(CPU), TrainMeters(CPU), tmp_path / "meters.pth"
    for i in range(8):
        loss, z = torch.rand((), generator=generator), torch.randn(16, 8, generator=generator)
        whole.add(loss if i < 6 else loss * math.nan, z)
        if i == 2:
            whole.pop_window(3)
        if i < 5:
            torch.save(dict(reversed(whole.state_dict().items())), path)
        else:
            resumed.load_state_dict(torch.load(path, weights_only=True))
            resumed.add(loss if i < 6 else loss * math.nan, z)
            torch.save(resumed.state_dict(), path)
            assert str(resumed.state_dict()) == str(whole.state_dict())  # nan is not equal to nan
    assert resumed.first_bad_step() == whole.first_bad_step() == 6
    assert resumed.pop_window(5) == whole.pop_window(5)


def test_meters_of_other_names_are_refused():
    meters = TrainMeters(CPU)
    own = meters.state_dict()
    for state in ({}, {"loss": 0.0}, own | {"top1": 0.0}, Meters(CPU, "top1").state_dict()):
        with pytest.raises(ValueError, match="meters"):
            meters.load_state_dict(state)
    assert meters.state_dict() == own


# ---- collapse -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [8, 16, 64, 512])
def test_the_threshold_lies_between_a_collapsed_and_a_healthy_batch(batch_size):
    def std(x):
        return metrics.collapse_std(F.batch_norm(x, None, None, training=True)).item()

    collapsed = torch.ones(batch_size, 32)
    collapsed[0] = -1  # as far as z can collapse behind a BN: one image opposite to the others
    assert std(collapsed) == pytest.approx(2 / math.sqrt(batch_size), rel=1e-3)
    threshold = collapse_threshold("default", batch_size)
    assert std(collapsed) < threshold < std(torch.randn(batch_size, 32))


BASE = {"batch_size": 64, "lr": 1.0, "stop_grad": "on", "predictor": "mlp", "bn": "default"}
BASE |= {"covariance": 0.01, "k": 20, "temperature": 0.1, "seed": 0, "recipe": "short"}


def causes_of(pixel_std=70.0, **settings):
    return likely_causes(argparse.Namespace(**BASE | settings), pixel_std)


def test_likely_causes_are_those_of_the_run():
    for settings in ({}, {"lr": 2.0}, {"bn": "all"}, {"batch_size": 17}):
        assert causes_of(**settings) == []
    for words in ("stop_grad off", "predictor none", "predictor fixed", "bn none", "bn hidden"):
        (cause,) = causes_of(**dict([words.split()]))
        assert cause.startswith(f"--{words}")
    assert "--lr 30, 30 times" in causes_of(lr=30.0)[0]
    assert "--covariance 0.5" in causes_of(covariance=0.5)[0]
    assert "--batch_size" in causes_of(batch_size=4)[0]
    assert "--show_views" in causes_of(7.9)[0]
    assert len(causes_of(1.0, stop_grad="off", lr=30.0)) == 3


# ---- the monitor --------------------------------------------------------------------------------


class Pixels(nn.Module):
    """A network whose features are the means of 4 x 4 patches of each channel."""

    features = 48

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())


VIEWS = Views(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


@pytest.fixture(scope="module")
def images():
    """Textures: 200 training images, a third of them without a label, and 50 test images."""
    train_images, labels = make_textures(200, seed=1)
    labels[::3] = -1
    return Data(train_images, labels, *make_textures(50, seed=2), list(TEXTURE_CLASSES))


def make_monitor(images, warned=False, **settings):
    config, off = argparse.Namespace(**BASE | settings), torch.autocast("cpu", enabled=False)
    return Monitor(Pixels(), VIEWS, images, config, off, warned)


def expected_scores(images, size, k=20):
    """Return the rank of the bank and kNN top-1 and top-5 of the means of size x size patches."""
    bank, queries = (
        F.normalize(F.adaptive_avg_pool2d(VIEWS.eval_transform(part), size).flatten(1))
        for part in (images.train_images, images.test_images)
    )
    is_labelled = images.train_labels >= 0
    ranking = knn(bank[is_labelled], images.train_labels[is_labelled], queries, k)
    return metrics.effective_rank(bank), *metrics.accuracy(ranking, images.test_labels)


def test_the_monitor_measures_rank_and_knn(images):
    monitor, scores = make_monitor(images), ("rank", "test_acc@1", "test_acc@5")
    row = monitor.measure()
    assert row == pytest.approx(dict(zip(scores, expected_scores(images, 4), strict=True)))
    assert 0 < row["test_acc@1"] < row["test_acc@5"] < 100
    raw = expected_scores(images, 32)[1]  # of all pixels
    assert raw != row["test_acc@1"]
    assert monitor.untrained() == pytest.approx({"epoch": 0, **row, "raw_acc@1": raw})
    top1 = make_monitor(images, k=1).measure()["test_acc@1"]
    assert top1 == pytest.approx(expected_scores(images, 4, k=1)[1])
    assert top1 != row["test_acc@1"]


def test_without_test_images_rank_and_alignment_are_measured(images, capsys):
    monitor = make_monitor(dataclasses.replace(images, test_images=None, test_labels=None))
    assert monitor.measure().keys() == {"rank", "alignment"}
    assert monitor.untrained().keys() == {"epoch", "rank", "alignment"}
    assert "no kNN" in capsys.readouterr().out


def test_std_is_checked_after_each_window_and_at_the_end_of_an_epoch(images, capsys):
    """The last 10 of 60 steps collapse: their mean std is low, the epoch's is not."""
    assert collapse.STD_WINDOW == 25
    monitor, meters, warnings = make_monitor(images), TrainMeters(CPU), []
    collapsed = torch.ones(64, 8)
    collapsed[0] = -1
    for step in range(60):
        meters.add(torch.tensor(-0.5), collapsed if step >= 50 else torch.randn(64, 8))
        warnings.append(monitor.check_step(2, step, 60, meters, 6.0))
        assert (meters.state_dict()["window"] == 0) == (step in (24, 49, 59))
    assert warnings == [False] * 59 + [True]
    assert "collapse in epoch 3, step 60: std of z is 0.2" in capsys.readouterr().out


def test_a_run_is_warned_once(images, capsys):
    monitor = make_monitor(images, stop_grad="off")
    assert not monitor.check_collapse(0, 25, 0.99, None, 6.0)
    assert not monitor.check_collapse(0, 31, 0.99, 6.0, 6.0)
    assert not make_monitor(images, warned=True).check_collapse(0, 50, 0.1, None, 6.0)
    assert capsys.readouterr().out == ""
    assert monitor.check_collapse(0, 50, 0.1, None, 6.0)
    (line,) = capsys.readouterr().out.splitlines()
    assert "epoch 1, step 50" in line
    assert "--stop_grad off" in line
    assert not monitor.check_collapse(0, 75, 0.1, None, 6.0)
    assert capsys.readouterr().out == ""
    assert make_monitor(images).check_collapse(3, 31, 0.99, 3.0, 6.0)
    assert "--arch" in capsys.readouterr().out  # without a likely cause, advice for the symptom


def test_collapse_by_its_thresholds(images, capsys):
    def kind(std, rank=None, start_rank=6.0, images=images, **settings):
        if make_monitor(images, **settings).check_collapse(0, 31, std, rank, start_rank):
            return re.search(r"(total|dimensional) collapse", capsys.readouterr().out)[1]

    assert kind(0.99) is kind(0.55) is kind(0.99, 5.0) is None
    assert kind(0.45) == kind(0.45, bn="all") == kind(0.1, 2.0) == "total"
    assert kind(0.45, batch_size=512) is kind(0.7, bn="hidden") is kind(0.35, bn="none") is None
    assert kind(0.2, bn="hidden") == kind(0.2, bn="none") == "total"
    assert kind(0.99, 3.0) == kind(0.99, 1.9, 2.0) == kind(0.99, 1.1, 1.9) == "dimensional"
    assert kind(0.99, 1.4, 1.9) is None  # simple images have a low rank from the start
    flat = dataclasses.replace(images, train_images=images.train_images // 64 + 100)
    # Images that hardly differ are not just simple.
    assert kind(0.99, 1.4, 1.9, flat) == "dimensional"


def test_evenly_spaced():
    assert evenly_spaced(9, 3).tolist() == [0, 4, 8]
    assert evenly_spaced(3, 8).tolist() == [0, 1, 2]
    assert evenly_spaced(1, 8).tolist() == [0]
