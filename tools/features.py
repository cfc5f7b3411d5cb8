"""Features of image files, to a table: NumPy's .npz, .csv or .parquet.

python -m tools.features --model_path results/..._model.pth --data_root my_images --out found.npz
"""

import sys
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python tools/features.py`

import utils
from simsiam.data import folders
from simsiam.data.decode import decode_files, ignore_pil_warnings
from simsiam.evaluation import metrics
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.runtime import devices, distributed
from simsiam.runtime.files import atomic_write, printable
from tools.common import encoder_flags, open_source

BATCH = 256  # files decoded at a time
ENDS = (".npz", ".csv", ".parquet")


def listed(root: Path, split_names: list[str] | None) -> pandas.DataFrame:
    """The images of a folder or CSV list: file, split and label, as main.py reads them.

    Where the folder has no splits, the first folder within it is a file's label.
    """
    rows = []
    found = folders.find_images(root, split_names, scored=False)
    distributed.log(found.summary)
    for split, part in (("train" if found.has_splits else "", found.train), ("test", found.test)):
        pairs = zip(part.files, part.labels, strict=True) if part else ()
        rows += [(path, split, label or "") for path, label in pairs]
    return pandas.DataFrame(rows, columns=["file", "split", "label"])


def chosen_part(source: LoadedCheckpoint, layer: str) -> nn.Module:
    """What makes features of images. Raises ValueError where the checkpoint has no such layer."""
    if layer == "backbone":
        return source.net.backbone
    if source.is_linear or not len(source.net.projector):
        raise ValueError(f"{source.path}: has no projector: leave out --layer")
    return nn.Sequential(source.net.backbone, source.net.projector)


def of_files(
    source: LoadedCheckpoint, part: nn.Module, files: list[Path], args: Namespace
) -> tuple[np.ndarray, list[int]]:
    """What a `part` of the network makes of files, fp32, N x features, and which files these are.

    `args`: of `encoder_flags`. Moves the source to their device. Raises ValueError, naming the
    file, for one that cannot be read, unless those are skipped.
    """
    device, amp_name = devices.setup_device(args)
    source.to(device)
    amp = devices.autocast(device, amp_name)
    views, found, kept = source.views, None, []
    for start in tqdm(range(0, len(files), BATCH), "features", disable=None, leave=False):
        some = files[start : start + BATCH]
        cut = (views.size, args.num_workers, args.bad_images, source.resize)
        images, bad = decode_files(some, *cut, allow_empty=True, options=source.decode)
        for reason in bad.values():
            distributed.log(reason)
        kept += [start + i for i in range(len(some)) if i not in bad]
        if len(images):
            features = metrics.extract_features(
                part, views.eval_transform, images.to(device), amp, normalise=False
            )
            if found is None:  # filled: a list to be joined would take twice as much
                found = np.empty((len(files), features.shape[1]), np.float32)
            found[len(kept) - len(features) : len(kept)] = features.cpu()
    if found is None:
        raise ValueError(f"{files[0]}: cannot be read, nor can any other")
    return found[: len(kept)], kept


def write(out: Path, images: pandas.DataFrame, features: np.ndarray) -> None:
    """A table of `images`, of `listed`, and `features`, N x features, in the format of the ending.

    Splits and labels are columns where there are some.
    """
    images = images.map(lambda value: printable(str(value)))
    known = {name: images[name].tolist() for name in images if any(images[name])}
    with atomic_write(out) as file:
        if out.suffix == ".npz":
            arrays = {f"{name}s": images[name].tolist() for name in images}
            np.savez(file, features=features, **arrays)
            return
        columns = [f"f{i}" for i in range(features.shape[1])]
        table = pandas.DataFrame(features, columns=columns)
        for i, (name, values) in enumerate(known.items()):
            table.insert(i, name, values)
        if out.suffix == ".csv":
            table.to_csv(file, index=False)
            return
        try:
            table.to_parquet(file)
        except ImportError as error:
            raise ValueError(f"--out {out}: pip install pyarrow") from error


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = utils.Parser(prog="tools.features", description=__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="a checkpoint, ours or another project's")
    add("--data_root", required=True, help="a folder of images of any size, or a CSV list")
    add("--split_names", nargs="+", metavar="NAME", help="as of main.py")
    add("--out", required=True, help=f"the table: a file that ends in {', '.join(ENDS)}")
    add("--overwrite", action="store_true", help="replace the table if it is there")
    add("--layer", default="backbone", choices=("backbone", "projector"), help="(backbone)")
    encoder_flags(parser)
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix not in ENDS:
        parser.error(f"--out {out}: choose an end of {', '.join(ENDS)}")
    with warnings.catch_warnings(), parser.bad_input():
        ignore_pil_warnings()
        utils.check_new("--out", args.out, args.overwrite)
        source = open_source(args)
        part = chosen_part(source, args.layer)
        images = listed(Path(args.data_root), args.split_names)
        features, kept = of_files(source, part, images["file"].tolist(), args)
        write(out, images.iloc[kept], features)
    distributed.log(f"wrote {out}: {features.shape[0]} images, {features.shape[1]} features")


if __name__ == "__main__":
    utils.run_command(command)
