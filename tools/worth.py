"""Measure what pre-training is worth: accuracy against the number of labels, with and without it.

python -m tools.worth --model_path results/..._model.pth
python -m tools.worth --model_path results/..._model.pth --fractions 0.01 0.1 1 --against other.pth

For each fraction of the labels and each seed, which chooses them, it evaluates a kNN and a linear
head on frozen features, the network fine-tuned, the same network trained from scratch for as many
steps, and a linear head on raw pixels; with --against also a linear head of another encoder.
Linear heads are the logistic regression of tools.transfer. Fine-tuning is linear.py --finetune, for
--epochs epochs or, if these are fewer than --steps steps, for as many epochs as these need. Each
run adds a row to results/worth.csv, beside which the picture is. The same command continues an
interrupted study: a run that is in the table is not repeated.
"""

import math
import shlex
import sys
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
from simsiam.runtime.config import words_of
from simsiam.runtime.distributed import log
from simsiam.runtime.files import atomic_write, error_prefix, read_csv, write_csv
from tools.common import MODEL_HELP, add_encoder_options, add_main_options, read_rows, run_script
from tools.transfer import Problem, load_labelled, logistic, pixel_problem

COLUMNS = tuple("data encoder method fraction labels seed epochs top1 command".split())
KNN, LINEAR, TUNED, SCRATCH, PIXELS = (
    "kNN",
    "linear",
    "fine-tuned",
    "from scratch",
    "linear, raw pixels",
)
PRETRAINED = (KNN, LINEAR, TUNED)
# With more labels, a fit to 3,072 pixels would take an hour.
MAX_PIXEL_LABELS = 10_000
BATCH_SIZE = 64  # of the recipes of linear.py --finetune


