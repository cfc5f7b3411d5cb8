"""Scores without labels of many runs, and whether they go with accuracy: Spearman's rho.

python -m studies.scores results/*_model.pth
python -m studies.scores results/collapse/*_model.pth results/healthy/*_model.pth --out scores.csv

Each run is a checkpoint of main.py. Its row has the loss and std of its last epoch, the scores of
`simsiam/scores.py` on its own training images, and its kNN top-1 where it has test images. Beside
the table, in `<out>_rho.csv`, is Spearman's rho of each score and the kNN over the runs of each
data set, if these are five or more: of all runs, and of those without a warning of a collapse.
Each score counts as its paper has it, so that 1 is the best rho of all of them. `loss, lidar` and
the like are sums of both's ranks. Intervals are of 95 %, by bootstrap over runs. A row that the
table has is not made again.
"""

import math
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas
import torch
from scipy.stats import bootstrap, rankdata, spearmanr
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python studies/scores.py`

import utils
from simsiam.data.decode import ignore_pil_warnings
from simsiam.data.loader import Data
from simsiam.evaluation import scores
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.models.simsiam import SimSiam
from simsiam.runtime import devices
from simsiam.runtime.distributed import log
from simsiam.runtime.files import RunError, error_prefix, printable, read_csv, write_csv
from simsiam.views.augment import Augmentation, Views
from tools.common import images_of_run, running_flags

# A score of a row of the table, turned so that larger is better. alpha-ReQ is best near 1.
BETTER = {
    "loss": lambda row: -row["loss"],
    "std": lambda row: row["std"],
    "rankme": lambda row: row["rankme"],
    "rankme_z": lambda row: row["rankme_z"],
    "lidar": lambda row: row["lidar"],
    "alpha_req": lambda row: -abs(row["alpha_req"] - 1),
    "uniformity": lambda row: -row["uniformity"],
    "alignment": lambda row: -row["alignment"],
}
COLUMNS = ("run", "data", "epochs", "warned", *BETTER, "knn")
RHO = ("data", "runs", "score", "number", "rho", "low", "high")
LEAST = 5  # runs of a data set for a rho
RESAMPLES = 2_000


def row_of(source: LoadedCheckpoint, images: Data, args: Namespace, amp: torch.autocast) -> dict:
    """The row of a run. Raises FloatingPointError for features that are not finite."""
    state, seen = source.state, source.views
    end = state["history"][-1]
    augmentation = Augmentation.read(state["augmentation"])
    views = Views(seen.size, seen.mean, seen.std, augmentation)
    found = scores.unlabelled_scores(source.net, views, images.train_images, amp, args.seed)
    known = {"run": printable(source.path), "data": label_of(source), "epochs": state["epoch"]}
    known |= {"warned": "collapse" in state["facts"], "loss": end["train_loss"], "std": end["std"]}
    return known | found | ({"knn": end["test_acc@1"]} if "test_acc@1" in end else {})


def label_of(source: LoadedCheckpoint) -> str:
    """The name of a run's images, with their number where that was chosen."""
    args = source.state["args"]
    size = f", {args['train_size']} images" if args["train_size"] else ""
    return utils.data_label(args["data_name"], args["data_root"]) + size


def opened(path: str) -> LoadedCheckpoint:
    """A finished run of main.py. Raises ValueError, or OSError."""
    source = LoadedCheckpoint.open(path)
    if source.state is None or not isinstance(source.net, SimSiam):
        raise ValueError(f"{path}: give a checkpoint of main.py")
    if "train_loss" not in source.state["history"][-1]:
        raise ValueError(f"{path}: has no epoch yet")
    return source


def rows_of(
    sources: list[LoadedCheckpoint], args: Namespace, amp: torch.autocast
) -> Iterator[dict]:
    """A row for each run; the same images are read once."""
    key, images = None, None
    for source in sources:
        saved = source.state["args"]
        names = "data_name data_root train_size split_names".split()
        new = [source.encoder["image_size"], source.reading, *(saved[name] for name in names)]
        new += [saved["seed"]] * (saved["train_size"] is not None)
        if new != key:
            key, images = new, images_of_run(source, vars(args)).to(args.device)
        try:
            yield row_of(source.to(args.device), images, args, amp)
        except FloatingPointError as error:
            raise RunError(f"{source.path}: {error}") from error


def correlations(rows: list[dict], seed: int = 0) -> list[dict]:
    """Spearman's rho of each score, and of its rank and the loss's together, and the kNN.

    For each data set with so many runs as `LEAST`: over all of them, and over those without a
    warning if others had one. A score that is no number counts as the worst; rho is nan where a
    score is the same in all runs. Runs with the same numbers are one, made twice, and count once.
    """
    found = []
    scored = [row for row in rows if not math.isnan(row.get("knn", math.nan))]
    names = ("data", *BETTER, "knn")
    scored = list({tuple(str(row.get(name)) for name in names): row for row in scored}.values())
    for data in dict.fromkeys(row["data"] for row in scored):
        of_data = [row for row in scored if row["data"] == data]
        healthy = [row for row in of_data if not row["warned"]]
        groups = {"all": of_data} | ({"no warning": healthy} if len(healthy) < len(of_data) else {})
        for runs, group in groups.items():
            if len(group) < LEAST:
                continue
            knn = np.array([row["knn"] for row in group])
            # A blank cell: features of a rank below 5 have no alpha-ReQ, a lost run has no loss.
            whole = [dict.fromkeys(BETTER, math.nan) | row for row in group]
            values = {
                name: np.nan_to_num([of(row) for row in whole], nan=-np.inf)
                for name, of in BETTER.items()
            }
            both = {
                f"loss, {name}": rankdata(values["loss"]) + rankdata(value)
                for name, value in values.items()
                if name != "loss"
            }
            for score, value in (values | both).items():
                line = {"data": data, "runs": runs, "score": score, "number": len(group)}
                found.append(line | interval(value, knn, seed))
    return found


def interval(x: np.ndarray, y: np.ndarray, seed: int) -> dict:
    """Spearman's rho of pairs, with the bounds of its 95 % interval: percentiles of the bootstrap.

    Resamples in which all x or all y are the same have no rho, and are left out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such a resample is one
        rho = spearmanr(x, y).statistic

        def statistic(x: np.ndarray, y: np.ndarray) -> float:
            return spearmanr(x, y).statistic

        how = {"paired": True, "vectorized": False, "method": "percentile", "rng": seed}
        drawn = bootstrap((x, y), statistic, n_resamples=RESAMPLES, **how).bootstrap_distribution
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"rho": float(rho), "low": float(low), "high": float(high)}


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = utils.Parser("studies.scores", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_model.pth", help="checkpoints of main.py")
    add("--out", type=utils.file_path, default="scores.csv", help="the table (scores.csv)")
    seed = "of the choice of images, of their views and of the bootstrap (0)"
    add("--seed", type=utils.number(int, 0, 2**32 - 1), default=0, help=seed)
    running_flags(parser)
    args = parser.parse_args(argv)
    out = Path(args.out)
    with warnings.catch_warnings(), parser.bad_input():
        ignore_pil_warnings()
        device, amp = devices.setup_device(args)
        args.device = device
        sources = [opened(path) for path in args.runs]
        with error_prefix(f"--out {out}"):
            rows = read_csv(out, ["run"]) if out.is_file() else []
            if rows and set(rows[0]) - set(COLUMNS):
                raise ValueError("is there, and is another table: choose another name")
        known = {(row["run"], row["epochs"]) for row in rows}
        new = [s for s in sources if (printable(s.path), s.state["epoch"]) not in known]
        made = rows_of(new, args, devices.autocast(device, amp))
        for row in tqdm(made, "scores", len(new), leave=False, disable=None, unit="run"):
            rows.append(row)
            write_csv(out, rows, COLUMNS)
    named = {printable(path) for path in args.runs}
    rows = [row for row in rows if row["run"] in named]
    show = {"index": False, "float_format": "{:.3g}".format, "na_rep": ""}
    log(pandas.DataFrame(rows, columns=COLUMNS).to_string(**show))
    found = correlations(rows, args.seed)
    log(f"wrote {out}")
    if not found:
        log(f"for a rho: give {LEAST} runs or more with a kNN on the same data")
        return
    write_csv(out.with_name(f"{out.stem}_rho.csv"), found, RHO)
    log(pandas.DataFrame(found, columns=RHO).to_string(**show))
    log(f"wrote {out.with_name(f'{out.stem}_rho.csv')}")


if __name__ == "__main__":
    utils.run_command(command)
