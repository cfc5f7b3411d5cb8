"""How good a frozen encoder's features are on other data sets: kNN and logistic regression.

python -m tools.transfer --model_path results/..._model.pth --data_name folder --data_root A B C

In the table knn, linear and pixels are top-1 on all test images, in percent; linear_balanced is the
mean of the classes' own. linear is logistic regression on features under the test transform, with
L2 and L-BFGS, as in SimCLR's appendix (Chen et al. 2020, arXiv 2002.05709); but standardised, and
c is chosen among CS on a held-out tenth of the training images. pixels is the same on raw pixels.
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
from simsiam.data.datasets import DATA_NAMES, check_has_test, load_dataset
from simsiam.data.decode import ignore_pil_warnings
from simsiam.data.loader import Data, ImageFiles, balanced_subset
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import knn
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.runtime import devices, distributed
from simsiam.runtime.config import Text, file_path
from simsiam.runtime.files import error_prefix, printable, write_csv
from simsiam.training.recipes import TEXTURES_HAVE_NO_ROOT
from tools.common import add_encoder_options, open_source

COLUMNS = tuple(
    "data train_size test_size classes knn linear linear_balanced c pixels encoder".split()
)
# C divides the L2 penalty, beside the sum of the images' losses: the smallest is the strictest.
CS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
ITERATIONS = 1000  # of L-BFGS at most; 64 features of 2,000 textures took 550 at the largest C


class Problem(NamedTuple):
    """What is fitted, and scored: inputs, fp32, N x d; labels, int64, N; all on the CPU."""

    inputs: Tensor
    labels: Tensor
    held_out: Tensor  # bool, N: the training images that C is chosen on
    test_inputs: Tensor
    test_labels: Tensor

    @classmethod
    def of(
        cls, images: Data, embed: Callable[[Tensor | ImageFiles], Tensor], seed: int
    ) -> "Problem":
        """That of a data set, with what `embed` makes of its images. Raises ValueError."""
        held = held_out(images.train_labels, seed)
        inputs, test = (embed(part).cpu() for part in (images.train_images, images.test_images))
        return cls(inputs, images.train_labels, held, test, images.test_labels)


def held_out(labels: Tensor, seed: int) -> Tensor:
    """Which samples are a class-balanced, seeded tenth: int64, N -> bool, N.

    No class gives more than half of its own: else the small ones of a set that is not balanced
    would be held out whole, and nothing of them fitted. Raises ValueError for too few samples.
    """
    classes, number = labels.unique(), len(labels)
    if len(classes) < 2:
        raise ValueError("the labelled training images are of fewer than two classes")
    ours = [torch.nonzero(labels == label)[:, 0] for label in classes]
    spare = [own[balanced_subset(labels[own], len(own) // 2, seed)] for own in ours if len(own) > 1]
    if not 0 < number // 10 <= sum(map(len, spare)):
        raise ValueError(
            f"{number} training images of {len(classes)} classes are too few: to choose C a tenth "
            "is held out, and at most half of a class"
        )
    spare = torch.cat(spare)
    found = torch.zeros(number, dtype=torch.bool)
    found[spare[balanced_subset(labels[spare], number // 10, seed)]] = True
    return found


# ---- logistic regression ------------------------------------------------------------------------


def fitted(inputs: Tensor, labels: Tensor, c: float) -> tuple[Pipeline, bool]:
    """Multinomial logistic regression on standardised inputs, N x d; whether it has converged."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=ITERATIONS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(inputs.numpy(), labels.numpy())
    others = [one for one in caught if one.category is not ConvergenceWarning]
    for one in others:  # not ours to keep
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return model, len(others) == len(caught)


def right(model: Pipeline, inputs: Tensor, labels: Tensor) -> np.ndarray:
    """Which samples a model takes for what they are: bool, N."""
    return model.predict(inputs.numpy()) == labels.numpy()


def logistic(problem: Problem, name: str, step: Callable[[], object]) -> tuple[np.ndarray, float]:
    """Which test samples are right, bool, M, at the C that is best on the held-out tenth.

    Of equals the strictest is taken, and fitted again to all training samples. `step` is called
    after each fit. What did not converge is said, in a line about `name`.
    """
    inputs, labels, out = problem.inputs, problem.labels, problem.held_out
    scores, late = [], []
    for c in CS:
        model, converged = fitted(inputs[~out], labels[~out], c)
        scores.append(right(model, inputs[out], labels[out]).mean())
        late += [] if converged else [c]
        step()
    best = CS[scores.index(max(scores))]
    model, converged = fitted(inputs, labels, best)
    late = sorted({*late, *([] if converged else [best])})
    step()
    if late:
        which = ", ".join(f"{c:g}" for c in late)
        distributed.log(
            f"{name}: logistic regression has not converged after {ITERATIONS} iterations at C "
            f"{which}; {best:g} is the one chosen"
        )
    return right(model, problem.test_inputs, problem.test_labels), best


# ---- a data set ---------------------------------------------------------------------------------


def labelled(args: Namespace, source: LoadedCheckpoint, root: str) -> Data:
    """The labelled images at a root, read as the encoder's own were. Raises ValueError, OSError."""
    how = (source.encoder["image_size"], args.num_workers, args.bad_images)
    more = {"decode": source.decode, "split_names": args.split_names}
    images = load_dataset(args.data_name, root, *how, **more)
    check_has_test(images.test_images, root)
    for line in filter(None, (images.summary, *images.unreadable)):
        distributed.log(line)
    return images.select(images.train_labels >= 0)


