"""Devices and precision, without a GPU: selection, no mixed devices, no waits, bf16 and fp16.

A pretend cuda:0 is made of torch's fake tensors (shape, type and device, no numbers). They raise
where devices meet, and where the host asks for a number: .item(), .tolist(), bool(), a mask as an
index. `Watch` adds copies between devices that the host waits for. tests/test_accelerator.py, which
needs a compiler, plants faults, and sees that they are noticed.
"""

import argparse
import itertools
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import linear
import main
import utils
from simsiam.evaluation import metrics
from simsiam.models import backbones
from simsiam.models.classifier import Classifier
from simsiam.runtime import devices, distributed
from simsiam.training import checkpoint
from simsiam.training.heads import FrozenEncoder, HeadTask, make_optimizer, train
from simsiam.training.meters import Meters
from simsiam.training.recipes import LinearConfig, PretrainConfig
from simsiam.training.state import TrainState
from simsiam.views.augment import Batch, Views
from tests.helpers import ROOT, new_state, refused

CUDA = torch.device("cuda", 0)
SMALL = "--train_size 12 --width 4 --feature_dim 16 --batch_size 4"


# ---- selection ----------------------------------------------------------------------------------


def flags_of(device, amp="auto", deterministic=False):
    return argparse.Namespace(device=device, amp=amp, deterministic=deterministic)


def test_auto_is_the_accelerator_if_there_is_one(monkeypatch):
    available = torch.accelerator.is_available()
    assert (devices.pick_device("auto").type != "cpu") == available
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert devices.pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert devices.pick_device("auto") == torch.device("mps")
    assert devices.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:77", "gpu", "meta", ""])
def test_a_missing_device_is_refused(name):
    with pytest.raises(ValueError, match=f"--device {name}"):
        devices.pick_device(name)


@pytest.mark.parametrize(("flag", "amp"), [("auto", "off"), ("off", "off"), ("bf16", "bf16")])
def test_amp_on_the_cpu_is_off_by_default(flag, amp):
    x, config = torch.ones(2, 2), flags_of("cpu", flag)
    device, resolved = devices.setup_device(config)
    assert (device, resolved) == (torch.device("cpu"), amp)
    with devices.autocast(device, resolved):
        assert (x @ x).dtype == (torch.bfloat16 if amp == "bf16" else torch.float32)
    assert config == flags_of("cpu", flag)  # unchanged


