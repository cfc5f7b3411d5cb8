"""Folders and lists as people, cameras and systems leave them: what is read, and what is said."""

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
    """Small images of different colours at the paths `names`."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (len(name), 0, 0)).save(path)


def photos(root, split="train", test="test", number=8):
    """Textures in a folder: two classes, `number` of each to train on, four to score with."""
    images = make_textures(200, seed=1)[0].permute(0, 2, 3, 1).numpy()
    for part, each in ((split, number), (test, 4)):
        for i in range(2 * each):
            path = root / part / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(path)
    return root


def names(listing, root):
    return [str(path.relative_to(root)) for path in listing.files]


# ---- folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("training", "valid"), ("TRAINING", "Validation")]
)
def test_parts_by_their_usual_names(tmp_path, train, test):
    write(tmp_path, f"{train}/cat/1.png", f"{train}/dog/2.png", f"{test}/dog/3.png")
    found = load_dataset("folder", tmp_path)
    assert found.classes == ["cat", "dog"]
    assert (found.train_labels.tolist(), found.test_labels.tolist()) == ([0, 1], [1])
    said = f"{tmp_path.name}: 2 classes, 2 training images in {train}/, 1 test images in {test}/"
    assert found.summary == said


def test_parts_that_may_both_be_meant_are_asked_for(tmp_path):
    write(tmp_path, "Train/cat/1.png", "training/cat/2.png", "training/dog/3.png", "x/dog/4.png")
    with pytest.raises(ValueError, match="Train/ and training/ may both .*--split_names TRAIN"):
        load_dataset("folder", tmp_path)
    found = load_dataset("folder", tmp_path, split_names=["training", "x"])
    assert (found.train_labels.tolist(), found.test_labels.tolist()) == ([0, 1], [1])
    assert load_dataset("folder", tmp_path, split_names=["training"]).test_images is None
    with pytest.raises(FileNotFoundError, match="--split_names y: .* has no such"):
        load_dataset("folder", tmp_path, split_names=["training", "y"])
    with pytest.raises(ValueError, match="--split_names: goes with --data_name folder"):
        load_dataset("textures", tmp_path, split_names=["training"])


def test_a_list_beside_a_folder_of_images_without_classes_is_asked_for(tmp_path):
    write(tmp_path, "train/1.png")
    (tmp_path / "train.csv").write_text("path,label\ntrain/1.png,cat\n")
    with pytest.raises(ValueError, match=r"train/ and train.csv may both"):
        load_dataset("folder", tmp_path)
    assert load_dataset("folder", tmp_path, split_names=["train.csv"]).classes == ["cat"]


def test_classes_without_a_train_folder_are_no_classes_and_it_is_said(tmp_path):
    write(tmp_path, "cat/1.png", "dog/2.png")
    found = load_dataset("folder", tmp_path)
    assert found.classes == []
    assert found.summary.startswith(f"{tmp_path.name}: no classes, 2 images; its folders are no cl")
    assert found.summary.endswith(f"{tmp_path.name}/train/")


def test_links_double_nothing_and_end(tmp_path):
    write(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "far/4.png")
    os.symlink(".", tmp_path / "train" / "again")
    os.symlink("..", tmp_path / "train" / "above")  # test images would become a class
    os.symlink("dog", tmp_path / "train" / "a_dog")  # before dog by name; yet dog is the class
    os.symlink("../far", tmp_path / "train" / "far")
    os.symlink("round", tmp_path / "train" / "round")
    found = find_images(tmp_path)
    assert found.train.labels == ["cat", "dog", "far"]
    assert names(found.train, tmp_path) == ["train/cat/1.png", "train/dog/2.png", "train/far/4.png"]
    assert "3 links to folders that are read already" in found.summary
    os.symlink(".", tmp_path / "far" / "again")
    assert len(find_images(tmp_path / "far").train.files) == 1


def test_what_systems_leave_is_not_read(tmp_path):
    write(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/cat/3.png")
    for place in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git"):
        write(tmp_path, f"train/{place}/1.png", f"train/cat/{place}/1.png", f"test/{place}/1.png")
    (tmp_path / "train" / "Thumbs.db").write_bytes(b"")
    found = load_dataset("folder", tmp_path)
    assert found.classes == ["cat", "dog"]
    assert (found.train_labels.tolist(), found.test_labels.tolist()) == ([0, 1], [0])
    assert "left out" not in found.summary


def test_what_is_left_out_is_counted_by_its_ending(tmp_path):
    write(tmp_path, "a.png", "b.GIF", "c.jfif")
    for name in ("d.heic", "e.heic", "f.HEIC", "g", "h.", "i.a b c", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "j.jpg")  # whoever opens it waits for ever
    with socket.socket(socket.AF_UNIX) as door:
        folder = os.open(tmp_path, os.O_RDONLY)
        door.bind(f"/proc/self/fd/{folder}/k.jpg")  # a socket's path must be short
        os.close(folder)
        found = load_dataset("folder", tmp_path)
    assert found.train_images.shape[0] == 3
    kinds = "3 .heic, 3 without an ending, 2 pipes or devices, 1 .txt"
    assert f"left out 9 files: {kinds};" in found.summary
    for name in ("a.png", "b.GIF", "c.jfif"):
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"there are no images .*; there are 3 .heic"):
        load_dataset("folder", tmp_path)


def kaggle(root):
    """The folders and tables of Kaggle's ImageNet, as its archive unpacks, with few images."""
    place = "ILSVRC/Data/CLS-LOC"
    for wnid in ("n01440764", "n02119789"):
        write(root, *(f"{place}/train/{wnid}/{wnid}_{i}.JPEG" for i in range(2)))
    write(root, *(f"{place}/val/ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 3)))
    write(root, *(f"{place}/test/ILSVRC2012_test_0000000{i}.JPEG" for i in (1, 2)))
    (root / "ILSVRC" / "Annotations" / "CLS-LOC").mkdir(parents=True)
    text = "ImageId,PredictionString\n"
    text += "ILSVRC2012_val_00000003,n02119789 255 142 454 329 \n"
    text += "ILSVRC2012_val_00000001,n01440764 1 1 9 9 n01440764 7 5 8 8 \n"
    text += "ILSVRC2012_val_00000002,n02119789 0 10 499 272 \n"
    (root / KAGGLE_SOLUTION).write_text(text)


def test_kaggle_s_imagenet(tmp_path):
    kaggle(tmp_path)
    place = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for root in (tmp_path, tmp_path / "ILSVRC", place):
        found = load_dataset("imagenet", root, 8)
        assert found.classes == ["n01440764", "n02119789"]
        assert found.train_labels.tolist() == [0, 0, 1, 1]
        assert found.test_labels.tolist() == [0, 1, 1]
        line = "2 classes, 4 training images in train/, 3 test images in val/; not read: test/"
        assert found.summary.endswith(line)
    (tmp_path / KAGGLE_SOLUTION).unlink()
    with pytest.raises(
        ValueError, match=rf"val: .*{KAGGLE_SOLUTION} .* val/<class>/.*--split_names tr"
    ):
        load_dataset("imagenet", tmp_path, 8)


def test_test_images_without_classes_are_told_apart(tmp_path):
    write(tmp_path, "train/cat/1.png", "test/2.png")
    with pytest.raises(ValueError, match=r"test: has no class folders.*--split_names train"):
        load_dataset("folder", tmp_path)
    write(tmp_path, "val/cat/3.png")
    assert "1 test images in val/; not read: test/" in load_dataset("folder", tmp_path).summary


# ---- lists --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", ["Path,Label", "path, label", " PATH ,LABEL ", "\ufeffpath,label"]
)
def test_a_list_s_header_as_people_write_it(tmp_path, header):
    write(tmp_path, "a.png", "b.png")
    path = tmp_path / "list.csv"
    path.write_text(f"{header}\na.png,cat\n\nb.png, dog\n", encoding="utf-8")
    found = load_dataset("folder", path)
    assert found.classes == ["cat", "dog"]
    assert found.train_labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"path,label\na.png,cat\nb.png\n", "line 3: has 1 fields, and the header 2"),
        (b"label,path\ncat,a.png\ndog\n", "line 3: has 1 fields"),
        (b"path,label\na.png,cat,\n", "line 2: has 3 fields"),
        (b"path,label\na.png,cat\n,dog\n", "line 3: has no path"),
        (b"path,label\na.png,cat\nb.png," + b"x" * 200_000 + b"\n", "line 3: field larger"),
        (b"path,label\na.png,cat\nb.png,h\xfcnd\n", "line 3: is not in UTF-8"),
        ("path,label\na.png,cat\n".encode("utf-16"), "line 1: is not in UTF-8"),
        (b"path,label,Label\na.png,cat,dog\n", "line 1: two columns"),
        (b"path;label\na.png;cat\n", "column `path`.*commas"),
        (b"", "column `path`"),
    ],
)
def test_a_list_that_cannot_be_read_is_one_line(tmp_path, capsys, content, named):
    write(tmp_path, "a.png", "b.png")
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"list.csv.*{named}"):
        load_dataset("folder", path)
    flags = f"--data_name folder --data_root {path} --out {tmp_path}/out"
    assert "list.csv" in refused(capsys, main, *flags.split())


