"""Sums that stay on the device, what a collapse looks like, and what is said of its causes."""

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
from simsiam.training.collapse import (
    Monitor,
    collapse_threshold,
    detect_collapse,
    likely_causes,
)
from simsiam.training.meters import Meters, TrainMeters
from simsiam.views.augment import Views

CPU = torch.device("cpu")

# ---- sums ---------------------------------------------------------------------------------------


def steps(number, seed=0):
    """Losses and z of so many steps."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand((), generator=generator) - 1, torch.randn(16, 8, generator=generator) + 0.5)
        for _ in range(number)
    ]


def test_a_tally_by_hand():
    tally = TrainMeters(CPU)
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # of each channel std 1/sqrt(2): times sqrt(d) 1
    assert tally.add(torch.tensor(-0.25), apart).item() == 0
    assert tally.add(torch.tensor(-0.75), torch.ones(2, 2)).item() == 0
    assert tally.means(2) == pytest.approx({"loss": -0.5, "std": 0.5, "window": 0.5, "finite": 1})
    assert tally.pop_window(2) == pytest.approx(0.5)
    assert tally.add(torch.tensor(-1.0), apart).item() == 0
    assert tally.pop_window(1) == pytest.approx(1)  # since the last look
    assert tally.means(3)["std"] == pytest.approx(2 / 3)  # of the epoch
    assert tally.first_bad_step() is None
    tally.clear()
    assert set(tally.state_dict().values()) == {0}


def test_a_step_s_gradient_is_not_kept_by_the_tally():
    tally, loss = TrainMeters(CPU), torch.ones((), requires_grad=True)
    found = tally.add(loss * 2, torch.randn(4, 4))
    assert not found.requires_grad
    assert not tally.values.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_loss_that_is_not_finite_is_found(bad):
    """`add` returns the fused optimizer's found_inf: from the bad step on the weights stay."""
    tally, z = TrainMeters(CPU), torch.randn(4, 4)
    found = [tally.add(torch.tensor(loss), z).item() for loss in (-0.5, -0.6, bad, -0.7)]
    assert found == [0, 0, 1, 1]
    assert tally.first_bad_step() == 2  # the third
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    for loss, moved in ((-0.5, True), (bad, False), (-0.5, False)):
        if moved:
            tally.clear()
        weight.grad, before = torch.ones(2), weight.detach().clone()
        optimizer.found_inf = tally.add(torch.tensor(loss), z)
        optimizer.step()
        assert torch.equal(weight.detach(), before) == (not moved)


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_tally_saved_and_loaded_goes_on_exactly(cut, tmp_path):
    whole, before, after = TrainMeters(CPU), TrainMeters(CPU), TrainMeters(CPU)
    for i, (loss, z) in enumerate(steps(8)):
        for tally in (whole, before if i < cut else after):
            tally.add(loss, z)
            if i == 1:
                tally.pop_window(2)
        if i + 1 == cut:
            torch.save({"tally": before.state_dict()}, tmp_path / "a.pth")
            after.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True)["tally"])
            assert after.state_dict() == before.state_dict()
    assert after.state_dict() == whole.state_dict()  # to the last bit
    assert after.means(8) == whole.means(8)
    assert after.pop_window(6) == whole.pop_window(6)
    assert all(type(value) is float for value in after.state_dict().values())


def test_a_tally_that_met_nan_meets_it_again_after_loading():
    tally, again = TrainMeters(CPU), TrainMeters(CPU)
    for loss in (-0.5, math.nan, -0.5):
        tally.add(torch.tensor(loss), torch.randn(4, 4))
    again.load_state_dict(tally.state_dict())
    assert again.first_bad_step() == 1


def test_a_tally_s_order_of_names_means_nothing():
    tally, again = TrainMeters(CPU), TrainMeters(CPU)
    tally.add(torch.tensor(-0.5), torch.randn(4, 4))
    again.load_state_dict(dict(reversed(tally.state_dict().items())))
    assert again.state_dict() == tally.state_dict()


def test_a_tally_of_other_names_is_refused():
    tally, sums = TrainMeters(CPU), Meters(CPU, "top1", "top5")
    own = tally.state_dict()
    few = {name: own[name] for name in list(own)[1:]}
    for state in (sums.state_dict(), {}, few, own | {"top1": 0.0}):
        with pytest.raises(ValueError, match="its meters are not those of this command"):
            tally.load_state_dict(state)
    with pytest.raises(ValueError, match="its meters are not those of this command"):
        sums.load_state_dict(own)
    assert tally.state_dict() == own


