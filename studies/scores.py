"""Scores without labels of many runs, and Spearman's rho of each score with the kNN accuracy.

python -m studies.scores results/*_model.pth
python -m studies.scores results/collapse/*_model.pth results/healthy/*_model.pth --out scores.csv

RUN_model.pth is a checkpoint of main.py. Its row of the table has the loss and std of its last
epoch, the scores of `unlabelled_scores` on its training images, and its kNN top-1 if it has test
images. A second table, `<out>_rho.csv`, has Spearman's rho of each score with the kNN top-1 over
the runs of each data set with five runs or more: of all runs, and of those without a collapse
warning. Scores that are better when lower are negated, so that a rho of 1 is best for all; `loss,
lidar` and the like are sums of the ranks by both. Intervals are 95 %, by bootstrap over runs. A row
that is in the table already is not computed again.
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
import torch.nn.functional as F
from scipy.linalg import eigh
from scipy.stats import bootstrap, spearmanr
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python studies/scores.py`

import utils
from simsiam.data.decode import ignore_pil_warnings
from simsiam.data.loader import Data, ImageFiles
from simsiam.evaluation.metrics import (
    alignment,
    effective_rank,
    entropy_rank,
    extract_features,
    extract_view_features,
    gram_matrix,
    random_subset,
    with_fp64,
)
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.models.simsiam import SimSiam
from simsiam.runtime import devices
from simsiam.runtime.config import Text, check_path
from simsiam.runtime.distributed import log
from simsiam.runtime.files import RunError, error_prefix, printable, read_csv, write_csv
from simsiam.views.augment import Views
from tools.common import add_run_options, images_of_run

# Scores, and whether a larger one is better (1) or a lower one (-1); alpha-ReQ is best near 1.
SIGNS = {"loss": -1, "std": 1, "rankme": 1, "rankme_z": 1, "lidar": 1, "alpha_req": -1}
SIGNS |= {"uniformity": -1, "alignment": -1}
COLUMNS = ("run", "data", "epochs", "warned", *SIGNS, "knn")
RHO_COLUMNS = ("data", "runs", "score", "number", "rho", "low", "high")
MIN_RUNS = 5  # of a data set for a rho
RESAMPLES = 2_000
# Images under the test transform, images in random views, and views of each. 5,000 images are more
# than twice the channels of a ResNet-50. LiDAR's paper takes more images than channels, in 10 to
# 100 views: 1,000 are enough for a ResNet-18.
IMAGES, VIEWED_IMAGES, VIEWS = 5_000, 1_000, 10
# LiDAR: added to the diagonal of the within-class scatter, as in stable-pretraining, and to each
# part of the spectrum, as in reptrix.
DELTA, EPSILON = 1e-4, 1e-7
# alpha-ReQ: first and last eigenvalue of the fit, counted from 1, and the part of the largest
# eigenvalue below which one is rounding error.
FIT_RANGE, ROUNDING = (4, 100), 1e-12


# ---- scores -------------------------------------------------------------------------------------


def lidar(features: Tensor, delta: float = DELTA) -> float:
    """Return LiDAR (Thilak et al. 2024, arXiv 2312.04000, sec. 3): n x q x d -> 1 to min(n - 1, d).

    `features` are of q views of each of n images, not normalised, since `delta` assumes their usual
    size. With images as classes, and views as their samples, Sb is the covariance of the images'
    means and Sw the mean covariance of an image's views, plus delta I; both divide by the number of
    terms. The score is exp of the entropy of the normalised eigenvalues of Sw^-1/2 Sb Sw^-1/2, with
    the paper's epsilon added to each. In fp64.

    After a total collapse the score is that of rounding errors (see `metrics.collapse_std`); nan
    where all means are equal.
    """
    n, q = features.shape[:2]
    features = with_fp64(features)
    means = features.mean(1, dtype=torch.float64)
    between = gram_matrix(means - means.mean(0)) / n
    within = sum(
        gram_matrix((views - mean[:, None]).flatten(0, 1))
        for views, mean in zip(features.split(256), means.split(256), strict=True)
    ) / (n * q)
    within.diagonal().add_(delta)
    # The eigenvalues of Sw^-1 Sb are those of Sw^-1/2 Sb Sw^-1/2.
    spectrum = eigh(between.cpu().numpy(), within.cpu().numpy(), eigvals_only=True)
    return entropy_rank(torch.from_numpy(spectrum).clamp(min=0), EPSILON)


def alpha_req(features: Tensor) -> float:
    """Return alpha-ReQ (Agrawal et al., NeurIPS 2022): N x d -> alpha of a spectrum i^-alpha.

    The spectrum is that of the covariance of the unnormalised `features`, in descending order.
    alpha is the negated slope of log eigenvalue over log i by least squares with weights 1/i, for i
    from 4 to 100 or to the last eigenvalue above rounding error. The paper asks for a line in
    log-log; the range and the weights are those of its authors' code, fastssl. The first few
    eigenvalues would tilt the line, few images determine the last ones poorly, and the weights keep
    the many large i, close together on a log scale, from dominating. In fp64; nan where fewer than
    two eigenvalues are left. By the paper an alpha near 1 is best.
    """
    features = with_fp64(features)
    centred = features - features.mean(0, dtype=torch.float64)
    spectrum = torch.linalg.eigvalsh(gram_matrix(centred) / len(centred)).flip(0)
    first, last = FIT_RANGE
    fitted = spectrum[:last][spectrum[:last] > ROUNDING * spectrum[0]][first - 1 :]
    if len(fitted) < 2:
        return math.nan
    i = np.arange(first, first + len(fitted))
    slope, _ = np.polyfit(np.log(i), fitted.log().cpu().numpy(), 1, w=i**-0.5)  # w is squared
    return -slope


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """Return uniformity (Wang & Isola 2020, arXiv 2005.10242, sec. 4): N x d -> about -2t to 0.

    The log of the mean of exp(-t |xi - xj|^2) over pairs i < j of L2-normalised features; lower is
    better. Features after a ReLU have no negative cosine, so their score is at least -2t. In fp64,
    with memory for N^2 / 2 numbers.
    """
    distances = F.pdist(F.normalize(with_fp64(features).double(), dim=1))
    return (-t * distances**2).logsumexp(0).item() - math.log(len(distances))


def unlabelled_scores(
    net: SimSiam,
    views: Views,
    images: Tensor | ImageFiles,
    amp: torch.autocast,
    seed: int = 0,
    number: int = IMAGES,
    viewed: int = VIEWED_IMAGES,
    q: int = VIEWS,
) -> dict[str, float]:
    """Return the scores of a network on uint8 `images`, a function of these and of the `seed`.

    Of up to `number` images under the test transform: `rankme` of L2-normalised backbone features
    (as the column `rank` of the statistics), `rankme_z` of z, `alpha_req`. Of up to `viewed` images
    in `q` random views each: `lidar`, `uniformity` of their first views, `alignment` of each view
    and the next. `viewed` should exceed the number of channels, and LiDAR is comparable for equal
    numbers of images only. Raises FloatingPointError for non-finite features.
    """
    plain, augmented = (random_subset(images, size, seed) for size in (number, viewed))
    bank = extract_features(net.backbone, views.eval_transform, plain, amp, normalise=False)
    z = extract_features(net.projector, nn.Identity(), bank, amp)
    features = extract_view_features(net.backbone, views, augmented, amp, q, seed)
    if not all(part.isfinite().all() for part in (bank, z, features)):
        raise FloatingPointError("the features are not finite")
    return {
        "rankme": effective_rank(F.normalize(bank, dim=1)),
        "rankme_z": effective_rank(z),
        "lidar": lidar(features),
        "alpha_req": alpha_req(bank),
        "uniformity": uniformity(features[:, 0]),
        "alignment": alignment(features[:, :-1].flatten(0, 1), features[:, 1:].flatten(0, 1)),
    }


# ---- the table of runs --------------------------------------------------------------------------


def run_row(source: LoadedCheckpoint, images: Data, args: Namespace, amp: torch.autocast) -> dict:
    """Return the table's row of a run. Raises FloatingPointError for non-finite features."""
    state = source.state
    end = state["history"][-1]
    augmentation = source.config.augmentation
    views = Views(source.views.size, source.views.mean, source.views.std, augmentation)
    row = {"run": printable(source.path), "data": data_name(source), "epochs": state["epoch"]}
    row |= {"warned": "collapse" in state["extra"], "loss": end["train_loss"], "std": end["std"]}
    row |= unlabelled_scores(source.net, views, images.train_images, amp, args.seed)
    return row | ({"knn": end["test_acc@1"]} if "test_acc@1" in end else {})


