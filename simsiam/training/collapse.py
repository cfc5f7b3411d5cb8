"""What is watched in a run: sums of the steps, kNN and rank of the features, and a collapse."""

import functools
from argparse import Namespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simsiam.data.loader import Data, ImageFiles, evenly_spaced
from simsiam.data.survey import FLAT_IMAGES
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import knn
from simsiam.runtime import distributed
from simsiam.runtime.files import RunError
from simsiam.training.meters import TrainMeters
from simsiam.training.probe import Probe
from simsiam.views.augment import Views

# The thresholds are measured: see docs/collapse.md.
WINDOW = 25  # steps whose mean std is looked at: one wait for the device in so many
# A std of z below means total collapse where no BN is at its output: there runs begin at 0.75 or
# 0.4, by --bn, and end below 0.15. With that BN, see `collapse_threshold`.
COLLAPSED_STD = 0.3
# A rank of the bank's features below this part of the untrained encoder's means dimensional
# collapse, and so does one below 2, unless it was so from the start: simple images have that too.
COLLAPSED_RANK, LOWEST_RANK = 0.6, 2
# A weight of VICReg's covariance term above this has kept networks from learning.
STRONG_COVARIANCE = 0.03
SMALL_BATCH = 16  # on a rank, from which down BN's statistics alone can make a run fail


# ---- collapse -----------------------------------------------------------------------------------


def collapse_threshold(bn: str, images: int) -> float:
    """The least healthy `collapse_std` of batches of so many `images`, by SimSiam's `bn`.

    The BN at the projector's output centres z, so that its std cannot fall to 0: all images but one
    get the same output, and that one the opposite, which is a std of 2/sqrt(images). Healthy is
    above 0.95, and the threshold in the middle of both, geometrically.
    """
    return (2 / images**0.5) ** 0.5 if bn in ("default", "all") else COLLAPSED_STD


def collapse(
    least: float, std: float, rank: float | None, start_rank: float, features: int, flat: bool
) -> tuple[str, str] | None:
    """What is seen of a collapse, if one is, and what to try against its kind.

    `least`: `collapse_threshold`; `std`: the mean over a window of steps; `rank`: the effective
    rank of the bank's features, of which there are `features` (None: not measured); `start_rank`:
    that of the untrained encoder; `flat`: whether the images hardly differ.
    """
    lowest = LOWEST_RANK if flat or start_rank >= LOWEST_RANK else 0
    if std < least:
        return (
            f"std of z is {std:.2f}, below {least:.2f}: different images get the same output, so "
            "that the loss goes to -1 and nothing is learned (total collapse)",
            "Try a lower --lr, --warmup_epochs 10, a larger --batch_size",
        )
    if rank is not None and rank < max(COLLAPSED_RANK * start_rank, lowest):
        return (
            f"the rank of the features is {rank:.1f} of {features}, and was {start_rank:.1f} "
            f"before training: images are spread (std {std:.2f}), but over few dimensions "
            "(dimensional collapse)",
            "It comes where the network is small for the data (Li, Efros, Pathak, ECCV 2022), or "
            "lr is high: try a wider or deeper --arch, fewer --epochs, a lower --lr",
        )
    return None


def likely_causes(args: Namespace, usual_lr: float, varied: float) -> list[str]:
    """What of a run is known to make it collapse, and what to try instead.

    `args`: main.py's; `usual_lr`: the recipe's; `varied`: the std of a pixel over the training
    images, mean over all pixels, of 255.
    """
    each = args.batch_size // distributed.world_size()
    causes = {
        "--stop_grad off, the paper's own way to collapse (sec. 4.1): leave it on": (
            args.stop_grad == "off"
        ),
        f"--predictor {args.predictor} (sec. 4.2): choose mlp": args.predictor != "mlp",
        f"--bn {args.bn}, which does not keep z apart (sec. 4.4): choose default": (
            args.bn in ("none", "hidden")
        ),
        f"--lr {args.lr:g}, {args.lr / usual_lr:.3g} times the recipe's: try --lr {usual_lr:g}, or "
        "--warmup_epochs 10": args.lr > 2 * usual_lr,
        f"--covariance {args.covariance:g}, which outweighs the rest: try 0.01": (
            args.covariance > STRONG_COVARIANCE
        ),
        f"BN over no more than {each} images: try --batch_size {64 * distributed.world_size()}": (
            each <= SMALL_BATCH
        ),
        f"the images hardly differ (by {varied:.1f} of 255 levels): look at them, and at "
        "--show_views": varied < FLAT_IMAGES,
    }
    return [cause for cause, here in causes.items() if here]


# ---- the monitor --------------------------------------------------------------------------------


class KnnResult(NamedTuple):
    """What a kNN found. Without test images there is only the bank."""

    bank: Tensor  # L2-normalised features of the training images, N x d
    queries: Tensor | None  # and of the test images, M x d
    ranking: Tensor | None  # of the classes, for each query: int64, M x (up to 5)
    alignment: float | None  # without test images: of features of two views of some of the bank


