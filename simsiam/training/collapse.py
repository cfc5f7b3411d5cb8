"""Monitoring of pre-training: kNN accuracy and effective rank of the features, collapse warnings.

docs/collapse.md explains the two kinds of collapse, and how the thresholds were measured.
"""

import functools
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
from simsiam.training.recipes import RECIPES, PretrainConfig
from simsiam.views.augment import Views

# Steps over which std is averaged before it is checked: the device is read once per window.
STD_WINDOW = 25
# Threshold on std of z without BN at the projector's output: runs start at 0.75 or 0.4, depending
# on --bn, and collapsed ones end below 0.15.
MIN_STD = 0.3
# Thresholds on the effective rank: relative to the untrained encoder's, and absolute. The absolute
# threshold is waived for simple images, on which the untrained encoder is below it already, but not
# for images that hardly differ.
MIN_RANK_RATIO, MIN_RANK = 0.6, 2
# Above this weight of VICReg's covariance term, networks did not learn.
MAX_COVARIANCE = 0.03
# Images per rank up to which noisy BN statistics alone can make a run fail.
SMALL_BATCH = 16


# ---- collapse -----------------------------------------------------------------------------------


def collapse_threshold(bn: str, batch_size: int) -> float:
    """Return the threshold on std below which a run counts as collapsed.

    `bn`: as in `SimSiam`; `batch_size`: images per rank. BN at the projector's output centres z, so
    that std cannot reach 0: all images but one get the same output and that one the opposite, which
    is a std of 2 / sqrt(batch_size). The threshold is the geometric mean of that and 1 (healthy).
    """
    return (2 / batch_size**0.5) ** 0.5 if bn in ("default", "all") else MIN_STD


def likely_causes(config: PretrainConfig, pixel_std: float) -> list[str]:
    """Return the likely causes of a collapse, with fixes.

    `pixel_std`: std of a pixel over the training images, averaged over all pixels, from 0 to 255.
    """
    ranks, lr = distributed.world_size(), config.lr
    usual_lr = RECIPES[config.recipe or "cifar"]["lr"]
    batch_size = config.batch_size // ranks
    causes = {
        "--stop_grad off, the paper's own way to collapse (sec. 4.1): leave it on": (
            config.stop_grad == "off"
        ),
        f"--predictor {config.predictor} (sec. 4.2): choose mlp": config.predictor != "mlp",
        f"--bn {config.bn}, which does not keep z apart (sec. 4.4): choose default": (
            config.bn in ("none", "hidden")
        ),
        f"--lr {lr:g}, {lr / usual_lr:.3g} times the recipe's: try --lr {usual_lr:g}, or "
        "--warmup_epochs 10": lr > 2 * usual_lr,
        f"--covariance {config.covariance:g}, which outweighs the rest of the loss: try 0.01": (
            config.covariance > MAX_COVARIANCE
        ),
        f"BN over only {batch_size} images: try --batch_size {64 * ranks}": (
            batch_size <= SMALL_BATCH
        ),
        f"the images hardly differ (by {pixel_std:.1f} of 255 levels): look at them with "
        "--show_views": pixel_std < FLAT_IMAGES,
    }
    return [cause for cause, applies in causes.items() if applies]


# ---- the monitor --------------------------------------------------------------------------------


class KnnResult(NamedTuple):
    """Features with the kNN's ranking of the test images or, without test images, alignment."""

    bank: Tensor  # L2-normalised features of the training images, N x d
    queries: Tensor | None  # L2-normalised features of the test images, M x d
    ranking: Tensor | None  # classes of each query, best first: int64, M x (up to 5)
    alignment: float | None


