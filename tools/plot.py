"""Draw a run's pictures again, or the curves of several runs in one picture.

python -m tools.plot results/a                           # all of its pictures
python -m tools.plot results/a results/b --out ab.pdf    # for comparison
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python tools/plot.py`

import utils
from simsiam.data.loader import images_checksum
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.plots.curves import PANELS, plot_curves
from simsiam.plots.run import draw_run
from simsiam.plots.style import FORMATS
from simsiam.runtime import devices, distributed, files
from simsiam.training import checkpoint
from simsiam.training.collapse import Monitor
from tools.common import DEVICE_HELP, images_of_run, picture_format, picture_path

SUFFIXES = ("_model.prev.pth", "_model.pth", "_statistics.csv", "_curves.png")


def draw_one(run: str, data_root: str | None, device_name: str, overwrite: bool) -> None:
    """Draw all pictures of a run from its checkpoint; without it, the curves from its table.

    `data_root`: where the images are, if they moved. The checkpoint's pictures are those of the run
    itself, so they replace existing ones without --overwrite; the table's are not.
    """
    path, name = f"{run}_model.pth", os.path.basename(run)
    if not os.path.isfile(path):
        draw_curves({name: read_statistics(run)}, f"{run}_curves.png", overwrite)
        distributed.log(f"{path}: not there, so that only the curves can be drawn")
        return
    source = LoadedCheckpoint.open(path)
    if source.state is None or source.state["version"] != checkpoint.VERSION:
        raise ValueError(f"{path}: must be a checkpoint of this version of main.py or linear.py")
    history = source.state["history"]
    if source.is_linear:
        baseline = {"epoch": 0, "raw_acc@1": source.state["extra"].get("baseline")}
        draw_curves({name: [baseline, *history]}, f"{run}_curves.png", overwrite=True)
        evaluate = f"python linear.py --model_path {path} --evaluate_only"
        distributed.log(f"for its confusion matrix: {evaluate}")
        return
    config = source.config
    device = devices.pick_device(device_name)
    images = images_of_run(source, vars(config), data_root)
    if images_checksum(images.train_images) != source.state["images_checksum"]:
        root = data_root or config.data_root
        raise ValueError(f"--data_root {root}: not the images that {path} began with")
    if config.bank_size is not None:
        images = images.subset(config.bank_size, config.seed, "--bank_size")
    net, amp = source.to(device).net, devices.autocast(device, config.amp)
    monitor = Monitor(net, source.views, images.to(device), config, amp)
    draw_run(run, name, history, monitor)
    distributed.log(f"wrote the pictures of {run}")


def draw_curves(histories: dict[str, list[dict]], out: str, overwrite: bool) -> None:
    """Draw the curves of runs by name. Raises ValueError if `out` exists, unless `overwrite`."""
    utils.check_new("picture", out, overwrite)
    with files.atomic_write(out) as file:
        plot_curves(histories, file, picture_format(out))
    distributed.log(f"wrote {out}")


def unique_names(runs: list[str]) -> dict[str, str]:
    """Return a name for each run: its own, after the folders that tell it apart from the others."""
    paths = {run: Path(run).resolve().parts for run in runs}
    names = {}
    for run, path in paths.items():
        others, depth = {other for other in paths.values() if other != path}, 1
        while any(other[-depth:] == path[-depth:] for other in others):
            depth += 1
        names[run] = "/".join(path[-depth:])
    return names


def read_statistics(run: str) -> list[dict]:
    """Read the statistics of a run. Raises ValueError or OSError, naming the file."""
    path = f"{run}_statistics.csv"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{run}: there is no {path}")
    with files.error_prefix(path):
        rows = files.read_csv(path)
        if not any(name in row for name in PANELS for row in rows):
            raise ValueError(f"is no table of a run: it has none of {', '.join(PANELS)}")
        for row in rows:
            epoch = row.get("epoch")
            if not isinstance(epoch, int | float) or not 0 <= epoch < 1e9 or epoch % 1:
                raise ValueError(f"epoch {epoch}: must be a whole number")
            for name in PANELS.keys() & row.keys():
                if not isinstance(row[name], int | float) or not abs(row[name]) < 1e9:
                    raise ValueError(f"epoch {epoch:.0f}: {name} {row[name]}: must be a number")
    return rows


def command(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = utils.Parser("tools.plot", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="results/<run>, or one of its files")
    endings = ", ".join(f".{name}" for name in FORMATS)
    text = f"with several runs: the picture, {endings} (overlay.png beside the first run)"
    add("--out", type=picture_path, help=text)
    add("--overwrite", action="store_true", help="replace an existing picture")
    add("--data_root", help="with one run: where its images are now, if they moved")
    add("--device", help=f"with one run: {DEVICE_HELP}")
    args = parser.parse_args(argv)
    runs = []
    for run in args.runs:
        for suffix in SUFFIXES:
            run = run.removesuffix(suffix)
        if run not in runs:
            runs.append(run)
    is_single = len(args.runs) == 1
    for name in ("out",) if is_single else ("data_root", "device"):
        if getattr(args, name) is not None:
            parser.error(f"--{name}: goes with {'several runs' if is_single else 'one run'}")
    with parser.bad_input():
        if is_single:
            draw_one(runs[0], args.data_root, args.device or "auto", args.overwrite)
        else:
            out = args.out or str(Path(runs[0]).parent / "overlay.png")
            names = unique_names(runs)
            draw_curves({names[run]: read_statistics(run) for run in runs}, out, args.overwrite)


if __name__ == "__main__":
    utils.run_command(command)
