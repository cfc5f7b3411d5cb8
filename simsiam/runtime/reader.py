"""Read tensors and plain Python values from untrusted files, without running code from them.

`read` takes archives of torch.save, its streams from before torch 1.6, pickles (Paddle,
detectron2, ...) and safetensors. The content tells the format; the file's name does not count.

A pickle is a program for a stack machine. `PickleMachine` executes it without importing anything:
it calls its own constructors of tensors only. Other classes and functions that the file names
become a `Placeholder`. Sizes in the file are claims: no tensor may exceed its storage, and all
tensors together may not exceed `SHARED` times the size of the file.
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

# Tensors that share a storage count it once each: PatrickHua's files name every weight twice.
SHARED = 8
# Opcodes of a pickle, and values in its result. A ResNet with its optimizer needs 20,000.
STEPS = 1_000_000
DEPTH = 64  # of nested containers
HEADER = 10_000_000  # bytes of a safetensors header

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the start of a torch.save stream
DTYPES = "float double half bfloat16 long int short int8 uint8 bool".split()
CLASSES = "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()
STORAGES = {
    f"torch.{place}{name}Storage": getattr(torch, dtype)
    for place in ("", "cuda.")
    for name, dtype in zip(CLASSES, DTYPES, strict=True)
}
NUMBERS = re.compile("[<>=|](f[248]|i[1248]|u1|b1)")  # NumPy dtypes that torch has, too
# How NumPy pickles the state of such a dtype after its byte order: no sub-array, names or fields,
# default size and alignment, no flags.
NUMBER_STATE = (None, None, None, -1, -1, 0)


class UnsupportedFileError(ValueError):
    """A file of a known format that is not read, with the reason."""


class Limits:
    """Budget of steps and bytes for a file of `size` bytes."""

    def __init__(self, size: int):
        self.bytes, self.steps = SHARED * size + 2**20, STEPS

    def claim(self, size: int = 0) -> None:
        """Take one step and `size` bytes. Raises ValueError where none are left."""
        self.bytes, self.steps = self.bytes - size, self.steps - 1
        if min(self.bytes, self.steps) < 0:
            raise ValueError("needs more memory or time than its size justifies")


class Placeholder:
    """Placeholder for an object that is not loaded."""


class Dtype:
    """A NumPy dtype while its pickle is read."""

    def __init__(self, code: str):
        self.code, self.order = code, "="


class Array:
    """A NumPy array while its pickle is read; `tensor` is its result, once its state is known."""

    tensor: Tensor | Placeholder = Placeholder()


def read(path: str | Path) -> object:
    """Read a file: dicts, lists and tuples of CPU tensors, numbers, text and `Placeholder`s.

    NumPy arrays of numbers become tensors, subclasses of dict dicts, sets lists. Dict entries
    whose key is no number, text or None are dropped. Raises FileNotFoundError, or ValueError,
    which does not name the file.
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
    """Return the value in a file; it may contain `Array`s and shared containers."""
    header = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and header <= min(len(content) - 8, HEADER):
        try:
            from safetensors.torch import load
        except ImportError as error:
            raise UnsupportedFileError("is a safetensors file: pip install safetensors") from error
        return load(content)
    if content[:4] == b"PK\3\4":
        return load_zip(content)
    return PickleMachine(Limits(len(content))).load_stream(io.BytesIO(content))


