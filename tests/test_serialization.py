"""Untrusted files: read as tensors, never executed, and in no more memory than their size."""

import argparse
import ast
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import linear
import main
from simsiam.data.textures import make_textures
from simsiam.interop import weights
from simsiam.models.simsiam import SimSiam
from simsiam.runtime import reader
from simsiam.runtime.files import RunError
from tests.helpers import ROOT, refused
from tests.hostile import (
    BOMBS,
    DTYPES,
    NUMBER,
    Call,
    as_bytes,
    in_arrays,
    limit,
    state_dict,
    torch_file,
    two_builds,
)


def read_weights(path) -> dict:
    return weights.find_weights(reader.read(path))


def files():
    """Names and contents of files that hold `state_dict()`."""
    mine = state_dict()
    arrays = {name: value.numpy() for name, value in mine.items()}
    saved = {"state_dict": OrderedDict(mine), "args": argparse.Namespace(lr=0.5)}
    for protocol in (2, 4):
        for is_zip in (True, False):
            how = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip}
            yield f"torch {how}", as_bytes(lambda file, how=how: torch.save(saved, file, **how))
    # paddle.save reduces a parameter in a dict of dicts to a tuple: its name and its array.
    paddle = {name: Call(tuple, ("w_0", array)) for name, array in arrays.items()}
    for protocol in range(6):
        yield f"arrays {protocol}", pickle.dumps({"model": arrays}, protocol)
        yield f"tensors {protocol}", pickle.dumps(mine, protocol)
        yield f"Paddle {protocol}", pickle.dumps({"epoch": 1, "state_dict": paddle}, protocol)
    swapped = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()}
    yield "big-endian arrays", pickle.dumps(swapped)
    yield "columns first", pickle.dumps({k: np.array(v, order="F") for k, v in arrays.items()})
    texts = arrays | {"more": np.array(["text"]), "record": np.zeros(2, "f4,i4")}
    yield "arrays, more", pickle.dumps(texts)
    whole = {name: value.contiguous() for name, value in mine.items()}
    yield "safetensors", safetensors.torch.save(whole, {"format": "pt"})
    eights = whole | {"more": torch.ones(4).to(torch.float8_e5m2)}  # of dtypes that are left out
    yield "safetensors, more", safetensors.torch.save(eights)


FILES = dict(files())


@pytest.mark.parametrize("name", FILES)
def test_the_content_tells_the_format(tmp_path, name):
    (tmp_path / "weights.bin").write_bytes(FILES[name])
    tensors = read_weights(tmp_path / "weights.bin")
    assert tensors.keys() == state_dict().keys()
    for key, value in state_dict().items():
        expected = value.float() if value.is_floating_point() else value
        assert torch.equal(tensors[key], expected)
        assert tensors[key].dtype == expected.dtype


def test_a_storage_of_which_two_tensors_have_parts(tmp_path):
    """They still share it; also a stream of torch before 0.4, whose storages have views."""
    base, path = torch.arange(12.0), tmp_path / "a.pth"
    both = {"a": base[2:5], "b": base[2:8].view(2, 3).T}
    for is_zip in (True, False):
        path.write_bytes(torch_file(both, is_zip))
        tensors = reader.read(path)
        assert torch.equal(tensors["b"], both["b"])
        assert tensors["a"].data_ptr() == tensors["b"].data_ptr()
    system = {"little_endian": True, "protocol_version": 1001}
    pickles = [pickle.dumps(value, 2) for value in (reader.MAGIC, 1001, system)]
    old = (
        b"\x80\x02}X\x01\0\0\0w"
        b"ctorch._utils\n_rebuild_tensor\n"
        b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x005X\x03\0\0\0cpuK\x0c"
        b"X\x01\0\0\x006K\x02K\x06\x87tQ"  # the six from the third on
        b"K\x01K\x02\x85K\x03\x85tRs."
    )
    content = b"".join([*pickles, old, pickle.dumps(["5"], 2), struct.pack("<q", 12)])
    path.write_bytes(content + base.numpy().tobytes())
    assert reader.read(path)["w"].tolist() == [3, 6]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_stay_and_objects_are_left_out(tmp_path, protocol):
    plain = {"n": [1, -2.5, None, True, 10**30], "t": ("ü", b"\xff"), 3: {}, "s": np.float64(0.5)}
    content = pickle.dumps(plain | {"o": argparse.Namespace(lr=0.5)}, protocol)
    (tmp_path / "a.pkl").write_bytes(content)
    value = reader.read(tmp_path / "a.pkl")
    assert isinstance(value.pop("o"), reader.Placeholder)
    assert value == plain
    assert type(value["s"]) is float


