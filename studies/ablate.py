"""The paper's ablations, and collapse, at a small scale: many runs of main.py, a table, a picture.

python -m studies.ablate                    # the ablations: about half an hour on two cores
python -m studies.ablate --study collapse   # runs that collapse and runs that do not

The same command continues an interrupted study: a finished run is not repeated, and an unfinished
one is resumed. Results go to results/ablations.csv or results/collapse.csv, a row per run, and to a
picture of the same name; curves of the ablations to results/ablations_curves.png.
"""

import csv
import operator
import os
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
from simsiam.runtime.files import atomic_write, write_csv
from studies import figures
from tools.common import cpu_cores, read_rows, run_script

COLUMNS = tuple(
    ("data epochs setting seed flags loss std rank knn untrained_rank untrained_knn").split()
)
COLLAPSE_COLUMNS = (*COLUMNS, "collapses", "warned_at_step")


class Setting(NamedTuple):
    """Flags of main.py beside the recipe's, and the number of this setting in the paper, if any.

    `paper`: ImageNet linear top-1 after 100 epochs of ResNet-50 (batch size 512 unless it varies);
    `place`: where in the paper. `collapses`: whether the run should collapse.
    """

    name: str
    flags: str = ""
    paper: str = ""
    place: str = ""
    collapses: bool = False