def load_zip(content: bytes) -> object:
    """Return the value in an archive of torch.save; every part's checksum is verified."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts, unread = archive.infolist(), set(archive.namelist())
        if any(re.match("[^/]+/(constants[.]pkl$|code/)", name) for name in unread):
            raise UnsupportedFileError("is a TorchScript program: save its state_dict() instead")
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise UnsupportedFileError("is compressed, which no file of torch.save is")
        if len(parts) > len(unread) or sum(part.file_size for part in parts) > len(content):
            raise ValueError("parts overlap")

        def member(name: str) -> bytes:
            unread.discard(name)
            return archive.read(name)  # raises where the checksum is wrong

        (pickled,) = (name for name in unread if re.fullmatch("[^/]+/data[.]pkl", name))
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in unread and member(f"{folder}byteorder") != b"little":
            raise UnsupportedFileError("has big-endian numbers, which are not read")
        machine = PickleMachine(Limits(len(content)), lambda key: member(f"{folder}data/{key}"))
        value = machine.load(io.BytesIO(member(pickled)))
        for name in list(unread):
            member(name)
        return value


def to_plain(value: object, limits: Limits, depth: int = 0) -> object:
    """Copy nested containers, with tensors in place of `Array`s.

    A value counts each time it occurs, so that a list within itself, pairs of pairs of pairs, or a
    tensor under many names come to an end. Raises ValueError where `limits` or DEPTH are exceeded.
    """
    value = value.tensor if isinstance(value, Array) else value
    limits.claim(value.nbytes if isinstance(value, Tensor) else 0)
    if depth > DEPTH:
        raise ValueError("is nested too deep")
    if isinstance(value, dict):
        return {key: to_plain(item, limits, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_plain(item, limits, depth + 1) for item in value)
    is_tensor = isinstance(value, Tensor) and value.dtype in STORAGES.values()
    return value if is_tensor or isinstance(value, KEYS) else Placeholder()


# ---- the stack machine --------------------------------------------------------------------------

EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8".split()
)
KEYS = (str, int, float, bool, bytes, type(None))  # also the plain values in a result


class PickleMachine:
    """Executes pickles as pickletools disassembles them.

    `member`: returns the bytes of a storage by its key; None for a stream, in which the storages
    follow the pickle.
    """

    def __init__(self, limits: Limits, member: Callable[[str], bytes] | None = None):
        self.limits, self.claim, self.member = limits, limits.claim, member
        self.storages: dict[str, Tensor] = {}
        self.constructors = {
            "collections.OrderedDict": self.as_dict,
            "collections.defaultdict": lambda _factory=None, *items: self.as_dict(*items),
            "torch.Size": self.as_tuple,
            "torch._utils._rebuild_tensor": self.rebuild_tensor,
            "torch._utils._rebuild_tensor_v2": self.rebuild_tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch.storage._load_from_bytes": self.nested_stream,
            "numpy.dtype": lambda code, *_: Dtype(code),
            "_codecs.encode": self.encode,
        }
        for module in ("__builtin__", "builtins"):
            self.constructors[f"{module}.tuple"] = self.as_tuple  # Paddle: a name and an array
            self.constructors[f"{module}.bytes"] = lambda *args: Placeholder() if args else b""
        for core in ("numpy.core", "numpy._core"):
            self.constructors |= {
                f"{core}.multiarray._reconstruct": lambda *_: Array(),
                f"{core}.multiarray.scalar": self.numpy_scalar,
                f"{core}.numeric._frombuffer": self.numpy_tensor,  # protocol 5
            }

    def load(self, file: io.BytesIO) -> object:
        """Execute the pickle at the file's position, up to its end; return its value."""
        stack, marks, memo = [], [], {}

        def pop_mark() -> list:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for opcode, arg, _ in pickletools.genops(file):
            self.claim()
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case name if name in LITERALS:
                    if isinstance(arg, int) and arg.bit_length() > 128:
                        raise ValueError("a number of too many digits")
                    stack.append(arg)
                case name if name in CONSTANTS:
                    stack.append(CONSTANTS[name])
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo[arg])
                case name if name in EMPTY:
                    stack.append(EMPTY[name]())
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    length = int(name[-1])
                    stack[-length:] = [tuple(stack[-length:])]
                case "TUPLE" | "FROZENSET":
                    stack.append(tuple(pop_mark()))
                case "LIST":
                    stack.append(pop_mark())
                case "DICT":
                    stack.append(set_items({}, pop_mark()))
                case "SETITEM" | "SETITEMS" as name:
                    items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else pop_mark()
                    set_items(stack[-1], items)
                case "APPEND" | "APPENDS" | "ADDITEMS" as name:
                    items = [stack.pop()] if name == "APPEND" else pop_mark()
                    if isinstance(stack[-1], list):
                        stack[-1].extend(items)
                case "GLOBAL":
                    stack.append(self.find_global(*arg.split(" ")))
                case "STACK_GLOBAL":
                    stack.append(self.find_global(stack.pop(-2), stack.pop()))
                case "REDUCE" | "NEWOBJ":
                    # The only callables on the stack are constructors, from `find_global`.
                    function, args = stack.pop(-2), stack.pop()
                    is_call = callable(function) and isinstance(args, tuple)
                    stack.append(function(*args) if is_call else Placeholder())
                case "NEWOBJ_EX":
                    stack[-3:] = [Placeholder()]
                case "INST" | "OBJ":
                    pop_mark()
                    stack.append(Placeholder())
                case "BUILD":
                    state = stack.pop()
                    self.set_state(stack[-1], state)
                case "BINPERSID":
                    stack.append(self.load_storage(stack.pop()))
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    pop_mark()
                case "DUP":
                    stack.append(stack[-1])
                case "STOP":
                    return stack.pop()
                case name:
                    raise ValueError(f"{name} is in no checkpoint")
        raise ValueError("the pickle has no end")

    def load_stream(self, file: io.BytesIO) -> object:
        """Return the value of a pickle or of a torch.save stream: four pickles, then storages."""
        first = self.load(file)
        if type(first) is not int or first != MAGIC:
            return first
        if self.load(file) != PROTOCOL or not self.load(file)["little_endian"]:
            raise ValueError("a stream of another protocol or byte order")
        value = self.load(file)
        for key in self.load(file):
            storage = self.storages.pop(key if isinstance(key, str) else "")
            length = int.from_bytes(file.read(8), "little")
            content = storage.view(torch.uint8).numpy()
            if length != len(storage) or file.readinto(content) != len(content):
                raise ValueError("a storage is not as long as it says")
        if self.storages:
            raise ValueError("a storage is missing")
        return value

    def find_global(self, module: object, name: object) -> object:
        """Return a constructor, the dtype of a storage class, or a Placeholder."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        name = f"{module}.{name}"
        return self.constructors.get(name) or STORAGES.get(name) or Placeholder()

    def set_state(self, target: object, state: object) -> None:
        """Apply the pickled state of a dtype or an array; ignore that of other objects."""
        if isinstance(target, Dtype):
            _, order, *rest = state
            # Sub-arrays, fields, sizes and flags can make an object dtype of a number's name.
            target.order = order if tuple(rest) == NUMBER_STATE else ""
        elif isinstance(target, Array):
            *_, shape, dtype, fortran, data = state
            target.tensor = self.numpy_tensor(data, dtype, shape, "F" if fortran else "C")

    # ---- constructors: Python

    def as_dict(self, items: object = ()) -> dict:
        """Return the dict of OrderedDict's arguments: none, a dict, or a list of pairs."""
        self.claim(100 * len(items))
        pairs = items.items() if isinstance(items, dict) else items
        return set_items({}, [part for key, value in pairs for part in (key, value)])

    def as_tuple(self, items: object = ()) -> tuple | Placeholder:
        """Return the tuple of a list or tuple."""
        if not isinstance(items, list | tuple):
            return Placeholder()
        self.claim(8 * len(items))
        return tuple(items)

    def encode(self, text: str, *_: object) -> bytes:
        """Return bytes from the text that stands for them in protocol 2."""
        self.claim(len(text))
        return text.encode("latin1")

    # ---- constructors: torch

    def load_storage(self, name: object) -> Tensor | Placeholder:
        """Return a storage by its persistent id, as a tensor of one dimension."""
        if not isinstance(name, tuple) or name[:1] != ("storage",):
            return Placeholder()
        _, dtype, key, _, length, *view = name
        if not isinstance(dtype, torch.dtype):
            return Placeholder()
        if not isinstance(key, str) or not isinstance(length, int) or length < 0:
            raise ValueError("a storage without a size")
        if key not in self.storages:
            if self.member and length:  # frombuffer raises where the content is shorter
                content = bytearray(self.member(key))
                self.storages[key] = torch.frombuffer(content, dtype=dtype, count=length)
            else:
                self.claim(length * dtype.itemsize)
                self.storages[key] = torch.zeros(length, dtype=dtype)
        storage = self.storages[key]
        if storage.dtype != dtype:
            raise ValueError("a storage of two dtypes")
        if view and view[0] is not None:  # a part of it: torch before 0.4
            _, start, length = view[0]
            if not 0 <= start <= start + length <= len(storage):
                raise ValueError("a part of a storage is not within it")
            storage = storage[start : start + length]
        return storage

    def rebuild_tensor(
        self, storage: object, offset: int, size: tuple, stride: tuple, *rest: object
    ) -> Tensor | Placeholder:
        """Return a view of a storage that lies within it and has no more elements than it."""
        if not isinstance(storage, Tensor):
            return Placeholder()
        is_pair = isinstance(size, tuple) and isinstance(stride, tuple)
        if not is_pair or len(size) != len(stride) or len(size) > 16 or any(rest[2:]):
            raise ValueError("a tensor of an unknown kind")
        numbers = (offset, *size, *stride)
        if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
            raise ValueError("a tensor's size, stride or offset is none")
        count = math.prod(size)
        if count == 0:
            return torch.empty(size, dtype=storage.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if storage.dim() != 1 or count > len(storage) or last >= len(storage):
            raise ValueError("a tensor is larger than its storage")
        return storage.as_strided(size, stride, storage.storage_offset() + offset)

    def nested_stream(self, content: bytes) -> object:
        """Return the storage that pickle.dump of a tensor has as a torch.save stream of its own."""
        self.claim(len(content))
        machine = PickleMachine(self.limits)
        del machine.constructors["torch.storage._load_from_bytes"]  # no stream within a stream
        return machine.load_stream(io.BytesIO(content))

    # ---- constructors: NumPy

    def numpy_tensor(
        self, data: object, dtype: object, shape: object, order: str
    ) -> Tensor | Placeholder:
        """Return an array of numbers as a tensor; a Placeholder for another dtype."""
        if not isinstance(dtype, Dtype) or not NUMBERS.fullmatch(dtype.order + dtype.code):
            return Placeholder()
        shape = shape if isinstance(shape, tuple) else (shape,)
        self.claim(2 * len(data) + 1)
        data = data.encode("latin1") if isinstance(data, str) else data
        kind = np.dtype(dtype.order + dtype.code)
        array = np.frombuffer(data, kind).reshape(shape, order=order)
        return torch.from_numpy(array.astype(kind.newbyteorder("="), order="C"))

    def numpy_scalar(self, dtype: Dtype, data: object = b"") -> object:
        """Return a NumPy number as a Python number."""
        value = self.numpy_tensor(data, dtype, (), "C")
        return value.item() if isinstance(value, Tensor) else value


def set_items(target: object, items: list) -> object:
    """Put alternating keys and values into a dict; leave out keys that are not plain values."""
    if len(items) % 2:
        raise ValueError("a key without a value")
    if isinstance(target, dict):
        pairs = zip(items[::2], items[1::2], strict=True)
        target.update((key, value) for key, value in pairs if isinstance(key, KEYS))
    return target
