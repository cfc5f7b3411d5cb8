"""No run is lost: kills, signals, full disks, bad files, junk on the command line."""

import io
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import linear
import main
import utils
from simsiam.runtime.config import default_workers
from simsiam.runtime.files import RunError
from simsiam.training import checkpoint
from simsiam.training.meters import TrainMeters
from simsiam.training.recipes import LinearConfig, PretrainConfig
from simsiam.training.run import Run
from simsiam.training.state import TrainState
from tests import crash
from tests.helpers import ROOT, interrupt, refused, same_bits, texture_folder
from tests.hostile import Call, deflated, torch_file
from tests.projects import ours

TINY = (
    "--data_name textures --train_size 200 --width 4 --feature_dim 16 --batch_size 32 --no-pictures"
).split()
FOLDER = (
    "--data_name folder --recipe short --width 4 --feature_dim 16 --batch_size 32 --no-pictures"
).split()


def run(out, *flags, on_step=None):
    main.main([*TINY, "--out", str(out), *map(str, flags)], on_step)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(out, "--epochs", 2, "--name", "whole")
    return out


@pytest.fixture
def out(whole_run, tmp_path):
    """A folder with a finished run of two epochs, `whole`."""
    return Path(shutil.copytree(whole_run, tmp_path / "out"))


def end(process, seconds=300):
    """Return the output of a process when it has ended, by itself and in time."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


def wait_for_training(process):
    assert any(line.startswith("epoch 1/") for line in process.stdout)


def start(*argv):
    """Start a command in a process of its own, with its two outputs in one pipe."""
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def signal_in(command, argv, epoch, step):
    """Run a command, and send it SIGTERM before a step (from 0) is counted; it exits with 143."""

    def on_step(*current):
        if current == (epoch, step):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        command.main([str(word) for word in argv], on_step)
    assert stop.value.code == 143


# ---- kills and signals --------------------------------------------------------------------------


def test_killed_runs_end_at_the_same_bits():
    process = start("-m", "tests.crash", "--kills", 3)
    out = end(process)
    assert process.returncode == 0, out
    assert "3 of 3 kills survived" in out


def test_equal_flags_give_equal_bits_and_a_seed_other_ones(out):
    run(out, "--epochs", 2, "--name", "b", "--deterministic")  # changes nothing on a CPU
    assert torch.are_deterministic_algorithms_enabled()
    assert crash.differences(out / "whole", out / "b") == []
    run(out, "--epochs", 2, "--name", "c", "--seed", 1)
    assert not torch.are_deterministic_algorithms_enabled()
    expected = {"backbone.conv1.weight", "momentum 0", "statistics", "results.csv"}
    expected |= {"probe's weight", "probe's bias_momentum"}
    assert expected <= set(crash.differences(out / "whole", out / "c"))


def test_a_signal_ends_a_run_in_good_order(tmp_path):
    command = ["main.py", *TINY, "--out", tmp_path, "--epochs", 3000, "--knn_every", 3000]
    command += ["--checkpoint_minutes", 0, "--name"]
    numbers = {"a": signal.SIGINT, "b": signal.SIGTERM}
    processes = {name: start(*command, name) for name in numbers}  # side by side
    for name, process in processes.items():
        wait_for_training(process)
        process.send_signal(numbers[name])
    for name, process in processes.items():
        out = end(process)
        assert process.returncode == 128 + numbers[name], out
        assert "--resume" in out.splitlines()[-1]
        state = checkpoint.load(tmp_path / f"{name}_model.pth")
        rows = pandas.read_csv(tmp_path / f"{name}_statistics.csv")
        assert len(state["history"]) == len(rows) == state["epoch"] + 1
    assert not list(tmp_path.glob(".*"))  # neither lock nor half a file


@pytest.fixture
def one_thread():
    """As processes that `start` starts: the last bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_signal_breaks_off_the_knn(tmp_path, one_thread):
    """The second one, of epoch 1, where the rank of the features is computed."""
    flags = [*TINY, "--out", str(tmp_path), "--epochs", "2", "--checkpoint_minutes", "0", "--name"]
    code = """
import os, signal, sys, torch, main, utils
signal.signal(signal.SIGINT, signal.default_int_handler)
number, *flags = sys.argv[1:]
eigvalsh, calls = torch.linalg.eigvalsh, []
def strike(x):
    calls.append(0)
    if len(calls) == 2:
        os.kill(os.getpid(), int(number))
        print("went on")
    return eigvalsh(x)
torch.linalg.eigvalsh = strike
utils.run_command(lambda: main.main(flags))
"""
    numbers = {"a": signal.SIGINT, "b": signal.SIGTERM}
    codes = {"a": 128 + signal.SIGINT, "b": -signal.SIGTERM}
    processes = {name: start("-c", code, int(numbers[name]), *flags, name) for name in numbers}
    main.main([*flags, "whole"])
    for name, process in processes.items():
        out = end(process)
        assert process.returncode == codes[name], out
        assert "went on" not in out
        assert "Traceback" not in out
        state = checkpoint.load(tmp_path / f"{name}_model.pth")
        assert (state["epoch"], state["step"]) == (0, 6)  # all of the epoch's steps
    for name in processes:
        main.main([*flags, name, "--resume"])
    for name in processes:
        assert crash.differences(tmp_path / "whole", tmp_path / name) == []


