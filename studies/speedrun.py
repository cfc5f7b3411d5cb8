"""How fast recipes learn: each trained for the same minutes, in a table and a picture.

python -m studies.speedrun fast short --budget 10 --seeds 0 1
python -m studies.speedrun "fast --lr 0.4" lightly:SimSiam lightly:BYOL lightly:FastSiam plain
python -m studies.speedrun fast --arch resnet18 --device cuda --budget 60 --data_name cifar10

A contender is a recipe, optionally with flags of main.py, or a peer: lightly's functions in a loop,
or `plain`, torchvision's transforms in a usual loop. A few steps tell how long an epoch takes; then
the contender trains for as many epochs as fit into the budget. Minutes are those of training alone,
without start, kNN and checkpoints. Each run adds a row to results/speedrun.csv, beside which the
picture is; a run that is in the table is not repeated.
"""

import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
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
from simsiam.runtime.files import atomic_write, read_csv, write_csv
from simsiam.training.recipes import RECIPES, PretrainConfig
from studies import figures
from studies.peers import Peer, lightly_training, plain_training
from tools.common import cpu_cores, machine_name, read_rows, run_script

COLUMNS = tuple(
    (
        "recipe data train_size network feature_dim budget seconds epochs steps images tera_adds "
        "knn linear seed threads machine torch commit date curve command"
    ).split()
)
# Two runs with the same values here are the same run.
KEY = ("recipe", "data", "train_size", "network", "budget", "seed", "threads", "machine")
PEERS = ("lightly:SimSiam", "lightly:BYOL", "lightly:FastSiam", "plain")
PICTURE_KEY = ("data", "train_size", "network")  # the same for all curves of a picture
# Settings of the peers: lightly's benchmark on CIFAR-10 has lr 0.06 at batch size 128.
PEER_FLAGS = "--recipe short --batch_size 128 --lr 0.12 --no-fix_pred_lr"
TRIAL_STEPS = 16  # of an epoch, to estimate the time of a whole one
SHARED_FLAGS = ("data_name", "data_root", "train_size", "arch", "width", "device", "amp")
PARSER = utils.ConfigParser("main.py", None, PretrainConfig)


