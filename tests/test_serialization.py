"""Untrusted files: read as tensors, never executed, and in no more memory than their size."""

import argparse
import io
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
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
from simsiam.training import checkpoint
from tests.helpers import ROOT, refused


def state() -> dict:
    """Tensors as state_dicts have them, of several dtypes and strides."""
    torch.manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 2, 2),
        "turned": torch.randn(3, 5).T,
        "part": torch.arange(10)[3:6],
        "half": torch.randn(3).half(),
        "number": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }


class Parameter:
    """As paddle.save reduces a parameter in a dict of dicts: its name and its array, as a tuple."""

    def __init__(self, name, array):
        self.pair = (name, array)

    def __reduce__(self):
        return tuple, (self.pair,)


def read_weights(path) -> dict:
    return weights.find_weights(reader.read(path))


def as_bytes(write: Callable) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def files():
    """Names and contents of files that hold `state()`."""
    mine = state()
    arrays = {name: value.numpy() for name, value in mine.items()}
    for protocol in (2, 4):
        for new in (True, False):
            how = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": new}
            whole = {"state_dict": OrderedDict(mine), "args": argparse.Namespace(lr=0.5)}
            yield f"torch {how}", as_bytes(lambda file, a=whole, b=how: torch.save(a, file, **b))
    for protocol in range(6):
        yield f"arrays {protocol}", pickle.dumps({"model": arrays}, protocol)
        yield f"tensors {protocol}", pickle.dumps(mine, protocol)
        paddle = {name: Parameter("w_0", array) for name, array in arrays.items()}
        yield f"Paddle {protocol}", pickle.dumps({"epoch": 1, "state_dict": paddle}, protocol)
    whole = {name: value.contiguous() for name, value in mine.items()}
    yield "safetensors", safetensors.torch.save(whole, {"format": "pt"})
    swapped = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()}
    yield "big-endian arrays", pickle.dumps(swapped)
    eights = whole | {"more": torch.ones(4).to(torch.float8_e5m2)}  # of dtypes that are left out
    yield "safetensors, more", safetensors.torch.save(eights)
    texts = arrays | {"more": np.array(["text"]), "record": np.zeros(2, "f4,i4")}
    yield "arrays, more", pickle.dumps(texts)
    yield "columns first", pickle.dumps({k: np.array(v, order="F") for k, v in arrays.items()})


def test_the_content_tells_the_format(tmp_path):
    path, number = tmp_path / "weights.bin", 0
    for name, content in files():
        path.write_bytes(content)
        found = read_weights(path)
        assert found.keys() == state().keys(), name
        for key, value in state().items():
            expected = value.float() if value.is_floating_point() else value
            assert torch.equal(found[key], expected), (name, key)
            assert found[key].dtype == expected.dtype, (name, key)
        number += 1
    assert number == 27


