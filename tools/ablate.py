"""The paper's ablations, and its collapse, in small: many runs of main.py, a table and a figure.

python -m tools.ablate                    # the ablations: about half an hour on two cores
python -m tools.ablate --study collapse   # runs that collapse and runs that do not

A run that is there is not done again, and one that was cut is gone on with. Results go to
results/ablations.csv or results/collapse.csv, a row a run, and a picture of the same name.
"""

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

import figures
import main
import utils

MAIN = Path(main.__file__)
COLUMNS = (
    "data",
    "epochs",
    "setting",
    "seed",
    "flags",
    "loss",
    "std",
    "rank",
    "knn",
    "untrained_rank",
    "untrained_knn",
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


STUDIES = {
    "ablations": (
        Setting("default", "", "68.1", "Table 1c"),
        Setting("predictor's lr decays", "--no-fix_pred_lr", "67.7", "Table 1, baseline"),
        Setting("no stop-gradient", "--stop_grad off", "0.1", "Fig. 2"),
        Setting("no stop-gradient, BN hidden", "--stop_grad off --bn hidden"),
        Setting("no predictor", "--predictor none", "0.1", "Table 1a"),
        Setting("no predictor, BN hidden", "--predictor none --bn hidden"),
        Setting("fixed predictor", "--predictor fixed", "1.5", "Table 1b"),
        Setting("batch 32", "--batch_size 32"),
        Setting("batch 128", "--batch_size 128", "67.3", "Table 2"),
        Setting("batch 256", "--batch_size 256", "68.1", "Table 2"),
        Setting("BN none", "--bn none", "34.6", "Table 3a"),
        Setting("BN hidden", "--bn hidden", "67.4", "Table 3b"),
        Setting("BN all", "--bn all", "unstable", "Table 3d"),
        Setting("cross-entropy", "--similarity cross_entropy", "63.2", "sec. 4.5"),
        Setting("asymmetric", "--loss asymmetric", "64.8", "sec. 4.6"),
        Setting("asymmetric, 2x", "--loss asymmetric_2x", "67.3", "sec. 4.6"),
        Setting("projector of 1 layer", "--projector_layers 1"),
        Setting("projector of 3 layers", "--projector_layers 3"),
    ),
    "collapse": (
        Setting("no stop-gradient", "--stop_grad off", collapses=True),
        Setting("no stop-gradient, batch 16", "--stop_grad off --batch_size 16", collapses=True),
        Setting("no stop-gradient, batch 128", "--stop_grad off --batch_size 128", collapses=True),
        Setting("no stop-gradient, batch 256", "--stop_grad off --batch_size 256", collapses=True),
        Setting("no stop-gradient, lr 0.3", "--stop_grad off --lr 0.3", collapses=True),
        Setting("no stop-gradient, lr 3", "--stop_grad off --lr 3", collapses=True),
        Setting(
            "no stop-gradient, asymmetric", "--stop_grad off --loss asymmetric", collapses=True
        ),
        Setting("no stop-gradient, BN hidden", "--stop_grad off --bn hidden", collapses=True),
        Setting("no stop-gradient, d 2048", "--stop_grad off --feature_dim 2048", collapses=True),
        Setting("no stop-gradient, resnet14", "--stop_grad off --arch resnet14", collapses=True),
        Setting(
            "no stop-gradient, no predictor", "--stop_grad off --predictor none", collapses=True
        ),
        Setting("BN none", "--bn none", collapses=True),
        Setting("lr 30", "--lr 30", collapses=True),
        Setting("batch 2", "--batch_size 2 --train_size 1000", collapses=True),
        Setting("default"),
        Setting("predictor's lr decays", "--no-fix_pred_lr"),
        Setting("lr 0.3", "--lr 0.3"),
        Setting("lr 3", "--lr 3"),
        Setting("lr 10", "--lr 10"),
        Setting("batch 16", "--batch_size 16"),
        Setting("batch 128", "--batch_size 128"),
        Setting("batch 256", "--batch_size 256"),
        Setting("BN hidden", "--bn hidden"),
        Setting("BN all", "--bn all"),
        Setting("asymmetric", "--loss asymmetric"),
        Setting("d 64", "--feature_dim 64"),
        Setting("d 2048", "--feature_dim 2048"),
        Setting("resnet14", "--arch resnet14"),
        Setting("half of the images", "--train_size 2000"),
    ),
}


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
        return utils.read_csv(table) if table.is_file() else []


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
        raise utils.RunError(f"{run.path}: {errors.strip() or process.returncode}")


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
    parser = utils.Parser("tools.ablate", description=__doc__.split("\n")[0], allow_abbrev=False)
    add, count = parser.add_argument, utils.number(int, 1)
    add("--study", default="ablations", choices=tuple(STUDIES), help="(ablations)")
    add("--data_name", default="textures", help="as of main.py (textures)")
    add("--data_root", default="data", help="as of main.py (data)")
    add("--train_size", type=count, help="as of main.py")
    add("--epochs", type=count, default=6, help="of each run (6)")
    add("--seeds", type=utils.number(int, 0), nargs="+", default=[0, 1, 2], help="(0 1 2)")
    add("--jobs", type=count, help="runs at a time (a GPU: 1; else the cores)")
    add("--out", default="results", help="of table and picture, and a folder of the runs (results)")
    args = parser.parse_args(argv)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = args.jobs or (1 if torch.accelerator.is_available() else cores)
    flags = ["--data_name", args.data_name, "--data_root", args.data_root, "--recipe", "short"]
    flags += ["--epochs", str(args.epochs), "--num_workers", "1"]
    if args.train_size:
        flags += ["--train_size", str(args.train_size)]
    label = utils.data_label(args) + (f", {args.train_size} images" if args.train_size else "")
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
    with utils.last_try():
        rows = found
        if table.is_file():
            key = operator.itemgetter("data", "epochs", "setting", "seed")
            new = set(map(key, found))
            rows = [row for row in utils.read_csv(table) if key(row) not in new] + found
        utils.write_csv(table, rows, COLUMNS if args.study == "ablations" else WARNED)
        with utils.whole_file(table.with_suffix(".png")) as file:
            if args.study == "ablations":
                histories = {}
                for run in runs:
                    histories.setdefault(run.setting.name, []).append(run.rows())
                shown = [name for name in FIG_2 if name in histories]
                figures.ablations(histories, shown, f"{label}, {args.epochs} epochs", file)
            else:
                figures.rank_and_knn(rows, file)
    utils.say(report(args.study, pandas.DataFrame(found, columns=WARNED)))
    utils.say(f"wrote {table} and {table.with_suffix('.png')}")


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