def test_a_second_process_is_refused_and_names_the_first(tmp_path, capsys):
    command = [*TINY, "--out", tmp_path, "--name", "a", "--epochs", 3000]
    process = start("main.py", *command)
    wait_for_training(process)
    for flag in ("--resume", "--overwrite"):
        assert f"process {process.pid} " in refused(capsys, main, *command, flag)
    process.kill()
    process.communicate()
    assert (tmp_path / ".a.lock").read_bytes() == b""  # Windows opens no locked file again
    assert (tmp_path / ".a.pid").read_text() == f"{process.pid}\n"
    (tmp_path / ".a_curves.png.part").touch()  # what it may have left behind
    run(tmp_path, "--name", "a", "--epochs", 1, "--overwrite")  # the dead one's lock is taken over
    assert not list(tmp_path.glob(".*"))


# ---- resume -------------------------------------------------------------------------------------


def test_what_a_resume_may_change(out, capsys):
    path = out / "whole_model.pth"
    for flag, before, after in [
        ("--arch", "resnet8", "resnet14"),
        ("--batch_size", 32, 16),
        ("--train_size", 200, 100),
        ("--seed", 0, 1),
        ("--data_name", "textures", "folder"),
        ("--epochs", 2, 5),
    ]:
        line = refused(capsys, main, "--resume", path, flag, after)
        assert f"{flag} {before}" in line
        assert f"{flag} {after}" in line
    main.main(["--resume", str(path), "--num_workers", "0", "--knn_every", "2"])
    assert f"--num_workers 0 (was {default_workers()})" in capsys.readouterr().out


def test_more_epochs_while_the_warm_up_lasts(tmp_path, capsys):
    """The learning rates of the warm-up are those of any number of epochs."""
    flags = [*TINY, "--out", tmp_path, "--warmup_epochs", 1, "--checkpoint_minutes", 0]
    run(tmp_path, "--epochs", 3, *flags, "--name", "whole")
    interrupt(main, [*flags, "--epochs", 2, "--name", "cut"], epoch=1)
    path = tmp_path / "cut_model.pth"
    assert "--warmup_epochs 1" in refused(capsys, main, "--resume", path, "--epochs", 1)
    run(tmp_path, "--epochs", 3, *flags, "--name", "cut", "--resume")
    assert "--epochs 3 (was 2)" in capsys.readouterr().out
    assert crash.differences(tmp_path / "whole", tmp_path / "cut") == []


def test_other_images_are_refused(tmp_path, capsys):
    texture_folder(tmp_path / "images")
    flags = [*FOLDER, "--epochs", 1, "--out", tmp_path, "--name", "a", "--data_root"]
    main.main([str(word) for word in (*flags, tmp_path / "images")])
    image = next((tmp_path / "images" / "train").rglob("*.png"))
    Image.new("RGB", (32, 32)).save(image)
    err = refused(capsys, main, *flags, tmp_path / "images", "--resume")
    assert f"--data_root {tmp_path}/images" in err
    assert f"{tmp_path}/a_model.pth" in err