def read_studies() -> dict[str, tuple[Setting, ...]]:
    """Read the settings of each study from studies.csv."""
    studies = {}
    with open(Path(__file__).with_name("studies.csv"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            study, collapses = row.pop("study"), row.pop("collapses") == "yes"
            studies[study] = (*studies.get(study, ()), Setting(**row, collapses=collapses))
    return studies


STUDIES = read_studies()
# Settings whose curves are drawn: those of the paper's Fig. 2, and more.
CURVES = (
    "default",
    "no stop-gradient",
    "no stop-gradient, BN hidden",
    "no predictor",
    "no predictor, BN hidden",
    "fixed predictor",
)


class AblationRun(NamedTuple):
    """A setting with a seed, and the start of its files' names: folder and run name."""

    setting: Setting
    seed: int
    path: Path

    def rows(self) -> list[dict]:
        """Return the statistics, empty before the run has any."""
        return read_rows(f"{self.path}_statistics.csv")

    def train(self, flags: list) -> None:
        """Train or resume the run in a process of its own. Raises RunError."""
        own = [*self.setting.flags.split(), "--seed", self.seed, "--no-pictures"]
        own += ["--out", self.path.parent, "--name", self.path.name]
        own += ["--resume"] * Path(f"{self.path}_model.pth").is_file()
        run_script("main.py", *flags, *own)


def table_row(label: str, run: AblationRun) -> dict:
    """Return a run's row of the table, from its last epoch. `label`: of the data set."""
    start, *rows = run.rows()
    last = rows[-1]
    warned = [row["collapse"] for row in rows if "collapse" in row]
    return {
        "data": label,
        "epochs": len(rows),
        "setting": run.setting.name,
        "seed": run.seed,
        "flags": run.setting.flags,
        "loss": last["train_loss"],
        "std": last["std"],
        "rank": last["rank"],
        "knn": last["test_acc@1"],
        "untrained_rank": start["rank"],
        "untrained_knn": start["test_acc@1"],
        "collapses": run.setting.collapses,
    } | ({"warned_at_step": warned[0]} if warned else {})


def train_all(runs: list[AblationRun], flags: list, jobs: int) -> None:
    """Train the runs, `jobs` at a time. Raises RunError."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run.train, flags) for run in runs]
        try:
            for future in tqdm(futures, "ablate", unit="run"):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def command(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = utils.Parser("studies.ablate", __doc__)
    add, count = parser.add_argument, utils.number(int, 1)
    add("--study", default="ablations", choices=tuple(STUDIES), help="(ablations)")
    add("--data_name", default="textures", help="as of main.py (textures)")
    add("--data_root", help="as of main.py")
    add("--train_size", type=count, help="as of main.py")
    add("--epochs", type=count, default=6, help="epochs per run (6)")
    add("--knn_every", type=count, default=1, help="as of main.py (1)")
    add("--seeds", type=utils.number(int, 0), nargs="+", default=[0, 1, 2], help="(0 1 2)")
    add("--jobs", type=count, help="runs at a time (with a GPU 1, else the number of cores)")
    text = "folder of the table, the picture, and a folder of the runs (results)"
    add("--out", default="results", help=text)
    args = parser.parse_args(argv)
    cores = cpu_cores()
    jobs = args.jobs or (1 if torch.accelerator.is_available() else cores)
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // jobs))  # of the runs
    flags = ["--data_name", args.data_name, "--recipe", "short", "--epochs", args.epochs]
    flags += ["--num_workers", 1, "--knn_every", args.knn_every]
    label = utils.data_label(args.data_name, args.data_root or "data")
    if args.data_root:
        flags += ["--data_root", args.data_root]
    if args.train_size:
        flags += ["--train_size", args.train_size]
        label += f", {args.train_size} images"
    runs = []
    for seed in args.seeds:
        for setting in STUDIES[args.study]:
            name = f"{label}_{args.epochs}_{setting.name}_{seed}"
            name = name.translate(dict.fromkeys(map(ord, " :',"), "_"))
            runs.append(AblationRun(setting, seed, Path(args.out, args.study, name)))
    train_all([run for run in runs if len(run.rows()) <= args.epochs], flags, jobs)
    rows = [table_row(label, run) for run in runs]
    table = Path(args.out, f"{args.study}.csv")
    with parser.bad_input():
        write(table, args.study, rows, runs, f"{label}, {args.epochs} epochs")
    log(report(args.study, pandas.DataFrame(rows, columns=COLLAPSE_COLUMNS)))
    log(f"wrote {table} and {table.with_suffix('.png')}")


def write(
    table: Path, study: str, new_rows: list[dict], runs: list[AblationRun], title: str
) -> None:
    """Write the table, with the rows of other data, epochs and settings in it, and pictures."""
    key = operator.itemgetter("data", "epochs", "setting", "seed")
    new = set(map(key, new_rows))
    rows = [row for row in read_rows(table) if key(row) not in new] + new_rows
    write_csv(table, rows, COLUMNS if study == "ablations" else COLLAPSE_COLUMNS)
    with atomic_write(table.with_suffix(".png")) as file:
        if study == "ablations":
            figures.plot_ablations(new_rows, title, file)
        else:
            figures.plot_rank_and_knn(rows, file)
    if study == "ablations":
        histories = {}
        for run in runs:
            histories.setdefault(run.setting.name, []).append(run.rows())
        names = [name for name in CURVES if name in histories]
        with atomic_write(table.with_name(f"{table.stem}_curves.png")) as file:
            figures.plot_ablation_curves(histories, names, title, file)


def report(study: str, table: pandas.DataFrame) -> str:
    """Return the summary that is printed: a line per setting, means over seeds."""
    lines = []
    for setting in STUDIES[study]:
        rows = table[table["setting"] == setting.name]
        line = {
            "setting": setting.name,
            "loss": f"{rows['loss'].mean():.2f}",
            "std": f"{rows['std'].mean():.2f}",
            "rank": f"{rows['rank'].mean():.1f}",
            "kNN": f"{rows['knn'].mean():.1f} ({rows['knn'].min():.1f} to {rows['knn'].max():.1f})",
            "untrained": f"{rows['untrained_knn'].mean():.1f}",
        }
        if study == "ablations":
            line["paper, ImageNet"] = f"{setting.paper or '-'} {setting.place}"
        else:
            warned = rows["warned_at_step"].dropna()
            line["should collapse"] = "yes" if setting.collapses else "no"
            line["warned"] = f"{len(warned)} of {len(rows)}"
            line["at step"] = ", ".join(f"{step:.0f}" for step in warned)
        lines.append(line)
    return pandas.DataFrame(lines).to_string(index=False)


if __name__ == "__main__":
    utils.run_command(command)
