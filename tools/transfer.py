"""Evaluate a frozen encoder on other data sets: kNN and logistic regression on its features.

python -m tools.transfer --model_path results/..._model.pth --data_name folder --data_root A B C

The table has a row per data set. knn, linear and pixels are top-1 on all test images, in percent;
linear_balanced is the mean of the classes' accuracies. linear is logistic regression on features
under the test transform, with an L2 penalty and L-BFGS, as in SimCLR's appendix (Chen et al. 2020,
arXiv 2002.05709), except that features are standardised, and c is chosen among CS on a held-out
tenth of the training images. pixels is the same on raw pixels.
"""

import sys
import warnings
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python tools/transfer.py`

import utils
from simsiam.data import folders
from simsiam.data.datasets import DATASETS, check_has_test
from simsiam.data.decode import ignore_pil_warnings
from simsiam.data.loader import Data, ImageFiles, balanced_subset
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import knn
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.runtime import devices, distributed
from simsiam.runtime.config import Text, check_path
from simsiam.runtime.files import error_prefix, printable, write_csv
from simsiam.training.recipes import TEXTURES_HAVE_NO_ROOT
from tools.common import MODEL_HELP, add_encoder_options, add_main_options, load_images, open_source

COLUMNS = tuple(
    "data train_size test_size classes knn linear linear_balanced c pixels encoder".split()
)
# Inverse strengths of the L2 penalty, relative to the sum of the losses; strictest first.
CS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
ITERATIONS = 1000  # of L-BFGS at most; 64 features of 2,000 textures took 550 at the largest C


class Problem(NamedTuple):
    """A classification problem on the CPU: inputs, fp32, N x d, and labels, int64, N.

    `held_out`: the training samples on which C is chosen, bool, N.
    """

    inputs: Tensor
    labels: Tensor
    held_out: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    @classmethod
    def from_images(
        cls, images: Data, embed: Callable[[Tensor | ImageFiles], Tensor], seed: int
    ) -> "Problem":
        """Embed the images of a data set. Raises as `hold_out`."""
        held_out = hold_out(images.train_labels, seed)
        inputs, test = (embed(part).cpu() for part in (images.train_images, images.test_images))
        return cls(inputs, images.train_labels, held_out, test, images.test_labels)


def hold_out(labels: Tensor, seed: int) -> Tensor:
    """Choose a class-balanced, seeded tenth of the samples: int64, N -> bool, N.

    It takes at most half of a class, so that of a small class some samples are left to fit. Raises
    ValueError for too few samples.
    """
    classes, number = labels.unique(), len(labels)
    if len(classes) < 2:
        raise ValueError("the labelled training images are of fewer than two classes")
    parts = []
    for label in classes:
        indices = torch.nonzero(labels == label)[:, 0]
        if len(indices) > 1:
            half = balanced_subset(labels[indices], len(indices) // 2, seed)
            parts.append(indices[half])
    if not 0 < number // 10 <= sum(map(len, parts)):
        raise ValueError(
            f"{number} training images of {len(classes)} classes are too few: to choose C a tenth "
            "is held out, and at most half of a class"
        )
    spare = torch.cat(parts)
    mask = torch.zeros(number, dtype=torch.bool)
    mask[spare[balanced_subset(labels[spare], number // 10, seed)]] = True
    return mask


# ---- logistic regression ------------------------------------------------------------------------


def fit(inputs: Tensor, labels: Tensor, c: float) -> tuple[Pipeline, bool]:
    """Fit a multinomial logistic regression to standardised inputs, N x d.

    Returns the model, and whether it has converged.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=ITERATIONS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(inputs.numpy(), labels.numpy())
    return model, not any(issubclass(one.category, ConvergenceWarning) for one in caught)


def logistic(problem: Problem, title: str) -> tuple[np.ndarray, float]:
    """Return which test predictions are correct (bool, M), and the C that was chosen.

    C is the best on the held-out tenth, the strictest among equals; the model is then fitted to
    all training samples. A fit that does not converge is logged under `title`.
    """
    inputs, labels, held_out = problem.inputs, problem.labels, problem.held_out
    scores, unconverged = [], set()
    for c in tqdm(CS, title, leave=False, disable=None, unit="fit"):
        model, has_converged = fit(inputs[~held_out], labels[~held_out], c)
        scores.append(model.score(inputs[held_out].numpy(), labels[held_out].numpy()))
        unconverged |= set() if has_converged else {c}
    best = CS[scores.index(max(scores))]
    model, has_converged = fit(inputs, labels, best)
    unconverged |= set() if has_converged else {best}
    if unconverged:
        distributed.log(
            f"{title}: logistic regression has not converged after {ITERATIONS} iterations at C "
            f"{', '.join(f'{c:g}' for c in sorted(unconverged))}; {best:g} is the one chosen"
        )
    return model.predict(problem.test_inputs.numpy()) == problem.test_labels.numpy(), best


# ---- a data set ---------------------------------------------------------------------------------


def load_labelled(args: Namespace, source: LoadedCheckpoint, root: str) -> Data:
    """Load the labelled images at a root, decoded as the encoder's training images were.

    Raises ValueError or OSError.
    """
    images = load_images(source, args.data_name, root, args.split_names, vars(args))
    check_has_test(images.test_images, root)
    for line in filter(None, (images.summary, *images.unreadable)):
        distributed.log(line)
    return images.select(images.train_labels >= 0)


def pixel_problem(
    source: LoadedCheckpoint, images: Data, amp: torch.autocast, seed: int
) -> Problem:
    """Return the problem of raw pixels, the baseline, at the encoder's image size."""
    views, device = source.views, next(source.net.parameters()).device
    raw = metrics.raw_pixels(views.size)

    def embed(part: Tensor | ImageFiles) -> Tensor:
        return metrics.extract_features(
            raw, views.eval_transform, part.to(device), amp, normalise=False
        )

    return Problem.from_images(images, embed, seed)


def load_problems(
    args: Namespace, source: LoadedCheckpoint, amp: torch.autocast, root: str
) -> tuple[dict, Problem, Problem | None]:
    """Return a data set's sizes, the problem of its features and, with --pixels, of its pixels.

    Raises ValueError or OSError, naming the root or file.
    """
    images = load_labelled(args, source, root)
    prefix = "--data_name textures" if args.data_name == "textures" else f"--data_root {root}"
    if args.train_size is not None:
        images = images.subset(args.train_size, args.seed, f"{prefix}, --train_size")
        prefix += f", --train_size {args.train_size}"
    with error_prefix(prefix):
        features = Problem.from_images(images, lambda part: source.features(part, amp), args.seed)
    if not (features.inputs.isfinite().all() and features.test_inputs.isfinite().all()):
        raise ValueError(f"{args.model_path}: its features of {root} are not finite: try --amp off")
    sizes = {
        "train_size": len(images.train_labels),
        "test_size": len(images.test_labels),
        "classes": len(images.classes),
    }
    if not args.pixels:
        return sizes, features, None
    images = images.limit(metrics.MAX_RAW_PIXEL_IMAGES, args.seed)
    return sizes, features, pixel_problem(source, images, amp, args.seed)


def evaluate(features: Problem, pixels: Problem | None, title: str, device: torch.device) -> dict:
    """Return the columns knn to pixels, in percent."""
    bank, queries = (
        F.normalize(x.to(device), dim=1) for x in (features.inputs, features.test_inputs)
    )
    ranking = knn(bank, features.labels.to(device), queries).cpu()
    row = {"knn": metrics.accuracy(ranking, features.test_labels)[0]}
    is_correct, row["c"] = logistic(features, f"{title}, features")
    row["linear"] = 100 * is_correct.mean()
    labels = features.test_labels.numpy()
    by_class = [is_correct[labels == label].mean() for label in np.unique(labels)]
    row["linear_balanced"] = 100 * np.mean(by_class)
    if pixels:
        row["pixels"] = 100 * logistic(pixels, f"{title}, pixels")[0].mean()
    return row


# ---- the command --------------------------------------------------------------------------------


def check_and_open(args: Namespace) -> LoadedCheckpoint:
    """Open the checkpoint, after checks that do not need it. Raises ValueError or OSError."""
    utils.check_new("--out", args.out, args.overwrite)
    if args.data_name == "textures" and args.data_root:
        raise ValueError(TEXTURES_HAVE_NO_ROOT)
    args.data_root = args.data_root or ["data"]
    if args.data_name in ("folder", "imagenet"):  # so that a missing root is refused at once
        for root in args.data_root:
            check_has_test(folders.find_images(Path(root), args.split_names).test, root)
    source = open_source(args)
    if source.is_linear:
        distributed.log(f"{args.model_path}: is a linear model; only its encoder is used")
    return source


def data_labels(args: Namespace) -> list[str]:
    """Return the data sets' names in the table; folders of the same name get their whole path."""
    short = [utils.data_label(args.data_name, root) for root in args.data_root]
    long = [f"{args.data_name}:{root}" for root in args.data_root]
    pairs = zip(short, long, strict=True)
    return [printable(name if short.count(name) == 1 else path) for name, path in pairs]


def parse(argv: list[str] | None) -> tuple[utils.Parser, Namespace]:
    """Parse the command line."""
    parser = utils.Parser("tools.transfer", __doc__)
    add = parser.add_argument
    add("--model_path", required=True, help=MODEL_HELP)
    add("--data_name", required=True, choices=DATASETS, help="as of main.py")
    text = "as of main.py; with several, a row for each (data)"
    add("--data_root", nargs="+", metavar="ROOT", help=text)
    add_main_options(parser, "split_names")
    text = "use a class-balanced, seeded subset of the labelled training images"
    add("--train_size", type=utils.number(int, 1), help=text)
    text = "also evaluate raw pixels, the baseline (yes)"
    add("--pixels", action=BooleanOptionalAction, default=True, help=text)
    path = utils.argument(Text(check_text=check_path))
    add("--out", type=path, default="transfer.csv", help="the table (transfer.csv)")
    add("--overwrite", action="store_true", help="replace an existing table")
    text = "seed of the subsets (0)"
    add("--seed", type=utils.number(int, 0, 2**32 - 1), default=0, help=text)
    add_encoder_options(parser)
    return parser, parser.parse_args(argv)


def command(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser, args = parse(argv)
    with parser.bad_input():
        ignore_pil_warnings()
        device, amp = devices.setup_device(args)
        source, autocast = check_and_open(args).to(device), devices.autocast(device, amp)
        data_sets = [load_problems(args, source, autocast, root) for root in args.data_root]
    rows, encoder = [], {"encoder": printable(args.model_path)}
    for label, (sizes, *problems) in zip(data_labels(args), data_sets, strict=True):
        rows.append({"data": label} | sizes | encoder | evaluate(*problems, label, device))
    table = pandas.DataFrame(rows, columns=COLUMNS)
    text = table.to_string(
        index=False, na_rep="", float_format="{:.2f}".format, formatters={"c": "{:g}".format}
    )
    distributed.log(text)
    with parser.bad_input():
        write_csv(args.out, rows, COLUMNS)
    distributed.log(f"wrote {args.out}")


if __name__ == "__main__":
    utils.run_command(command)