def test_a_damaged_checkpoint_falls_back_to_the_one_before(out, capsys, monkeypatch):
    unlink = Path.unlink  # a run that ends removes the one before the last
    monkeypatch.setattr(
        Path, "unlink", lambda self, **more: ".prev" in self.name or unlink(self, **more)
    )
    run(out, "--epochs", 2, "--name", "cut", "--checkpoint_minutes", 0)
    monkeypatch.undo()
    path = out / "cut_model.pth"
    content = path.read_bytes()
    weights = checkpoint.load(path)["model"]["projector.0.weight"].numpy().tobytes()
    at = content.index(weights) + 5
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])  # one bit
    capsys.readouterr()
    replace = os.replace

    def replace_but_the_previous(source, target):
        assert not str(target).endswith(".prev.pth")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_but_the_previous)
    run(out, "--epochs", 2, "--name", "cut", "--resume")
    assert "cut_model.prev.pth" in capsys.readouterr().out
    assert crash.differences(out / "whole", out / "cut") == []


def test_linear_resumes_within_an_epoch(out):
    flags = ["--model_path", out / "whole_model.pth", "--out", out, "--epochs", 3]
    flags = [*flags, "--batch_size", 64, "--name"]
    linear.main([*map(str, flags), "lin"])
    whole = torch.load(out / "lin_model.pth")["model"]
    table = pandas.read_csv(out / "lin_statistics.csv").drop(columns="seconds")
    for step in (2, 4):  # the second: the epoch's last
        signal_in(linear, [*flags, step], 1, step - 1)
        state = torch.load(out / f"{step}_model.pth")
        assert (state["epoch"], state["step"]) == (1, step)
        linear.main(["--resume", f"{out}/{step}_model.pth"])
        assert same_bits(torch.load(out / f"{step}_model.pth")["model"], whole)
        cut = pandas.read_csv(out / f"{step}_statistics.csv").drop(columns="seconds")
        assert cut.equals(table)


# ---- what goes wrong in a run -------------------------------------------------------------------


@pytest.mark.parametrize(("minutes", "saved"), [(0, (1, 1)), (10, (0, 0))])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, minutes, saved):
    """Its step is not applied; the checkpoint before stays, with `saved` epochs and steps."""
    cosine, step, calls, moved = F.cosine_similarity, torch.optim.SGD.step, [], []

    def poisoned(p, z, dim):
        calls.append(0)
        return cosine(p, z, dim=dim) * (float("nan") if len(calls) == 2 * 8 else 1)

    def remember(self):
        before = [p.detach().clone() for p in self.param_groups[0]["params"]]
        step(self)
        moved.append(not all(map(torch.equal, before, self.param_groups[0]["params"])))

    monkeypatch.setattr(F, "cosine_similarity", poisoned)
    monkeypatch.setattr(torch.optim.SGD, "step", remember)
    with pytest.raises(RunError, match="epoch 2, step 2, at lr 0.0839.*a_model.pth"):
        run(tmp_path, "--epochs", 3, "--name", "a", "--checkpoint_minutes", minutes)
    state = checkpoint.load(tmp_path / "a_model.pth")
    assert (state["epoch"], state["step"]) == saved
    assert moved[:7] == [True] * 7
    assert moved[7:]
    assert not any(moved[7:])  # the eighth step of all, and any after it


def test_weights_that_are_not_finite_are_not_torch_file(tmp_path):
    _, path = ours(tmp_path, "resnet8", "cifar", 2)
    state, content = checkpoint.load(path), path.read_bytes()
    state["config"] = state["config"].as_dict()
    bad = torch.full((2,), float("nan"))
    for part in ({"probe": {"weight": bad}}, {"model": state["model"] | {"weight": bad}}):
        with pytest.raises(RunError, match=str(path)):
            checkpoint.save(str(path), None, state | part)
        assert path.read_bytes() == content


class Clock:
    """Seconds that pass on demand."""

    now = 0.0

    def __call__(self):
        return self.now


