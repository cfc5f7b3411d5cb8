"""Many processes, one run: what ranks share, what they agree on, what one of them lost costs."""

import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import timm
import torch
import torch.distributed as dist
import webdataset
from PIL import Image

import linear
import main
from simsiam.data.datasets import load_dataset
from simsiam.data.loader import ImageFiles, Loader
from simsiam.data.textures import TEXTURE_CLASSES, make_textures
from simsiam.runtime import distributed
from simsiam.training import checkpoint
from simsiam.training.collapse import Monitor
from simsiam.views.augment import Augmentation, Views
from tests import crash
from tests import ranks as ranks_of_tests
from tests.helpers import ROOT, refused


def said(*command):
    """What a command says that ends well; with one thread, as torchrun has it."""
    ended = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def on_ranks(*command, codes="0 0"):
    """What the ranks of tests/ranks.py say, up to their exit codes."""
    out = said("tests.ranks", *command)
    found = re.findall(r"^exit codes (.*)$", out, re.M)
    assert found == codes.split(", "), out
    return out


def image_files(root, number=240, side=64):
    """JPEG files of textures in an ImageFolder: mixed sizes, some gray, CMYK, with damaged EXIF."""
    rng = np.random.default_rng(0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03junk"
    for split, many, seed in (("train", number, 1), ("val", 61, 2)):
        for i, (image, label) in enumerate(zip(*make_textures(many, seed), strict=True)):
            file = io.BytesIO()
            image = Image.fromarray(image.permute(1, 2, 0).numpy())
            image = image.resize(tuple(rng.integers(side, 2 * side, 2).tolist()))
            image = image.convert({3: "L", 5: "CMYK"}.get(i % 10, "RGB"))
            image.save(file, "jpeg")
            content = file.getvalue()
            if i % 10 == 7:
                content = content[:2] + b"\xff\xe1" + struct_size(exif) + exif + content[2:]
            path = Path(root, split, TEXTURE_CLASSES[label], f"{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def struct_size(segment):
    return (len(segment) + 2).to_bytes(2, "big")


def shard_files(folder, root, each=30):
    """The same images in tar files."""
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
def tiny(tmp_path_factory):
    """Flags of a tiny run, of 200 training images and 40 test images."""
    root = tmp_path_factory.mktemp("tiny")
    crash.make_folder(root)
    flags = f"--data_name folder --data_root {root} --recipe short --width 4 --feature_dim 16 "
    return [*flags.split(), "--batch_size", "32", "--no-pictures"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the commands of `done` write, each into a folder of its own."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def done(tiny, place):
    """What ranks say in all commands, by name: one process, which imports once."""
    folder = f"--data_name folder --data_root {image_files(place / 'images')} --recipe short "
    folder += "--image_size 64 --width 4 --feature_dim 16 --batch_size 64 --epochs 1 --no-pictures"
    run = " ".join(("--ddp", *tiny, "--epochs", "2", "--out"))
    image_files(place / "fewer", 128)
    train, fit, judge, tune = from_end_to_end(place)
    killed, compiled = " ".join(to_be_killed(tiny, place)), f"{COMPILED} --out {place}/compiled"
    term = f"{int(signal.SIGTERM)} {run} {place}/signal --name"
    goes_on = f"{run} {place}/signal --resume {place}/signal/a_model.pth"
    commands = {
        "gradients": ("2 gradients", "0 0"),
        "tuned": ("3 tuned", "0 0 0"),
        "probes": ("2 probes", "0 0"),
        "agree": ("3 agree", "0 0 0"),
        "first": (f"3 first {place}", "0 0 0"),
        "sent": (f"2 sent --ddp {folder} --out {place}/sent", "0 0"),
        "refused 32": (f"3 main {run} {place}/none --batch_size 32", "2 2 2"),
        "refused 3": (f"3 main {run} {place}/none --batch_size 3", "2 2 2"),
        "fail": (f"2 fail 1 3 {run} {place}/fail", "1 1"),
        "train": (f"2 main --ddp {train} --name pre", "0 0"),
        "fit 2": (f"2 linear --ddp {fit}2", "0 0"),
        "fit 3": (f"3 linear --ddp {fit}3", "0 0 0"),
        "judge": (f"3 linear --ddp {judge}", "0 0 0"),
        "tune": (f"2 linear --ddp {tune}", "0 0"),
        "whole": (f"3 main --ddp {killed} --name whole", "0 0 0"),
        "signal": (f"2 signal 1 3 {term} a", "143 143"),
        "go on": (f"4 main {goes_on} --name b", "0 0 0 0"),
        "last": (f"2 signal 1 6 {term} last", "143 143"),
        "eager": (f"2 main {compiled} --name eager", "0 0"),
        "compiled": (f"2 main {compiled} --name compiled --compile", "0 0"),
    }
    command = " then ".join(line for line, _ in commands.values())
    out = on_ranks(command, codes=", ".join(codes for _, codes in commands.values()))
    assert not (place / "none").exists()
    return dict(zip(commands, re.split(r"^exit codes .*\n", out, flags=re.M), strict=False))


# ---- the work is shared -------------------------------------------------------------------------


def test_every_row_has_one_rank():
    for number in range(1, 40):
        for count in (1, 2, 3, 4, 7):
            parts = [
                range(number)[distributed.slice_for_rank(number, i, count)] for i in range(count)
            ]
            assert [row for part in parts for row in part] == list(range(number))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("looks", [1, 2])
@pytest.mark.parametrize("files", [False, True])
def test_views_and_order_do_not_depend_on_ranks_and_workers(tmp_path, monkeypatch, files, looks):
    images, labels = make_textures(50, seed=1)
    found = []
    if files:
        paths = sorted(map(str, image_files(tmp_path, 50).rglob("train/*/*.jpg")))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for count, workers in [(1, 0), (2, 1), (4, 0), (1, 2)]:
        steps = []
        for rank in range(count):
            monkeypatch.setattr(dist, "get_rank", lambda: rank)  # noqa: B023
            monkeypatch.setattr(dist, "get_world_size", lambda: count)  # noqa: B023
            blurred = Augmentation(blur_p=0.5)
            views = Views(24, (0.5,) * 3, (0.2,) * 3, blurred, looks, seed=3)
            source = ImageFiles(paths, 24, workers) if files else images
            loader = Loader(source, 16, 3, labels, keep_last=True, views=views)
            parts = []
            for batch in loader.epoch(1, 1):
                mine = len(range(batch.size)[distributed.slice_for_rank(batch.size, rank, count)])
                parts.append([x[:mine] for x in views(batch)])
                assert len(parts[-1]) == looks
                assert len(batch.labels) == batch.size  # labels come whole
            steps.append(parts)
        assert [len(parts) for parts in steps] == [3] * count  # of 16, 16 and 2, after the first
        found.append([torch.cat(look) for step in zip(*steps) for look in zip(*step)])  # noqa: B905
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
    assert [len(x) for x in found[0]] == [16] * looks + [16] * looks + [2] * looks


def test_gradients_of_two_ranks_are_one_process_s(done):
    out = done["gradients"]
    largest, difference, steps, equal = re.search(
        r"largest (\S+) difference (\S+) after (\d+) steps (\w+)", out
    ).groups()
    assert float(largest) > 0.01
    assert 0 < float(difference) < 1e-6  # 0 would be: of the same sums
    assert (steps, equal) == ("20", "True")
    assert out.count("BN's statistics are of each rank's part") == 1


def test_a_step_of_fine_tuning_is_one_process_s(done):
    """On three ranks, which have 3, 3 and 4 images."""
    assert sorted(done["tuned"].splitlines()) == [f"rank {i}: True" for i in range(3)]


def test_a_probe_is_one_process_s_on_every_rank_and_costs_the_encoder_no_bit(done):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    args = main.make_flags().read(ranks_of_tests.FLAGS)[0]
    head = ranks_of_tests.head_of(lambda probe, x, y: probe.learn(x, y, 0.0), args)
    torch.set_num_threads(threads)
    for rank in range(2):
        assert f"rank {rank}: equal True head {head}\n" in done["probes"], done["probes"]


def from_end_to_end(place):
    """Flags: to train on image files, to fit a head (its name ends there), to judge, to tune."""
    out = place / "whole"
    train = f"--data_name imagenet --data_root {place}/fewer --arch resnet8 --stem cifar "
    train += "--image_size 32 --epochs 1 --loss asymmetric_2x "  # four views
    train += f"--feature_dim 64 --batch_size 24 --bank_size 100 --num_workers 1 --out {out}"
    fit = f"--model_path {out}/pre_model.pth --optimizer lars --batch_size 50 --epochs 2 "
    fit += f"--lr 0.1 1 --num_workers 1 --out {out} --name linear"
    judge = f"--model_path {out}/linear2_model.pth --evaluate_only --out {out}"
    tune = f"--model_path {out}/pre_model.pth --finetune --batch_size 24 --epochs 2 "
    tune += f"--mixup 0.2 --num_workers 1 --out {out} --name tuned"
    return train, fit, judge, tune


def test_imagenet_from_end_to_end_by_any_number_of_ranks(done, place, capsys):
    """Accuracies, here of 61 test images, are those of one process; the linear head to the bit."""
    _, fit, judge, _ = from_end_to_end(place)
    out = "".join(done[name] for name in ("train", "fit 2", "fit 3", "judge", "tune"))
    root, place = place / "fewer", place / "whole"
    assert "ranks: 2, 12 images each a step; whatever their number, lr is 0.05 x 24 / 256" in out
    assert out.count("Fine-tuned: top-1") == 1
    assert "Warning" not in out
    assert out.count("epoch 1/1") == 1  # one rank speaks
    state = torch.load(place / "pre_model.pth")
    last = state["history"][-1]
    assert abs(last["std"] - 1) < 0.2
    assert -1 < last["train_loss"] < 0.5
    args, net, encoder = (
        SimpleNamespace(**state["args"]),
        checkpoint.network(state),
        state["encoder"],
    )
    images = load_dataset("imagenet", root, 32, 0).subset(100, 0)
    views = Views(32, encoder["mean"], encoder["std"])
    off = torch.autocast("cpu", enabled=False)
    again = Monitor(net, views, images, args, 0.05, off).measure()
    assert again == pytest.approx({key: last[key] for key in again}, rel=1e-6)
    assert again["test_acc@1"] == last["test_acc@1"]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    linear.main(f"{fit}1".split())
    torch.set_num_threads(threads)
    one, *others = (torch.load(place / f"linear{count}_model.pth") for count in (1, 2, 3))
    for other in others:
        assert all(torch.equal(value, one["model"][key]) for key, value in other["model"].items())
        for row, same in zip(other["history"], one["history"], strict=True):
            assert row | {"seconds": 0} == same | {"seconds": 0}
    results = pandas.read_csv(place / "results.csv").set_index("run")
    assert set(results["protocol"]) == {"KNN, bank of 100", "Linear", "Fine-tuned"}
    capsys.readouterr()
    linear.main(judge.split())
    alone = capsys.readouterr().out
    assert f"top-1 {results['top1']['linear2']:.2f} %" in alone
    assert sum(int(n) for n in re.findall(r"% of (\d+)$", alone, re.M)) == 61
    assert out.count(alone) == 1  # of the three ranks
    assert not list(place.glob(".*"))


def test_sync_batchnorm_keeps_the_activation_within_timm_s_bn(monkeypatch):
    """timm's BatchNormAct2d is a BN and a ReLU in one layer."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    net = timm.create_model("mobilenetv3_small_050")
    x, names = torch.randn(2, 3, 32, 32), list(net.state_dict())
    expected = net.eval()(x)
    distributed.sync_batchnorm(net)  # on the CPU: nothing
    assert not any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in net.modules())
    weights = net.state_dict()
    distributed.sync_batchnorm(net.to("meta"))
    assert any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in net.modules())
    assert list(net.state_dict()) == names
    net.load_state_dict(weights, assign=True)
    assert torch.equal(net(x), expected)


def test_a_rank_forks_when_its_other_threads_sleep(monkeypatch):
    """Else, until Python 3.11, a worker may be born with a lock that nobody opens again."""
    content = bytes(300_000_000)
    thread = threading.Thread(target=hashlib.sha256, args=[content])  # works without the GIL
    thread.start()
    distributed.wait_before_fork()  # no rank: no wait
    assert thread.is_alive()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    distributed.wait_before_fork()
    assert not thread.is_alive()
    thread.join()


# ---- what ranks tell one another ----------------------------------------------------------------


def test_ranks_agree_a_step_later(done):
    expected = [
        [0, 0],  # nothing was said before
        [7, 12],  # what the third rank said in the call before: 7, and 10 + its number
        [0, 0],  # and then nobody said anything
        [5, 0],  # what the second says in this call, which waits
        [0, 0],  # that was all
        [0, 0],
        [4, 3],  # the second in this call, which waits, and the third in the one before
        [0, 0],
        [0, 0],  # what the first said before this was forgotten
        [0, 0],
    ]
    for rank in range(3):
        assert f"rank {rank}: {expected}\n" in done["agree"], done["agree"]


def test_without_ranks_an_agreement_is_one_s_own_and_new():
    agree = distributed.AsyncMax()
    assert [agree(7, True), agree(0, 0), agree(3, 0, wait=True)] == [[7, 1], [0, 0], [3, 0]]


def test_the_first_rank_goes_first(done):
    """It makes a file that the others read; an error of its own is everyone's."""
    for rank in range(3):
        assert f"rank {rank}: a file of the first's\n" in done["first"], done["first"]
        assert f"rank {rank}: no room on rank 0\n" in done["first"], done["first"]


def test_images_are_not_sent_between_ranks(done):
    """2.9 MB of training images, which each rank decodes for itself."""
    out = done["sent"]
    assert "folder: 240 training images, 61 test images, 10 classes, 64 pixels" in out
    times, most = map(int, re.search(r"(\d+) times, (\d+) bytes at most", out).groups())
    assert times > 10
    assert 100 < most < 100_000


# ---- ranks that are lost ------------------------------------------------------------------------


def to_be_killed(tiny, place):
    """Flags of the run whose rank is killed, and of the one that is left alone."""
    flags = [*tiny, "--batch_size", 48, "--epochs", 2, "--out", place / "killed"]
    flags += ["--checkpoint_minutes", 0]
    return list(map(str, flags))


def test_a_killed_rank_costs_no_bit(tiny, done, place):
    """The second is killed in the second epoch's third step; torchrun starts them again.

    Three: the sums of two ranks would not depend on the order in which DDP packs gradients. They
    agree a step later, so that there is a checkpoint every second step.
    """
    flags, place = to_be_killed(tiny, place), place / "killed"
    out = said(
        *("torch.distributed.run", "--standalone", "--nproc_per_node", 3, "--max_restarts", 3),
        *("-m", "tests.ranks", 3, "signal", 1, 7, int(signal.SIGKILL)),
        *("--ddp", *flags, "--name", "cut"),
    )
    assert "started again by torchrun (restart 1)" in out
    assert "resumed after epoch 1 of 2 and step 2 of 4" in out
    assert "[rank" not in out  # no traceback of those that lost it
    assert crash.differences(place / "whole", place / "cut") == []
    # And the accuracies of the same, untrained weights are those of one process.
    main.main([*flags, "--name", "alone", "--epochs", "1"])
    rows = [torch.load(place / f"{name}_model.pth")["history"][0] for name in ("whole", "alone")]
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)
    assert len({(row["test_acc@1"], row["test_acc@5"], row["raw_acc@1"]) for row in rows}) == 1


def test_a_signal_to_one_rank_ends_all_and_others_go_on(tiny, done, place, capsys):
    """All act on it a step later, or in the same step where that is the epoch's last."""
    out, place = "".join(done[name] for name in ("signal", "go on", "last")), place / "signal"
    assert out.count("--resume go on after this step") == 2
    for name, step in (("a", 4), ("last", 6)):
        state = checkpoint.load(place / f"{name}_model.pth")
        assert (state["epoch"], state["step"]) == (0, step)
    assert "ranks: 4, 8 images each a step" in out
    assert "resumed after epoch 0 of 2 and step 4 of 6" in out
    assert "epoch 2/2" in out
    flags = [*tiny, "--epochs", "2", "--out", str(place), "--name", "a"]
    main.main([*flags, "--resume"])
    out = capsys.readouterr().out
    assert "resumed after epoch 0 of 2 and step 4 of 6" in out
    assert "'ranks': 2" in out  # where the checkpoint was made


def test_an_error_on_one_rank_ends_all_with_its_message(done):
    assert "ZeroDivisionError: a mistake of ours" in done["fail"]
    assert "rank 0: another rank is gone" in done["fail"]


# ---- what cannot be -----------------------------------------------------------------------------


def test_ddp_and_torchrun_need_each_other(tmp_path, capsys, monkeypatch):
    flags = ["--data_name", "textures", "--out", tmp_path]
    for command in (main, linear):
        line = refused(capsys, command, *(flags if command is main else ()), "--ddp")
        assert "torchrun --standalone --nproc_per_node 2" in line
    two = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in two.items():
        monkeypatch.setenv(name, value)
    assert "torchrun started 2 of it: add --ddp" in refused(capsys, main, *flags)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "--overwrite" in refused(capsys, main, *flags, "--ddp", "--overwrite")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        main.main([*map(str, flags), "--epochs", "none"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""  # the first rank says it


@pytest.mark.parametrize("size", [32, 3])
def test_a_batch_that_the_ranks_cannot_share_is_refused(done, size):
    (line,) = done[f"refused {size}"].splitlines()  # all meet it, the first says it
    assert line.startswith(f"main.py: rank 0: --batch_size {size}: is cut among 3 ranks: give a")


COMPILED = "--ddp --device cpu --data_name textures --train_size 128 --batch_size 32 --width 4 "
COMPILED += "--feature_dim 16 --k 5 --epochs 1 --no-pictures --amp off"


def test_ranks_train_compiled(done, place):
    """DDP is compiled with the network, so that gradients are sent while others are computed."""
    place = place / "compiled"
    a, b = (torch.load(place / f"{name}_model.pth")["model"] for name in ("eager", "compiled"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-2, rtol=1e-2)


def test_too_little_shared_memory_is_said_before_the_run(tmp_path, capsys, monkeypatch):
    root = image_files(tmp_path / "images", 64)
    there = SimpleNamespace(f_bavail=64, f_frsize=2**20)  # what docker gives
    monkeypatch.setattr(os, "statvfs", lambda path: there)
    flags = ["--data_name", "imagenet", "--data_root", root, "--out", tmp_path, "--batch_size", 64]
    line = refused(capsys, main, *flags, "--num_workers", 2, "--arch", "resnet18")
    assert "--num_workers 2" in line
    assert "77 MB in /dev/shm" in line  # 2 workers x 2 batches x 64 x 2 crops x 3 x 224 x 224
    assert "has 67" in line
    # Of a batch of 2 the crops would fit, but not the 64 images at a time that the kNN looks at.
    there.f_bavail = 18
    flags[-1] = 2
    line = refused(capsys, main, *flags, "--num_workers", 1, "--arch", "resnet18")
    assert "19 MB in /dev/shm" in line  # 1 worker x 2 batches x 64 x 3 x 224 x 224


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


def test_workers_do_not_outlive_an_error(tmp_path):
    """They heed no SIGTERM, by which multiprocessing would end them."""
    root = image_files(tmp_path, 40)
    script = f"""
from simsiam.data.datasets import load
from simsiam.data.loader import Loader
from simsiam.views.augment import Views
files = load("imagenet", {str(root)!r}, 32).train_images
loader = Loader(files, 8, views=Views(32, (0,) * 3, (1,) * 3))
batches = loader.epoch(0)
next(batches)
raise SystemExit(3)
"""
    begun = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60)
    assert ended.returncode == 3
    assert time.perf_counter() - begun < 20


# ---- shards -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    return shard_files(root / "tars", image_files(root / "images"))


def streams(shards, count, workers, epoch, start=0, whole=False, size=None):
    """Each rank's batches of an epoch, as bytes of the single images."""
    images = load_dataset("webdataset", shards, 32, workers)
    images = images.subset(size, 0) if size else images
    augmentation = Augmentation(crop_scale=(1.0, 1.0) if whole else (0.2, 1.0))
    found = []
    for rank in range(count):
        share = partial(distributed.slice_for_rank, rank=rank, world_size=count)
        views = Views(32, (0,) * 3, (1,) * 3, augmentation)
        loader = Loader(images.train_images, 24, views=views, local_slice=share)
        steps = [batch.images for batch in loader.epoch(epoch, start)]
        assert len(steps) == len(loader) - start
        found.append([[image.numpy().tobytes() for image in batch] for batch in steps])
    return found


def test_an_epoch_of_shards_has_each_image_once(shards, monkeypatch):
    for count, workers in [(1, 0), (2, 2)]:
        found = streams(shards, count, workers, 0, whole=True)
        images = [image for steps in found for batch in steps for image in batch]
        assert len(images) == len(set(images)) == 240
    one, other = (streams(shards, 1, 0, epoch, whole=True)[0] for epoch in (0, 1))
    assert one != other


def test_which_images_of_shards_an_epoch_has(shards, monkeypatch):
    """Those of a subset alone; and neighbours in time are not neighbours in a shard."""
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


def test_shards_go_on_after_any_step(shards):
    for workers, start in [(0, 4), (2, 3), (3, 5)]:
        whole = streams(shards, 2, workers, 3)
        assert [steps[start:] for steps in whole] == streams(shards, 2, workers, 3, start)


def test_shards_are_judged_like_files(shards):
    """Their labels and pixels, each by its own name, are those of the files in them."""
    found = load_dataset("webdataset", shards, 32, 0)
    files = load_dataset("imagenet", shards.parent / "images", 32, 0)
    assert len(found.train_images) == 240
    names = [member.key.split("/")[-1] for member in found.train_images.paths]
    order = {Path(path).stem: i for i, path in enumerate(files.train_images.paths)}
    where = torch.tensor([order[name] for name in names])
    assert [int(found.classes[i]) for i in found.train_labels] == [
        TEXTURE_CLASSES.index(files.classes[i]) for i in files.train_labels[where]
    ]
    for part in (slice(0, 3), slice(100, 103)):
        mine, theirs = (
            next(images.split(3))
            for images in (found.train_images[part], files.train_images[where][part])
        )
        assert torch.equal(mine, theirs)
    assert len(found.test_images) == 61


def test_a_run_on_shards(shards, tmp_path, capsys):
    flags = (
        f"--data_name webdataset --data_root {shards} --image_size 32 --arch resnet8 --stem cifar"
    )
    flags += f" --width 4 --feature_dim 16 --batch_size 48 --epochs 2 --out {tmp_path} "
    flags += "--no-pictures --name"
    main.main([*flags.split(), "whole"])
    state = checkpoint.load(tmp_path / "whole_model.pth")
    assert state["args"]["recipe"] == "imagenet"
    assert (state["args"]["probe"], state["probe"]) == (False, {})  # a stream has no labels
    line = refused(capsys, main, *flags.split(), "none", "--probe")
    assert "--probe: shards" in line
    row = pandas.read_csv(tmp_path / "results.csv").iloc[0]
    assert (row["data"], row["protocol"]) == ("webdataset:tars", "KNN")
    linear.main(f"--model_path {tmp_path}/whole_model.pth --epochs 1 --out {tmp_path}".split())
    pattern = f"{shards}/train-{{000000..%06d}}.tar"
    main.main([*flags.split(), "some", "--data_root", pattern % 3])
    assert "120 training images, 0 test images" in capsys.readouterr().out
    line = refused(capsys, main, *flags.split(), "none", "--data_root", pattern % 9)
    assert "train-000008.tar: no such file" in line
    line = refused(capsys, main, *flags.split(), "none", "--num_workers", 9)
    assert "--num_workers 9" in line
    assert "8 shards" in line
    junk = tmp_path / "junk.tar"
    junk.write_bytes(b"junk" * 1000)
    line = refused(capsys, main, *flags.split(), "none", "--data_root", junk)
    assert "junk.tar: not a tar file" in line
