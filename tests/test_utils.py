"""What the commands share: flags and back again, errors in one line, the device, the progress."""

import argparse
import io
import math
import os
import re
import subprocess
import sys
import time
import types
import warnings

import pytest
import torch
from PIL import Image

import linear
import main
import utils
from simsiam.data.decode import UnreadableImageError
from simsiam.data.loader import Data
from simsiam.data.textures import make_textures
from simsiam.models.flops import params_and_flops
from simsiam.models.simsiam import SimSiam
from simsiam.runtime import devices
from simsiam.runtime.files import RunError
from simsiam.training.meters import Meters, TrainMeters
from simsiam.training.progress import Progress
from tests.helpers import ROOT, refused

CPU = torch.device("cpu")

# ---- flags --------------------------------------------------------------------------------------

RECIPES = {
    "long": {"epochs": 800, "lr": 0.03, "fixed": False},
    "short": {"epochs": 20, "lr": 0.03, "fixed": True},
}


def fill(flags, given):
    """As main.py's: the recipe under what is given, and something that does not go together."""
    flags = flags | RECIPES[flags["recipe"]] | given
    if flags["epochs"] < flags["warmup"]:
        raise ValueError(f"--warmup {flags['warmup']}: is longer than the run")
    return flags


def make_flags():
    flags = utils.Flags("some.py", "What it does.", fill, RECIPES)
    add = flags.group("some")
    add("recipe", tuple(RECIPES), "defaults", "long")
    add("epochs", utils.number(int, 1), "sweeps")
    add("lr", utils.number(float, 1e-12), "rate")
    add("fixed", "two", "keep it")
    add("warmup", utils.number(int, 0), "epochs before", 5)
    add("size", utils.number(int, 8, 1024), "pixels; None: as they are")
    add("pictures", "two", "draw", True)
    add("quiet", "two", "say less", False)
    add("overwrite", "switch", "replace", False)
    add("out", str, "folder", "results")
    add("lrs", utils.number(float, 0), "several", nargs="+")
    more = {"nargs": "?", "const": True, "metavar": "PATH"}
    add("resume", utils.file_path, "go on", False, **more)
    return flags


def test_the_help_tells_the_defaults():
    text = " ".join(make_flags().format_help().split())
    assert "What it does." in text
    for part in (
        "defaults (long)",
        "sweeps (by recipe: 800, 20)",
        "rate (0.03)",  # the same in all recipes
        "keep it (by recipe: False, True)",
        "epochs before (5)",
        "pixels; None: as they are --",  # none to tell
        "draw (yes)",
        "say less (no)",
        "replace --",  # a switch is off until it is given
        "folder (results)",
        "(by recipe: ...): the defaults of long, short, in this order.",
    ):
        assert part in text


@pytest.mark.parametrize("command", [main, linear])
def test_the_help_of_the_commands_tells_every_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    flags = command.make_flags()
    recipes = list(flags.recipes.values())
    for action in flags._actions[1:]:  # after --help
        name, text = action.dest, " ".join(action.help.split())
        assert text in told
        if name in recipes[0]:
            # As one types them: 0.5 0.75 of (0.5, 0.75).
            values = {str(recipe[name]).strip("()[]").replace(",", "") for recipe in recipes}
            assert all(value in text for value in values), name
        elif flags.defaults[name] not in (None, True, False):
            assert text.endswith(f"({flags.defaults[name]})"), name
    assert flags.defaults.keys() == {action.dest for action in flags._actions[1:]}


def test_given_flags_are_told_from_defaults():
    flags = make_flags()
    args, given = flags.read([])
    assert given == {}
    assert (args.epochs, args.lr, args.fixed, args.pictures) == (800, 0.03, False, True)
    args, given = flags.read("--recipe short --lr 0.03 --no-pictures --lrs 1 2.5 --size 8".split())
    assert given == {
        "recipe": "short", "lr": 0.03, "pictures": False, "lrs": [1.0, 2.5], "size": 8
    }  # fmt: skip
    assert (args.epochs, args.fixed, args.warmup, args.size) == (20, True, 5, 8)
    assert vars(args).keys() == flags.defaults.keys()
    assert flags.read(["--resume"])[0].resume is True
    assert flags.read(["--resume", "a.pth"])[0].resume == "a.pth"
    assert flags.defaults["lr"] is None  # reading changes nothing
    assert vars(flags.complete(given)) == vars(args)
    with pytest.raises(ValueError, match="--warmup 900"):
        flags.complete({"warmup": 900})


