"""The device of a run: which one, its precision, its memory, and whether it can compile."""

import contextlib
import ctypes
import logging
import os
from argparse import Namespace

import torch
import torch.nn.functional as F

from simsiam.runtime import distributed


def pick_device(name: str) -> torch.device:
    """`auto` is the accelerator torch finds (cuda, mps, ...), else cpu.

    Raises ValueError for a device that is not there.
    """
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        usable = device.type in ("cpu", accelerator.type if accelerator else "cpu")
        torch.zeros(1, device=device if usable else "cpu")
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        there = ["cpu"] + ([accelerator.type] if accelerator else [])
        raise ValueError(f"--device {name}: is not there; choose auto or {' or '.join(there)}")
    return device


def set_up(args: Namespace) -> tuple[torch.device, str]:
    """The device of the flags, and its amp: bf16, fp16 or off. Each rank has its own device.

    Raises ValueError for one that is not there, and where --compile cannot work on it.
    """
    device, amp = pick_device(args.device), args.amp
    if distributed.is_distributed() and device.type != "cpu":
        device = distributed.local_device(device.type)
    elif device.index is not None and device.type not in ("cpu", "mps"):
        torch.accelerator.set_device_index(device.index)  # else some work goes to the first one
    if amp == "auto":
        # On GPUs before Ampere bf16 is emulated, and cuDNN has no convolutions of it.
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if native else "off"
    torch.backends.cudnn.benchmark = not args.deterministic  # images have one size
    if args.deterministic:  # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.deterministic)
    if device.type == "cpu":
        keep_memory()
    if getattr(args, "compile", False):  # not all tools have the flag
        try_to_compile(device)
    return device, amp


def try_to_compile(device: torch.device) -> None:
    """Compile a trifle, for the network is compiled only at its first step, when the run has begun.

    Raises ValueError where torch.compile does not work: most often a compiler is missing.
    """
    logging.disable(logging.WARNING)  # torch's, of a CUDA_HOME without a GPU
    try:
        torch.compile(F.silu)(torch.zeros(2, device=device))
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if not line.startswith("backend=")]
        raise ValueError(
            f"--compile: torch.compile does not work here ({lines[0] if lines else error}): "
            "install a C++ compiler, such as g++, or leave out --compile"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


# Multiply-adds an image from which on CPUs that have units for bf16 train in it.
BF16_FROM = 40e6


def precision_of_training(device: torch.device, asked: str, amp: str, multiply_adds: int) -> str:
    """The amp of a run that trains: as `set_up` says, but where `asked` is auto bf16 on CPUs too.

    There with units for it alone (AVX512-BF16 or AMX), and for networks from BF16_FROM on: smaller
    ones gain less, and take minutes (measured: docs/results.md, "Speed").
    """
    if asked == "auto" and device.type == "cpu" and multiply_adds >= BF16_FROM and has_bf16_units():
        return "bf16"
    return amp


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 in hardware, as oneDNN uses it."""
    units = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch before 2.10 cannot tell
    return any(units.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))


def keep_memory() -> None:
    """Let malloc keep what is freed, for a step needs the same memory as the one before.

    By default glibc gives large blocks back to the system, whose page faults then took a tenth of
    the time of a ResNet-18 step on two cores. Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Autocast to `amp`: bf16, fp16 or off."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")
