"""The loader: order, ranks, crops of files by workers, skipped files, checksums."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as T

from simsiam.data.decode import UnreadableImageError, decode_files, resize_size
from simsiam.data.loader import (
    Data,
    ImageFiles,
    Loader,
    balanced_subset,
    filter_readable,
    images_checksum,
)
from simsiam.views.augment import Augmentation, Views
from simsiam.views.ops import crop_boxes
from tests.helpers import ROOT

SCALE = Augmentation(crop_scale=(0.3, 0.9))


def make_views(number=2, augmentation=SCALE):
    return Views(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), augmentation, number, seed=7)


# ---- images in memory ---------------------------------------------------------------------------


def test_a_loader_visits_every_image_once_in_a_reproducible_order():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 3, 2, 2)
    loader = Loader(images, 3, seed=1, labels=torch.arange(10))
    batches = list(loader.epoch(0))
    order = torch.cat([batch.labels for batch in batches]).tolist()
    assert len(loader) == len(batches) == 3
    assert len(set(order)) == 9
    for i, batch in enumerate(batches):
        assert (batch.epoch, batch.step, batch.size, batch.rows) == (0, i, 3, slice(0, 3))
        assert torch.equal(batch.images[:, 0, 0, 0], batch.labels)
    resumed = list(loader.epoch(0, start=1))
    assert [batch.step for batch in resumed] == [1, 2]
    for a, b in zip(batches[1:], resumed, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert torch.cat([batch.labels for batch in loader.epoch(1)]).tolist() != order
    reseeded = Loader(images, 3, seed=2, labels=torch.arange(10))
    assert torch.cat([batch.labels for batch in reseeded.epoch(0)]).tolist() != order
    whole = Loader(images, 3, seed=1, keep_last=True)
    assert len(whole) == 4
    assert [(len(batch.images), batch.size) for batch in whole.epoch(0)] == [(3, 3)] * 3 + [(1, 1)]
    assert all(batch.labels is None for batch in whole.epoch(0))
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"--batch_size {size}"):
            Loader(images, size)


def test_a_subset_is_balanced_and_seeded():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 5)
    subset = balanced_subset(labels, 30, seed=0)
    assert labels[subset].bincount().tolist() in ([13, 12, 5], [12, 13, 5])
    assert subset.tolist() == sorted(set(subset.tolist()))
    assert torch.equal(subset, balanced_subset(labels, 30, seed=0))
    assert not torch.equal(subset, balanced_subset(labels, 30, seed=1))
    for size, flag in ((0, "--train_size"), (86, "--bank_size")):
        with pytest.raises(ValueError, match=f"{flag} {size}"):
            balanced_subset(labels, size, seed=0, flag=flag)


def test_a_subset_of_the_data_keeps_images_with_labels_and_all_tests():
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(-1, 3, 2, 2)
    data = Data(images, torch.arange(20) % 4, images[:3], torch.arange(3), list("abcd"), ["x"])
    subset = data.subset(8, seed=0)
    assert subset.train_labels.bincount().tolist() == [2] * 4
    assert torch.equal(subset.train_images[:, 0, 0, 0] % 4, subset.train_labels)
    masked = data.select(data.train_labels == 1)
    assert masked.train_images[:, 0, 0, 0].tolist() == [1, 5, 9, 13, 17]
    for part in (subset, masked, data.to(torch.device("cpu"))):
        assert torch.equal(part.test_images, data.test_images)
        assert torch.equal(part.test_labels, data.test_labels)
        assert (part.classes, part.unreadable) == (list("abcd"), ["x"])
    assert data.limit(20, seed=0) is data
    assert torch.equal(data.limit(8, seed=0).train_images, subset.train_images)


# ---- images in files ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """JPEG files of several sizes and modes."""
    root = tmp_path_factory.mktemp("jpegs")
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(64, 32), (48, 96), (80, 80), (32, 56), (96, 64)]):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        mode = ("RGB", "L", "CMYK")[i % 3]
        coarse.resize((width, height)).convert(mode).save(root / f"{i}.jpg", quality=95)
    return sorted(map(str, root.iterdir()))


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_of_files_equal_torchvision_bit_for_bit(jpegs, workers):
    loader = Loader(ImageFiles(jpegs, 32, workers), 2, 1, torch.arange(5), True, make_views())
    labels = []
    for batch in loader.epoch(4):
        assert batch.images.shape == (len(batch.labels), 2, 3, 32, 32)
        for crops, i in zip(batch.images, batch.labels.tolist(), strict=True):
            image = Image.open(jpegs[i]).convert("RGB")
            rng = np.random.default_rng([1, 4, i])  # of the sample, not of step, batch or worker
            boxes = crop_boxes(rng, 2, image.height, image.width, (0.3, 0.9))
            for crop, box in zip(crops, boxes.tolist(), strict=True):
                reference = T.pil_to_tensor(T.resized_crop(image, *box, [32, 32]))
                assert torch.equal(crop, reference)
        labels += batch.labels.tolist()
    assert sorted(labels) == [0, 1, 2, 3, 4]
    (resumed,) = loader.epoch(4, start=2)
    assert resumed.step == 2
    assert torch.equal(resumed.images, batch.images)
    assert not torch.equal(next(iter(loader.epoch(5))).images, batch.images)


def test_files_under_the_test_transform_equal_torchvision(jpegs):
    files = ImageFiles(jpegs, 28, workers=1)  # resized to 32, so that margins are whole pixels
    images = torch.cat(list(files.split(2)))
    assert images.shape == files.shape == (5, 3, 28, 28)
    for path, pixels in zip(jpegs, images, strict=True):
        image = Image.open(path).convert("RGB")
        reference = T.pil_to_tensor(T.center_crop(T.resize(image, [32]), [28]))
        assert (pixels.int() - reference.int()).abs().max() <= 1
    decoded = decode_files(jpegs, 28, resize_size=resize_size("imagenet", 28))[0]
    assert torch.equal(decoded, images)


def test_files_are_indexed_like_a_tensor(jpegs):
    files = ImageFiles(jpegs, 28, workers=0)
    images = torch.cat(list(files.split(5)))
    mask = torch.tensor([True, False, False, True, False])
    for which in (torch.tensor([3, 1]), mask, slice(1, 4), slice(None, None, 2)):
        assert torch.equal(torch.cat(list(files[which].split(2))), images[which])
        assert len(files[which]) == len(images[which])
    assert [len(chunk) for chunk in files.split(2)] == [2, 2, 1]
    assert files.to("cpu").paths == files.paths


def test_an_unreadable_file_is_named_or_skipped(jpegs, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(Path(jpegs[0]).read_bytes()[:-200])
    files = ImageFiles([*jpegs, str(bad)], 16, workers=1)
    for batches in (files.split(2), Loader(files, 3, views=make_views()).epoch(0)):
        with pytest.raises(UnreadableImageError, match=r"bad\.jpg.*--bad_images skip"):
            list(batches)
    paths = [jpegs[0], str(bad), jpegs[1]]
    assert filter_readable(paths, 1, "error") == (paths, {})  # reads none of them
    readable, reasons = filter_readable(paths, 1, "skip")
    assert (readable, list(reasons)) == (jpegs[:2], [1])
    assert "bad.jpg" in reasons[1]
    with pytest.raises(ValueError, match=r"bad\.jpg"):  # none is left
        filter_readable([str(bad)], 1, "skip")


def test_workers_ignore_signals(jpegs):
    """Ctrl-C and SIGTERM reach all processes of a run, which still has to finish its step."""
    before = multiprocessing.active_children()
    loader = Loader(ImageFiles(20 * jpegs, 16, workers=2), 5, views=make_views())
    batches = loader.epoch(0)
    next(batches), next(batches)  # one of each worker
    workers = [one for one in multiprocessing.active_children() if one not in before]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 18


def test_workers_end_with_their_process(jpegs):
    """Also workers of a loader that is not collected, of a child process, and after an error.

    Workers ignore SIGTERM, by which multiprocessing would end them: it would wait for ever.
    """
    program = f"""
