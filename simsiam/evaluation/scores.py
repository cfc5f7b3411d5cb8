"""Scores of an encoder that need no labels: LiDAR, alpha-ReQ, alignment and uniformity. Pure.

RankMe is `metrics.effective_rank`. Each of them has been found to go with the accuracy of a linear
head, in some settings; none of them measures it.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.data.loader import ImageFiles
from simsiam.evaluation import metrics
from simsiam.models.simsiam import SimSiam
from simsiam.views.augment import Batch, Views

# LiDAR's constants: what is added to the diagonal of the within-class scatter, as in
# stable-pretraining, and to each part of the spectrum, as in reptrix. Others' code has others.
DELTA, EPSILON = 1e-4, 1e-7
# The eigenvalues that alpha-ReQ is fitted to, counted from 1, and the part of the largest one up to
# which an eigenvalue is rounding error: of a dead channel, or of fewer images than channels.
FITTED, NOTHING = (4, 100), 1e-12
# What `unlabelled_scores` looks at: so many images at most under the test transform, and so many in
# so many random views. 5,000 images are more than twice the channels of a ResNet-50. LiDAR's paper
# takes more images than channels, in 10 to 100 views: here they are enough for a ResNet-18.
IMAGES, VIEWED, VIEWS = 5_000, 1_000, 10
CHUNK = 512  # images whose views are made at once; another number would draw other views


def lidar(features: Tensor, delta: float = DELTA) -> float:
    """LiDAR (Thilak et al. 2024, arXiv 2312.04000, sec. 3): n x q x d -> about 1 to min(n - 1, d).

    `features` are of q views of each of n images, as they are: not normalised, since `delta`
    supposes their usual size. An image is a class, its views are the samples: Sb is the covariance
    of the images' means, Sw the mean over images of the views' covariance, plus delta I; both
    divide by the number of terms. The score is the exponential of the entropy of the eigenvalues of
    Sw^-1/2 Sb Sw^-1/2 over their sum, with the paper's epsilon (`EPSILON`) added to each. In fp64.

    It does not see how large the scatter is: after a total collapse it is rounding error's
    (`metrics.collapse_std` tells), and nan where all means are equal. Raises ValueError for fewer
    than two images or views, or a `delta` that is not above 0.
    """
    n, q = features.shape[:2]
    if n < 2 or q < 2:
        raise ValueError(f"LiDAR of {n} images in {q} views: it takes two of each")
    if not delta > 0:
        raise ValueError(f"LiDAR with a delta of {delta}: must be above 0")
    features = metrics.with_fp64(features)
    means = features.mean(1, dtype=torch.float64)
    between = metrics.gram(means - means.mean(0)) / n
    within = sum(
        metrics.gram((views - mean[:, None]).flatten(0, 1))
        for views, mean in zip(features.split(256), means.split(256), strict=True)
    ) / (n * q)
    within.diagonal().add_(delta)
    # L^-1 Sb L^-T, of Sw = L L^T, has the eigenvalues of Sw^-1/2 Sb Sw^-1/2: those of Sw^-1 Sb.
    root = torch.linalg.cholesky(within)
    half = torch.linalg.solve_triangular(root, between, upper=False)
    ratio = torch.linalg.solve_triangular(root, half.T, upper=False)
    return metrics.entropy_rank(torch.linalg.eigvalsh(ratio).clamp(min=0), EPSILON)


def alpha_req(features: Tensor) -> float:
    """alpha-ReQ (Agrawal et al., NeurIPS 2022): N x d -> alpha of a spectrum i^-alpha.

    The spectrum is that of the covariance of `features`, as they are, its largest number first.
    alpha is the negated slope of log eigenvalue over log i, by least squares with weights 1/i, for
    i from 4 to 100 (`FITTED`) or to the last one that is no rounding error. The paper asks for a
    line in log-log; range and weights are its authors' code's (fastssl, where the range varies).
    The first few are left out since they stand for a few coarse directions and would tilt the line;
    the last, since few images tell little of them; and the weights keep the many large i, which lie
    close together on a log scale, from outweighing the rest. In fp64; nan where fewer than two are
    left, of features of a rank below 5. By the paper an alpha near 1 is best.
    """
    features = metrics.with_fp64(features)
    centred = features - features.mean(0, dtype=torch.float64)
    spectrum = torch.linalg.eigvalsh(metrics.gram(centred) / len(centred)).flip(0)
    first, last = FITTED
    fitted = spectrum[:last][spectrum[:last] > NOTHING * spectrum[0]][first - 1 :]
    if len(fitted) < 2:
        return math.nan
    i = torch.arange(first, first + len(fitted), dtype=torch.float64, device=fitted.device)
    weights = 1 / i
    x = i.log() - (weights * i.log()).sum() / weights.sum()
    return -((weights * x * fitted.log()).sum() / (weights * x * x).sum()).item()


def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> float:
    """Alignment (Wang & Isola 2020, arXiv 2005.10242, sec. 4): N x d, N x d -> from 0 to 2^alpha.

    The mean of |x - y|^alpha over pairs of views of an image, of L2-normalised features; lower is
    better. In fp64. Raises ValueError for two shapes.
    """
    if x.shape != y.shape:
        raise ValueError(f"alignment of {tuple(x.shape)} and {tuple(y.shape)}: must be pairs")
    x, y = (F.normalize(metrics.with_fp64(part).double(), dim=1) for part in (x, y))
    return (x - y).norm(dim=1).pow(alpha).mean().item()


def uniformity(features: Tensor, t: float = 2.0, tile: int = 1024) -> float:
    """Uniformity (Wang & Isola 2020, arXiv 2005.10242, sec. 4): N x d -> from about -2t to 0.

    The log of the mean of exp(-t |xi - xj|^2) over pairs i < j, of L2-normalised features; lower is
    better. Features after a ReLU, as the backbone's are, have no negative cosine, and so no less
    than -2t. In fp64, `tile` x `tile` pairs at a time. Raises ValueError for fewer than two rows.
    """
    n = len(features)
    if n < 2:
        raise ValueError(f"uniformity of {n} features: it takes two")
    parts = F.normalize(metrics.with_fp64(features).double(), dim=1).split(tile)
    found = []
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts[i:], i):
            exponents = 2 * t * (rows @ columns.T - 1)  # of unit vectors, |a - b|^2 = 2 - 2 a.b
            if i == j:
                once = torch.ones_like(exponents, dtype=torch.bool).triu(1)
                exponents = exponents.masked_fill(~once, -math.inf)
            found.append(exponents.flatten().logsumexp(0))  # exp of a large t alone would be 0
    return torch.stack(found).logsumexp(0).item() - math.log(n * (n - 1) / 2)


def as_it_is(x: Tensor) -> Tensor:
    """A transform for `metrics.features` of what is transformed already."""
    return x


def view_features(
    backbone: nn.Module,
    views: Views,
    images: Tensor | ImageFiles,
    amp: torch.autocast,
    q: int = VIEWS,
    seed: int = 0,
    projector: nn.Module | None = None,
) -> Tensor:
    """Features of `q` random views of each of n `images`, as they are: fp32, n x q x d.

    Of the backbone or, with a `projector`, z. As `metrics.features` in eval mode: no parameter,
    buffer or mode changes, and ranks share the work. `images` are uint8, n x 3 x H x W; files are
    seen under the test transform, and views are crops of that. Of `views` the size, normalisation
    and augmentation count: all views are whole ones, drawn by `seed` alone, one after the other.
    """
    # One view at a time, of a chunk: all views of 512 images of 224 pixels would be 3 GB.
    one = Views(views.size, views.mean, views.std, views.augmentation, number=1, seed=seed)
    parts = []
    for step, chunk in enumerate(images.split(CHUNK)):
        drawn = (one(Batch.alone(chunk, view, step))[0] for view in range(q))  # view: its epoch
        rows = [metrics.features(backbone, as_it_is, x, amp, normalise=False) for x in drawn]
        parts.append(torch.stack(rows, dim=1))
    found = torch.cat(parts)
    if projector is None:
        return found
    z = metrics.features(projector, as_it_is, found.flatten(0, 1), amp, normalise=False)
    return z.unflatten(0, found.shape[:2])


def sample(images: Tensor | ImageFiles, number: int, seed: int) -> Tensor | ImageFiles:
    """At most `number` images, drawn at random, since data sets may come sorted; in their order."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    return images[order[:number].sort().values]


