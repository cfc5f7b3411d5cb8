"""tools.similar: its numbers against scikit-learn and float64, tiles, limits, bad input."""

import shutil

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from sklearn.neighbors import NearestNeighbors

from simsiam.data.textures import make_textures
from simsiam.evaluation.knn import nearest_neighbors, similar_pairs
from simsiam.interop.weights import open_encoder
from tests import helpers
from tests.helpers import save_image
from tools import similar


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return helpers.hardly_trained(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty textures, in train/ and deeper in other/; a copy of one, and a brighter one."""
    root = tmp_path_factory.mktemp("images") / "mine"
    for i, image in enumerate(make_textures(40, 3)[0]):
        save_image(root / ("train/a" if i % 2 else "other/b/c") / f"{i}.png", image)
    original = root / "train" / "a" / "7.png"
    shutil.copy(original, root / "other" / "copied.png")
    brighter = ImageEnhance.Brightness(Image.open(original)).enhance(1.02)
    brighter.save(root / "other" / "b" / "brightened.png")
    return root


def table_of(out, encoder, folder, *flags):
    """The table that the tool writes beside the sheet `out`."""
    flags = ("--model_path", encoder, "--data_root", folder, *flags, "--out", out)
    similar.command([*map(str, flags)])
    return pandas.read_csv(out.with_suffix(".csv"))


# ---- the numbers --------------------------------------------------------------------------------


def test_a_copy_and_a_brightened_image_come_first(encoder, folder, tmp_path):
    """The query itself is left out, if it lies in the folder."""
    query, copy = folder / "train" / "a" / "7.png", tmp_path / "elsewhere.png"
    shutil.copy(query, copy)
    twins = [str(folder / "other" / name) for name in ("copied.png", "b/brightened.png")]
    rows = table_of(tmp_path / "s.png", encoder, folder, "--query", query, copy, query)
    own, other = (rows[rows["query"] == str(path)] for path in (query, copy))
    assert own["rank"].tolist() == other["rank"].tolist() == list(range(1, 21))
    assert own["file"].tolist()[:2] == twins
    assert str(query) not in own["file"].tolist()
    assert sorted(other["file"].tolist()[:3]) == sorted([*twins, str(query)])
    assert own["similarity"].tolist()[0] == 1
    width, height = Image.open(tmp_path / "s.png").size
    assert width > 7 * 100  # seven columns, six rows
    assert height > 6 * 100


def test_nearest_equal_scikit_learn(encoder, folder, tmp_path):
    files = sorted(folder.rglob("*.png"))
    queries = [tmp_path / f"{i}.png" for i in range(6)]
    for path, image in zip(queries, make_textures(6, 9)[0], strict=True):
        save_image(path, image)
    rows = table_of(tmp_path / "s.pdf", encoder, folder, "--query", *queries, "--top", 5)
    source = open_encoder(encoder)
    reference = NearestNeighbors(n_neighbors=5, metric="cosine").fit(source(files).double())
    distances, indices = reference.kneighbors(source(queries).double())
    np.testing.assert_allclose(rows["similarity"], 1 - distances.ravel(), atol=2e-6)
    # Equal except for near-ties, such as the copies.
    is_equal = rows["file"].to_numpy() == np.array(list(map(str, files)))[indices.ravel()]
    assert is_equal.mean() > 0.9
    assert rows["query"].tolist() == [str(path) for path in queries for _ in range(5)]


def test_duplicates_are_all_pairs_above_the_threshold(encoder, folder, tmp_path):
    files = sorted(folder.rglob("*.png"))
    features = F.normalize(open_encoder(encoder)(files).double(), dim=1)
    first, second = np.triu_indices(len(files), 1)
    cosines = (features @ features.T).numpy()[first, second]
    largest = np.sort(cosines)[::-1]
    threshold = (largest[9] + largest[10]) / 2
    rows = table_of(tmp_path / "d.png", encoder, folder, "--duplicates", threshold)
    assert list(rows) == list(similar.PAIR_COLUMNS)
    (places,) = np.nonzero(cosines >= threshold)
    pairs = {(str(files[first[i]]), str(files[second[i]])) for i in places}
    assert set(map(tuple, rows[["file_a", "file_b"]].to_numpy())) == pairs
    np.testing.assert_allclose(rows["similarity"], largest[:10], atol=2e-6)
    assert rows["same_bytes"].tolist() == [True] + [False] * 9
    copies = {str(folder / "other" / "copied.png"), str(folder / "train" / "a" / "7.png")}
    assert set(rows.loc[0, ["file_a", "file_b"]]) == copies
    assert np.asarray(Image.open(tmp_path / "d.png")).std() > 5
    # At 1 copies are listed, although the last bits of fp32 may say less.
    rows = table_of(tmp_path / "e.png", encoder, folder, "--duplicates", 1)
    assert [set(row) for row in rows[["file_a", "file_b"]].to_numpy()] == [copies]


def test_pairs_of_many_tiles_equal_those_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr("simsiam.evaluation.knn.PAIRS_TILE", (7, 11))
    bank = F.normalize(torch.randn(61, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    matrix = (bank @ bank.T).triu(1)
    expected = matrix[matrix >= 0.5].sort(descending=True).values
    for limit in (1000, 60, 1):
        values, indices, number = similar_pairs(bank, 0.5, limit)
        assert number == len(expected) > 60
        torch.testing.assert_close(values, expected[:limit])
        assert len(set(map(tuple, indices.tolist()))) == min(limit, number)
        torch.testing.assert_close(matrix[indices[:, 0], indices[:, 1]], values)


def test_pairs_never_allocate_the_whole_matrix(monkeypatch):
    monkeypatch.setattr("simsiam.evaluation.knn.PAIRS_TILE", (100, 200))
    with helpers.Large(4 * 2000**2 // 8) as large:
        similar_pairs(F.normalize(torch.rand(2000, 8), dim=1), -1.0, 50)
    assert not large.seen


def test_nearest_of_many_tiles_equal_those_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr("simsiam.evaluation.knn.KNN_TILE", (7, 11))
    generator = torch.Generator().manual_seed(0)
    bank, queries = (F.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (61, 20))
    values, indices = nearest_neighbors(bank, queries, 9)
    expected = (queries @ bank.T).topk(9)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices)
    assert nearest_neighbors(bank, queries, 100)[1].shape == (20, 61)


# ---- limits, bad input --------------------------------------------------------------------------


def test_limits_of_table_and_sheet_are_logged(encoder, folder, tmp_path, capsys):
    flags = ("--duplicates", -1, "--max_pairs", 40)
    assert len(table_of(tmp_path / "d.png", encoder, folder, *flags)) == 40
    out = capsys.readouterr().out
    assert f"{42 * 41 // 2} pairs" in out
    assert f"first {similar.SHEET_PAIRS}\n" in out
    queries = sorted(folder.rglob("*.png"))[:12]
    flags = ("--query", *queries, "--top", 30)
    assert len(table_of(tmp_path / "q.png", encoder, folder, *flags)) == 12 * 30
    assert "360 rows, of which" in capsys.readouterr().out


def test_without_a_pair_the_table_is_empty_and_the_old_sheet_is_gone(encoder, tmp_path, capsys):
    root = tmp_path / "images"
    for i, shade in enumerate((0, 255)):
        pixels = torch.randint(0, 2, (3, 32, 32), generator=torch.Generator().manual_seed(i))
        save_image(root / f"{i}.png", (pixels * shade).byte())
    (tmp_path / "d.png").write_bytes(b"old")
    rows = table_of(tmp_path / "d.png", encoder, root, "--duplicates", 1, "--overwrite")
    assert not len(rows)
    assert "--duplicates" in capsys.readouterr().out
    assert not (tmp_path / "d.png").exists()


def test_bad_input_is_one_line_and_writes_nothing(encoder, folder, tmp_path, capsys):
    good, bad = folder / "train" / "a" / "7.png", tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    alone, empty = tmp_path / "alone", tmp_path / "empty"
    for place in (alone, empty, tmp_path / "place.png"):
        place.mkdir()
    shutil.copy(good, alone)
    (tmp_path / "taken.csv").write_text("a better one")
    state = torch.load(encoder)
    state["model"]["backbone.bn1.weight"].fill_(3e38)  # finite, but features overflow
    broken = tmp_path / "large.pth"
    torch.save(state, broken)
    query, pairs = ("--query", good), ("--duplicates", 0.9)
    before = sorted(tmp_path.rglob("*"))
    for flags, *words in (
        ((*query, *pairs), "--query", "--duplicates"),
        (("--duplicates", 2), "--duplicates"),
        ((*query, "--max_pairs", 9), "--max_pairs", "--query"),
        ((*pairs, "--top", 9), "--top", "--duplicates"),
        ((*query, "--out", tmp_path / "s.xyz"), "s.xyz", ".png"),
        ((*query, "--out", tmp_path / "no" / "s.png"), "--out", "no/s"),
        ((*query, "--out", tmp_path / "taken.png"), "taken.csv", "--overwrite"),
        ((*query, "--out", tmp_path / "place.png", "--overwrite"), "place.png"),
        ((*query, "--device", "none"), "--device none"),
        ((*query, "--mean", 0, 0, 0), "--mean", encoder),
        ((*query, "--data_root", tmp_path / "none"), tmp_path / "none"),
        ((*query, "--data_root", empty), empty),
        (("--query", alone / "7.png", "--data_root", alone), "--data_root", alone),
        ((*pairs, "--data_root", alone), "--data_root", alone),
        (("--query", bad), "--query", bad),
        (("--query", tmp_path / "none.png"), "--query", "none.png"),
        ((*pairs, "--data_root", tmp_path), bad, "skip"),
        ((*query, "--model_path", tmp_path / "none.pth"), "none.pth"),
        ((*query, "--model_path", bad), bad),
        ((*query, "--model_path", broken), broken, "--amp off"),
    ):
        out = () if "--out" in flags else ("--out", tmp_path / "s.png")
        own = ("--model_path", encoder, "--data_root", folder)
        err = helpers.refused(capsys, similar.command, *own, *out, *flags)
        assert all(str(word) in err for word in ("tools.similar: ", *words)), err
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken.csv").read_text() == "a better one"


def test_bad_images_skip_leaves_files_out(encoder, folder, tmp_path, capsys):
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    bad = root / "other" / "b" / "c" / "0.png"
    bad.write_bytes(b"no image")
    flags = ("--query", root / "train" / "a" / "7.png", "--bad_images", "skip", "--top", 100)
    rows = table_of(tmp_path / "s.png", encoder, root, *flags)
    assert str(bad) in capsys.readouterr().out
    assert len(rows) == 42 - 2
    assert str(bad) not in set(rows["file"])
    twins = [str(root / "other" / name) for name in ("copied.png", "b/brightened.png")]
    assert rows["file"].tolist()[:2] == twins