def small_run(out, clock, *words):
    """A Run whose network is one layer, and its state, of two steps per epoch."""
    argv = [*TINY, "--out", str(out), "--name", "a", "--no-probe", *words]
    config, overrides = utils.ConfigParser("main.py", "", PretrainConfig).read(argv)
    run, net = Run("main.py", config, overrides, main.STATISTICS, clock), torch.nn.Linear(2, 2)
    encoder = {name: getattr(config, name) for name in ("arch", "stem", "width")}
    encoder |= {"image_size": 32, "mean": (0.5,), "std": (0.5,)}
    run.check_unchanged(images_checksum=0, classes=[], encoder=encoder)
    optimizer, meters = torch.optim.SGD(net.parameters()), TrainMeters(torch.device("cpu"))
    return run, TrainState(net, optimizer, range(2), meters, lambda progress: 1.0)


def on_disk(out):
    """Epochs and steps of the checkpoint, and rows of the table."""
    state, table = checkpoint.load(out / "a_model.pth"), out / "a_statistics.csv"
    return state["epoch"], state["step"], len(pandas.read_csv(table)) if table.exists() else 0


def test_an_epoch_s_end_and_a_knn_write_no_checkpoint_too_soon(tmp_path):
    """No checkpoint within 60 s and no table within 10 s, unless the run is at its end."""
    clock = Clock()
    # Seconds of two steps and of the kNN; what is on the disk at the kNN and after.
    story = [
        (4, 5, (0, 0, 0), (0, 0, 0)),  # 9 s after the run's first checkpoint
        (0, 1, (0, 0, 0), (0, 0, 3)),  # 10 s after it: the table
        (49, 0, (0, 0, 3), (0, 0, 4)),  # 59 s after it
        (1, 60, (3, 2, 4), (4, 0, 5)),  # 60 s: a checkpoint before the kNN, another 60 s later
        (0, 0, (4, 0, 5), (5, 0, 6)),  # the last
    ]
    run, state = small_run(tmp_path, clock, "--epochs", "5")
    with run:
        run.start(state, [{"epoch": 0}])
        for epoch in run.epochs():
            steps, knn, before, after = story[epoch]
            run.after_step(0)
            clock.now += steps
            run.after_step(1)
            with run.evaluation_phase():
                assert on_disk(tmp_path) == before
                clock.now += knn
            row = run.after_epoch({"train_loss": -0.5})
            expected = {"epoch": epoch + 1, "lr": 1.0, "train_loss": -0.5, "seconds": steps + knn}
            assert row == expected
            assert on_disk(tmp_path) == after


def test_steps_write_checkpoints_every_so_many_minutes(tmp_path):
    clock, written = Clock(), []
    run, state = small_run(tmp_path, clock, "--epochs", "3", "--checkpoint_minutes", "0.05")  # 3 s
    with run:
        run.start(state, [{"epoch": 0}])
        for _ in run.epochs():
            for step in range(2):
                clock.now += 1.5
                run.after_step(step)
                written.append(on_disk(tmp_path)[:2])
            run.after_epoch({})
            written.append(on_disk(tmp_path)[:2])
            clock.now += 1
    # 1.5, 3, 3 | 5.5, 7, 7 | 9.5, 11, 11 s
    assert written == [(0, 0), (0, 2), (0, 2), (0, 2), (1, 2), (1, 2), (1, 2), (2, 2), (3, 0)]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, capsys):
    run(tmp_path, "--epochs", 1, "--name", "a")
    before = (tmp_path / "a_model.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # of a file
    try:
        with pytest.raises(RunError, match=r"a_model.pth: .*\(File too"):
            run(tmp_path, "--epochs", 1, "--name", "a", "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a_model.pth").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a_model.pth",
        "a_statistics.csv",
        "results.csv",
    ]


