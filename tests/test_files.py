"""Atomic files, CSV tables, and the lock of a run."""

import errno
import multiprocessing
import os
import signal
import stat

import pandas
import pytest
import torch.distributed as dist

from simsiam.runtime import files
from simsiam.runtime.files import (
    RunError,
    add_result,
    atomic_write,
    error_prefix,
    read_csv,
    remove,
    run_lock,
    write_csv,
)


def write(path, content, previous=None, error=None):
    with atomic_write(path, previous) as file:
        file.write(content)
        if error:
            raise error


def fork(work, *args):
    """Call `work` in a process of its own; return a function that waits for its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return lambda: process.join() or process.exitcode


def test_atomic_write_replaces_a_file_at_its_end(tmp_path):
    path, previous = tmp_path / "a.txt", tmp_path / "a_previous.txt"
    for content in (b"1", b"2", b"3"):
        write(path, content, previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    with pytest.raises(RuntimeError):
        write(path, b"4, but hal", previous, RuntimeError())
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    assert set(tmp_path.iterdir()) == {path, previous}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []

    def spy(name, real):
        def call(*args):
            is_folder = isinstance(args[0], int) and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            calls.append((name, is_folder))
            return real(*args)

        monkeypatch.setattr(os, name, call)

    spy("fsync", os.fsync)
    spy("replace", os.replace)
    write(tmp_path / "a.txt", b"new")
    assert calls == [("fsync", False), ("replace", False), ("fsync", True)]


def test_an_os_error_names_the_file_and_keeps_its_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def replace(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", source, None, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="a.txt") as error:
        write(path, b"new")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError) as error:
        write(tmp_path / "nowhere" / "a.txt", b"new")
    assert error.value.filename == str(tmp_path / "nowhere" / "a.txt")


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def write_half():
        with atomic_write(path) as file:
            file.write(b"x" * 100_000)
            os.kill(os.getpid(), signal.SIGKILL)

    assert fork(write_half)() == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]  # nothing is left of the killed process


def test_ranks_other_than_0_write_and_remove_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"of rank 0")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    write(path, b"of rank 1")
    remove(path)
    add_result(tmp_path / "results.csv", {"protocol": "KNN", "run": "a"})
    write_csv(tmp_path / "table.csv", [{"a": 1}], ("a",))
    assert path.read_bytes() == b"of rank 0"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    remove(path)
    remove(path)  # a missing file is no error
    assert not list(tmp_path.iterdir())


def test_error_prefix_is_for_value_errors(tmp_path):
    for error, text in ((ValueError("no"), "a.pth: no"), (KeyError("no"), "'no'")):
        with pytest.raises(type(error)) as raised, error_prefix("a.pth"):
            raise error
        assert str(raised.value) == text


def test_the_lock_of_a_run_removes_what_it_created(tmp_path):
    path = tmp_path / "new" / "run"
    with run_lock(str(path)):
        assert (path.parent / ".run.pid").read_text() == f"{os.getpid()}\n"
    assert not path.parent.exists()
    with run_lock(str(path)):
        path.touch()
    assert list(path.parent.iterdir()) == [path]


# ---- tables -------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written_to_six_digits_without_blanks(tmp_path):
    path = tmp_path / "a.csv"
    rows = [{"epoch": 0, "rank": 6.25}, {"epoch": 1, "loss": -1 / 3, "more": "not a column"}]
    write_csv(path, rows, ("epoch", "loss", "rank"))
    assert path.read_text() == "epoch,loss,rank\n0,,6.25\n1,-0.333333,\n"
    assert read_csv(path) == [{"epoch": 0, "rank": 6.25}, {"epoch": 1, "loss": -0.333333}]
    assert all(type(row["epoch"]) is int for row in read_csv(path))


def test_text_that_looks_like_a_number_stays_text(tmp_path):
    """A commit of 83097e4 is not 830970000."""
    write_csv(tmp_path / "table.csv", [{"commit": "83097e4", "a": 1}, {"a": 2}], ("commit", "a"))
    assert read_csv(tmp_path / "table.csv", ["commit"]) == [{"commit": "83097e4", "a": 1}, {"a": 2}]


def test_names_that_are_not_utf_8_are_written(tmp_path):
    """Python decodes file names with surrogates: UTF-8 in another locale, Latin-1 in any."""
    path = tmp_path / "results.csv"
    for name in (b"Gr\xc3\xb6\xc3\x9fe", b"Gr\xf6\xdfe", b"Gr\xf6\xdfe"):
        add_result(path, {"protocol": "KNN", "run": name.decode("ascii", "surrogateescape")})
    assert pandas.read_csv(path)["run"].tolist() == ["Gr\u00f6\u00dfe", "Gr\\xf6\\xdfe"]


def test_results_have_one_row_per_run_and_protocol(tmp_path):
    path = tmp_path / "results.csv"
    add_result(path, {"protocol": "KNN", "run": "a", "top1": 50.0})
    add_result(path, {"protocol": "Linear", "run": "a", "top1": 60.0})
    add_result(path, {"protocol": "KNN", "run": "b", "top1": 1.50000001})
    add_result(path, {"protocol": "KNN", "run": "a", "top1": 51.0})
    table = pandas.read_csv(path)
    assert list(table.columns) == list(files.RESULT_COLUMNS)
    rows = table[["protocol", "run", "top1"]].values.tolist()
    assert rows == [["Linear", "a", 60.0], ["KNN", "b", 1.5], ["KNN", "a", 51.0]]
    assert list(tmp_path.iterdir()) == [path]  # no lock is left


def test_rows_of_other_runs_keep_their_text(tmp_path):
    """50.10 stays 50.10, and a run may be called NA or 007."""
    path = tmp_path / "results.csv"
    add_result(path, {"protocol": "KNN", "run": "007", "top1": 50.0})
    add_result(path, {"protocol": "KNN", "run": "NA", "data": "a,b", "top1": 50.0})
    text = path.read_text().replace(",50,", ",50.10,")
    path.write_text(text)
    add_result(path, {"protocol": "KNN", "run": "7", "top1": 1.0})
    assert path.read_text().startswith(text)
    add_result(path, {"protocol": "KNN", "run": "NA", "top1": 2.0})
    lines = path.read_text().splitlines()
    assert [line.rsplit(",", 1)[1] for line in lines] == ["run", "007", "7", "NA"]


def test_columns_that_the_user_added_stay(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("run,note,protocol,top1\na,my best,KNN,50\nb,,KNN,40\n")
    add_result(path, {"protocol": "KNN", "run": "a", "top1": 60.0, "seed": 3})
    add_result(path, {"protocol": "KNN", "run": "c", "top1": 70.0})
    table = pandas.read_csv(path, keep_default_na=False)
    assert list(table.columns[:4]) == ["run", "note", "protocol", "top1"]
    assert set(table.columns) == {"note", *files.RESULT_COLUMNS}
    rows = table[["run", "note", "top1", "seed"]].astype(str).values.tolist()
    assert rows == [["b", "", "40", ""], ["a", "my best", "60", "3"], ["c", "", "70", ""]]


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe\x00", b'a\n"'])
def test_another_file_in_the_place_of_the_results_is_left_alone(tmp_path, content):
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    with pytest.raises(RunError, match="results.csv"):
        add_result(path, {"protocol": "KNN", "run": "a"})
    assert path.read_bytes() == content


def test_runs_that_end_at_the_same_time_all_get_their_row(tmp_path):
    path = tmp_path / "results.csv"

    def add_results(name):
        for i in range(15):
            add_result(path, {"protocol": "KNN", "run": f"{name} {i}"})

    assert [wait() for wait in [fork(add_results, name) for name in "ab"]] == [0, 0]
    runs = set(pandas.read_csv(path)["run"])
    assert runs == {f"{name} {i}" for name in "ab" for i in range(15)}
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == ["results.csv"]
    assert path.read_text().count("\n") == 31
