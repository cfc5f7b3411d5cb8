"""Kill runs at random moments, resume them, and compare them with an undisturbed run.

python -m tests.crash --kills 100

Each process of a run ends by SIGKILL before or after a step is counted, after an update of the
weights, within the write of a file, before or after the rename of a file, in a kNN, or after a
random time; or by SIGTERM. In the steps of an epoch the run handles SIGTERM: it must then print how
to resume, and exit with 143; elsewhere the signal ends it at once. The next process resumes, with
another number of workers and another interval between checkpoints. A run that finishes must have
the same bits as the undisturbed one.
"""

import argparse
import builtins
import io
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas
import torch

import main
from tests.helpers import texture_folder

TIMES = ["images_per_sec", "seconds"]
MOMENTS = "step counted update write replace replaced kNN time SIGTERM".split()
MOMENTS.append("SIGTERM by time")
# A byte shared between this process and the run's: whether the run handles SIGTERM when it is sent.
IS_HANDLED = mmap.mmap(-1, 1)


def arm(moment: str, count: int, seconds: float) -> Callable[[int, int], None] | None:
    """Make this process end itself at the `count`-th `moment`, or after `seconds`.

    Returns the hook that main.py must call before each step is counted, if the moment is there.
    """
    number = signal.SIGTERM if moment.startswith("SIGTERM") else signal.SIGKILL
    remaining = [count]

    def is_time() -> bool:
        remaining[0] -= 1
        return remaining[0] == 0

    def end() -> None:
        IS_HANDLED[0] = callable(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), number)

    def end_if_time(*_: object) -> None:
        if is_time():
            end()

    if moment in ("step", "SIGTERM"):
        return end_if_time
    if moment == "counted":  # the next step's zero_grad is the first call after that
        zero_grad = torch.optim.SGD.zero_grad
        torch.optim.SGD.zero_grad = lambda self: (end_if_time(), zero_grad(self))
    elif moment == "update":
        step = torch.optim.SGD.step
        torch.optim.SGD.step = lambda self: (step(self), end_if_time())
    elif moment == "kNN":
        eigvalsh = torch.linalg.eigvalsh  # of the features' effective rank
        torch.linalg.eigvalsh = lambda x: (end_if_time(), eigvalsh(x))[1]
    elif moment == "write":

        class HalfWriter(io.BufferedWriter):
            def write(self, content: bytes) -> int:
                if is_time():
                    super().write(bytes(content)[: len(content) // 2])
                    self.flush()
                    end()
                return super().write(content)

        open_file = open

        def open_half(path: object, *args: object, **kwargs: object) -> io.IOBase:
            file = open_file(path, *args, **kwargs)
            return HalfWriter(file.detach()) if str(path).endswith(".part") else file

        builtins.open = open_half
    elif moment in ("replace", "replaced"):
        replace = os.replace

        def replace_and_end(*args: object) -> None:
            is_last = is_time()
            if is_last and moment == "replace":
                end()
            replace(*args)
            if is_last:
                end()

        os.replace = replace_and_end
    else:
        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
    return None


def live(flags: list[str], moment: str | None, rng: random.Random, log: Path) -> int:
    """Run main.py in a process of its own; return its exit status, negative for a signal."""
    count = rng.randint(1, 3 if moment == "kNN" else 30)
    seconds = rng.uniform(0.05, 1.5)
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        main.main(flags, arm(moment, count, seconds) if moment else None)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def differences(a: Path, b: Path) -> list[str]:
    """Return what differs between two finished runs of the same flags, times apart."""
    names = []
    one, two = (torch.load(f"{run}_model.pth", weights_only=True) for run in (a, b))
    for key, value in one["model"].items():
        if not torch.equal(value, two["model"][key]):
            names.append(key)
    for i, state in one["optimizer"]["state"].items():
        other = two["optimizer"]["state"][i]  # of Muon several tensors and the number of steps
        if any(
            not torch.equal(torch.as_tensor(state[k]), torch.as_tensor(other[k])) for k in state
        ):
            names.append(f"momentum {i}")
    for key, value in one["probe"].items():
        if not torch.equal(value, two["probe"][key]):
            names.append(f"probe's {key}")
    tables = [pandas.read_csv(f"{run}_statistics.csv").drop(columns=TIMES) for run in (a, b)]
    if not tables[0].equals(tables[1]):
        names.append("statistics")
    rows = pandas.read_csv(a.parent / "results.csv").set_index("run").drop(columns="seconds")
    if not rows.loc[a.name].equals(rows.loc[b.name]):
        names.append("results.csv")
    left_over = [
        path.name
        for path in a.parent.iterdir()
        if ".part" in path.name or path.suffix in (".lock", ".pid")
    ]
    return names + left_over


def harass(kills: int, seed: int, place: Path) -> tuple[int, int, Counter]:
    """Return the numbers of kills and of runs that finished all the same, and kills by moment.

    Raises AssertionError if a run finished with other bits, or ended in another way.
    """
    torch.set_num_threads(1)  # a forked process has no threads of its parent's
    rng = random.Random(seed)
    texture_folder(place / "images")
    out, log = place / "results", place / "log.txt"
    flags = (
        f"--data_name folder --data_root {place}/images --recipe short --width 4 --feature_dim 16 "
        f"--batch_size 32 --epochs 4 --no-pictures --out {out}"
    ).split()
    assert live([*flags, "--name", "undisturbed"], None, rng, log) == 0, log.read_text()
    killed, finished, moments = 0, 0, Counter()
    while killed < kills or finished == 0:
        run = out / f"run{finished}"
        moment = rng.choice(MOMENTS) if killed < kills else None
        exists = any(Path(f"{run}_model{end}.pth").exists() for end in ("", ".prev"))
        command = [*flags, "--name", run.name, "--num_workers", str(rng.choice((0, 2)))]
        command += ["--checkpoint_minutes", rng.choice(("0", "0.001", "10"))]
        status = live(command + ["--resume"] * exists, moment, rng, log)
        printed = log.read_text()
        assert "Traceback" not in printed, printed
        if status == 0:
            names = differences(out / "undisturbed", run)
            assert not names, f"{run}: differs from undisturbed in {', '.join(names)}"
            finished += 1
            continue
        if moment == "SIGTERM" or (moment == "SIGTERM by time" and IS_HANDLED[0]):
            assert status == 143, f"{moment}: {status}\n{printed}"
            assert "--resume" in printed, printed
        else:
            number = signal.SIGTERM if moment == "SIGTERM by time" else signal.SIGKILL
            assert status == -number, f"{moment}: {status}\n{printed}"
        killed += 1
        moments[moment] += 1
    return killed, finished, moments


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    start = time.perf_counter()
    killed, finished, moments = harass(args.kills, args.seed, place)
    shutil.rmtree(place)
    kinds = ", ".join(f"{number} {moment}" for moment, number in sorted(moments.items()))
    print(
        f"{killed} of {args.kills} kills survived ({kinds}): {finished} runs have the bits of "
        f"the undisturbed one; {time.perf_counter() - start:.0f} s"
    )