def test_sums_of_several_losses():
    """linear.py's: the sums over images, divided by their number."""
    sums = Meters(CPU, "top1", "top5")
    sums.add(loss=torch.tensor(6.0), top1=torch.tensor(1), top5=torch.tensor(3))
    sums.add(loss=torch.tensor(2.0), top1=torch.tensor(3), top5=torch.tensor(4))
    assert sums.means(8) == {"loss": 1.0, "finite": 0.25, "top1": 0.5, "top5": 0.875}
    assert sums["top5"].item() == 7
    assert sums.first_bad_step() is None
    assert sums.add(loss=torch.tensor(math.nan), top1=torch.tensor(0)).item() == 1
    assert sums.first_bad_step() == 2


# ---- collapse -----------------------------------------------------------------------------------


def test_collapse_by_its_thresholds():
    def kind(std, rank=None, bn="default", start=6.0, images=64, flat=False):
        found = detect_collapse(collapse_threshold(bn, images), std, rank, start, 64, flat)
        return found and re.search(r"(total|dimensional) collapse", found[0])[1]

    assert kind(0.99) is kind(0.55) is kind(0.99, 5.0) is None
    assert kind(0.45) == kind(0.1) == kind(0.1, 2.0) == "total"
    assert kind(0.99, 3.0) == "dimensional"
    assert kind(0.99, 1.4, start=1.1, flat=True) == "dimensional"  # images that are all the same
    assert kind(0.99, 1.4, start=1.9) is None  # few dimensions from the start, of simple images
    assert kind(0.99, 1.1, start=1.9) == kind(0.99, 1.9, start=2.0) == "dimensional"
    assert kind(0.7, bn="hidden") is kind(0.35, bn="none") is None
    assert kind(0.2, bn="hidden") == kind(0.2, bn="none") == "total"
    # As collapsed as z can be after a BN without affine: one image against the others.
    for images in (8, 16, 64, 512):
        z = torch.ones(images, 32)
        z[0] = -1
        std = metrics.collapse_std(F.batch_norm(z, None, None, training=True)).item()
        assert std == pytest.approx(2 / math.sqrt(images), rel=1e-3)
        assert kind(std, images=images) == "total"
        healthy = F.batch_norm(torch.randn(images, 32), None, None, training=True)
        assert kind(metrics.collapse_std(healthy).item(), images=images) is None


BASE = {"batch_size": 64, "lr": 1.0, "stop_grad": "on", "predictor": "mlp", "bn": "default"}
BASE |= {"covariance": 0.01}


def test_likely_causes_are_those_of_the_run():

    def causes(varied=70.0, **flags):
        return likely_causes(argparse.Namespace(**BASE | flags), 1.0, varied)

    assert causes() == []
    for flag, value in (
        ("stop_grad", "off"),
        ("predictor", "none"),
        ("predictor", "fixed"),
        ("bn", "none"),
        ("bn", "hidden"),
        ("lr", 30.0),
        ("covariance", 0.5),
    ):
        (line,) = causes(**{flag: value})
        assert line.startswith(
            f"--{flag} {value:g}" if isinstance(value, float) else f"--{flag} {value}"
        )
    assert causes(lr=2.0) == causes(bn="all") == causes(batch_size=17) == []
    assert "4 images" in causes(batch_size=4)[0]
    assert "30 times the recipe's" in causes(lr=30.0)[0]
    assert "hardly differ" in causes(7.9)[0]
    assert len(causes(1.0, stop_grad="off", lr=30.0)) == 3


# ---- the monitor --------------------------------------------------------------------------------


class Pixels(nn.Module):
    """A network whose features are the images' means, 4 x 4 of each channel: no chance in it."""

    features = 48

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())


@pytest.fixture(scope="module")
def watched():
    """Textures: 200 training images, of which each third has no label, and 50 test images."""
    images, labels = make_textures(200, seed=1)
    labels[::3] = -1
    return Data(images, labels, *make_textures(50, seed=2), list(TEXTURE_CLASSES))


