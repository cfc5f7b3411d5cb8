"""Ours and its peers, timed in turns in one run, and their ratio.

python -m tools.bench linear

What is timed are the functions of the rooms and the commands themselves, never a copy of them.
Results are added to results/benchmarks.csv.
"""

import argparse
import contextlib
import datetime
import platform
import tempfile
from pathlib import Path

import pandas
import torch

import linear
import main
import utils

COLUMNS = (
    "benchmark",
    "ours",
    "peer",
    "peer_name",
    "ratio",
    "unit",
    "threads",
    "cpu",
    "torch",
    "date",
)


def bench_linear(*flags: str):
    """90 epochs on the same images, cached (its extraction included) and augmented, by linear.py.

    `flags` are linear.py's; without --model_path, of an epoch of pre-training on textures.
    """
    with tempfile.TemporaryDirectory() as place:
        if "--model_path" not in flags:
            name = ["--data_name", "textures", "--epochs", "1", "--name", "bench"]
            main.main([*name, "--out", place])
            flags = (*flags, "--model_path", f"{place}/bench_model.pth")

        def seconds(name: str, *more: str) -> pandas.Series:
            linear.main([*flags, "--out", place, "--name", name, *more])
            return pandas.read_csv(f"{place}/{name}_statistics.csv")["seconds"]

        first = seconds("cached1", "--cached")
        slow = seconds("augmented")
        fast = (first + seconds("cached2", "--cached")) / 2
    yield "linear, extraction included", fast.sum(), slow.sum(), "the augmented protocol", "s"
    # The first epoch holds the extraction, and the warm-up of both.
    fast, slow = (90 * epochs[1:].mean() for epochs in (fast, slow))
    yield "linear, 90 epochs alone", fast, slow, "the augmented protocol", "s"


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


BENCHMARKS = {"linear": bench_linear}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    parser.add_argument("--csv", default="results/benchmarks.csv", help="(results/benchmarks.csv)")
    args, rest = parser.parse_known_args()  # what is left are linear.py's flags
    names = args.benchmarks or list(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"{name}: choose from {', '.join(BENCHMARKS)}")
    for name in names:
        for what, ours, peer, peer_name, unit in BENCHMARKS[name](*rest):
            ratio = peer / ours  # of seconds: above 1 where ours is the better
            print(f"{what}: ours {ours:.4g} {unit}, {peer_name} {peer:.4g}: ratio {ratio:.2f}")
            machine = (torch.get_num_threads(), cpu_name(), str(torch.__version__))
            values = (what, ours, peer, peer_name, ratio, unit, *machine, datetime.date.today())
            row = dict(zip(COLUMNS, values, strict=True))
            rows = []
            if Path(args.csv).is_file():
                rows = pandas.read_csv(args.csv, dtype=str, keep_default_na=False).to_dict(
                    "records"
                )
            same = (what, peer_name)
            rows = [old for old in rows if (old["benchmark"], old["peer_name"]) != same]
            utils.write_csv(args.csv, [*rows, row], COLUMNS)
