"""No run is lost: kills, signals, full disks, bad files, junk on the command line."""

import copy
import io
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import linear
import main
import utils
from tests import crash

ROOT = Path(__file__).parent.parent
TINY = (
    "--data_name textures --train_size 200 --width 4 --feature_dim 16 --batch_size 32 --no-pictures"
).split()


def run(out, *flags):
    main.main([*TINY, "--out", str(out), *map(str, flags)])


def refused(capsys, command, *argv):
    """Exit code 2 and one line on stderr: that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main([str(word) for word in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.count("\n") == 1, err
    return err


def start(*argv, **more):
    """A command in a process of its own, its two outputs in one pipe."""
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **more,
    )


# ---- kills and signals --------------------------------------------------------------------------


def test_killed_runs_end_at_the_same_bits():
    process = start("-m", "tests.crash", "--kills", 5)
    out = process.communicate()[0]
    assert process.returncode == 0, out
    assert "5 of 5 kills survived" in out


def test_the_harness_sees_a_difference(tmp_path):
    run(tmp_path, "--epochs", 1, "--name", "a")
    run(tmp_path, "--epochs", 1, "--name", "b")
    assert crash.differences(tmp_path / "a", tmp_path / "b") == []
    run(tmp_path, "--epochs", 1, "--name", "c", "--seed", 1)
    found = crash.differences(tmp_path / "a", tmp_path / "c")
    assert {"backbone.conv1.weight", "momentum 0", "statistics", "results.csv"} <= set(found)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_in_good_order(tmp_path, number):
    command = ["main.py", *TINY, "--out", tmp_path, "--name", "a", "--epochs", 3000]
    process = start(*command)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    process.send_signal(number)
    out = process.communicate()[0]
    assert process.returncode == 128 + number, out
    assert "--resume go on after this step" in out
    state = utils.load_checkpoint(tmp_path / "a_model.pth")
    rows = pandas.read_csv(tmp_path / "a_statistics.csv")
    assert len(state["history"]) == len(rows) == state["epoch"] + 1
    assert not list(tmp_path.glob(".*"))  # neither lock nor half a file


def test_a_signal_breaks_off_the_knn(tmp_path, monkeypatch):
    run(tmp_path, "--epochs", 2, "--name", "whole")
    real, calls = main.monitor, []

    def signal_in_the_second(*args):
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("went on")
        return real(*args)

    monkeypatch.setattr(main, "monitor", signal_in_the_second)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--epochs", 2, "--name", "cut")
    assert stop.value.code == 143
    state = utils.load_checkpoint(tmp_path / "cut_model.pth")
    assert (state["epoch"], state["step"]) == (0, 6)  # all of the epoch's steps
    monkeypatch.undo()
    run(tmp_path, "--epochs", 2, "--name", "cut", "--resume")
    assert crash.differences(tmp_path / "whole", tmp_path / "cut") == []


def test_a_second_process_is_refused_and_names_the_first(tmp_path, capsys):
    command = [*TINY, "--out", tmp_path, "--name", "a", "--epochs", 3000]
    process = start("main.py", *command)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    assert f"process {process.pid} " in refused(capsys, main, *command, "--resume")
    assert f"process {process.pid} " in refused(capsys, main, *command, "--overwrite")
    process.kill()
    process.communicate()
    assert (tmp_path / ".a.lock").exists()
    run(tmp_path, "--name", "a", "--epochs", 1, "--overwrite")  # the dead one's lock is taken over
    assert not (tmp_path / ".a.lock").exists()


# ---- resume -------------------------------------------------------------------------------------


def test_what_a_resume_may_change(tmp_path, capsys):
    run(tmp_path, "--epochs", 2, "--name", "a")
    path = tmp_path / "a_model.pth"
    for flags, both in [
        (("--arch", "resnet14"), ("resnet8", "resnet14")),
        (("--batch_size", 16), ("32", "16")),
        (("--train_size", 100), ("200", "100")),
        (("--seed", 1), ("0", "1")),
        (("--data_name", "folder"), ("textures", "folder")),
        (("--epochs", 5), ("2", "5")),
    ]:
        err = refused(capsys, main, "--resume", path, *flags)
        assert all(value in err for value in both)
    main.main(["--resume", str(path), "--num_workers", "0", "--knn_every", "2"])
    out = capsys.readouterr().out
    assert "--num_workers 0 (was 2)" in out
    assert "the run is finished" in out
    assert "none_model.pth" in refused(capsys, main, "--resume", tmp_path / "none_model.pth")
    run(tmp_path, "--epochs", 1, "--name", "b")
    err = refused(capsys, main, "--resume", path, "--name", "b")
    assert "b_model.pth exists" in err


def test_more_epochs_while_the_warm_up_lasts(tmp_path, capsys, monkeypatch):
    """The learning rates of the warm-up are those of any number of epochs."""
    flags = ("--warmup_epochs", 1, "--name")
    run(tmp_path, "--epochs", 3, *flags, "whole")

    def stop_after_an_epoch(*args, **state):
        save(*args, **state)
        if state["epoch"] == 1:
            raise KeyboardInterrupt

    save = utils.save_checkpoint
    monkeypatch.setattr(utils, "save_checkpoint", stop_after_an_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--epochs", 2, *flags, "cut")
    monkeypatch.undo()
    path = tmp_path / "cut_model.pth"
    assert "--warmup_epochs 1" in refused(capsys, main, "--resume", path, "--epochs", 1)
    run(tmp_path, "--epochs", 3, *flags, "cut", "--resume")
    assert "--epochs 3 (was 2)" in capsys.readouterr().out
    assert crash.differences(tmp_path / "whole", tmp_path / "cut") == []


def test_other_images_are_refused(tmp_path, capsys):
    crash.make_folder(tmp_path / "images")
    flags = "--data_name folder --recipe short --width 4 --feature_dim 16 --batch_size 32 --epochs"
    flags = [*flags.split(), 1, "--out", tmp_path, "--name", "a", "--data_root"]
    main.main([str(word) for word in (*flags, tmp_path / "images")])
    image = next((tmp_path / "images" / "train").rglob("*.png"))
    Image.new("RGB", (32, 32)).save(image)
    err = refused(capsys, main, *flags, tmp_path / "images", "--resume")
    assert "not the images" in err


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, monkeypatch):
    run(tmp_path, "--epochs", 2, "--name", "whole")
    unlink = Path.unlink  # a run that ends removes the one before the last
    monkeypatch.setattr(
        Path, "unlink", lambda self, **more: ".prev" in self.name or unlink(self, **more)
    )
    run(tmp_path, "--epochs", 2, "--name", "cut")
    monkeypatch.undo()
    path = tmp_path / "cut_model.pth"
    content = path.read_bytes()
    weights = utils.load_checkpoint(path)["model"]["projector.0.weight"].numpy().tobytes()
    at = content.index(weights) + 5
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])  # one bit
    capsys.readouterr()
    replace = os.replace

    def never_the_good_one(source, target):
        assert not str(target).endswith(".prev.pth")
        replace(source, target)

    monkeypatch.setattr(os, "replace", never_the_good_one)
    run(tmp_path, "--epochs", 2, "--name", "cut", "--resume")
    out = capsys.readouterr().out
    assert "is damaged" in out
    assert "cut_model.prev.pth" in out
    assert "resumed after epoch 1 of 2" in out
    assert crash.differences(tmp_path / "whole", tmp_path / "cut") == []


@pytest.mark.parametrize(("last", "step"), [(6, 2), (8, 4)])  # the second: the epoch's last
def test_linear_resumes_within_an_epoch(tmp_path, monkeypatch, capsys, last, step):
    run(tmp_path, "--epochs", 1, "--name", "pre")
    flags = f"--model_path {tmp_path}/pre_model.pth --out {tmp_path} --epochs 3 --batch_size 64"
    linear.main([*flags.split(), "--name", "whole"])
    real, steps = linear.train, []

    def signal_at_the_last_step(*args):
        after = args[-1]

        def then(at, means):
            steps.append(at)
            if len(steps) == last:
                os.kill(os.getpid(), signal.SIGTERM)
            after(at, means)

        pixels = args[2].tensors[0].dtype != torch.uint8
        return real(*args[:-1], after if pixels else then)

    monkeypatch.setattr(linear, "train", signal_at_the_last_step)
    with pytest.raises(SystemExit) as stop:
        linear.main([*flags.split(), "--name", "cut"])
    monkeypatch.undo()
    assert stop.value.code == 143
    state = torch.load(tmp_path / "cut_model.pth")
    assert (state["epoch"], state["step"]) == (1, step)
    linear.main(["--resume", f"{tmp_path}/cut_model.pth"])
    assert f"resumed after epoch 1 of 3 and step {step} of 4" in capsys.readouterr().out
    whole, cut = (torch.load(tmp_path / f"{name}_model.pth") for name in ("whole", "cut"))
    assert all(torch.equal(value, cut["model"][key]) for key, value in whole["model"].items())
    tables = [pandas.read_csv(tmp_path / f"{name}_statistics.csv") for name in ("whole", "cut")]
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))


def test_deterministic_changes_nothing_on_a_cpu(tmp_path):
    run(tmp_path, "--epochs", 1, "--name", "b", "--deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    run(tmp_path, "--epochs", 1, "--name", "a")
    assert not torch.are_deterministic_algorithms_enabled()
    assert crash.differences(tmp_path / "a", tmp_path / "b") == []


# ---- what goes wrong in a run -------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    real, calls = main.model.D, []

    def poisoned(p, z):
        calls.append(0)
        return real(p, z) * (float("nan") if len(calls) == 2 * 8 else 1)  # step 2 of epoch 2

    weights = []
    step = torch.optim.SGD.step

    def remember(self):
        before = [p.detach().clone() for p in self.param_groups[0]["params"]]
        step(self)
        weights.append((before, [p.detach().clone() for p in self.param_groups[0]["params"]]))

    monkeypatch.setitem(main.model.SIMILARITIES, "cosine", poisoned)
    monkeypatch.setattr(torch.optim.SGD, "step", remember)
    with pytest.raises(utils.RunError, match="epoch 2, step 2, at lr 0.0839") as error:
        run(tmp_path, "--epochs", 3, "--name", "a")
    assert "a_model.pth" in str(error.value)
    assert utils.load_checkpoint(tmp_path / "a_model.pth")["epoch"] == 1
    before, after = weights[7]  # the eighth step of all: not applied
    assert all(map(torch.equal, before, after))
    before, after = weights[6]
    assert not torch.equal(before[0], after[0])


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters())
    state = {"epoch": 0, "step": 0, "history": [], "args": {}}
    utils.save_checkpoint(str(tmp_path / "a"), net, optimizer, True, **state)
    net.weight.data[0, 0] = float("inf")
    with pytest.raises(utils.RunError, match="not finite"):
        utils.save_checkpoint(str(tmp_path / "a"), net, optimizer, True, **state)
    assert utils.load_checkpoint(tmp_path / "a_model.pth")["model"]["weight"].isfinite().all()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, capsys):
    run(tmp_path, "--epochs", 1, "--name", "a")
    before = (tmp_path / "a_model.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # of a file
    try:
        with pytest.raises(utils.RunError, match=r"a_model.pth: could not be written \(File too"):
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
    (tmp_path / "a_statistics.csv").mkdir()
    (tmp_path / "a_statistics.csv" / "x").touch()
    with pytest.raises(utils.RunError, match="a_statistics.csv: could not be written"):
        run(tmp_path, "--epochs", 2, "--name", "a", "--overwrite")
    assert "the next epoch tries again" in capsys.readouterr().out
    assert utils.load_checkpoint(tmp_path / "a_model.pth")["epoch"] == 2
    (tmp_path / "a_statistics.csv" / "x").unlink()
    (tmp_path / "a_statistics.csv").rmdir()
    run(tmp_path, "--epochs", 2, "--name", "a", "--resume")
    assert len(pandas.read_csv(tmp_path / "a_statistics.csv")) == 3
    assert len(pandas.read_csv(tmp_path / "results.csv")) == 1


def test_a_table_of_anothers_is_not_overwritten(tmp_path):
    (tmp_path / "results.csv").write_text("my,own\n1,2\n")
    with pytest.raises(utils.RunError, match="results.csv: is not a table of results"):
        run(tmp_path, "--epochs", 1, "--name", "a")
    assert (tmp_path / "results.csv").read_text() == "my,own\n1,2\n"


def test_a_run_error_is_one_line_and_exit_code_1(tmp_path):
    process = start("main.py", *TINY, "--lr", "1e30", "--epochs", 2, "--out", tmp_path)
    out = process.communicate()[0]
    assert process.returncode == 1
    assert "Traceback" not in out
    assert out.splitlines()[-1].startswith("main.py: the loss is not finite in epoch 1, step 2")


@pytest.mark.skipif(sys.platform != "linux", reason="reads and resets Linux's count of the peak")
def test_memory_stays_flat(tmp_path):
    code = (
        "import main, utils\n"
        "from pathlib import Path\n"
        "save = utils.save_checkpoint\n"
        "def look(*args, **state):\n"
        "    save(*args, **state)\n"
        "    peak = Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]\n"
        "    print('peak', peak)\n"
        "    Path('/proc/self/clear_refs').write_text('5')  # an epoch's own peak\n"
        "utils.save_checkpoint = look\n"
        f"main.main({[*TINY, '--epochs', '20', '--out', str(tmp_path)]})\n"
    )
    process = start("-c", code)
    out = process.communicate()[0]
    peaks = [int(line.split()[1]) for line in out.splitlines() if line.startswith("peak")]
    print(peaks)
    assert len(peaks) == 21, out
    assert peaks[20] <= 1.02 * peaks[3]


# ---- bad images ---------------------------------------------------------------------------------


def test_bad_images(tmp_path, capsys):
    crash.make_folder(tmp_path / "images")
    good = sorted((tmp_path / "images" / "train" / "rows").glob("*.png"))
    (good[0]).write_bytes(good[1].read_bytes()[:200])  # truncated
    (good[2]).write_text("no image")
    Image.new("1", (12_000, 10_000)).save(good[3])  # a bomb: small as a file
    flags = "--data_name folder --recipe short --width 4 --feature_dim 16 --batch_size 32 --epochs"
    flags = [*flags.split(), 1, "--out", tmp_path / "r", "--name", "a", "--data_root"]
    flags = [str(word) for word in (*flags, tmp_path / "images")]
    err = refused(capsys, main, *flags)
    assert any(str(good[i]) in err for i in (0, 2, 3))
    assert not (tmp_path / "r").exists()
    main.main([*flags, "--bad_images", "skip"])
    out = capsys.readouterr().out
    assert "folder: 197 training images" in out
    assert "3 files could not be read" in out
    lines = (tmp_path / "r" / "a_bad_images.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(good[i]) for i in (0, 2, 3)]
    assert "12000 x 10000" in lines[2]


# ---- malformed checkpoints ----------------------------------------------------------------------


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def saved(state) -> bytes:
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def malformed(whole: bytes, out: Path):
    """Names and contents of files that are no good checkpoints."""
    for share in (0, 0.01, 0.3, 0.5, 0.9, 0.99, 0.9999):
        yield f"cut at {share}", whole[: int(share * len(whole))]
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        for info in archive.infolist()[:: max(1, len(archive.infolist()) // 12)]:
            if info.file_size:  # a byte of each part's content
                names = struct.unpack("<HH", whole[info.header_offset + 26 :][:4])
                at = info.header_offset + 30 + sum(names) + info.file_size // 2
                yield (
                    f"{info.filename} flipped",
                    whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :],
                )
        deflated = io.BytesIO()
        with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as other:
            for info in archive.infolist():
                other.writestr(info.filename, archive.read(info))
        yield "compressed", deflated.getvalue()
    yield "text", b"not a checkpoint\n" * 1000
    yield "a pickle", b"\x80\x04cos\nsystem\n(S'touch ran'\ntR."
    state = torch.load(io.BytesIO(whole), weights_only=True)
    yield "a list", saved([state])
    yield "a tensor", saved(torch.ones(3))
    yield "a payload", saved(state | {"args": Payload(out / "ran")})
    for key in ("model", "optimizer", "epoch", "step", "history", "args"):
        yield f"no {key}", saved({k: v for k, v in state.items() if k != key})
        yield f"{key} of a wrong type", saved(state | {key: "junk"})
    yield "epoch -1", saved(state | {"epoch": -1})
    yield "history of junk", saved(state | {"history": [{"epoch": "x"}] * len(state["history"])})
    yield "model of junk", saved(state | {"model": dict.fromkeys(state["model"], 3)})
    first = next(iter(state["model"]))
    for name, tensor in [
        ("NaN", torch.full_like(state["model"][first], float("nan"))),
        ("another shape", torch.ones(3, 3)),
        ("another dtype", state["model"][first].double()),
        ("a huge claim", torch.ones(1).expand(10**6, 10**6)),
        ("a number for all", torch.ones(()).expand(state["model"][first].shape)),
        ("a sparse one", torch.ones(3, 3).to_sparse()),
    ]:
        yield f"weight: {name}", saved(state | {"model": state["model"] | {first: tensor}})
    fewer = {k: v for k, v in state["model"].items() if k != first}
    yield "a weight less", saved(state | {"model": fewer})
    yield "a weight more", saved(state | {"model": state["model"] | {"more": torch.ones(1)}})
    inner = "encoder" if "encoder" in state["args"] else None
    for key, value in [
        ("arch", "resnet14"),
        ("arch", ["resnet8"]),
        ("arch", None),
        ("width", 10**9),
        ("width", "4"),
        ("image_size", 10**9),
        ("image_size", None),
        ("mean", (0.5, 0.5)),
        ("std", (0.5, 0.5, 0.0)),
        ("std", ("a", "b", "c")),
    ]:
        args = copy.deepcopy(state["args"])
        (args[inner] if inner else args)[key] = value
        yield f"{key} {value}", saved(state | {"args": args})
    if not inner:
        for key, value in [("feature_dim", 10**12), ("projector_layers", 10**9)]:
            yield f"{key} {value}", saved(state | {"args": state["args"] | {key: value}})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of main.py cut off after its first epoch, and a linear model."""
    out = tmp_path_factory.mktemp("runs")
    run(out, "--epochs", 1, "--name", "pre")
    linear.main(
        f"--model_path {out}/pre_model.pth --out {out} --epochs 1 --cached --name lin".split()
    )
    return out


