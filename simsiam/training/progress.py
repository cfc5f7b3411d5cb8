"""The progress of an epoch, for a terminal or a log."""

import sys
import time
from argparse import Namespace

from tqdm import tqdm

from simsiam.runtime import distributed
from simsiam.training.meters import Meters


class Progress:
    """A bar an epoch on a terminal, else a plain line a minute; and a word on runs of days.

    Called after each step with its number and the sums so far, which it reads from the device at
    most once a second; it returns whether it did. `shown`: which of the sums, and their labels;
    `unit`: by how much a step counts in them. `smaller`: a command that takes less time.
    `rest`: the work of the epochs after this one, over this one's; by default each is as this one.
    Ranks other than the first show nothing.
    """

    def __init__(
        self,
        epoch: int,
        args: Namespace,
        steps: int,
        shown: dict[str, str],
        smaller: str,
        start: int = 0,
        unit: int = 1,
        rest: float | None = None,
    ):
        self.rest = args.epochs - epoch - 1 if rest is None else rest
        self.epoch, self.args, self.steps, self.start = epoch, args, steps, start
        self.shown, self.smaller, self.unit = shown, smaller, unit
        self.terminal = sys.stderr.isatty() and distributed.rank() == 0
        self.bar = tqdm(
            total=steps, leave=False, disable=not self.terminal, bar_format="{desc} |{bar}|"
        )
        self.read = self.said = time.perf_counter()
        self.first_step = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def __call__(self, step: int, meters: Meters) -> bool:
        now = time.perf_counter()
        if distributed.rank() > 0:
            return False
        if self.first_step is None:  # it holds the warm-up of kernels, or a compilation
            self.first_step = now
            return False
        done = step - self.start  # steps since the first
        if now - self.read < 1 and done != 1:
            return False
        means = meters.means(self.unit * (step + 1))
        now = self.read = time.perf_counter()  # after the device has caught up
        seconds = (now - self.first_step) / done  # a step
        epoch_left = seconds * (self.steps - step - 1)
        run_left = epoch_left + seconds * self.steps * self.rest
        if done == 1 and self.epoch == 0 and run_left > 86400:
            distributed.log(
                f"note: at this speed the run takes {run_left / 86400:.0f} days on this machine. "
                f"A smaller one: {self.smaller}"
            )
        epoch_left, run_left = map(tqdm.format_interval, (epoch_left, run_left))
        values = " ".join(f"{label} {means[name]:.3f}" for name, label in self.shown.items())
        text = (  # short enough for a terminal of 80 columns
            f"{self.epoch + 1}/{self.args.epochs} {values} "
            f"{self.args.batch_size / seconds:.0f} images/s, left {epoch_left}, run {run_left}"
        )
        self.bar.n = step + 1
        self.bar.set_description_str(text, refresh=True)
        if not self.terminal and now - self.said >= 60:
            self.said = now
            distributed.log(f"epoch {text} (step {step + 1} of {self.steps})")
        return True
