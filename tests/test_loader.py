"""The loader, its order, and the files whose crops its workers cut."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as T

from simsiam.data.datasets import resize_size
from simsiam.data.decode import UnreadableImageError, decode_files
from simsiam.data.loader import (
    Data,
    ImageFiles,
    Loader,
    balanced_subset,
    filter_readable,
    images_checksum,
)
from simsiam.views.augment import Augmentation, Batch, Views, crop_boxes

CUT = Augmentation(crop_scale=(0.3, 0.9))


def make_views(number=2, augmentation=CUT):
    return Views(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), augmentation, number, seed=7)


# ---- images in memory ---------------------------------------------------------------------------


def test_a_loader_visits_every_image_once_in_a_reproducible_order():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 3, 2, 2)
    loader = Loader(images, 3, seed=1, labels=torch.arange(10))
    batches = list(loader.epoch(0))
    seen = torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist()
    assert len(loader) == len(batches) == 3
    assert len(set(seen)) == 9
    for i, batch in enumerate(batches):
        assert (batch.epoch, batch.step, batch.size, batch.rows) == (0, i, 3, slice(0, 3))
        assert torch.equal(batch.images[:, 0, 0, 0], batch.labels)  # images and labels together
    resumed = list(loader.epoch(0, start=1))
    assert [batch.step for batch in resumed] == [1, 2]
    for a, b in zip(batches[1:], resumed, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    other = torch.cat([batch.labels for batch in loader.epoch(1)]).tolist()
    assert other != seen
    reseeded = Loader(images, 3, seed=2, labels=torch.arange(10))
    assert torch.cat([batch.labels for batch in reseeded.epoch(0)]).tolist() != seen
    whole = Loader(images, 3, seed=1, keep_last=True)
    assert [len(batch.images) for batch in whole.epoch(0)] == [3, 3, 3, 1]
    assert [batch.size for batch in whole.epoch(0)] == [3, 3, 3, 1]
    assert all(batch.labels is None for batch in whole.epoch(0))
    assert len(whole) == 4
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"--batch_size {size}: must be from 1 to 10"):
            Loader(images, size)


@pytest.mark.parametrize("in_files", [False, True])
def test_a_rank_s_batches_are_rows_of_the_whole_ones(jpegs, in_files):
    """Three ranks, of which the last has two rows of four; what `share` says is all they know."""
    images = ImageFiles(jpegs, 32, 0) if in_files else decode_files(jpegs, 40)[0]
    views, labels = make_views(), torch.arange(5)
    whole = list(Loader(images, 4, 1, labels, views=views).epoch(2))
    assert len(whole) == 1
    for rows in (slice(0, 1), slice(1, 2), slice(2, 4)):
        mine = Loader(images, 4, 1, labels, views=views, local_slice=lambda n, rows=rows: rows)
        for batch, every in zip(mine.epoch(2), whole, strict=True):
            assert (batch.size, batch.rows) == (4, rows)
            assert torch.equal(batch.images, every.images[rows])
            assert torch.equal(batch.labels, every.labels)  # whole, for all ranks know them
            for x, y in zip(views(batch), views(every), strict=True):
                assert torch.equal(x, y[rows])


def test_a_subset_is_balanced_and_seeded():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 5)
    chosen = balanced_subset(labels, 30, seed=0)
    assert labels[chosen].bincount().tolist() in ([13, 12, 5], [12, 13, 5])
    assert len(set(chosen.tolist())) == 30
    assert chosen.tolist() == sorted(chosen.tolist())
    assert torch.equal(chosen, balanced_subset(labels, 30, seed=0))
    assert not torch.equal(chosen, balanced_subset(labels, 30, seed=1))
    for size in (0, 86):
        with pytest.raises(ValueError, match=f"--train_size {size}: must be from 1 to 85"):
            balanced_subset(labels, size, seed=0)
    with pytest.raises(ValueError, match="--bank_size 86"):
        balanced_subset(labels, 86, seed=0, flag="--bank_size")


def test_a_part_of_the_data_keeps_images_labels_and_tests_together():
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(-1, 3, 2, 2)
    whole = Data(images, torch.arange(20) % 4, images[:3], torch.arange(3), list("abcd"), ["x"])
    part = whole.subset(8, seed=0)
    assert part.train_labels.bincount().tolist() == [2] * 4
    assert torch.equal(part.train_images[:, 0, 0, 0] % 4, part.train_labels)
    mask = whole.select(whole.train_labels == 1)
    assert mask.train_images[:, 0, 0, 0].tolist() == [1, 5, 9, 13, 17]
    for some in (part, mask, whole.to(torch.device("cpu"))):
        assert torch.equal(some.test_images, whole.test_images)
        assert torch.equal(some.test_labels, whole.test_labels)
        assert (some.classes, some.unreadable) == (list("abcd"), ["x"])
    assert whole.limit(20, seed=0) is whole
    assert torch.equal(whole.limit(8, seed=0).train_images, part.train_images)


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
    seen = []
    for batch in loader.epoch(4):
        assert batch.images.shape == (len(batch.labels), 2, 3, 32, 32)
        for crops, i in zip(batch.images, batch.labels.tolist(), strict=True):
            image = Image.open(jpegs[i]).convert("RGB")
            rng = np.random.default_rng([1, 4, i])  # of the sample: not of step, batch or worker
            boxes = crop_boxes(rng, 2, image.height, image.width, (0.3, 0.9))
            for crop, box in zip(crops, boxes.tolist(), strict=True):
                theirs = T.resized_crop(image, *box, [32, 32])
                assert torch.equal(crop, T.pil_to_tensor(theirs))
        seen += batch.labels.tolist()
    assert sorted(seen) == [0, 1, 2, 3, 4]
    (resumed,) = loader.epoch(4, start=2)
    assert resumed.step == 2
    assert torch.equal(resumed.images, batch.images)
    assert not torch.equal(next(iter(loader.epoch(5))).images, batch.images)


def test_files_under_the_test_transform_equal_torchvision(jpegs):
    files = ImageFiles(jpegs, 28, workers=1)  # resized to 32, so that margins are whole pixels
    images = torch.cat(list(files.split(2)))
    assert images.shape == files.shape == (5, 3, 28, 28)
    for path, ours in zip(jpegs, images, strict=True):
        image = Image.open(path).convert("RGB")
        theirs = T.center_crop(T.resize(image, [32]), [28])
        assert (ours.int() - T.pil_to_tensor(theirs).int()).abs().max() <= 1
    decoded = decode_files(jpegs, 28, shorter=resize_size("imagenet", 28))[0]
    assert torch.equal(decoded, images)


def test_a_part_of_files_is_chosen_as_of_a_tensor(jpegs):
    files = ImageFiles(jpegs, 28, workers=0)
    images = torch.cat(list(files.split(5)))
    mask = torch.tensor([True, False, False, True, False])
    for chosen in (torch.tensor([3, 1]), mask, slice(1, 4), slice(None, None, 2)):
        part = files[chosen]
        assert len(part) == len(images[chosen])
        assert torch.equal(torch.cat(list(part.split(2))), images[chosen])
    assert [len(chunk) for chunk in files.split(2)] == [2, 2, 1]
    assert files.to("cpu").paths == files.paths


def test_crops_go_into_views(jpegs):
    """From a file to its two views: decoded and cut once, then normalised; here without chance."""
    still = Augmentation((0.3, 0.9), jitter_p=0.0, gray_p=0.0, flip_p=0.0)
    views = make_views(2, still)
    (batch,) = Loader(ImageFiles(jpegs, 32, 0), 5, 1, torch.arange(5), views=views).epoch(0)
    found = views(batch)
    assert len(found) == 2
    for i, x in enumerate(found):
        theirs = T.normalize(batch.images[:, i].float() / 255, views.mean, views.std)
        torch.testing.assert_close(x, theirs)
    assert not torch.equal(*found)


def test_a_bad_file_in_a_run_is_named(jpegs, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(Path(jpegs[0]).read_bytes()[:-200])
    files = ImageFiles([*jpegs, str(bad)], 16, workers=1)
    with pytest.raises(UnreadableImageError, match=r"bad\.jpg: cannot be read .*--bad_images skip"):
        list(files.split(2))
    with pytest.raises(UnreadableImageError, match=r"bad\.jpg: cannot be read .*--bad_images skip"):
        list(Loader(files, 3, views=make_views()).epoch(0))


def test_what_is_skipped_is_known_before_the_first_epoch(jpegs, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    files = [jpegs[0], str(bad), jpegs[1]]
    assert filter_readable(files, 1, "error") == (files, {})  # looks at none of them
    good, reasons = filter_readable(files, 1, "skip")
    assert good == jpegs[:2]
    assert list(reasons) == [1]
    assert "bad.jpg: cannot be read" in reasons[1]
    with pytest.raises(ValueError, match=r"bad\.jpg"):  # none is left
        filter_readable([str(bad)], 1, "skip")


def test_workers_leave_signals_to_the_run(jpegs):
    """Ctrl-C and a scheduler's SIGTERM go to all of a run's processes; its step is still to end."""
    before = multiprocessing.active_children()
    loader = Loader(ImageFiles(20 * jpegs, 16, workers=2), 5, views=make_views())
    batches = loader.epoch(0)
    next(batches), next(batches)  # of one worker each: both are at work
    workers = [one for one in multiprocessing.active_children() if one not in before]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 18


def test_a_checksum_tells_images_apart_and_follows_files_that_move(jpegs, tmp_path):
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    assert images_checksum(images) == images_checksum(
        images.clone().contiguous(memory_format=torch.channels_last)
    )
    assert images_checksum(images) != images_checksum(images.flip(0))
    changed = images.clone()
    changed[1, 2, 1, 1] += 1
    assert images_checksum(images) != images_checksum(changed)
    files = ImageFiles(jpegs, 32)
    moved = [shutil.copy(path, tmp_path) for path in jpegs]
    assert images_checksum(ImageFiles(moved, 32)) == images_checksum(files)
    assert images_checksum(files[:4]) != images_checksum(files)
    assert images_checksum(files[torch.tensor([1, 0, 2, 3, 4])]) != images_checksum(files)


def test_a_batch_alone_is_one_process_s():
    images = torch.zeros(5, 3, 2, 2, dtype=torch.uint8)
    batch = Batch.alone(images, 3, 4)
    assert batch == Batch(3, 4, batch.images, None, 5, slice(0, 5))
    assert batch.images is images
