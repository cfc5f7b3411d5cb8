"""Code shared by the tools: flags of main.py, runs of commands, encoders, images and tables."""

import argparse
import contextlib
import os
import platform
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import utils
from simsiam.data.datasets import load_dataset
from simsiam.data.loader import Data
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.plots.style import FORMATS
from simsiam.runtime import distributed
from simsiam.runtime.config import RunConfig, add_option
from simsiam.runtime.files import RunError, read_csv
from simsiam.training.recipes import PretrainConfig

RUN_OPTIONS = ("device", "amp", "num_workers", "bad_images")
OPTIONS = PretrainConfig.__dataclass_fields__
DEVICE_HELP = f"{OPTIONS['device'].metadata['help']} (auto)"
MODEL_HELP = "a checkpoint of main.py, linear.py or another project"


def add_main_options(
    parser: utils.Parser, *names: str, note: str = "", default: object = None
) -> None:
    """Add flags of main.py by name. `note`: what applies if they are left out, for the help."""
    for name in names:
        text = OPTIONS[name].metadata["help"] + (f" ({note})" if note else "")
        add_option(parser, name, OPTIONS[name].metadata["kind"], text.replace("%", "%%"))
        parser.set_defaults(**{name: default})


def add_run_options(parser: utils.Parser) -> None:
    """Add --device, --amp, --num_workers and --bad_images: all that `setup_device` reads."""
    for name in RUN_OPTIONS:
        default = RunConfig.__dataclass_fields__[name].default
        add_main_options(parser, name, note=str(default), default=default)
    parser.set_defaults(deterministic=False)


def add_encoder_options(parser: utils.Parser) -> None:
    """Add the flags of a tool that runs an encoder of any project: device and input."""
    add_run_options(parser)
    utils.add_source_options(parser)


def run_script(script: str, *options: object) -> None:
    """Run main.py or linear.py in a process of its own. Raises RunError with its last words."""
    command = [sys.executable, Path(utils.__file__).with_name(script), *options]
    process = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if process.returncode:
        raise RunError(process.stderr.strip() or f"{script} ended with {process.returncode}")


def cpu_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))


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


def read_rows(table: str | Path, text: Sequence[str] = ()) -> list[dict]:
    """Return the rows of a table as `read_csv`; none before the table exists."""
    return read_csv(table, text) if Path(table).is_file() else []


def open_source(args: Namespace) -> LoadedCheckpoint:
    """Open the checkpoint at --model_path and log its notes. Raises as `LoadedCheckpoint.open`."""
    source = LoadedCheckpoint.open(args.model_path, **utils.source_settings(args))
    for note in source.notes:
        distributed.log(f"{args.model_path}: {note}")
    return source


def load_images(
    source: LoadedCheckpoint, name: str, root: str, split_names: list[str] | None, args: Mapping
) -> Data:
    """Load a data set, decoded as the encoder's training images were. Raises as `load_dataset`.

    `args`: num_workers and bad_images.
    """
    return load_dataset(
        name,
        root,
        source.encoder["image_size"],
        args["num_workers"],
        args["bad_images"],
        decode=source.decode,
        split_names=split_names,
    )


def images_of_run(source: LoadedCheckpoint, args: Mapping, data_root: str | None = None) -> Data:
    """Return the images that a run of main.py trained on. Raises and `args` as `load_images`.

    `data_root`: where the images are now, if they moved.
    """
    config = source.config
    root = data_root or config.data_root
    images = load_images(source, config.data_name, root, config.split_names, args)
    return images if config.train_size is None else images.subset(config.train_size, config.seed)


def picture_path(text: str) -> str:
    """Return the path of a picture: an argparse type, which checks that its format exists."""
    if picture_format(text) not in FORMATS:
        endings = ", ".join(f".{name}" for name in FORMATS)
        raise argparse.ArgumentTypeError(f"{text}: choose an ending of {endings}")
    return text


def picture_format(path: str) -> str:
    """Return the ending of a path in lower case, without the dot."""
    return Path(path).suffix.lower().removeprefix(".")
