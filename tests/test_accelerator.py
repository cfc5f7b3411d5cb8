"""The commands on a pretend accelerator: the bits of the CPU, and a host that never waits.

See tests/accelerator.py, which needs g++ and ninja.
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


@pytest.fixture(scope="module")
def accelerator(tmp_path_factory):
    """Function that runs a mode of tests/accelerator.py and returns its JSON."""
    folder = tmp_path_factory.mktemp("accelerator")

    def run(*words):
        ended = subprocess.run(
            [sys.executable, "-m", "tests.accelerator", folder, *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=900,  # against a hang alone
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return run


def test_no_step_waits_and_each_planted_fault_is_seen(accelerator):
    counts = accelerator("steps")
    # Three steps: a wait in each for whether the loss is finite (fused SGD, on cuda, needs none),
    # and as blocking copies the epoch's order and the parameters of each of the six views.
    healthy = {"masks": 0, "scalars": 3, "to_device_async": 0, "to_device_blocking": 7}
    healthy |= {"to_host": 0}
    assert counts["none"] == healthy
    assert counts["number"] == healthy | {"scalars": 3 + 3}
    assert counts["copy"] == healthy | {"to_device_blocking": 7 + 3}
    assert counts["mask"]["masks"] > 0
    assert counts["back"] == healthy | {"to_host": 3}
    assert "same device" in counts["mix"]
    nothing = dict.fromkeys(healthy, 0)
    assert counts["features"] == nothing
    assert counts["knn"] == nothing | {"scalars": 1}  # the number of classes
    assert counts["rank"] == nothing | {"scalars": 1}  # the rank itself


def test_the_commands_give_the_same_bits_as_on_the_cpu(accelerator, tmp_path):
    """Of training in memory, from files and resumed, linear.py, predictions and features."""
    for device in ("pretend", "cpu"):
        image_files(tmp_path / device / "images", number=80)
        accelerator("runs", tmp_path / device, device)
    runs = {}
    for name in ("whole", "parted", "files", "augmented", "cached", "tuned"):
        # Without map_location: a checkpoint's tensors are on the CPU, so that it loads anywhere.
        one, other = (
            torch.load(tmp_path / device / f"{name}_model.pth") for device in ("pretend", "cpu")
        )
        assert (one["environment"]["device"], other["environment"]["device"]) == ("pretend", "cpu")
        for key, value in one["model"].items():
            assert torch.equal(value, other["model"][key]), (name, key)
        for row, expected in zip(one["history"], other["history"], strict=True):
            for column in row.keys() - {"seconds", "images_per_sec"}:
                assert row[column] == expected[column], (name, column)
        runs[name] = one["model"]
    for key, value in runs["whole"].items():
        assert torch.equal(value, runs["parted"][key])
    assert set(pandas.read_csv(tmp_path / "pretend" / "benchmarks.csv")["device"]) == {"pretend"}
    for table in ("predictions.csv", "features.csv"):
        one, other = (
            pandas.read_csv(tmp_path / device / table).drop(columns=["file"])
            for device in ("pretend", "cpu")
        )
        assert len(one) >= 80
        assert one.equals(other)


def test_two_ranks_train_like_one_process_by_sync_batchnorm(accelerator, tmp_path):
    flags = "--ddp --device pretend --data_name textures --train_size 128 --epochs 1 --k 20 "
    flags += f"--amp off --width 8 --feature_dim 32 --no-pictures --out {tmp_path}"
    outcome = accelerator("ranks", tmp_path, *flags.split())
    assert outcome["codes"] == [0] * 7, outcome["output"]
    (one, _), (two, timeout), (apart, _) = (
        torch.load(tmp_path / f"{name}.pth") for name in ("one", "two", "apart")
    )
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):  # BN of each rank's images gives other weights
        torch.testing.assert_close(apart, one, rtol=1e-4, atol=1e-5)
    assert timeout == 600  # seconds, after which a lost rank ends the others
    assert "pretend:0" in outcome["output"]
    assert next(tmp_path.glob("*_model.pth"))
