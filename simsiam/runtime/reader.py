"""Tensors and plain Python values from a file, and nothing else: no code of the file's is run.

`read` takes what torch.save has written (a zip archive; before torch 1.6 a stream), Paddle's and
others' pickles, and safetensors. The content tells which; the name does not count.

A pickle is a program for a stack machine. `PickleMachine` is one that imports nothing, and
calls only its own makers of tensors. Where the file names something else, a `Placeholder`
stands for it. Numbers in the file are claims: no tensor is larger than its storage, and all
together are no more than `SHARED` times the bytes of the file.
"""

import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Names that share one storage claim it each; PatrickHua's files have two for each weight.
SHARED = 8
# Steps of a pickle's program, and values in what it makes: a ResNet's, with optimizer, has 20,000.
STEPS = 1_000_000
DEPTH = 64  # of dicts in dicts
HEADER = 10_000_000  # bytes of the names in a safetensors file

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what torch.save's streams begin with
DTYPES = (
    "Float=float32 Double=float64 Half=float16 BFloat16=bfloat16 Long=int64 Int=int32 Short=int16 "
    "Char=int8 Byte=uint8 Bool=bool"
)
STORAGES = {
    f"torch.{place}{name}Storage": getattr(torch, dtype)
    for place in ("", "cuda.")
    for name, _, dtype in (pair.partition("=") for pair in DTYPES.split())
}
NUMBERS = re.compile("[<>=|](f[248]|i[1248]|u1|b1)")  # NumPy's names of these dtypes


class UnsupportedFileError(ValueError):
    """A file that says clearly what it is, and is not read."""


class Limits:
    """What a file of `size` bytes may still ask for."""

    def __init__(self, size: int):
        self.room, self.steps = SHARED * size + 2**20, STEPS

    def claim(self, size: int = 0) -> None:
        """Count a step, and bytes of memory. Raises ValueError where there are too many."""
        self.room, self.steps = self.room - size, self.steps - 1
        if min(self.room, self.steps) < 0:
            raise ValueError("it asks for more than the file is worth")


class Placeholder:
    """What stands for an object that is no tensor and no plain value; it holds nothing of it."""


class Dtype:
    """One of NumPy's dtypes, while its pickle is read."""

    def __init__(self, code: str):
        self.code, self.order = code, "="


class Array:
    """One of NumPy's arrays, while its pickle is read; `made` is the tensor of it, or a Left."""

    made: object = Placeholder()


def read(path: str | Path) -> object:
    """Read a file: tensors on the CPU in dicts, lists and tuples, numbers, text, `Placeholder`s.

    NumPy's arrays of numbers come as tensors; each subclass of dict as a dict, a set as a list. An
    entry of a dict whose key is no number, text or None is left out. Raises FileNotFoundError, or
    ValueError, which does not name the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    content = Path(path).read_bytes()
    try:
        return to_plain(load_value(content), Limits(len(content)))
    except (UnsupportedFileError, MemoryError):
        raise
    except Exception as error:  # junk may break the parsers in any way
        raise ValueError("is damaged, or no checkpoint") from error


def load_value(content: bytes) -> object:
    """The values in a file's bytes, with `Array`s and shared containers among them."""
    header = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and header <= min(len(content) - 8, HEADER):
        try:
            from safetensors.torch import load
        except ImportError as error:
            raise UnsupportedFileError("is a safetensors file: pip install safetensors") from error
        return load(content)
    if content[:4] == b"PK\3\4":
        return load_zip(content)
    return PickleMachine(Limits(len(content))).stream(io.BytesIO(content))


