"""Folders and CSV lists: the images in them, their classes, and the summary line."""

import os
import socket

import numpy as np
import pytest
from PIL import Image

import linear
import main
from simsiam.data.datasets import load_dataset
from simsiam.data.folders import KAGGLE_SOLUTION, find_images
from simsiam.data.textures import make_textures
from tests.helpers import refused
from tools import features

RUN = "--recipe short --width 4 --feature_dim 16 --epochs 1 --batch_size 8 --k 3 --no-pictures"


def write(root, *names):
    """Write small images of different colours to the paths `names`."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (len(name), 0, 0)).save(path)


def write_photos(root, train="train", test="test"):
    """Write textures of two classes: 16 training and 8 test images."""
    images = make_textures(200, seed=1)[0].permute(0, 2, 3, 1).numpy()
    for split, number in ((train, 16), (test, 8)):
        for i in range(number):
            path = root / split / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(path)
    return root


def names(images, root):
    return [str(path.relative_to(root)) for path in images.files]


# ---- splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAINING", "Validation")])
def test_splits_by_their_usual_names(tmp_path, train, test):
    write(tmp_path, f"{train}/cat/1.png", f"{train}/dog/2.png", f"{test}/dog/3.png", "x/4.png")
    data = load_dataset("folder", tmp_path)
    assert data.classes == ["cat", "dog"]
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 1], [1])
    for part in (tmp_path.name, "2 classes", f"2 training images in {train}/", f"in {test}/", "x/"):
        assert part in data.summary


def test_ambiguous_splits_need_split_names(tmp_path):
    write(tmp_path, "Train/cat/1.png", "training/cat/2.png", "training/dog/3.png", "x/dog/4.png")
    with pytest.raises(ValueError, match="Train/ and training/ .*--split_names"):
        load_dataset("folder", tmp_path)
    data = load_dataset("folder", tmp_path, split_names=["training", "x"])
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 1], [1])
    assert load_dataset("folder", tmp_path, split_names=["training"]).test_images is None
    with pytest.raises(FileNotFoundError, match="--split_names y"):
        load_dataset("folder", tmp_path, split_names=["training", "y"])
    write(tmp_path, "list/train/1.png")
    (tmp_path / "list" / "train.csv").write_text("path,label\ntrain/1.png,cat\n")
    with pytest.raises(ValueError, match=r"train/ and train.csv .*--split_names"):
        load_dataset("folder", tmp_path / "list")
    assert load_dataset("folder", tmp_path / "list", split_names=["train.csv"]).classes == ["cat"]


def test_folders_without_splits_are_no_classes(tmp_path):
    write(tmp_path, "cat/1.png", "dog/2.png")
    data = load_dataset("folder", tmp_path)
    assert data.classes == []
    assert f"{tmp_path.name}/train/" in data.summary
    assert find_images(tmp_path, scored=False).train.labels == ["cat", "dog"]


def test_test_images_without_classes_are_an_error(tmp_path):
    write(tmp_path, "train/cat/1.png", "test/2.png")
    with pytest.raises(ValueError, match=r"test: .*--split_names train"):
        load_dataset("folder", tmp_path)
    write(tmp_path, "val/cat/3.png")
    data = load_dataset("folder", tmp_path)
    assert len(data.test_images) == 1
    assert "not read: test/" in data.summary


def test_kaggle_s_imagenet(tmp_path):
    place = "ILSVRC/Data/CLS-LOC"
    for wnid in ("n01440764", "n02119789"):
        write(tmp_path, *(f"{place}/train/{wnid}/{wnid}_{i}.JPEG" for i in range(2)))
    write(tmp_path, *(f"{place}/val/ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 3)))
    write(tmp_path, *(f"{place}/test/ILSVRC2012_test_0000000{i}.JPEG" for i in (1, 2)))
    (tmp_path / KAGGLE_SOLUTION).write_text(
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000003,n02119789 255 142 454 329 \n"
        "ILSVRC2012_val_00000001,n01440764 1 1 9 9 n01440764 7 5 8 8 \n"
        "ILSVRC2012_val_00000002,n02119789 0 10 499 272 \n"
    )
    for root in (tmp_path, tmp_path / "ILSVRC", tmp_path / place):
        data = load_dataset("imagenet", root, 8)
        assert data.classes == ["n01440764", "n02119789"]
        assert data.train_labels.tolist() == [0, 0, 1, 1]
        assert data.test_labels.tolist() == [0, 1, 1]
        assert "not read: test/" in data.summary
    (tmp_path / KAGGLE_SOLUTION).unlink()
    with pytest.raises(ValueError, match=rf"val: .*{KAGGLE_SOLUTION}.*--split_names train"):
        load_dataset("imagenet", tmp_path, 8)


# ---- files --------------------------------------------------------------------------------------


def test_links_duplicate_nothing_and_end(tmp_path):
    write(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "far/4.png")
    os.symlink(".", tmp_path / "train" / "again")
    os.symlink("..", tmp_path / "train" / "above")  # test images would become a class
    os.symlink("dog", tmp_path / "train" / "a_dog")  # before dog by name, but dog is the class
    os.symlink("../far", tmp_path / "train" / "far")
    os.symlink("round", tmp_path / "train" / "round")
    train = find_images(tmp_path).train
    assert train.labels == ["cat", "dog", "far"]
    assert names(train, tmp_path) == ["train/cat/1.png", "train/dog/2.png", "train/far/4.png"]
    assert 3 in train.skipped.values()
    os.symlink(".", tmp_path / "far" / "again")
    assert len(find_images(tmp_path / "far").train.files) == 1


def test_system_files_are_ignored(tmp_path):
    write(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "train/cat/.4.png")
    for place in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git"):
        write(tmp_path, f"train/{place}/1.png", f"train/cat/{place}/1.png", f"test/{place}/1.png")
    (tmp_path / "train" / "Thumbs.db").write_bytes(b"")
    data = load_dataset("folder", tmp_path)
    assert data.classes == ["cat", "dog"]
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 1], [0])
    assert "skipped" not in data.summary


def test_skipped_files_are_counted_by_kind(tmp_path):
    write(tmp_path, "a.png", "b.GIF", "c.jfif")
    for name in ("d.heic", "e.heic", "f.HEIC", "g", "h.", "i.a b c", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "j.jpg")  # opening it would wait forever
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(tmp_path, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{folder}/k.jpg")  # a socket's path must be short
        os.close(folder)
        data = load_dataset("folder", tmp_path)
    assert len(data.train_images) == 3
    assert sorted(find_images(tmp_path).train.skipped.values()) == [1, 2, 3, 3]
    assert "skipped 9 files: 3 .heic, 3 without" in data.summary
    for name in ("a.png", "b.GIF", "c.jfif"):
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="3 .heic"):
        load_dataset("folder", tmp_path)


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ([], ["a/1.png", "a/1_mask.png", "masks/2.png", "masks/sub/3.png"]),
        (["*_mask.png"], ["a/1.png", "masks/2.png", "masks/sub/3.png"]),
        (["MASKS"], ["a/1.png", "a/1_mask.png"]),
        (["masks/*"], ["a/1.png", "a/1_mask.png"]),
        (["*/sub/*", "?.png"], ["a/1_mask.png"]),
    ],
)
def test_exclude_matches_names_and_paths(tmp_path, patterns, left):
    write(tmp_path, "a/1.png", "a/1_mask.png", "masks/2.png", "masks/sub/3.png")
    train = find_images(tmp_path, exclude=patterns).train
    assert names(train, tmp_path) == left
    assert train.skipped["excluded"] == 4 - len(left)


# ---- CSV lists ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("Path,Label\n1.png,cat\n\n2.png, dog\n", ["cat", "dog"]),
        (" LABEL ,\tPATH \ncat,1.png\n,2.png\n", ["cat", None]),
        ("\ufeffpath\n1.png\n2.png\n", [None, None]),
        ("1.png,cat\n2.png,dog\n", ["cat", "dog"]),  # without a header
        ("1.PNG\n2.png\n", [None, None]),
        ('"1.png","a, b"\n2.png,\n', ["a, b", None]),
    ],
)
def test_lists_with_and_without_a_header(tmp_path, text, labels):
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    images = find_images(tmp_path / "list.csv").train
    assert [path.name.lower() for path in images.files] == ["1.png", "2.png"]
    assert images.labels == labels


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"path,label\na.png,cat\nb.png\n", "line 3"),
        (b"label,path\ncat,a.png\ndog\n", "line 3"),
        (b"path,label\na.png,cat,\n", "line 2"),
        (b"a.png,cat\nb.png\n", "line 2"),
        (b"path,label\na.png,cat\n,dog\n", "line 3"),
        (b"path,label\na.png,cat\nb.png," + b"x" * 200_000 + b"\n", "line 3"),
        (b"path,label\na.png,cat\nb.png,h\xfcnd\n", "line 3"),
        ("path,label\na.png,cat\n".encode("utf-16"), "line 1"),
        (b"path,label,Label\na.png,cat,dog\n", "line 1"),
        (b"path;label\na.png;cat\n", "`path`"),
        (b"file\na.png\n", "`path`"),
        (b"", "`path`"),
    ],
)
def test_an_invalid_list_is_named_in_one_line(tmp_path, capsys, content, line):
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    error = refused(
        capsys, main, *f"--data_name folder --data_root {path} --out {tmp_path}".split()
    )
    assert "list.csv" in error
    assert line in error


# ---- several roots ------------------------------------------------------------------------------


def test_several_roots_are_one_data_set(tmp_path):
    write(tmp_path / "a", "train/cat/1.png", "train/dog/2.png", "test/dog/3.png")
    write(tmp_path / "b", "train/cow/4.png", "train/dog/5.png", "val/cow/6.png")
    write(tmp_path / "c", "7.png")
    data = load_dataset("folder", os.pathsep.join(str(tmp_path / name) for name in "abc"))
    assert data.classes == ["cat", "cow", "dog"]
    assert data.train_labels.tolist() == [0, 2, 1, 2, -1]
    assert data.test_labels.tolist() == [2, 1]
    assert [part.split(":")[0].strip() for part in data.summary.split(";")] == ["a", "b", "c"]


def test_invalid_roots_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", None)  # no network
    a = write_photos(tmp_path / "my images")
    flags = [*RUN.split(), "--out", tmp_path / "r", "--data_root"]
    assert str(a) in refused(capsys, main, "--data_name", "folder", *flags, a, a)
    assert "no" in refused(capsys, main, "--data_name", "folder", *flags, a, tmp_path / "no")
    assert "--data_root" in refused(capsys, main, "--data_name", "cifar10", *flags, a, tmp_path)
    (tmp_path / "list.csv").write_text("path\na.png\n")
    for root in (a, tmp_path / "list.csv"):  # images, but --data_name is cifar10
        error = refused(capsys, main, *flags, root)
        assert "--data_name folder" in error
        assert str(root) in error
    assert not (tmp_path / "r").exists()


# ---- the commands -------------------------------------------------------------------------------


def test_a_run_finds_its_images_from_another_folder(tmp_path, capsys, monkeypatch):
    write_photos(tmp_path / "a" / "photos", "Train", "valid")
    write(tmp_path, "a/photos/training/cat/1.png")
    monkeypatch.chdir(tmp_path / "a")
    flags = f"--data_name folder --data_root photos --split_names Train valid {RUN} --name t"
    main.main(flags.split())
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    linear.main("--model_path ../a/results/t_model.pth --epochs 1 --cached --no-pictures".split())
    monkeypatch.chdir(tmp_path)
    model = "a/results/t_linear_cached_model.pth"
    capsys.readouterr()
    linear.main(f"--model_path {model} --evaluate_only --no-pictures".split())
    assert "8 test images in valid/" in capsys.readouterr().out


def test_a_run_on_several_roots_is_resumed_and_evaluated_without_excluded_files(tmp_path, capsys):
    a, _ = (write_photos(tmp_path / name) for name in "ab")
    write(a, "train/cat/mask_0.png", "test/dog/mask_1.png")
    flags = f"--data_name folder --data_root {tmp_path}/[ab] {RUN} --out {tmp_path}/r".split()
    flags += ["--name", "one"]
    main.main([*flags, "--exclude", "mask_*"])
    out = capsys.readouterr().out
    assert "32 training images, 16 test images, 2 classes" in out
    assert "2 excluded" in out
    main.main([*flags, "--resume"])
    evaluate = f"--cached --epochs 1 --no-pictures --model_path {tmp_path}/r/one_model.pth".split()
    capsys.readouterr()
    linear.main(evaluate)
    assert "32 training images, 16 test images" in capsys.readouterr().out
    linear.main([*evaluate, "--data_root", str(a), "--exclude", "nothing", "--name", "half"])
    assert "17 training images, 9 test images" in capsys.readouterr().out
    textures = [*evaluate, "--data_name", "textures"]
    linear.main([*textures, "--name", "t"])  # without the encoder's --exclude
    assert "--exclude" in refused(capsys, linear, *textures, "--exclude", "a")
    assert "--exclude" in refused(capsys, main, *flags[:-1], "two", "--exclude", "*.png")
    error = refused(capsys, main, "--data_name", "textures", *RUN.split(), "--exclude", "a")
    assert "--exclude" in error


LATIN = os.fsdecode("Gr\u00f6\u00dfe".encode("latin-1"))


def test_names_that_are_not_utf_8(tmp_path, capsys):
    root = write_photos(tmp_path / LATIN)
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / LATIN)
    (root / "train" / LATIN / f"{LATIN}.png").write_bytes(b"no image")
    flags = ["--data_name", "folder", "--data_root", root, *RUN.split(), "--bad_images", "skip"]
    flags += ["--out", tmp_path / "out", "--name", "t"]
    main.main(list(map(str, flags)))
    assert "Gr\\xf6\\xdfe: 2 classes, 17 training" in capsys.readouterr().out
    bad_images = (tmp_path / "out" / "t_bad_images.txt").read_bytes()
    assert os.fsencode(root / "train" / LATIN / f"{LATIN}.png") in bad_images
    fit = f"--model_path {tmp_path}/out/t_model.pth --epochs 1 --cached --no-pictures"
    linear.main([*fit.split(), "--bad_images", "skip"])
    model, table = f"{tmp_path}/out/t_linear_cached_model.pth", tmp_path / "predicted.csv"
    predict = ["--model_path", model, "--predict", str(root / "test"), "--out_csv", str(table)]
    linear.main(predict)
    assert "Gr\\xf6\\xdfe" in table.read_text(encoding="utf-8")
    out = tmp_path / "f.npz"
    flags = ["--model_path", tmp_path / "out" / "t_model.pth", "--data_root", root / "test"]
    features.command(list(map(str, [*flags, "--out", out])))
    assert set(np.load(out)["labels"]) == {"Gr\\xf6\\xdfe", "cat"}
    data = load_dataset("imagenet", root, 8, bad_images="skip")
    assert data.classes == ["Gr\\xf6\\xdfe", "cat"]
    assert data.train_labels.sum() == 8


def test_a_whole_batch_of_unreadable_images_is_skipped(tmp_path, capsys):
    root = write_photos(tmp_path / "photos")
    main.main(f"--data_name folder --data_root {root} {RUN} --out {tmp_path} --name t".split())
    bad = tmp_path / "bad"
    write(bad, *(f"{i}.png" for i in range(100, 400)))
    for i in range(100, 380):  # all of the first 256
        (bad / f"{i}.png").write_bytes(b"no image")
    out = tmp_path / "f.npz"
    flags = f"--model_path {tmp_path}/t_model.pth --data_root {bad} --out {out} --bad_images skip"
    features.command(flags.split())
    assert len(np.load(out)["features"]) == 20
    out.unlink()
    for i in range(380, 400):
        (bad / f"{i}.png").unlink()
    with pytest.raises(SystemExit) as stop:
        features.command(flags.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert ".png" in error
    assert error.count("\n") == 1
    assert not out.exists()