def test_a_table_that_cannot_be_written_stops_nothing_before_the_end(tmp_path, capsys):
    flags = ("--epochs", 2, "--name", "a", "--checkpoint_minutes", 0)
    (tmp_path / "a_statistics.csv").mkdir()
    (tmp_path / "a_statistics.csv" / "x").touch()
    with pytest.raises(RunError, match="a_statistics.csv"):
        run(tmp_path, *flags, "--overwrite")
    assert "warning: " in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "a_model.pth")["epoch"] == 2
    (tmp_path / "a_statistics.csv" / "x").unlink()
    (tmp_path / "a_statistics.csv").rmdir()
    run(tmp_path, *flags, "--resume")
    assert len(pandas.read_csv(tmp_path / "a_statistics.csv")) == 3
    assert len(pandas.read_csv(tmp_path / "results.csv")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's count, trims glibc's heap")
def test_memory_stays_flat(tmp_path):
    flags = [*TINY, "--epochs", "12", "--out", str(tmp_path), "--checkpoint_minutes", "0"]
    code = f"""
import ctypes, main
from pathlib import Path
def look(epoch, step):
    if step == 5:  # the last of 6
        ctypes.CDLL(None).malloc_trim(0)  # give back what is free
        print("KB:", Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
main.main({flags}, look)
"""
    process = start("-c", code)
    out = end(process)
    sizes = [int(line.split()[1]) for line in out.splitlines() if line.startswith("KB:")]
    print(sizes)
    assert len(sizes) == 12, out
    assert sizes[11] <= 1.003 * sizes[3]  # 2.5 MB in 8 epochs


# ---- malformed checkpoints ----------------------------------------------------------------------


GONE = object()  # in the place of a value: the entry is left out


def variants(state, table):
    """Names and contents of checkpoints in which one entry, "key" or "key/part", is another."""
    for path, *values in table:
        key, _, part = path.partition("/")
        for value in values:
            entries = dict(state[key] if part else state) | {part or key: value}
            entries = {name: entry for name, entry in entries.items() if entry is not GONE}
            words = f"{path} {'gone' if value is GONE else value}"[:60]
            yield words, torch_file(state | {key: entries} if part else entries)


def malformed(whole: bytes, out: Path):
    """Names and contents of files that are no good checkpoints, whatever they are read for."""
    for share in (0, 0.01, 0.5, 0.9999):
        yield f"cut at {share}", whole[: int(share * len(whole))]
    yield "compressed", deflated(whole)
    yield "text", b"not a checkpoint\n" * 1000
    yield "a pickle", b"\x80\x04cos\nsystem\n(S'touch ran'\ntR."
    state = torch.load(io.BytesIO(whole), weights_only=True)
    yield "a list", torch_file([state])
    yield "a tensor", torch_file(torch.ones(3))
    first, kinds = next(iter(state["model"])), checkpoint.FORMAT.items()
    weight, rows = state["model"][first], state["history"]
    yield from variants(
        state,
        [
            *((k, GONE, None, True, 3 if kind is str else "junk") for k, (kind, _) in kinds),
            *((k, 2.5 if kind is int else 2) for k, (kind, _) in kinds),
            ("version", 1, 99, "2", -2),
            ("command", "convert.py"),
            ("epoch", -1, 0, 2, 10**30),
            ("step", -1),
            ("seconds", math.nan, math.inf),
            ("history", [], [3], [{"epoch": "x"}] * len(rows), rows * 2),
            ("model", dict.fromkeys(state["model"], 3), {}, {3: torch.ones(3)}),
            ("model/more", torch.ones(1)),
            (
                f"model/{first}",
                GONE,
                torch.full_like(weight, math.nan),
                torch.ones(3, 3),
                weight.double(),
                torch.ones(1).expand(10**6, 10**6),  # a huge claim
                torch.ones(()).expand(weight.shape),  # one number for all
                torch.ones(3, 3).to_sparse(),
            ),
            ("classes", [1, 2], [["rows"]], [None] * 10),
            ("config", {}, {3: 3}, Call(open, str(out / "ran"), "w")),
            ("config/lr", ["0.1", "--help"]),
            ("probe", {"weight": 3}, {"weight": [torch.ones(3)]}),
            ("meters/loss", math.nan, math.inf, "junk", None, [1.0], True),
            ("extra/lr", math.nan, math.inf, "junk", None, [1.0], torch.ones(3)),
            ("extra/collapse", math.nan, "junk"),
            ("scaler/scale", math.nan, "junk"),
            ("encoder", {}, []),
            ("encoder/more", 1),
            *((f"encoder/{part}", GONE) for part in checkpoint.ENCODER),
            ("encoder/arch", "resnet14", "resnet18", "vgg", ["resnet8"], None, 3, {}),
            ("encoder/stem", "imagenet", "junk", None, ["cifar"], 3),
            ("encoder/width", 10**9, 10**30, "4", -4, 0, 4.5, math.nan, [4], None),
            ("encoder/image_size", 10**9, 0, -32, "32", 32.0, None, True),
            ("encoder/mean", (0.5, 0.5), (0.5, 0.5, math.nan), ("a", "b", "c"), 0.5, None, "abc"),
            ("encoder/std", (0.5, 0.5), (0.5, 0.5, 0.0), (0.5, 0.5, -1.0), ("a", "b", "c"), None),
        ],
    )
    if state["command"] == "linear.py":
        classes = state["classes"]
        more = [("probe", {"weight": torch.ones(3)}), ("classes", classes[1:], [*classes, "more"])]
    else:
        more = [  # of Config.from_dict: see tests/test_config.py
            ("config/feature_dim", GONE, 10**12, 10**30, "16", -1, 17),
            ("config/projector_layers", 10**9, 0, 3),
            ("config/predictor", "none", ["mlp"], {}),
            ("config/bn", GONE, "none", ["all"]),
            ("config/data_name", GONE, "junk", ["textures"]),
            ("config/crop_scale", (0.2,), ("a", "b"), 0.2),
            ("config/blur_sigma", (0.1, math.inf)),
            ("config/probe", False, None, "junk", 1),
        ]
    yield from variants(state, more)


def no_way_on(whole: bytes):
    """Names and contents of checkpoints whose network is good, but not the rest of their run."""
    state = torch.load(io.BytesIO(whole), weights_only=True)
    momentum, is_main = state["optimizer"]["state"], state["command"] == "main.py"
    buffer, rows = momentum[0]["momentum_buffer"], state["history"]
    columns = ["test_acc@1", "test_acc@5", "seconds", *(["raw_acc@1"] * is_main)]
    entries = [
        ("meters", {"loss": 1.0, "top99": 1.0}),
        ("step", 99),
        ("images_checksum", 1),
        ("config/epochs", "junk", 0, 1),  # the last: all are done, and a step more
        ("config/lr", math.nan, "junk"),
        ("config/seed", -1),
        ("config/num_workers", -1),
        ("optimizer", {}),
        (
            "optimizer/state",
            "junk",
            momentum | {0: "junk"},
            momentum | {len(momentum): {"momentum_buffer": buffer}},
            momentum | {0: {"momentum_buffer": torch.ones(3)}},
            momentum | {0: {"momentum_buffer": buffer * math.nan}},
            momentum | {0: {"exp_avg": buffer}},
        ),
        ("history", [{"epoch": row["epoch"], "seconds": 1.0} for row in rows]),
        *(("history", [{k: row[k] for k in row if k != name} for row in rows]) for name in columns),
    ]
    if is_main:
        entries += [("config/warmup_epochs", 99), ("classes", ["a", "b"])]
        entries += [("probe", {}), ("probe/x", torch.ones(1))]
        for part, tensor in state["probe"].items():
            values = tensor * math.nan, torch.ones(3), tensor.double()
            entries.append((f"probe/{part}", GONE, *values))
    else:
        entries += [("config/label_fraction", 0), ("config/predict", "x"), ("extra/lr", GONE, 0.0)]
    yield from variants(state, entries)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with images, and with a run of main.py and of linear.py, both cut off in epoch 2."""
    out = tmp_path_factory.mktemp("runs")
    texture_folder(out / "images", 100, 20)  # few: many commands read them all
    flags = [*FOLDER, "--data_root", out / "images", "--name", "pre"]
    model = ["--model_path", out / "pre_model.pth", "--cached", "--name", "lin"]
    for command, words in ((main, flags), (linear, [*model, "--batch_size", 25])):
        signal_in(command, [*words, "--epochs", 2, "--out", out], 1, 1)
    return out


@pytest.mark.parametrize("source", ["pre", "lin"])
def test_malformed_checkpoints(source, runs, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    path = tmp_path / "bad_model.pth"
    out = ("--out", tmp_path / "out")
    use = {
        "pre": [(linear, "--model_path", path, *out)],
        "lin": [
            (linear, "--model_path", path, "--predict", image),
            (linear, "--model_path", path, "--evaluate_only", *out),
        ],
    }[source]
    resume = ({"pre": main, "lin": linear}[source], "--resume", path)
    whole = (runs / f"{source}_model.pth").read_bytes()
    count = 0
    cases = [(*case, [resume, *use]) for case in malformed(whole, tmp_path)]
    cases += [(*case, [resume]) for case in no_way_on(whole)]
    for name, content, commands in cases:
        path.write_bytes(content)
        for command, *argv in commands:
            try:
                err = refused(capsys, command, *argv)
            except pytest.fail.Exception:
                raise AssertionError(f"{source} {name}: {argv} was accepted") from None
            assert "bad_model.pth" in err, (name, err)
            count += 1
        assert path.read_bytes() == content
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bad_model.pth", "image.png"]
    assert count > 200


def test_files_of_no_permission(tmp_path, capsys):
    tmp_path.chmod(0o500)
    root = os.geteuid() == 0
    if root:  # who may do anything
        os.seteuid(65534)
    try:
        err = refused(capsys, main, *TINY, "--out", tmp_path, "--name", "b")
    finally:
        if root:
            os.seteuid(0)
        tmp_path.chmod(0o700)
    assert "Permission denied" in err
    assert not list(tmp_path.iterdir())


# ---- junk on the command line -------------------------------------------------------------------

JUNK = st.one_of(
    st.text(max_size=12).filter(lambda text: not set(text) & set("/~") and ".." not in text),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "0", "-1", "1", "2", "nan", "1e400", "9" * 400, "cifar10", "resnet8", "cpu"]
    ),
)


def values_of(action):
    """Junk, or what a flag takes: nothing, one of its choices, or a number that it may like."""
    if action.nargs == 0:
        usual = st.just([])
    else:
        kind = getattr(action, "kind", None)
        choices = getattr(kind, "choices", None) or "0 1 2 3 8 20 0.5 cpu a".split()
        usual = st.lists(st.sampled_from(list(choices)), min_size=1, max_size=1)
    return st.one_of(usual, usual, usual, st.lists(JUNK, max_size=2))


class TrainedError(Exception):
    """Raised in the place of training."""


@pytest.mark.parametrize("command", [main, linear])
def test_junk_on_the_command_line(command, runs, tmp_path, monkeypatch, capsys):
    """Either a line on stderr and exit code 2, or a run that gets as far as its first step."""
    config = PretrainConfig if command is main else LinearConfig
    actions = utils.ConfigParser("", "", config)._option_string_actions
    names = sorted(set(actions) - {"-h", "--out"})

    def trained(*args):
        raise TrainedError

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(command, "train", trained)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    out, trainings = tmp_path / "out", []
    base = [*FOLDER, "--data_root", str(runs / "images"), "--epochs", "2"]
    if command is linear:
        base = ["--model_path", str(runs / "pre_model.pth"), "--epochs", "2", "--cached"]

    def named(name):
        return st.tuples(st.just(name), values_of(actions[name]))

    @settings(
        max_examples=200,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.sampled_from(names).flatmap(named), max_size=4))
    def try_flags(flags):
        argv = [*base, "--out", str(out)]
        for name, values in flags:
            argv += [name, *values]
        capsys.readouterr()
        code = None
        try:
            command.main(argv)
        except SystemExit as stop:
            code = stop.code
        except (TrainedError, RunError):
            trainings.append(argv)
        err = capsys.readouterr().err
        assert code in (None, 0, 2), (argv, err)  # 0: --help's
        assert code != 2 or err.count("\n") == 1, (argv, err)
        for path in out.rglob("*") if out.exists() else ():
            assert not re.search(r"\.(part|lock)$", path.name), (argv, path)
            if path.suffix == ".pth":
                checkpoint.load(path)
        shutil.rmtree(out, ignore_errors=True)

    try_flags()
    torch.use_deterministic_algorithms(False)  # as one of them may have left it
    assert len(trainings) > 10
