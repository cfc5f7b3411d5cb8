"""kNN against scikit-learn, collapse measures on known cases."""

import math

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from simsiam.evaluation import metrics
from simsiam.evaluation.metrics import knn
from tests.helpers import Large


def test_knn_by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    labels = torch.tensor([0, 1, 1, 2])
    query = F.normalize(torch.tensor([[2.0, 1.0]]), dim=1)
    # k = 1: the nearest. k = 3 at T = 1: e^.894 for 0, e^.447 + e^-.447... for 1, which wins when
    # the temperature is so high that all votes count alike.
    assert knn(bank, labels, query, k=1)[0, 0] == 0
    assert knn(bank, labels, query, k=3, temperature=0.1).tolist() == [[0, 1, 2]]
    assert knn(bank, labels, query, k=4, temperature=100)[0, 0] == 1
    assert knn(bank, labels, query, k=200).shape == (1, 3)  # k and top are clamped


def test_knn_predictions_equal_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(3000, 16, generator=generator), dim=1)
    queries = F.normalize(torch.randn(1000, 16, generator=generator), dim=1)
    labels = torch.randint(0, 7, (3000,), generator=generator)
    # Of unit vectors, squared distance = 2 - 2 cosine similarity.
    weights = lambda distance: np.exp((1 - distance**2 / 2) / 0.1)  # noqa: E731
    judge = KNeighborsClassifier(200, weights=weights, algorithm="brute")
    theirs = judge.fit(bank.double(), labels).predict(queries.double())
    ours = knn(bank, labels, queries, k=200, temperature=0.1)
    assert torch.equal(ours, knn(bank, labels, queries))  # the defaults
    assert (ours[:, 0].numpy() == theirs).all()
    order = judge.predict_proba(queries.double()).argsort(1)[:, ::-1][:, :5]
    assert (ours.numpy() == order).mean() > 0.999  # near-ties in fp32


def test_at_a_low_temperature_the_nearest_decides():
    """exp(1 / 0.001) is no fp32 number: the votes must not be infinite, and all alike."""
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(500, 16, generator=generator), dim=1)
    queries = F.normalize(torch.randn(200, 16, generator=generator), dim=1)
    labels = torch.randint(0, 7, (500,), generator=generator)
    nearest = knn(bank, labels, queries, k=1)[:, 0]
    for temperature in (1e-3, 1e-12):
        found = knn(bank, labels, queries, k=20, temperature=temperature)[:, 0]
        assert (found == nearest).float().mean() > (0.9 if temperature == 1e-3 else 0.999)
    at = {"k": 20, "temperature": 0.012}
    assert torch.equal(
        knn(bank, labels, queries, **at)[:, 0], voted(bank, labels, queries, **at)[:, 0]
    )


def voted(bank, labels, queries, k, temperature=0.1):
    """The vote in plain words, in fp64: all similarities at once, topk, a sum a class."""
    similarity, nearest = (queries.double() @ bank.double().T).topk(k)
    votes = (similarity / temperature).exp()
    classes = int(labels.max()) + 1
    sums = [(votes * (labels[nearest] == label)).sum(1) for label in range(classes)]
    return torch.stack(sums, dim=1).argsort(dim=1, descending=True)[:, :5]


@pytest.mark.parametrize("k", [1, 20, 200])
def test_knn_of_a_bank_and_queries_larger_than_a_tile(k):
    """Two whole tiles of the bank, and one of 30 images, fewer than 200; two of the queries."""
    rows, columns = metrics.KNN_TILE
    assert 4 * rows * columns < 206e6  # bytes of similarities at once, however large the bank
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(2 * columns + 30, 6, generator=generator), dim=1)
    queries = F.normalize(torch.randn(rows + 20, 6, generator=generator), dim=1)
    labels = torch.randint(0, 4, (len(bank),), generator=generator)
    found = knn(bank, labels, queries, k=k)
    assert found.shape == (rows + 20, 4)
    for some in (slice(0, 20), slice(rows - 10, rows + 20)):  # of both tiles of queries
        # With k = 1 one class has a vote; the others' order means nothing.
        top = 1 if k == 1 else 4
        expected = voted(bank, labels, queries[some], k)
        assert torch.equal(found[some, :top], expected[:, :top])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_knn_finds_the_nearest_in_every_tile(place):
    """Only a few images of one tile are of class 1; who stands at one of them is told so."""
    columns = metrics.KNN_TILE[1]
    bank = F.normalize(torch.randn(2 * columns + 30, 4), dim=1)
    labels = torch.zeros(len(bank), dtype=torch.int64)
    those = place * columns + torch.tensor([0, 3, 29])
    labels[those] = 1
    assert knn(bank, labels, bank[those], k=1)[:, 0].tolist() == [1, 1, 1]
    assert knn(bank, labels, -bank[those], k=1)[:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("size", "n"), [(6, 20), (4, 400), (4, 403), (3, 1000), (6, 1000)])
