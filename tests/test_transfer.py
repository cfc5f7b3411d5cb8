"""tools.transfer: its numbers are scikit-learn's and the kNN's; C is of training images alone."""

import tarfile
import types

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
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

DOOR = types.SimpleNamespace(main=transfer.command)
CLASSES = {"rows": 0, "dots": 5, "blobs": 9}
GRID = (1e-3, 1e-1, 10.0)  # few, so that the tests are fast


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return helpers.hardly_trained(tmp_path_factory.mktemp("results"))


def save(root, sizes, seed):
    """Images at `root`, such as x/train: of each class, one of CLASSES or "", so many."""
    images, labels = make_textures(600, seed)
    for name, number in sizes.items():
        for i, image in enumerate(images[labels == CLASSES.get(name, 1)][:number]):
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of classes of unequal sizes, and some without a class."""
    root = tmp_path_factory.mktemp("images") / "unequal"
    save(root / "train", {"rows": 60, "dots": 30, "blobs": 12, "": 7}, 3)
    save(root / "test", {"rows": 30, "dots": 12, "blobs": 6}, 4)
    return root


@pytest.fixture(autouse=True)
def short_grid(monkeypatch):
    assert list(transfer.CS) == sorted(transfer.CS)  # of equals the first is the strictest
    np.testing.assert_allclose(np.diff(np.log10(transfer.CS)), 1)
    monkeypatch.setattr(transfer, "CS", GRID)


def transferred(out, *flags):
    """The rows that the tool writes."""
    transfer.command([*map(str, flags), "--out", str(out), "--overwrite"])
    return pandas.read_csv(out)


def folders_of(*roots):
    return ("--data_name", "folder", "--data_root", *roots)


# ---- the numbers --------------------------------------------------------------------------------


def by_hand(train, labels, test, test_labels, out):
    """Accuracy and balanced accuracy, percent, and C, of scikit-learn's own logistic regression."""

    def predicted(rows, c, queries):
        scaler = StandardScaler().fit(train[rows])
        model = LogisticRegression(C=c, max_iter=1000)
        model.fit(scaler.transform(train[rows]), labels[rows])
        return model.predict(scaler.transform(queries))

    found = [(predicted(~out, c, train[out]) == labels[out]).mean() for c in GRID]
    c = GRID[int(np.argmax(found))]
    guess = predicted(np.full(len(train), True), c, test)
    balanced = balanced_accuracy_score(test_labels, guess)
    return 100 * (guess == test_labels).mean(), 100 * balanced, c


def arrays(source, images):
    """Features, and pixels, of images, as the encoder sees them."""
    mean, std = (torch.tensor(source.encoder[name])[:, None, None] for name in ("mean", "std"))
    x = (images / 255 - mean) / std
    with torch.no_grad():
        return source.net.backbone(x).numpy(), x.flatten(1).numpy()


@pytest.mark.parametrize("kind", ["folder", "textures"])
def test_its_numbers_are_scikit_learn_s_and_the_knn_s(kind, encoder, folder, tmp_path):
    flags, root, size = folders_of(folder), folder, None
    if kind == "textures":
        flags, root, size = ("--data_name", "textures", "--train_size", 120), "data", 120
    flags = (*flags, "--model_path", encoder, "--seed", 5)
    row = transferred(tmp_path / "t.csv", *flags).iloc[0]
    source, images = LoadedCheckpoint.open(encoder), load_dataset(kind, root, 32)
    images = images.select(images.train_labels >= 0)
    if size:
        images = images.select(balanced_subset(images.train_labels, size, 5))
    labels, truth = images.train_labels.numpy(), images.test_labels.numpy()
    out = transfer.held_out(images.train_labels, 5).numpy()
    train, pixels = arrays(source, images.train_images)
    test, test_pixels = arrays(source, images.test_images)
    accuracy, balanced, c = by_hand(train, labels, test, truth, out)
    wanted = {"train_size": len(train), "test_size": len(test), "classes": len(images.classes)}
    bank, queries = (F.normalize(torch.from_numpy(x), dim=1) for x in (train, test))
    ranking = knn(bank, images.train_labels, queries)
    wanted["knn"] = metrics.accuracy(ranking, images.test_labels)[0]
    wanted |= {"linear": accuracy, "linear_balanced": balanced, "c": c}
    wanted["pixels"] = by_hand(pixels, labels, test_pixels, truth, out)[0]
    assert row["data"] == ("folder:unequal" if kind == "folder" else kind)
    assert row["encoder"] == str(encoder)
    assert row[list(wanted)].tolist() == pytest.approx(list(wanted.values()), abs=1e-3)
    if kind == "folder":
        assert len(train) == 60 + 30 + 12  # those without a class are left out
        assert abs(accuracy - balanced) > 1  # else the test would not tell one from the other


