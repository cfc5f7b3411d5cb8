"""How fast recipes learn: each trained for the same minutes, in a table and a picture.

python -m studies.speedrun fast short --budget 10 --seeds 0 1
python -m studies.speedrun "fast --lr 0.4" lightly:SimSiam lightly:BYOL lightly:FastSiam plain
python -m studies.speedrun fast --arch resnet18 --device cuda --budget 60 --data_name cifar10

A contender is a recipe, with flags of main.py if you like, or a peer: a loop of lightly's functions
or `plain`, torchvision's transforms in the loop that most write. First a few steps tell how long an
epoch takes; then it trains for as many epochs as fit into the budget. Minutes are those of training
alone, without start, kNN and checkpoints' reading. A row is added to results/speedrun.csv, which
has the picture beside it; a run that the table has is not done again.
"""

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python studies/speedrun.py`

import main
import utils
from simsiam.data.loader import Data
from simsiam.models.flops import params_and_flops
from simsiam.models.methods import build_model
from simsiam.runtime import devices
from simsiam.runtime.distributed import log
from simsiam.runtime.files import RunError, atomic_write, read_csv, write_csv
from simsiam.training.recipes import RECIPES
from studies import figures
from studies.peers import Peer, lightly_training, plain_learning
from tools.timing import machine_name

COLUMNS = tuple(
    (
        "recipe data train_size network feature_dim budget seconds epochs steps images tera_adds "
        "knn linear seed threads machine torch commit date curve command"
    ).split()
)
KEY = ("recipe", "data", "train_size", "network", "budget", "seed", "threads", "machine")
PEERS = ("lightly:SimSiam", "lightly:BYOL", "lightly:FastSiam", "plain")
PICTURE = ("data", "train_size", "network")  # which are alike in all curves of a picture
# Theirs, but for network and data: lightly's benchmark on CIFAR-10 has lr 0.06 at batch 128.
OF_PEERS = "--recipe short --batch_size 128 --lr 0.12 --no-fix_pred_lr"
TRIAL = 16  # steps of an epoch whose speed is taken for all


class Contender:
    """A recipe with flags of main.py, or a peer, on `images`; `flags`: of all, and the seed's.

    Raises SystemExit with main.py's line for flags that are wrong.
    """

    def __init__(self, text: str, flags: list[str], images: Data):
        self.text, self.images = text, images
        name, *own = text.split()
        self.is_peer = name in PEERS
        own = OF_PEERS.split() if self.is_peer else ["--recipe", name, *own]
        self.flags = [*flags, *own]
        self.args = main.make_flags().read(self.flags)[0]
        self.views = main.views_of(self.args, *main.described(self.args, images), 2)
        self.sizes = len(self.args.view_sizes or [1])

    def seconds_of_epoch(self) -> float:
        """The mean over the sizes of the views, by the speed of a few steps.

        Of each size the second epoch counts: the first one has the warm-up.
        """
        few = min(TRIAL * self.args.batch_size, len(self.images.train_images))
        parts = len(self.images.train_images) / few
        if self.is_peer:
            with self.peer(self.images.subset(few, 0), 2) as epoch:
                return parts * [epoch(i, False)[0] for i in range(2)][1]
        with tempfile.TemporaryDirectory() as place:
            more = ["--epochs", 2 * self.sizes, "--knn_every", 2 * self.sizes, "--train_size", few]
            rows = self.train(place, "trial", [*more, "--warmup_epochs", 0])
        return sum(parts * self.seconds(row, few) for row in rows[2::2]) / self.sizes

    def seconds(self, row: dict, images: int) -> float:
        """What the steps of an epoch took, by its row of the statistics."""
        batch = self.args.batch_size
        return images // batch * batch / row["images_per_sec"]

    def train(self, place: str | Path, name: str, more: list) -> list[dict]:
        """The statistics of a run of main.py in a process of its own."""
        own = ["--no-pictures", "--overwrite", "--out", place, "--name", name]
        call("main.py", *self.flags, *more, *own)
        return read_csv(Path(place, f"{name}_statistics.csv"))

    def peer(self, images: Data, epochs: int) -> Peer:
        """The peer in a process of its own, for so many epochs; in bf16 where main.py would be."""
        args = Namespace(**vars(self.args) | {"epochs": epochs})
        device, amp = devices.setup_device(args)
        args.device = str(device)
        adds = params_and_flops(build_model(vars(args)), self.views.size)[1]
        bf16 = devices.training_precision(device, args.amp, amp, adds) == "bf16"
        if self.text == "plain":
            recipe = {"blur_p": 0.0, "mean": self.views.mean, "std": self.views.std}
            return Peer(plain_learning, images, args, recipe, bf16)
        return Peer(lightly_training, images, args, self.text.partition(":")[2], bf16)

    def run(self, budget: float, place: Path, points: int) -> dict:
        """Train for `budget` minutes: columns of the table."""
        images, batch = len(self.images.train_images), self.args.batch_size
        epochs = max(self.sizes, round(60 * budget / self.seconds_of_epoch()))
        who = f"{self.text}, seed {self.args.seed}"
        log(f"{who}: {epochs} epochs, for {budget:g} minutes")
        every, spent, curve, found = max(1, epochs // points), 0.0, [], {}
        if self.is_peer:
            with self.peer(self.images, epochs) as run:
                for epoch in range(epochs):
                    took, knn = run(epoch, (epoch + 1) % every == 0 or epoch + 1 == epochs)
                    spent += took
                    if knn is not None:
                        curve.append((spent / 60, knn))
                        log(f"{who}: {spent / 60:.1f} minutes so far, kNN {knn:.1f} %")
        else:
            name = re.sub(r"\W+", "_", f"{self.text} {self.args.seed} {budget:g}")
            for row in self.train(place, name, ["--epochs", epochs, "--knn_every", every])[1:]:
                spent += self.seconds(row, images)
                if "test_acc@1" in row:
                    curve.append((spent / 60, row["test_acc@1"]))
            own = ["--no-pictures", "--overwrite", "--out", place, "--name", f"{name}_linear"]
            own += ["--cached", "--device", self.args.device]
            call("linear.py", "--model_path", place / f"{name}_model.pth", *own)
            rows = read_csv(place / f"{name}_linear_statistics.csv")
            found["linear"] = rows[-1]["test_acc@1"]
        steps = images // batch
        found |= {"seconds": spent, "epochs": epochs, "steps": epochs * steps}
        found |= {"images": epochs * steps * batch, "knn": curve[-1][1]}
        found["tera_adds"] = self.adds_of_image(epochs) * steps * batch / 1e12
        curve = [[round(minutes, 3), round(knn, 2)] for minutes, knn in curve]
        start = f"python -m studies.speedrun {self.text}" if self.is_peer else "python main.py"
        said = " ".join([start, *self.flags, "--epochs", str(epochs)])
        return found | {"curve": json.dumps(curve), "command": said}

    def adds_of_image(self, epochs: int) -> int:
        """Multiply-adds of the forward passes of an image in all epochs (a momentum encoder's not).

        Of a peer those of our network with as many views.
        """
        args = Namespace(**vars(self.args) | {"epochs": epochs})
        net = build_model(vars(args))
        number = 4 if self.text == "lightly:FastSiam" else net.num_views
        views = main.views_of(args, *main.described(args, self.images), number)
        sides = [side for epoch in range(epochs) for side in views.sizes_in(epoch)]
        return sum(params_and_flops(net, one)[1] * sides.count(one) for one in set(sides))


def call(script: str, *words: object) -> None:
    """A command in a process of its own. Raises RunError with its last words."""
    command = [sys.executable, Path(utils.__file__).with_name(script), *words]
    process = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if process.returncode:
        raise RunError(process.stderr.strip() or f"{script} ended with {process.returncode}")


class Race:
    """Contenders, a table of what they came to, and its picture."""

    def __init__(self, table: Path, points: int, known: dict):
        self.table, self.points, self.known, self.lock = table, points, known, threading.Lock()

    def rows(self) -> list[dict]:
        """Of the table, whose commits are text: 83097e4 is no number."""
        return read_csv(self.table, ["commit"]) if self.table.is_file() else []

    def run(self, contender: Contender, budget: float) -> float:
        """The kNN's top-1 of a contender after so many minutes; it gets its row of the table."""
        args = contender.args
        arch = args.arch + (f" of width {args.width}" if args.width else "")
        row = self.known | {"recipe": contender.text, "network": arch, "budget": budget}
        row |= {"seed": args.seed, "feature_dim": args.feature_dim}
        for old in self.rows():
            if all(old.get(name) == row[name] for name in KEY):
                log(f"{contender.text}, seed {args.seed}, {budget:g} minutes: is in the table")
                self.draw(row)
                return old["knn"]
        row |= contender.run(budget, self.table.with_suffix(""), self.points)
        with self.lock:
            write_csv(self.table, [*self.rows(), row], COLUMNS)
        self.draw(row)
        linear = f", linear {row['linear']:.1f} %" if "linear" in row else ""
        took = f"{row['seconds'] / 60:.1f} minutes, {row['epochs']} epochs"
        log(f"{contender.text}, seed {args.seed}: {took}, kNN {row['knn']:.1f} %{linear}")
        return row["knn"]

    def draw(self, like: dict) -> None:
        """The picture of the table's rows with this one's data and network."""
        runs: dict[str, list] = {}
        title = f"{like['data']}, {like['train_size']} images, {like['network']}"
        with self.lock, atomic_write(self.table.with_suffix(".png")) as file:
            for row in self.rows():
                if all(row.get(name) == like[name] for name in PICTURE):
                    runs.setdefault(row["recipe"], []).append(json.loads(row["curve"]))
            figures.plot_learning(runs, title, file)


def parsed(argv: list[str] | None) -> tuple[Namespace, list[Contender], Data]:
    """The command line; its contenders, and the images of all. Exits where it is wrong."""
    parser = utils.Parser("studies.speedrun", __doc__)
    add, count = parser.add_argument, utils.number(int, 1)
    names = f"{', '.join(RECIPES)}, with flags of main.py; or {', '.join(PEERS)}"
    add("contenders", nargs="+", metavar="CONTENDER", help=names)
    minutes = "minutes of training (10)"
    add("--budget", type=utils.number(float, 0.001), default=10.0, help=minutes)
    knn = "double the budget, up to 64 times, until the kNN's top-1 is at least this"
    add("--to", type=utils.number(float, 0, 100), metavar="KNN", help=knn)
    add("--seeds", type=utils.number(int, 0), nargs="+", default=[0], help="(0)")
    add("--points", type=count, default=8, help="kNNs along a run (8)")
    jobs = "runs at a time, each with its part of the cores (1)"
    add("--jobs", type=count, default=1, help=jobs)
    add("--out", default="results", help="of table and picture, and a folder of the runs (results)")
    add("--data_name", default="textures", help="as of main.py (textures)")
    of_all = ("data_name", "data_root", "train_size", "arch", "width", "device", "amp")
    for name in of_all[1:]:
        add(f"--{name}", help="as of main.py, for all")
    args = parser.parse_args(argv)
    values = {name: getattr(args, name) for name in of_all if getattr(args, name) is not None}
    flags = [word for name, value in values.items() for word in (f"--{name}", value)]
    with parser.bad_input():
        for name, *own in map(str.split, args.contenders):
            if name not in (*RECIPES, *PEERS):
                raise ValueError(f"{name}: choose from {', '.join((*RECIPES, *PEERS))}")
            if own and name in PEERS:
                raise ValueError(f"{name}: takes no flags")
        images = main.images_of(main.make_flags().read(flags)[0])
        if images.test_images is None or not isinstance(images.train_images, torch.Tensor):
            raise ValueError("--data_name: choose images that fit into memory, with labelled tests")
        contenders = [
            Contender(text, [*flags, "--seed", str(seed)], images)
            for text in args.contenders
            for seed in args.seeds
        ]
    return args, contenders, images


def shares_of_cores(jobs: int) -> list[list[int]]:
    """The cores of this process, dealt out to so many jobs; more jobs than cores share them."""
    has = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0) if has else range(os.cpu_count() or 1))
    each = max(1, len(cores) // jobs)
    return [[cores[(i * each + j) % len(cores)] for j in range(each)] for i in range(jobs)]


def keep_to_next(shares: Iterator[list[int]]) -> None:
    """Keep this thread, and the processes that it starts, to the next share of the cores.

    So a contender whose loader has workers takes no core from its neighbour.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, next(shares))


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    args, contenders, images = parsed(argv)
    shares = shares_of_cores(args.jobs)
    threads = len(shares[0])
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that are started
    table, first = Path(args.out, "speedrun.csv"), contenders[0].args
    table.with_suffix("").mkdir(parents=True, exist_ok=True)
    here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    known = {
        "data": utils.data_label(first.data_name, first.data_root),
        "train_size": len(images.train_images),
        "threads": threads,
        "machine": machine_name(devices.pick_device(first.device)),
        "torch": str(torch.__version__),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], **here).stdout.strip(),
        "date": str(datetime.date.today()),
    }
    race = Race(table, args.points, known)

    def until(contender: Contender) -> None:
        for doubled in range(7 if args.to else 1):
            if race.run(contender, args.budget * 2**doubled) >= (args.to or 0):
                return

    with ThreadPoolExecutor(args.jobs, initializer=keep_to_next, initargs=(iter(shares),)) as pool:
        for done in [pool.submit(until, contender) for contender in contenders]:
            done.result()
    log(f"wrote {table} and {table.with_suffix('.png')}")


if __name__ == "__main__":
    utils.run_command(command)
