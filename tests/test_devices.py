"""Without a GPU: training on a pretend cuda:0 mixes no devices, and the host never waits for it.

Tensors are torch's fakes (shape, type and device, no numbers). They raise where devices meet, and
where a number is asked for: .item(), .tolist(), bool(), a mask as an index. `Watch` adds copies.
"""

import argparse
import itertools
import os
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import linear
import main
import utils
from simsiam.data.loader import Loader
from simsiam.data.textures import make_textures
from simsiam.evaluation import metrics
from simsiam.models import backbones
from simsiam.models.classifier import Classifier
from simsiam.models.methods import build_model
from simsiam.runtime import devices, distributed
from simsiam.training import checkpoint
from simsiam.training.meters import Meters, TrainMeters
from simsiam.training.probe import Probe
from simsiam.training.recipes import VIEWS
from simsiam.views.augment import Batch, Views
from tests.helpers import refused

STATS = ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
CUDA, BYTES = torch.device("cuda", 0), {"dtype": torch.uint8, "device": "cuda:0"}


class Watch(TorchDispatchMode):
    """Notes the copies between devices that the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, aten = func(*args, **(kwargs or {})), torch.ops.aten
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[func is aten.copy_.default]
            waits = not (kwargs or {}).get("non_blocking", args[2:] == (True,))
            if waits and source.device != result.device:
                self.waits.append(f"{source.device} to {result.device}")
        return result


def move(net):
    """Give the network fakes on cuda:0 in the place of its tensors."""
    for name, x in [*net.named_parameters(), *net.named_buffers()]:
        place, _, end = name.rpartition(".")
        fake = torch.empty_like(x, device=CUDA)
        fake = torch.nn.Parameter(fake) if isinstance(x, torch.nn.Parameter) else fake
        setattr(net.get_submodule(place), end, fake)


@pytest.fixture
def on_fakes(monkeypatch):
    """Torch's own, that want a real device: here nothing is differentiated, pinned or updated."""
    updated = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    zeros = lambda loss, inputs: [torch.zeros_like(one) for one in inputs]  # noqa: E731
    monkeypatch.setattr(torch.autograd, "grad", zeros)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: updated.append(self))
    with mock.patch.multiple("torch.cuda", is_available=mock.Mock(), is_bf16_supported=mock.Mock()):
        amp = devices.autocast(CUDA, "bf16")
    return amp, updated


def steps_on_fakes(flags, amp, fault=lambda x: None):
    """Three steps of main.py's loop, and the features of its images: the copies waited for."""
    args = main.make_flags().read(f"--arch resnet18 --batch_size 4 {flags}".split())[0]
    augmentation, mean, std = VIEWS[args.recipe]
    net = build_model(vars(args)).to(memory_format=torch.channels_last)
    augment = Views(32, mean, std, augmentation, net.num_views)

    def views(batch):
        x = augment(batch)
        fault(x[0])
        return x

    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        watch.waits = []
        move(net)
        images = torch.empty(12, 3, 32, 32, **BYTES)
        labels = torch.empty(12, **BYTES).long()
        loader = Loader(images, 4, 0, labels)
        if args.recipe == "imagenet":  # crops, as workers cut them
            crops = torch.empty(4, net.num_views, 3, 32, 32, **BYTES)
            batches = [Batch(0, step, crops, labels[:4], 4, slice(0, 4)) for step in range(3)]
            loader.epoch = lambda *when: iter(batches)
        tally, optimizer = TrainMeters(CUDA), main.make_optimizer(net, args)
        rest = (views, tally, 0, 0, args, amp, main.UNSCALED, Probe(512, 10, args, CUDA))
        watch.waits = []
        assert list(main.train(net, optimizer, loader, *rest)) == [0, 1, 2]
        metrics.extract_features(net.backbone, augment.eval_transform, images, amp)
    return watch.waits


@pytest.mark.parametrize("flags", ["", "--recipe imagenet", "--loss asymmetric_2x --bn all"])
def test_training_on_cuda_mixes_no_devices_and_never_waits(flags, on_fakes):
    amp, updated = on_fakes
    waits = steps_on_fakes(flags, amp)
    assert [optimizer.found_inf.device for optimizer in updated] == [CUDA] * 3
    assert waits == ["cpu to cuda:0"] * ("imagenet" not in flags)  # the epoch's order


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x + torch.ones(32),
        lambda x: x.mean().item(),
        lambda x: x[x > 0],
        lambda x: bool(x.mean() > 0),
        lambda x: x.mean().tolist(),
    ],
)
def test_the_fakes_see_a_fault_in_a_step(fault, on_fakes):
    with pytest.raises(RuntimeError, match="two devices|_local_scalar|nonzero"):
        steps_on_fakes("", on_fakes[0], fault)


