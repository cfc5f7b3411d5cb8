"""What pre-training is worth: accuracy against the number of labels, with it and without.

python -m tools.worth --model_path results/..._model.pth
python -m tools.worth --model_path results/..._model.pth --fractions 0.01 0.1 1 --against other.pth

For each fraction of the labels and each seed, which chooses them: a kNN and a linear head on frozen
features, the network fine-tuned, the same network from scratch with the same steps, and a linear
head on raw pixels; with --against the linear head of another encoder, of any layout that is read.
linear is the logistic regression of tools.transfer. Fine-tuning is linear.py --finetune; its epochs
are those of --epochs, or more where these are fewer than --steps steps. Results go to
results/worth.csv, a row a run, and to a picture of the same name. A run that the table has is not
done again, and one that was cut is gone on with.
"""

import math
import shlex
import subprocess
import sys
import warnings
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python tools/worth.py`

import utils
from simsiam.data.decode import ignore_pil_warnings
from simsiam.data.loader import Data
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import KNN_K, knn
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.plots.curves import plot_worth
from simsiam.runtime import devices
from simsiam.runtime.distributed import log
from simsiam.runtime.files import RunError, atomic_write, error_prefix, read_csv, write_csv
from simsiam.training.recipes import SOURCE_OPTIONS
from tools.common import add_encoder_options, add_main_options
from tools.transfer import Problem, labelled, logistic

COLUMNS = tuple("data encoder method fraction labels seed epochs top1 command".split())
KNN, LINEAR, TUNED, SCRATCH, PIXELS = (
    "kNN",
    "linear",
    "fine-tuned",
    "from scratch",
    "linear, raw pixels",
)
OF_PRETRAINING = (KNN, LINEAR, TUNED)
# Above so many labels the fit to 3,072 pixels would take an hour.
MOST_OF_PIXELS = 10_000
BATCH = 64  # of the recipes of linear.py --finetune


class Study:
    """Methods by labels and seeds: the runs, and the table that they fill."""

    def __init__(
        self, args: Namespace, source: LoadedCheckpoint, images: Data, amp: torch.autocast
    ):
        self.args, self.images, self.amp = args, images, amp
        self.encoders = {LINEAR: source}
        self.table = Path(args.out, "worth.csv")
        self.data = utils.data_label(args.data_name, args.data_root)
        if args.against:
            other = LoadedCheckpoint.open(args.against).to(next(source.net.parameters()).device)
            self.encoders[f"linear, {Path(args.against).name}"] = other
        self.methods = [KNN, *self.encoders, TUNED, SCRATCH, PIXELS]

    def numbers(self) -> dict[float, int]:
        """How many labels each fraction is. Raises ValueError where a class would have none."""
        total, found = len(self.images.train_labels), {}
        for fraction in sorted(self.args.fractions):
            found[fraction] = max(1, round(fraction * total))
            for seed in self.args.seeds:
                some = self.images.subset(found[fraction], seed).train_labels
                counts = some.bincount(minlength=len(self.images.classes))
                if counts.min() < 2:  # one to fit, one to choose C with
                    name = self.images.classes[int(counts.argmin())]
                    raise ValueError(
                        f"--fractions {fraction:g}: gives class {name} {int(counts.min())} of "
                        f"{found[fraction]} images, and 2 are needed"
                    )
        return found

    def epochs(self, labels: int) -> int:
        """Of the runs that train the whole network."""
        steps = max(1, labels // BATCH)
        return max(self.args.epochs, math.ceil(self.args.steps / steps))

    def rows(self) -> list[dict]:
        """Of the table."""
        return read_csv(self.table) if self.table.is_file() else []

    def run(self, method: str, fraction: float, labels: int, seed: int) -> dict | None:
        """A row of the table, which is made unless it is there; None where it would take too long.

        A row is known by its command, which tells all that it depends on.
        """
        if method == PIXELS and labels > MOST_OF_PIXELS:
            return None
        whole = method in (TUNED, SCRATCH)
        encoder = {SCRATCH: "", PIXELS: ""}.get(method, self.args.model_path)
        if method in self.encoders and method != LINEAR:
            encoder = self.args.against
        row = {"data": self.data, "encoder": encoder, "method": method, "fraction": fraction}
        row |= {"labels": labels, "seed": seed, "epochs": self.epochs(labels) if whole else 0}
        start, *words = self.words(row)
        row["command"] = f"{start} {shlex.join(map(str, words))}"
        for old in self.rows():
            if (old["method"], old["command"]) == (method, row["command"]):
                return old
        row["top1"] = self.tuned(row) if whole else self.frozen(method, labels, seed)
        write_csv(self.table, [*self.rows(), row], COLUMNS)
        return row

    def words(self, row: dict) -> list:
        """The command line that gives a row: of linear.py, or of this tool."""
        args = self.args
        flags = ["--data_name", args.data_name]
        flags += [] if args.data_name == "textures" else ["--data_root", args.data_root]
        flags += ["--device", args.device, "--amp", args.amp]
        for flag, value in utils.source_settings(args).items():
            if value is not None:
                flags += [f"--{flag}", *SOURCE_OPTIONS[flag][0].words(value)]
        if not row["epochs"]:
            more = ["--fractions", row["fraction"], "--seeds", row["seed"]]
            more += ["--against", args.against] if row["encoder"] == args.against else []
            return ["python -m tools.worth --model_path", args.model_path, *more, *flags]
        more = ["--finetune", *["--from_scratch"] * (row["method"] == SCRATCH)]
        more += ["--label_fraction", row["fraction"], "--seed", row["seed"]]
        more += ["--epochs", row["epochs"], "--lr", *args.lr]
        return ["python linear.py --model_path", args.model_path, *more, *flags]

    def frozen(self, method: str, labels: int, seed: int) -> float:
        """The accuracy of a method that trains no network."""
        images = self.images.subset(labels, seed)
        source = self.encoders.get(method, self.encoders[LINEAR])
        raw, views = metrics.raw_pixels(source.views.size), source.views

        def embed(part: torch.Tensor) -> torch.Tensor:
            if method == PIXELS:
                return metrics.extract_features(
                    raw, views.eval_transform, part, self.amp, normalise=False
                )
            return source.features(part, self.amp)

        problem = Problem.of(images, embed, seed)
        if method == KNN:
            bank, queries = (F.normalize(x, dim=1) for x in (problem.inputs, problem.test_inputs))
            k = min(KNN_K, max(1, labels // 10))  # of few labels 200 would be nearly all
            ranking = knn(bank, problem.labels, queries, k)
            return metrics.accuracy(ranking, problem.test_labels)[0]
        return 100 * logistic(problem, f"{method}, {labels} labels", lambda: None)[0].mean()

    def tuned(self, row: dict) -> float:
        """The accuracy of a run of linear.py --finetune in a process of its own."""
        folder, short = self.table.with_suffix(""), row["method"].replace(" ", "-")
        stem = Path(self.args.model_path).name.removesuffix("_model.pth").removesuffix(".pth")
        known = zlib.crc32(row["command"].encode())  # all of it, where a name would be too long
        name = f"{stem}_{short}_{row['labels']}_{row['seed']}_{known:08x}"
        own = ["--out", folder, "--name", name, "--no-pictures"]
        own += ["--resume"] * Path(folder, f"{name}_model.pth").is_file()
        script = Path(utils.__file__).with_name("linear.py")
        command = [sys.executable, script, *shlex.split(row["command"])[2:], *own]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode:
            raise RunError(done.stderr.strip() or f"linear.py ended with {done.returncode}")
        return read_csv(folder / f"{name}_statistics.csv")[-1]["test_acc@1"]


# ---- what came of it ----------------------------------------------------------------------------


def by_labels(rows: list[dict], method: str) -> dict[int, list[float]]:
    """The accuracies of a method, of all seeds, by the number of labels."""
    found: dict[int, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["labels"]):
        if row["method"] == method:
            found.setdefault(int(row["labels"]), []).append(row["top1"])
    return found


def labels_for(means: dict[int, float], top1: float) -> float | None:
    """How many labels a method needs for an accuracy, between its points on a log scale.

    `means`: its mean accuracy by the number of labels. The least number where that is enough; None
    where it never is.
    """
    before = None
    for labels, mean in means.items():
        if mean >= top1:
            if before is None:
                return labels
            part = (top1 - before[1]) / (mean - before[1])
            return before[0] * (labels / before[0]) ** part
        before = labels, mean
    return None


def in_words(rows: list[dict]) -> list[str]:
    """A line for each number of labels, the fewest last."""
    means = {
        method: {labels: float(np.mean(found)) for labels, found in by_labels(rows, method).items()}
        for method in (*OF_PRETRAINING, SCRATCH)
    }
    lines, scratch = [], means[SCRATCH]
    for labels in reversed(scratch):
        best = max(OF_PRETRAINING, key=lambda method: means[method].get(labels, 0.0))
        top1, alone = means[best][labels], scratch[labels]
        line = f"with {labels} labels, pre-training gives {top1:.1f} % ({best})"
        needed, most = labels_for(scratch, top1), max(scratch)
        if top1 <= alone:
            line += f"; from scratch is no worse: {alone:.1f} %"
        elif needed is None:
            line += f", from scratch {alone:.1f} %, and less than that with all {most}"
        else:
            digits = 10 ** max(0, int(math.log10(needed)) - 1)
            about_so_many = round(needed / digits) * digits
            line += (
                f", from scratch {alone:.1f} %, which needs about {about_so_many} labels for that"
            )
        lines.append(line)
    return lines


def parsed(argv: list[str] | None) -> tuple[utils.Parser, Namespace]:
    """The command line."""
    parser = utils.Parser("tools.worth", __doc__)
    add, count = parser.add_argument, utils.number(int, 1)
    add("--model_path", required=True, help="a checkpoint of main.py, or another project's")
    add("--against", help="another encoder, of any layout that is read")
    add_main_options(parser, "data_name", "data_root", "split_names", note="the encoder's")
    part = utils.number(float, 1e-9, 1)
    add("--fractions", type=part, nargs="+", default=[0.01, 0.1, 1.0], help="(0.01 0.1 1)")
    seeds = "of the choice of labels, and of training (0 1 2)"
    add("--seeds", type=utils.number(int, 0, 2**32 - 1), nargs="+", default=[0, 1, 2], help=seeds)
    add("--epochs", type=count, default=30, help="of the whole network, at least (30)")
    add("--steps", type=count, default=2000, help="of the whole network, at least (2000)")
    lr = "as of linear.py --finetune, for both; of several the best on held-out labels (0.4)"
    add("--lr", type=utils.number(float, 1e-12), nargs="+", default=[0.4], help=lr)
    add("--out", default="results", help="of table and picture, and a folder of the runs (results)")
    add_encoder_options(parser)
    return parser, parser.parse_args(argv)


def prepared(args: Namespace) -> tuple[Study, dict[float, int]]:
    """The study of the flags, and how many labels its fractions are. Raises ValueError, OSError."""
    device, amp = devices.setup_device(args)
    source = LoadedCheckpoint.open(args.model_path, **utils.source_settings(args)).to(device)
    saved = vars(source.config) if source.config else {}
    same = args.data_name in (None, saved.get("data_name"))
    args.data_name = args.data_name or saved.get("data_name")
    if args.data_name is None:
        raise ValueError(f"--model_path {args.model_path}: names no data set: add --data_name")
    args.data_root = args.data_root or (same and saved.get("data_root")) or "data"
    args.split_names = args.split_names or (saved.get("split_names") if same else None)
    images = labelled(args, source, args.data_root)
    if not isinstance(images.train_images, torch.Tensor):
        raise ValueError("--data_name: choose images that fit into memory")
    if same and saved.get("train_size") is not None:  # as linear.py has it
        images = images.subset(saved["train_size"], saved["seed"])
    study = Study(args, source, images, devices.autocast(device, amp))
    with error_prefix(f"--data_root {args.data_root}"):
        return study, study.numbers()


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser, args = parsed(argv)
    with warnings.catch_warnings(), parser.bad_input():
        ignore_pil_warnings()
        study, numbers = prepared(args)
        study.table.with_suffix("").mkdir(parents=True, exist_ok=True)
    of_all = [(method, *pair) for pair in numbers.items() for method in study.methods]
    with tqdm(of_all, "worth", leave=False, disable=None, unit="method") as bar:
        found = [study.run(*one, seed) for one in bar for seed in args.seeds]
    rows = [row for row in found if row is not None]
    with atomic_write(study.table.with_suffix(".png")) as file:
        found = {method: by_labels(rows, method) for method in study.methods}
        title = f"{study.data}: {Path(args.model_path).name}"
        plot_worth({name: points for name, points in found.items() if points}, title, file)
    log(f"wrote {study.table} and {study.table.with_suffix('.png')}")
    for line in in_words(rows):
        log(line)


if __name__ == "__main__":
    utils.run_command(command)
