"""Data, checkpoints and checks that several test files share."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import linear
import main
import utils
from simsiam.data.textures import TEXTURE_CLASSES, make_textures
from simsiam.training.recipes import PretrainConfig
from simsiam.training.state import TrainState

ROOT = Path(__file__).parent.parent


def refused(capsys, command: ModuleType | Callable, *argv: object) -> str:
    """Assert that a command or a module's `main` exits with code 2 and one line on stderr.

    Returns the line.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        getattr(command, "main", command)([str(word) for word in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.count("\n") == 1, err
    return err


class Interrupted(Exception):
    """Ends a run as a power cut would: nothing is written after it."""


def interrupt(command: ModuleType, argv: Sequence[object], epoch: int, step: int = 0) -> None:
    """Run `command`, main or linear, and end it before a step (from 0) is counted."""

    def on_step(*current: int) -> None:
        if current == (epoch, step):
            raise Interrupted

    with pytest.raises(Interrupted):
        command.main([str(word) for word in argv], on_step)


def run_linear(model_path: Path, out: Path, *flags: object) -> None:
    """Run linear.py on a checkpoint, with its files in `out`."""
    linear.main([str(word) for word in ("--model_path", model_path, "--out", out, *flags)])


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two state_dicts are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def save_image(path: Path, image: Tensor) -> None:
    """Write an image, uint8, C x H x W, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def texture_folder(
    root: Path, train: int = 200, test: int = 40, classes: Sequence[str] = TEXTURE_CLASSES
) -> Path:
    """Write an ImageFolder of PNG textures; of `train` and `test` images, those of `classes`."""
    for split, number, seed in [("train", train, 1), ("test", test, 2)]:
        images, labels = make_textures(number, seed)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            if TEXTURE_CLASSES[label] in classes:
                save_image(Path(root, split, TEXTURE_CLASSES[label], f"{i}.png"), image)
    return root


def image_files(root: Path, number: int = 240, side: int = 64) -> Path:
    """Write an ImageFolder of JPEG textures: mixed sizes, some gray, CMYK, or with damaged EXIF."""
    rng = np.random.default_rng(0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03junk"
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    for split, count, seed in (("train", number, 1), ("val", 61, 2)):
        for i, (image, label) in enumerate(zip(*make_textures(count, seed), strict=True)):
            file = io.BytesIO()
            image = Image.fromarray(image.permute(1, 2, 0).numpy())
            image = image.resize(tuple(rng.integers(side, 2 * side, 2).tolist()))
            image.convert({3: "L", 5: "CMYK"}.get(i % 10, "RGB")).save(file, "jpeg")
            content = file.getvalue()
            if i % 10 == 7:
                content = content[:2] + segment + content[2:]
            path = Path(root, split, TEXTURE_CLASSES[label], f"{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def hardly_trained(out: Path) -> Path:
    """Return a checkpoint of main.py, written to the folder `out`."""
    main.main(
        "--data_name textures --train_size 64 --width 8 --feature_dim 16 --batch_size 32 "
        f"--epochs 1 --no-pictures --name pre --out {out}".split()
    )
    return out / "pre_model.pth"


def new_state(flags: str, device: torch.device | str = "cpu") -> tuple[TrainState, PretrainConfig]:
    """Return the state of a new run of main.py on textures in memory, and its config."""
    parser = utils.ConfigParser("main.py", main.__doc__, PretrainConfig)
    config, _ = parser.read(f"--data_name textures --amp off {flags}".split())
    images = main.load_images(config)
    net, encoder = main.initial_network(config), main.encoder_config(config, images)
    device = torch.device(device)
    return main.make_state(config, net, images.to(device), encoder, device), config


class Large(TorchDispatchMode):
    """Record the tensors, results of operations, with at least `bytes` of memory in `seen`."""

    def __init__(self, bytes: int):
        super().__init__()
        self.bytes, self.seen = bytes, []

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= self.bytes:
                self.seen.append(x)
        return result
