"""Nearest neighbours of L2-normalised features: the kNN classifier, neighbours and similar pairs.

All similarities are computed tile by tile, so that memory does not grow with the feature bank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

# Defaults of the kNN classifier: number of neighbours, and temperature of their votes.
KNN_K, KNN_TEMPERATURE = 200, 0.1
# Shape of a tile of similarities, queries x bank: 205 MB in fp32.
KNN_TILE = (1024, 50_000)
PAIRS_TILE = (1024, 8192)  # for `similar_pairs`: 34 MB


@torch.no_grad()
def knn(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = KNN_K,
    temperature: float = KNN_TEMPERATURE,
    top: int = 5,
) -> Tensor:
    """Rank the classes of each query by a weighted vote of its `k` nearest features in the `bank`.

    A neighbour's vote has the weight exp(cosine similarity / temperature) (Wu et al. 2018,
    arXiv 1805.01978, sec. 3.4). `bank` (N x d) and `queries` (M x d) are L2-normalised; `labels`
    (N) are int64. `k` is clamped to N, `top` to the number of classes. Returns int64, M x top, the
    best class first.
    """
    classes, ranking = int(labels.max()) + 1, []
    for chunk in queries.split(KNN_TILE[0]):
        similarity, neighbors = unsorted_neighbors(bank, chunk, k)
        votes = similarity.new_zeros(len(chunk), classes)
        # A scatter along one axis of chunk x classes is deterministic on CUDA; along two it is not.
        rows = torch.arange(len(chunk), device=labels.device)[:, None]
        bins = labels[neighbors] + classes * rows
        largest = similarity.amax(1, keepdim=True)  # without it, exp overflows below T = 1/88
        weights = ((similarity - largest) / temperature).exp()
        votes.view(-1).scatter_add_(0, bins.view(-1), weights.view(-1))
        ranking.append(votes.topk(min(top, classes)).indices)
    return torch.cat(ranking)


def nearest_neighbors(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return cosines (fp32) and bank indices (int64) of each query's `k` nearest, nearest first.

    `bank` (N x d) and `queries` (M x d) are L2-normalised. Both results are M x min(k, N).
    """
    chunks = [unsorted_neighbors(bank, chunk, k) for chunk in queries.split(KNN_TILE[0])]
    values, indices = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    values, order = values.sort(dim=1, descending=True)
    return values, indices.gather(1, order)


def unsorted_neighbors(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what `nearest_neighbors` does, in no order, for up to KNN_TILE[0] queries."""
    parts, k, columns = [], min(k, len(bank)), KNN_TILE[1]
    for i, part in enumerate(bank.split(columns)):
        values, indices = grouped_topk(similarities(queries, part), k)
        parts.append((values, indices + i * columns))
    values, indices = (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
    if len(parts) > 1:  # the nearest of all parts' nearest
        values, best = values.topk(k, sorted=False)
        indices = indices.gather(1, best)
    return values, indices


def similar_pairs(bank: Tensor, threshold: float, limit: int) -> tuple[Tensor, Tensor, int]:
    """Return the pairs of rows of the `bank` whose cosine is at least `threshold`.

    `bank` (N x d) is L2-normalised. Returns cosines (fp32, P, largest first), row indices (int64,
    P x 2, the lower one first) and the number of all such pairs; P is at most `limit`, and these
    are the closest. Memory: a few tiles and `limit` pairs. A bar appears on a terminal after two
    seconds.
    """
    rows, columns = PAIRS_TILE
    values, indices = bank.new_empty(0), torch.empty(0, 2, dtype=torch.int64, device=bank.device)
    number, chunks = 0, tqdm(bank.split(rows), "pairs", None, False, delay=2, disable=None)
    for top, chunk in zip(range(0, len(bank), rows), chunks, strict=True):
        for left, part in zip(
            range(top, len(bank), columns), bank[top:].split(columns), strict=True
        ):
            cosines = similarities(chunk, part)
            # Count each pair once, at its place above the diagonal.
            is_similar = (cosines >= threshold).triu(top - left + 1)
            count = int(is_similar.sum())
            if not count:
                continue
            number += count
            best, flat = cosines.where(is_similar, -torch.inf).flatten().topk(min(count, limit))
            pairs = torch.stack([flat // len(part) + top, flat % len(part) + left], dim=1)
            values, indices = torch.cat([values, best]), torch.cat([indices, pairs])
            values, order = values.topk(min(len(values), limit))
            indices = indices[order]
    return values, indices, number


def similarities(queries: Tensor, bank: Tensor) -> Tensor:
    """Return `queries @ bank.T` (M x N), on CPUs as a 1x1 convolution.

    oneDNN's convolution is 1.2 times as fast as MKL's product on an AMD EPYC with AVX512, for
    M = 1024, d = 512.
    """
    if queries.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return queries @ bank.T
    x = queries.contiguous().view(1, 1, *queries.shape).permute(0, 3, 1, 2)  # 1 x d x 1 x M
    return F.conv2d(x, bank[:, :, None, None])[0, :, 0].T


def grouped_topk(x: Tensor, k: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """Return `x.topk(k, sorted=False)` along rows, in half of its time for a large N.

    M x N -> values and indices, M x min(k, N). Only the k groups of `size` numbers with the largest
    maxima are searched: a number of another group has k larger ones, those maxima.
    """
    groups = x.shape[1] // size
    if groups <= 2 * k:
        return tuple(x.topk(min(k, x.shape[1]), sorted=False))
    # A group is every `groups`-th number, so that maxima are taken over whole rows at a time.
    chosen = grouped_topk(x[:, : size * groups].unflatten(1, (size, groups)).amax(1), k, size)[1]
    rest = torch.arange(size * groups, x.shape[1], device=x.device)  # in no group
    indices = [chosen + i * groups for i in range(size)] + [rest.expand(len(x), -1)]
    indices = torch.cat(indices, dim=1)  # M x about size k
    values, best = x.gather(1, indices).topk(k, sorted=False)
    return values, indices.gather(1, best)
