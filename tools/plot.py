"""Pictures of runs again; of several runs, their curves over one another.

python -m tools.plot results/a                           # all of its pictures
python -m tools.plot results/a results/b --out ab.png    # for comparison
"""

import os
from pathlib import Path

import figures
import linear
import main
import model
import utils

ENDS = ("_model.prev.pth", "_model.pth", "_statistics.csv", "_curves.png")


def one(run: str, flags: list[str]) -> None:
    """All pictures of a run, from its checkpoint; without it, from its table the curves."""
    path = f"{run}_model.pth"
    if not os.path.isfile(path):
        several([run], f"{run}_curves.png")
        utils.say(f"{path} is not there: its other pictures cannot be drawn")
        return
    state = utils.load_checkpoint(path)
    if "encoder" in state["args"]:
        several([run], f"{run}_curves.png")
        folder, name = os.path.split(run)
        place = ["--out", folder or ".", "--name", name]
        linear.main(["--model_path", path, "--evaluate_only", *place, *flags])
        return
    parser = main.parse_args([])[1]
    args = main.parse_args([*parser.as_argv(state["args"]), *flags], parser.prog)[0]
    device, amp = utils.set_up(args)
    with utils.about(path):
        net = model.pretrained(state).to(device)
    images = main.load_images(args).to(device)
    if args.bank_size is not None:
        images = images.subset(args.bank_size, args.seed, "--bank_size")
    main.draw(run, state["history"], net, main.make_views(args), images, args, amp)
    utils.say(f"wrote the pictures of {run}")


def several(runs: list[str], out: str) -> None:
    """The curves of runs, from their tables."""
    histories = {}
    for run in runs:
        table = f"{run}_statistics.csv"
        if not os.path.isfile(table):
            raise FileNotFoundError(f"{run}: there is no {table}")
        histories[os.path.basename(run)] = utils.read_csv(table)
    with utils.whole_file(out) as file:
        figures.curves(histories, file)
    utils.say(f"wrote {out}")


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = utils.Parser("tools.plot", description=__doc__.split("\n")[0], allow_abbrev=False)
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
            one(runs[0], [f"--{name}={value}" for name, value in one_only.items() if value])


if __name__ == "__main__":
    utils.run_command(command)