VIEWS = Views(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
OFF = torch.autocast("cpu", enabled=False)


def make_monitor(images, warned=False, **flags):
    args = argparse.Namespace(**BASE | {"k": 20, "temperature": 0.1, "seed": 0} | flags)
    return Monitor(Pixels(), VIEWS, images, args, 1.0, OFF, warned)


def expected(images, size):
    """Of means, `size` x `size` of each channel: the bank's rank, top-1 and top-5 in percent."""
    pooled = [
        F.normalize(F.adaptive_avg_pool2d(VIEWS.eval_transform(part), size).flatten(1), dim=1)
        for part in (images.train_images, images.test_images)
    ]
    voters = images.train_labels >= 0
    ranking = knn(pooled[0][voters], images.train_labels[voters], pooled[1], 20)
    return metrics.effective_rank(pooled[0]), *metrics.accuracy(ranking, images.test_labels)


def test_the_monitor_measures_the_bank_and_scores_the_test_images(watched, capsys):
    watch = make_monitor(watched)
    rank, top1, top5 = expected(watched, 4)
    row = watch.measure()
    assert row == pytest.approx({"rank": rank, "test_acc@1": top1, "test_acc@5": top5})
    assert 0 < top1 < top5 < 100
    raw = expected(watched, 32)[1]
    assert raw != top1
    assert watch.untrained() == pytest.approx({"epoch": 0, **row, "raw_acc@1": raw})
    said = capsys.readouterr().out
    assert f"raw pixels {raw:.1f} %, untrained encoder {top1:.1f} %" in said
    other = make_monitor(watched, k=1).measure()
    assert other["test_acc@1"] != top1
    assert other["rank"] == row["rank"]


def test_without_test_images_the_rank_is_watched(watched, capsys):
    images = Data(watched.train_images, watched.train_labels, None, None, [])
    watch = make_monitor(images)
    assert watch.measure().keys() == {"rank", "alignment"}
    assert watch.knn().queries is watch.knn().ranking is None
    assert watch.untrained().keys() == {"epoch", "rank", "alignment"}
    assert "no kNN" in capsys.readouterr().out


def test_features_are_kept_where_it_is_asked_for(watched):
    """The last measure's are the pictures' too; others would be of weights that have changed."""
    watch = make_monitor(watched)
    watch.measure()
    assert watch.knn() is not watch.knn()
    row = watch.measure(keep=True)
    found = watch.knn()
    assert found is watch.knn()
    assert metrics.effective_rank(found.bank) == row["rank"]


def test_std_is_looked_at_every_window_and_at_an_epoch_s_end(watched, capsys):
    """An epoch of 60 steps: looks after 25, 50 and 60, each at the steps since the last."""
    watch, tally = make_monitor(watched), TrainMeters(CPU)
    healthy, collapsed = torch.randn(64, 8), torch.ones(64, 8)
    collapsed[0] = -1
    seen = []
    for step in range(60):
        tally.add(torch.tensor(-0.5), collapsed if step >= 50 else healthy)
        seen.append(watch.check_step(2, step, 60, tally, 6.0))
        if step in (24, 49, 59):
            assert tally.state_dict()["window"] == 0
        else:
            assert tally.state_dict()["window"] > 0
    assert seen == [False] * 59 + [True]  # the mean of ten steps: of 60 it would be healthy
    said = capsys.readouterr().out
    assert said.startswith("warning: collapse in epoch 3, step 60: std of z is 0.2")
    assert "(total collapse)" in said


def test_a_run_is_warned_once(watched, capsys):
    watch = make_monitor(watched, stop_grad="off")
    assert not watch.check_collapse(0, 25, 0.99, None, 6.0)
    assert not watch.check_collapse(0, 31, 0.99, 6.0, 6.0)
    assert capsys.readouterr().out == ""
    assert watch.check_collapse(0, 50, 0.1, None, 6.0)
    said = capsys.readouterr().out
    assert said.startswith("warning: collapse in epoch 1, step 50: std of z is 0.10")
    assert "Likely: --stop_grad off" in said
    assert not watch.check_collapse(0, 75, 0.1, None, 6.0)
    assert not make_monitor(watched, warned=True).check_collapse(0, 50, 0.1, None, 6.0)
    assert capsys.readouterr().out == ""
    assert make_monitor(watched).check_collapse(3, 31, 0.99, 3.0, 6.0)
    said = capsys.readouterr().out
    assert "rank of the features is 3.0 of 48" in said
    assert "a wider or deeper --arch" in said


def test_a_rank_that_was_low_from_the_start_is_no_collapse(watched, capsys):
    assert not make_monitor(watched).check_collapse(0, 31, 0.99, 1.4, 1.5)
    assert capsys.readouterr().out == ""
    flat = dataclasses.replace(watched, train_images=watched.train_images // 64 + 100)
    assert make_monitor(flat).check_collapse(0, 31, 0.99, 1.4, 1.5)
    said = capsys.readouterr().out
    assert "rank of the features is 1.4" in said
    assert "Likely: the images hardly differ" in said


def test_the_threshold_is_of_the_batch_and_the_heads(watched):
    assert not make_monitor(watched, batch_size=512).check_collapse(0, 25, 0.45, None, 6.0)
    assert make_monitor(watched, batch_size=64).check_collapse(0, 25, 0.45, None, 6.0)
    assert not make_monitor(watched, bn="none").check_collapse(0, 25, 0.45, None, 6.0)


def test_spread_is_even():
    assert evenly_spaced(9, 3).tolist() == [0, 4, 8]
    assert evenly_spaced(3, 8).tolist() == [0, 1, 2]
    assert evenly_spaced(1, 8).tolist() == [0]