def test_tensors_may_share_a_storage(tmp_path):
    """Within bounds: 100 names of one, and two that are parts of large ones."""
    path, storage = tmp_path / "a.pth", torch.ones(1000).half()
    path.write_bytes(torch_file({f"w{i}": storage for i in range(100)}))
    assert len(read_weights(path)) == 100
    path.write_bytes(torch_file({f"w{i}": torch.ones(10**5).half()[:] for i in range(2)}))
    assert len(read_weights(path)) == 2


# ---- no code ------------------------------------------------------------------------------------


class Program(torch.nn.Module):
    """Its archive writes a file where it is loaded."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.conv1 = torch.nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv1(x)

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.ones(3), self.path)


def test_a_torchscript_archive_is_refused_and_not_run(tmp_path, capsys):
    path, done = tmp_path / "a.pth", tmp_path / "done"
    torch.save({"w": torch.ones(3)}, tmp_path / "code.pth")  # its parts lie in a folder, code/
    assert len(read_weights(tmp_path / "code.pth")) == 1
    torch.jit.save(torch.jit.script(Program(str(done))), path)
    flags = ("--data_name", "textures", "--out", tmp_path / "none")
    for command, flag in ((linear, "--model_path"), (main, "--init")):
        assert "TorchScript" in refused(capsys, command, flag, path, *flags)
    assert not done.exists()


@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, exec, open, print])
def test_functions_are_not_called(tmp_path, function, monkeypatch, capsys):
    """In each format: as a value, in a state_dict, in a list, alone, and in an array of objects."""
    monkeypatch.chdir(tmp_path)
    words = {os.mkdir: ["done"], os.system: ["touch done"], open: ["done", "w"]}
    call = Call(function, *words.get(function, ["open('done', 'w')"]))
    objects = {"w": np.array([call], dtype=object)}
    for whole in ({"evil": call}, {"state_dict": {"w": call}}, [call], call, objects):
        contents = [torch_file(whole, is_zip) for is_zip in (True, False)]
        for content in (*contents, *(pickle.dumps(whole, protocol) for protocol in range(6))):
            Path("a.pth").write_bytes(content)
            assert is_refused("a.pth")
    assert os.listdir() == ["a.pth"]
    assert capsys.readouterr().out == ""


def test_there_is_one_reader():
    """Nothing in the tree unpickles, or calls torch's loaders, but this one reader of its own."""
    loads = r"(torch|jit|pickle|np|numpy)\.loads?\(|.*weights_only=False|.*Unpickler"
    for pattern in ("*.py", "simsiam/**/*.py", "tools/*.py", "studies/*.py"):
        for path in ROOT.glob(pattern):
            for node in ast.walk(ast.parse(path.read_text())):
                call = ast.unparse(node) if isinstance(node, ast.Call) else ""
                is_harmless = "allow_pickle=False" in call  # an image's array: no objects
                assert is_harmless or not re.match(loads, call), f"{path}: {call}"