class Monitor:
    """Monitor of a pre-training run: measures its features and warns once of a collapse.

    `images`: the kNN's bank (the training images or a subset) and the test images. `warned`: the
    run, which is resumed, was warned before.
    """

    def __init__(
        self,
        net: nn.Module,
        views: Views,
        images: Data,
        config: PretrainConfig,
        amp: torch.autocast,
        warned: bool = False,
    ):
        self.net, self.views, self.images, self.config = net, views, images, config
        self.amp, self.warned = amp, warned
        batch_size = config.batch_size // distributed.world_size()
        self.threshold = collapse_threshold(config.bn, batch_size)
        self.cached: KnnResult | None = None

    @functools.cached_property
    def pixel_std(self) -> float:
        """Std of a pixel over up to 256 training images, averaged over all pixels: 0 to 255."""
        images = self.images.train_images
        images = images[evenly_spaced(len(images), 256)]
        return torch.cat(list(images.split(256))).float().std(0).mean().item()

    def knn(self) -> KnnResult:
        """Extract the features and classify the test images by kNN.

        After `measure(keep=True)` its result is returned again. Raises FloatingPointError for
        features that are not finite.
        """
        if self.cached is not None:
            return self.cached
        distributed.broadcast_buffers(self.net)
        net, views, images = self.net.backbone, self.views, self.images
        bank = metrics.extract_features(net, views.eval_transform, images.train_images, self.amp)
        if not bank.isfinite().all():
            raise FloatingPointError("the features are not finite")
        if images.test_images is None:
            seed = self.config.seed
            sample = metrics.random_subset(images.train_images, metrics.ALIGNMENT_IMAGES, seed)
            pairs = metrics.extract_view_features(net, views, sample, self.amp, seed=seed)
            return KnnResult(bank, None, None, metrics.alignment(*pairs.unbind(1)))
        queries = metrics.extract_features(net, views.eval_transform, images.test_images, self.amp)
        ranking = self._classify(bank, queries, images.train_labels)
        return KnnResult(bank, queries, ranking, None)

    def _classify(self, bank: Tensor, queries: Tensor, labels: Tensor) -> Tensor:
        """Return the classes of each query, best first; ranks share the queries."""
        is_labelled = labels >= 0  # STL-10's unlabelled images have no vote
        if not is_labelled.all():  # indexing copies the bank
            bank, labels = bank[is_labelled], labels[is_labelled]
        own = queries[distributed.local_slice(len(queries))]
        ranking = knn(bank, labels, own, self.config.k, self.config.temperature)
        return distributed.all_gather(ranking, len(queries))

    def measure(self, keep: bool = False, probe: Probe | None = None) -> dict:
        """Return columns of the statistics: rank, and kNN accuracy or (without labels) alignment.

        `keep`: let `knn` return these features again, for the pictures. `probe`: adds its top-1.
        """
        result = self.knn()
        row = {"rank": metrics.effective_rank(result.bank)}
        if result.ranking is None:
            row["alignment"] = result.alignment
        else:
            labels = self.images.test_labels
            top1, top5 = metrics.accuracy(result.ranking, labels)
            row |= {"test_acc@1": top1, "test_acc@5": top5}
            if probe is not None:
                row["probe_acc@1"] = probe.accuracy(result.queries, labels, result.bank)
        self.cached = result if keep else None
        return row

    def untrained(self) -> dict:
        """Return row 0 of the statistics, with the kNN's top-1 on raw pixels (`raw_acc@1`).

        Raises RunError for features that are not finite.
        """
        images = self.images
        if isinstance(images.train_images, ImageFiles):  # may take as long as an epoch
            distributed.log(f"before training: features of {len(images.train_images)} images")
        try:
            row = {"epoch": 0} | self.measure()
        except FloatingPointError as error:  # the weights of --init are finite, but huge
            raise RunError(f"--init {self.config.init}: {error}: choose other weights") from error
        if images.test_images is None:
            distributed.log("no labelled test images: no kNN; std, rank and alignment are watched")
            return row
        images = images.limit(metrics.MAX_RAW_PIXEL_IMAGES, self.config.seed)
        pixels = metrics.raw_pixels(self.views.size)
        bank, queries = (
            metrics.extract_features(pixels, self.views.eval_transform, part, self.amp)
            for part in (images.train_images, images.test_images)
        )
        ranking = self._classify(bank, queries, images.train_labels)
        row["raw_acc@1"] = metrics.accuracy(ranking, images.test_labels)[0]
        distributed.log(
            f"kNN top-1 before training: raw pixels {row['raw_acc@1']:.1f} %, untrained encoder "
            f"{row['test_acc@1']:.1f} %"
        )
        return row

    def check_step(
        self, epoch: int, step: int, steps: int, meters: TrainMeters, start_rank: float
    ) -> bool:
        """Check std after every STD_WINDOW steps and at the end of an epoch of `steps` steps.

        `start_rank`: the untrained encoder's. Returns True at the run's first collapse.
        """
        if (step + 1) % STD_WINDOW and step + 1 < steps:
            return False
        std = meters.pop_window(step % STD_WINDOW + 1)
        return self.check_collapse(epoch, step + 1, std, None, start_rank)

    def check_collapse(
        self, epoch: int, steps: int, std: float, rank: float | None, start_rank: float
    ) -> bool:
        """Print a warning and return True at the run's first collapse.

        `steps`: finished steps of the epoch. `std`: mean over some steps. `rank`: effective rank of
        the bank's features, None if not measured. `start_rank`: the untrained encoder's.
        """
        min_rank = MIN_RANK_RATIO * start_rank
        if start_rank >= MIN_RANK or self.pixel_std < FLAT_IMAGES:
            min_rank = max(min_rank, MIN_RANK)
        if std < self.threshold:
            symptom = (
                f"std of z is {std:.2f}, below {self.threshold:.2f}: different images get the same "
                "output, so that the loss goes to -1 and nothing is learned (total collapse)"
            )
            advice = "Try a lower --lr, --warmup_epochs 10, a larger --batch_size"
        elif rank is not None and rank < min_rank:
            symptom = (
                f"the effective rank of the features is {rank:.1f} of {self.net.features}, and was "
                f"{start_rank:.1f} before training: std is {std:.2f}, but the features span few "
                "dimensions (dimensional collapse)"
            )
            advice = (
                "The network may be too small for the data (Li, Efros, Pathak, ECCV 2022), or lr "
                "too high: try a wider or deeper --arch, fewer --epochs, a lower --lr"
            )
        else:
            return False
        if self.warned:
            return False
        self.warned = True
        causes = likely_causes(self.config, self.pixel_std)
        if causes:
            advice = f"Likely: {'; '.join(causes)}"
        where = f"epoch {epoch + 1}, step {steps}"
        distributed.log(f"warning: collapse in {where}: {symptom}. {advice}.")
        return True