def in_words(aligned: float, untrained: float | None) -> str:
    """What a run without labels says of its alignment at its end."""
    before = "" if untrained is None else f", untrained encoder {untrained:.3f}"
    return (
        f"alignment {aligned:.3f}{before}: a score without labels, lower is better among runs with "
        "the same views and no warning. It went with the kNN there, though not closely (rho 0.7 "
        "and 0.5); it is 0 in a collapse, which std and rank tell (docs/collapse.md)"
    )


def unlabelled_scores(
    net: SimSiam,
    views: Views,
    images: Tensor | ImageFiles,
    amp: torch.autocast,
    seed: int = 0,
    most: int = IMAGES,
    viewed: int = VIEWED,
    q: int = VIEWS,
) -> dict[str, float]:
    """All scores of a network by uint8 `images`, a function of these and of the `seed`.

    Of the backbone's features, except for `rankme_z`:
    `rankme`, `rankme_z`: RankMe of L2-normalised features (as the column `rank` has it) and z;
    `alpha_req`: of features as they are; all three of `most` images, under the test transform.
    `lidar`: of `viewed` images, in `q` random views each; `uniformity`: of the first of
    these views; `alignment`: of each view and the next of the same image.

    `viewed` should be above the number of channels, and `lidar` can be compared where it was taken
    from as many images. Raises FloatingPointError for features that are not finite; ValueError as
    `lidar` does.
    """
    some, few = sample(images, most, seed), sample(images, viewed, seed)
    bank = metrics.features(net.backbone, views.eval_transform, some, amp, normalise=False)
    z = metrics.features(net.projector, as_it_is, bank, amp)
    seen = view_features(net.backbone, views, few, amp, q, seed)
    if not all(part.isfinite().all() for part in (bank, z, seen)):
        raise FloatingPointError("the features are not finite")
    return {
        "rankme": metrics.effective_rank(F.normalize(bank, dim=1)),
        "rankme_z": metrics.effective_rank(z),
        "lidar": lidar(seen),
        "alpha_req": alpha_req(bank),
        "uniformity": uniformity(seen[:, 0]),
        "alignment": alignment(seen[:, :-1].flatten(0, 1), seen[:, 1:].flatten(0, 1)),
    }