def test_a_gpu_becomes_the_current_device_and_bf16_must_be_native(monkeypatch):
    """A T4 emulates bf16, says that it supports it, and has no bf16 convolutions."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: None)  # there is no cuda
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    current = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    for native, amp in ((False, "off"), (True, "bf16")):
        supports = lambda including_emulation=True: including_emulation or native  # noqa: B023, E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supports)
        assert devices.setup_device(flags_of("cuda:1")) == (torch.device("cuda", 1), amp)
    assert current == [1, 1]
    assert torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored at the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    devices.setup_device(flags_of("cuda:1", deterministic=True))
    assert not torch.backends.cudnn.benchmark
    assert "CUBLAS_WORKSPACE_CONFIG" in os.environ


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_is_pytorch_s_mode(monkeypatch, deterministic):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = torch.are_deterministic_algorithms_enabled()
    try:
        devices.setup_device(flags_of("cpu", deterministic=deterministic))
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's own value stays
    finally:
        torch.use_deterministic_algorithms(before)


def test_compile_without_a_compiler_is_refused_before_anything_is_written(tmp_path):
    env = os.environ | {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    env |= {"CXX": "g++"}
    flags = f"--data_name textures --train_size 64 --batch_size 32 --compile --out {tmp_path}/runs"
    command = [sys.executable, ROOT / "main.py", *flags.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "--compile" in done.stderr
    assert "g++" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# ---- a pretend cuda:0 ---------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Record the copies between devices that the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, aten = func(*args, **(kwargs or {})), torch.ops.aten
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[func is aten.copy_.default]
            waits = not (kwargs or {}).get("non_blocking", args[2:] == (True,))
            if waits and source.device != result.device:
                self.waits.append(f"{source.device} to {result.device}")
        return result


def move(net):
    """Replace the tensors of a network by fakes on cuda:0."""
    for name, x in [*net.named_parameters(), *net.named_buffers()]:
        module, _, attribute = name.rpartition(".")
        fake = torch.empty_like(x, device=CUDA)
        fake = torch.nn.Parameter(fake) if isinstance(x, torch.nn.Parameter) else fake
        setattr(net.get_submodule(module), attribute, fake)


@pytest.fixture
def optimizers(monkeypatch):
    """Optimizers that took a step. Fakes are not differentiated, pinned or updated."""
    stepped = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    zeros = lambda loss, inputs: [torch.zeros_like(one) for one in inputs]  # noqa: E731
    monkeypatch.setattr(torch.autograd, "grad", zeros)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: stepped.append(self))
    return stepped


def bf16():
    with mock.patch.multiple("torch.cuda", is_available=mock.Mock(), is_bf16_supported=mock.Mock()):
        return devices.autocast(CUDA, "bf16")


def waits_of_training(flags):
    """Run three steps of main.py's loop, extract features; return the copies waited for."""
    parser = utils.ConfigParser("main.py", main.__doc__, PretrainConfig)
    flags = f"--data_name textures --train_size 12 --arch resnet18 --batch_size 4 --probe {flags}"
    config, _ = parser.read([*flags.split(), "--amp", "off"])
    net, images = main.initial_network(config), main.load_images(config)
    encoder = main.encoder_config(config, images)
    net.to(memory_format=torch.channels_last)
    net.to = lambda *args, **options: net  # `move` does it: no fake can take a parameter's place
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        watch.waits = []
        move(net)
        images = images.to(CUDA)
        state = main.make_state(config, net, images, encoder, CUDA)
        state.autocast = bf16()
        if config.recipe == "imagenet":  # crops that workers have cut
            crops = torch.empty(4, 2, 3, 32, 32, dtype=torch.uint8, device=CUDA)
            labels = images.train_labels[:4]
            batches = [Batch(0, step, crops, labels, 4, slice(0, 4)) for step in range(3)]
            state.loader.epoch = lambda *when: iter(batches)
        watch.waits = []
        assert list(main.train(state, 0, config)) == [0, 1, 2]
        transform = state.views.eval_transform
        metrics.extract_features(net.backbone, transform, images.train_images, state.autocast)
    return watch.waits


@pytest.mark.parametrize("flags", ["", "--recipe imagenet", "--loss asymmetric_2x --bn all"])
def test_training_on_cuda_mixes_no_devices_and_never_waits(flags, optimizers):
    waits = waits_of_training(flags)
    assert [optimizer.found_inf.device for optimizer in optimizers] == [CUDA] * 3
    assert waits == ["cpu to cuda:0"] * ("imagenet" not in flags)  # the epoch's order


