"""What several test files need."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import main
import utils
from simsiam.data.textures import TEXTURE_CLASSES, make_textures
from simsiam.training.recipes import PretrainConfig
from simsiam.training.state import TrainState

ROOT = Path(__file__).parent.parent


def refused(capsys, command, *argv) -> str:
    """Check that a command, or a module with `main`, exits with code 2 after one line on stderr.

    Returns the line.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        getattr(command, "main", command)([str(word) for word in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.count("\n") == 1, err
    return err


def image_files(root: Path, number: int = 240, side: int = 64) -> Path:
    """JPEG files of textures in an ImageFolder: mixed sizes, some gray, CMYK, with damaged EXIF."""
    rng = np.random.default_rng(0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03junk"
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    for split, many, seed in (("train", number, 1), ("val", 61, 2)):
        for i, (image, label) in enumerate(zip(*make_textures(many, seed), strict=True)):
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
    """A checkpoint of main.py in the folder `out`."""
    main.main(
        "--data_name textures --train_size 64 --width 8 --feature_dim 16 --batch_size 32 "
        f"--epochs 1 --no-pictures --name pre --out {out}".split()
    )
    return out / "pre_model.pth"


def cut_in_epoch(command, epoch: int, argv: list) -> None:
    """Run `command`, main or linear, and stop it in the first step of an epoch, from 0 on."""

    def on_step(current: int, step: int) -> None:
        if current == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.main([str(word) for word in argv], on_step)


def new_state(flags: str, device: torch.device | str = "cpu") -> tuple[TrainState, PretrainConfig]:
    """The state of a new run of main.py on textures in memory, and its config."""
    parser = utils.ConfigParser("main.py", main.__doc__, PretrainConfig)
    config, _ = parser.read(f"--data_name textures --amp off {flags}".split())
    images = main.load_images(config)
    net, encoder = main.initial_network(config), main.encoder_config(config, images)
    device = torch.device(device)
    return main.make_state(config, net, images.to(device), encoder, device), config


class Large(TorchDispatchMode):
    """Keeps each tensor that an operation gives, if it has so many `bytes` of memory."""

    def __init__(self, bytes: int):
        super().__init__()
        self.bytes, self.seen = bytes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= self.bytes:
                self.seen.append(x)
        return result
