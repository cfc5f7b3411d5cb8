"""kNN against scikit-learn, collapse measures on known cases, files that are whole."""

import argparse
import math
import os
import re
import stat

import numpy as np
import pandas
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import utils


def test_knn_by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    labels = torch.tensor([0, 1, 1, 2])
    query = F.normalize(torch.tensor([[2.0, 1.0]]), dim=1)
    # k = 1: the nearest. k = 3 at T = 1: e^.894 for 0, e^.447 + e^-.447... for 1, which wins when
    # the temperature is so high that all votes count alike.
    assert utils.knn(bank, labels, query, k=1)[0, 0] == 0
    assert utils.knn(bank, labels, query, k=3, temperature=0.1).tolist() == [[0, 1, 2]]
    assert utils.knn(bank, labels, query, k=4, temperature=100)[0, 0] == 1
    assert utils.knn(bank, labels, query, k=200).shape == (1, 3)  # k and top are clamped


def test_knn_predictions_equal_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(3000, 16, generator=generator), dim=1)
    queries = F.normalize(torch.randn(1000, 16, generator=generator), dim=1)
    labels = torch.randint(0, 7, (3000,), generator=generator)
    # Of unit vectors, squared distance = 2 - 2 cosine similarity.
    weights = lambda distance: np.exp((1 - distance**2 / 2) / 0.1)  # noqa: E731
    judge = KNeighborsClassifier(200, weights=weights, algorithm="brute")
    theirs = judge.fit(bank.double(), labels).predict(queries.double())
    ours = utils.knn(bank, labels, queries, k=200, temperature=0.1)
    assert (ours[:, 0].numpy() == theirs).all()
    order = judge.predict_proba(queries.double()).argsort(1)[:, ::-1][:, :5]
    assert (ours.numpy() == order).mean() > 0.999  # near-ties in fp32


def test_knn_does_not_depend_on_its_tiles(monkeypatch):
    torch.manual_seed(0)
    bank, queries = torch.randn(500, 8), torch.randn(90, 8)
    labels = torch.randint(0, 3, (500,))
    whole = utils.knn(bank, labels, queries, k=20)
    monkeypatch.setattr(utils, "KNN_TILE", (7, 130))  # parts of 130, and one of 110
    assert torch.equal(utils.knn(bank, labels, queries, k=20), whole)
    assert torch.equal(utils.knn(bank, labels, queries, k=200), utils.knn(bank, labels, queries))


@pytest.mark.parametrize(("size", "n"), [(6, 20), (4, 400), (4, 403), (3, 1000), (6, 1000)])
def test_largest_equals_topk(size, n):
    torch.manual_seed(0)
    x = torch.randn(30, n)
    x[:, -1] = 10  # in no group, where they do not come out even
    x[0, ::2] = 0.5  # ties
    x[1] = 0
    values, places = utils.largest(x, 25, size)
    assert torch.equal(values.sort().values, x.topk(min(25, n)).values.sort().values)
    assert torch.equal(x.gather(1, places), values)
    assert all(len(set(row)) == len(row) for row in places.tolist())  # none twice


def test_accuracy():
    ranking = torch.tensor([[0, 1], [1, 0], [2, 1], [2, 0]])
    assert utils.accuracy(ranking, torch.tensor([0, 0, 0, 2])) == (50.0, 75.0)


def test_collapse_std():
    torch.manual_seed(0)
    z = torch.randn(4096, 64)
    assert utils.collapse_std(z).item() == pytest.approx(1, abs=0.01)
    assert utils.collapse_std(5 * z).item() == pytest.approx(1, abs=0.01)
    assert utils.collapse_std(torch.ones(8, 64)).item() == 0


def test_collapse_by_its_thresholds():
    def kind(std, rank=None, bn="default", start=6.0, images=64):
        found = utils.collapse(utils.least_std(bn, images), std, rank, start, 64)
        return found and re.search(r"(total|dimensional) collapse", found[0])[1]

    assert kind(0.99) is kind(0.55) is kind(0.99, 5.0) is None
    assert kind(0.45) == kind(0.1) == kind(0.1, 2.0) == "total"
    assert kind(0.99, 3.0) == "dimensional"
    assert kind(0.99, 1.4, start=1.1) == "dimensional"  # as of images that are all the same
    assert kind(0.7, bn="hidden") is kind(0.35, bn="none") is None
    assert kind(0.2, bn="hidden") == kind(0.2, bn="none") == "total"
    # As collapsed as z can be after a BN without affine: one image against the others.
    for images in (8, 16, 64, 512):
        z = torch.ones(images, 32)
        z[0] = -1
        std = utils.collapse_std(F.batch_norm(z, None, None, training=True)).item()
        assert std == pytest.approx(2 / math.sqrt(images), rel=1e-3)
        assert kind(std, images=images) == "total"
        healthy = F.batch_norm(torch.randn(images, 32), None, None, training=True)
        assert kind(utils.collapse_std(healthy).item(), images=images) is None


