"""Pictures of runs again; of several runs, their curves over one another.

python -m tools.plot results/a                           # all of its pictures
python -m tools.plot results/a results/b --out ab.pdf    # for comparison
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python tools/plot.py`

import utils
from simsiam.data.loader import images_checksum
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.plots.curves import PANELS, plot_curves
from simsiam.plots.run import draw_run
from simsiam.plots.style import FORMATS
from simsiam.runtime import devices, distributed, files
from simsiam.training.collapse import Monitor
from tools.common import images_of_run, picture_format, picture_path

ENDS = ("_model.prev.pth", "_model.pth", "_statistics.csv", "_curves.png")


def one(run: str, data_root: str | None, device_name: str, overwrite: bool) -> None:
    """All pictures of a run, from its checkpoint; without it, from its table the curves.

    `data_root`: where the images are now; by default where they were. The checkpoint's pictures
    are those of the run itself and replace them; the table knows less.
    """
    path, name = f"{run}_model.pth", os.path.basename(run)
    if not os.path.isfile(path):
        curves({name: table(run)}, f"{run}_curves.png", overwrite)
        distributed.log(f"{path} is not there: its other pictures cannot be drawn")
        return
    source = LoadedCheckpoint.open(path)
    if source.state is None:
        raise ValueError(f"{path}: is another project's checkpoint, of which no run is known")
    if source.is_linear:
        start = {"epoch": 0, "raw_acc@1": source.state["extra"].get("baseline")}
        curves({name: [start, *source.state["history"]]}, f"{run}_curves.png", overwrite=True)
        evaluate = f"python linear.py --model_path {path} --evaluate_only"
        distributed.log(f"for its confusion matrix: {evaluate}")
        return
    saved = vars(source.config)
    args = Namespace(**saved | {"data_root": data_root or saved["data_root"]})
    device = devices.pick_device(device_name)
    images = images_of_run(source, saved, data_root)
    if images_checksum(images.train_images) != source.state["images_checksum"]:
        raise ValueError(f"--data_root {args.data_root}: not the images that {path} began with")
    if args.bank_size is not None:
        images = images.subset(args.bank_size, args.seed, "--bank_size")
    net, amp = source.to(device).net, devices.autocast(device, args.amp)
    monitor = Monitor(net, source.views, images.to(device), args, args.lr, amp)
    draw_run(run, name, source.state["history"], monitor)
    distributed.log(f"wrote the pictures of {run}")


def several(runs: list[str], out: str, overwrite: bool) -> None:
    """The curves of runs, from their tables."""
    names = names_of(runs)
    curves({names[run]: table(run) for run in runs}, out, overwrite)


def curves(histories: dict[str, list[dict]], out: str, overwrite: bool) -> None:
    """The picture `out`, in the format of its ending."""
    utils.check_new("picture", out, overwrite)
    with files.atomic_write(out) as file:
        plot_curves(histories, file, picture_format(out))
    distributed.log(f"wrote {out}")


def names_of(runs: list[str]) -> dict[str, str]:
    """A name for each: the run's own and, where others have it, the folders that tell it apart."""
    parts = {run: Path(run).resolve().parts for run in runs}
    names = {}
    for run, own in parts.items():
        others, depth = {some for some in parts.values() if some != own}, 1
        while any(other[-depth:] == own[-depth:] for other in others):
            depth += 1
        names[run] = "/".join(own[-depth:])
    return names


def table(run: str) -> list[dict]:
    """The statistics of a run. Raises ValueError or OSError for a table that is none of a run."""
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
                raise ValueError(f"its epoch {epoch} is no whole number")
            for name in PANELS.keys() & row.keys():
                if not isinstance(row[name], int | float) or not abs(row[name]) < 1e9:
                    raise ValueError(f"epoch {epoch:.0f} has {row[name]} for {name}: no number")
    return rows


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = utils.Parser("tools.plot", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="results/<run>, or one of its files")
    ends = ", ".join(f".{name}" for name in FORMATS)
    out = f"of several runs: the picture, by its ending {ends} (overlay.png beside the first one)"
    add("--out", type=picture_path, help=out)
    add("--overwrite", action="store_true", help="replace the picture if it is there")
    add("--data_root", help="where the images are now, of one run (as they were)")
    add("--device", help="as of main.py, of one run (auto)")
    args = parser.parse_args(argv)
    runs = []
    for run in args.runs:
        for end in ENDS:
            run = run.removesuffix(end)
        if run not in runs:
            runs.append(run)
    one_only = {"data_root": args.data_root, "device": args.device}
    for name, value in (one_only if len(args.runs) > 1 else {"out": args.out}).items():
        if value is not None:
            parser.error(f"--{name}: is of {'one run' if name in one_only else 'several runs'}")
    with parser.bad_input():
        if len(args.runs) > 1:
            several(runs, args.out or str(Path(runs[0]).parent / "overlay.png"), args.overwrite)
        else:
            one(runs[0], args.data_root, args.device or "auto", args.overwrite)


if __name__ == "__main__":
    utils.run_command(command)