@pytest.mark.parametrize("cached", [False, True])
def test_linear_evaluation_on_cuda_mixes_no_devices_and_never_waits(cached, optimizers):
    parser = utils.ConfigParser("linear.py", linear.__doc__, LinearConfig)
    config, _ = parser.read(["--batch_size", "4", "--lr", "1", "--epochs", "1"])
    net = Classifier(*backbones.build_backbone("resnet8", "cifar", None), 10)
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        watch.waits = []
        move(net)
        views = Views(32, (0.5,) * 3, (0.2,) * 3, number=1)
        encoder = FrozenEncoder(net.backbone, views, bf16(), False)
        images = torch.empty(12, 3, 32, 32, dtype=torch.uint8, device=CUDA)
        labels = torch.empty(12, dtype=torch.int64, device=CUDA)
        task = HeadTask(images, labels, encoder.augmented_features, views=views)
        if cached:
            task = HeadTask(encoder.extract(images), labels)
        heads, meters = torch.nn.ModuleList([net.fc]), Meters(CUDA, "top1", "top5")
        optimizer = make_optimizer(config, heads, [1.0])
        state = TrainState(net, optimizer, task.loader(config), meters, lambda epochs: 1.0, heads)
        watch.waits = []
        assert list(train(state, task.feature_fn, 0, config)) == [0, 1, 2]
    assert optimizers == [optimizer] * 3
    assert watch.waits == ["cpu to cuda:0"]  # the epoch's order


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_that_is_not_finite_moves_no_weight(fused):
    """In PyTorch's fused step and in the plain one, which devices such as mps take."""
    state, config = new_state(f"{SMALL} --lr 0.01")
    assert state.optimizer.defaults["fused"]
    if not fused:
        state.optimizer = torch.optim.SGD(state.optimizer.param_groups, fused=False)
        for group in state.optimizer.param_groups:
            group["fused"] = False
    weight = state.net.backbone.conv1.weight
    weights = [weight.detach().clone()]
    for step in main.train(state, 0, config):
        weights.append(weight.detach().clone())
        if step == 0:  # from here on the loss and the gradients are NaN
            state.net.predictor[0].weight.data.fill_(torch.nan)
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[3])
    assert state.meters.first_bad_step() == 1


# ---- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "device", "flag", "multiply_adds", "amp"),
    [
        (("avx512_bf16",), "cpu", "auto", 5e8, "bf16"),
        (("amx_bf16",), "cpu", "auto", 5e8, "bf16"),
        (("avx512_bf16",), "cpu", "auto", 1.3e7, "off"),  # resnet8
        (("avx512_vnni",), "cpu", "auto", 5e8, "off"),  # a CPU without bf16
        (("avx512_bf16",), "cpu", "off", 5e8, "off"),
        (("avx512_bf16",), "cuda", "auto", 5e8, "off"),  # the choice of `setup_device` stays
    ],
)
def test_large_networks_train_in_bf16_on_cpus_that_have_it(
    units, device, flag, multiply_adds, amp, monkeypatch
):
    capabilities = {"avx512_bf16": False, "amx_bf16": False} | dict.fromkeys(units, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert devices.training_precision(torch.device(device), flag, "off", multiply_adds) == amp


def train_in_fp16(scale):
    """Train three steps from a loss scale; return the weights after each, and the last scale."""
    state, config = new_state(f"{SMALL} --amp fp16")
    state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    weight = state.net.backbone.conv1.weight
    weights = [weight.detach().clone()]
    weights += [weight.detach().clone() for _ in main.train(state, 0, config)]
    assert state.meters.first_bad_step() is None  # the loss is finite, gradients are too large
    return weights, state.scaler.get_scale()


def test_steps_in_fp16_are_left_out_if_scaled_gradients_overflow():
    weights, scale = train_in_fp16(2.0**120)
    assert scale == 2.0**117  # halved in each of three steps
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    weights, scale = train_in_fp16(1024.0)
    assert scale == 1024.0
    assert not any(torch.equal(one, next) for one, next in itertools.pairwise(weights))
    assert all(weight.isfinite().all() for weight in weights)


# ---- compilation and environment ----------------------------------------------------------------


def test_cuda_graphs_are_a_mode_of_compile(monkeypatch, capsys):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda net, mode, **more: modes.append(mode) or net)
    net = torch.nn.Linear(2, 2)
    for flags in ((), (True,), (True, True)):
        assert distributed.prepare_for_training(net, 32, *flags) is net
    assert modes == [None, "reduce-overhead"]
    assert "--cuda_graphs" in refused(capsys, main, "--cuda_graphs")


def test_a_checkpoint_names_the_gpu_of_its_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90100)
    net = torch.nn.Linear(2, 2)
    assert checkpoint.environment(net).keys() == {"device", "threads", "torch"}
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(net)
        environment = checkpoint.environment(net)
    assert (environment["gpu"], environment["cudnn"]) == ("a GPU, cuda:0", 90100)
