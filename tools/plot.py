"""Pictures of runs again; of several runs, their curves over one another.

python -m tools.plot results/a                           # all of its pictures
python -m tools.plot results/a results/b --out ab.png    # for comparison
"""

import os
from argparse import Namespace
from pathlib import Path

import utils
from simsiam import datasets, devices, figures, files, pictures, ranks
from simsiam.monitor import Monitor
from simsiam.weights import Source

ENDS = ("_model.prev.pth", "_model.pth", "_statistics.csv", "_curves.png")


def one(run: str, data_root: str | None, device_name: str) -> None:
    """All pictures of a run, from its checkpoint; without it, from its table the curves.

    `data_root`: where the images are now; by default where they were.
    """
    path = f"{run}_model.pth"
    if not os.path.isfile(path):
        several([run], f"{run}_curves.png")
        ranks.say(f"{path} is not there: its other pictures cannot be drawn")
        return
    source = Source.open(path)
    if source.is_linear:
        several([run], f"{run}_curves.png")
        evaluate = f"python linear.py --model_path {path} --evaluate_only"
        ranks.say(f"for its confusion matrix: {evaluate}")
        return
    saved = source.state["args"]
    args = Namespace(**saved | {"data_root": data_root or saved["data_root"]})
    device = devices.pick_device(device_name)
    images = datasets.load(
        args.data_name, args.data_root, args.image_size, args.num_workers, args.bad_images
    )
    for size, flag in ((args.train_size, "--train_size"), (args.bank_size, "--bank_size")):
        images = images if size is None else images.subset(size, args.seed, flag)
    net, amp = source.to(device).net, devices.autocast(device, args.amp)
    monitor = Monitor(net, source.views, images.to(device), args, args.lr, amp)
    pictures.draw_run(run, os.path.basename(run), source.state["history"], monitor)
    ranks.say(f"wrote the pictures of {run}")


def several(runs: list[str], out: str) -> None:
    """The curves of runs, from their tables."""
    histories = {}
    for run in runs:
        table = f"{run}_statistics.csv"
        if not os.path.isfile(table):
            raise FileNotFoundError(f"{run}: there is no {table}")
        histories[os.path.basename(run)] = files.read_csv(table)
    with files.whole_file(out) as file:
        figures.curves(histories, file)
    ranks.say(f"wrote {out}")


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = utils.Parser("tools.plot", __doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="results/<run>, or one of its files")
    add("--out", help="of several runs: the picture (overlay.png beside the first one)")
    add("--data_root", help="where the images are now, of one run (as they were)")
    add("--device", help="as of main.py, of one run (auto)")
    args = parser.parse_args(argv)
    one_only = {"data_root": args.data_root, "device": args.device}
    for name, value in (one_only if len(args.runs) > 1 else {"out": args.out}).items():
        if value is not None:
            parser.error(f"--{name}: is of {'one run' if name in one_only else 'several runs'}")
    runs = []
    for run in args.runs:
        for end in ENDS:
            run = run.removesuffix(end)
        runs.append(run)
    with parser.bad_input():
        if len(runs) > 1:
            several(runs, args.out or str(Path(runs[0]).parent / "overlay.png"))
        else:
            one(runs[0], args.data_root, args.device or "auto")


if __name__ == "__main__":
    utils.run_command(command)
