"""kNN against scikit-learn; neighbours, features and collapse measures on known cases."""

import math

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from lightly.loss.hypersphere_loss import HypersphereLoss
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from simsiam.data.loader import ImageFiles
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import KNN_TILE, grouped_topk, knn
from simsiam.views.augment import Augmentation, Views
from tests.helpers import Large

OFF = torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)
BF16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=True)
# The whole image, unchanged.
NO_AUGMENTATION = Augmentation((1.0, 1.0), (1.0, 1.0), jitter_p=0.0, gray_p=0.0, hflip_p=0.0)


def unit_rows(n, d, generator):
    return F.normalize(torch.randn(n, d, generator=generator), dim=1)


# ---- kNN ----------------------------------------------------------------------------------------


def test_knn_by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    labels = torch.tensor([0, 1, 1, 2])
    query = F.normalize(torch.tensor([[2.0, 1.0]]), dim=1)
    # At T = 1, class 0 has e^.894 and class 1 has e^.447 + e^-.894; at T = 100 all votes are equal.
    assert knn(bank, labels, query, k=1)[0, 0] == 0
    assert knn(bank, labels, query, k=3, temperature=0.1).tolist() == [[0, 1, 2]]
    assert knn(bank, labels, query, k=4, temperature=100)[0, 0] == 1
    assert knn(bank, labels, query, k=200).shape == (1, 3)  # k and top are clamped


def test_knn_predictions_equal_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    bank, queries = unit_rows(3000, 16, generator), unit_rows(1000, 16, generator)
    labels = torch.randint(0, 7, (3000,), generator=generator)
    # Of unit vectors, squared distance = 2 - 2 cosine similarity.
    weights = lambda distance: np.exp((1 - distance**2 / 2) / 0.1)  # noqa: E731
    reference = KNeighborsClassifier(200, weights=weights, algorithm="brute")
    expected = reference.fit(bank.double(), labels).predict(queries.double())
    ranking = knn(bank, labels, queries, k=200, temperature=0.1)
    assert torch.equal(ranking, knn(bank, labels, queries))  # the defaults
    assert (ranking[:, 0].numpy() == expected).all()
    order = reference.predict_proba(queries.double()).argsort(1)[:, ::-1][:, :5]
    assert (ranking.numpy() == order).mean() > 0.999  # near-ties in fp32


def test_at_a_low_temperature_the_nearest_neighbor_decides():
    """exp(1 / 0.001) overflows fp32: votes must not become infinite, and so all equal."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = unit_rows(500, 16, generator), unit_rows(200, 16, generator)
    labels = torch.randint(0, 7, (500,), generator=generator)
    nearest = knn(bank, labels, queries, k=1)[:, 0]
    for temperature, share in ((1e-3, 0.9), (1e-12, 0.999)):
        top1 = knn(bank, labels, queries, k=20, temperature=temperature)[:, 0]
        assert (top1 == nearest).float().mean() > share


@pytest.mark.parametrize("k", [1, 200])
def test_knn_with_a_bank_and_queries_larger_than_a_tile(k):
    """The bank's last tile has 30 images, fewer than 200; the queries have two tiles."""
    rows, columns = KNN_TILE
    generator = torch.Generator().manual_seed(0)
    bank, queries = unit_rows(2 * columns + 30, 6, generator), unit_rows(rows + 20, 6, generator)
    labels = torch.randint(0, 4, (len(bank),), generator=generator)
    ranking = knn(bank, labels, queries, k=k)
    assert ranking.shape == (rows + 20, 4)
    some = slice(rows - 20, rows + 20)  # of both tiles
    similarity, neighbors = (queries[some].double() @ bank.double().T).topk(k)
    votes = (similarity / 0.1).exp()
    sums = [(votes * (labels[neighbors] == label)).sum(1) for label in range(4)]
    expected = torch.stack(sums, dim=1).argsort(dim=1, descending=True)
    top = 1 if k == 1 else 4  # with k = 1 all other classes tie
    assert torch.equal(ranking[some, :top], expected[:, :top])


@pytest.mark.parametrize(("size", "n"), [(6, 20), (4, 400), (4, 403), (3, 1000), (6, 1000)])
def test_grouped_topk_equals_topk(size, n):
    torch.manual_seed(0)
    x = torch.randn(30, n)
    x[:, -1] = 10  # in no group, unless n is a multiple of the size
    x[0, ::2] = 0.5  # ties
    x[1] = 0
    values, indices = grouped_topk(x, 25, size)
    assert torch.equal(values.sort().values, x.topk(min(25, n)).values.sort().values)
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row)) == len(row) for row in indices.tolist())


# ---- measures -----------------------------------------------------------------------------------


def test_accuracy():
    ranking = torch.tensor([[0, 1], [1, 0], [2, 1], [2, 0]])
    assert metrics.accuracy(ranking, torch.tensor([0, 0, 0, 2])) == (50.0, 75.0)


