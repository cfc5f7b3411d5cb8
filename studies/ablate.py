"""The paper's ablations, and its collapse, in small: many runs of main.py, a table and a figure.

python -m studies.ablate                    # the ablations: about half an hour on two cores
python -m studies.ablate --study collapse   # runs that collapse and runs that do not

A run that is there is not done again, and one that was cut is gone on with. Results go to
results/ablations.csv or results/collapse.csv, a row a run, and a picture of the same name; curves
of the ablations to results/ablations_curves.png.
"""

import csv
import operator
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python studies/ablate.py`

import utils
from simsiam.runtime.distributed import log
from simsiam.runtime.files import RunError, atomic_write, read_csv, write_csv
from studies import figures

MAIN = Path(utils.__file__).with_name("main.py")
COLUMNS = tuple(
    ("data epochs setting seed flags loss std rank knn untrained_rank untrained_knn").split()
)
WARNED = (*COLUMNS, "collapses", "warned_at_step")


class Setting(NamedTuple):
    """Flags of main.py on top of the recipe's, and the paper's number of the same name, if any.

    That is ImageNet linear top-1 after 100 epochs of ResNet-50 (batch 512 where it does not vary);
    `place`: where in the paper. `collapses`: whether it is to.
    """

    name: str
    flags: str = ""
    paper: str = ""
    place: str = ""
    collapses: bool = False


def read_studies() -> dict[str, tuple[Setting, ...]]:
    """The settings of each study, from studies.csv."""
    studies = {}
    with open(Path(__file__).with_name("studies.csv"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            study, collapses = row.pop("study"), row.pop("collapses") == "yes"
            studies[study] = (*studies.get(study, ()), Setting(**row, collapses=collapses))
    return studies


STUDIES = read_studies()
# Those with curves, as in the paper's Fig. 2.
FIG_2 = (
    "default",
    "no stop-gradient",
    "no stop-gradient, BN hidden",
    "no predictor",
    "no predictor, BN hidden",
    "fixed predictor",
)


class Run(NamedTuple):
    """A setting with a seed, and where its files are."""

    setting: Setting
    seed: int
    path: Path  # without the `_model.pth`

    def rows(self) -> list[dict]:
        """The statistics, if the run has any."""
        table = Path(f"{self.path}_statistics.csv")
        return read_csv(table) if table.is_file() else []


def train(run: Run, flags: list[str], threads: int, bar: tqdm) -> None:
    """Train one run to its end, in a process of its own. Raises RunError with its last word."""
    exists = Path(f"{run.path}_model.pth").is_file()
    command = [sys.executable, MAIN, *flags, *run.setting.flags.split(), "--seed", str(run.seed)]
    command += ["--out", run.path.parent, "--name", run.path.name, "--no-pictures"]
    process = subprocess.Popen(
        command + ["--resume"] * exists,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    for line in process.stdout:
        if line.startswith("epoch "):
            bar.update()
    errors = process.stderr.read()
    if process.wait():
        raise RunError(f"{run.path}: {errors.strip() or process.returncode}")


def summary(label: str, run: Run) -> dict:
    """A run's row of the table; rank and kNN are of the last epoch, std its mean."""
    start, *rows = run.rows()
    end = rows[-1]
    warned = [row["collapse"] for row in rows if "collapse" in row]
    return {
        "data": label,
        "epochs": len(rows),
        "setting": run.setting.name,
        "seed": run.seed,
        "flags": run.setting.flags,
        "loss": end["train_loss"],
        "std": end["std"],
        "rank": end["rank"],
        "knn": end["test_acc@1"],
        "untrained_rank": start["rank"],
        "untrained_knn": start["test_acc@1"],
        "collapses": run.setting.collapses,
    } | ({"warned_at_step": warned[0]} if warned else {})


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = utils.Parser("studies.ablate", __doc__)
    add, count = parser.add_argument, utils.number(int, 1)
    add("--study", default="ablations", choices=tuple(STUDIES), help="(ablations)")
    add("--data_name", default="textures", help="as of main.py (textures)")
    add("--data_root", help="as of main.py")
    add("--train_size", type=count, help="as of main.py")
    add("--epochs", type=count, default=6, help="of each run (6)")
    add("--knn_every", type=count, default=1, help="as of main.py (1)")
    add("--seeds", type=utils.number(int, 0), nargs="+", default=[0, 1, 2], help="(0 1 2)")
    add("--jobs", type=count, help="runs at a time (a GPU: 1; else the cores)")
    add("--out", default="results", help="of table and picture, and a folder of the runs (results)")
    args = parser.parse_args(argv)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = args.jobs or (1 if torch.accelerator.is_available() else cores)
    flags = ["--data_name", args.data_name, "--recipe", "short"]
    flags += ["--epochs", str(args.epochs), "--num_workers", "1"]
    flags += ["--knn_every", str(args.knn_every)]
    if args.data_root:
        flags += ["--data_root", args.data_root]
    if args.train_size:
        flags += ["--train_size", str(args.train_size)]
    label = utils.data_label(args.data_name, args.data_root or "data") + (
        f", {args.train_size} images" if args.train_size else ""
    )
    folder = Path(args.out, args.study)
    runs = []
    for seed in args.seeds:
        for setting in STUDIES[args.study]:
            name = f"{label}_{args.epochs}_{setting.name}_{seed}"
            for strange in " :',":
                name = name.replace(strange, "_")
            runs.append(Run(setting, seed, folder / name))
    done = {run: max(0, len(run.rows()) - 1) for run in runs}
    try:
        with (
            tqdm(total=len(runs) * args.epochs, initial=sum(done.values()), unit="epoch") as bar,
            ThreadPoolExecutor(jobs) as pool,
        ):
            waiting = [
                pool.submit(train, run, flags, max(1, cores // jobs), bar)
                for run in runs
                if done[run] < args.epochs
            ]
            try:
                for one in waiting:
                    one.result()
            finally:
                pool.shutdown(cancel_futures=True)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    found = [summary(label, run) for run in runs]
    table = Path(args.out, f"{args.study}.csv")
    try:
        write(table, args.study, found, runs, f"{label}, {args.epochs} epochs")
    except OSError as error:
        raise RunError(
            f"{error.filename}: could not be written ({error.strerror}); the same command tries "
            "again"
        ) from error
    log(report(args.study, pandas.DataFrame(found, columns=WARNED)))
    log(f"wrote {table} and {table.with_suffix('.png')}")


def write(table: Path, study: str, found: list[dict], runs: list[Run], title: str) -> None:
    """The rows `found`, among those of other data, epochs and settings; and pictures."""
    rows = found
    if table.is_file():
        key = operator.itemgetter("data", "epochs", "setting", "seed")
        new = set(map(key, found))
        rows = [row for row in read_csv(table) if key(row) not in new] + found
    write_csv(table, rows, COLUMNS if study == "ablations" else WARNED)
    with atomic_write(table.with_suffix(".png")) as file:
        if study == "ablations":
            figures.plot_ablations(found, title, file)
        else:
            figures.plot_rank_and_knn(rows, file)
    if study == "ablations":
        histories = {}
        for run in runs:
            histories.setdefault(run.setting.name, []).append(run.rows())
        shown = [name for name in FIG_2 if name in histories]
        with atomic_write(table.with_name(f"{table.stem}_curves.png")) as file:
            figures.plot_ablation_curves(histories, shown, title, file)


def report(study: str, found: pandas.DataFrame) -> str:
    """The table that is printed."""
    lines = []
    for setting in STUDIES[study]:
        rows = found[found["setting"] == setting.name]
        line = {
            "setting": setting.name,
            "loss": f"{rows['loss'].mean():.2f}",
            "std": f"{rows['std'].mean():.2f}",
            "rank": f"{rows['rank'].mean():.1f}",
            "kNN": f"{rows['knn'].mean():.1f} ({rows['knn'].min():.1f} to {rows['knn'].max():.1f})",
            "untrained": f"{rows['untrained_knn'].mean():.1f}",
        }
        if study == "ablations":
            line["the paper's, ImageNet"] = f"{setting.paper or '-'} {setting.place}"
        else:
            warned = rows["warned_at_step"].dropna()
            line["to collapse"] = "yes" if setting.collapses else "no"
            line["warned"] = f"{len(warned)} of {len(rows)}"
            line["at step"] = ", ".join(f"{step:.0f}" for step in warned)
        lines.append(line)
    return pandas.DataFrame(lines).to_string(index=False)


if __name__ == "__main__":
    utils.run_command(command)
