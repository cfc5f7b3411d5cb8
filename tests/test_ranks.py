"""Many processes, one run: the division of work, collectives, signals, and ranks that are lost."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading

import pandas
import pytest
import timm
import torch
import torch.distributed as dist

import linear
import main
from simsiam.data.datasets import load_dataset
from simsiam.data.loader import ImageFiles, Loader
from simsiam.data.textures import make_textures
from simsiam.runtime import distributed
from simsiam.training import checkpoint
from simsiam.training.collapse import Monitor
from simsiam.views.augment import Augmentation, Views
from tests import crash, ranks
from tests.helpers import ROOT, image_files, refused, texture_folder


def on_ranks(world_size, work, *args, code=0):
    """Run `work` on ranks that must all end with an exit code; return the outcome."""
    outcome = ranks.launch(world_size, work, *args)
    assert outcome.codes == [code] * world_size, outcome.output
    return outcome


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, as the ranks have, so that sums have the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Flags of a tiny run on 200 training images and 40 test images."""
    root = tmp_path_factory.mktemp("tiny")
    texture_folder(root)
    flags = f"--data_name folder --data_root {root} --recipe short --width 4 --feature_dim 16 "
    return [*flags.split(), "--batch_size", "32", "--no-pictures", "--epochs", "2"]


# ---- the work is divided ------------------------------------------------------------------------


