"""Odd environments and command lines: closed pipes, locales, full disks, extreme values."""

import os
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas
import pytest

import linear
import main
import model
from simsiam.runtime.files import RunError
from simsiam.training import checkpoint
from tests import helpers
from tests.helpers import ROOT

TINY = "--data_name textures --train_size 200 --width 4 --feature_dim 16 --batch_size 32 --epochs 1"


def run(out, *flags):
    main.main([*TINY.split(), "--out", str(out), *map(str, flags)])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The checkpoint of a finished run of main.py."""
    out = tmp_path_factory.mktemp("results")
    run(out, "--name", "pre", "--no-pictures")
    return out / "pre_model.pth"


# ---- stdout, stderr and --help ------------------------------------------------------------------


def test_a_run_continues_when_its_stdout_is_closed(tmp_path):
    """As by `| head -1`; the locale cannot encode the run's name."""
    command = [sys.executable, "main.py", *TINY.split(), "--out", tmp_path, "--name", "größe"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, "--no-pictures"], cwd=ROOT, stdout=pipe, stderr=pipe, env=env
    ) as process:
        assert b"gr\\xf6\\xdfe" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(300) == 0
    assert pandas.read_csv(tmp_path / "results.csv")["run"].tolist() == ["größe"]
    assert (tmp_path / "größe_model.pth").is_file()


def test_a_run_without_stdout_and_stderr(tmp_path):
    command = [sys.executable, "main.py", *TINY.split(), "--out", tmp_path, "--name", "a"]
    close = "import os, sys; os.close(1); os.close(2); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", close, *map(str, command), "--no-pictures"]
    assert subprocess.run(command, cwd=ROOT, timeout=300).returncode == 0
    assert checkpoint.load(tmp_path / "a_model.pth")["epoch"] == 1
    assert len(pandas.read_csv(tmp_path / "results.csv")) == 1


TOOLS = "bench convert features plot similar transfer worth".split()
STUDIES = "ablate scores speedrun".split()
COMMANDS = [main, linear, model, *(import_module(f"tools.{name}") for name in TOOLS)]
COMMANDS += [import_module(f"studies.{name}") for name in STUDIES]


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
@pytest.mark.parametrize("optimize", [0, 2])
def test_help(module, optimize, capsys):
    """It starts with the docstring's first line; python -OO has no docstrings."""
    path = Path(module.__file__)
    names = {"__name__": module.__name__, "__file__": str(path)}
    exec(compile(path.read_text(), path, "exec", optimize=optimize), names)
    command = names.get("command") or names["main"]
    with pytest.raises(SystemExit) as stop:
        command(["--help"])
    assert stop.value.code == 0
    out = "".join(capsys.readouterr().out.split())  # wrapped at spaces and hyphens
    assert "--help" in out
    first_line = module.__doc__.split("\n")[0].replace(" ", "")
    assert (first_line in out) == (optimize == 0)


# ---- names and places ---------------------------------------------------------------------------


def test_a_name_too_long_for_its_files_is_refused(tmp_path, capsys):
    for name in ("x" * 181, "ö" * 91):
        err = helpers.refused(capsys, main, *TINY.split(), "--out", tmp_path / "r", "--name", name)
        assert "--name" in err
    assert not list(tmp_path.iterdir())


def test_data_root_is_refused_for_textures(pretrained, tmp_path, capsys):
    linear.main(f"--model_path {pretrained} --out {tmp_path} --name b --cached --epochs 1".split())
    linear.main(f"--model_path {pretrained} --out {tmp_path} --name b --resume".split())
    where = ("--out", tmp_path / "r", "--data_root", tmp_path)
    for command, flags in (
        (main, TINY.split()),
        (linear, ("--model_path", pretrained, "--cached")),
        (linear, ("--model_path", tmp_path / "b_model.pth", "--evaluate_only")),
    ):
        assert "--data_root" in helpers.refused(capsys, command, *flags, *where)
    assert not (tmp_path / "r").exists()