def test_a_shard_s_name_is_no_command(tmp_path, monkeypatch, capsys):
    shards, pixels = tmp_path / "tars", make_textures(16, seed=0)[0].permute(0, 2, 3, 1).numpy()
    shards.mkdir()
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    shard = Path(shutil.make_archive(shards / "train", "tar", tmp_path / "images"))
    shutil.copy(shard, shards / "pipe:touch done; cat train.tar")
    monkeypatch.chdir(shards)
    flags = "--data_name webdataset --image_size 32 --arch resnet8 --stem cifar --width 4 --k 5 "
    flags += "--feature_dim 16 --batch_size 16 --epochs 1 --no-pictures --num_workers 0 --out r "
    main.main([*flags.split(), "--data_root", "."])
    assert not (shards / "done").exists()
    for root in ("pipe:cat {0..9}.tar", "http://127.0.0.1/a.tar", "a.tar::pipe:touch done"):
        line = refused(capsys, main, *flags.split(), "--name", "b", "--data_root", root)
        assert "file" in line
    assert not (shards / "done").exists()


# ---- bytes are not pointers, and a file is worth no more memory than its size -------------------


def ends_well(function: Callable, *args) -> bool:
    """Return whether a function returns True in a child process, with 2 GB and 20 s to do it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            limit(2**31, 20)
            code = 0 if function(*args) else 2
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def is_refused(path) -> bool:
    """Return whether a file is refused as one that is damaged, unsupported or without weights."""
    try:
        read_weights(path)
    except reader.UnsupportedFileError:
        return True
    except ValueError as error:
        return str(error) in ("is damaged, or no checkpoint", "has no weights")
    return False


def are_not_loaded(folder) -> bool:
    """Return whether no file of a folder gives a value `w`."""
    for path in folder.iterdir():
        try:
            if not isinstance(reader.read(path)["w"], reader.Placeholder):
                return False
        except ValueError:
            pass
    return True


@pytest.mark.parametrize("name", DTYPES)
def test_bytes_become_no_pointers(tmp_path, name):
    """By any dtype but a plain number's, in each way to make an array or a scalar of it."""
    hostile = [value for values in in_arrays(DTYPES[name]) for value in values]
    for i, value in enumerate((*hostile, *in_arrays(NUMBER)[1])):
        for protocol in (2, 4):
            (tmp_path / f"{i}_{protocol}").write_bytes(pickle.dumps({"w": value}, protocol))
    assert ends_well(are_not_loaded, tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_plain_dtype_makes_numbers(tmp_path, protocol):
    for value in in_arrays(NUMBER)[0]:
        (tmp_path / "a").write_bytes(pickle.dumps({"w": value}, protocol))
        assert float(reader.read(tmp_path / "a")["w"]) == 1.0


@pytest.mark.parametrize(
    ("flags", "expected"), [((0, 63), torch.Tensor), ((63, 0), reader.Placeholder)]
)
def test_the_state_of_a_dtype_counts_when_its_array_is_built(tmp_path, flags, expected):
    """Two BUILDs of one dtype: the array has the state that it had between them, or is refused."""
    (tmp_path / "a.pdparams").write_bytes(two_builds(flags))
    assert isinstance(reader.read(tmp_path / "a.pdparams")["w"], expected)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_bounded_memory_and_time(tmp_path, name):
    (tmp_path / "a.pth").write_bytes(BOMBS[name]())
    assert ends_well(is_refused, tmp_path / "a.pth")


def test_weights_that_are_huge_end_in_a_line(tmp_path):
    """They are finite, but not what the network makes of them."""
    net = SimSiam("resnet8", "cifar", 16, width=4)
    huge = {k: v * 1e37 if v.is_floating_point() else v for k, v in net.state_dict().items()}
    torch.save(huge, tmp_path / "a.pth")
    flags = "--data_name textures --width 4 --feature_dim 16 --train_size 64 --k 5 --name a"
    with pytest.raises(RunError, match=r"--init .*a\.pth: the features are not finite"):
        main.main([*flags.split(), "--init", f"{tmp_path}/a.pth", "--out", str(tmp_path / "r")])


def test_broken_files_of_every_format_end_well(tmp_path):
    """A slice of what `python -m tests.fuzz` does."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz", "--files", "32"]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (total,) = (line.split() for line in ended.stdout.splitlines() if line.startswith("all "))
    assert int(total[1]) + int(total[2]) == 32
    assert int(total[1]) > 4
    assert int(total[2]) > 4
