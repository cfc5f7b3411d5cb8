"""What the commands share: errors in one line, labels and summaries; the choice of the device."""

import argparse
import os
import subprocess
import sys
import warnings

import pytest
import torch
from PIL import Image

import utils
from simsiam.data.decode import UnreadableImageError
from simsiam.data.loader import Data
from simsiam.data.textures import make_textures
from simsiam.models.flops import params_and_flops
from simsiam.models.simsiam import SimSiam
from simsiam.runtime import devices
from simsiam.runtime.config import RunConfig
from simsiam.runtime.files import RunError
from tests.helpers import ROOT

CPU = torch.device("cpu")


def test_the_users_own_data_are_called_by_their_folder():
    assert utils.data_label("cifar10", "data") == "cifar10"
    assert utils.data_label("folder", "/some/birds/") == "folder:birds"
    assert utils.data_label("webdataset", "/some/train-{0..9}.tar") == "webdataset:train-{0..9}.tar"


# ---- errors in one line -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, PermissionError])
def test_bad_input_is_one_line(capsys, error):
    parser = utils.Parser("some.py", "")
    with pytest.raises(SystemExit) as stop, parser.bad_input():
        raise error("--flag:\n  is wrong")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "some.py: --flag: is wrong\n"


def test_bugs_keep_their_traceback():
    parser = utils.Parser("some.py", "")
    with pytest.raises(KeyError), parser.bad_input():
        raise KeyError("a bug")
    with parser.bad_input():
        pass

    def wrong():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        utils.run_command(wrong)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunError("the disk is full"), 1, "some.py: the disk is full\n"),
        (UnreadableImageError("a.jpg: cannot be read"), 2, "some.py: a.jpg: cannot be read\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_each_end_of_a_command_is_one_line(capsys, monkeypatch, error, code, line):
    monkeypatch.setattr(sys, "argv", ["/some/where/some.py"])

    def ends():
        raise error

    with pytest.raises(SystemExit) as stop:
        utils.run_command(ends)
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_a_command_ignores_pil_s_warnings_and_leaves_the_filters_as_they_were():
    before = list(warnings.filters)
    with utils.on_ranks(RunConfig(), utils.Parser("some.py", "")):
        assert any(one[2] is Image.DecompressionBombWarning for one in warnings.filters)
    assert warnings.filters == before


# ---- device -------------------------------------------------------------------------------------


def test_amp_is_off_on_the_cpu_unless_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    x = torch.ones(2, 2)
    for amp, dtype in [("auto", torch.float32), ("off", torch.float32), ("bf16", torch.bfloat16)]:
        args = argparse.Namespace(device="cpu", amp=amp, deterministic=False)
        device, found = devices.setup_device(args)
        assert device == CPU
        assert found == ("bf16" if dtype == torch.bfloat16 else "off")
        assert args.amp == amp  # nothing is written into the flags
        with devices.autocast(device, found):
            assert (x @ x).dtype == dtype


def test_a_gpu_becomes_the_current_device_and_bf16_must_be_its_own(monkeypatch):
    """A T4 says that it supports bf16: it emulates it, and has no convolutions of it."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "zeros", lambda *size, **more: None)  # there is none to allocate on
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    for native, amp in ((False, "off"), (True, "bf16")):
        answer = {True: True, False: native}
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, answer=answer: answer[including_emulation],
        )
        args = argparse.Namespace(device="cuda:1", amp="auto", deterministic=False)
        assert devices.setup_device(args) == (torch.device("cuda", 1), amp)
    assert chosen == [1, 1]
    assert torch.backends.cudnn.benchmark
    args.deterministic = True
    try:
        devices.setup_device(args)
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


def test_compile_without_a_compiler_is_said_in_one_line(tmp_path):
    """Before anything is written; a machine without g++ has none on its PATH, nor in CXX."""
    env = os.environ | {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    env |= {"CXX": "g++"}
    flags = f"--data_name textures --train_size 64 --batch_size 32 --compile --out {tmp_path}/runs"
    command = [sys.executable, ROOT / "main.py", *flags.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("main.py: --compile: torch.compile does not work here (")
    assert "g++" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_is_pytorch_s(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        args = argparse.Namespace(device="cpu", amp="auto", deterministic=deterministic)
        devices.setup_device(args)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
        assert vars(args) == {"device": "cpu", "amp": "auto", "deterministic": deterministic}
    finally:
        torch.use_deterministic_algorithms(before)


def test_device_that_is_not_there():
    assert devices.pick_device("cpu") == CPU
    for name in ("cuda:77", "gpu", "meta", ""):
        with pytest.raises(ValueError, match="--device"):
            devices.pick_device(name)


def test_auto_is_the_accelerator_that_is_there(monkeypatch):
    there = torch.accelerator.is_available()
    assert (devices.pick_device("auto").type != "cpu") == there
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert devices.pick_device("auto") == CPU
    with pytest.raises(ValueError, match="--device cuda"):
        devices.pick_device("cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert devices.pick_device("auto") == torch.device("mps")
    assert devices.pick_device("cpu") == CPU


def test_a_run_introduces_itself(capsys):
    net = SimSiam("resnet8", feature_dim=64)
    images, labels = make_textures(30, seed=1)
    data = Data(images, labels, images[:7], labels[:7], list("abcdefghij"))
    counts = params_and_flops(net, 32)
    columns = utils.print_summary(
        "some/run: SimSiam", net, counts, data, "folder:birds", 32, CPU, "off"
    )
    params = sum(p.numel() for p in net.parameters()) / 1e6
    known = {"train_size": 30, "width": 16, "device": "cpu", "params_m": params}
    assert columns == known | {"flops_g": pytest.approx(0.0126, abs=0.0005)}
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"some/run: SimSiam: {params:.2f}M parameters, 12.")
    assert "folder:birds: 30 training images, 7 test images, 10 classes, 32 pixels" in second
