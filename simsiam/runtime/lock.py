"""The lock of a run: one process at a time works at its files."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock


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