def load_zip(content: bytes) -> object:
    """The values in an archive of torch.save."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {part.filename: part for part in archive.infolist()}
        if any(re.match("[^/]+/(constants[.]pkl$|code/)", name) for name in parts):
            raise UnsupportedFileError(
                "is a TorchScript archive, which is a program: save its state_dict()"
            )
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise UnsupportedFileError("is compressed, which no file of torch.save is")
        if sum(part.file_size for part in archive.infolist()) > len(content):
            raise ValueError("parts overlap")
        if archive.testzip() is not None:
            raise ValueError("a checksum is wrong")
        (pickled,) = (name for name in parts if name.count("/") == 1 and name.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in parts and archive.read(f"{folder}byteorder") != b"little":
            raise UnsupportedFileError("has big-endian numbers, which are not read")
        machine = PickleMachine(
            Limits(len(content)), lambda key: archive.read(f"{folder}data/{key}")
        )
        return machine.load(io.BytesIO(archive.read(pickled)))


def to_plain(value: object, limits: Limits, depth: int = 0) -> object:
    """A copy of plain containers, its arrays as tensors.

    Each value counts wherever it is met, so that a list within itself, or a pair of pairs of pairs,
    or a tensor of many names, has an end. Raises ValueError where it is too much.
    """
    value = value.made if isinstance(value, Array) else value
    limits.claim(value.nbytes if isinstance(value, Tensor) else 0)
    if depth > DEPTH:
        raise ValueError("it is too deep")
    if isinstance(value, dict):
        return {key: to_plain(item, limits, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_plain(item, limits, depth + 1) for item in value)
    plain = value is None or isinstance(value, bool | int | float | str | bytes)
    return value if plain or getattr(value, "dtype", None) in STORAGES.values() else Placeholder()


# ---- the stack machine --------------------------------------------------------------------------

NEW = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8".split()
)
KEYS = (str, int, float, bool, bytes, type(None))


class PickleMachine:
    """Runs pickles' programs, as pickletools reads them.

    `member`: the content of a storage by its key; without it the storages follow the pickle, as in
    a stream.
    """

    def __init__(self, limits: Limits, member: Callable[[str], bytes] | None = None):
        self.limits, self.claim, self.member = limits, limits.claim, member
        self.storages: dict[str, Tensor] = {}
        self.makers = {
            "collections.OrderedDict": self.mapping,
            "collections.defaultdict": lambda _kind=None, *items: self.mapping(*items),
            "torch.Size": self.row,
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch.storage._load_from_bytes": self.inner,
            "numpy.dtype": lambda code, *_: Dtype(code),
            "_codecs.encode": self.encoded,
        }
        for module in ("__builtin__", "builtins"):
            self.makers[f"{module}.tuple"] = self.row  # Paddle's: a name and an array
            self.makers[f"{module}.bytes"] = lambda *args: Placeholder() if args else b""
        for core in ("numpy.core", "numpy._core"):
            self.makers |= {
                f"{core}.multiarray._reconstruct": lambda *_: Array(),
                f"{core}.multiarray.scalar": self.scalar,
                f"{core}.numeric._frombuffer": self.buffer,
            }

    def load(self, file: io.BytesIO) -> object:
        """The value of the pickle at the file's place, which is its end afterwards."""
        self.stack, self.marks, memo = [], [], {}
        stack = self.stack
        for code, arg, _ in pickletools.genops(file):
            name = code.name
            self.claim()
            if name in LITERALS:
                if isinstance(arg, int) and arg.bit_length() > 128:
                    raise ValueError("a number of too many digits")
                stack.append(arg)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name in NEW:
                stack.append(NEW[name]())
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME") and not self.collect(name):
                self.refer(name, arg)
        raise ValueError("the pickle has no end")

    def since_mark(self) -> list:
        """What is on the stack since the last mark, taken from it."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def collect(self, name: str) -> bool:
        """A step on marks and containers; False for one of another kind."""
        stack = self.stack
        if name == "MARK":
            self.marks.append(len(stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            number = int(name[-1])
            stack[-number:] = [tuple(stack[-number:])]
        elif name in ("TUPLE", "FROZENSET"):
            stack.append(tuple(self.since_mark()))
        elif name == "LIST":
            stack.append(self.since_mark())
        elif name == "DICT":
            stack.append(set_items({}, self.since_mark()))
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self.since_mark()
            set_items(stack[-1], items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self.since_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        else:
            return False
        return True

    def refer(self, name: str, arg: object) -> None:
        """A step on classes, functions and their objects, or a rare one."""
        stack = self.stack
        if name == "GLOBAL":
            stack.append(self.named(*arg.split(" ")))
        elif name == "STACK_GLOBAL":
            stack.append(self.named(stack.pop(-2), stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            maker, args = stack.pop(-2), stack.pop()
            # Nothing on the stack can be called but what `named` has put there.
            stack.append(
                maker(*args) if callable(maker) and isinstance(args, tuple) else Placeholder()
            )
        elif name == "NEWOBJ_EX":
            stack[-3:] = [Placeholder()]
        elif name in ("INST", "OBJ"):
            self.since_mark()
            stack.append(Placeholder())
        elif name == "BUILD":
            self.build(stack[-2], stack.pop())
        elif name == "BINPERSID":
            stack.append(self.persistent(stack.pop()))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self.since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            raise ValueError(f"{name} is in no checkpoint")

    def named(self, module: object, name: object) -> object:
        """What stands for a class or function: a maker, a storage's dtype, or a Left."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        name = f"{module}.{name}"
        return self.makers.get(name) or STORAGES.get(name) or Placeholder()

    def build(self, target: object, state: object) -> None:
        """Give a dtype or an array its state; that of others is of no use."""
        if isinstance(target, Dtype):
            target.order = state[1]
        elif isinstance(target, Array):
            *_, shape, dtype, fortran, data = state
            target.made = self.array(data, dtype, shape, "F" if fortran else "C")

    # ---- makers: of Python

    def mapping(self, items: object = ()) -> dict:
        """The dict of an OrderedDict's arguments: none, a dict, or a list of pairs."""
        self.claim(100 * len(items))
        pairs = items.items() if isinstance(items, dict) else items
        return set_items({}, [part for key, value in pairs for part in (key, value)])

    def row(self, items: object = ()) -> tuple | Placeholder:
        """A tuple of a tuple or list."""
        if not isinstance(items, list | tuple):
            return Placeholder()
        self.claim(8 * len(items))
        return tuple(items)

    def encoded(self, text: str, *_: object) -> bytes:
        """Bytes, as protocol 2 has them."""
        self.claim(len(text))
        return text.encode("latin1")

    # ---- makers: of torch

    def persistent(self, name: object) -> Tensor | Placeholder:
        """A storage, as a tensor of one dimension."""
        if not isinstance(name, tuple) or name[:1] != ("storage",):
            return Placeholder()
        _, dtype, key, _, number, *view = name
        if not isinstance(dtype, torch.dtype):
            return Placeholder()
        if not isinstance(key, str) or not isinstance(number, int) or number < 0:
            raise ValueError("a storage without a size")
        if key not in self.storages:
            if self.member and number:  # frombuffer raises where the content is shorter
                content = bytearray(self.member(key))
                self.storages[key] = torch.frombuffer(content, dtype=dtype, count=number)
            else:
                self.claim(number * dtype.itemsize)
                self.storages[key] = torch.zeros(number, dtype=dtype)
        storage = self.storages[key]
        if storage.dtype != dtype:
            raise ValueError("a storage of two dtypes")
        if view and view[0] is not None:  # a part of it: torch before 0.4
            _, start, length = view[0]
            if not 0 <= start <= start + length <= len(storage):
                raise ValueError("a part of a storage is not within it")
            storage = storage[start : start + length]
        return storage

    def tensor(
        self, storage: object, offset: int, size: tuple, stride: tuple, *rest: object
    ) -> Tensor | Placeholder:
        """A tensor over a storage, within which it must lie, and whose numbers it has once each."""
        if not isinstance(storage, Tensor):
            return Placeholder()
        lists = isinstance(size, tuple) and isinstance(stride, tuple)
        if not lists or len(size) != len(stride) or len(size) > 16 or any(rest[2:]):
            raise ValueError("no tensor that is read")
        numbers = (offset, *size, *stride)
        if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
            raise ValueError("no tensor's numbers")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count == 0:
            return torch.empty(size, dtype=storage.dtype)
        if storage.dim() != 1 or count > len(storage) or last >= len(storage):
            raise ValueError("a tensor is larger than its storage")
        return storage.as_strided(size, stride, storage.storage_offset() + offset)

    def inner(self, content: bytes) -> object:
        """A storage that is pickled on its own, as pickle.dump of a tensor has it."""
        self.claim(len(content))
        machine = PickleMachine(self.limits)
        del machine.makers["torch.storage._load_from_bytes"]  # once is enough
        return machine.stream(io.BytesIO(content))

    def stream(self, file: io.BytesIO) -> object:
        """The value of a pickle, or that of torch.save's stream: pickles, then the storages."""
        first = self.load(file)
        if type(first) is not int or first != MAGIC:
            return first
        if self.load(file) != PROTOCOL or not self.load(file)["little_endian"]:
            raise ValueError("a stream of another kind")
        found = self.load(file)
        for key in self.load(file):
            storage = self.storages.pop(key if isinstance(key, str) else "")
            number = int.from_bytes(file.read(8), "little")
            content = storage.view(torch.uint8).numpy()
            if number != len(storage) or file.readinto(content) != len(content):
                raise ValueError("a storage is not as long as it says")
        if self.storages:
            raise ValueError("a storage is missing")
        return found

    # ---- makers: of NumPy

    def array(self, data: object, dtype: Dtype, shape: object, order: str) -> Tensor | Placeholder:
        """A tensor of an array of numbers; else a Left."""
        if not isinstance(dtype, Dtype) or not NUMBERS.fullmatch(dtype.order + dtype.code):
            return Placeholder()
        shape = shape if isinstance(shape, tuple) else (shape,)
        self.claim(2 * len(data) + 1)
        data = data.encode("latin1") if isinstance(data, str) else data
        kind = np.dtype(dtype.order + dtype.code)
        found = np.frombuffer(data, kind).reshape(shape, order=order)
        return torch.from_numpy(found.astype(kind.newbyteorder("="), order="C"))

    def scalar(self, dtype: Dtype, data: object = b"") -> object:
        """A number of NumPy's as one of Python's."""
        found = self.array(data, dtype, (), "C")
        return found.item() if isinstance(found, Tensor) else found

    def buffer(self, data: object, dtype: Dtype, shape: object, order: str) -> Array:
        """An array of pickle's protocol 5."""
        made = Array()
        self.build(made, (shape, dtype, order == "F", data))
        return made


def set_items(target: object, items: list) -> object:
    """Keys and values in turn into a dict; where they are an object's, they are left out."""
    if len(items) % 2:
        raise ValueError("a key without a value")
    if isinstance(target, dict):
        pairs = zip(items[::2], items[1::2], strict=True)
        target.update((key, value) for key, value in pairs if isinstance(key, KEYS))
    return target
