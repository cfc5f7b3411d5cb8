"""Run: the lock, checkpoints, tables and signals of a run, and how it resumes after any step.

main.py and linear.py train within this frame; neither has code of its own to save or to resume.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from simsiam.runtime import distributed
from simsiam.runtime.config import RunConfig, shown
from simsiam.runtime.files import (
    RunError,
    add_result,
    atomic_write,
    error_prefix,
    remove,
    run_lock,
    write_csv,
)
from simsiam.training import checkpoint
from simsiam.training.state import TrainState

# Suffixes of a run's output files.
OUTPUTS = "model.pth statistics.csv bad_images.txt".split()
OUTPUTS += "curves.png neighbours.png embedding.png confusion.png".split()
# Settings that may change on resume.
MAY_CHANGE = "data_root model_path num_workers bad_images device compile deterministic".split()
MAY_CHANGE += "cuda_graphs knn_every checkpoint_minutes stop_on_collapse pictures".split()
MAY_CHANGE += ["tensorboard"]
# Settings of one command, never taken from a checkpoint.
OF_COMMAND = ("out", "name", "resume", "overwrite", "ddp")
# Minimum seconds between two writes of the table, and of the checkpoint at the end of an epoch:
# on a GPU an epoch may take little longer than a write.
TABLE_SECONDS, CHECKPOINT_SECONDS = 10.0, 60.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Run:
    """A run of main.py or linear.py, from its lock to its last file: a context manager.

    On entry it takes the lock, loads the `checkpoint` to resume (None for a new run), and takes the
    checkpoint's config with the changes of the command line. The order of calls is
    `check_unchanged`; `start` or `resume`; `epochs`, with `after_step` and `after_epoch`;
    `finalize`. `history`: rows of the statistics. `extra`: numbers that a checkpoint stores too.

    `command`: main.py or linear.py. `overrides`: the settings that the command line gives.
    `columns`: of the statistics. `clock`: seconds. Entering raises ValueError or OSError for what
    the user is to mend; later a RunError ends the run and leaves its last checkpoint intact.
    """

    def __init__(
        self,
        command: str,
        config: RunConfig,
        overrides: dict,
        columns: tuple[str, ...],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.command, self.config, self.overrides = command, config, overrides
        self.columns, self.clock = columns, clock
        self.path = os.path.join(config.out, config.name)
        self.checkpoint: dict | None = None
        self.checkpoint_path = ""
        self.state: TrainState | None = None
        self.history: list[dict] = []
        self.extra: dict[str, float] = {}
        self.unchanged: dict[str, object] = {}
        self.has_valid_checkpoint = False  # `<run>_model.pth` may become the previous one
        self.signal: int | None = None
        self.previous_handlers: dict = {}
        self.agree = distributed.AsyncMax()
        self.epoch_start = self.last_checkpoint = self.last_table = self.clock()
        self.stack = contextlib.ExitStack()

    # ---- the lock, and the existing checkpoint

    def __enter__(self) -> "Run":
        try:
            distributed.broadcast_from_rank0(self._lock)
            existing = distributed.broadcast_from_rank0(self._find_checkpoint)
            if existing:
                self._take_config(*existing)
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._handle_signals(False)
        self.stack.close()

    def _lock(self) -> None:
        """Lock the run against other processes; remove the half-written files of a killed one."""
        self.stack.enter_context(run_lock(self.path))
        for suffix in OUTPUTS:
            Path(self.config.out, f".{self.config.name}_{suffix}.part").unlink(missing_ok=True)

    def _find_checkpoint(self) -> tuple[str, dict] | None:
        """Return the path and content of the checkpoint to resume, or None for a new run.

        If the newest is missing or damaged, it is the previous one. A run that torchrun restarts
        resumes by itself. Raises ValueError if a new run would replace another one's files.
        """
        newest, previous = f"{self.path}_model.pth", f"{self.path}_model.prev.pth"
        path = newest if self.config.resume is True else self.config.resume
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        is_restart = distributed.is_distributed() and restarts != "0"
        if is_restart and (os.path.exists(newest) or os.path.exists(previous)):
            distributed.log(f"restarted by torchrun (restart {restarts})")
            path = newest
        for file in (newest, previous):
            if path and os.path.abspath(path) == os.path.abspath(file):
                path = file
        is_own = path in (newest, previous)
        outputs = (newest, previous, f"{self.path}_statistics.csv")
        for file in () if is_own or self.config.overwrite else outputs:
            if os.path.exists(file):
                raise ValueError(
                    f"{file} exists: continue it with --resume, replace it with --overwrite, or "
                    "choose another --name"
                )
        if not path:
            return None
        try:
            return path, self._load(path)
        except (FileNotFoundError, ValueError) as error:
            if not is_own or not os.path.exists(previous):
                raise
            state = self._load(previous)
            distributed.log(f"{error}; resuming the previous one, {previous}")
            return previous, state

    def _load(self, path: str) -> dict:
        state = checkpoint.load(path)
        command = state["command"]
        if command != self.command:
            raise ValueError(f"--resume: {path} is a run of {command}: give --resume to {command}")
        return state

    def _take_config(self, path: str, state: dict) -> None:
        """Replace the config by a checkpoint's, with the command's changes, which are logged."""
        saved = state["config"]
        changes = {name: getattr(self.config, name) for name in OF_COMMAND} | {"overwrite": False}
        # Up to the end of the warm-up a run is the same for any --epochs.
        is_warming = state["epoch"] + (state["step"] > 0) <= getattr(saved, "warmup_epochs", 0)
        is_warming = is_warming and not getattr(saved, "view_sizes", None)
        for name, value in self.overrides.items():
            before = getattr(saved, name)
            is_resolved = value == "auto" and name not in ("mean", "std")  # these are measured
            if value == before or is_resolved or name in OF_COMMAND:
                continue
            if name not in MAY_CHANGE and not (name == "epochs" and is_warming):
                reason = "; the cosine schedule depends on it" if name == "epochs" else ""
                raise ValueError(
                    f"--resume: {path} has --{name} {shown(before)}, and the command --{name} "
                    f"{shown(value)}{reason}: give the same, or another --name for a new run"
                )
            changes[name] = value
            distributed.log(f"resumed with --{name} {shown(value)} (was {shown(before)})")
        self.config = dataclasses.replace(saved, **changes)
        self.checkpoint, self.checkpoint_path = state, path
        self.has_valid_checkpoint = path == f"{self.path}_model.pth"
        self.history, self.extra = state["history"], state["extra"]

    # ---- the content of a checkpoint

    def set_config(self, **resolved: object) -> None:
        """Store what `auto` and other unset settings resolved to, for a resumed run to use."""
        self.config = dataclasses.replace(self.config, **resolved)

    def check_unchanged(self, **values: object) -> None:
        """Store values in the checkpoints; raise ValueError if a resumed run has other ones.

        `values`: `images_checksum`, `classes` and `encoder`, as in `checkpoint.FORMAT`.
        """
        self.unchanged |= values
        for name, value in values.items() if self.checkpoint else ():
            if self.checkpoint[name] != value:
                flag = f"--data_root {self.config.data_root}: not the images"
                if name == "encoder":
                    flag = "--model_path: not the encoder"
                raise ValueError(f"{flag} that {self.checkpoint_path} began with")

    def start(self, state: TrainState, rows: list[dict], seconds: float = 0.0) -> None:
        """Write the first checkpoint of a new run; `rows` begin its statistics.

        `seconds`: spent before, and counted in the first epoch.
        """
        self.state, self.history = state, rows
        self.save()
        remove(f"{self.path}_model.prev.pth")  # with --overwrite: another run's
        self.epoch_start = self.clock() - seconds

    def resume(self, state: TrainState) -> None:
        """Load the checkpoint into `state`, whose network has its weights already.

        Raises ValueError if it does not fit.
        """
        with error_prefix(self.checkpoint_path):
            state.load_state_dict(self.checkpoint)
        self.state = state
        self.epoch_start = self.clock() - self.checkpoint["seconds"]
        del self.checkpoint["model"], self.checkpoint["optimizer"]  # they would take memory twice
        epoch, step, epochs = state.epoch, state.step, self.config.epochs
        distributed.log(
            f"resumed after epoch {epoch} of {epochs}"
            + f" and step {step} of {len(state.loader)}" * (step > 0)
            + ": the run is finished" * (epoch == epochs)
        )

    def save(self) -> None:
        """Write a checkpoint. Raises RunError if it cannot be written, or must not be."""
        previous = f"{self.path}_model.prev.pth" if self.has_valid_checkpoint else None
        entries = self.state.state_dict() | self.unchanged
        entries |= {
            "command": self.command,
            "config": self.config.as_dict(),
            "seconds": self.seconds(),
            "history": self.history,
            "extra": self.extra,
            "environment": checkpoint.environment(self.state.net),
        }
        checkpoint.save(f"{self.path}_model.pth", previous, entries)
        self.last_checkpoint, self.has_valid_checkpoint = self.clock(), True
        self.agree.forget()

    def seconds(self) -> float:
        """Seconds of this epoch, across restarts."""
        return self.clock() - self.epoch_start

    # ---- epochs and steps

    def epochs(self) -> Iterator[int]:
        """Yield the epochs that are left, from 0 on; the first may be finished up to a step.

        Meanwhile SIGTERM and SIGINT end the process after the current step, with a checkpoint. A
        second signal ends it at once, except on several ranks: both torchrun and SLURM send one.
        """
        self._handle_signals(True)
        yield from range(self.state.epoch, self.config.epochs)
        self._handle_signals(False)

    def _handle_signals(self, on: bool) -> None:
        if on and not self.previous_handlers:
            self.previous_handlers = {
                number: signal.signal(number, self._on_signal) for number in SIGNALS
            }
        elif not on:
            for number, handler in self.previous_handlers.items():
                signal.signal(number, handler)
            self.previous_handlers = {}

    def _on_signal(self, number: int, frame: object) -> None:
        if distributed.world_size() == 1:
            signal.signal(number, signal.SIG_DFL)
        self.signal = number

    def after_step(self, step: int, was_read: bool = False, due: bool = False) -> None:
        """Count a step; save if `due`, every --checkpoint_minutes, and after a signal, then exit.

        `was_read`: the meters were just read from the device, so that checking them is free.
        Raises RunError for a loss that was not finite.
        """
        state = self.state
        state.step = step + 1
        is_last = state.step == len(state.loader)
        minutes = self.config.checkpoint_minutes
        is_late = distributed.rank() == 0 and self.clock() - self.last_checkpoint >= 60 * minutes
        is_bad = was_read and state.meters.first_bad_step() is not None
        is_late, number, is_bad = self.agree(is_late, self.signal or 0, is_bad, wait=is_last)
        due = due or is_late or number
        bad = state.meters.first_bad_step() if is_bad or due or is_last else None
        if bad is not None:
            lr = state.lr_at(state.epoch + bad / len(state.loader))
            raise RunError(
                f"the loss is not finite in epoch {state.epoch + 1}, step {bad + 1}, at lr "
                f"{lr:.3g}; {self.path}_model.pth is from before. {checkpoint.DIVERGED}"
            )
        if due:
            self.save()
        if number:
            self._exit(number)

    def _exit(self, number: int) -> None:
        # Wait until rank 0 has saved: torchrun ends all ranks as soon as one exits.
        distributed.broadcast_from_rank0(lambda: None)
        distributed.log("stopped; the same command and --resume continue after this step")
        sys.exit(128 + number)

    @contextlib.contextmanager
    def evaluation_phase(self) -> Iterator[None]:
        """Enclose an evaluation between an epoch's last step and its row.

        It changes nothing of the run, so that a signal ends the process at once: the epoch's steps
        are saved before, unless the last checkpoint is younger than CHECKPOINT_SECONDS. Raises
        RunError for features that are not finite.
        """
        self._handle_signals(False)
        if self.signal is not None or self.clock() - self.last_checkpoint >= CHECKPOINT_SECONDS:
            self.save()
        if self.signal is not None:
            self._exit(self.signal)
        try:
            yield
        except FloatingPointError as error:
            epoch = self.state.epoch + 1
            raise RunError(f"{error} after epoch {epoch}. {checkpoint.DIVERGED}") from error
        self._handle_signals(True)

    def after_epoch(self, row: dict) -> dict:
        """Add an epoch's row to the statistics, with epoch, lr and seconds; return the row.

        Writes the table and a checkpoint, unless the last ones are younger than TABLE_SECONDS and
        CHECKPOINT_SECONDS (or --checkpoint_minutes); after the last epoch in any case.
        """
        state = self.state
        row = {
            "epoch": state.epoch + 1,
            "lr": state.lr_at(state.epoch + 1 - 1 / len(state.loader)),
            **row,
            "seconds": self.seconds(),
        }
        self.history.append(row)
        state.epoch, state.step, self.epoch_start = state.epoch + 1, 0, self.clock()
        state.meters.clear()
        often, is_last = 60 * self.config.checkpoint_minutes, state.epoch == self.config.epochs
        if is_last or self.clock() - self.last_table >= min(TABLE_SECONDS, often):
            try:
                self.write_table()
            except OSError as error:
                distributed.log(
                    f"warning: {error.filename}: could not be written ({error.strerror}); the next "
                    "epoch tries again"
                )
        if is_last or self.clock() - self.last_checkpoint >= min(CHECKPOINT_SECONDS, often):
            self.save()
        return row

    def write_table(self) -> None:
        """Write `<run>_statistics.csv`."""
        self.last_table = self.clock()
        write_csv(f"{self.path}_statistics.csv", self.history, self.columns)

    @contextlib.contextmanager
    def finalize(self) -> Iterator[None]:
        """Enclose the writing of a run's last files; then the run is complete.

        Raises RunError that names a file that cannot be written.
        """
        if not self.has_valid_checkpoint:  # the run ended elsewhere, or its newest is damaged
            self.save()
        try:
            self.write_table()
            yield
        except OSError as error:
            raise RunError(
                f"{error.filename}: could not be written ({error.strerror}); the checkpoint is "
                "complete: free the path, and give the same command with --resume"
            ) from error
        remove(f"{self.path}_model.prev.pth")

    def write_result(self, **columns: object) -> float:
        """Write the run's row of `results.csv`; return the best top-1 of its epochs.

        `columns`: those that do not follow from the config and the history.
        """
        rows = [row for row in self.history if row["epoch"]]
        best = max(row.get("test_acc@1", 0.0) for row in rows)
        columns |= {"top1": rows[-1]["test_acc@1"], "top5": rows[-1]["test_acc@5"]}
        columns |= {"best_top1": best, "seconds": sum(row["seconds"] for row in rows)}
        columns |= {name: getattr(self.config, name) for name in ("batch_size", "epochs", "seed")}
        columns |= {"lr": self.extra.get("lr", self.config.lr), "run": self.config.name}
        add_result(os.path.join(self.config.out, "results.csv"), columns)
        return best

    def list_bad_images(self, bad: list[str]) -> None:
        """Write the files that --bad_images skip left out to `<run>_bad_images.txt`, if any."""
        if not bad:
            return
        path = f"{self.path}_bad_images.txt"
        with atomic_write(path) as file:
            lines = "".join(f"{line}\n" for line in bad)
            file.write(lines.encode("utf-8", "surrogateescape"))  # names as they are on disk
        distributed.log(f"{len(bad)} files could not be read and were left out: {path} lists them")