def data_name(source: LoadedCheckpoint) -> str:
    """Return the name of a run's data, with the number of training images if that was a flag."""
    args = vars(source.config)
    size = f", {args['train_size']} images" if args["train_size"] else ""
    return utils.data_label(args["data_name"], args["data_root"]) + size


def open_run(path: str) -> LoadedCheckpoint:
    """Open a checkpoint of main.py with an epoch or more. Raises ValueError or OSError."""
    source = LoadedCheckpoint.open(path)
    if source.state is None or not isinstance(source.net, SimSiam):
        raise ValueError(f"{path}: is no checkpoint of main.py: choose one of its *_model.pth")
    if "train_loss" not in source.state["history"][-1]:
        raise ValueError(f"{path}: has no finished epoch: train it first")
    return source


def run_rows(
    sources: list[LoadedCheckpoint], args: Namespace, amp: torch.autocast
) -> Iterator[dict]:
    """Yield the rows of runs; consecutive runs on the same images read them once."""
    key, images = None, None
    for source in sources:
        saved = vars(source.config)
        names = "data_name data_root train_size split_names".split()
        new = [source.encoder["image_size"], source.decode, *(saved[name] for name in names)]
        new += [saved["seed"]] * (saved["train_size"] is not None)
        if new != key:
            key, images = new, images_of_run(source, vars(args)).to(args.device)
        try:
            yield run_row(source.to(args.device), images, args, amp)
        except FloatingPointError as error:
            raise RunError(f"{source.path}: {error}") from error


