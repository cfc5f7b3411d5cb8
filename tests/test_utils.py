"""What commands share: errors in one line, labels of data sets, the summary of a run."""

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
from simsiam.training.recipes import PretrainConfig


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, PermissionError])
def test_bad_input_is_one_line(capsys, error):
    parser = utils.Parser("some.py", "")
    with pytest.raises(SystemExit) as stop, parser.bad_input():
        raise error("--flag:\n  is wrong")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "some.py: --flag: is wrong\n"


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RunError("the disk is full"), 1, "some.py: the disk is full"),
        (UnreadableImageError("a.jpg: cannot be read"), 2, "some.py: a.jpg: cannot be read"),
        (KeyboardInterrupt(), 130, "stopped"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ..."), 1, "--batch_size"),
        (MemoryError(), 1, "--batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "--batch_size"),
    ],
)
def test_errors_of_a_run_are_one_line(capsys, monkeypatch, error, code, text):
    monkeypatch.setattr(sys, "argv", ["/some/where/some.py"])
    with pytest.raises(SystemExit) as stop:
        utils.run_command(lambda: fail(error))
    assert stop.value.code == code
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


def test_bugs_keep_their_traceback():
    with pytest.raises(KeyError), utils.Parser("some.py", "").bad_input():
        raise KeyError("a bug")
    with pytest.raises(RuntimeError):
        utils.run_command(lambda: fail(RuntimeError("a bug")))


def test_a_command_ignores_warnings_of_pil_and_restores_the_filters():
    before = list(warnings.filters)
    with utils.on_ranks(RunConfig(), utils.Parser("some.py", "")):
        assert any(one[2] is Image.DecompressionBombWarning for one in warnings.filters)
    assert warnings.filters == before


def test_labels_of_data_sets():
    assert utils.data_label("cifar10", "data") == "cifar10"
    assert utils.data_label("folder", "/some/birds/") == "folder:birds"
    assert utils.data_label("webdataset", "/some/train-{0..9}.tar") == "webdataset:train-{0..9}.tar"


def test_summary_of_a_run(capsys):
    net = SimSiam("resnet8", feature_dim=64)
    images, labels = make_textures(30, seed=1)
    data = Data(images, labels, images[:7], labels[:7], list("abcdefghij"))
    config = PretrainConfig(data_name="folder", data_root="/some/birds", amp="off")
    encoder, counts = {"arch": "resnet8", "image_size": 32}, params_and_flops(net, 32)
    columns = utils.print_summary("a run", net, counts, data, encoder, config, torch.device("cpu"))
    params = sum(p.numel() for p in net.parameters()) / 1e6
    expected = {"data": "folder:birds", "arch": "resnet8", "params_m": params}
    expected |= {"train_size": 30, "width": 16, "device": "cpu"}
    assert columns == expected | {"flops_g": pytest.approx(0.0126, abs=0.0005)}
    out = capsys.readouterr().out
    for text in (f"{params:.2f}M parameters", "folder: 30 training", "7 test", "10 classes"):
        assert text in out
