"""What several test files need."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import main

ROOT = Path(__file__).parent.parent


def refused(capsys, command, *argv) -> str:
    """Exit code 2 and one line on stderr: that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main([str(word) for word in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.count("\n") == 1, err
    return err


def hardly_trained(out: Path) -> Path:
    """A checkpoint of main.py in the folder `out`."""
    main.main(
        "--data_name textures --train_size 64 --width 8 --feature_dim 16 --batch_size 32 "
        f"--epochs 1 --no-pictures --name pre --out {out}".split()
    )
    return out / "pre_model.pth"


def cut_in_epoch(monkeypatch, command, epoch: int, argv: list) -> None:
    """Run `command`, main or linear, and stop it in the first step of an epoch, from 0 on."""
    train = command.train

    def cut(*args):
        for step in train(*args):
            if args[5] == epoch:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(command, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        command.main([str(word) for word in argv])
    monkeypatch.setattr(command, "train", train)


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
