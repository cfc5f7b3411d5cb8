"""What a run meets on odd machines and from odd command lines: pipes, locales, disks, extremes."""

import os
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas
import pytest
import torch

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
    """A finished run of main.py: its checkpoint."""
    out = tmp_path_factory.mktemp("results")
    run(out, "--name", "pre", "--no-pictures")
    return out / "pre_model.pth"


# ---- where a command's words go -----------------------------------------------------------------


def test_a_run_goes_on_when_nobody_reads_its_words(tmp_path):
    """As `| head -1` does, on a machine whose terminal has no letter of the run's name."""
    command = [sys.executable, "main.py", *TINY.split(), "--out", tmp_path, "--name", "größe"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, "--no-pictures"], cwd=ROOT, stdout=pipe, stderr=pipe, env=env
    ) as process:
        assert b"gr\\xf6\\xdfe: SimSiam" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0
    assert pandas.read_csv(tmp_path / "results.csv")["run"].tolist() == ["größe"]
    assert (tmp_path / "größe_model.pth").is_file()


def test_a_run_without_stdout_and_stderr(tmp_path):
    command = [sys.executable, "main.py", *TINY.split(), "--out", tmp_path, "--name", "a"]
    close = "import os, sys; os.close(1); os.close(2); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", close, *map(str, command), "--no-pictures"]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0
    assert checkpoint.load(tmp_path / "a_model.pth")["epoch"] == 1
    assert len(pandas.read_csv(tmp_path / "results.csv")) == 1


TOOLS = "bench convert features plot similar transfer worth".split()
STUDIES = "ablate scores speedrun".split()
COMMANDS = [main, linear, model, *(import_module(f"tools.{name}") for name in TOOLS)]
COMMANDS += [import_module(f"studies.{name}") for name in STUDIES]


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_python_without_docstrings(module, capsys):
    """python -OO leaves none; the help is of the flags then."""
    path = Path(module.__file__)
    names = {"__name__": module.__name__, "__file__": str(path), "__doc__": None}
    exec(compile(path.read_text(), path, "exec", optimize=2), names)
    assert names["__doc__"] is None
    assert module.__doc__
    command = names.get("command") or names["main"]
    with pytest.raises(SystemExit) as stop:
        command(["--help"])
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_the_help_begins_with_what_a_command_is_for(capsys):
    for module in (main, linear, model):
        first_line = module.__doc__.split("\n")[0]
        with pytest.raises(SystemExit):
            getattr(module, "command", None or getattr(module, "main", None))(["--help"])
        assert first_line in " ".join(capsys.readouterr().out.split())


# ---- names and places ---------------------------------------------------------------------------


def test_a_name_that_leaves_no_room_for_its_files_is_refused(tmp_path, capsys):
    for name in ("x" * 181, "ö" * 91):
        err = helpers.refused(capsys, main, *TINY.split(), "--out", tmp_path / "r", "--name", name)
        assert err.startswith("main.py: argument --name: ")
        assert err.endswith("is too long: 180 bytes at most\n")
    assert not list(tmp_path.iterdir())


def test_textures_are_read_from_nowhere(pretrained, tmp_path, capsys):
    expected = "--data_root: textures are made, not read"
    where = ("--out", tmp_path / "r", "--data_root", tmp_path)
    assert expected in helpers.refused(capsys, main, *TINY.split(), *where)
    judge = ("--model_path", pretrained, *where)
    assert expected in helpers.refused(capsys, linear, *judge, "--cached")
    linear.main(f"--model_path {pretrained} --out {tmp_path} --name b --cached --epochs 1".split())
    again = f"--model_path {pretrained} --out {tmp_path} --name b --resume"  # has no root to keep
    linear.main(again.split())
    judge = ("--model_path", tmp_path / "b_model.pth", *where, "--evaluate_only")
    assert expected in helpers.refused(capsys, linear, *judge)
    assert not (tmp_path / "r").exists()


def test_a_head_s_files_lie_beside_its_encoder_and_are_called_by_its_file(pretrained, tmp_path):
    (tmp_path / "mine.pth").write_bytes(pretrained.read_bytes())
    flags = "--cached --epochs 1 --no-pictures"
    linear.main(f"--model_path {tmp_path / 'mine.pth'} {flags}".split())
    (tmp_path / "a_model.pth").write_bytes(pretrained.read_bytes())
    linear.main(f"--model_path {tmp_path / 'a_model.pth'} {flags}".split())
    linear.main(f"--model_path {tmp_path / 'a_model.pth'} {flags} --resume".split())
    assert sorted(path.name for path in tmp_path.glob("*linear*")) == [
        "a_linear_cached_model.pth",
        "a_linear_cached_statistics.csv",
        "mine_linear_cached_model.pth",
        "mine_linear_cached_statistics.csv",
    ]
    linear.main(f"--model_path {tmp_path / 'a_linear_cached_model.pth'} --evaluate_only".split())
    assert (tmp_path / "a_linear_cached_confusion.png").is_file()