def test_a_storage_of_which_two_tensors_have_parts(tmp_path):
    """They still share it; also a stream of torch before 0.4, whose storages have views."""
    base = torch.arange(12.0)
    for new in (True, False):
        both = {"a": base[2:5], "b": base[2:8].view(2, 3).T}
        torch.save(both, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
        found = reader.read(tmp_path / "a.pth")
        assert torch.equal(found["b"], both["b"])
        assert found["a"].data_ptr() == found["b"].data_ptr()
    number = pickle.dumps(reader.MAGIC, 2), pickle.dumps(1001, 2)
    system = pickle.dumps({"little_endian": True, "protocol_version": 1001}, 2)
    old = (
        b"\x80\x02}X\x01\0\0\0w"
        b"ctorch._utils\n_rebuild_tensor\n"
        b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x005X\x03\0\0\0cpuK\x0c"
        b"X\x01\0\0\x006K\x02K\x06\x87tQ"  # the six from the third on
        b"K\x01K\x02\x85K\x03\x85tRs."
    )
    content = b"".join([*number, system, old, pickle.dumps(["5"], 2), struct.pack("<q", 12)])
    (tmp_path / "a.pth").write_bytes(content + base.numpy().tobytes())
    assert reader.read(tmp_path / "a.pth")["w"].tolist() == [3, 6]


def test_plain_values_stay_and_objects_are_left_out(tmp_path):
    plain = {"n": [1, -2.5, None, True, 10**30], "t": ("ü", b"\xff"), 3: {}, "s": np.float64(0.5)}
    for protocol in range(6):
        (tmp_path / "a.pkl").write_bytes(
            pickle.dumps(plain | {"o": argparse.Namespace(lr=0.5)}, protocol)
        )
        found = reader.read(tmp_path / "a.pkl")
        assert isinstance(found.pop("o"), reader.Placeholder)
        assert found == plain
        assert type(found["s"]) is float


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


def ends_well(function: Callable, *args) -> bool:
    """Whether a function returns True in a child process, with 2 GB and 20 s to do it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            pages = Path("/proc/self/statm").read_text().split()[0]
            most = int(pages) * resource.getpagesize() + 2**31
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
            code = 0 if function(*args) else 2
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def is_refused(path) -> bool:
    try:
        read_weights(path)
    except ValueError as error:
        return str(error) in ("is damaged, or no checkpoint", "has no weights")
    return False


# ---- bytes are not pointers ---------------------------------------------------------------------


class Dtype:
    """Pickled as a NumPy dtype with any name and any state."""

    def __init__(self, code, *state):
        self.reduced = np.dtype, (code, False, True), state

    def __reduce__(self):
        return self.reduced


class Array:
    """Pickled as a NumPy array of any dtype over any data."""

    def __init__(self, dtype, data, shape=(1,)):
        reconstruct = np.zeros(1).__reduce__()[0]
        self.reduced = reconstruct, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, data)

    def __reduce__(self):
        return self.reduced


def is_not_loaded(path) -> bool:
    try:
        return isinstance(reader.read(path)["w"], reader.Placeholder)
    except ValueError:
        return True


POINTER = b"A" * 8
NONE = (None, None, None)
OBJECT = Dtype("O8", 3, "|", *NONE, -1, -1, 63)
DTYPES = {
    "object": OBJECT,
    "object without flags": Dtype("O8", 3, "|", *NONE, -1, -1, 0),
    "object of a number's size": Dtype("O", 3, "<", *NONE, 8, 8, 0),
    "object as a byte order": Dtype("8", 3, "|O", *NONE, -1, -1, 0),
    "number with the flags of objects": Dtype("f8", 3, "<", *NONE, -1, -1, 63),
    "number of another size": Dtype("u1", 3, "|", *NONE, 8, 8, 0),
    "number with a field of objects": Dtype(
        "f8", 3, "<", None, ("a",), {"a": (OBJECT, 0)}, 8, 1, 0
    ),
    "number with a sub-array of objects": Dtype("f8", 3, "<", (OBJECT, (1,)), None, None, 8, 1, 0),
    "number with metadata": Dtype("f8", 4, "<", *NONE, -1, -1, 0, {"a": OBJECT}),
    "record of objects": Dtype("V8", 3, "|", None, ("a",), {"a": (OBJECT, 0)}, 8, 1, 0),
    "text": Dtype("U2", 3, "<", *NONE, 8, 4, 0),
    "time": Dtype("M8", 4, "<", *NONE, -1, -1, 0, (b"s", 1, 1, 1)),
    "no dtype": "O8",
}


@pytest.mark.parametrize("name", DTYPES)
def test_bytes_become_no_pointers(tmp_path, name):
    """By any dtype but a plain number's, in each way to make an array or a scalar of it."""
    path, dtype, scalar = tmp_path / "a.pdparams", DTYPES[name], np.float64(1).__reduce__()[0]
    buffer = np.zeros(1).__reduce_ex__(5)[0]
    good = Dtype("f8", 3, "<", *NONE, -1, -1, 0)
    for of in (good, dtype):
        number = np.array([1.0]).tobytes()
        values = [
            Array(of, number),
            Call(scalar, of, number),
            Call(buffer, number, of, (1,), "C"),
            Array(of, [POINTER]),
            Call(np.ndarray, (1,), of, POINTER),
        ]
        for protocol in (2, 4):
            for value, is_number in zip(values, (True, True, True, False, False), strict=True):
                path.write_bytes(pickle.dumps({"w": value}, protocol))
                if is_number and of is good:
                    assert float(reader.read(path)["w"]) == 1.0
                else:
                    assert ends_well(is_not_loaded, path), (protocol, value)


def test_a_dtype_s_state_counts_when_the_array_is_made(tmp_path):
    """Two BUILDs of one dtype: the array has the state that it had between them, or is refused."""
    dtype = b"cnumpy\ndtype\n(X\x02\0\0\0f8K\0K\1tRq\xc8"
    states = [pickle.dumps((3, "<", *NONE, -1, -1, flags), 2)[2:-1] for flags in (0, 63)]
    for first, second in (states, states[::-1]):
        array = b"cnumpy.core.multiarray\n_reconstruct\n(tR(K\1K\1\x85h\xc8K\0C\x08AAAAAAAAtb"
        content = b"\x80\x03}X\1\0\0\0w" + dtype + first + b"b0" + array
        content += b"h\xc8" + second + b"b0s."
        (tmp_path / "a.pdparams").write_bytes(content)
        found = reader.read(tmp_path / "a.pdparams")["w"]
        expected = torch.Tensor if first is states[0] else reader.Placeholder
        assert isinstance(found, expected)


# ---- no code ------------------------------------------------------------------------------------


class Call:
    """What pickle calls when it loads it."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, exec, open, print])
def test_functions_are_not_called(tmp_path, function, monkeypatch, capsys):
    """In each format: as a value, in a state_dict, in a list, alone, and in an array of objects."""
    monkeypatch.chdir(tmp_path)
    words = {os.mkdir: "done", os.system: "touch done", open: "done"}
    more = ("w",) if function is open else ()
    call = Call(function, words.get(function, "open('done', 'w')"), *more)
    objects = {"w": np.array([call], dtype=object)}
    for whole in ({"evil": call}, {"state_dict": {"w": call}}, [call], call, objects):
        for new in (True, False):
            torch.save(whole, "a.pth", _use_new_zipfile_serialization=new)
            assert is_refused("a.pth")
        for protocol in range(6):
            (tmp_path / "a.pth").write_bytes(pickle.dumps(whole, protocol))
            assert is_refused("a.pth")
    assert os.listdir() == ["a.pth"]
    assert capsys.readouterr().out == ""


def test_there_is_one_reader(tmp_path):
    """Nothing in the tree unpickles, or calls torch's loaders, but this one reader of its own."""
    loads = r"(torch|jit|pickle|np|numpy)\.loads?\(|weights_only=False|Unpickler"
    harmless = r"np\.load\([^()]*allow_pickle=False\)"  # an image's array: NumPy refuses objects
    for pattern in ("*.py", "simsiam/**/*.py", "tools/*.py", "studies/*.py"):
        for path in ROOT.glob(pattern):
            assert not re.search(loads, re.sub(harmless, "", path.read_text())), path
    torch.save({"version": 2}, tmp_path / "a.pth")
    for read in (checkpoint.load, read_weights):
        with pytest.raises(ValueError, match="is damaged, or not a checkpoint|has no weights"):
            read(tmp_path / "a.pth")


# ---- shards -------------------------------------------------------------------------------------


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


# ---- no more memory than a file is worth --------------------------------------------------------


def deflated(content: bytes) -> bytes:
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return file.getvalue()


def text(string: str) -> bytes:
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def repeated(value: bytes, call: bytes, times: int = 5000) -> bytes:
    """A list of what `call` makes of one value (memo 0), many times."""
    return b"\x80\x03" + value + b"q\x000](" + call * times + b"e."


MEGABYTE = b"B\0\0\x10\0" + bytes(2**20)
ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\n(K\0tR(K\x01J\0\0\x10\0\x85cnumpy\ndtype\n"
    + text("u1")
    + b"\x85R\x89h\0tb"
)
DOUBLED = b"\x80\x02K\x01" + b"q\0h\0\x86" * 60
BOMBS = {
    "an array, again and again": repeated(MEGABYTE, ARRAY),
    "bytes, again and again": repeated(
        text("a" * 2**20), b"c_codecs\nencode\nh\0" + text("latin1") + b"\x86R"
    ),
    "a tuple, again and again": repeated(
        b"](" + b"K\1" * 10**6 + b"e", b"c__builtin__\ntuple\nh\0\x85R"
    ),
    "a dict, again and again": repeated(
        b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(10**5)) + b"u",
        b"ccollections\nOrderedDict\nh\0\x85R",
    ),
    "pairs of pairs": DOUBLED + b".",
    "a key of pairs of pairs": b"\x80\x02}" + DOUBLED[2:] + b"K\1s.",
    "a name of pairs of pairs": b"\x80\x04" + DOUBLED[2:] + b"K\1\x93.",
    "a list in itself": b"\x80\x02]q\0h\0a.",
    "a far place of the memo": b"\x80\x02K\1r\xff\xff\xff\xff.",
    "a length of bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "a length of a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b".",
    "many marks": b"\x80\x02" + b"(" * 2 * 10**6 + b".",
    "deep": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "a safetensors header": struct.pack("<Q", 2**40) + b"{}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_bombs(tmp_path, name):
    (tmp_path / "a.pth").write_bytes(BOMBS[name])
    assert ends_well(is_refused, tmp_path / "a.pth")


def test_archives_and_tensors_claim_no_more_than_the_file_has(tmp_path, capsys):
    path = tmp_path / "a.pth"
    large = as_bytes(lambda file: torch.save({"w": torch.zeros(2**22)}, file))
    path.write_bytes(deflated(large))
    assert path.stat().st_size < len(large) / 100
    flags = ("--data_name", "textures", "--out", tmp_path / "none")
    assert "is compressed" in refused(capsys, linear, "--model_path", path, *flags)
    storage = torch.ones(1000).half()
    for tensor in (
        torch.ones(1).half().expand(10**6, 10**6),
        torch.ones(()).expand(3, 3),
        storage.as_strided((999, 999), (1, 0)),
        storage.as_strided((2, 999), (1, 1)),
    ):
        for new in (True, False):
            torch.save({"w": tensor}, path, _use_new_zipfile_serialization=new)
            assert is_refused(path)
    torch.save({f"w{i}": storage for i in range(100)}, path)
    assert len(read_weights(path)) == 100
    torch.save({f"w{i}": torch.ones(10**5).half()[:] for i in range(2)}, path)
    assert len(read_weights(path)) == 2
    storage = torch.ones(10**6).half()
    torch.save({f"w{i}": storage for i in range(100)}, path)  # as floats: 400 MB of a file of 2
    assert is_refused(path)


def test_a_zip_s_parts_cannot_overlap(tmp_path):
    """Two entries of the list for the same bytes."""
    content = as_bytes(lambda file: torch.save({"w": torch.ones(10**5)}, file))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (entry,) = (info for info in archive.infolist() if info.filename.endswith("data/0"))
        start = archive.start_dir
    name = entry.filename.encode()
    at = content.index(name, start) - 46
    record = content[at : at + 46 + len(name) + struct.unpack("<H", content[at + 30 : at + 32])[0]]
    end = content.rindex(b"PK\5\6")
    listed = content[start:end].split(b"PK\6\6")[0] + record * 3
    count = struct.unpack("<H", content[end + 10 : end + 12])[0] + 3
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(listed), start, 0)
    (tmp_path / "a.pth").write_bytes(content[:start] + listed + tail)
    assert is_refused(tmp_path / "a.pth")


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
