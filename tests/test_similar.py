"""tools.similar: copies come first, its numbers are scikit-learn's, and it holds no N x N."""

import shutil
import types

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
from tools import similar

DOOR = types.SimpleNamespace(main=similar.command)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return helpers.hardly_trained(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty textures, in train/ and deeper in other/; of one a copy, and a brighter one."""
    root = tmp_path_factory.mktemp("images") / "mine"
    for place in ("train/a", "other/b/c"):
        (root / place).mkdir(parents=True)
    for i, image in enumerate(make_textures(40, 3)[0]):
        path = root / ("train/a" if i % 2 else "other/b/c") / f"{i}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    one = root / "train" / "a" / "7.png"
    shutil.copy(one, root / "other" / "copied.png")
    brighter = ImageEnhance.Brightness(Image.open(one)).enhance(1.02)
    brighter.save(root / "other" / "b" / "brightened.png")
    return root


def found(out, *flags):
    """The rows that the tool writes beside the sheet `out`."""
    similar.command([*map(str, flags), "--out", str(out)])
    return pandas.read_csv(out.with_suffix(".csv"))


def flags_of(encoder, folder):
    return ("--model_path", encoder, "--data_root", folder)


# ---- the numbers --------------------------------------------------------------------------------


def test_a_copy_and_a_brightened_image_are_found_first(encoder, folder, tmp_path):
    """Wherever they lie; the query itself is left out, if it lies in the folder."""
    query, copy = folder / "train" / "a" / "7.png", tmp_path / "elsewhere.png"
    shutil.copy(query, copy)
    twins = [str(folder / "other" / name) for name in ("copied.png", "b/brightened.png")]
    rows = found(tmp_path / "s.png", *flags_of(encoder, folder), "--query", query, copy, query)
    assert list(rows) == list(similar.NEAREST)
    own, other = (rows[rows["query"] == str(path)] for path in (query, copy))
    assert len(rows) == 40
    assert own["rank"].tolist() == other["rank"].tolist() == list(range(1, 21))
    assert own["file"].tolist()[:2] == twins
    assert str(query) not in own["file"].tolist()
    assert sorted(other["file"].tolist()[:2]) == sorted([twins[0], str(query)])
    assert other["file"].tolist()[2] == twins[1]
    assert own["similarity"].tolist()[0] == 1
    assert own["similarity"].is_monotonic_decreasing
    sheet = np.asarray(Image.open(tmp_path / "s.png").convert("RGB"))
    assert sheet.shape[1] > 7 * 100  # seven a row, six rows
    assert sheet.shape[0] > 6 * 100
    assert not list(tmp_path.glob(".*"))


def test_its_nearest_are_scikit_learn_s(encoder, folder, tmp_path):
    files = sorted(folder.rglob("*.png"))
    queries = [tmp_path / f"{i}.png" for i in range(6)]
    for path, image in zip(queries, make_textures(6, 9)[0], strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    rows = found(tmp_path / "s.pdf", *flags_of(encoder, folder), "--query", *queries, "--top", 5)
    source = open_encoder(encoder)
    judge = NearestNeighbors(n_neighbors=5, metric="cosine").fit(source(files).double())
    distance, place = judge.kneighbors(source(queries).double())
    np.testing.assert_allclose(rows["similarity"], 1 - distance.ravel(), atol=2e-6)
    # Equal but for near-ties, of which the copies make one.
    same = rows["file"].to_numpy() == np.array(list(map(str, files)))[place.ravel()]
    assert same.mean() > 0.9
    assert rows["query"].tolist() == [str(path) for path in queries for _ in range(5)]


def test_duplicates_are_all_pairs_from_a_similarity_on(encoder, folder, tmp_path):
    files = sorted(folder.rglob("*.png"))
    features = F.normalize(open_encoder(encoder)(files).double(), dim=1)
    cosines = (features @ features.T).numpy()
    first, second = np.triu_indices(len(files), 1)
    of_all = np.sort(cosines[first, second])[::-1]
    least = (of_all[9] + of_all[10]) / 2  # ten of them
    rows = found(tmp_path / "d.png", *flags_of(encoder, folder), "--duplicates", least)
    assert list(rows) == list(similar.PAIRS)
    those = cosines[first, second] >= least
    pairs = {
        (str(files[i]), str(files[j])) for i, j in zip(first[those], second[those], strict=True)
    }
    assert len(rows) == 10
    assert set(map(tuple, rows[["file_a", "file_b"]].to_numpy())) == pairs
    np.testing.assert_allclose(rows["similarity"], of_all[:10], atol=2e-6)
    assert rows["same_bytes"].tolist() == [True] + [False] * 9
    copies = {str(folder / "other" / "copied.png"), str(folder / "train" / "a" / "7.png")}
    assert set(rows.loc[0, ["file_a", "file_b"]]) == copies
    assert np.asarray(Image.open(tmp_path / "d.png")).std() > 5
    # At 1 copies are found, although the last bits of fp32 may say less.
    rows = found(tmp_path / "e.png", *flags_of(encoder, folder), "--duplicates", 1)
    assert [set(row) for row in rows[["file_a", "file_b"]].to_numpy()] == [copies]


@pytest.mark.parametrize("most", [1000, 60, 1])
def test_pairs_of_many_tiles_are_those_of_the_whole_matrix(most, monkeypatch):
    monkeypatch.setattr("simsiam.evaluation.knn.PAIRS_TILE", (7, 11))
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(61, 5, generator=generator), dim=1)
    whole = (bank @ bank.T).triu(1)
    expected = whole[whole >= 0.5].sort(descending=True).values
    values, places, number = similar_pairs(bank, 0.5, most)
    assert number == len(expected) > 60
    torch.testing.assert_close(values, expected[:most])
    assert (places[:, 0] < places[:, 1]).all()
    assert len(set(map(tuple, places.tolist()))) == min(most, number)
    torch.testing.assert_close(whole[places[:, 0], places[:, 1]], values)


def test_pairs_never_hold_the_whole_matrix(monkeypatch):
    monkeypatch.setattr("simsiam.evaluation.knn.PAIRS_TILE", (100, 200))
    bank = F.normalize(torch.rand(2000, 8), dim=1)  # all of them are similar
    with helpers.Large(4 * 2000**2 // 8) as large:
        values, _, number = similar_pairs(bank, -1.0, 50)
    assert not large.seen
    assert number == 2000 * 1999 // 2
    assert len(values) == 50


def test_the_nearest_of_many_tiles_are_those_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr("simsiam.evaluation.knn.KNN_TILE", (7, 11))
    generator = torch.Generator().manual_seed(0)
    bank, queries = (F.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (61, 20))
    values, places = nearest_neighbors(bank, queries, 9)
    expected = (queries @ bank.T).topk(9)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(places, expected.indices)
    assert nearest_neighbors(bank, queries, 100)[1].shape == (20, 61)


# ---- limits, and what is said -------------------------------------------------------------------


def test_a_limit_is_said(encoder, folder, tmp_path, capsys):
    flags = (*flags_of(encoder, folder), "--duplicates", -1)
    rows = found(tmp_path / "d.png", *flags, "--max_pairs", 40)
    said = capsys.readouterr().out
    assert "mine: 42 images" in said
    assert f"{42 * 41 // 2} pairs have a similarity of -1.0 or more: the 40 most similar" in said
    assert f"40 rows, of which {tmp_path}/d.png shows the first {similar.PAIRS_SHOWN}" in said
    assert len(rows) == 40
    queries = sorted(folder.rglob("*.png"))[:12]
    flags = (*flags_of(encoder, folder), "--query", *queries, "--top", 30)
    assert len(found(tmp_path / "q.png", *flags)) == 12 * 30
    assert "360 rows, of which" in capsys.readouterr().out


def test_without_a_pair_the_table_has_no_row_and_there_is_no_sheet(encoder, tmp_path, capsys):
    root = tmp_path / "images"
    root.mkdir()
    for i, shade in enumerate((0, 255)):
        noise = np.random.default_rng(i).integers(0, 2, (32, 32, 3)) * shade
        Image.fromarray(noise.astype(np.uint8)).save(root / f"{i}.png")
    (tmp_path / "d.png").write_bytes(b"of another command")
    flags = (*flags_of(encoder, root), "--duplicates", 1, "--overwrite")
    assert not len(found(tmp_path / "d.png", *flags))
    assert "no two images have a similarity of 1.0 or more" in capsys.readouterr().out
    assert not (tmp_path / "d.png").exists()


def test_bad_input_is_one_line_and_nothing_is_written(encoder, folder, tmp_path, capsys):
    good, bad = folder / "train" / "a" / "7.png", tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(good, alone)
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "taken.csv").write_text("a better one")
    (tmp_path / "place.png").mkdir()
    state = torch.load(encoder)
    state["model"]["backbone.bn1.weight"].fill_(3e38)  # finite, but not what comes of it
    broken = tmp_path / "large.pth"
    torch.save(state, broken)
    query = ("--query", good)
    before = sorted(tmp_path.rglob("*"))
    for flags, *words in (
        ((), "--query", "--duplicates", "required"),
        ((*query, "--duplicates", 0.9), "not allowed"),
        (("--duplicates", 2), "--duplicates", "from -1 to 1"),
        (("--duplicates", "x"), "--duplicates"),
        ((*query, "--top", 0), "--top"),
        ((*query, "--max_pairs", 9), "--max_pairs: does not go with --query"),
        (("--duplicates", 0.9, "--top", 9), "--top: does not go with --duplicates"),
        ((*query, "--out", tmp_path / "s.xyz"), "--out", ".png"),
        ((*query, "--out", tmp_path / "no" / "s.png"), "--out", "no such folder"),
        ((*query, "--out", tmp_path / "taken.png"), "taken.csv: exists", "--overwrite"),
        ((*query, "--out", tmp_path / "place.png", "--overwrite"), "place.png: is a folder"),
        ((*query, "--device", "none"), "--device none"),
        ((*query, "--mean", 0, 0, 0), "--mean", encoder),
        ((*query, "--data_root", tmp_path / "none"), f"{tmp_path / 'none'}: no such"),
        ((*query, "--data_root", empty), f"{empty}: no images"),
        ((*query, "--data_root", alone, "--query", alone / "7.png"), "no image besides"),
        (("--duplicates", 0.9, "--data_root", alone), "a pair needs two"),
        (("--query", bad), f"--query: {bad}: cannot be read"),
        (("--query", tmp_path / "none.png"), "none.png: cannot be read (it does not exist)"),
        (("--duplicates", 0.9, "--data_root", tmp_path), f"{bad}: cannot be read", "skip"),
        ((*query, "--model_path", tmp_path / "none.pth"), "none.pth"),
        ((*query, "--model_path", bad), bad),
        ((*query, "--model_path", broken), f"{broken}: its features are not finite"),
    ):
        out = () if "--out" in flags else ("--out", tmp_path / "s.png")
        err = helpers.refused(capsys, DOOR, *flags_of(encoder, folder), *out, *flags)
        assert err.startswith("tools.similar: ")
        assert all(str(word) in err for word in words), err
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken.csv").read_text() == "a better one"


def test_files_that_are_no_images_are_left_out_on_request(encoder, folder, tmp_path, capsys):
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    bad = root / "other" / "b" / "c" / "0.png"
    bad.write_bytes(b"no image")
    query = root / "train" / "a" / "7.png"
    flags = (*flags_of(encoder, root), "--query", query, "--bad_images", "skip")
    rows = found(tmp_path / "s.png", *flags, "--top", 100)
    assert f"{bad}: cannot be read" in capsys.readouterr().out
    assert len(rows) == 42 - 2
    assert str(bad) not in set(rows["file"])
    assert rows["file"].tolist()[:2] == [
        str(root / "other" / name) for name in ("copied.png", "b/brightened.png")
    ]
