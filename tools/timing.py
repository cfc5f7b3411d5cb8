"""Functions timed side by side, and on what."""

import contextlib
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def machine_name(device: torch.device) -> str:
    """A GPU's name, as its driver tells it, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def in_turns(
    *functions: Callable[[], object], rounds: int = 5, wait: Callable[[], object] = lambda: None
) -> list[float]:
    """Median seconds of each function, called in turns after a call of each to warm up.

    `wait`: until a device has done what it was told.
    """
    seconds = [[] for _ in functions]
    for i in range(rounds + 1):
        for times, function in zip(seconds, functions, strict=True):
            wait()
            begun = time.perf_counter()
            function()
            wait()
            if i > 0:
                times.append(time.perf_counter() - begun)
    return [statistics.median(times) for times in seconds]
