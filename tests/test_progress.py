"""The progress of an epoch: a bar on a terminal, else a line per minute."""

import argparse
import io
import sys
import time

import pytest
import torch

from simsiam.training.meters import Meters, TrainMeters
from simsiam.training.progress import Progress

CPU = torch.device("cpu")


class Clock:
    """In the place of time.perf_counter: it stands still until it is moved."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class Counted(Meters):
    """Sums that count how often they are read from the device."""

    reads = 0

    def means(self, number):
        self.reads += 1
        self.number = number
        return super().means(number)


ARGS = argparse.Namespace(epochs=3, batch_size=64)
SHOWN = {"loss": "loss", "top1": "top-1"}


def test_progress_waits_for_the_device_once_a_second(clock):
    tally = Counted(CPU, "top1")
    read = []
    with Progress(0, ARGS, 100, SHOWN, "a smaller one") as progress:
        for step in range(50):
            tally.add(loss=torch.tensor(1.0), top1=torch.tensor(0.5))
            read.append(progress(step, tally))
            clock.now += 0.3
    # Not at the first, which holds the warm-up; at the second, for the estimate; then where more
    # than a second has passed, which is every fourth step of 0.3 s.
    assert [step for step, seen in enumerate(read) if seen] == list(range(1, 50, 4))
    assert tally.reads == sum(read)
    assert tally.number == 50  # the sums over the steps of the epoch


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(clock, capsys):
    tally = Meters(CPU, "top1")
    with Progress(1, ARGS, 600, SHOWN, "a smaller one") as progress:
        for step in range(600):
            tally.add(loss=torch.tensor(2.0), top1=torch.tensor(0.25))
            clock.now += 0.5
            progress(step, tally)
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert len(lines) == 5  # of 300 seconds
    # A minute is 120 steps of 0.5 s at 64 images: 480 steps are left, and a whole epoch after it.
    assert lines[0] == (
        "epoch 2/3 loss 2.000 top-1 0.250 128 images/s, left 04:00, run 09:00 (step 120 of 600)"
    )
    assert lines[-1].endswith("left 00:00, run 05:00 (step 600 of 600)")


def test_progress_counts_larger_epochs_to_come(clock, capsys):
    with Progress(1, ARGS, 600, {"loss": "loss"}, "a smaller one", rest=2.25) as progress:
        for step in range(122):
            clock.now += 0.5
            progress(step, Meters(CPU))
    # An epoch is 5 minutes: 4 are left of this one, and the next takes 2.25 times as long.
    assert "left 04:00, run 15:15 (step 120 of 600)" in capsys.readouterr().out


def test_progress_after_a_resume_counts_its_own_steps(clock, capsys):
    """From step 400 of 600 on: the speed is of what was done here, the mean of the epoch."""
    tally = Counted(CPU, "top1")
    with Progress(2, ARGS, 600, SHOWN, "a smaller one", start=400, unit=64) as progress:
        for step in range(400, 600):
            clock.now += 0.5
            progress(step, tally)
    (line,) = capsys.readouterr().out.splitlines()
    assert "128 images/s, left 00:40, run 00:40 (step 520 of 600)" in line
    assert tally.number % 64 == 0
    assert tally.number > 64 * 590


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal(clock, capsys, monkeypatch):
    terminal, tally = Terminal(), Meters(CPU, "top1")
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(0, ARGS, 600, SHOWN, "a smaller one") as progress:
        for step in range(600):
            tally.add(loss=torch.tensor(-0.5), top1=torch.tensor(0.5))
            clock.now += 0.5
            progress(step, tally)
    assert capsys.readouterr().out == ""  # no lines besides
    looks = [look for look in terminal.getvalue().split("\r") if "images/s" in look]
    assert len(looks) > 100
    text = looks[-1].split("|")[0]
    assert text.startswith("1/3 loss -0.500 top-1 0.500 128 images/s, left 00:0")
    assert len(text) < 80
    assert terminal.getvalue().endswith("\r")  # it is wiped away at the epoch's end


@pytest.mark.parametrize(
    ("epoch", "seconds", "said"), [(0, 30, True), (0, 28, False), (1, 50, False)]
)
def test_a_run_of_more_than_a_day_is_said_at_its_start(clock, capsys, epoch, seconds, said):
    """3 epochs of 1000 steps, of 30 s each: 25 hours; of 28 s: 23.3. Later it is not news."""
    tally = TrainMeters(CPU)
    with Progress(epoch, ARGS, 1000, {"loss": "loss"}, "--epochs 5") as progress:
        for step in range(3):
            tally.add(torch.tensor(-0.5), torch.randn(4, 4))
            progress(step, tally)
            clock.now += seconds
    out = capsys.readouterr().out
    assert ("the run takes 1 days on this machine. A smaller one: --epochs 5" in out) == said
    assert out.count("note:") == said


def test_ranks_other_than_the_first_show_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(sys, "stderr", Terminal())
    tally = Counted(CPU, "top1")
    with Progress(0, ARGS, 600, SHOWN, "a smaller one") as progress:
        for step in range(600):
            clock.now += 0.5
            assert not progress(step, tally)
    assert tally.reads == 0  # nor do they wait for their device
    assert sys.stderr.getvalue() == capsys.readouterr().out == ""