def problems(
    args: Namespace, source: LoadedCheckpoint, amp: torch.autocast, root: str
) -> tuple[dict, Problem, Problem | None]:
    """What is known of the images at a root; the problem of their features, that of their pixels.

    Raises ValueError or OSError, naming the root or file.
    """
    images = labelled(args, source, root)
    place = "--data_name textures" if args.data_name == "textures" else f"--data_root {root}"
    if args.train_size is not None:
        images = images.subset(args.train_size, args.seed, f"{place}, --train_size")
        place += f", --train_size {args.train_size}"
    with error_prefix(place):
        features = Problem.of(images, lambda part: source.features(part, amp), args.seed)
    if not (features.inputs.isfinite().all() and features.test_inputs.isfinite().all()):
        raise ValueError(f"{args.model_path}: its features of {root} are not finite (--amp off)")
    known = {"train_size": len(images.train_labels), "test_size": len(images.test_labels)}
    known |= {"classes": len(images.classes), "encoder": printable(args.model_path)}
    if not args.pixels:
        return known, features, None
    views, device = source.views, next(source.net.parameters()).device
    raw = metrics.raw_pixels(views.size)

    def embed(part: Tensor | ImageFiles) -> Tensor:
        return metrics.extract_features(
            raw, views.eval_transform, part.to(device), amp, normalise=False
        )

    images = images.limit(metrics.MAX_RAW_PIXEL_IMAGES, args.seed)
    return known, features, Problem.of(images, embed, args.seed)


def scores(
    features: Problem,
    pixels: Problem | None,
    name: str,
    device: torch.device,
    step: Callable[[], object],
) -> dict:
    """The columns knn to pixels, of COLUMNS, in percent; see `logistic`."""
    bank, queries = (
        F.normalize(x.to(device), dim=1) for x in (features.inputs, features.test_inputs)
    )
    ranking = knn(bank, features.labels.to(device), queries).cpu()
    row = {"knn": metrics.accuracy(ranking, features.test_labels)[0]}
    step()
    hits, row["c"] = logistic(features, f"{name}, features", step)
    row["linear"] = 100 * hits.mean()
    labels = features.test_labels.numpy()
    row["linear_balanced"] = 100 * np.mean([hits[labels == i].mean() for i in np.unique(labels)])
    if pixels:
        row["pixels"] = 100 * logistic(pixels, f"{name}, pixels", step)[0].mean()
    return row


# ---- the command --------------------------------------------------------------------------------


def opened(args: Namespace) -> LoadedCheckpoint:
    """The checkpoint, after a look at all that is told without it. Raises ValueError, OSError."""
    utils.check_new("--out", args.out, args.overwrite)
    if args.data_name == "textures" and args.data_root:
        raise ValueError(TEXTURES_HAVE_NO_ROOT)
    args.data_root = args.data_root or ["data"]
    if args.data_name in ("folder", "imagenet"):  # the last of many is not found missing at the end
        for root in args.data_root:
            check_has_test(folders.find_images(Path(root), args.split_names).test, root)
    source = open_source(args)
    if source.is_linear:
        distributed.log(f"{args.model_path}: is a linear model, of which the encoder alone is used")
    return source


def names(args: Namespace) -> list[str]:
    """The data sets' names in the table; those of folders of one name have the whole path."""
    short = [utils.data_label(args.data_name, root) for root in args.data_root]
    long = [f"{args.data_name}:{root}" for root in args.data_root]
    both = zip(short, long, strict=True)
    return [printable(one if short.count(one) == 1 else other) for one, other in both]


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = utils.Parser("tools.transfer", __doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="a checkpoint, ours or another project's")
    add("--data_name", required=True, choices=DATA_NAMES, help="as of main.py")
    add("--data_root", nargs="+", metavar="ROOT", help="as of main.py; several: a row each (data)")
    add("--split_names", nargs="+", metavar="NAME", help="as of main.py")
    size = "a class-balanced, seeded subset of the labelled training images"
    add("--train_size", type=utils.number(int, 1), help=size)
    pixels = "fit raw pixels too, the baseline (yes)"
    add("--pixels", action=BooleanOptionalAction, default=True, help=pixels)
    add(
        "--out",
        type=utils.argument(Text(valid=file_path)),
        default="transfer.csv",
        help="the table (transfer.csv)",
    )
    add("--overwrite", action="store_true", help="replace the table if it is there")
    add("--seed", type=utils.number(int, 0, 2**32 - 1), default=0, help="of the subsets (0)")
    add_encoder_options(parser)
    args = parser.parse_args(argv)
    steps = 2 + (1 + args.pixels) * (len(CS) + 1)  # of a data set: features, kNN and the fits
    total = steps * len(args.data_root or [1])
    with tqdm(None, "transfer", total, leave=False, disable=None) as bar:
        sets = []
        with warnings.catch_warnings(), parser.bad_input():
            ignore_pil_warnings()
            device, amp = devices.setup_device(args)
            source = opened(args).to(device)
            for root in args.data_root:
                sets.append(problems(args, source, devices.autocast(device, amp), root))
                bar.update()
        rows = []
        for name, (known, *both) in zip(names(args), sets, strict=True):
            rows.append({"data": name} | known | scores(*both, name, device, bar.update))
    table = pandas.DataFrame(rows, columns=COLUMNS)
    how = {"float_format": "{:.2f}".format, "formatters": {"c": "{:g}".format}, "na_rep": ""}
    distributed.log(table.to_string(index=False, **how))
    with parser.bad_input():
        write_csv(args.out, rows, COLUMNS)
    distributed.log(f"wrote {args.out}")


if __name__ == "__main__":
    utils.run_command(command)
