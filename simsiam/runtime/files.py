"""Files that appear whole or not at all, and CSV tables."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import filelock
import pandas

from simsiam.runtime import distributed


class RunError(Exception):
    """What ends a run that was going well; a command says it in one line, with exit code 1."""


@contextlib.contextmanager
def error_prefix(file: str) -> Iterator[None]:
    """A ValueError raised within is about `file`, which it then names first."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


@contextlib.contextmanager
def atomic_write(path: str | Path, previous: str | Path | None = None) -> Iterator[IO[bytes]]:
    """A file that appears under `path` whole, and on the disk, or not at all.

    The file that it replaces is kept as `previous`. An OSError names `path`. Of the ranks only the
    first one writes.
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
        if os.name == "posix":  # the rename too is to outlive a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def remove(path: str | Path) -> None:
    """Remove a file, if it is there; of the ranks the first one does it."""
    if distributed.rank() == 0:
        Path(path).unlink(missing_ok=True)


def printable(text: str) -> str:
    """A name of the file system as text: a byte that is no UTF-8 is told as \\xff."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_csv(path: str | Path, rows: list[dict], columns: tuple[str, ...]) -> None:
    """Rows as a CSV table of `columns`, six significant digits, blank where there is no value."""
    rows = [{k: printable(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    with atomic_write(path) as file:
        pandas.DataFrame(rows, columns=columns).to_csv(file, index=False, float_format="%.6g")


def read_csv(path: str | Path, text: Sequence[str] = ()) -> list[dict]:
    """Rows of a table that `write_csv` wrote; what was blank is missing.

    `text`: columns whose cells stay as they are, though they may look like numbers.
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
    """Add or replace the row of a run and protocol in a table of `RESULT_COLUMNS`.

    Columns that the user has added stay, with what they hold; so does their order. Raises RunError
    if `path` is another table.
    """
    if distributed.rank() > 0:
        return
    row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}  # as the others
    same = (row["protocol"], printable(row["run"]))
    path = Path(path)
    with filelock.FileLock(path.with_name(f".{path.name}.lock")) as lock:  # runs share the table
        rows, columns = [], RESULT_COLUMNS
        if path.is_file():
            try:
                table = pandas.read_csv(path, dtype=str, keep_default_na=False)
                columns = tuple(dict.fromkeys([*table.columns, *RESULT_COLUMNS]))
                for old in table.to_dict("records"):
                    if (old["protocol"], old["run"]) != same:
                        rows.append(old)
                    else:
                        row = {k: v for k, v in old.items() if k not in RESULT_COLUMNS} | row
            except (ValueError, KeyError) as error:
                raise RunError(
                    f"{path}: is not a table of results: move it away, and give the same command "
                    "with --resume"
                ) from error
        write_csv(path, [*rows, row], columns)
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)


def unless_it_fails(function: Callable, *args: object) -> None:
    """Call it; an OSError is passed over (Windows removes no open file)."""
    with contextlib.suppress(OSError):
        function(*args)


@contextlib.contextmanager
def run_lock(path: str) -> Iterator[None]:
    """While it lasts, a second process at the run of this `path` (folder and name) is refused.

    The lock is the operating system's, which takes it back from a process that dies. The folder is
    made, and removed if it stays empty. Raises ValueError that names the process at work.
    """
    folder, name = os.path.split(path)
    # Two files: on Windows nobody else, not even this process, can open the one that is locked.
    file, at_work = Path(folder, f".{name}.lock"), Path(folder, f".{name}.pid")
    with contextlib.ExitStack() as last:
        if not os.path.isdir(folder or "."):
            os.makedirs(folder, exist_ok=True)  # another run may do the same just now
            last.callback(unless_it_fails, os.rmdir, folder)
        lock = filelock.FileLock(file)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout as error:
            who = f"process {at_work.read_text().strip()}" if at_work.is_file() else "another one"
            raise ValueError(
                f"{path}: {who} is at work on it: wait for it, or choose another --name"
            ) from error
        last.callback(lock.release)
        # While it is held, so that a process that waits for it sees that it is gone.
        last.callback(unless_it_fails, file.unlink)
        last.callback(unless_it_fails, at_work.unlink)
        at_work.write_text(f"{os.getpid()}\n")
        yield
