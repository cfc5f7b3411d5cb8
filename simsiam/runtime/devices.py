"""Device of a run: selection, precision, memory, and a check that it can compile."""

import contextlib
import ctypes
import logging
import os
from argparse import Namespace

import torch
import torch.nn.functional as F

from simsiam.runtime import distributed


def pick_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is the accelerator that torch finds, else the CPU.

    Raises ValueError for a device that this machine does not have.
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
        choices = ["auto", "cpu"] + ([accelerator.type] if accelerator else [])
        raise ValueError(f"--device {name}: not available here; choose {', '.join(choices)}")
    return device


def setup_device(args: Namespace) -> tuple[torch.device, str]:
    """Set up the device of --device for this process; return it and its amp (bf16, fp16 or off).

    With --ddp each rank gets the accelerator of its local rank. Raises ValueError if the device is
    missing, or if --compile cannot work on it.
    """
    device, amp = pick_device(args.device), args.amp
    if distributed.is_distributed() and device.type != "cpu":
        device = distributed.local_device(device.type)
    elif device.index is not None and device.type not in ("cpu", "mps"):
        # Operations that name no device would otherwise go to the first one.
        torch.accelerator.set_device_index(device.index)
    if amp == "auto":
        # On GPUs before Ampere bf16 is emulated, and cuDNN has no bf16 convolutions.
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if native else "off"
    torch.backends.cudnn.benchmark = not args.deterministic  # images have one size
    if args.deterministic:  # cuBLAS reads the variable when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.deterministic)
    if device.type == "cpu":
        keep_freed_memory()
    if getattr(args, "compile", False):  # not all tools have the flag
        check_compile(device)
    return device, amp


def check_compile(device: torch.device) -> None:
    """Compile one operation, since the network is compiled only in its first step.

    Raises ValueError where torch.compile does not work: most often a compiler is missing.
    """
    logging.disable(logging.WARNING)  # torch warns of a CUDA_HOME without a GPU
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


# Multiply-adds per image from which bf16 pays on a CPU: smaller networks gain less, and train in
# minutes anyway (docs/results.md, "Speed").
BF16_MIN_FLOPS = 40e6


def training_precision(device: torch.device, flag: str, amp: str, multiply_adds: int) -> str:
    """Return the amp for training: that of `setup_device`, or bf16 where it pays on a CPU.

    `flag`: the value of --amp; only `auto` is changed. `multiply_adds`: of the network, per image.
    """
    if flag != "auto" or device.type != "cpu" or multiply_adds < BF16_MIN_FLOPS:
        return amp
    units = getattr(torch.cpu, "get_capabilities", dict)()  # since PyTorch 2.10
    has_bf16 = any(units.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    return "bf16" if has_bf16 else amp


def keep_freed_memory() -> None:
    """Make glibc's malloc keep large freed blocks, which each step allocates again.

    Otherwise glibc returns them to the system, whose page faults took a tenth of the time of a
    ResNet-18 step on two cores. Without effect on other C libraries.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the autocast context of an amp: bf16, fp16 or off."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")
