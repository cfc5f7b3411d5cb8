"""The commands on a pretend accelerator: equal to the CPU's to the bit, and never waited for.

See tests/accelerator.py. It needs g++ and ninja; where they are missing these tests are left out.
"""

import json
import os
import shutil
import subprocess
import sys

import pandas
import pytest
import torch

from tests.helpers import ROOT, image_files

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("ninja")), reason="needs g++ and ninja"
)
FLAGS = "--device pretend --data_name textures --train_size 128 --epochs 1 --k 20 --amp off "
FLAGS += "--width 8 --feature_dim 32 --no-pictures"


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """A function that gives what a mode of tests/accelerator.py says on stdout."""
    folder = tmp_path_factory.mktemp("accelerator")

    def run(*words):
        ended = subprocess.run(
            [sys.executable, "-m", "tests.accelerator", folder, *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run


def test_no_step_waits_and_each_planted_fault_is_seen(said):
    found = json.loads(said("steps"))
    # Three steps: a wait in each for whether the loss is finite (fused SGD, on cuda, needs none),
    # and as blocking copies the epoch's order and the table of each of the six views.
    healthy = {"masks": 0, "scalars": 3, "to_device_async": 0, "to_device_blocking": 7}
    healthy |= {"to_host": 0}
    assert found["none"] == healthy
    assert found["number"] == healthy | {"scalars": 3 + 3}
    assert found["copy"] == healthy | {"to_device_blocking": 7 + 3}
    assert found["mask"]["masks"] > 0
    assert found["back"] == healthy | {"to_host": 3}
    assert "same device" in found["mix"]
    nothing = dict.fromkeys(healthy, 0)
    assert found["features"] == nothing
    assert found["knn"] == nothing | {"scalars": 1}  # the number of classes
    assert found["rank"] == nothing | {"scalars": 1}  # the rank itself


def test_the_commands_give_the_same_bits_as_on_the_cpu(said, tmp_path):
    """Training, resumed, from files too; linear.py's ways; predictions and features."""
    for device in ("pretend", "cpu"):
        image_files(tmp_path / device / "images", number=80)
        said("runs", tmp_path / device, device)
    # Without map_location: the tensors of a checkpoint are on the CPU, so that it loads anywhere.
    names = ("whole", "parted", "files", "augmented", "cached", "lars", "tuned")
    ours, theirs = (
        {name: torch.load(tmp_path / device / f"{name}_model.pth") for name in names}
        for device in ("pretend", "cpu")
    )
    for name in names:
        assert (ours[name]["made_on"]["device"], theirs[name]["made_on"]["device"]) == (
            "pretend",
            "cpu",
        )
        for key, value in ours[name]["model"].items():
            assert torch.equal(value, theirs[name]["model"][key]), (name, key)
        for mine, other in zip(ours[name]["history"], theirs[name]["history"], strict=True):
            for column in mine.keys() - {"seconds", "images_per_sec"}:
                assert mine[column] == other[column], (name, column)
    for key, value in ours["whole"]["model"].items():
        assert torch.equal(value, ours["parted"]["model"][key])
    assert set(pandas.read_csv(tmp_path / "pretend" / "benchmarks.csv")["device"]) == {"pretend"}
    for table in ("predictions.csv", "features.csv"):
        mine, other = (
            pandas.read_csv(tmp_path / device / table).drop(columns=["file"])
            for device in ("pretend", "cpu")
        )
        assert len(mine) >= 80
        assert mine.equals(other)


def test_two_ranks_train_like_one_process_by_sync_batchnorm(said, tmp_path):
    out = said("ranks", tmp_path, *FLAGS.split(), "--ddp", "--out", tmp_path)
    one, two, apart = (torch.load(tmp_path / f"{name}.pth") for name in ("one", "two", "apart"))
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):  # BN of each rank's images gives other weights
        torch.testing.assert_close(apart["weights"], one["weights"], rtol=1e-4, atol=1e-5)
    assert two["timeout"] == 600  # seconds, after which a lost rank ends the others
    assert out.count("exit codes 0 0\n") == 3
    assert "pretend:0" in out
    assert next(tmp_path.glob("*_model.pth"))