LINES = [
    "",
    "--recipe short --lr 1e-05 --size 64 --lrs 0.1 3 --fixed --no-pictures --quiet --overwrite",
    "--no-fixed --recipe short --out=-a --resume",
    "--epochs 7 --resume=--b.pth --out=",
]


@pytest.mark.parametrize("line", LINES)
def test_flags_of_a_checkpoint_come_back_as_they_were(line):
    flags = make_flags()
    args, given = flags.read(line.split())
    saved = vars(args).copy()
    read = flags.checked(saved, "a.pth")
    assert vars(flags.complete(read)) == saved == vars(args)
    assert read.items() >= given.items()
    assert vars(flags.read(flags.as_argv(saved))[0]) == saved
    # Of other defaults, as of a later version, the run's own values stay.
    flags.defaults |= {"pictures": not args.pictures, "warmup": 1, "out": "elsewhere"}
    assert vars(flags.complete(flags.checked(saved, "a.pth"))) == saved


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (main, ""),
        (main, "--data_name textures --no-fix_pred_lr --warmup_epochs 2.5 --no-pictures --ddp"),
        (main, "--data_name imagenet --arch resnet8 --width 8 --stem cifar --image_size 64"),
        (main, "--loss asymmetric_2x --stop_grad off --bn all --seed 4294967295 --lr 1e-7"),
        (main, "--resume results/2048_200_512_800_model.pth --k 7 --temperature 0.07"),
        (main, "--name=-a --out=--b --stop_on_collapse --train_size 9 --init=-c.pth"),
        (linear, ""),
        (linear, "--optimizer lars --epochs 3 --no-pictures --checkpoint_minutes 0"),
        (linear, "--cached --lr 0.1 1 10 --label_fraction 0.1"),
    ],
)
def test_flags_of_the_commands_come_back_as_they_were(command, line):
    flags = command.make_flags()
    args, given = flags.read(line.split())
    read = flags.checked(vars(args), "a.pth")
    assert flags.complete(read) == args
    assert read.items() >= given.items()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 0}, "argument --epochs: must be a whole number at least 1, not 0"),
        ({"epochs": "many"}, "argument --epochs: must be a whole number at least 1, not many"),
        ({"lr": math.nan}, "argument --lr: must be a number at least 1e-12, not nan"),
        ({"recipe": "some"}, "argument --recipe: invalid choice: 'some'"),
        ({"pictures": 7}, "argument --pictures/--no-pictures"),
        ({"overwrite": "yes"}, "argument --overwrite: ignored explicit argument 'yes'"),
        ({"lrs": []}, "argument --lrs: expected at least one argument"),
        ({"lrs": [1.0, "-x"]}, "some.py|-x"),
    ],
)
def test_flags_that_cannot_be_name_the_checkpoint(change, named, capsys):
    flags = make_flags()
    saved = vars(flags.read([])[0]) | change
    with pytest.raises(ValueError, match=r"^a\.pth: ") as error:
        flags.checked(saved, "a.pth")
    assert re.search(named, str(error.value))
    assert capsys.readouterr().err == ""
    some = types.SimpleNamespace(main=flags.read)  # the command line's are argparse's again
    assert refused(capsys, some, "--epochs", "0").startswith("some.py: argument --epochs: must")


def test_wrong_flags_are_one_line(capsys):
    some = types.SimpleNamespace(main=make_flags().read)
    for line, named in (
        ("--epochs 0", "some.py: argument --epochs: must be a whole number at least 1, not 0\n"),
        ("--warmup 900", "some.py: --warmup 900: is longer than the run\n"),
        ("--recipe mine", "argument --recipe: invalid choice: 'mine'"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),  # no abbreviations
        ("--resume=", "argument --resume: must be the path of a file"),
        ("--no-overwrite", "unrecognized arguments: --no-overwrite"),
    ):
        assert named in refused(capsys, some, *line.split())