def test_every_row_has_one_rank():
    for n in range(1, 40):
        for world_size in (1, 2, 3, 4, 7):
            slices = [distributed.slice_for_rank(n, i, world_size) for i in range(world_size)]
            parts = [range(n)[rows] for rows in slices]
            assert [row for part in parts for row in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("files", [False, True])
def test_views_and_order_do_not_depend_on_ranks_and_workers(tmp_path, monkeypatch, files):
    images, labels = make_textures(50, seed=1)
    if files:
        paths = sorted(map(str, image_files(tmp_path, 50).rglob("train/*/*.jpg")))
    rank = world_size = 0
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    epochs = []
    for world_size, workers in [(1, 0), (2, 1), (4, 0), (1, 2)]:
        of_ranks = []
        for rank in range(world_size):
            views = Views(24, (0.5,) * 3, (0.2,) * 3, Augmentation(blur_p=0.5), 2, seed=3)
            source = ImageFiles(paths, 24, workers) if files else images
            loader = Loader(source, 16, 3, labels, keep_last=True, views=views)
            steps = []
            for batch in loader.epoch(1, 1):
                rows = distributed.slice_for_rank(batch.size, rank, world_size)
                steps.append(torch.stack([x[: rows.stop - rows.start] for x in views(batch)]))
                assert len(batch.labels) == batch.size  # of the global batch
            of_ranks.append(steps)
        epochs.append([torch.cat(step, 1) for step in zip(*of_ranks, strict=True)])
    assert [step.shape[:2] for step in epochs[0]] == [(2, 16), (2, 16), (2, 2)]
    for other in epochs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(epochs[0], other, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_two_ranks_are_those_of_one_process(compiled):
    outcome = on_ranks(2, ranks.gradients, compiled)
    for alone, together in outcome.results:
        assert max(gradient.abs().max() for gradient in alone) > 0.01
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    (_, one), (_, other) = outcome.results
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert outcome.output.count("SyncBatchNorm") == 1  # rank 0's note


def test_ranks_have_the_same_network_and_probe():
    (one, probe), (other, other_probe) = on_ranks(2, ranks.epoch).results
    buffers = {name for name in one if "running" in name}  # on CPUs a rank's own
    for name in one.keys() - buffers:
        assert torch.equal(one[name], other[name])
    assert probe["weight"].abs().sum() > 0.1
    assert all(torch.equal(value, other_probe[name]) for name, value in probe.items())


def test_a_probe_on_ranks_is_that_of_one_process():
    alone = ranks.probe()
    for probe in on_ranks(2, ranks.probe_on_ranks).results:
        assert all(torch.equal(value, alone[name]) for name, value in probe.items())


def test_a_step_of_fine_tuning_on_ranks_is_that_of_one_process():
    """On three ranks, which have 3, 3 and 4 images."""
    for alone, together in on_ranks(3, ranks.finetuning).results:
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-7)


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
    """Before Python 3.12 a worker could inherit a lock that nobody releases."""
    content = bytes(300_000_000)
    thread = threading.Thread(target=hashlib.sha256, args=[content])  # works without the GIL
    thread.start()
    distributed.wait_before_fork()  # no rank: no wait
    assert thread.is_alive()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    distributed.wait_before_fork()
    assert not thread.is_alive()
    thread.join()


# ---- the commands, with image files -------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 128 training images and 61 test images."""
    return image_files(tmp_path_factory.mktemp("images"), 128)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """The output of two ranks that trained on `images`, and the folder of their run."""
    out = tmp_path_factory.mktemp("trained")
    flags = f"--ddp --data_name imagenet --data_root {images} --arch resnet8 --stem cifar "
    flags += "--image_size 32 --epochs 1 --loss asymmetric_2x "  # four views
    flags += f"--feature_dim 64 --batch_size 24 --bank_size 100 --num_workers 1 --out {out} "
    return on_ranks(2, ranks.run, "main", *flags.split(), "--name", "pre").output, out


@pytest.fixture(scope="module")
def fitted(trained):
    """The output of three ranks that fitted linear heads to it; and their flags."""
    flags = f"--model_path {trained[1]}/pre_model.pth --optimizer lars --batch_size 50 --epochs 2 "
    flags += f"--lr 0.1 1 --num_workers 1 --out {trained[1]} --name"
    work = (ranks.run, "linear", "--ddp", *flags.split(), "linear3")
    return on_ranks(3, *work).output, flags.split()


def test_measures_of_ranks_are_those_of_one_process(trained, images):
    output, out = trained
    assert "Warning" not in output
    assert output.count("epoch 1/1") == 1  # rank 0 speaks
    state = checkpoint.load(out / "pre_model.pth")
    last, encoder = state["history"][-1], state["encoder"]
    assert abs(last["std"] - 1) < 0.2
    assert -1 < last["train_loss"] < 0.5
    bank = load_dataset("imagenet", images, 32, 0).subset(100, 0)
    off = torch.autocast("cpu", enabled=False)
    views = Views(32, encoder["mean"], encoder["std"])
    measured = Monitor(checkpoint.network(state), views, bank, state["config"], off).measure()
    assert measured == pytest.approx({key: last[key] for key in measured}, rel=1e-6)
    assert measured["test_acc@1"] == last["test_acc@1"]


def test_a_linear_head_of_three_ranks_is_that_of_one_process_to_the_bit(trained, fitted):
    linear.main([*fitted[1], "linear1"])
    one, three = (torch.load(trained[1] / f"linear{i}_model.pth") for i in (1, 3))
    assert all(torch.equal(value, one["model"][key]) for key, value in three["model"].items())
    for row, same in zip(three["history"], one["history"], strict=True):
        assert row | {"seconds": 0} == same | {"seconds": 0}


def test_three_ranks_evaluate_like_one_process(trained, fitted, capsys):
    flags = f"--model_path {trained[1]}/linear3_model.pth --evaluate_only --out {trained[1]}"
    output = on_ranks(3, ranks.run, "linear", "--ddp", *flags.split()).output
    capsys.readouterr()
    linear.main(flags.split())
    alone = capsys.readouterr().out
    assert output.count(alone) == 1
    assert sum(int(n) for n in re.findall(r"% of (\d+)$", alone, re.M)) == 61
    results = pandas.read_csv(trained[1] / "results.csv").set_index("run")
    assert f"top-1 {results['top1']['linear3']:.2f} %" in alone


def test_two_ranks_fine_tune(trained):
    flags = f"--ddp --model_path {trained[1]}/pre_model.pth --finetune --batch_size 24 --epochs 2 "
    flags += f"--mixup 0.2 --num_workers 1 --out {trained[1]} --name tuned"
    output = on_ranks(2, ranks.run, "linear", *flags.split()).output
    assert output.count("Fine-tuned: top-1") == 1
    assert "Fine-tuned" in set(pandas.read_csv(trained[1] / "results.csv")["protocol"])
    assert not list(trained[1].glob(".*"))


# ---- collectives --------------------------------------------------------------------------------


def test_rank_0_goes_first_and_its_error_is_raised_on_all(tmp_path):
    outcome = on_ranks(3, ranks.rank0_first, tmp_path)
    assert outcome.results == [("written by rank 0", "rank 0 failed")] * 3


# ---- ranks that are lost ------------------------------------------------------------------------


def test_a_killed_rank_costs_no_bit(tiny, tmp_path):
    """Rank 1 is killed in the third step of the second epoch; torchrun starts all ranks again.

    On three ranks: a sum over two does not depend on the order in which DDP packs gradients. Ranks
    agree a step later, so that there is a checkpoint every second step.
    """
    flags = [*tiny, "--batch_size", "48", "--out", str(tmp_path), "--checkpoint_minutes", "0"]
    on_ranks(3, ranks.run, "main", "--ddp", *flags, "--name", "whole")
    torchrun = "torch.distributed.run --standalone --nproc_per_node 3 --max_restarts 3"
    killed = ["-m", "tests.ranks", "1", "7", str(int(signal.SIGKILL)), "--ddp", *flags]
    ended = subprocess.run(
        [sys.executable, "-m", *torchrun.split(), *killed, "--name", "killed"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=2 * ranks.HANG,
    )
    assert ended.returncode == 0, ended.stdout
    assert "(restart 1)" in ended.stdout
    assert "epoch 1 of 2 and step 2 of 4" in ended.stdout
    assert "[rank" not in ended.stdout  # no traceback of the other ranks
    assert crash.differences(tmp_path / "whole", tmp_path / "killed") == []
    # The accuracies of the same untrained weights are those of one process.
    main.main([*flags, "--name", "alone", "--epochs", "1"])
    rows = [torch.load(tmp_path / f"{name}_model.pth")["history"][0] for name in ("whole", "alone")]
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)
    assert len({(row["test_acc@1"], row["test_acc@5"], row["raw_acc@1"]) for row in rows}) == 1


@pytest.mark.parametrize(("step", "last"), [(3, 4), (6, 6)])
def test_a_signal_to_one_rank_ends_all_after_the_same_step(tiny, tmp_path, capsys, step, last):
    """One step later, but in the same step if it is the epoch's last. One process resumes."""
    flags = [*tiny, "--out", str(tmp_path), "--name", "a"]
    work = (ranks.signal_at, 1, step, signal.SIGTERM, "--ddp", *flags)
    output = on_ranks(2, *work, code=128 + signal.SIGTERM).output
    assert output.count("--resume") == 1  # how to go on
    state = checkpoint.load(tmp_path / "a_model.pth")
    assert (state["epoch"], state["step"]) == (0, last)
    if step == 3:
        main.main([*flags, "--resume"])
        assert "'ranks': 2" in capsys.readouterr().out  # of the checkpoint
        assert checkpoint.load(tmp_path / "a_model.pth")["epoch"] == 2


def test_an_error_on_one_rank_ends_all_with_its_traceback(tiny, tmp_path):
    output = on_ranks(2, ranks.fail_at, 1, 3, "--ddp", *tiny, "--out", tmp_path, code=1).output
    assert output.count("Traceback") == 1
    assert "ZeroDivisionError" in output
    assert "rank 0: another rank is gone" in output


# ---- bad input ----------------------------------------------------------------------------------


def test_ddp_and_torchrun_need_each_other(tmp_path, capsys, monkeypatch):
    flags = ["--data_name", "textures", "--out", tmp_path]
    for command in (main, linear):
        line = refused(capsys, command, *(flags if command is main else ()), "--ddp")
        assert "torchrun --standalone" in line
    two = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in two.items():
        monkeypatch.setenv(name, value)
    assert "--ddp" in refused(capsys, main, *flags)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "--overwrite" in refused(capsys, main, *flags, "--ddp", "--overwrite")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        main.main([*map(str, flags), "--epochs", "none"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""  # rank 0 says it


def test_a_batch_that_cannot_be_divided_is_refused(tiny, tmp_path):
    flags = ("--ddp", *tiny, "--out", tmp_path / "none")
    (line,) = on_ranks(3, ranks.run, "main", *flags, code=2).output.splitlines()
    assert "--batch_size 32" in line
    assert "world size (3)" in line
    assert not (tmp_path / "none").exists()
