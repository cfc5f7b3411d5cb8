"""Kill runs at random moments, resume them, and compare them with an undisturbed run.

python -m tests.crash --kills 100

A life of a run ends by SIGKILL before or after a step is counted, after an update of the weights,
within the write of a file, before, between and after the renames of a checkpoint, in a kNN, or
after a random time; or by SIGTERM (in the steps it must then say how to go on, and exit with 143;
elsewhere the signal ends it at once). The next life resumes, with another number of workers and
another distance of the checkpoints. A run that comes to its end must have the same bits as the
undisturbed one.
"""

import argparse
import builtins
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
from PIL import Image

import main
from simsiam.data.textures import TEXTURE_CLASSES, make_textures

TIMES = ["images_per_sec", "seconds"]
MOMENTS = tuple(
    "step,counted,update,write,replace,replaced,kNN,time,SIGTERM,SIGTERM by time".split(",")
)
# One byte that a life shares with its parent: whether it is in the steps of an epoch.
IN_STEPS = mmap.mmap(-1, 1)


def make_folder(root: Path, train: int = 200, test: int = 40) -> None:
    """A folder of textures, to train on and to score with."""
    for split, number, seed in [("train", train, 1), ("test", test, 2)]:
        images, labels = make_textures(number, seed)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = root / split / TEXTURE_CLASSES[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def at_steps(before: Callable[[], None], after: Callable[[], None]) -> None:
    """Lets main.py call `before` each step is counted, and `after` that; and keeps `IN_STEPS`."""
    train = main.train

    def watched(*args):
        IN_STEPS[0] = 1
        for step in train(*args):
            before()
            yield step
            after()
        IN_STEPS[0] = 0

    main.train = watched


def arm(moment: str, count: int, seconds: float) -> None:
    """Makes this process end itself at the `count`-th such moment, or after `seconds`."""
    number = signal.SIGTERM if moment.startswith("SIGTERM") else signal.SIGKILL
    left = [count]

    def tick() -> bool:
        left[0] -= 1
        return left[0] == 0

    def end() -> None:
        os.kill(os.getpid(), number)

    def end_at_last() -> None:
        if tick():
            end()

    def nothing() -> None:
        pass

    at_steps(
        end_at_last if moment in ("step", "SIGTERM") else nothing,
        end_at_last if moment == "counted" else nothing,
    )
    if moment == "update":
        step = torch.optim.SGD.step
        torch.optim.SGD.step = lambda self: (step(self), end_at_last())
    elif moment == "kNN":
        eigvalsh = torch.linalg.eigvalsh  # of the features' rank
        torch.linalg.eigvalsh = lambda x: (end_at_last(), eigvalsh(x))[1]
    elif moment == "write":

        class Half:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def write(self, content):
                if tick():
                    self.file.write(bytes(content)[: len(content) // 2])
                    self.file.flush()
                    end()
                return self.file.write(content)

            def __getattr__(self, name):
                return getattr(self.file, name)

        usual = open

        def halving(path, *args, **more):
            file = usual(path, *args, **more)
            return Half(file) if str(path).endswith(".part") else file

        builtins.open = halving
    elif moment in ("replace", "replaced"):
        replace = os.replace

        def replace_and_end(*args):
            last = tick()
            if last and moment == "replace":
                end()
            replace(*args)
            if last:
                end()

        os.replace = replace_and_end
    elif moment in ("time", "SIGTERM by time"):
        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()


def live(flags: list[str], moment: str | None, rng: random.Random, log: Path) -> int:
    """One life of a run in a process of its own; its exit status, negative for a signal."""
    count = rng.randint(1, 3 if moment == "kNN" else 30)
    seconds = rng.uniform(0.05, 1.5)
    IN_STEPS[0] = 0
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if moment:
            arm(moment, count, seconds)
        main.main(flags)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs of the same flags differ in, times apart."""
    found = []
    one, two = (torch.load(f"{run}_model.pth", weights_only=True) for run in (a, b))
    for key, value in one["model"].items():
        if not torch.equal(value, two["model"][key]):
            found.append(key)
    for i, state in one["optimizer"]["state"].items():
        momentum = two["optimizer"]["state"][i]["momentum_buffer"]
        if not torch.equal(state["momentum_buffer"], momentum):
            found.append(f"momentum {i}")
    for key, value in one["probe"].items():
        if not torch.equal(value, two["probe"][key]):
            found.append(f"probe's {key}")
    tables = [pandas.read_csv(f"{run}_statistics.csv").drop(columns=TIMES) for run in (a, b)]
    if not tables[0].equals(tables[1]):
        found.append("statistics")
    rows = pandas.read_csv(a.parent / "results.csv").set_index("run").drop(columns="seconds")
    if not rows.loc[a.name].equals(rows.loc[b.name]):
        found.append("results.csv")
    litter = [
        path.name
        for path in a.parent.iterdir()
        if ".part" in path.name or path.suffix in (".lock", ".pid")
    ]
    return found + litter


def harass(kills: int, seed: int, place: Path) -> tuple[int, int, Counter]:
    """Kills, and runs finished in spite of them with the same bits. Raises AssertionError."""
    torch.set_num_threads(1)  # a forked process has no threads of its parent's
    rng = random.Random(seed)
    make_folder(place / "images")
    out = place / "results"
    flags = (
        f"--data_name folder --data_root {place}/images --recipe short --width 4 --feature_dim 16 "
        f"--batch_size 32 --epochs 4 --no-pictures --out {out}"
    ).split()
    log = place / "log.txt"
    assert live([*flags, "--name", "undisturbed"], None, rng, log) == 0, log.read_text()
    done, finished, moments = 0, 0, Counter()
    while done < kills or finished == 0:
        run = out / f"run{finished}"
        moment = rng.choice(MOMENTS) if done < kills else None
        there = any(Path(f"{run}_model{end}.pth").exists() for end in ("", ".prev"))
        command = [*flags, "--name", run.name, "--num_workers", str(rng.choice((0, 2)))]
        command += ["--checkpoint_minutes", rng.choice(("0", "0.001", "10"))] + ["--resume"] * there
        status = live(command, moment, rng, log)
        said = log.read_text()
        assert "Traceback" not in said, said
        if status == 0:
            found = differences(out / "undisturbed", run)
            assert not found, f"{run}: other {', '.join(found)} than undisturbed"
            finished += 1
            continue
        if moment is not None and moment.startswith("SIGTERM"):
            # Outside of the steps nothing is lost: the signal ends the process at once.
            elsewhere = moment == "SIGTERM by time" and not IN_STEPS[0]
            assert status == 143 or (status == -signal.SIGTERM and elsewhere), f"{status}\n{said}"
            assert status != 143 or "--resume" in said, said
        else:
            assert status == -signal.SIGKILL, f"{moment}: {status}\n{said}"
        done += 1
        moments[moment] += 1
    return done, finished, moments


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    begun = time.perf_counter()
    done, finished, moments = harass(args.kills, args.seed, place)
    shutil.rmtree(place)
    kinds = ", ".join(f"{number} {moment}" for moment, number in sorted(moments.items()))
    print(
        f"{done} of {args.kills} kills survived ({kinds}): {finished} runs ended at the bits of "
        f"the undisturbed one; {time.perf_counter() - begun:.0f} s"
    )
