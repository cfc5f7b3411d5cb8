"""What the commands share: errors in one line, labels and summaries."""

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
from simsiam.runtime.config import RunConfig
from simsiam.runtime.files import RunError

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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. ..."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_too_little_memory_is_one_line(error, capsys):
    def work():
        raise error

    with pytest.raises(SystemExit) as stop:
        utils.run_command(work)
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--batch_size" in err


def test_a_command_ignores_pil_s_warnings_and_leaves_the_filters_as_they_were():
    before = list(warnings.filters)
    with utils.on_ranks(RunConfig(), utils.Parser("some.py", "")):
        assert any(one[2] is Image.DecompressionBombWarning for one in warnings.filters)
    assert warnings.filters == before


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
