"""Write the features of image files to a table: NumPy's .npz, .csv or .parquet.

python -m tools.features --model_path results/..._model.pth --data_root my_images --out features.npz
"""

import sys
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
from tools.common import add_encoder_options, open_source

BATCH = 256  # files decoded at a time
FORMATS = (".npz", ".csv", ".parquet")


def list_images(root: Path, split_names: list[str] | None) -> pandas.DataFrame:
    """Return file, split and label of the images in a folder or CSV list, as main.py reads them.

    In a folder without splits a file's label is its first subfolder.
    """
    rows, listing = [], folders.find_images(root, split_names, scored=False)
    distributed.log(listing.summary)
    train = "train" if listing.has_splits else ""
    for split, part in ((train, listing.train), ("test", listing.test)):
        pairs = zip(part.files, part.labels, strict=True) if part else ()
        rows += [(path, split, label or "") for path, label in pairs]
    return pandas.DataFrame(rows, columns=["file", "split", "label"])


def network_up_to(source: LoadedCheckpoint, layer: str) -> nn.Module:
    """Return the network up to a layer. Raises ValueError where the checkpoint does not have it."""
    if layer == "backbone":
        return source.net.backbone
    if source.is_linear or not len(source.net.projector):
        raise ValueError(f"{source.path}: has no projector: leave out --layer")
    return nn.Sequential(source.net.backbone, source.net.projector)


def extract(
    source: LoadedCheckpoint, part: nn.Module, files: list[Path], args: Namespace
) -> tuple[np.ndarray, list[int]]:
    """Return the features of files, fp32, N x features, and the indices of the files.

    `part`: of the source's network. `args`: of `add_encoder_options`. Moves the source to their
    device. A file that cannot be read is skipped with `--bad_images skip`; else raises ValueError.
    """
    device, amp_name = devices.setup_device(args)
    source.to(device)
    amp = devices.autocast(device, amp_name)
    views, table, indices = source.views, None, []
    for start in tqdm(range(0, len(files), BATCH), "features", disable=None, leave=False):
        batch = files[start : start + BATCH]
        how = (views.size, args.num_workers, args.bad_images, source.resize)
        images, bad = decode_files(batch, *how, allow_empty=True, options=source.decode)
        for reason in bad.values():
            distributed.log(reason)
        indices += [start + i for i in range(len(batch)) if i not in bad]
        if len(images):
            features = metrics.extract_features(
                part, views.eval_transform, images.to(device), amp, normalise=False
            )
            if table is None:  # one array: concatenating a list would take twice the memory
                table = np.empty((len(files), features.shape[1]), np.float32)
            table[len(indices) - len(features) : len(indices)] = features.cpu()
    if table is None:
        raise ValueError(f"{files[0]}: cannot be read, nor can any other")
    return table[: len(indices)], indices


def write(out: Path, images: pandas.DataFrame, features: np.ndarray) -> None:
    """Write `images`, of `list_images`, and `features`, N x features, in the format of the ending.

    .csv and .parquet have columns of splits and labels only where there are some.
    """
    images = images.map(lambda value: printable(str(value)))
    columns = {name: images[name].tolist() for name in images if any(images[name])}
    with atomic_write(out) as file:
        if out.suffix == ".npz":
            arrays = {f"{name}s": images[name].tolist() for name in images}
            np.savez(file, features=features, **arrays)
            return
        table = pandas.DataFrame(features, columns=[f"f{i}" for i in range(features.shape[1])])
        for i, (name, values) in enumerate(columns.items()):
            table.insert(i, name, values)
        if out.suffix == ".csv":
            table.to_csv(file, index=False)
            return
        try:
            table.to_parquet(file)
        except ImportError as error:
            raise ValueError(f"--out {out}: pip install pyarrow") from error


def command(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = utils.Parser(prog="tools.features", description=__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="a checkpoint of any known project")
    add("--data_root", required=True, help="a folder of images of any size, or a CSV list")
    add("--split_names", nargs="+", metavar="NAME", help="as of main.py")
    add("--out", required=True, help=f"the table, {', '.join(FORMATS)}")
    add("--overwrite", action="store_true", help="replace an existing table")
    add("--layer", default="backbone", choices=("backbone", "projector"), help="(backbone)")
    add_encoder_options(parser)
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix not in FORMATS:
        parser.error(f"--out {out}: choose an ending of {', '.join(FORMATS)}")
    with parser.bad_input():
        ignore_pil_warnings()
        utils.check_new("--out", args.out, args.overwrite)
        source = open_source(args)
        part = network_up_to(source, args.layer)
        images = list_images(Path(args.data_root), args.split_names)
        features, indices = extract(source, part, images["file"].tolist(), args)
        write(out, images.iloc[indices], features)
    distributed.log(f"wrote {out}: {features.shape[0]} images, {features.shape[1]} features")


if __name__ == "__main__":
    utils.run_command(command)
