"""Files that appear whole or not at all, CSV tables, and the lock of a run."""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import filelock
import pandas

from simsiam.runtime import distributed


class RunError(Exception):
    """Fatal error during a run. A command prints it in one line and exits with code 1."""


@contextlib.contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Put `prefix`, a file or flag, in front of the message of a ValueError raised within."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from error


@contextlib.contextmanager
def atomic_write(path: str | Path, previous: str | Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file for writing that replaces `path` at the end, synced to disk, or not at all.

    The replaced file is moved to `previous`, if given. Ranks other than 0 write nothing. Raises
    OSError with `path` as its filename.
    """
    if distributed.rank() > 0:
        yield io.BytesIO()
        return
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
        if os.name == "posix":  # so that the rename survives a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def remove(path: str | Path) -> None:
    """Remove a file if it exists; only on rank 0."""
    if distributed.rank() == 0:
        Path(path).unlink(missing_ok=True)


def printable(text: str) -> str:
    """Return a file name as valid text: bytes that are not UTF-8 become escapes such as \\xff."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ---- tables -------------------------------------------------------------------------------------


def write_csv(path: str | Path, rows: list[dict], columns: tuple[str, ...]) -> None:
    """Write `columns` of rows as a CSV table: six significant digits, blank for missing values."""
    rows = [{k: printable(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    with atomic_write(path) as file:
        pandas.DataFrame(rows, columns=columns).to_csv(file, index=False, float_format="%.6g")


def read_csv(path: str | Path, text: Sequence[str] = ()) -> list[dict]:
    """Return the rows of a table of `write_csv`, without keys for blank cells.

    `text`: columns to read as strings even where they look like numbers.
    """
    rows = pandas.read_csv(path, dtype=dict.fromkeys(text, str)).to_dict("records")
    return [{name: value for name, value in row.items() if value == value} for row in rows]


RESULT_COLUMNS = tuple(
    (
        "protocol data train_size arch width params_m flops_g feature_dim batch_size epochs lr k "
        "seed top1 top5 best_top1 seconds device run"
    ).split()
)


def add_result(path: str | Path, row: dict) -> None:
    """Write the row of an evaluation into `results.csv`, in place of the same run's and protocol's.

    Keeps columns that the user has added, and their order. Raises RunError if `path` is another
    table.
    """
    if distributed.rank() > 0:
        return
    # The table is read as text, so that other rows stay as they are: "0.10", or a run called NA.
    row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
    key = (row["protocol"], printable(row["run"]))
    path = Path(path)
    with filelock.FileLock(path.with_name(f".{path.name}.lock")) as lock:  # runs share the table
        rows, columns = [], RESULT_COLUMNS
        if path.is_file():
            try:
                table = pandas.read_csv(path, dtype=str, keep_default_na=False)
                columns = tuple(dict.fromkeys([*table.columns, *RESULT_COLUMNS]))
                for old in table.to_dict("records"):
                    if (old["protocol"], old["run"]) != key:
                        rows.append(old)
                    else:
                        row = {k: v for k, v in old.items() if k not in RESULT_COLUMNS} | row
            except (ValueError, KeyError) as error:
                raise RunError(
                    f"{path}: not a table of results: move it away, and give the same command "
                    "with --resume"
                ) from error
        write_csv(path, [*rows, row], columns)
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)


# ---- the lock of a run --------------------------------------------------------------------------


@contextlib.contextmanager
def run_lock(path: str) -> Iterator[None]:
    """Let one process at a time work on the run of `path` (folder and name).

    Creates the folder, and removes it if it stays empty. The operating system releases the lock of
    a process that dies. Raises ValueError that names the process at work.
    """
    folder, name = os.path.split(path)
    # Two files, since on Windows no process, not even this one, can read a locked file.
    lock_file, pid_file = Path(folder, f".{name}.lock"), Path(folder, f".{name}.pid")
    is_new = not os.path.isdir(folder or ".")
    os.makedirs(folder or ".", exist_ok=True)
    lock = filelock.FileLock(lock_file)
    try:
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout as error:
            who = f"process {pid_file.read_text().strip()}" if pid_file.is_file() else "another one"
            raise ValueError(
                f"{path}: {who} is at work on it: wait for it, or choose another --name"
            ) from error
        try:
            pid_file.write_text(f"{os.getpid()}\n")
            yield
        finally:
            # Before the release: a process that waits for the lock must find neither file.
            for file in (pid_file, lock_file):
                with contextlib.suppress(OSError):  # Windows removes no open file
                    file.unlink()
            lock.release()
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