def test_the_fakes_see_a_blocking_copy(on_fakes):
    waits = steps_on_fakes("", on_fakes[0], lambda x: torch.ones(3).to(CUDA))
    assert waits == ["cpu to cuda:0"] * (1 + 3)


@pytest.mark.parametrize("kind", ["augmented", "cached"])
def test_linear_evaluation_on_cuda_mixes_no_devices_and_never_waits(kind, on_fakes):
    amp, updated = on_fakes
    args = linear.make_flags().read(["--batch_size", "4", "--lr", "1"])[0]
    net = Classifier(*backbones.build_backbone("resnet8", "cifar", None), 10)
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        watch.waits = []
        move(net)
        views = Views(32, *STATS, linear.AUGMENTATION, 1)
        encoder = linear.Encoder(net.backbone, views, amp, False)
        inputs, labels = torch.empty(12, 3, 32, 32, **BYTES), torch.empty(12, **BYTES).long()
        task = linear.Task(inputs, labels, encoder.augmented, views)
        if kind == "cached":
            task = linear.Task(encoder.plain(inputs), labels, linear.at_hand)
        heads = torch.nn.ModuleList([net.fc])
        rest = (task.loader(args), task.embed, Meters(CUDA, "top1", "top5"), 0, 0, 1)
        optimizer = linear.make_optimizer(args, heads, [1.0])
        watch.waits = []
        assert list(linear.train(heads, optimizer, *rest)) == [0, 1, 2]
    assert updated == [optimizer] * 3
    assert watch.waits == ["cpu to cuda:0"]  # the epoch's order


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_that_is_not_finite_moves_no_weight(fused):
    """Neither in PyTorch's fused step nor in the plain one, which other devices than cuda take."""
    line = "--data_name textures --width 4 --feature_dim 16 --batch_size 4 --lr 0.01"
    args = main.make_flags().read(line.split())[0]
    net, off = build_model(vars(args)), torch.autocast("cpu", enabled=False)
    optimizer = main.make_optimizer(net, args)
    assert optimizer.defaults["fused"]
    assert not main.make_optimizer(build_model(vars(args)).to("meta"), args).defaults["fused"]
    if not fused:
        optimizer = torch.optim.SGD(optimizer.param_groups, fused=False)
        for group in optimizer.param_groups:
            group["fused"] = False
    images, views = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8), Views(32, *STATS)
    weight, tally, seen = net.backbone.conv1.weight, TrainMeters(torch.device("cpu")), []
    seen.append(weight.detach().clone())
    for step in main.train(net, optimizer, Loader(images, 4), views, tally, 0, 0, args, off):
        seen.append(weight.detach().clone())
        if step == 0:  # from here on the loss is NaN, and the gradients are
            net.predictor[0].weight.data.fill_(torch.nan)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])
    assert tally.first_bad_step() == 1


