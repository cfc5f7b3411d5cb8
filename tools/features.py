"""Features of image files, to a table: NumPy's .npz, .csv or .parquet.

python -m tools.features --model_path results/..._model.pth --data_root my_images --out found.npz
"""

from pathlib import Path

import numpy as np
import pandas
from torch import nn
from tqdm import tqdm

import data
import model
import utils
from tools import convert

BATCH = 256  # files decoded at a time
ENDS = (".npz", ".csv", ".parquet")


def listed(root: Path) -> tuple[list[Path], list[str]]:
    """The images of a folder, labelled by the folder that each lies in, or those of a CSV list."""
    if root.suffix.lower() == ".csv":
        files, labels = data.list_csv(root)
        return files, [label or "" for label in labels]
    if not root.is_dir():
        raise FileNotFoundError(f"--data_root {root}: there is no such folder or .csv list")
    files = data.list_folder(root, labelled=False)[0]
    return files, ["" if path.parent == root else path.parent.name for path in files]


def network(path: str, layer: str) -> tuple[nn.Module, dict, list[str], str | None]:
    """Images to features; an encoder's input; what to know; the name of its data set."""
    state = convert.ours(path)
    net, args, notes = model.load_any(path, state)
    if layer == "projector" and not len(getattr(net, "projector", ())):
        raise ValueError("has no projector: leave out --layer")
    part = nn.Sequential(net.backbone, net.projector) if layer == "projector" else net.backbone
    name = None if state is None else state["args"].get("data_name")
    return part, data.usual_input(args["stem"]) | args, notes, name


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = utils.Parser("tools.features", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model_path", required=True, help="a checkpoint, ours or another project's")
    add("--data_root", required=True, help="a folder of images of any size, or a CSV list")
    add("--out", required=True, help=f"the table: a file that ends in {', '.join(ENDS)}")
    add("--layer", default="backbone", choices=("backbone", "projector"), help="(backbone)")
    add("--device", default="auto", help="as of main.py (auto)")
    add("--amp", default="auto", choices=("auto", "bf16", "off"), help="as of main.py (auto)")
    add("--num_workers", type=utils.number(int, 0, 256), default=2, help="threads (2)")
    add("--bad_images", default="error", choices=("error", "skip"), help="as of main.py (error)")
    parser.set_defaults(deterministic=False)
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix not in ENDS:
        parser.error(f"--out {out}: choose an end of {', '.join(ENDS)}")
    with parser.bad_input():
        device, amp = utils.set_up(args)
        with utils.about(f"--model_path {args.model_path}"):
            net, encoder, notes, name = network(args.model_path, args.layer)
        for note in notes:
            utils.say(f"{args.model_path}: {note}")
        net.to(device)
        size = encoder["image_size"]
        views = data.Views(size, encoder["mean"], encoder["std"])
        shorter = data.shorter_side(name or "", size)
        files, labels = listed(Path(args.data_root))
        rows, kept = [], []
        for start in tqdm(range(0, len(files), BATCH), "features", disable=None, leave=False):
            part = files[start : start + BATCH]
            more = (args.num_workers, args.bad_images, shorter)
            images, bad = data.decode(part, size, *more)
            for reason in bad.values():
                utils.say(reason)
            kept += [start + i for i in range(len(part)) if i not in bad]
            rows.append(utils.features(net, views.plain, images.to(device), amp, False).cpu())
        features = np.concatenate([row.numpy() for row in rows])
        names, labels = ([str(of[i]) for i in kept] for of in (files, labels))
        with utils.whole_file(out) as file:
            if out.suffix == ".npz":
                np.savez(file, files=names, features=features, labels=labels)
            else:
                columns = [f"f{i}" for i in range(features.shape[1])]
                table = pandas.DataFrame(features, columns=columns)
                table.insert(0, "file", names)
                if any(labels):
                    table.insert(1, "label", labels)
                if out.suffix == ".csv":
                    table.to_csv(file, index=False)
                else:
                    try:
                        table.to_parquet(file)
                    except ImportError as error:
                        raise ValueError(f"--out {out}: pip install pyarrow") from error
    utils.say(f"wrote {out}: {features.shape[0]} images, {features.shape[1]} features")


if __name__ == "__main__":
    command()