class Monitor:
    """Watches a run of main.py: kNN accuracy and rank of the features, and whether it collapses.

    `images`: the bank (the training images, or --bank_size of them) and the test images.
    `args`: main.py's; `usual_lr`: the recipe's. `warned`: whether the run was warned before.
    """

    def __init__(
        self,
        net: nn.Module,
        views: Views,
        images: Data,
        args: Namespace,
        usual_lr: float,
        amp: torch.autocast,
        warned: bool = False,
    ):
        self.net, self.views, self.images, self.args = net, views, images, args
        self.usual_lr, self.amp, self.warned = usual_lr, amp, warned
        self.least_std = collapse_threshold(args.bn, args.batch_size // distributed.world_size())
        self.cached: KnnResult | None = None

    @functools.cached_property
    def varied(self) -> float:
        """The std of a pixel over some of the training images, mean over all pixels, of 255."""
        some = self.images.train_images[evenly_spaced(len(self.images.train_images), 256)]
        return torch.cat(list(some.split(256))).float().std(0).mean().item()

    def knn(self) -> KnnResult:
        """The features of the bank and of the test images, and the kNN's ranking.

        Raises FloatingPointError for features that are not finite.
        """
        if self.cached is not None:
            return self.cached
        distributed.broadcast_buffers(self.net)
        images, scored = self.images, self.images.test_images is not None
        of_bank = (self.net.backbone, self.views.eval_transform, images.train_images, self.amp)
        bank = metrics.extract_features(*of_bank)
        if not bank.isfinite().all():
            raise FloatingPointError("the features are not finite")
        if not scored:
            some = metrics.random_subset(
                images.train_images, metrics.ALIGNMENT_IMAGES, self.args.seed
            )
            how = (self.net.backbone, self.views, some, self.amp)
            pairs = metrics.extract_view_features(*how, seed=self.args.seed)
            return KnnResult(bank, None, None, metrics.alignment(*pairs.unbind(1)))
        queries = metrics.extract_features(
            self.net.backbone, self.views.eval_transform, images.test_images, self.amp
        )
        return KnnResult(bank, queries, self.vote(bank, queries, images.train_labels), None)

    def vote(self, bank: Tensor, queries: Tensor, labels: Tensor) -> Tensor:
        """The kNN's ranking of classes; `labels` are of the bank. Ranks share the queries."""
        voters = labels >= 0  # STL-10's unlabelled images cannot vote
        if not voters.all():  # else the bank would be there twice
            bank, labels = bank[voters], labels[voters]
        mine = queries[distributed.local_slice(len(queries))]
        ranking = knn(bank, labels, mine, self.args.k, self.args.temperature)
        return distributed.all_gather(ranking, len(queries))

    def measure(self, keep: bool = False, probe: Probe | None = None) -> dict:
        """Columns of the statistics: rank, and accuracy of the kNN or, without labels, alignment.

        `keep`: let `knn` give these features again, for the pictures. `probe`: to be scored too.
        """
        found = self.knn()
        row = {"rank": metrics.effective_rank(found.bank)}
        if found.ranking is not None:
            top1, top5 = metrics.accuracy(found.ranking, self.images.test_labels)
            row |= {"test_acc@1": top1, "test_acc@5": top5}
        else:
            row["alignment"] = found.alignment
        if probe is not None and found.queries is not None:
            of_test = (found.queries, self.images.test_labels)
            row["probe_acc@1"] = probe.accuracy(*of_test, found.bank)
        self.cached = found if keep else None
        return row

    def untrained(self) -> dict:
        """Row 0 of the statistics, and with labels `raw_acc@1`: the kNN's top-1 on raw pixels.

        Raises RunError for features that are not finite.
        """
        if isinstance(self.images.train_images, ImageFiles):  # it may take as long as an epoch
            distributed.log(f"before training: features of {len(self.images.train_images)} images")
        try:
            row = {"epoch": 0} | self.measure()
        except FloatingPointError as error:  # of weights that are finite, but huge
            raise RunError(f"--init {self.args.init}: {error}: choose other weights") from error
        if self.images.test_images is None:
            distributed.log("no labelled test images: no kNN; std, rank and alignment are watched")
            return row
        pixels = metrics.raw_pixels(self.views.size)
        images = self.images.limit(metrics.MAX_RAW_PIXEL_IMAGES, self.args.seed)
        bank, queries = (
            metrics.extract_features(pixels, self.views.eval_transform, part, self.amp)
            for part in (images.train_images, images.test_images)
        )
        ranking = self.vote(bank, queries, images.train_labels)
        row["raw_acc@1"] = metrics.accuracy(ranking, images.test_labels)[0]
        distributed.log(
            f"kNN top-1 before training: raw pixels {row['raw_acc@1']:.1f} %, untrained encoder "
            f"{row['test_acc@1']:.1f} %"
        )
        return row

    def check_step(
        self, epoch: int, step: int, steps: int, meters: TrainMeters, start_rank: float
    ) -> bool:
        """Whether a collapse is seen for the first time, after a step of `steps` an epoch.

        Looks at std every WINDOW steps and at an epoch's end. `start_rank`: of row 0.
        """
        if (step + 1) % WINDOW and step + 1 < steps:
            return False
        std = meters.pop_window(step % WINDOW + 1)
        return self.check_collapse(epoch, step + 1, std, None, start_rank)

    def check_collapse(
        self, epoch: int, steps: int, std: float, rank: float | None, start_rank: float
    ) -> bool:
        """Whether these are a collapse, and it is the run's first; says so, and what to try."""
        flat = start_rank < LOWEST_RANK and self.varied < FLAT_IMAGES
        seen = collapse(self.least_std, std, rank, start_rank, self.net.features, flat)
        if seen is None or self.warned:
            return False
        self.warned = True
        causes = likely_causes(self.args, self.usual_lr, self.varied)
        what, advice = seen
        if causes:
            advice = f"Likely: {'; '.join(causes)}"
        distributed.log(f"warning: collapse in epoch {epoch + 1}, step {steps}: {what}. {advice}.")
        return True