def test_malformed_checkpoints(runs, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    path = tmp_path / "bad_model.pth"
    out = ("--out", tmp_path / "out")
    count = 0
    for source, commands in [
        ("pre", [(main, "--resume", path), (linear, "--model_path", path, *out)]),
        (
            "lin",
            [
                (linear, "--model_path", path, "--predict", image),
                (linear, "--model_path", path, "--evaluate_only", *out),
                (linear, "--resume", path),
            ],
        ),
    ]:
        for name, content in malformed((runs / f"{source}_model.pth").read_bytes(), tmp_path):
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
    assert count > 150


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


class TrainedError(Exception):
    """Raised in the place of training."""


@pytest.mark.parametrize("command", [main, linear])
def test_junk_on_the_command_line(command, runs, tmp_path, monkeypatch, capsys):
    """Either a line on stderr and exit code 2, or a run that gets as far as its first step."""
    parser = command.parse_args([])[1]
    names = sorted(set(parser.defaults) - {"out"})

    def trained(*args):
        raise TrainedError

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(command, "train", trained)
    monkeypatch.setattr(main, "monitor", lambda *args: {"rank": 1.0, "test_acc@1": 1.0})
    monkeypatch.setattr(main, "raw_pixels_accuracy", lambda *args: 1.0)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    base = [*TINY, "--epochs", "2"]
    if command is linear:
        base = ["--model_path", str(runs / "pre_model.pth"), "--epochs", "2", "--cached"]

    @settings(
        max_examples=120,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.tuples(st.sampled_from(names), st.lists(JUNK, max_size=2)), max_size=3))
    def try_flags(flags):
        argv = [*base, "--out", str(out)]
        for name, values in flags:
            argv += [f"--{name}", *values]
        capsys.readouterr()
        code = None
        try:
            command.main(argv)
        except SystemExit as stop:
            code = stop.code
        except (TrainedError, utils.RunError):
            pass
        err = capsys.readouterr().err
        assert code in (None, 0, 2), (argv, err)  # 0: --help's
        assert code != 2 or err.count("\n") == 1, (argv, err)
        for path in out.rglob("*") if out.exists() else ():
            assert not re.search(r"\.(part|lock)$", path.name), (argv, path)
            if path.suffix == ".pth":
                utils.load_checkpoint(path)
            path.unlink()

    try_flags()
