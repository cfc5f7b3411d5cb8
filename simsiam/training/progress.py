"""Progress of an epoch: a bar on a terminal, a line per minute in a log."""

import sys
import time

from tqdm import tqdm

from simsiam.runtime import distributed
from simsiam.runtime.config import RunConfig
from simsiam.training.meters import Meters


class Progress:
    """Progress display of an epoch: meters, speed and time left, on rank 0.

    A context manager, called after each step. It reads the meters from the device at most once per
    second. If the run would take more than a day, it suggests a smaller one at the start.

    `epoch`, `start`: the epoch and its first step here, from 0. `config`: has `epochs` and
    `batch_size`. `steps`: per epoch. `shown`: labels of the meters to show, by name. `smaller`: a
    command that takes less time. `unit`: what one step adds to a meter's divisor (1, or images).
    `rest`: work of the later epochs relative to this epoch's; by default their number.
    """

    def __init__(
        self,
        epoch: int,
        config: RunConfig,
        steps: int,
        shown: dict[str, str],
        smaller: str,
        start: int = 0,
        unit: int = 1,
        rest: float | None = None,
    ):
        self.epoch, self.config, self.steps, self.start = epoch, config, steps, start
        self.shown, self.smaller, self.unit = shown, smaller, unit
        self.rest = config.epochs - epoch - 1 if rest is None else rest
        self.is_terminal = sys.stderr.isatty() and distributed.rank() == 0
        self.bar = tqdm(
            total=steps, leave=False, disable=not self.is_terminal, bar_format="{desc} |{bar}|"
        )
        self.last_read = self.last_line = time.perf_counter()
        self.first_step_end = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def __call__(self, step: int, meters: Meters) -> bool:
        """Update after `step` (from 0); return whether the meters were read from the device."""
        now = time.perf_counter()
        if distributed.rank() > 0:
            return False
        if self.first_step_end is None:  # not timed: compilation and warm-up of kernels
            self.first_step_end = now
            return False
        done = step - self.start  # timed steps
        if now - self.last_read < 1 and done != 1:
            return False
        means = meters.means(self.unit * (step + 1))
        now = self.last_read = time.perf_counter()  # after waiting for the device
        step_seconds = (now - self.first_step_end) / done
        epoch_left = step_seconds * (self.steps - step - 1)
        run_left = epoch_left + step_seconds * self.steps * self.rest
        if done == 1 and self.epoch == 0 and run_left > 86400:
            distributed.log(
                f"note: at this speed the run takes {run_left / 86400:.0f} days on this machine. "
                f"A smaller one: {self.smaller}"
            )
        epoch_left, run_left = map(tqdm.format_interval, (epoch_left, run_left))
        values = " ".join(f"{label} {means[name]:.3f}" for name, label in self.shown.items())
        text = (  # fits a terminal of 80 columns
            f"{self.epoch + 1}/{self.config.epochs} {values} "
            f"{self.config.batch_size / step_seconds:.0f} images/s, left {epoch_left}, "
            f"run {run_left}"
        )
        self.bar.n = step + 1
        self.bar.set_description_str(text, refresh=True)
        if not self.is_terminal and now - self.last_line >= 60:
            self.last_line = now
            distributed.log(f"epoch {text} (step {step + 1} of {self.steps})")
        return True
