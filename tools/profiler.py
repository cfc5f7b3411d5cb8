"""Where the time of main.py's steps goes, by torch.profiler."""

import contextlib
import tempfile
from pathlib import Path

import torch

import main
from simsiam.training.run import Run


def profile(trace: str, flags: list[str]) -> None:
    """Steps of main.py's loop under torch.profiler: a table, and a trace file to open.

    `flags` are main.py's. Six steps of an epoch are done, of which the last three are recorded.
    """
    Path(trace).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        command = main.make_flags()
        args, given = command.read([*flags, "--out", place])
        with command.bad_input():
            run = stack.enter_context(Run(args, given, command, main.STATISTICS))
            made = main.prepare(run)
        steps = main.train(*made[:5], 0, 0, args, *made[5:8])
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if made.tally.values.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        for _ in zip(range(3), steps, strict=False):
            pass
        with torch.profiler.profile(activities=kinds, record_shapes=True) as found:
            done = len(list(zip(range(3), steps, strict=False)))
        by = f"self_{made.tally.values.device.type}_time_total"
        print(found.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=40))
        found.export_chrome_trace(trace)
        print(f"{done} steps; wrote {trace}: open it in ui.perfetto.dev or chrome://tracing")
