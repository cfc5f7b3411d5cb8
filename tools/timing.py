"""What benchmarks share: timing of functions in turns, and main.py's training on any images."""

import contextlib
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import main
import utils
from simsiam.data.loader import Data
from simsiam.runtime import devices
from simsiam.training.recipes import PretrainConfig
from simsiam.training.state import TrainState


class Row(NamedTuple):
    """A result: a value of this project in a unit, and a peer's value, if there is one."""

    benchmark: str
    value: float
    unit: str
    peer: float | None = None
    peer_name: str | None = None


def machine_name(device: torch.device) -> str:
    """Return the name of a GPU or of the processor; of another accelerator its type."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def median_seconds(
    *functions: Callable[[], object], rounds: int = 5, device: torch.device | None = None
) -> list[float]:
    """Return the median seconds of each function, called in turns (A B A B ...).

    Each is called once before to warm up. With a `device`, each call ends when its work is done.
    """
    is_async = device is not None and device.type != "cpu"
    wait = torch.accelerator.synchronize if is_async else lambda: None
    seconds = [[] for _ in functions]
    for i in range(rounds + 1):
        for times, function in zip(seconds, functions, strict=True):
            wait()
            start = time.perf_counter()
            function()
            wait()
            if i > 0:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def noise(*shape: int) -> Tensor:
    """Return random bytes, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def read_config(flags: str) -> tuple[PretrainConfig, torch.device]:
    """Return the config of main.py's flags, its `amp` resolved, and its device, set up."""
    config, _ = utils.ConfigParser("tools.bench", None, PretrainConfig).read(flags.split())
    device, amp = devices.setup_device(config)
    return dataclasses.replace(config, amp=amp), device


def training_state(flags: str, images: Tensor | Data) -> tuple[PretrainConfig, TrainState]:
    """Return main.py's config and state to train on images that are in memory.

    `flags`: of main.py. `images`: a data set, or uint8 images without labels, N x C x S x S or
    N x views x C x S x S (crops from loader workers).
    """
    config, device = read_config(flags)
    if isinstance(images, Tensor):
        images = Data(images, torch.zeros(len(images), dtype=torch.int64), None, None, [])
    net = main.initial_network(config)
    encoder = main.encoder_config(config, images)
    return config, main.make_state(config, net, images.to(device), encoder, device)


def epoch_of_steps(config: PretrainConfig, state: TrainState) -> Callable[[], object]:
    """Return a function that trains an epoch with main.py's loop."""
    return lambda: list(main.train(state, 0, config))