import multiprocessing
from simsiam.data.loader import ImageFiles, Loader
from simsiam.views.augment import Views

def run(paths):
    loader = Loader(ImageFiles(paths, 16, 2), 2, views=Views(16, (0.5,) * 3, (0.5,) * 3))
    loader.cycle = loader
    return loader.epoch(0)

child = multiprocessing.get_context("fork").Process(target=lambda: list(run({jpegs})))
child.start()
child.join()
assert child.exitcode == 0
batches = run(20 * {jpegs})
next(batches)
raise SystemExit(3)
"""
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, timeout=300, capture_output=True, text=True
    )
    assert (process.returncode, process.stderr) == (3, "")


def test_a_checksum_depends_on_pixels_or_on_names_below_the_common_folder(jpegs, tmp_path):
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert images_checksum(images) == images_checksum(channels_last)
    changed = images.clone()
    changed[1, 2, 1, 1] += 1
    for other in (images.flip(0), changed):
        assert images_checksum(images) != images_checksum(other)
    files = ImageFiles(jpegs, 32)
    moved = [shutil.copy(path, tmp_path) for path in jpegs]
    assert images_checksum(ImageFiles(moved, 32)) == images_checksum(files)
    for other in (files[:4], files[torch.tensor([1, 0, 2, 3, 4])]):
        assert images_checksum(files) != images_checksum(other)