@pytest.mark.parametrize(
    ("kind", "least", "most", "good", "bad"),
    [
        (int, 0, math.inf, ["0", "7", "-0"], ["-1", "0.5", "1e3", "", "x", "nan", "inf"]),
        (int, 8, 1024, ["8", "1024"], ["7", "1025"]),
        (float, 0, math.inf, ["0", "1e3", "0.5", "7"], ["-1e-9", "nan", "inf", "-inf", "", "x"]),
        (float, 0, 1, ["0", "1", "0.25"], ["1.0001", "nan", "inf"]),
    ],
)
def test_a_number_is_finite_and_in_its_range(kind, least, most, good, bad):
    parse = utils.number(kind, least, most)
    for text in good:
        assert parse(text) == kind(text)
        assert type(parse(text)) is kind
    limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
    noun = "whole number" if kind is int else "number"
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            parse(text)
        assert str(error.value) == f"must be a {noun} {limits}, not {text}"


def test_names_of_files():
    assert utils.file_name("a.b c") == "a.b c"
    for text in ("", ".", "..", "a/b", "/a", "a/"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a file name"):
            utils.file_name(text)
    assert utils.file_path("a/b") == "a/b"
    with pytest.raises(argparse.ArgumentTypeError, match="must be the path of a file"):
        utils.file_path("")


def test_a_run_at_a_path_has_its_folder_and_name():
    flags = {"resume": "some/where/a_model.pth", "overwrite": False, "out": "results", "name": None}
    assert utils.place_of_run(flags, {}) == flags | {"out": "some/where", "name": "a"}
    given = {"out": "elsewhere", "name": "b"}
    assert utils.place_of_run(flags | given, given) == flags | given
    assert utils.place_of_run(flags | {"resume": True}, {})["name"] is None
    with pytest.raises(ValueError, match="--overwrite: does not go with --resume"):
        utils.place_of_run(flags | {"overwrite": True}, {})


def test_the_users_own_data_are_called_by_their_folder():
    assert utils.data_label("cifar10", "data") == "cifar10"
    assert utils.data_label("folder", "/some/birds/") == "folder:birds"
    assert utils.data_label("webdataset", "/some/train-{0..9}.tar") == "webdataset:train-{0..9}.tar"


# ---- errors in one line -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, PermissionError])
def test_what_the_user_can_mend_is_one_line(capsys, error):
    parser = utils.Parser("some.py", "")
    with pytest.raises(SystemExit) as stop, parser.bad_input():
        raise error("--flag:\n  is wrong")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "some.py: --flag: is wrong\n"


def test_mistakes_of_ours_keep_their_traceback():
    parser = utils.Parser("some.py", "")
    with pytest.raises(KeyError), parser.bad_input():
        raise KeyError("ours")
    with parser.bad_input():
        pass

    def wrong():
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        utils.run_command(wrong)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunError("the disk is full"), 1, "some.py: the disk is full\n"),
        (UnreadableImageError("a.jpg: cannot be read"), 2, "some.py: a.jpg: cannot be read\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_each_end_of_a_command_is_one_line(capsys, monkeypatch, error, code, line):
    monkeypatch.setattr(sys, "argv", ["/some/where/some.py"])

    def ends():
        raise error

    with pytest.raises(SystemExit) as stop:
        utils.run_command(ends)
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_a_command_ignores_pil_s_warnings_and_leaves_the_filters_as_they_were():
    before = list(warnings.filters)
    args = argparse.Namespace(ddp=False, overwrite=False)
    with utils.joined(args, utils.Parser("some.py", "")):
        assert any(one[2] is Image.DecompressionBombWarning for one in warnings.filters)
    assert warnings.filters == before


# ---- device -------------------------------------------------------------------------------------


def test_amp_is_off_on_the_cpu_unless_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    x = torch.ones(2, 2)
    for amp, dtype in [("auto", torch.float32), ("off", torch.float32), ("bf16", torch.bfloat16)]:
        args = argparse.Namespace(device="cpu", amp=amp, deterministic=False)
        device, found = devices.setup_device(args)
        assert device == CPU
        assert found == ("bf16" if dtype == torch.bfloat16 else "off")
        assert args.amp == amp  # nothing is written into the flags
        with devices.autocast(device, found):
            assert (x @ x).dtype == dtype


def test_a_gpu_becomes_the_current_device_and_bf16_must_be_its_own(monkeypatch):
    """A T4 says that it supports bf16: it emulates it, and has no convolutions of it."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "zeros", lambda *size, **more: None)  # there is none to allocate on
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    for native, amp in ((False, "off"), (True, "bf16")):
        answer = {True: True, False: native}
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, answer=answer: answer[including_emulation],
        )
        args = argparse.Namespace(device="cuda:1", amp="auto", deterministic=False)
        assert devices.setup_device(args) == (torch.device("cuda", 1), amp)
    assert chosen == [1, 1]
    assert torch.backends.cudnn.benchmark
    args.deterministic = True
    try:
        devices.setup_device(args)
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


def test_compile_without_a_compiler_is_said_in_one_line(tmp_path):
    """Before anything is written; a machine without g++ has none on its PATH, nor in CXX."""
    env = os.environ | {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    env |= {"CXX": "g++"}
    flags = f"--data_name textures --train_size 64 --batch_size 32 --compile --out {tmp_path}/runs"
    command = [sys.executable, ROOT / "main.py", *flags.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("main.py: --compile: torch.compile does not work here (")
    assert "g++" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_is_pytorch_s(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        args = argparse.Namespace(device="cpu", amp="auto", deterministic=deterministic)
        devices.setup_device(args)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
        assert vars(args) == {"device": "cpu", "amp": "auto", "deterministic": deterministic}
    finally:
        torch.use_deterministic_algorithms(before)


def test_device_that_is_not_there():
    assert devices.pick_device("cpu") == CPU
    for name in ("cuda:77", "gpu", "meta", ""):
        with pytest.raises(ValueError, match="--device"):
            devices.pick_device(name)


def test_auto_is_the_accelerator_that_is_there(monkeypatch):
    there = torch.accelerator.is_available()
    assert (devices.pick_device("auto").type != "cpu") == there
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert devices.pick_device("auto") == CPU
    with pytest.raises(ValueError, match="--device cuda"):
        devices.pick_device("cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert devices.pick_device("auto") == torch.device("mps")
    assert devices.pick_device("cpu") == CPU


def test_a_run_introduces_itself(capsys):
    net = SimSiam("resnet8", feature_dim=64)
    images, labels = make_textures(30, seed=1)
    data = Data(images, labels, images[:7], labels[:7], list("abcdefghij"))
    counts = params_and_flops(net, 32)
    columns = utils.print_summary(
        "some/run: SimSiam", net, counts, data, "folder:birds", 32, CPU, "off"
    )
    params = sum(p.numel() for p in net.parameters()) / 1e6
    known = {"train_size": 30, "width": 16, "device": "cpu", "params_m": params}
    assert columns == known | {"flops_g": pytest.approx(0.0126, abs=0.0005)}
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"some/run: SimSiam: {params:.2f}M parameters, 12.")
    assert "folder:birds: 30 training images, 7 test images, 10 classes, 32 pixels" in second


# ---- progress -----------------------------------------------------------------------------------


class Clock:
    """In the place of time.perf_counter: it stands still until it is moved."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class Counted(Meters):
    """Sums that count how often they are read from the device."""

    reads = 0

    def means(self, number):
        self.reads += 1
        self.number = number
        return super().means(number)


ARGS = argparse.Namespace(epochs=3, batch_size=64)
SHOWN = {"loss": "loss", "top1": "top-1"}


def test_progress_waits_for_the_device_once_a_second(clock):
    tally = Counted(CPU, "top1")
    read = []
    with Progress(0, ARGS, 100, SHOWN, "a smaller one") as progress:
        for step in range(50):
            tally.add(loss=torch.tensor(1.0), top1=torch.tensor(0.5))
            read.append(progress(step, tally))
            clock.now += 0.3
    # Not at the first, which holds the warm-up; at the second, for the estimate; then where more
    # than a second has passed, which is every fourth step of 0.3 s.
    assert [step for step, seen in enumerate(read) if seen] == list(range(1, 50, 4))
    assert tally.reads == sum(read)
    assert tally.number == 50  # the sums over the steps of the epoch


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(clock, capsys):
    tally = Meters(CPU, "top1")
    with Progress(1, ARGS, 600, SHOWN, "a smaller one") as progress:
        for step in range(600):
            tally.add(loss=torch.tensor(2.0), top1=torch.tensor(0.25))
            clock.now += 0.5
            progress(step, tally)
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert len(lines) == 5  # of 300 seconds
    # A minute is 120 steps of 0.5 s at 64 images: 480 steps are left, and a whole epoch after it.
    assert lines[0] == (
        "epoch 2/3 loss 2.000 top-1 0.250 128 images/s, left 04:00, run 09:00 (step 120 of 600)"
    )
    assert lines[-1].endswith("left 00:00, run 05:00 (step 600 of 600)")


def test_progress_counts_larger_epochs_to_come(clock, capsys):
    with Progress(1, ARGS, 600, {"loss": "loss"}, "a smaller one", rest=2.25) as progress:
        for step in range(122):
            clock.now += 0.5
            progress(step, Meters(CPU))
    # An epoch is 5 minutes: 4 are left of this one, and the next takes 2.25 times as long.
    assert "left 04:00, run 15:15 (step 120 of 600)" in capsys.readouterr().out


def test_progress_after_a_resume_counts_its_own_steps(clock, capsys):
    """From step 400 of 600 on: the speed is of what was done here, the mean of the epoch."""
    tally = Counted(CPU, "top1")
    with Progress(2, ARGS, 600, SHOWN, "a smaller one", start=400, unit=64) as progress:
        for step in range(400, 600):
            clock.now += 0.5
            progress(step, tally)
    (line,) = capsys.readouterr().out.splitlines()
    assert "128 images/s, left 00:40, run 00:40 (step 520 of 600)" in line
    assert tally.number % 64 == 0
    assert tally.number > 64 * 590


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal(clock, capsys, monkeypatch):
    terminal, tally = Terminal(), Meters(CPU, "top1")
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(0, ARGS, 600, SHOWN, "a smaller one") as progress:
        for step in range(600):
            tally.add(loss=torch.tensor(-0.5), top1=torch.tensor(0.5))
            clock.now += 0.5
            progress(step, tally)
    assert capsys.readouterr().out == ""  # no lines besides
    looks = [look for look in terminal.getvalue().split("\r") if "images/s" in look]
    assert len(looks) > 100
    text = looks[-1].split("|")[0]
    assert text.startswith("1/3 loss -0.500 top-1 0.500 128 images/s, left 00:0")
    assert len(text) < 80
    assert terminal.getvalue().endswith("\r")  # it is wiped away at the epoch's end


@pytest.mark.parametrize(
    ("epoch", "seconds", "said"), [(0, 30, True), (0, 28, False), (1, 50, False)]
)
def test_a_run_of_more_than_a_day_is_said_at_its_start(clock, capsys, epoch, seconds, said):
    """3 epochs of 1000 steps, of 30 s each: 25 hours; of 28 s: 23.3. Later it is not news."""
    tally = TrainMeters(CPU)
    with Progress(epoch, ARGS, 1000, {"loss": "loss"}, "--epochs 5") as progress:
        for step in range(3):
            tally.add(torch.tensor(-0.5), torch.randn(4, 4))
            progress(step, tally)
            clock.now += seconds
    out = capsys.readouterr().out
    assert ("the run takes 1 days on this machine. A smaller one: --epochs 5" in out) == said
    assert out.count("note:") == said


def test_ranks_other_than_the_first_show_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(sys, "stderr", Terminal())
    tally = Counted(CPU, "top1")
    with Progress(0, ARGS, 600, SHOWN, "a smaller one") as progress:
        for step in range(600):
            clock.now += 0.5
            assert not progress(step, tally)
    assert tally.reads == 0  # nor do they wait for their device
    assert sys.stderr.getvalue() == capsys.readouterr().out == ""