def test_files_of_a_head_lie_beside_its_encoder_and_are_named_after_its_file(pretrained, tmp_path):
    flags = "--cached --epochs 1 --no-pictures"
    for name in ("mine.pth", "a_model.pth"):
        (tmp_path / name).write_bytes(pretrained.read_bytes())
        linear.main(f"--model_path {tmp_path / name} {flags}".split())
    linear.main(f"--model_path {tmp_path / 'a_model.pth'} {flags} --resume".split())
    assert sorted(path.name for path in tmp_path.glob("*linear*")) == [
        "a_linear_cached_model.pth",
        "a_linear_cached_statistics.csv",
        "mine_linear_cached_model.pth",
        "mine_linear_cached_statistics.csv",
    ]
    linear.main(f"--model_path {tmp_path / 'a_linear_cached_model.pth'} --evaluate_only".split())
    assert (tmp_path / "a_linear_cached_confusion.png").is_file()


# ---- resume -------------------------------------------------------------------------------------


def test_a_finished_run_resumed_under_another_name_writes_its_files(pretrained, tmp_path):
    main.main(["--resume", str(pretrained), "--out", str(tmp_path), "--name", "b", "--no-pictures"])
    assert checkpoint.load(tmp_path / "b_model.pth")["epoch"] == 1
    assert (tmp_path / "b_statistics.csv").is_file()


def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(pretrained, tmp_path, capsys):
    (tmp_path / "a_model.prev.pth").write_bytes(pretrained.read_bytes())
    (tmp_path / "a_model.pth").write_bytes(pretrained.read_bytes()[:5000])
    run(tmp_path, "--name", "a", "--resume", "--no-pictures")
    assert "a_model.prev.pth" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "a_model.pth")["epoch"] == 1


def test_a_run_of_the_other_command_is_refused(pretrained, capsys):
    err = helpers.refused(capsys, linear, "--model_path", pretrained, "--resume", pretrained)
    assert str(pretrained) in err
    assert "main.py" in err


# ---- files that cannot be written ---------------------------------------------------------------


def test_a_first_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes per file
    try:
        with pytest.raises(RunError) as error:
            run(tmp_path, "--name", "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "a_model.pth" in str(error.value)
    assert "File too large" in str(error.value)
    assert "intact" not in str(error.value)  # no checkpoint before it
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [main, linear])
def test_a_picture_that_cannot_be_written_loses_no_result(pretrained, tmp_path, command):
    name = "a_neighbours.png" if command is main else "a_confusion.png"
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").touch()
    flags = ["--out", tmp_path, "--name", "a"]
    flags += TINY.split() if command is main else ["--model_path", pretrained, "--cached"]
    with pytest.raises(RunError, match=name):
        command.main([str(word) for word in flags])
    assert pandas.read_csv(tmp_path / "results.csv")["run"].tolist() == ["a"]


# ---- extreme values -----------------------------------------------------------------------------


def test_features_that_are_not_finite_end_a_run(tmp_path):
    with pytest.raises(RunError) as error:
        run(tmp_path, "--name", "a", "--lr", 1e8, "--batch_size", 100)  # two steps
    assert "not finite after epoch 1" in str(error.value)
    assert "--lr" in str(error.value)
    state = checkpoint.load(tmp_path / "a_model.pth")
    assert state["epoch"] == 0
    assert all(value.isfinite().all() for value in state["model"].values())


def test_several_lr_need_images_to_hold_out(pretrained, tmp_path, capsys):
    flags = ("--model_path", pretrained, "--out", tmp_path / "r", "--cached", "--lr", 1, 2)
    assert "--lr" in helpers.refused(capsys, linear, *flags, "--label_fraction", 0.0001)
    assert not (tmp_path / "r").exists()


def test_results_hold_the_settings_of_a_run(pretrained, tmp_path):
    row = pandas.read_csv(pretrained.parent / "results.csv").set_index("run").loc["pre"]
    expected = {"train_size": 200, "width": 4, "seed": 0, "lr": 1.0, "batch_size": 32}
    assert {name: row[name] for name in expected} == expected
    flags = "--cached --lr 0.5 0.001 --seed 3 --label_fraction 0.5 --no-pictures"
    linear.main(f"--model_path {pretrained} --out {tmp_path} {flags} --epochs 2".split())
    row = pandas.read_csv(tmp_path / "results.csv").iloc[0]
    lr = checkpoint.load(next(tmp_path.glob("*_model.pth")))["extra"]["lr"]
    expected = {"train_size": 100, "width": 4, "seed": 3, "lr": lr}
    assert {name: row[name] for name in expected} == expected
    assert lr in (0.5, 0.001)