def problem(seed=0, number=200):
    """Three classes that overlap, in five dimensions of unlike scales."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, 3, 2 * number))
    centres, scale = rng.normal(size=(3, 5)), 10.0 ** np.arange(-2, 3)
    inputs = torch.from_numpy((centres[labels] + rng.normal(size=(2 * number, 5))) * scale).float()
    held = transfer.held_out(labels[:number], seed)
    return transfer.Problem(
        inputs[:number], labels[:number], held, inputs[number:], labels[number:]
    )


def test_c_is_chosen_on_training_images_alone():
    """Nothing of the test set has a say in it."""
    whole, chance = problem(), torch.Generator().manual_seed(0)
    hits, c = transfer.logistic(whole, "x", list)
    assert c != GRID[0]  # which it would be where all are equal
    for _ in range(8):
        shuffled = torch.randperm(len(whole.labels), generator=chance)
        other = whole._replace(test_labels=whole.test_labels[shuffled])
        others, again = transfer.logistic(other, "x", list)
        assert again == c
        assert others.mean() < hits.mean()
        strange = torch.randn(whole.test_inputs.shape, generator=chance)
        assert transfer.logistic(whole._replace(test_inputs=strange), "x", list)[1] == c


def test_what_is_held_out_is_fitted_at_the_end_alone(monkeypatch):
    whole, seen = problem(), []
    model, _ = transfer.fitted(whole.inputs, whole.labels, 1.0)

    def watched(inputs, labels, c):
        seen.append((inputs, labels, c))
        return model, True

    monkeypatch.setattr(transfer, "fitted", watched)
    transfer.logistic(whole, "x", list)
    kept = ~whole.held_out
    parts = [(whole.inputs[kept], whole.labels[kept], c) for c in GRID]
    parts.append((whole.inputs, whole.labels, GRID[0]))  # all equal: the strictest
    for (inputs, labels, c), (their_inputs, their_labels, theirs) in zip(parts, seen, strict=True):
        assert torch.equal(inputs, their_inputs)
        assert torch.equal(labels, their_labels)
        assert c == theirs


def test_a_tenth_is_held_out_balanced_and_no_class_loses_more_than_half():
    even = torch.arange(400) % 4
    held = transfer.held_out(even, 0)
    assert even[held].bincount().tolist() == [10, 10, 10, 10]
    assert torch.equal(held, transfer.held_out(even, 0))
    assert not torch.equal(held, transfer.held_out(even, 1))
    uneven = torch.tensor([0] * 90 + [1] * 9 + [2])
    held = transfer.held_out(uneven, 0)
    assert uneven[held].bincount().tolist() == [6, 4]  # 5 and 5 would be more than half of 9
    assert transfer.held_out(torch.arange(20) % 10, 0).sum() == 2


# ---- rows, lines and files ----------------------------------------------------------------------


def test_a_row_each_root_and_each_as_if_it_were_alone(encoder, folder, tmp_path, capsys):
    second, third = tmp_path / "b" / "two", tmp_path / "c" / "two"
    save(second / "train", {"rows": 20, "dots": 20}, 5)
    save(second / "val", {"rows": 9, "dots": 5}, 6)
    save(third / "train", {"blobs": 25, "dots": 20}, 7)
    save(third / "test", {"blobs": 9, "dots": 5}, 8)
    flags = ("--model_path", encoder, "--no-pixels")
    rows = transferred(tmp_path / "t.csv", *flags, *folders_of(folder, second, third))
    printed = capsys.readouterr().out
    assert tuple(rows) == transfer.COLUMNS
    names = ["folder:unequal", f"folder:{second}", f"folder:{third}"]  # two are named alike
    assert rows["data"].tolist() == names
    assert rows["train_size"].tolist() == [102, 40, 45]
    assert rows["test_size"].tolist() == [48, 14, 14]
    assert rows["classes"].tolist() == [3, 2, 2]
    assert rows["pixels"].isna().all()
    assert all(word in printed for word in (*names, *transfer.COLUMNS))
    assert f"{rows['linear'][1]:.2f}" in printed
    swapped = ("--split_names", "test", "train")
    sizes = transferred(tmp_path / "u.csv", *flags, *folders_of(third), *swapped).iloc[0]
    assert (sizes["train_size"], sizes["test_size"]) == (14, 45)
    alone = transferred(tmp_path / "u.csv", *flags, *folders_of(third))
    assert alone["data"].tolist() == ["folder:two"]
    third_of_three = rows[2:].drop(columns="data").reset_index(drop=True)
    found = alone.drop(columns="data")
    pandas.testing.assert_frame_equal(found, third_of_three, check_dtype=False)  # int or float


def test_of_a_linear_model_its_encoder_is_used(encoder, folder, tmp_path, capsys):
    flags = f"--model_path {encoder} --out {tmp_path} --name l --cached --epochs 1 --no-pictures"
    linear.main([*flags.split(), *map(str, folders_of(folder))])
    rows = []
    for path, linear_model in ((tmp_path / "l_model.pth", True), (encoder, False)):
        capsys.readouterr()
        flags = ("--model_path", path, "--no-pixels", *folders_of(folder))
        rows.append(transferred(tmp_path / "t.csv", *flags).drop(columns="encoder"))
        said = f"{path}: is a linear model, of which the encoder alone is used"
        assert (said in capsys.readouterr().out) == linear_model
    pandas.testing.assert_frame_equal(*rows)


def test_a_fit_that_does_not_converge_is_said_once(encoder, folder, tmp_path, capsys, monkeypatch):
    flags = ("--model_path", encoder, *folders_of(folder))
    transferred(tmp_path / "t.csv", *flags, "--no-pixels")
    assert "converged" not in capsys.readouterr().out
    monkeypatch.setattr(transfer, "ITERATIONS", 3)
    transferred(tmp_path / "t.csv", *flags)
    done = capsys.readouterr()
    lines = [line for line in done.out.splitlines() if "converged" in line]
    assert [line.split(": ")[0] for line in lines] == [
        f"folder:unequal, {what}" for what in ("features", "pixels")
    ]
    assert "after 3 iterations at C 0.001, 0.1, 10; " in lines[1]
    assert "Convergence" not in done.err
    model, _ = transfer.fitted(problem().inputs, problem().labels, 1.0)
    monkeypatch.setattr(transfer, "fitted", lambda inputs, labels, c: (model, c < 1))
    transfer.logistic(problem(), "x", list)  # all models are equal, so the strictest is chosen
    assert "at C 10; 0.001 is the one chosen" in capsys.readouterr().out


# ---- what cannot be used ------------------------------------------------------------------------


def test_bad_input_is_one_line_and_writes_nothing(encoder, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LoadedCheckpoint, "features", None)  # all of it is found before any is made
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:  # shards, without a test set
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
    places = {name: tmp_path / name for name in data}
    made = {"--data_name": "textures"}
    out = tmp_path / "t.csv"
    monkeypatch.chdir(tmp_path)  # where there is no data/
    for flags, *words in (
        (folders_of(places["no_test"]), places["no_test"], "no labelled test images"),
        (folders_of(places["no_test"] / "train"), places["no_test"], "no labelled test images"),
        (folders_of(places["no_labels"]), places["no_labels"], "no labelled test images"),
        (folders_of(places["bare_test"]), places["bare_test"], "no class folders"),
        (folders_of(places["one_class"]), places["one_class"], "fewer than two classes"),
        (folders_of(places["few"]), places["few"], "9 training images of 2 classes are too few"),
        (folders_of(folder, tmp_path / "none"), f"--data_root {tmp_path / 'none'}: there is no"),
        ((*folders_of(folder), "--split_names", "train", "x"), "--split_names x"),
        ((*folders_of(folder), "--train_size", 103), folder, "--train_size 103: must be from 1"),
        (
            (*folders_of(folder), "--train_size", 9),
            folder,
            "--train_size 9: 9 training images of 3",
        ),
        ((*folders_of(folder), "--train_size", 1), folder, "--train_size 1: ", "fewer than two"),
        ((*folders_of(folder), "--train_size", 0), "--train_size"),
        ((*folders_of(folder), "--seed", -1), "--seed"),
        ((*folders_of(folder), "--device", "none"), "--device none"),
        ((*folders_of(folder), "--mean", 0, 0, 0), "--mean", encoder),
        (("--data_name", "webdataset", "--data_root", tmp_path), tmp_path, "no labelled test"),
        (("--data_name", "imagenet"), "--data_root data: there is no"),
        (("--data_name", "mnist"), "--data_name", "mnist"),
        (("--data_name", "textures", "--train_size", 10), "10 training images of 10 classes"),
        (("--data_name", "textures", "--data_root", folder), "--data_root", "textures"),
        ((*made.popitem(), "--model_path", tmp_path / "no.pth"), tmp_path / "no.pth"),
        ((*folders_of(folder), "--out", tmp_path / "no" / "t.csv"), "--out", "no such folder"),
    ):
        err = helpers.refused(capsys, DOOR, "--model_path", encoder, "--out", out, *flags)
        assert err.startswith("tools.transfer: ")
        assert all(str(word) in err for word in words), err
        assert not list(tmp_path.glob("*t.csv*"))


def test_a_table_that_is_there_is_replaced_only_on_request(encoder, folder, tmp_path, capsys):
    out = tmp_path / "t.csv"
    out.write_text("a better one")
    flags = ("--model_path", encoder, *folders_of(folder), "--no-pixels")
    err = helpers.refused(capsys, DOOR, *flags, "--out", out)
    assert f"--out {out}: exists: replace it with --overwrite" in err
    assert out.read_text() == "a better one"
    assert len(transferred(out, *flags)) == 1
    taken = tmp_path / "taken"
    taken.mkdir()
    assert str(taken) in helpers.refused(capsys, DOOR, *flags, "--out", taken, "--overwrite")
    assert not list(tmp_path.glob(".*"))


def test_files_that_are_no_images_end_it_or_are_left_out(encoder, folder, tmp_path, capsys):
    root = tmp_path / "images"
    save(root / "train", {"rows": 20, "dots": 20}, 5)
    save(root / "test", {"rows": 5, "dots": 5}, 6)
    bad = root / "train" / "rows" / "3.png"
    bad.write_bytes(b"no image")
    flags = ("--model_path", encoder, *folders_of(folder, root), "--no-pixels")
    assert str(bad) in helpers.refused(capsys, DOOR, *flags, "--out", tmp_path / "t.csv")
    assert not (tmp_path / "t.csv").exists()
    rows = transferred(tmp_path / "t.csv", *flags, "--bad_images", "skip")
    assert rows["train_size"].tolist() == [102, 39]
    assert f"{bad}: cannot be read" in capsys.readouterr().out


def test_features_that_are_not_finite_are_the_checkpoint_s(encoder, folder, tmp_path, capsys):
    state = torch.load(encoder)
    state["model"]["backbone.bn1.weight"].fill_(3e38)  # finite, but not what comes of it
    broken = tmp_path / "large.pth"
    torch.save(state, broken)
    flags = ("--model_path", broken, *folders_of(folder), "--out", tmp_path / "t.csv")
    err = helpers.refused(capsys, DOOR, *flags)
    assert f"{broken}: its features of {folder} are not finite" in err
