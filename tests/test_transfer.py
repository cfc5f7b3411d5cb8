"""tools.transfer: its numbers against scikit-learn and the kNN, the choice of C, bad input."""

import tarfile

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

import linear
from simsiam.data.datasets import load_dataset
from simsiam.data.loader import balanced_subset
from simsiam.data.textures import make_textures
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import knn
from simsiam.interop.weights import LoadedCheckpoint
from tests import helpers
from tools import transfer

CLASSES = {"rows": 0, "dots": 5, "blobs": 9}
GRID = (1e-3, 1e-1, 10.0)  # few, so that the tests are fast


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return helpers.hardly_trained(tmp_path_factory.mktemp("results"))


def save(root, sizes, seed):
    """Write images to `root`: of each class, of CLASSES or "" for none, so many."""
    images, labels = make_textures(600, seed)
    for name, number in sizes.items():
        for i, image in enumerate(images[labels == CLASSES.get(name, 1)][:number]):
            helpers.save_image(root / name / f"{i}.png", image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Classes of unequal sizes, and some images without a class."""
    root = tmp_path_factory.mktemp("images") / "unequal"
    save(root / "train", {"rows": 60, "dots": 30, "blobs": 12, "": 7}, 3)
    save(root / "test", {"rows": 30, "dots": 12, "blobs": 6}, 4)
    return root


@pytest.fixture(autouse=True)
def short_grid(monkeypatch):
    monkeypatch.setattr(transfer, "CS", GRID)


def transferred(out, *flags):
    """The rows that the tool writes."""
    transfer.command([*map(str, flags), "--out", str(out), "--overwrite"])
    return pandas.read_csv(out)


def folders_of(*roots):
    return ("--data_name", "folder", "--data_root", *roots)


# ---- the numbers --------------------------------------------------------------------------------


def sklearn_accuracy(train, labels, test, test_labels, held_out):
    """Accuracy and balanced accuracy in percent, and C, by scikit-learn."""

    def predict(rows, c, queries):
        scaler = StandardScaler().fit(train[rows])
        model = LogisticRegression(C=c, max_iter=1000)
        model.fit(scaler.transform(train[rows]), labels[rows])
        return model.predict(scaler.transform(queries))

    scores = [(predict(~held_out, c, train[held_out]) == labels[held_out]).mean() for c in GRID]
    c = GRID[int(np.argmax(scores))]
    predictions = predict(np.full(len(train), True), c, test)
    balanced = balanced_accuracy_score(test_labels, predictions)
    return 100 * (predictions == test_labels).mean(), 100 * balanced, c


def features_and_pixels(source, images):
    mean, std = (torch.tensor(source.encoder[name])[:, None, None] for name in ("mean", "std"))
    x = (images / 255 - mean) / std
    with torch.no_grad():
        return source.net.backbone(x).numpy(), x.flatten(1).numpy()


@pytest.mark.parametrize("kind", ["folder", "textures"])
def test_numbers_equal_scikit_learn_and_the_knn(kind, encoder, folder, tmp_path):
    flags, root, size = folders_of(folder), folder, None
    if kind == "textures":
        flags, root, size = ("--data_name", "textures", "--train_size", 120), "data", 120
    flags = (*flags, "--model_path", encoder, "--seed", 5)
    row = transferred(tmp_path / "t.csv", *flags).iloc[0]
    source, images = LoadedCheckpoint.open(encoder), load_dataset(kind, root, 32)
    images = images.select(images.train_labels >= 0)
    if size:
        images = images.select(balanced_subset(images.train_labels, size, 5))
    labels, test_labels = images.train_labels.numpy(), images.test_labels.numpy()
    held_out = transfer.hold_out(images.train_labels, 5).numpy()
    train, pixels = features_and_pixels(source, images.train_images)
    test, test_pixels = features_and_pixels(source, images.test_images)
    accuracy, balanced, c = sklearn_accuracy(train, labels, test, test_labels, held_out)
    bank, queries = (F.normalize(torch.from_numpy(x), dim=1) for x in (train, test))
    ranking = knn(bank, images.train_labels, queries)
    expected = {
        "train_size": len(train),
        "test_size": len(test),
        "classes": len(images.classes),
        "knn": metrics.accuracy(ranking, images.test_labels)[0],
        "linear": accuracy,
        "linear_balanced": balanced,
        "c": c,
        "pixels": sklearn_accuracy(pixels, labels, test_pixels, test_labels, held_out)[0],
    }
    assert row["data"] == ("folder:unequal" if kind == "folder" else kind)
    assert row["encoder"] == str(encoder)
    assert row[list(expected)].tolist() == pytest.approx(list(expected.values()), abs=1e-3)
    if kind == "folder":
        assert len(train) == 60 + 30 + 12  # images without a class are left out
        assert abs(accuracy - balanced) > 1


def test_the_strictest_of_equal_cs_is_chosen():
    labels = torch.arange(200) % 4
    inputs = F.one_hot(labels).float()
    problem = transfer.Problem(inputs, labels, transfer.hold_out(labels, 0), inputs, labels)
    is_correct, c = transfer.logistic(problem, "x")
    assert is_correct.all()
    assert c == GRID[0]


def test_a_balanced_tenth_is_held_out_and_at_most_half_of_a_class():
    even = torch.arange(400) % 4
    mask = transfer.hold_out(even, 0)
    assert even[mask].bincount().tolist() == [10, 10, 10, 10]
    assert not torch.equal(mask, transfer.hold_out(even, 1))
    uneven = torch.tensor([0] * 90 + [1] * 9 + [2])
    mask = transfer.hold_out(uneven, 0)
    assert uneven[mask].bincount().tolist() == [6, 4]  # 5 and 5 would be more than half of 9


# ---- rows, lines and files ----------------------------------------------------------------------


def test_each_root_has_the_row_that_it_has_alone(encoder, folder, tmp_path, capsys):
    second, third = tmp_path / "b" / "two", tmp_path / "c" / "two"
    save(second / "train", {"rows": 20, "dots": 20}, 5)
    save(second / "val", {"rows": 9, "dots": 5}, 6)
    save(third / "train", {"blobs": 25, "dots": 20}, 7)
    save(third / "test", {"blobs": 9, "dots": 5}, 8)
    flags = ("--model_path", encoder, "--no-pixels")
    rows = transferred(tmp_path / "t.csv", *flags, *folders_of(folder, second, third))
    printed = capsys.readouterr().out
    assert tuple(rows) == transfer.COLUMNS
    names = ["folder:unequal", f"folder:{second}", f"folder:{third}"]  # two have the same name
    assert rows["data"].tolist() == names
    assert rows["train_size"].tolist() == [102, 40, 45]
    assert rows["test_size"].tolist() == [48, 14, 14]
    assert rows["classes"].tolist() == [3, 2, 2]
    assert rows["pixels"].isna().all()
    assert all(word in printed for word in (*names, *transfer.COLUMNS))
    swapped = ("--split_names", "test", "train")
    sizes = transferred(tmp_path / "u.csv", *flags, *folders_of(third), *swapped).iloc[0]
    assert (sizes["train_size"], sizes["test_size"]) == (14, 45)
    alone = transferred(tmp_path / "u.csv", *flags, *folders_of(third))
    assert alone["data"].tolist() == ["folder:two"]
    third_of_three = rows[2:].drop(columns="data").reset_index(drop=True)
    alone = alone.drop(columns="data")
    pandas.testing.assert_frame_equal(alone, third_of_three, check_dtype=False)  # int or float


def test_of_a_linear_model_the_encoder_is_used(encoder, folder, tmp_path, capsys):
    flags = f"--model_path {encoder} --out {tmp_path} --name l --cached --epochs 1 --no-pictures"
    linear.main([*flags.split(), *map(str, folders_of(folder))])
    rows = []
    for path in (tmp_path / "l_model.pth", encoder):
        flags = ("--model_path", path, "--no-pixels", *folders_of(folder))
        rows.append(transferred(tmp_path / "t.csv", *flags).drop(columns="encoder"))
    pandas.testing.assert_frame_equal(*rows)


def test_fits_that_do_not_converge_are_logged_once(encoder, folder, tmp_path, capsys, monkeypatch):
    flags = ("--model_path", encoder, *folders_of(folder))
    monkeypatch.setattr(transfer, "ITERATIONS", 3)
    transferred(tmp_path / "t.csv", *flags)
    output = capsys.readouterr()
    lines = [line for line in output.out.splitlines() if "converged" in line]
    titles = [line.split(": ")[0] for line in lines]
    assert titles == ["folder:unequal, features", "folder:unequal, pixels"]
    assert "0.001, 0.1, 10" in lines[1]
    assert "Convergence" not in output.err


# ---- bad input ----------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_writes_nothing(encoder, folder, tmp_path, capsys, monkeypatch):
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:  # shards without a test set
        for i in range(20):
            label = tmp_path / "label"
            label.write_text(str(i % 2))
            archive.add(folder / "train" / "rows" / f"{i}.png", f"{i}.png")
            archive.add(label, f"{i}.cls")
    data = {
        "no_test": {"train": {"rows": 20, "dots": 20}},
        "no_labels": {"train": {"": 20}, "test": {"rows": 5}},
        "bare_test": {"train": {"rows": 20, "dots": 20}, "test": {"": 5}},
        "one_class": {"train": {"rows": 20}, "test": {"rows": 5}},
        "few": {"train": {"rows": 5, "dots": 4}, "test": {"rows": 5}},
    }
    for name, parts in data.items():
        for part, sizes in parts.items():
            save(tmp_path / name / part, sizes, 5)
    state = torch.load(encoder)
    state["model"]["backbone.bn1.weight"].fill_(3e38)  # finite, but features overflow
    broken, taken = tmp_path / "large.pth", tmp_path / "taken.csv"
    torch.save(state, broken)
    taken.write_text("a better one")
    own = folders_of(folder)
    monkeypatch.chdir(tmp_path)  # a folder without data/
    for flags, *words in (
        *((folders_of(tmp_path / name), tmp_path / name) for name in data),
        (folders_of(folder, tmp_path / "none"), "--data_root", tmp_path / "none"),
        ((*own, "--split_names", "train", "x"), "--split_names x"),
        ((*own, "--train_size", 103), folder, "--train_size 103"),
        ((*own, "--train_size", 9), folder, "--train_size 9"),
        ((*own, "--train_size", 0), "--train_size"),
        ((*own, "--seed", -1), "--seed"),
        ((*own, "--out", taken), "--out", taken, "--overwrite"),
        ((*own, "--model_path", broken), broken, folder, "--amp off"),
        ((*own, "--model_path", tmp_path / "no.pth"), tmp_path / "no.pth"),
        (("--data_name", "webdataset", "--data_root", tmp_path), tmp_path),
        (("--data_name", "imagenet"), "--data_root data"),
        (("--data_name", "textures", "--train_size", 10), "--train_size 10"),
        (("--data_name", "textures", "--data_root", folder), "--data_root", "textures"),
    ):
        flags = ("--model_path", encoder, "--out", tmp_path / "t.csv", *flags)
        err = helpers.refused(capsys, transfer.command, *flags)
        assert all(str(word) in err for word in ("tools.transfer: ", *words)), err
        assert not list(tmp_path.glob("*t.csv*"))
    assert taken.read_text() == "a better one"