class Study:
    """The runs of all methods, fractions of the labels and seeds, and the table that they fill.

    `encoders`: the checkpoint of each method, "" for none.
    """

    def __init__(
        self, args: Namespace, source: LoadedCheckpoint, images: Data, amp: torch.autocast
    ):
        self.args, self.source, self.images, self.amp = args, source, images, amp
        self.table = Path(args.out, "worth.csv")
        self.data = utils.data_label(args.data_name, args.data_root)
        self.encoders = {KNN: args.model_path, LINEAR: args.model_path}
        if args.against:
            device = next(source.net.parameters()).device
            self.other = LoadedCheckpoint.open(args.against).to(device)
            self.encoders[f"linear, {Path(args.against).name}"] = args.against
        self.encoders |= {TUNED: args.model_path, SCRATCH: "", PIXELS: ""}

    def label_counts(self) -> dict[float, int]:
        """Return the number of labels of each fraction.

        Raises ValueError if a class would have fewer than two labels.
        """
        total, numbers = len(self.images.train_labels), {}
        for fraction in sorted(self.args.fractions):
            numbers[fraction] = max(1, round(fraction * total))
            for seed in self.args.seeds:
                labels = self.images.subset(numbers[fraction], seed).train_labels
                counts = labels.bincount(minlength=len(self.images.classes))
                if counts.min() < 2:  # one to fit, one to choose C with
                    name = self.images.classes[int(counts.argmin())]
                    raise ValueError(
                        f"--fractions {fraction:g}: gives class {name} {int(counts.min())} of "
                        f"{numbers[fraction]} images, and 2 are needed"
                    )
        return numbers

    def run(self, method: str, fraction: float, labels: int, seed: int) -> dict | None:
        """Return a row of the table; run what is missing. None if it would take too long.

        A row is identified by its command, which holds all that it depends on.
        """
        if method == PIXELS and labels > MAX_PIXEL_LABELS:
            return None
        is_whole = method in (TUNED, SCRATCH)
        epochs = max(self.args.epochs, math.ceil(self.args.steps / max(1, labels // BATCH_SIZE)))
        row = {
            "data": self.data,
            "encoder": self.encoders[method],
            "method": method,
            "fraction": fraction,
            "labels": labels,
            "seed": seed,
            "epochs": epochs if is_whole else 0,
        }
        start, *words = self.command_words(row)
        row["command"] = f"{start} {shlex.join(map(str, words))}"
        for old in read_rows(self.table):
            if (old["method"], old["command"]) == (method, row["command"]):
                return old
        row["top1"] = self.finetune(row) if is_whole else self.evaluate(method, labels, seed)
        write_csv(self.table, [*read_rows(self.table), row], COLUMNS)
        return row

    def command_words(self, row: dict) -> list:
        """Return the command that reproduces a row: of linear.py, or of this tool."""
        args = self.args
        flags = ["--data_name", args.data_name]
        flags += [] if args.data_name == "textures" else ["--data_root", args.data_root]
        flags += ["--device", args.device, "--amp", args.amp]
        for name, value in utils.source_settings(args).items():
            if value is not None:
                flags += [f"--{name}", *words_of(value)]
        if not row["epochs"]:
            options = ["--fractions", row["fraction"], "--seeds", row["seed"]]
            options += ["--against", args.against] if row["encoder"] == args.against else []
            return ["python -m tools.worth --model_path", args.model_path, *options, *flags]
        options = ["--finetune", *["--from_scratch"] * (row["method"] == SCRATCH)]
        options += ["--label_fraction", row["fraction"], "--seed", row["seed"]]
        options += ["--epochs", row["epochs"], "--lr", *args.lr]
        return ["python linear.py --model_path", args.model_path, *options, *flags]

    def evaluate(self, method: str, labels: int, seed: int) -> float:
        """Return the top-1 of a method that trains no network, in percent."""
        images = self.images.subset(labels, seed)
        if method == PIXELS:
            problem = pixel_problem(self.source, images, self.amp, seed)
        else:
            source = self.source if self.encoders[method] == self.args.model_path else self.other
            problem = Problem.from_images(
                images, lambda part: source.features(part, self.amp), seed
            )
        if method == KNN:
            bank, queries = (F.normalize(x, dim=1) for x in (problem.inputs, problem.test_inputs))
            k = min(KNN_K, max(1, labels // 10))  # of few labels 200 would be nearly all
            ranking = knn(bank, problem.labels, queries, k)
            return metrics.accuracy(ranking, problem.test_labels)[0]
        return 100 * logistic(problem, f"{method}, {labels} labels")[0].mean()

    def finetune(self, row: dict) -> float:
        """Return the top-1 of a row's run of linear.py --finetune, in a process of its own."""
        folder, method = self.table.with_suffix(""), row["method"].replace(" ", "-")
        encoder = Path(self.args.model_path).name.removesuffix("_model.pth").removesuffix(".pth")
        checksum = zlib.crc32(row["command"].encode())  # the command itself would be too long
        name = f"{encoder}_{method}_{row['labels']}_{row['seed']}_{checksum:08x}"
        output = ["--out", folder, "--name", name, "--no-pictures"]
        output += ["--resume"] * Path(folder, f"{name}_model.pth").is_file()
        run_script("linear.py", *shlex.split(row["command"])[2:], *output)
        return read_csv(folder / f"{name}_statistics.csv")[-1]["test_acc@1"]


# ---- the summary --------------------------------------------------------------------------------


def accuracies_by_labels(rows: list[dict], method: str) -> dict[int, list[float]]:
    """Return a method's accuracies, one per seed, by the number of labels."""
    accuracies: dict[int, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["labels"]):
        if row["method"] == method:
            accuracies.setdefault(int(row["labels"]), []).append(row["top1"])
    return accuracies


def labels_for(means: dict[int, float], top1: float) -> float | None:
    """Return the number of labels that a method needs for an accuracy, or None if never reached.

    `means`: its mean accuracy by the number of labels, between which the labels are interpolated on
    a log scale.
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


def summarize(rows: list[dict]) -> list[str]:
    """Return a line for each number of labels, the fewest last."""
    means = {
        method: {n: float(np.mean(top1)) for n, top1 in accuracies_by_labels(rows, method).items()}
        for method in (*PRETRAINED, SCRATCH)
    }
    lines, scratch = [], means[SCRATCH]
    for labels in reversed(scratch):
        best = max(PRETRAINED, key=lambda method: means[method].get(labels, 0.0))
        top1, scratch_top1 = means[best][labels], scratch[labels]
        line = f"with {labels} labels, pre-training gives {top1:.1f} % ({best})"
        needed = labels_for(scratch, top1)
        if top1 <= scratch_top1:
            line += f"; from scratch is no worse: {scratch_top1:.1f} %"
        elif needed is None:
            line += f", from scratch {scratch_top1:.1f} %, and less than that with all "
            line += f"{max(scratch)}"
        else:
            digits = 10 ** max(0, int(math.log10(needed)) - 1)
            line += f", from scratch {scratch_top1:.1f} %, which needs about "
            line += f"{round(needed / digits) * digits} labels for that"
        lines.append(line)
    return lines


# ---- the command --------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[utils.Parser, Namespace]:
    """Parse the command line."""
    parser = utils.Parser("tools.worth", __doc__)
    add, count = parser.add_argument, utils.number(int, 1)
    add("--model_path", required=True, help=MODEL_HELP)
    add("--against", metavar="PATH", help="another encoder, a checkpoint of any project")
    add_main_options(parser, "data_name", "data_root", "split_names", note="the encoder's")
    fraction, seed = utils.number(float, 1e-9, 1), utils.number(int, 0, 2**32 - 1)
    add("--fractions", type=fraction, nargs="+", default=[0.01, 0.1, 1.0], help="(0.01 0.1 1)")
    text = "of the choice of labels, and of training (0 1 2)"
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2], help=text)
    add("--epochs", type=count, default=30, help="epochs at least, of the whole network (30)")
    add("--steps", type=count, default=2000, help="steps at least, of the whole network (2000)")
    text = "as of linear.py --finetune; of several the best on held-out labels (0.4)"
    add("--lr", type=utils.number(float, 1e-12), nargs="+", default=[0.4], help=text)
    text = "folder of the table, the picture, and a folder of the runs (results)"
    add("--out", default="results", help=text)
    add_encoder_options(parser)
    return parser, parser.parse_args(argv)


def prepare(args: Namespace) -> tuple[Study, dict[float, int]]:
    """Return the study, and the number of labels of each fraction. Raises ValueError or OSError."""
    device, amp = devices.setup_device(args)
    source = LoadedCheckpoint.open(args.model_path, **utils.source_settings(args)).to(device)
    config = vars(source.config) if source.config else {}
    is_same = args.data_name in (None, config.get("data_name"))
    args.data_name = args.data_name or config.get("data_name")
    if args.data_name is None:
        raise ValueError(f"--model_path {args.model_path}: names no data set: add --data_name")
    args.data_root = args.data_root or (is_same and config.get("data_root")) or "data"
    args.split_names = args.split_names or (config.get("split_names") if is_same else None)
    images = load_labelled(args, source, args.data_root)
    if not isinstance(images.train_images, torch.Tensor):
        raise ValueError(f"--data_name {args.data_name}: must fit into memory")
    if is_same and config.get("train_size") is not None:  # as in linear.py
        images = images.subset(config["train_size"], config["seed"])
    study = Study(args, source, images, devices.autocast(device, amp))
    with error_prefix(f"--data_root {args.data_root}"):
        return study, study.label_counts()


def command(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser, args = parse(argv)
    with parser.bad_input():
        ignore_pil_warnings()
        study, numbers = prepare(args)
        study.table.with_suffix("").mkdir(parents=True, exist_ok=True)
    runs = [(method, *pair) for pair in numbers.items() for method in study.encoders]
    with tqdm(runs, "worth", leave=False, disable=None, unit="method") as bar:
        rows = [study.run(*run, seed) for run in bar for seed in args.seeds]
    rows = [row for row in rows if row is not None]
    with atomic_write(study.table.with_suffix(".png")) as file:
        curves = {method: accuracies_by_labels(rows, method) for method in study.encoders}
        title = f"{study.data}: {Path(args.model_path).name}"
        plot_worth({name: points for name, points in curves.items() if points}, title, file)
    log(f"wrote {study.table} and {study.table.with_suffix('.png')}")
    for line in summarize(rows):
        log(line)


if __name__ == "__main__":
    utils.run_command(command)
