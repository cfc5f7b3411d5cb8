"""Functions timed side by side."""

import statistics
import time
from collections.abc import Callable


def in_turns(
    *functions: Callable[[], object], rounds: int = 5, wait: Callable[[], object] = lambda: None
) -> list[float]:
    """Median seconds of each function, called in turns after a call of each to warm up.

    `wait`: until a device has done what it was told.
    """
    seconds = [[] for _ in functions]
    for i in range(rounds + 1):
        for times, function in zip(seconds, functions, strict=True):
            wait()
            begun = time.perf_counter()
            function()
            wait()
            if i > 0:
                times.append(time.perf_counter() - begun)
    return [statistics.median(times) for times in seconds]
