"""What tools have in common: flags of those that run an encoder, and of those that draw."""

import argparse
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import utils
from simsiam.data.datasets import load_dataset
from simsiam.data.loader import Data
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.plots.style import FORMATS
from simsiam.runtime import distributed
from simsiam.runtime.config import AMP, WORKERS, default_workers


def encoder_flags(parser: utils.Parser) -> None:
    """The flags of a tool that runs an encoder of any origin: `running_flags`, and its input's."""
    running_flags(parser)
    utils.add_source_options(parser)


def running_flags(parser: utils.Parser) -> None:
    """Where an encoder runs, how precisely, and how files are read.

    They are what `devices.setup_device` and `images.decode` need.
    """
    add = parser.add_argument
    add("--device", default="auto", help="as of main.py (auto)")
    add("--amp", default="auto", choices=AMP, help="as of main.py (auto)")
    add(
        "--num_workers",
        type=utils.argument(WORKERS),
        default=default_workers(),
        help="threads (auto)",
    )
    add("--bad_images", default="error", choices=("error", "skip"), help="as of main.py (error)")
    parser.set_defaults(deterministic=False)


def open_source(args: Namespace) -> LoadedCheckpoint:
    """The checkpoint at --model_path, and lines on what it was taken for; as `Source.open`."""
    source = LoadedCheckpoint.open(args.model_path, **utils.source_settings(args))
    for note in source.notes:
        distributed.log(f"{args.model_path}: {note}")
    return source


def images_of_run(source: LoadedCheckpoint, args: Mapping, data_root: str | None = None) -> Data:
    """The images that a run of main.py trained on; wherever they are now, if `data_root` says so.

    `args`: num_workers and bad_images. Raises as `datasets.load`.
    """
    saved = vars(source.config)
    place = saved["data_name"], data_root or saved["data_root"], source.encoder["image_size"]
    how = {"decode": source.decode, "split_names": saved.get("split_names")}
    images = load_dataset(*place, args["num_workers"], args["bad_images"], **how)
    size = saved["train_size"]
    return images if size is None else images.subset(size, saved["seed"])


def picture_path(text: str) -> str:
    """A type for argparse: the path of a picture, whose ending is its format."""
    if picture_format(text) not in FORMATS:
        ends = ", ".join(f".{name}" for name in FORMATS)
        raise argparse.ArgumentTypeError(f"{text}: choose an ending of {ends}")
    return text


def picture_format(path: str) -> str:
    """The format of a picture, by its ending; not always one that there is."""
    return Path(path).suffix.lower().removeprefix(".")