def test_largest_equals_topk(size, n):
    torch.manual_seed(0)
    x = torch.randn(30, n)
    x[:, -1] = 10  # in no group, where they do not come out even
    x[0, ::2] = 0.5  # ties
    x[1] = 0
    values, places = metrics.largest(x, 25, size)
    assert torch.equal(values.sort().values, x.topk(min(25, n)).values.sort().values)
    assert torch.equal(x.gather(1, places), values)
    assert all(len(set(row)) == len(row) for row in places.tolist())  # none twice


def test_similarities_are_cosines():
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(300, 16, generator=generator), dim=1)
    queries = F.normalize(torch.randn(16, 70, generator=generator), dim=0).T  # not contiguous
    found = metrics.similarities(queries, bank)
    torch.testing.assert_close(found, F.cosine_similarity(queries[:, None], bank[None], dim=2))


def test_accuracy():
    ranking = torch.tensor([[0, 1], [1, 0], [2, 1], [2, 0]])
    assert metrics.accuracy(ranking, torch.tensor([0, 0, 0, 2])) == (50.0, 75.0)


def test_confusion_matrix_equals_scikit_learn():
    labels, predicted = torch.randint(0, 5, (2, 100))
    theirs = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(7))
    assert metrics.confusion_matrix(labels, predicted, 7) == theirs.tolist()


def test_collapse_std():
    torch.manual_seed(0)
    z = torch.randn(4096, 64)
    assert metrics.collapse_std(z).item() == pytest.approx(1, abs=0.01)
    assert metrics.collapse_std(5 * z).item() == pytest.approx(1, abs=0.01)
    assert metrics.collapse_std(torch.ones(8, 64)).item() == 0
    # By hand: two unit vectors, (1, 0) and (0, 1), of each channel a std of 1/sqrt(2).
    assert metrics.collapse_std(torch.tensor([[3.0, 0.0], [0.0, 2.0]])).item() == pytest.approx(1)
    half = z.bfloat16()
    assert metrics.collapse_std(half).item() == metrics.collapse_std(half.float()).item()


def test_effective_rank():
    torch.manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(64, 64)).Q
    assert metrics.effective_rank(orthogonal) == pytest.approx(64, rel=1e-4)
    assert metrics.effective_rank(torch.ones(64, 8)) == pytest.approx(1, rel=1e-4)
    bank = torch.randn(5000, 6)  # more rows than a chunk
    singular = torch.linalg.svdvals(bank.double())
    part = singular / singular.sum()
    rank = math.exp(-(part * part.log()).sum())
    assert metrics.effective_rank(bank) == pytest.approx(rank, rel=1e-6)


OFF = torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)


@pytest.mark.parametrize("training", [True, False])
def test_features_are_normalised_and_change_nothing(training):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)).train(training)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    images = torch.randint(0, 256, (1030, 3, 2, 2), dtype=torch.uint8)  # more than a chunk
    found = metrics.features(net, lambda x: x.float(), images, OFF)
    bare = metrics.features(net, lambda x: x.float(), images, OFF, normalise=False)
    assert net.training == training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not found.requires_grad
    net.eval()
    torch.testing.assert_close(bare, net(images.float()))
    torch.testing.assert_close(found, F.normalize(net(images.float()), dim=1))


def test_features_under_amp_are_of_fp32_again():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.ones(4, 3, 2, 2)
    amp = torch.autocast("cpu", dtype=torch.bfloat16, enabled=True)
    found = metrics.features(net, lambda x: x, x, amp, normalise=False)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())  # it was computed in bf16
    assert not torch.equal(found, net(x))


def test_raw_pixels_are_at_most_32_a_side():
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(
        metrics.raw_pixels(20)(images[..., :20, :20]), images[..., :20, :20].flatten(1)
    )
    means = images.unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5))
    torch.testing.assert_close(metrics.raw_pixels(64)(images), means.flatten(1))


def test_a_bank_is_in_memory_once():
    """A list to be joined, and a normalised copy, would be two more: of ImageNet's, 10 GB each."""
    images = torch.randint(0, 256, (1024, 3, 4, 4), dtype=torch.uint8)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 512))
    plain, off = lambda x: x / 255, torch.autocast("cpu", enabled=False)
    with Large(4 * 1024 * 512) as large:
        bank = metrics.features(backbone, plain, images, off)
    assert {x.untyped_storage().data_ptr() for x in large.seen} == {bank.data_ptr()}
    whole = F.normalize(backbone(images / 255), dim=1)
    torch.testing.assert_close(bank, whole, rtol=0, atol=1e-6)