class Contender:
    """A recipe with flags of main.py, or a peer.

    `text`: as on the command line. `flags`: shared by all contenders, and the seed. Raises
    SystemExit, after a line on stderr, for flags that are wrong.
    """

    def __init__(self, text: str, flags: list[str], images: Data):
        self.text, self.images = text, images
        name, *own = text.split()
        self.is_peer = name in PEERS
        own = PEER_FLAGS.split() if self.is_peer else ["--recipe", name, *own]
        self.flags = [*flags, *own]
        self.config, _ = PARSER.read(self.flags)
        self.sizes = len(self.config.view_sizes or [1])

    def seconds_per_epoch(self) -> float:
        """Estimate the time of an epoch, averaged over the sizes of the views, from a few steps.

        For each size the second epoch counts: the first one has the warm-up.
        """
        number = min(TRIAL_STEPS * self.config.batch_size, len(self.images.train_images))
        parts = len(self.images.train_images) / number
        if self.is_peer:
            with self.peer(self.images.subset(number, 0), 2) as train:
                return parts * [train(epoch, False)[0] for epoch in range(2)][1]
        epochs = 2 * self.sizes
        options = ["--epochs", epochs, "--knn_every", epochs, "--train_size", number]
        with tempfile.TemporaryDirectory() as folder:
            rows = self.train(folder, "trial", [*options, "--warmup_epochs", 0])
        return sum(parts * self.seconds(row, number) for row in rows[2::2]) / self.sizes

    def seconds(self, row: dict, images: int) -> float:
        """Return the seconds of an epoch's steps, from its row of the statistics."""
        batch_size = self.config.batch_size
        return images // batch_size * batch_size / row["images_per_sec"]

    def train(self, folder: str | Path, name: str, options: list) -> list[dict]:
        """Run main.py in a process of its own, and return its statistics."""
        output = ["--no-pictures", "--overwrite", "--out", folder, "--name", name]
        run_script("main.py", *self.flags, *options, *output)
        return read_csv(Path(folder, f"{name}_statistics.csv"))

    def peer(self, images: Data, epochs: int) -> Peer:
        """Return the peer, which trains `epochs` epochs; in bf16 where main.py would."""
        device, amp = devices.setup_device(self.config)
        config = dataclasses.replace(self.config, epochs=epochs, device=str(device))
        encoder = main.encoder_config(config, images)
        flops = params_and_flops(build_model(vars(config)), encoder["image_size"])[1]
        is_bf16 = devices.training_precision(device, config.amp, amp, flops) == "bf16"
        if self.text == "plain":
            recipe = {"blur_p": 0.0, "mean": encoder["mean"], "std": encoder["std"]}
            return Peer(plain_training, images, config, recipe, is_bf16)
        return Peer(lightly_training, images, config, self.text.partition(":")[2], is_bf16)

    def run(self, budget: float, folder: Path, points: int) -> dict:
        """Train for `budget` minutes, with `points` kNNs; return columns of the table."""
        images, batch_size = len(self.images.train_images), self.config.batch_size
        epochs = max(self.sizes, round(60 * budget / self.seconds_per_epoch()))
        title = f"{self.text}, seed {self.config.seed}"
        log(f"{title}: {epochs} epochs, for {budget:g} minutes")
        knn_every, seconds, curve, row = max(1, epochs // points), 0.0, [], {}
        if self.is_peer:
            with self.peer(self.images, epochs) as train:
                for epoch in range(epochs):
                    is_due = (epoch + 1) % knn_every == 0 or epoch + 1 == epochs
                    epoch_seconds, top1 = train(epoch, is_due)
                    seconds += epoch_seconds
                    if top1 is not None:
                        curve.append((seconds / 60, top1))
                        log(f"{title}: {seconds / 60:.1f} minutes so far, kNN {top1:.1f} %")
        else:
            name = re.sub(r"\W+", "_", f"{self.text} {self.config.seed} {budget:g}")
            options = ["--epochs", epochs, "--knn_every", knn_every]
            for statistics in self.train(folder, name, options)[1:]:
                seconds += self.seconds(statistics, images)
                if "test_acc@1" in statistics:
                    curve.append((seconds / 60, statistics["test_acc@1"]))
            options = ["--model_path", folder / f"{name}_model.pth", "--cached"]
            options += ["--device", self.config.device, "--no-pictures", "--overwrite"]
            run_script("linear.py", *options, "--out", folder, "--name", f"{name}_linear")
            statistics = read_csv(folder / f"{name}_linear_statistics.csv")
            row["linear"] = statistics[-1]["test_acc@1"]
        steps = images // batch_size
        start = f"python -m studies.speedrun {self.text}" if self.is_peer else "python main.py"
        return row | {
            "seconds": seconds,
            "epochs": epochs,
            "steps": epochs * steps,
            "images": epochs * steps * batch_size,
            "tera_adds": self.multiply_adds(epochs) * steps * batch_size / 1e12,
            "knn": curve[-1][1],
            "curve": json.dumps([[round(minutes, 3), round(top1, 2)] for minutes, top1 in curve]),
            "command": " ".join([start, *self.flags, "--epochs", str(epochs)]),
        }

    def multiply_adds(self, epochs: int) -> int:
        """Return the multiply-adds of an image's forward passes, summed over all epochs.

        Of a peer: those of main.py's network with as many views; BYOL's momentum encoder is not
        counted.
        """
        config = dataclasses.replace(self.config, epochs=epochs)
        net = build_model(vars(config))
        number = 4 if self.text == "lightly:FastSiam" else net.num_views
        encoder = {"image_size": config.image_size or self.images.train_images.shape[-1]}
        views = main.make_views(config, encoder | {"mean": (), "std": ()}, number)
        sizes = number * [views.size_in(epoch) for epoch in range(epochs)]
        return sum(params_and_flops(net, size)[1] * sizes.count(size) for size in set(sizes))


def race(contender: Contender, args: Namespace, table: Path, columns: dict) -> None:
    """Train a contender, add its row to the table if it is missing, and draw the picture.

    `columns`: the values that all rows of this command share.
    """
    config, title = contender.config, f"{contender.text}, seed {contender.config.seed}"
    row = columns | {
        "recipe": contender.text,
        "network": config.arch + (f" of width {config.width}" if config.width else ""),
        "budget": args.budget,
        "seed": config.seed,
        "feature_dim": config.feature_dim,
    }
    rows = read_rows(table, ["commit"])  # as text: 83097e4 is no number
    if any(all(old.get(name) == row[name] for name in KEY) for old in rows):
        log(f"{title}, {args.budget:g} minutes: is in the table")
    else:
        row |= contender.run(args.budget, table.with_suffix(""), args.points)
        rows = [*read_rows(table, ["commit"]), row]  # another command may have added rows
        write_csv(table, rows, COLUMNS)
        minutes = f"{row['seconds'] / 60:.1f} minutes, {row['epochs']} epochs"
        linear = f", linear {row['linear']:.1f} %" if "linear" in row else ""
        log(f"{title}: {minutes}, kNN {row['knn']:.1f} %{linear}")
    curves: dict[str, list] = {}
    for other in rows:
        if all(other.get(name) == row[name] for name in PICTURE_KEY):
            curves.setdefault(other["recipe"], []).append(json.loads(other["curve"]))
    title = f"{row['data']}, {row['train_size']} images, {row['network']}"
    with atomic_write(table.with_suffix(".png")) as file:
        figures.plot_learning(curves, title, file)


def parse(argv: list[str] | None) -> tuple[Namespace, list[Contender], Data]:
    """Parse the command line; load the images. Exits if a flag is wrong."""
    parser = utils.Parser("studies.speedrun", __doc__)
    add = parser.add_argument
    choices = (*RECIPES, *PEERS)
    text = f"{', '.join(RECIPES)}, with flags of main.py; or {', '.join(PEERS)}"
    add("contenders", nargs="+", metavar="CONTENDER", help=text)
    text = "minutes of training (10)"
    add("--budget", type=utils.number(float, 0.001), default=10.0, help=text)
    add("--seeds", type=utils.number(int, 0), nargs="+", default=[0], help="(0)")
    add("--points", type=utils.number(int, 1), default=8, help="kNNs per run (8)")
    text = "folder of the table, the picture, and a folder of the runs (results)"
    add("--out", default="results", help=text)
    add("--data_name", default="textures", help="as of main.py (textures)")
    for name in SHARED_FLAGS[1:]:
        add(f"--{name}", help="as of main.py, for all contenders")
    args = parser.parse_args(argv)
    flags = []
    for name in SHARED_FLAGS:
        if getattr(args, name) is not None:
            flags += [f"--{name}", getattr(args, name)]
    with parser.bad_input():
        for name, *own in map(str.split, args.contenders):
            if name not in choices:
                raise ValueError(f"{name}: choose one of {', '.join(choices)}")
            if own and name in PEERS:
                raise ValueError(f"{name}: takes no flags")
        images = main.load_images(PARSER.read(flags)[0])
        if images.test_images is None or not isinstance(images.train_images, torch.Tensor):
            raise ValueError(
                f"--data_name {args.data_name}: must fit into memory, and have labelled test images"
            )
        contenders = [
            Contender(text, [*flags, "--seed", str(seed)], images)
            for text in args.contenders
            for seed in args.seeds
        ]
    return args, contenders, images


def command(argv: list[str] | None = None) -> None:
    """Run the command."""
    args, contenders, images = parse(argv)
    threads = cpu_cores()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that are started
    table, config = Path(args.out, "speedrun.csv"), contenders[0].config
    table.with_suffix("").mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    columns = {
        "data": utils.data_label(config.data_name, config.data_root),
        "train_size": len(images.train_images),
        "threads": threads,
        "machine": machine_name(devices.pick_device(config.device)),
        "torch": str(torch.__version__),
        "commit": commit.stdout.strip(),
        "date": str(datetime.date.today()),
    }
    for contender in contenders:
        race(contender, args, table, columns)
    log(f"wrote {table} and {table.with_suffix('.png')}")


if __name__ == "__main__":
    utils.run_command(command)