def test_likely_causes_are_those_of_the_run():
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    base = {"batch_size": 64, "lr": 1.0, "stop_grad": "on", "predictor": "mlp", "bn": "default"}

    def causes(some=images, **flags):
        return utils.likely_causes(argparse.Namespace(**base | flags), 1.0, some)

    assert causes() == []
    for flag, value in (
        ("stop_grad", "off"),
        ("predictor", "none"),
        ("predictor", "fixed"),
        ("bn", "none"),
        ("lr", 30.0),
    ):
        (line,) = causes(**{flag: value})
        assert line.startswith(f"--{flag} {value:g}" if flag == "lr" else f"--{flag} {value}")
    assert "4 images" in causes(batch_size=4)[0]
    assert "30 times the recipe's" in causes(lr=30.0)[0]
    assert "hardly differ" in causes(images // 64 + 100)[0]
    assert len(causes(images // 64, stop_grad="off", lr=30.0)) == 3


def test_confusion_matrix_equals_scikit_learn():
    labels, predicted = torch.randint(0, 5, (2, 100))
    theirs = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(7))
    assert utils.confusion_matrix(labels, predicted, 7) == theirs.tolist()


def test_effective_rank():
    torch.manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(64, 64)).Q
    assert utils.effective_rank(orthogonal) == pytest.approx(64, rel=1e-4)
    assert utils.effective_rank(torch.ones(64, 8)) == pytest.approx(1, rel=1e-4)
    bank = torch.randn(5000, 6)  # more rows than a chunk
    singular = torch.linalg.svdvals(bank.double())
    share = singular / singular.sum()
    rank = math.exp(-(share * share.log()).sum())
    assert utils.effective_rank(bank) == pytest.approx(rank, rel=1e-6)


def test_schedule():
    share = [utils.schedule(e, 10) for e in (0, 2.5, 5, 10)]
    assert share == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0])
    warm = [utils.schedule(e, 12, warmup_epochs=2) for e in (0, 1, 2, 7, 12)]
    assert warm == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_features_are_normalised_and_change_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    images = torch.randint(0, 256, (1030, 3, 2, 2), dtype=torch.uint8)
    amp = utils.autocast(torch.device("cpu"), "auto")
    found = utils.features(net, lambda x: x.float(), images, amp)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.eval()
    torch.testing.assert_close(found, F.normalize(net(images.float()), dim=1))


def test_amp_is_off_on_the_cpu_unless_asked_for():
    cpu = torch.device("cpu")
    x = torch.ones(2, 2)
    for amp, dtype in [("auto", torch.float32), ("off", torch.float32), ("bf16", torch.bfloat16)]:
        with utils.autocast(cpu, amp):
            assert (x @ x).dtype == dtype


def test_device_that_is_not_there():
    assert utils.pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:77", "gpu", "meta", ""):
        with pytest.raises(ValueError, match="--device"):
            utils.pick_device(name)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def fail_halfway():
        with utils.whole_file(path) as file:
            file.write(b"new, but half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert path.read_bytes() == b"old"
    with utils.whole_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = []

    def spy(name, real):
        def call(*args):
            folder = isinstance(args[0], int) and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            calls.append((name, folder))
            return real(*args)

        monkeypatch.setattr(os, name, call)

    spy("fsync", os.fsync)
    spy("replace", os.replace)
    with utils.whole_file(tmp_path / "a.txt") as file:
        file.write(b"new")
    assert calls == [("fsync", False), ("replace", False), ("fsync", True)]  # the folder's last


def test_results_gain_a_row_a_run_and_protocol(tmp_path):
    path = tmp_path / "results.csv"
    utils.add_result(path, {"protocol": "KNN", "run": "a", "top1": 50.0})
    utils.add_result(path, {"protocol": "Linear", "run": "a", "top1": 60.0})
    utils.add_result(path, {"protocol": "KNN", "run": "b", "top1": 1.50000001})
    utils.add_result(path, {"protocol": "KNN", "run": "a", "top1": 51.0})
    table = pandas.read_csv(path)
    assert list(table.columns) == list(utils.RESULTS)
    rows = table[["protocol", "run", "top1"]].values.tolist()
    assert rows == [["Linear", "a", 60.0], ["KNN", "b", 1.5], ["KNN", "a", 51.0]]
