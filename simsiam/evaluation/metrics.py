"""Measures of features: kNN, accuracy, confusion, spread of z, effective rank. Pure functions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from simsiam.data.loader import ImageFiles
from simsiam.runtime import distributed

# The kNN's defaults: neighbours that vote, and the temperature of their vote.
K, TEMPERATURE = 200, 0.1
# Similarities held at once, 205 MB of them however large the bank: queries, and images of the bank.
KNN_TILE = (1024, 50_000)
PAIRS_TILE = (1024, 8192)  # as KNN_TILE, for `pairs`: 34 MB


@torch.no_grad()
def features(
    backbone: nn.Module,
    transform: Callable[[Tensor], Tensor],
    images: Tensor | ImageFiles,
    amp: torch.autocast,
    normalise: bool = True,
) -> Tensor:
    """Features of all `images`, in eval mode: N x 3 x H x W -> fp32, N x features.

    L2-normalised, as the kNN needs them, or as they are. The backbone is left in the mode it was
    in; no parameter or buffer of it changes. Ranks share the images, and each gets all features.
    A terminal gets a bar, if they take more than two seconds.
    """
    training = backbone.training
    backbone.eval()
    found, done, mine = None, 0, images[distributed.local_slice(len(images))]
    off = True if distributed.rank() else None  # None: on a terminal alone
    with tqdm(None, "features", len(mine), False, delay=2, disable=off, unit="image") as bar:
        for chunk in mine.split(512):
            x = transform(chunk)
            with amp:
                rows = backbone(x)
            if found is None:  # one tensor, filled: a list to be joined would take twice as much
                found = rows.new_empty(len(mine), rows.shape[1], dtype=torch.float32)
            found[done : done + len(x)] = rows
            done += len(x)
            bar.update(len(x))
    backbone.train(training)
    found = distributed.all_gather(found, len(images))
    return F.normalize(found, dim=1, out=found) if normalise else found


PIXELS_OF = 100_000  # training images for the baseline of raw pixels at most: 1.2 GB of them


def raw_pixels(image_size: int) -> nn.Module:
    """The baseline of every encoder: the normalised pixels, at most 3 x 32 x 32 of them."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(min(image_size, 32)), nn.Flatten())


@torch.no_grad()
def knn(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = K,
    temperature: float = TEMPERATURE,
    top: int = 5,
) -> Tensor:
    """Classes of `queries` by weighted vote of their `k` nearest in the `bank`, best first.

    The vote of a neighbour is exp(cosine similarity / temperature) (Wu et al. 2018,
    arXiv 1805.01978, sec. 3.4). `bank` (N x d) and `queries` (M x d) are L2-normalised; `labels`
    (N) are of int64. k is clamped to the bank, `top` to the number of classes.
    Returns int64, M x top. Memory: a `KNN_TILE` of similarities, however large the bank.
    """
    classes, ranking = int(labels.max()) + 1, []
    for chunk in queries.split(KNN_TILE[0]):
        similarity, nearest = nearest_of_few(bank, chunk, k)
        votes = similarity.new_zeros(len(chunk), classes)
        # One axis, of chunk x classes: that scatter has a deterministic form on CUDA.
        where = labels[nearest] + classes * torch.arange(len(chunk), device=labels.device)[:, None]
        above = similarity.amax(1, keepdim=True)  # without it exp overflows below 1/88
        weights = ((similarity - above) / temperature).exp()
        votes.view(-1).scatter_add_(0, where.view(-1), weights.view(-1))
        ranking.append(votes.topk(min(top, classes)).indices)
    return torch.cat(ranking)


