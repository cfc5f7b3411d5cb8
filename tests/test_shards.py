"""Images in tar files (WebDataset), and the workers that read files."""

import io
import os
import tarfile
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
import webdataset
from PIL import Image

import linear
import main
from simsiam.data.datasets import load_dataset
from simsiam.data.loader import ImageFiles, Loader
from simsiam.data.textures import TEXTURE_CLASSES
from simsiam.runtime import distributed
from simsiam.training import checkpoint
from simsiam.views.augment import Augmentation, Views
from tests.helpers import image_files, refused


def shard_files(folder, root, each=30):
    """Write the images of the folder `root` into tar files of `each` images."""
    folder.mkdir()
    for split in ("train", "val"):
        files = sorted(Path(root, split).rglob("*.jpg"), key=lambda path: int(path.stem))
        for first in range(0, len(files), each):
            with tarfile.open(folder / f"{split}-{first // each:06d}.tar", "w") as archive:
                for path in files[first : first + each]:
                    label = str(TEXTURE_CLASSES.index(path.parent.name)).encode()
                    for end, content in (("cls", label), ("jpg", path.read_bytes())):
                        info = tarfile.TarInfo(f"images/{path.stem}.{end}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    return shard_files(root / "tars", image_files(root / "images"))


def streams(shards, ranks, workers, epoch, start=0, whole=False, size=None):
    """Return the batches of an epoch by rank: lists of images as bytes."""
    images = load_dataset("webdataset", shards, 32, workers)
    images = images.subset(size, 0) if size else images
    augmentation = Augmentation(crop_scale=(1.0, 1.0) if whole else (0.2, 1.0))
    batches = []
    for rank in range(ranks):
        rows = partial(distributed.slice_for_rank, rank=rank, world_size=ranks)
        views = Views(32, (0,) * 3, (1,) * 3, augmentation)
        loader = Loader(images.train_images, 24, views=views, local_slice=rows)
        steps = [batch.images for batch in loader.epoch(epoch, start)]
        assert len(steps) == len(loader) - start
        batches.append([[image.numpy().tobytes() for image in batch] for batch in steps])
    return batches


def test_an_epoch_of_shards_has_each_image_once(shards):
    for ranks, workers in [(1, 0), (2, 2)]:
        batches = streams(shards, ranks, workers, 0, whole=True)
        images = [image for steps in batches for batch in steps for image in batch]
        assert len(images) == len(set(images)) == 240
    one, other = (streams(shards, 1, 0, epoch, whole=True)[0] for epoch in (0, 1))
    assert one != other


def test_an_epoch_mixes_shards_and_keeps_to_its_subset(shards, monkeypatch):
    """The images of a subset alone; neighbours in time are not neighbours in a shard."""
    files = (shards.parent / "images" / "train").rglob("*.jpg")
    numbers = {zlib.crc32(path.read_bytes()): int(path.stem) for path in files}
    assert len(numbers) == 240
    seen, opened = [], Image.open

    def watched(file, *args):
        seen.append(numbers[zlib.crc32(file.getvalue())])
        return opened(file, *args)

    monkeypatch.setattr(Image, "open", watched)
    for epoch in range(3):
        streams(shards, 1, 0, epoch, size=48)
    assert len(seen) == 3 * 48
    assert len(set(seen)) == 48
    seen.clear()
    streams(shards, 1, 0, 0)
    assert len({number // 30 for number in seen[:24]}) > 2  # shards have 30 each
    shuffle = webdataset.shuffle
    monkeypatch.setattr(webdataset, "shuffle", lambda *_, rng, **__: shuffle(1, rng=rng, initial=1))
    seen.clear()
    streams(shards, 1, 0, 0)
    assert len({number // 30 for number in seen[:24]}) == 1


def test_shards_resume_after_any_step(shards):
    for workers, start in [(0, 4), (2, 3), (3, 5)]:
        whole = streams(shards, 2, workers, 3)
        assert [steps[start:] for steps in whole] == streams(shards, 2, workers, 3, start)


def test_shards_are_evaluated_like_files(shards):
    """Labels and pixels are those of the files of the same name."""
    tars = load_dataset("webdataset", shards, 32, 0)
    files = load_dataset("imagenet", shards.parent / "images", 32, 0)
    assert len(tars.train_images) == 240
    names = [member.key.split("/")[-1] for member in tars.train_images.paths]
    order = {Path(path).stem: i for i, path in enumerate(files.train_images.paths)}
    where = torch.tensor([order[name] for name in names])
    assert [int(tars.classes[i]) for i in tars.train_labels] == [
        TEXTURE_CLASSES.index(files.classes[i]) for i in files.train_labels[where]
    ]
    for part in (slice(0, 3), slice(100, 103)):
        one, other = (
            next(images.split(3))
            for images in (tars.train_images[part], files.train_images[where][part])
        )
        assert torch.equal(one, other)
    assert len(tars.test_images) == 61


def test_a_run_on_shards(shards, tmp_path, capsys):
    flags = f"--data_name webdataset --data_root {shards} --image_size 32 --arch resnet8 "
    flags += f"--stem cifar --width 4 --feature_dim 16 --batch_size 48 --epochs 2 --out {tmp_path} "
    flags = [*flags.split(), "--no-pictures", "--name"]
    main.main([*flags, "whole"])
    state = checkpoint.load(tmp_path / "whole_model.pth")
    assert state["config"].recipe == "imagenet"
    assert (state["config"].probe, state["probe"]) == (False, {})  # a stream has no labels
    row = pandas.read_csv(tmp_path / "results.csv").iloc[0]
    assert (row["data"], row["protocol"]) == ("webdataset:tars", "KNN")
    linear.main(f"--model_path {tmp_path}/whole_model.pth --epochs 1 --out {tmp_path}".split())
    pattern = f"{shards}/train-{{000000..%06d}}.tar"
    main.main([*flags, "some", "--data_root", pattern % 3])
    assert "120 training images, 0 test images" in capsys.readouterr().out
    junk = tmp_path / "junk.tar"
    junk.write_bytes(b"junk" * 1000)
    for more, word in (
        (["--probe"], "--probe"),
        (["--data_root", pattern % 9], "train-000008.tar"),
        (["--num_workers", 9], "--num_workers 9"),
        (["--data_root", junk], "junk.tar"),
    ):
        assert word in refused(capsys, main, *flags, "none", *more)


# ---- workers -----------------------------------------------------------------------------------


def test_too_little_shared_memory_is_refused_before_the_run(tmp_path, capsys, monkeypatch):
    root = image_files(tmp_path / "images", 64)
    shm = SimpleNamespace(f_bavail=64, f_frsize=2**20)  # what docker gives
    monkeypatch.setattr(os, "statvfs", lambda path: shm)
    flags = ["--data_name", "imagenet", "--data_root", root, "--out", tmp_path, "--batch_size", 64]
    line = refused(capsys, main, *flags, "--num_workers", 2, "--arch", "resnet18")
    assert "--num_workers 2" in line
    assert "77 MB" in line  # 2 workers x 2 batches x 64 x 2 crops x 3 x 224 x 224
    # Of a batch of 2 the crops would fit, but not the 64 images at a time that the kNN looks at.
    shm.f_bavail = 18
    flags[-1] = 2
    line = refused(capsys, main, *flags, "--num_workers", 1, "--arch", "resnet18")
    assert "19 MB" in line  # 1 worker x 2 batches x 64 x 3 x 224 x 224


def test_features_of_files_are_sent_by_workers_in_small_parts(tmp_path, monkeypatch):
    paths = sorted(image_files(tmp_path / "images", 150).rglob("train/*/*.jpg"))
    sent, loader = [], torch.utils.data.DataLoader.__iter__

    def watched(self):
        for part in loader(self):
            sent.append(len(part))
            yield part

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", watched)
    files = ImageFiles(paths, 32, workers=2)
    chunks = list(files.split(100))
    assert [len(chunk) for chunk in chunks] == [100, 50]
    assert sum(sent) == 150
    assert max(sent) <= 64
    monkeypatch.undo()
    one_by_one = torch.cat(list(ImageFiles(paths, 32, workers=0).split(1)))
    assert torch.equal(torch.cat(chunks), one_by_one)
