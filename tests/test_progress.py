"""The progress of an epoch: a bar on a terminal, else a line per minute."""

import argparse
import io
import sys
import time

import pytest
import torch

from simsiam.training.meters import Meters
from simsiam.training.progress import Progress


class Clock:
    """A replacement of time.perf_counter that stands still until it is moved."""

    now = 1000.0

    def __call__(self):
        return self.now


class CountedMeters(Meters):
    """Meters that count how often they are read from the device."""

    def __init__(self):
        super().__init__(torch.device("cpu"), "top1")
        self.counts = []

    def means(self, count):
        self.counts.append(count)
        return super().means(count)


@pytest.fixture
def show(monkeypatch):
    """A function that shows steps of an epoch; returns the meters and the steps that read them."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)

    def show(epoch, steps, seconds, loss=2.0, end=None, **settings):
        config = argparse.Namespace(epochs=3, batch_size=64)
        shown, start = {"loss": "loss", "top1": "top-1"}, settings.get("start", 0)
        meters, reads = CountedMeters(), []
        with Progress(epoch, config, steps, shown, "a smaller run", **settings) as progress:
            for step in range(start, end or steps):
                clock.now += seconds
                meters.add(loss=torch.tensor(loss), top1=torch.tensor(0.25))
                if progress(step, meters):
                    reads.append(step)
        return meters, reads

    return show


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_meters_are_read_at_most_once_per_second(show):
    meters, reads = show(0, 100, seconds=0.3, end=50)
    # Not after the first step, which includes the warm-up; after the second, for the estimate; then
    # where more than a second has passed, after every fourth step of 0.3 s.
    assert reads == list(range(1, 50, 4))
    assert meters.counts == [step + 1 for step in reads]


def test_a_line_per_minute_without_a_terminal(show, capsys):
    show(1, 600, seconds=0.5)
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert len(lines) == 5  # in 300 seconds
    # A minute is 120 steps of 0.5 s at 64 images: 480 steps are left, and one more epoch.
    assert lines[0] == (
        "epoch 2/3 loss 2.000 top-1 0.250 128 images/s, left 04:00, run 09:00 (step 120 of 600)"
    )
    assert lines[-1].endswith("left 00:00, run 05:00 (step 600 of 600)")


def test_rest_counts_longer_epochs_to_come(show, capsys):
    show(1, 600, seconds=0.5, end=122, rest=2.25)
    # An epoch is 5 minutes: 4 are left of this one, and the next takes 2.25 times as long.
    assert "left 04:00, run 15:15 (step 120 of 600)" in capsys.readouterr().out


def test_after_a_resume_the_speed_is_that_of_the_new_steps(show, capsys):
    meters, _ = show(2, 600, seconds=0.5, start=400, unit=64)
    (line,) = capsys.readouterr().out.splitlines()
    assert "128 images/s, left 00:40, run 00:40 (step 520 of 600)" in line
    assert meters.counts[-1] == 64 * 600  # the means are of the whole epoch


def test_a_bar_on_a_terminal(show, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    show(0, 600, seconds=0.5, loss=-0.5)
    assert capsys.readouterr().out == ""
    frames = [frame for frame in terminal.getvalue().split("\r") if "images/s" in frame]
    assert len(frames) > 100
    text = frames[-1].split("|")[0]
    assert text.startswith("1/3 loss -0.500 top-1 0.250 128 images/s, left 00:0")
    assert len(text) < 80
    assert terminal.getvalue().endswith("\r")  # wiped at the end of the epoch


@pytest.mark.parametrize(
    ("epoch", "seconds", "is_noted"), [(0, 30, True), (0, 28, False), (1, 50, False)]
)
def test_a_run_of_more_than_a_day_is_noted_once(show, capsys, epoch, seconds, is_noted):
    """3 epochs of 1,000 steps of 30 s: 25 hours; of 28 s: 23.3. Only the first epoch notes it."""
    show(epoch, 1000, seconds, end=3)
    out = capsys.readouterr().out
    assert out.count("a smaller run") == is_noted


def test_other_ranks_show_and_read_nothing(show, capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(sys, "stderr", Terminal())
    meters, reads = show(0, 600, seconds=0.5)
    assert not reads
    assert not meters.counts
    assert sys.stderr.getvalue() == capsys.readouterr().out == ""
