"""Files that attack a reader: programs, pointers, bombs, false claims."""

import io
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def as_bytes(write: Callable) -> bytes:
    """Return what `write` writes to a file."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def torch_file(value: object, is_zip: bool = True) -> bytes:
    return as_bytes(lambda file: torch.save(value, file, _use_new_zipfile_serialization=is_zip))


def limit(memory: int, seconds: int) -> None:
    """Limit this process to so many more bytes than it has, and to seconds of CPU time."""
    pages = Path("/proc/self/statm").read_text().split()[0]
    most = int(pages) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


class Call:
    """Calls a function where it is unpickled, and sets its state."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


# ---- NumPy: dtypes that turn bytes into pointers ------------------------------------------------


def dtype(code, *state):
    """A NumPy dtype of any name and any state."""
    return Call(np.dtype, code, False, True, state=state)


def array(of, data):
    """A NumPy array of any dtype over any data."""
    rebuild = np.zeros(1).__reduce__()[0]
    return Call(rebuild, np.ndarray, (0,), b"b", state=(1, (1,), of, False, data))


NONE, ONE, POINTER = (None, None, None), np.array([1.0]).tobytes(), b"A" * 8
SCALAR, BUFFER = np.float64(1).__reduce__()[0], np.zeros(1).__reduce_ex__(5)[0]
NUMBER = dtype("f8", 3, "<", *NONE, -1, -1, 0)
OBJECT = dtype("O8", 3, "|", *NONE, -1, -1, 63)
FIELD = ("a",), {"a": (OBJECT, 0)}
DTYPES = {
    "object": OBJECT,
    "object without flags": dtype("O8", 3, "|", *NONE, -1, -1, 0),
    "object of a number's size": dtype("O", 3, "<", *NONE, 8, 8, 0),
    "object as a byte order": dtype("8", 3, "|O", *NONE, -1, -1, 0),
    "number with the flags of objects": dtype("f8", 3, "<", *NONE, -1, -1, 63),
    "number of another size": dtype("u1", 3, "|", *NONE, 8, 8, 0),
    "number with a field of objects": dtype("f8", 3, "<", None, *FIELD, 8, 1, 0),
    "number with a sub-array of objects": dtype("f8", 3, "<", (OBJECT, (1,)), None, None, 8, 1, 0),
    "number with metadata": dtype("f8", 4, "<", *NONE, -1, -1, 0, {"a": OBJECT}),
    "record of objects": dtype("V8", 3, "|", None, *FIELD, 8, 1, 0),
    "text": dtype("U2", 3, "<", *NONE, 8, 4, 0),
    "time": dtype("M8", 4, "<", *NONE, -1, -1, 0, (b"s", 1, 1, 1)),
    "no dtype": "O8",
}


def in_arrays(of):
    """Ways to make an array or a scalar of a dtype: of eight bytes, and of a pointer."""
    numbers = [array(of, ONE), Call(SCALAR, of, ONE), Call(BUFFER, ONE, of, (1,), "C")]
    return numbers, [array(of, [POINTER]), Call(np.ndarray, (1,), of, POINTER)]


# ---- more memory or time than a file is worth ---------------------------------------------------


def deflated(content: bytes) -> bytes:
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return file.getvalue()


def overlapping() -> bytes:
    """Return an archive that lists one part four times."""
    content = torch_file({"w": torch.ones(10**5)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = (name.encode() for name in archive.namelist() if name.endswith("data/0"))
        start = archive.start_dir
    at = content.index(name, start) - 46
    record = content[at : at + 46 + len(name) + struct.unpack("<H", content[at + 30 : at + 32])[0]]
    end = content.rindex(b"PK\5\6")
    listed = content[start:end].split(b"PK\6\6")[0] + record * 3
    count = struct.unpack("<H", content[end + 10 : end + 12])[0] + 3
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(listed), start, 0)
    return content[:start] + listed + tail


def text(string: str) -> bytes:
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def repeated(value: bytes, call: bytes) -> bytes:
    """Return a pickled list of what `call` makes of one value (memo 0), 5,000 times."""
    return b"\x80\x03" + value + b"q\x000](" + call * 5000 + b"e."


HALVES, PAIRS = torch.ones(1000).half(), b"K\x01" + b"q\0h\0\x86" * 60
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(K\0tR(K\x01J\0\0\x10\0\x85cnumpy\ndtype\n"
BOMBS = {  # builders of files by what they do
    "an array, again and again": lambda: repeated(
        b"B\0\0\x10\0" + bytes(2**20), ARRAY + text("u1") + b"\x85R\x89h\0tb"
    ),
    "bytes, again and again": lambda: repeated(
        text("a" * 2**20), b"c_codecs\nencode\nh\0" + text("latin1") + b"\x86R"
    ),
    "a tuple, again and again": lambda: repeated(
        b"](" + b"K\1" * 10**6 + b"e", b"c__builtin__\ntuple\nh\0\x85R"
    ),
    "a dict, again and again": lambda: repeated(
        b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(10**5)) + b"u",
        b"ccollections\nOrderedDict\nh\0\x85R",
    ),
    "pairs of pairs": lambda: b"\x80\x02" + PAIRS + b".",
    "a key of pairs of pairs": lambda: b"\x80\x02}" + PAIRS + b"K\1s.",
    "a name of pairs of pairs": lambda: b"\x80\x04" + PAIRS + b"K\1\x93.",
    "a list in itself": lambda: b"\x80\x02]q\0h\0a.",
    "a far place of the memo": lambda: b"\x80\x02K\1r\xff\xff\xff\xff.",
    "a length of bytes": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "a length of a bytearray": lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b".",
    "many marks": lambda: b"\x80\x02" + b"(" * 2 * 10**6 + b".",
    "deep": lambda: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "a safetensors header": lambda: struct.pack("<Q", 2**40) + b"{}",
    "overlapping parts": overlapping,
    "compressed zeros": lambda: deflated(torch_file({"w": torch.zeros(2**22)})),
    # as floats: 400 MB of a file of 2
    "many tensors of one storage": lambda: torch_file(
        dict.fromkeys(map(str, range(100)), torch.ones(10**6).half())
    ),
}
for name, tensor in {
    "one number for 10**12": torch.ones(1).half().expand(10**6, 10**6),
    "one number for nine": torch.ones(()).expand(3, 3),
    "rows that overlap": HALVES.as_strided((999, 999), (1, 0)),
    "two rows that overlap": HALVES.as_strided((2, 999), (1, 1)),
}.items():
    BOMBS[name] = lambda tensor=tensor: torch_file({"w": tensor})
    BOMBS[f"{name}, stream"] = lambda tensor=tensor: torch_file({"w": tensor}, is_zip=False)


def state_dict() -> dict[str, torch.Tensor]:
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


def two_builds(flags: tuple[int, int]) -> bytes:
    """Return a pickle in which a dtype's state changes after an array is made of it."""
    first, second = (pickle.dumps((3, "<", *NONE, -1, -1, n), 2)[2:-1] for n in flags)
    made = b"cnumpy.core.multiarray\n_reconstruct\n(tR(K\1K\1\x85h\xc8K\0C\x08AAAAAAAAtb"
    start = b"\x80\x03}X\1\0\0\0wcnumpy\ndtype\n(X\x02\0\0\0f8K\0K\1tRq\xc8"
    return start + first + b"b0" + made + b"h\xc8" + second + b"b0s."
