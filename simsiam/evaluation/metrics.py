"""Features of images, and measures of features: accuracy, collapse, effective rank, alignment."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from simsiam.data.loader import ImageFiles
from simsiam.runtime import distributed
from simsiam.views.augment import Batch, Views

# Most training images for the raw-pixel baseline: 1.2 GB of fp32 pixels at 32 x 32.
MAX_RAW_PIXEL_IMAGES = 100_000
# Images for `alignment` in runs without labels.
ALIGNMENT_IMAGES = 1_000
CHUNK = 512  # images per forward pass; for random views another number gives other views


# ---- features -----------------------------------------------------------------------------------


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    transform: Callable[[Tensor], Tensor],
    images: Tensor | ImageFiles,
    amp: torch.autocast,
    normalise: bool = True,
) -> Tensor:
    """Return the features of `images` in eval mode, L2-normalised by default: N x d, fp32.

    `images` are N x C x H x W; `transform` makes the backbone's input of a chunk of them. The
    backbone keeps its mode, parameters and buffers. Ranks share the images, and every rank gets all
    features. A bar appears on a terminal after two seconds.
    """
    training = backbone.training
    backbone.eval()
    features, done, own = None, 0, images[distributed.local_slice(len(images))]
    disable = True if distributed.rank() else None  # None: enabled on a terminal only
    with tqdm(None, "features", len(own), False, delay=2, disable=disable, unit="image") as bar:
        for chunk in own.split(CHUNK):
            x = transform(chunk)
            with amp:
                rows = backbone(x)
            if features is None:  # allocated once: torch.cat of a list would need twice as much
                features = rows.new_empty(len(own), rows.shape[1], dtype=torch.float32)
            features[done : done + len(x)] = rows
            done += len(x)
            bar.update(len(x))
    backbone.train(training)
    features = distributed.all_gather(features, len(images))
    return F.normalize(features, dim=1, out=features) if normalise else features


def extract_view_features(
    backbone: nn.Module,
    views: Views,
    images: Tensor | ImageFiles,
    amp: torch.autocast,
    number: int = 2,
    seed: int = 0,
) -> Tensor:
    """Return the features of `number` random views of each image: n x number x d, fp32.

    `images` are uint8, n x C x H x W. Size, normalisation and augmentation are those of `views`;
    the views depend on the `seed` alone. As in `extract_features`, the backbone runs in eval mode
    and does not change, and ranks share the work; features are not normalised.
    """
    # One view of a chunk at a time: ten views of 512 images of 224 pixels would take 3 GB.
    one = Views(views.size, views.mean, views.std, views.augmentation, number=1, seed=seed)
    chunks = []
    for step, chunk in enumerate(images.split(CHUNK)):
        # The view's index stands for the epoch, from which `Views` seeds its RNG.
        samples = (one(Batch.alone(chunk, view, step))[0] for view in range(number))
        rows = [extract_features(backbone, nn.Identity(), x, amp, False) for x in samples]
        chunks.append(torch.stack(rows, dim=1))
    return torch.cat(chunks)


def random_subset(images: Tensor | ImageFiles, number: int, seed: int) -> Tensor | ImageFiles:
    """Return at most `number` images, drawn at random and in their order."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    return images[order[:number].sort().values]


def raw_pixels(image_size: int) -> nn.Module:
    """Return the raw-pixel baseline encoder: normalised pixels, averaged to at most 32 x 32."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(min(image_size, 32)), nn.Flatten())


# ---- measures -----------------------------------------------------------------------------------


def accuracy(ranking: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy in percent.

    `ranking`: predicted classes, best first, int64, M x (up to 5); `labels`: int64, M.
    """
    is_correct = ranking == labels[:, None]
    return (
        100 * is_correct[:, 0].float().mean().item(),
        100 * is_correct.any(1).float().mean().item(),
    )


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> list[list[int]]:
    """Count predictions by true class (rows) and predicted class (columns); int64, M and M."""
    cells = labels * classes + predicted
    return cells.bincount(minlength=classes**2).view(classes, classes).tolist()


def collapse_std(z: Tensor) -> Tensor:
    """Return sqrt(d) times the mean over channels of the std of l2-normalised z: N x d -> scalar.

    About 1 where the z are spread evenly over the sphere, 0 where all are equal (paper, sec. 4.1;
    its Fig. 2, middle, shows it without the sqrt(d)).
    """
    return F.normalize(z.float(), dim=1).std(0).mean() * z.shape[1] ** 0.5


def effective_rank(features: Tensor) -> float:
    """Return RankMe (Garrido et al. 2023, arXiv 2210.02885, Eq. 1): N x d -> 1 to min(N, d).

    The exponential of the entropy of the normalised singular values, which are the roots of the
    Gram matrix's eigenvalues; in fp64. Ranks share the work.
    """
    rows = distributed.slice_for_rank(len(features), distributed.rank(), distributed.world_size())
    matrix = distributed.all_reduce(gram_matrix(with_fp64(features[rows])))
    return entropy_rank(torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt())


def with_fp64(x: Tensor) -> Tensor:
    """Return `x` on a device that has fp64: the CPU instead of mps."""
    return x.cpu() if x.device.type == "mps" else x


def gram_matrix(rows: Tensor) -> Tensor:
    """Return `rows.T @ rows` in fp64, a few thousand rows at a time: N x d -> d x d."""
    return sum(chunk.double().T @ chunk.double() for chunk in rows.split(4096))


def entropy_rank(spectrum: Tensor, epsilon: float = 0.0) -> float:
    """Return exp of the entropy of a spectrum divided by its sum (Roy & Vetterli 2007): 1 to d.

    `spectrum`: d numbers >= 0; all zeros give nan. `epsilon` is added to each normalised number, as
    some papers do to keep the logarithm finite; a 0 needs none here.
    """
    parts = spectrum / spectrum.sum() + epsilon
    return torch.special.entr(parts).sum().exp().item()


def alignment(x: Tensor, y: Tensor) -> float:
    """Return the alignment of pairs of views (Wang & Isola 2020, arXiv 2005.10242, sec. 4).

    The mean of |x - y|^2 over L2-normalised features of two views of each image, both N x d: from 0
    to 4, lower is better. In fp64.
    """
    x, y = (F.normalize(with_fp64(part).double(), dim=1) for part in (x, y))
    return (x - y).norm(dim=1).pow(2).mean().item()


def alignment_summary(aligned: float, untrained: float | None) -> str:
    """Return the last line of a run without labels: its alignment, and how to read it."""
    start = "" if untrained is None else f", untrained encoder {untrained:.3f}"
    return (
        f"alignment {aligned:.3f}{start}: a score without labels, lower is better among runs with "
        "the same views and no warning. It correlates weakly with the kNN (Spearman's rho 0.7 and "
        "0.5 on two data sets), and is 0 in a collapse, which std and rank show (docs/collapse.md)"
    )