# ---- correlations -------------------------------------------------------------------------------


def correlations(rows: list[dict], seed: int = 0) -> list[dict]:
    """Return rows of RHO_COLUMNS: Spearman's rho of each score, and of each with the loss.

    For each data set with MIN_RUNS runs or more: over all of them, and, if some were warned of a
    collapse, over the others. A missing score counts as the worst; rho is nan for a score that is
    the same in all runs. Runs with the same numbers are one run made twice, and count once.
    """
    table, names = [], list(SIGNS)
    runs = pandas.DataFrame(rows, columns=["data", "warned", *names, "knn"]).dropna(subset="knn")
    runs = runs.drop_duplicates(["data", *names, "knn"])
    runs["alpha_req"] = (runs["alpha_req"].astype(float) - 1).abs()
    # alpha-ReQ is blank for features of a rank below 5, the loss for a diverged run.
    runs[names] = (runs[names].astype(float) * pandas.Series(SIGNS)).fillna(-np.inf)
    for data, of_data in runs.groupby("data", sort=False):
        warned = of_data["warned"].astype(bool)
        groups = {"all": of_data} | ({"no warning": of_data[~warned]} if warned.any() else {})
        for name, group in groups.items():
            if len(group) < MIN_RUNS:
                continue
            values, ranks = group[names], group[names].rank()
            with_loss = ranks.drop(columns="loss").add(ranks["loss"], axis=0).add_prefix("loss, ")
            for score, value in values.join(with_loss).items():
                line = {"data": data, "runs": name, "score": score, "number": len(group)}
                table.append(line | rho_interval(value.to_numpy(), group["knn"].to_numpy(), seed))
    return table


def rho_interval(x: np.ndarray, y: np.ndarray, seed: int) -> dict[str, float]:
    """Return Spearman's rho of pairs, and the percentile bootstrap's 95 % interval.

    Resamples in which all x or all y are equal have no rho, and are left out.
    """

    def rho(x: np.ndarray, y: np.ndarray) -> float:
        return float(spearmanr(x, y).statistic)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each resample without a rho warns
        options = {"paired": True, "vectorized": False, "method": "percentile", "rng": seed}
        resampled = bootstrap((x, y), rho, n_resamples=RESAMPLES, **options)
        low, high = np.nanpercentile(resampled.bootstrap_distribution, [2.5, 97.5])
        return {"rho": rho(x, y), "low": float(low), "high": float(high)}


def command(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = utils.Parser("studies.scores", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_model.pth", help="checkpoints of main.py")
    add(
        "--out",
        type=utils.argument(Text(check_text=check_path)),
        default="scores.csv",
        help="the table (scores.csv)",
    )
    seed = "for choosing images, for their views and for the bootstrap (0)"
    add("--seed", type=utils.number(int, 0, 2**32 - 1), default=0, help=seed)
    add_run_options(parser)
    args = parser.parse_args(argv)
    out = Path(args.out)
    with warnings.catch_warnings(), parser.bad_input():
        ignore_pil_warnings()
        device, amp = devices.setup_device(args)
        args.device = device
        sources = [open_run(path) for path in args.runs]
        with error_prefix(f"--out {out}"):
            rows = read_csv(out, ["run"]) if out.is_file() else []
            if rows and set(rows[0]) - set(COLUMNS):
                raise ValueError("is another table: choose another name")
        in_table = {(row["run"], row["epochs"]) for row in rows}
        new = [s for s in sources if (printable(s.path), s.state["epoch"]) not in in_table]
        new_rows = run_rows(new, args, devices.autocast(device, amp))
        for row in tqdm(new_rows, "scores", len(new), leave=False, disable=None, unit="run"):
            rows.append(row)
            write_csv(out, rows, COLUMNS)
    chosen = {printable(path) for path in args.runs}
    rows = [row for row in rows if row["run"] in chosen]
    layout = {"index": False, "float_format": "{:.3g}".format, "na_rep": ""}
    log(pandas.DataFrame(rows, columns=COLUMNS).to_string(**layout))
    log(f"wrote {out}")
    table = correlations(rows, args.seed)
    if not table:
        log(f"no correlations: they need {MIN_RUNS} runs or more with a kNN on the same data")
        return
    rho_out = out.with_name(f"{out.stem}_rho.csv")
    write_csv(rho_out, table, RHO_COLUMNS)
    log(pandas.DataFrame(table, columns=RHO_COLUMNS).to_string(**layout))
    log(f"wrote {rho_out}")


if __name__ == "__main__":
    utils.run_command(command)
