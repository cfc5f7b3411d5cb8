"""A run: its lock, its checkpoints and tables, signals, and how it goes on after any of its steps.

Both commands train within this frame; neither has code of its own to save or to resume.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from simsiam.runtime import distributed
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
from simsiam.training.meters import Meters
from simsiam.training.probe import Probe

# How the names of a run's files go on after the run's own.
WRITTEN = "model.pth statistics.csv bad_images.txt".split()
WRITTEN += "curves.png neighbours.png embedding.png confusion.png".split()
# What a run may be resumed with another value of.
FREE = "data_root model_path num_workers bad_images device compile deterministic".split()
FREE += "cuda_graphs knn_every checkpoint_minutes stop_on_collapse pictures tensorboard".split()
# What is of a command, not of the run: never taken from a checkpoint.
OF_THE_COMMAND = ("out", "name", "resume", "overwrite", "ddp")
# So soon after the last one, in seconds, an epoch's end writes no table, and neither an epoch's end
# nor a kNN a checkpoint: on a GPU an epoch may take little longer than that.
TABLE_SOON, CHECKPOINT_SOON = 10.0, 60.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_of(path: str) -> tuple[str, str]:
    """The folder and the name of the run whose checkpoint is at `path`."""
    folder, file = os.path.split(path)
    for end in ("_model.prev.pth", "_model.pth", ".pth"):
        file = file.removesuffix(end)
    return folder or ".", file


class Run:
    """A run of main.py or linear.py, from its lock to its last file, while the context lasts.

    Entered, it holds the lock, and `args` are its arguments: those of the command line or, with
    --resume, of the checkpoint `state`, with what the command line may change of them. Then, in
    this order: `same` and `keep`; `begin`, if `state` is None; `epochs`, with `after_step` and
    `after_epoch`; `finishing`. `epoch` and `step`: what is finished. `history`: rows of the
    statistics. `facts`: numbers that the run found out and must not forget.

    `given`: the flags of the command line; `flags`: a utils.Flags; `columns`: of the statistics;
    `clock`: seconds. Entering raises ValueError or OSError for what the user is to mend; later
    RunError ends the run, its last checkpoint intact.
    """

    def __init__(
        self,
        args: Namespace,
        given: dict,
        flags: argparse.ArgumentParser,
        columns: tuple[str, ...],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.args, self.given, self.flags = args, given, flags
        self.columns, self.clock = columns, clock
        self.path = os.path.join(args.out, args.name)
        self.state, self.from_path = None, ""  # where `state` was read
        self.epoch, self.step, self.history, self.facts = 0, 0, [], {}
        self.settled, self.fixed = {}, {}
        self.good = False  # whether the newest checkpoint is one to fall back to
        self.signal: int | None = None
        self.handlers: dict = {}  # what heeded the signals before
        self.agree = distributed.AsyncMax()
        self.begun = self.written = self.tabled = self.clock()
        self.open = contextlib.ExitStack()

    # ---- the lock, and the checkpoint that is there

    def __enter__(self) -> "Run":
        try:
            distributed.broadcast_from_rank0(self._lock)
            found = distributed.broadcast_from_rank0(self._earlier)
            if found:
                self._resume(*found)
        except BaseException:
            self.open.close()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._listen(False)
        self.open.close()

    def _lock(self) -> None:
        """Refuse a second process at the same run; what one that died left half-written goes."""
        self.open.enter_context(run_lock(self.path))
        for end in WRITTEN:
            Path(self.args.out, f".{self.args.name}_{end}.part").unlink(missing_ok=True)

    def _earlier(self) -> tuple[str, dict] | None:
        """The checkpoint to go on from, if --resume; refuses to replace a run unasked.

        Where the newest is missing or damaged, the one before it. Where torchrun has started the
        ranks again, what they have written is gone on from unasked.
        """
        newest, previous = f"{self.path}_model.pth", f"{self.path}_model.prev.pth"
        path = newest if self.args.resume is True else self.args.resume
        if distributed.restart_count() and (os.path.exists(newest) or os.path.exists(previous)):
            distributed.log(f"started again by torchrun (restart {distributed.restart_count()})")
            path = newest
        for file in (newest, previous):
            if path and os.path.abspath(path) == os.path.abspath(file):
                path = file
        own = path in (newest, previous)
        replaced = (newest, previous, f"{self.path}_statistics.csv")
        for file in () if own or self.args.overwrite else replaced:
            if os.path.exists(file):
                raise ValueError(
                    f"{file} exists: go on with --resume, replace it with --overwrite, or choose "
                    "another --name"
                )
        if not path:
            return None
        try:
            return path, self._read(path)
        except (FileNotFoundError, ValueError) as error:
            if not own or not os.path.exists(previous):
                raise
            state = self._read(previous)
            distributed.log(f"{error}; going on with the one before it, {previous}")
            return previous, state

    def _read(self, path: str) -> dict:
        state = checkpoint.load(path)
        if state["command"] != self.flags.prog:
            command = state["command"]
            raise ValueError(f"--resume: {path} is a run of {command}: give --resume to {command}")
        return state

    def _resume(self, path: str, state: dict) -> None:
        """Take a checkpoint's arguments, and what the command line may change; that is said."""
        own = {name: getattr(self.args, name) for name in OF_THE_COMMAND} | {"overwrite": False}
        with error_prefix(path):
            checkpoint.check_resumable(state)
        saved, changed = self.flags.checked(checkpoint.arguments(state), path) | own, {}
        with error_prefix(path):
            args = self.flags.complete(saved)
        # No step was yet after the warm-up: so far all is as with any --epochs.
        warming = state["epoch"] + (state["step"] > 0) <= getattr(args, "warmup_epochs", 0)
        warming = warming and not getattr(args, "view_sizes", None)
        for name, now in self.given.items():
            before = getattr(args, name)
            open_now = now == "auto" and name not in ("mean", "std")  # these `auto` measures
            if now == before or open_now or name in OF_THE_COMMAND:
                continue
            if name not in FREE and not (name == "epochs" and warming):
                cosine = "; the cosine schedule depends on it" if name == "epochs" else ""
                was, told = (
                    " ".join(map(str, v)) if type(v) is tuple else v for v in (before, now)
                )
                raise ValueError(
                    f"--resume: {path} was made with --{name} {was}, this command has {told}"
                    f"{cosine}: give the same, or another --name for a new run"
                )
            changed[name] = now
            distributed.log(f"resumed with --{name} {now} (was {before})")
        self.args = self.flags.complete(saved | changed)
        self.state, self.from_path, self.good = state, path, path == f"{self.path}_model.pth"
        self.epoch, self.step = state["epoch"], state["step"]
        self.history, self.facts = state["history"], state["facts"]

    # ---- what a checkpoint holds

    def same(self, **fixed: object) -> None:
        """What must be as the run began with it. Raises ValueError where a checkpoint's differs.

        `images_crc`, `classes`: of the training images; `encoder`; `augmentation`.
        """
        self.fixed |= fixed
        for name, value in fixed.items() if self.state else ():
            if self.state[name] != value:
                what = {"encoder": "--model_path: not the encoder"}.get(
                    name, f"--data_root {self.args.data_root}: not the images"
                )
                raise ValueError(f"{what} that {self.from_path} began with")

    def settle(self, **found: object) -> None:
        """Flags that were left open, and what became of them here: a resume keeps to it."""
        self.settled |= found

    def keep(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        tally: Meters,
        steps: int,
        rate: Callable[[float], float],
        scaler: torch.amp.GradScaler | None = None,
        probe: Probe | None = None,
    ) -> None:
        """Say what a checkpoint holds besides; where the run is resumed, restore it.

        `steps`: of an epoch; `rate`: the learning rate after so many epochs; `scaler`: of fp16's
        gradients; `probe`: main.py's. The network has a checkpoint's weights already. Raises
        ValueError where the rest does not fit.
        """
        self.net, self.optimizer, self.tally = net, optimizer, tally
        self.steps, self.rate, self.scaler, self.probe = steps, rate, scaler, probe
        if not self.state:
            return
        with error_prefix(self.from_path):
            if self.epoch + (self.step > 0) > self.args.epochs or self.step > steps:
                raise ValueError("is damaged, or not a checkpoint of this run")
            checkpoint.restore(optimizer, self.state, net)
            tally.load_state_dict(self.state["tally"])
            checkpoint.restore_scale(scaler, self.facts)
            if probe:
                probe.load_state_dict(self.state["probe"])
        self.begun = self.clock() - self.state["seconds"]
        del self.state["model"], self.state["optimizer"]  # they have their place now
        distributed.log(
            f"resumed after epoch {self.epoch} of {self.args.epochs}"
            + f" and step {self.step} of {steps}" * (self.step > 0)
            + ": the run is finished" * (self.epoch == self.args.epochs)
        )

    def save(self) -> None:
        """Write a checkpoint. Raises RunError where it cannot be written, or must not be."""
        checkpoint.save(
            f"{self.path}_model.pth",
            f"{self.path}_model.prev.pth" if self.good else None,
            self.net,
            self.optimizer,
            command=self.flags.prog,
            args=vars(self.args) | self.settled,
            epoch=self.epoch,
            step=self.step,
            tally=self.tally.state_dict(),
            seconds=self.seconds(),
            history=self.history,
            facts=self.facts | checkpoint.scale(self.scaler),
            probe=self.probe.state_dict() if self.probe else {},
            **self.fixed,
        )
        self.written, self.good = self.clock(), True
        self.agree.forget()

    def seconds(self) -> float:
        """What the epoch has taken so far, in this life of the run and those before."""
        return self.clock() - self.begun

    # ---- the way through the epochs

    def begin(self, rows: list[dict], seconds: float = 0.0) -> None:
        """The first checkpoint of a new run; `rows` begin its statistics.

        `seconds`: what was spent before, and counts for the first epoch.
        """
        self.history = rows
        self.save()
        remove(f"{self.path}_model.prev.pth")  # --overwrite: another run's
        self.begun = self.clock() - seconds

    def epochs(self) -> Iterator[int]:
        """The epochs that are to do, from 0 on; the first may be done up to `step`.

        While they last SIGTERM and SIGINT let the step in flight end, and then the process, with a
        checkpoint. A second signal ends the process at once; of ranks not, since torchrun and
        SLURM both send them.
        """
        self._listen(True)
        yield from range(self.epoch, self.args.epochs)
        self._listen(False)

    def _listen(self, on: bool) -> None:
        if on and not self.handlers:
            self.handlers = {number: signal.signal(number, self._arrived) for number in SIGNALS}
        elif not on:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            self.handlers = {}

    def _arrived(self, number: int, frame: object) -> None:
        if distributed.world_size() == 1:
            signal.signal(number, signal.SIG_DFL)
        self.signal = number

    def after_step(self, step: int, seen: bool = False, due: bool = False) -> None:
        """To be called after each step: saves where it is `due`, every --checkpoint_minutes, and
        when a signal has come, after which the process ends.

        `seen`: the tally was just read, so that to look at it costs nothing. Raises RunError for a
        loss that was not finite.
        """
        self.step = step + 1
        last = self.step == self.steps
        late = distributed.rank() == 0 and self._age() >= 60 * self.args.checkpoint_minutes
        bad = seen and self.tally.first_bad_step() is not None
        late, number, bad = self.agree(late, self.signal or 0, bad, wait=last)
        due = due or bool(late) or bool(number)
        if bad or due or last:
            self._check_finite()
        if due:
            self.save()
        if number:
            self._end(number)

    def _age(self) -> float:
        """Seconds since the last checkpoint."""
        return self.clock() - self.written

    def _end(self, number: int) -> None:
        distributed.broadcast_from_rank0(
            lambda: None
        )  # has saved; a rank that ended before it would end it too
        distributed.log("stopped; the same command and --resume go on after this step")
        sys.exit(128 + number)

    def _check_finite(self) -> None:
        bad = self.tally.first_bad_step()
        if bad is not None:
            lr = self.rate(self.epoch + bad / self.steps)
            raise RunError(
                f"the loss is not finite in epoch {self.epoch + 1}, step {bad + 1}, at lr "
                f"{lr:.3g}; {self.path}_model.pth is from before. {checkpoint.DIVERGED}"
            )

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Around work between an epoch's last step and its row that changes nothing of the run.

        A signal ends the process at once: the checkpoint from before holds the epoch's steps
        (unless it would have been written sooner than `CHECKPOINT_SOON` after another). Raises
        RunError for features that are not finite.
        """
        self._listen(False)
        if self.signal is not None or self._age() >= CHECKPOINT_SOON:
            self.save()
        if self.signal is not None:
            self._end(self.signal)
        try:
            yield
        except FloatingPointError as error:
            where = f"after epoch {self.epoch + 1}"
            raise RunError(f"{error} {where}. {checkpoint.DIVERGED}") from error
        self._listen(True)

    def after_epoch(self, row: dict) -> dict:
        """Put an epoch's row into the statistics, with epoch, lr and seconds; the row.

        Writes the table and a checkpoint, unless the last one is younger than `TABLE_SOON` and
        `CHECKPOINT_SOON` (or --checkpoint_minutes); after the last epoch in any case.
        """
        row = {
            "epoch": self.epoch + 1,
            "lr": self.rate(self.epoch + 1 - 1 / self.steps),
            **row,
            "seconds": self.seconds(),
        }
        self.history.append(row)
        self.epoch, self.step, self.begun = self.epoch + 1, 0, self.clock()
        self.tally.clear()
        often, last = 60 * self.args.checkpoint_minutes, self.epoch == self.args.epochs
        if last or self.clock() - self.tabled >= min(TABLE_SOON, often):
            try:
                self.write_table()
            except OSError as error:
                distributed.log(
                    f"warning: {error.filename}: could not be written ({error.strerror}); the next "
                    "epoch tries again"
                )
        if last or self._age() >= min(CHECKPOINT_SOON, often):
            self.save()
        return row

    def write_table(self) -> None:
        """`<run>_statistics.csv`."""
        self.tabled = self.clock()
        write_csv(f"{self.path}_statistics.csv", self.history, self.columns)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Around the writing of a run's last files; then the run is complete.

        Raises RunError that names a file that cannot be written.
        """
        if not self.good:  # the run was finished elsewhere, or its newest checkpoint is damaged
            self.save()
        try:
            self.write_table()
            yield
        except OSError as error:
            raise RunError(
                f"{error.filename}: could not be written ({error.strerror}); the checkpoint is "
                "complete: mend that, and give the same command with --resume"
            ) from error
        remove(f"{self.path}_model.prev.pth")

    def report(self, **known: object) -> float:
        """The run's row in `results.csv`, of what is `known` and of its table; the best top-1."""
        rows = [row for row in self.history if row["epoch"]]
        best = max(row.get("test_acc@1", 0.0) for row in rows)
        known |= {"top1": rows[-1]["test_acc@1"], "top5": rows[-1]["test_acc@5"]}
        known |= {"best_top1": best, "seconds": sum(row["seconds"] for row in rows)}
        known |= {name: getattr(self.args, name) for name in ("batch_size", "epochs", "seed")}
        known |= {"lr": self.facts.get("lr", self.args.lr), "run": self.args.name}
        add_result(os.path.join(self.args.out, "results.csv"), known)
        return best

    def list_bad_images(self, bad: list[str]) -> None:
        """Say and list what --bad_images skip left out."""
        if bad:
            path = f"{self.path}_bad_images.txt"
            with atomic_write(path) as file:
                lines = "".join(f"{line}\n" for line in bad)
                file.write(lines.encode("utf-8", "surrogateescape"))  # names as they are there
            distributed.log(
                f"{len(bad)} files could not be read and were left out: {path} lists them"
            )