def test_confusion_matrix_equals_scikit_learn():
    labels, predicted = torch.randint(0, 5, (2, 100))
    expected = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(7))
    assert metrics.confusion_matrix(labels, predicted, 7) == expected.tolist()


def test_collapse_std():
    torch.manual_seed(0)
    z = torch.randn(4096, 64)
    assert metrics.collapse_std(z).item() == pytest.approx(1, abs=0.01)
    assert metrics.collapse_std(5 * z).item() == pytest.approx(1, abs=0.01)
    assert metrics.collapse_std(torch.ones(8, 64)).item() == 0
    # Two unit vectors, (1, 0) and (0, 1): each channel has a std of 1/sqrt(2).
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


def test_alignment_by_hand_and_by_lightly():
    x, y = torch.tensor([[5.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, -3.0]])
    assert metrics.alignment(x, y) == pytest.approx((0 + 4) / 2)
    x, y = torch.randn(2, 50, 6, dtype=torch.float64).unbind()
    reference = HypersphereLoss(t=2.0, lam=0.0, alpha=2.0)(x, y).item()
    assert metrics.alignment(x, y) == pytest.approx(reference, rel=1e-9)


# ---- features -----------------------------------------------------------------------------------


def small_net(training=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5)).train(training)


def random_images(n, size=8):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def make_views(augmentation=None, **options):
    augmentation = augmentation or Augmentation(jitter_p=1.0, gray_p=0.0)
    return Views(8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), augmentation, **options)


@pytest.mark.parametrize("training", [True, False])
def test_features_are_normalised_and_the_backbone_does_not_change(training):
    net, images = small_net(training), random_images(1030)  # more than a chunk
    before = {name: value.clone() for name, value in net.state_dict().items()}
    features, raw = (
        metrics.extract_features(net, lambda x: x.float(), images, OFF, normalise=normalise)
        for normalise in (True, False)
    )
    assert net.training == net[2].training == training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not features.requires_grad
    expected = net.eval()(images.float())
    torch.testing.assert_close(raw, expected)
    torch.testing.assert_close(features, F.normalize(expected, dim=1))


def test_features_under_amp_are_computed_in_bf16_and_returned_in_fp32():
    net, x = small_net()[:2], torch.rand(4, 3, 8, 8)
    features = metrics.extract_features(net, nn.Identity(), x, BF16, normalise=False)
    assert features.dtype == torch.float32
    assert torch.equal(features, features.bfloat16().float())
    assert not torch.equal(features, net(x))


def test_a_feature_bank_is_allocated_once():
    """torch.cat of chunks and a normalised copy would be two more: 10 GB each for ImageNet."""
    images = random_images(1024, 4)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 512))
    with Large(4 * 1024 * 512) as large:
        bank = metrics.extract_features(backbone, lambda x: x / 255, images, OFF)
    assert {x.untyped_storage().data_ptr() for x in large.seen} == {bank.data_ptr()}
    expected = F.normalize(backbone(images / 255), dim=1)
    torch.testing.assert_close(bank, expected, rtol=0, atol=1e-6)


def test_raw_pixels_are_averaged_to_at_most_32_a_side():
    images = torch.rand(2, 3, 64, 64)
    small = images[..., :20, :20]
    assert torch.equal(metrics.raw_pixels(20)(small), small.flatten(1))
    means = images.unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5))
    torch.testing.assert_close(metrics.raw_pixels(64)(images), means.flatten(1))


def test_features_of_views_without_augmentation_are_those_of_the_images(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(9)]
    for path, image in zip(paths, random_images(9), strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    files = ImageFiles(paths, 8, workers=0)
    images = torch.cat(list(files.split(9)))
    net, views = small_net(), make_views(NO_AUGMENTATION)
    features = metrics.extract_features(net, views.eval_transform, images, OFF, normalise=False)
    of_views = metrics.extract_view_features(net, views, images, OFF, 3)
    assert of_views.shape == (9, 3, 5)
    for j in range(3):
        torch.testing.assert_close(of_views[:, j], features)
    assert torch.equal(metrics.extract_view_features(net, views, files, OFF, 3), of_views)


def test_views_of_features_depend_on_the_seed_alone():
    """Two chunks of copies of one image: no two views are equal, and the global RNG stays."""
    net, images = small_net(True), random_images(1).expand(2 * metrics.CHUNK, -1, -1, -1)
    before, rng = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    features, again, other = (
        metrics.extract_view_features(net, views, images, OFF, seed=seed)
        for views, seed in (
            (make_views(), 3),
            (make_views(number=4, seed=8), 3),
            (make_views(), 4),
        )
    )
    assert torch.equal(features, again)
    assert not torch.equal(features, other)
    assert len(features.flatten(0, 1).unique(dim=0)) == 4 * metrics.CHUNK
    assert torch.equal(torch.get_rng_state(), rng)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