def test_a_finished_run_that_is_resumed_elsewhere_is_there_as_it_says(pretrained, tmp_path, capsys):
    main.main(["--resume", str(pretrained), "--out", str(tmp_path), "--name", "b", "--no-pictures"])
    assert f"wrote {tmp_path}/b_model.pth" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "b_model.pth")["epoch"] == 1


def test_the_last_good_checkpoint_of_a_finished_run_is_not_removed(pretrained, tmp_path, capsys):
    """Its newest is damaged: a resume goes on from the one before, and mends it."""
    (tmp_path / "a_model.prev.pth").write_bytes(pretrained.read_bytes())
    (tmp_path / "a_model.pth").write_bytes(pretrained.read_bytes()[:5000])
    run(tmp_path, "--name", "a", "--resume", "--no-pictures")
    assert "going on with the one before it" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "a_model.pth")["epoch"] == 1


def test_resume_of_the_other_command_s_run_says_which(pretrained, capsys):
    err = helpers.refused(capsys, linear, "--model_path", pretrained, "--resume", pretrained)
    assert f"--resume: {pretrained} is a run of main.py: give --resume to main.py" in err


# ---- what cannot be written ---------------------------------------------------------------------


def test_without_a_checkpoint_before_none_is_promised(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # of a file
    try:
        with pytest.raises(RunError) as error:
            run(tmp_path, "--name", "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = str(error.value)
    assert "a_model.pth: could not be written (File too large); there is none before it" in said
    assert "intact" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [main, linear])
def test_a_picture_that_fails_loses_no_result(pretrained, tmp_path, command):
    name = "a_neighbours.png" if command is main else "a_confusion.png"
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").touch()
    flags = ["--out", tmp_path, "--name", "a"]
    flags += TINY.split() if command is main else ["--model_path", pretrained, "--cached"]
    with pytest.raises(RunError, match=f"{name}: could not be written .*; the checkpoint is"):
        command.main([str(word) for word in flags])
    assert pandas.read_csv(tmp_path / "results.csv")["run"].tolist() == ["a"]


# ---- extremes -----------------------------------------------------------------------------------


def test_features_that_are_not_finite_end_a_run_in_one_line(tmp_path):
    with pytest.raises(RunError) as error:
        run(tmp_path, "--name", "a", "--lr", 1e8, "--batch_size", 100)  # of two steps
    assert str(error.value).startswith("the features are not finite after epoch 1. ")
    assert "try a lower --lr" in str(error.value)
    state = checkpoint.load(tmp_path / "a_model.pth")
    assert state["epoch"] == 0
    assert all(value.isfinite().all() for value in state["model"].values())


def test_several_lr_need_images_to_be_held_out(pretrained, tmp_path, capsys):
    flags = ("--model_path", pretrained, "--out", tmp_path / "r", "--cached", "--lr", 1, 2)
    err = helpers.refused(capsys, linear, *flags, "--label_fraction", 0.0001)
    assert "--lr: of several the best is chosen on a tenth of the training images" in err
    assert "there are 1: give one" in err
    assert not (tmp_path / "r").exists()


def test_results_say_what_a_run_was(pretrained, tmp_path):
    row = pandas.read_csv(pretrained.parent / "results.csv").set_index("run").loc["pre"]
    expected = {"train_size": 200, "width": 4, "seed": 0, "lr": 1.0, "batch_size": 32}
    assert {name: row[name] for name in expected} == expected
    flags = "--cached --lr 0.5 0.001 --seed 3 --label_fraction 0.5 --no-pictures"
    linear.main(f"--model_path {pretrained} --out {tmp_path} {flags} --epochs 2".split())
    row = pandas.read_csv(tmp_path / "results.csv").iloc[0]
    lr = torch.load(next(tmp_path.glob("*_model.pth")))["facts"]["lr"]
    expected = {"train_size": 100, "width": 4, "seed": 3, "lr": lr}
    assert {name: row[name] for name in expected} == expected
    assert lr in (0.5, 0.001)