def nearest_of_few(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and places of the `k` nearest in the `bank`, M x k each, in no order; as of `knn`.

    For as many queries as a tile has rows.
    """
    parts, k, columns = [], min(k, len(bank)), KNN_TILE[1]
    for i, part in enumerate(bank.split(columns)):
        values, places = largest(similarities(queries, part), k)
        parts.append((values, places + i * columns))
    values, places = (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
    if len(parts) > 1:  # the nearest of each part's nearest
        values, best = values.topk(k, sorted=False)
        places = places.gather(1, best)
    return values, places


def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` nearest of each query in the `bank`: cosines, fp32, and places, int64; M x k each.

    The nearest come first. `bank` (N x d) and `queries` (M x d) are L2-normalised; k is clamped to
    the bank. Memory: a `KNN_TILE` of similarities, however large the bank.
    """
    found = [nearest_of_few(bank, chunk, k) for chunk in queries.split(KNN_TILE[0])]
    values, places = (torch.cat(both) for both in zip(*found, strict=True))
    values, order = values.sort(dim=1, descending=True)
    return values, places.gather(1, order)


def pairs(bank: Tensor, least: float, most: int) -> tuple[Tensor, Tensor, int]:
    """Pairs of a bank's rows whose cosine is at least `least`: cosines, places, and their number.

    `bank`: N x d, L2-normalised. Of more than `most` pairs the closest are returned, and all of
    them counted. Cosines: fp32, P, the largest first; places: int64, P x 2, the lower one first.
    Memory: a few times a `PAIRS_TILE` of similarities and `most` pairs, however large the bank. A
    terminal gets a bar, if it takes more than two seconds.
    """
    rows, columns = PAIRS_TILE
    values, places = bank.new_empty(0), torch.empty(0, 2, dtype=torch.int64, device=bank.device)
    number, chunks = 0, tqdm(bank.split(rows), "pairs", None, False, delay=2, disable=None)
    for first, chunk in zip(range(0, len(bank), rows), chunks, strict=True):
        for start, part in zip(
            range(first, len(bank), columns), bank[first:].split(columns), strict=True
        ):
            found = similarities(chunk, part)
            # Each pair once: the second one has the higher place.
            wanted = (found >= least).triu(first - start + 1)
            there = int(wanted.sum())
            if not there:
                continue
            number += there
            best, at = found.where(wanted, -torch.inf).flatten().topk(min(there, most))
            where = torch.stack([at // len(part) + first, at % len(part) + start], dim=1)
            values, places = torch.cat([values, best]), torch.cat([places, where])
            values, best = values.topk(min(len(values), most))
            places = places[best]
    return values, places, number


def similarities(queries: Tensor, bank: Tensor) -> Tensor:
    """`queries @ bank.T`, M x N: on CPUs as a 1x1 convolution, since that goes to oneDNN.

    Against MKL's product 1.2 times as fast on an AMD EPYC with AVX512, for M = 1024, d = 512.
    """
    if queries.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return queries @ bank.T
    x = queries.contiguous().view(1, 1, *queries.shape).permute(0, 3, 1, 2)  # 1 x d x 1 x M
    return F.conv2d(x, bank[:, :, None, None])[0, :, 0].T


def largest(x: Tensor, k: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """`x.topk(k, sorted=False)`, M x N -> M x min(k, N), in half of its time for a large N.

    Returns values and indices. Of groups of `size` numbers each, only the k groups with the largest
    maxima are looked through: a number in another group has k larger ones, those maxima.
    """
    groups = x.shape[1] // size
    if groups <= 2 * k:
        return tuple(x.topk(min(k, x.shape[1]), sorted=False))
    # A group is every `groups`-th number, so that the maxima are taken over whole rows at a time.
    chosen = largest(x[:, : size * groups].unflatten(1, (size, groups)).amax(1), k, size)[1]
    rest = torch.arange(size * groups, x.shape[1], device=x.device)  # in no group
    places = [chosen + i * groups for i in range(size)] + [rest.expand(len(x), -1)]
    places = torch.cat(places, dim=1)  # M x about size k
    values, best = x.gather(1, places).topk(k, sorted=False)
    return values, places.gather(1, best)


def accuracy(ranking: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent of a ranking of classes: int64, M x (up to 5), and M."""
    hits = ranking == labels[:, None]
    return 100 * hits[:, 0].float().mean().item(), 100 * hits.any(1).float().mean().item()


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> list[list[int]]:
    """How often each class (rows) was taken for each (columns): int64, M and M."""
    pairs = labels * classes + predicted
    return pairs.bincount(minlength=classes**2).view(classes, classes).tolist()


def collapse_std(z: Tensor) -> Tensor:
    """Mean over channels of the std of l2-normalised z, times sqrt(d): N x d -> scalar.

    About 1 when the z are spread evenly over the sphere, 0 when all are equal (paper, sec. 4.1,
    Fig. 2 middle, which shows it without the sqrt(d)).
    """
    return F.normalize(z.float(), dim=1).std(0).mean() * z.shape[1] ** 0.5


def effective_rank(bank: Tensor) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885, Eq. 1): N x d -> from 1 to min(N, d).

    The exponential of the entropy of the normalised singular values, which are the roots of the
    d x d Gram matrix's eigenvalues. In fp64, on the bank's device (of mps, which has no fp64, on
    the CPU). Ranks share the work.
    """
    mine = with_fp64(
        bank[distributed.slice_for_rank(len(bank), distributed.rank(), distributed.world_size())]
    )
    return entropy_rank(
        torch.linalg.eigvalsh(distributed.all_reduce(gram(mine))).clamp(min=0).sqrt()
    )


def with_fp64(x: Tensor) -> Tensor:
    """`x` on a device that has fp64: where it is, but of mps on the CPU."""
    return x.cpu() if x.device.type == "mps" else x


def gram(rows: Tensor) -> Tensor:
    """The Gram matrix of the columns, in fp64: N x d -> d x d. A few thousand rows at a time."""
    return sum(chunk.double().T @ chunk.double() for chunk in rows.split(4096))


def entropy_rank(spectrum: Tensor, epsilon: float = 0.0) -> float:
    """The exponential of the entropy of a spectrum over its sum: d numbers from 0 up -> 1 to d.

    (Roy & Vetterli 2007, "The effective rank".) `epsilon` is added to each part, as some papers
    do to keep the logarithm finite; here a part of 0 adds nothing without it. nan for zeros alone.
    """
    parts = spectrum / spectrum.sum() + epsilon
    return torch.special.entr(parts).sum().exp().item()