# ---- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "device", "asked", "multiply_adds", "amp"),
    [
        (("avx512_bf16",), "cpu", "auto", 5e8, "bf16"),
        (("amx_bf16",), "cpu", "auto", 5e8, "bf16"),
        (("avx512_bf16",), "cpu", "auto", 1.3e7, "off"),  # resnet8
        (("avx512_vnni",), "cpu", "auto", 5e8, "off"),  # a CPU without
        (("avx512_bf16",), "cpu", "off", 5e8, "off"),
        (("avx512_bf16",), "cuda", "auto", 5e8, "off"),  # what `setup_device` found for a GPU stays
    ],
)
def test_large_networks_train_in_bf16_on_cpus_that_have_it(
    units, device, asked, multiply_adds, amp, monkeypatch
):
    found = {"avx512_bf16": False, "amx_bf16": False} | dict.fromkeys(units, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    device = torch.device(device)
    assert devices.training_precision(device, asked, "off", multiply_adds) == amp


def halved(scale):
    """Three steps in fp16 from a `scale`: each step's weights, and the scale in the end."""
    line = "--data_name textures --width 4 --feature_dim 16 --batch_size 4 --amp fp16"
    args = main.make_flags().read(line.split())[0]
    torch.manual_seed(0)
    net, device = build_model(vars(args)), torch.device("cpu")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    images, views = make_textures(12, seed=1)[0], Views(32, *STATS)
    optimizer, tally = main.make_optimizer(net, args), TrainMeters(device)
    amp, weight = devices.autocast(device, "fp16"), net.backbone.conv1.weight
    seen = [weight.detach().clone()]
    rest = (Loader(images, 4), views, tally, 0, 0, args, amp, scaler)
    for _ in main.train(net, optimizer, *rest):
        seen.append(weight.detach().clone())
    assert tally.first_bad_step() is None  # the loss was finite: gradients alone were too large
    return seen, scaler.get_scale()


def test_steps_in_fp16_are_left_out_where_scaled_gradients_overflow():
    seen, scale = halved(2.0**120)
    assert scale == 2.0**117  # halved in each of three steps
    assert all(torch.equal(weight, seen[0]) for weight in seen)
    seen, scale = halved(1024.0)
    assert scale == 1024.0
    assert not any(torch.equal(one, next) for one, next in itertools.pairwise(seen))
    assert all(weight.isfinite().all() for weight in seen)


def test_a_run_in_fp16_goes_on_to_the_same_bits(tmp_path):
    flags = "--data_name textures --train_size 128 --batch_size 32 --width 4 --feature_dim 16 "
    flags += f"--k 5 --epochs 2 --amp fp16 --no-pictures --checkpoint_minutes 0 --out {tmp_path}"
    main.main([*flags.split(), "--name", "whole"])
    train, done = main.train, []

    def until_the_sixth(*args):
        for step in train(*args):
            done.append(step)
            if len(done) == 6:
                raise KeyboardInterrupt
            yield step

    with mock.patch.object(main, "train", until_the_sixth), pytest.raises(KeyboardInterrupt):
        main.main([*flags.split(), "--name", "parted"])
    state = torch.load(tmp_path / "parted_model.pth")
    assert (state["epoch"], state["step"], state["facts"]["scale_steps"]) == (1, 1, 5)
    assert state["facts"]["scale"] == 65536.0
    main.main([*flags.split(), "--name", "parted", "--resume"])
    whole, parted = (torch.load(tmp_path / f"{name}_model.pth") for name in ("whole", "parted"))
    assert parted["facts"] == whole["facts"] == {"scale": 65536.0, "scale_steps": 8}
    for name, value in whole["model"].items():
        assert torch.equal(value, parted["model"][name])
    del state["facts"]["scale"]
    torch.save(state, tmp_path / "parted_model.pth")
    with pytest.raises(SystemExit):
        main.main([*flags.split(), "--name", "parted", "--resume"])


# ---- compiled ------------------------------------------------------------------------------------


def test_a_captured_step_is_a_compiled_one(monkeypatch, capsys):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda net, mode, **more: modes.append(mode) or net)
    net = torch.nn.Linear(2, 2)
    for flags in ((), (True,), (True, True)):
        assert distributed.prepare_for_training(net, 32, *flags) is net
    assert modes == [None, "reduce-overhead"]
    assert "--cuda_graphs: goes with --compile" in refused(capsys, main, "--cuda_graphs")


# ---- what a checkpoint says of a GPU, and memory ------------------------------------------------


def test_a_checkpoint_says_on_which_gpu_it_was_made(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90100)
    net = torch.nn.Linear(2, 2)
    assert checkpoint.environment(net).keys() == {"device", "threads", "torch"}
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(net)
        found = checkpoint.environment(net)
    assert (found["gpu"], found["cudnn"]) == ("a GPU, cuda:0", 90100)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. ..."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_too_little_memory_is_said_in_one_line(error, capsys):
    def work():
        raise error

    with pytest.raises(SystemExit) as stop:
        utils.run_command(work)
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--batch_size" in err


def test_workers_are_a_rank_s_part_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(24)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert utils.workers("auto") == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert utils.workers("auto") == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert utils.workers("auto") == 1
    assert utils.workers("5") == 5
    with pytest.raises(argparse.ArgumentTypeError):
        utils.workers("many")