# ---- the commands -------------------------------------------------------------------------------


def test_images_without_a_data_set_s_name_are_not_taken_for_cifar10(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", None)  # no network
    root = photos(tmp_path / "my images")
    told = refused(capsys, main, "--data_root", root, "--out", tmp_path / "out")
    assert f"{root}: holds images" in told
    assert "--data_name folder" in told
    (tmp_path / "list.csv").write_text("path\na.png\n")
    assert "holds images" in refused(capsys, main, "--data_root", tmp_path / "list.csv")


def test_a_run_finds_its_images_from_another_folder(tmp_path, capsys, monkeypatch):
    photos(tmp_path / "a" / "photos", "Train", "valid")
    write(tmp_path, "a/photos/training/cat/1.png")
    monkeypatch.chdir(tmp_path / "a")
    flags = f"--data_name folder --data_root photos --split_names Train valid {RUN} --name t"
    main.main(flags.split())
    assert (
        "2 classes, 16 training images in Train/, 8 test images in valid/"
        in capsys.readouterr().out
    )
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    linear.main("--model_path ../a/results/t_model.pth --epochs 1 --cached --no-pictures".split())
    assert "16 training images in Train/" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    model = "a/results/t_linear_cached_model.pth"
    linear.main(f"--model_path {model} --evaluate_only --no-pictures".split())
    assert "8 test images in valid/" in capsys.readouterr().out


LATIN = os.fsdecode("Gr\u00f6\u00dfe".encode("latin-1"))


def test_names_that_are_no_utf_8(tmp_path, capsys):
    root = photos(tmp_path / LATIN)
    for part in ("train", "test"):
        (root / part / "dog").rename(root / part / LATIN)
    (root / "train" / LATIN / f"{LATIN}.png").write_bytes(b"no image")
    flags = ["--data_name", "folder", "--data_root", root, *RUN.split(), "--bad_images", "skip"]
    flags += ["--out", tmp_path / "out", "--name", "t", "--pictures"]
    main.main(list(map(str, flags)))
    assert "Gr\\xf6\\xdfe: 2 classes, 17 training" in capsys.readouterr().out
    listed = (tmp_path / "out" / "t_bad_images.txt").read_bytes()
    assert os.fsencode(root / "train" / LATIN / f"{LATIN}.png") in listed  # as it is there
    flags = f"--model_path {tmp_path}/out/t_model.pth --epochs 1 --bad_images skip".split()
    linear.main(flags)
    model = f"{tmp_path}/out/t_linear_model.pth"
    table = tmp_path / "predicted.csv"
    predict = ["--model_path", model, "--predict", str(root / "test"), "--out_csv", str(table)]
    linear.main(predict)
    assert "Gr\\xf6\\xdfe" in table.read_text(encoding="utf-8")
    out = tmp_path / "f.npz"
    model = tmp_path / "out" / "t_model.pth"
    flags = ["--model_path", model, "--data_root", root / "test", "--out", out]
    features.command(list(map(str, flags)))
    assert set(np.load(out)["labels"]) == {"Gr\\xf6\\xdfe", "cat"}
    files = load_dataset("imagenet", root, 8, bad_images="skip")
    assert files.classes == ["Gr\\xf6\\xdfe", "cat"]
    assert files.train_labels.sum() == 8


def test_a_whole_batch_of_bad_images_is_left_out(tmp_path, capsys):
    root = photos(tmp_path / "photos")
    flags = f"--data_name folder --data_root {root} {RUN} --out {tmp_path} --name t"
    main.main(flags.split())
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
    with pytest.raises(SystemExit):
        features.command(flags.split())
    err = capsys.readouterr().err
    assert "cannot be read" in err
    assert err.count("\n") == 1
    assert not out.exists()


# ---- several places -----------------------------------------------------------------------------


def test_several_places_are_one_data_set(tmp_path):
    """Classes of one name are one; a place without parts has images to train on, without labels."""
    write(tmp_path / "a", "train/cat/1.png", "train/dog/2.png", "test/dog/3.png")
    write(tmp_path / "b", "train/cow/4.png", "train/dog/5.png", "val/cow/6.png")
    write(tmp_path / "c", "7.png")
    found = load_dataset("folder", os.pathsep.join(str(tmp_path / name) for name in "abc"))
    assert found.classes == ["cat", "cow", "dog"]
    assert found.train_labels.tolist() == [0, 2, 1, 2, -1]
    assert found.test_labels.tolist() == [2, 1]
    assert found.summary.startswith("a: 2 classes, 2 training images in train/, 1 test images")
    assert "; b: 2 classes" in found.summary
    assert "; c: no classes, 1 images" in found.summary


def test_a_run_on_several_places_is_resumed_and_judged(tmp_path, capsys):
    a, b = (photos(tmp_path / name) for name in "ab")
    flags = f"--data_name folder --data_root {a} {b} {RUN} --out {tmp_path}/r --name one"
    main.main(flags.split())
    assert "folder: 32 training images, 16 test images, 2 classes" in capsys.readouterr().out
    main.main([*flags.split(), "--resume"])
    model = tmp_path / "r" / "one_model.pth"
    flags = "--cached --epochs 1 --no-pictures --model_path"
    linear.main([*flags.split(), str(model)])
    assert "32 training images, 16 test images" in capsys.readouterr().out
    linear.main([*flags.split(), str(model), "--data_root", str(a), "--name", "half"])
    assert "16 training images, 8 test images" in capsys.readouterr().out


def test_a_pattern_that_the_shell_has_left_stands_for_what_it_matches(tmp_path):
    for name in ("b", "a", "a[1]", "other/a"):
        (tmp_path / name).mkdir(parents=True)
    flags = main.make_flags()

    def root(*words):
        words = [f"{tmp_path}/{word}" for word in words]
        args = flags.read(["--data_name", "folder", "--data_root", *words])[0]
        return [os.path.relpath(place, tmp_path) for place in args.data_root.split(os.pathsep)]

    assert root("[ab]", "other/*") == ["a", "b", "other/a"]
    assert root("a[1]") == ["a[1]"]  # a folder's name, not a pattern
    assert root("none*") == ["none*"]  # is refused, as it is written


def test_several_places_that_cannot_be_are_refused(tmp_path, capsys):
    a = photos(tmp_path / "a")
    flags = f"{RUN} --out {tmp_path}/r --data_root".split()
    err = refused(capsys, main, "--data_name", "folder", *flags, a, a)
    assert f"--data_root: {a} is named twice" in err
    err = refused(capsys, main, "--data_name", "folder", *flags, a, tmp_path / "b")
    assert f"{tmp_path}/b: there is no such folder" in err
    err = refused(capsys, main, "--data_name", "cifar10", *flags, a, tmp_path / "b")
    assert "--data_root: cifar10 has one" in err
    assert not (tmp_path / "r").exists()


# ---- files that are left out --------------------------------------------------------------------


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
def test_patterns_are_of_names_and_of_paths(tmp_path, patterns, left):
    write(tmp_path, "a/1.png", "a/1_mask.png", "masks/2.png", "masks/sub/3.png")
    found = find_images(tmp_path, exclude=patterns)
    assert names(found.train, tmp_path) == left
    assert found.train.skipped["excluded"] == 4 - len(left)


def test_a_run_and_its_judge_leave_out_the_same(tmp_path, capsys):
    root = photos(tmp_path / "a")
    write(root, "train/cat/mask_0.png", "test/dog/mask_1.png")
    flags = f"--data_name folder --data_root {root} {RUN} --out {tmp_path}/r --name one"
    main.main([*flags.split(), "--exclude", "mask_*"])
    out = capsys.readouterr().out
    assert "folder: 16 training images, 8 test images" in out
    assert "left out 2 files: 2 excluded" in out
    main.main([*flags.split(), "--resume"])
    judge = f"--cached --epochs 1 --no-pictures --model_path {tmp_path}/r/one_model.pth"
    capsys.readouterr()
    linear.main(judge.split())
    assert "16 training images, 8 test images" in capsys.readouterr().out
    linear.main([*judge.split(), "--exclude", "nothing", "--name", "all"])
    assert "17 training images, 9 test images" in capsys.readouterr().out
    other = [*judge.split(), "--data_name", "textures", "--name", "t"]
    linear.main(other)
    linear.main([*other, "--resume"])
    err = refused(capsys, linear, *judge.split(), "--data_name", "textures", "--exclude", "a")
    assert "--exclude: goes with" in err
    err = refused(capsys, main, *flags.split()[:-1], "two", "--exclude", "*.png")
    assert "--exclude: leaves no image of" in err
    err = refused(capsys, main, "--data_name", "textures", *RUN.split(), "--exclude", "a")
    assert "--exclude: goes with --data_name folder or imagenet" in err


# ---- lists without a header ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("1.png,cat\n2.png,dog\n", ["cat", "dog"]),
        ("1.PNG\n2.png\n", [None, None]),
        ('"1.png","a, b"\n2.png,\n', ["a, b", None]),
    ],
)
def test_a_list_without_a_header(tmp_path, text, labels):
    (tmp_path / "list.csv").write_text(text)
    listing = find_images(tmp_path / "list.csv").train
    assert [path.name.lower() for path in listing.files] == ["1.png", "2.png"]
    assert listing.labels == labels


def test_a_row_of_another_length_in_a_list_without_a_header_is_named(tmp_path):
    (tmp_path / "list.csv").write_text("1.png,cat\n2.png\n")
    with pytest.raises(ValueError, match="line 2: has 1 fields, and the header 2"):
        find_images(tmp_path / "list.csv")
