"""The images of a folder that an encoder finds most like given ones, or like each other.

python -m tools.similar --model_path results/..._model.pth --data_root my_images --query a.jpg b.jpg
python -m tools.similar --model_path results/..._model.pth --data_root my_images --duplicates 0.99

Similarity is the cosine of two images' features, from -1 to 1. The first command tables the nearest
of each query, which is not compared with itself; the second all pairs from a similarity on. Each
writes a CSV table and, beside it, a sheet of the images, which shows the first of them.
"""

import filecmp
import os
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python tools/similar.py`

import utils
from simsiam.data import arrays, folders
from simsiam.data.decode import decode_files, ignore_pil_warnings
from simsiam.evaluation.knn import nearest_neighbors, similar_pairs
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.plots.sheets import plot_captions
from simsiam.runtime import devices, distributed
from simsiam.runtime.files import atomic_write, error_prefix, remove, write_csv
from tools.common import add_encoder_options, open_source, picture_format, picture_path
from tools.features import extract

TOP, MAX_PAIRS = 20, 100_000
NEAREST = ("query", "rank", "file", "similarity")
PAIRS = ("file_a", "file_b", "similarity", "same_bytes")
DIGITS = 6  # of a similarity: of two equal images the cosine is 1, but for the last bits of fp32
SHOWN, PAIRS_SHOWN = 210, 30  # images, or pairs of them, on a sheet at most
TILE = 96  # pixels of an image's side there
COLUMNS = 7  # images a row of a sheet, below a query; three pairs and the gaps between are eight


# ---- what is like what --------------------------------------------------------------------------


class Bank(NamedTuple):
    """The images that are looked through: files and their features, L2-normalised, N x d."""

    files: list[Path]
    features: Tensor


def listed(root: Path) -> list[Path]:
    """All images below a folder, whatever its parts and classes, or of a CSV list.

    Raises FileNotFoundError or ValueError, naming it.
    """
    if not root.is_dir():
        return folders.find_images(root, scored=False).train.files
    listing = folders.list_folder(root, labelled=False)
    distributed.log(folders.summarize(root, [("", listing)]))
    return listing.files


def finite(features: Tensor, args: Namespace) -> Tensor:
    """The features, L2-normalised in place. Raises ValueError, which names the checkpoint."""
    if not features.isfinite().all():
        raise ValueError(f"{args.model_path}: its features are not finite (--amp off)")
    return F.normalize(features, dim=1, out=features)


def bank_of(args: Namespace, source: LoadedCheckpoint, files: list[Path]) -> Bank:
    """Files and their features, on the source's device. Raises ValueError, naming the file."""
    features, kept = extract(source, source.net.backbone, files, args)
    device = next(source.net.parameters()).device
    return Bank([files[i] for i in kept], finite(torch.from_numpy(features).to(device), args))


def nearest(args: Namespace, bank: Bank, queries: Tensor) -> list[dict]:
    """Rows of NEAREST: for each query, of N x d, its `args.top` nearest, the nearest first.

    A query that lies in the bank is left out of its own. Raises ValueError where none is left.
    """
    cosines, places = nearest_neighbors(bank.features, queries, args.top + 1)
    rows = []
    for query, values, those in zip(args.query, rounded(cosines), places.tolist(), strict=True):
        own = os.path.realpath(query)
        pairs = zip(values, (bank.files[i] for i in those), strict=True)
        others = [pair for pair in pairs if os.path.realpath(pair[1]) != own][: args.top]
        if not others:
            raise ValueError(f"--data_root {args.data_root}: has no image besides {query}")
        for i, (value, file) in enumerate(others, 1):
            rows.append({"query": query, "rank": i, "file": str(file), "similarity": value})
    return rows


def duplicates(args: Namespace, bank: Bank) -> tuple[list[dict], int]:
    """Rows of PAIRS, the most similar first, `args.max_pairs` at most; how many pairs there are."""
    if len(bank.files) < 2:
        raise ValueError(f"--data_root {args.data_root}: has one image, and a pair needs two")
    least = args.duplicates - 0.5 * 10**-DIGITS
    values, places, number = similar_pairs(bank.features, least, args.max_pairs)
    rows = []
    found = zip(rounded(values), places.tolist(), strict=True)
    for value, (i, j) in sorted(found, key=lambda pair: (-pair[0], pair[1])):
        a, b = bank.files[i], bank.files[j]
        same = filecmp.cmp(a, b, shallow=False)
        row = {"file_a": str(a), "file_b": str(b), "similarity": value, "same_bytes": same}
        rows.append(row)
    return rows, number


def rounded(cosines: Tensor) -> list:
    """Cosines to DIGITS, from -1 to 1: a list, of lists where they are a matrix."""
    return np.round(cosines.clamp(-1, 1).double().cpu().numpy(), DIGITS).tolist()


# ---- the sheet ----------------------------------------------------------------------------------


class Tile(NamedTuple):
    """An image of a sheet, its caption, and whether it has a frame. No image: a gap."""

    file: str | None = None
    lines: tuple[str, ...] = ()
    framed: bool = False


def sheet(
    args: Namespace,
    source: LoadedCheckpoint,
    tiles: list[Tile],
    columns: int,
    title: str,
    file: IO[bytes],
) -> None:
    """Draw tiles, in rows of so many: of each image the centre, in the format of `args.out`."""
    tiles = tiles + [Tile()] * (-len(tiles) % columns)
    there = [tile.file is not None for tile in tiles]
    files = [tile.file for tile in tiles if tile.file is not None]
    images, _ = decode_files(files, TILE, args.num_workers, options=source.decode)
    pixels = np.full((len(tiles), TILE, TILE, 3), 255, np.uint8)
    pixels[there] = images[:, arrays.rgb_channels(images.shape[1])].permute(0, 2, 3, 1)
    rows = range(0, len(tiles), columns)
    plot_captions(
        pixels.reshape(len(rows), columns, TILE, TILE, 3),
        [[tile.lines for tile in tiles[i : i + columns]] for i in rows],
        np.array([tile.framed for tile in tiles]).reshape(len(rows), columns),
        f"{Path(args.data_root).resolve().name}: {title}\n{Path(args.model_path).name}",
        file,
        picture_format(args.out),
    )


def short(args: Namespace, file: str) -> str:
    """A file's name on the sheet: below --data_root, or alone."""
    root, path = Path(args.data_root), Path(file)
    root = root if root.is_dir() else root.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def sheet_of_nearest(
    args: Namespace, source: LoadedCheckpoint, rows: list[dict], file: IO[bytes]
) -> int:
    """The first queries, framed, each before its nearest; returns how many rows are shown."""
    of_query, tiles, shown = {}, [], 0
    for row in rows:
        of_query.setdefault(row["query"], []).append(row)
    columns = min(COLUMNS, 1 + max(map(len, of_query.values())))
    for query, those in of_query.items():
        own = [Tile(query, ("query", short(args, query)), True)]
        for row in those[: SHOWN - 1]:
            lines = (f"{row['rank']}: {row['similarity']:.4f}", short(args, row["file"]))
            own.append(Tile(row["file"], lines))
        if tiles and len(tiles) + len(own) > SHOWN:
            break
        shown += len(own) - 1
        tiles += own + [Tile()] * (-len(own) % columns)
    sheet(args, source, tiles, columns, "nearest images, and cosines of features", file)
    return shown


def sheet_of_pairs(
    args: Namespace, source: LoadedCheckpoint, rows: list[dict], file: IO[bytes]
) -> int:
    """The most similar pairs, three a row; returns how many are shown."""
    tiles, wide, shown = [], min(3, len(rows)), rows[:PAIRS_SHOWN]
    for i, row in enumerate(shown):
        tiles += [Tile()] * (i % wide > 0)
        told = f"{row['similarity']:.4f}" + ", same bytes" * row["same_bytes"]
        for name, line in (("file_a", told), ("file_b", "")):
            tiles.append(Tile(row[name], (line, short(args, row[name]))))
    sheet(args, source, tiles, 3 * wide - 1, "pairs, and cosines of features", file)
    return len(shown)


# ---- the command --------------------------------------------------------------------------------


def parsed(argv: list[str] | None) -> tuple[utils.Parser, Namespace]:
    """The command line."""
    parser = utils.Parser("tools.similar", __doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="a checkpoint, ours or another project's")
    add("--data_root", required=True, help="a folder of images, at any depth, or a CSV list")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--query", nargs="+", metavar="FILE", help="images to find the nearest of")
    pairs = "find the pairs of images of at least this similarity, such as 0.99"
    kind.add_argument("--duplicates", type=utils.number(float, -1, 1), metavar="X", help=pairs)
    count = utils.number(int, 1)
    add("--top", type=count, help=f"of --query: so many of the nearest ({TOP})")
    most = f"of --duplicates: the table's length at most ({MAX_PAIRS})"
    add("--max_pairs", type=count, help=most)
    out = "the sheet, a .csv of the same name beside it (similar.png or duplicates.png)"
    add("--out", type=picture_path, help=out)
    add("--overwrite", action="store_true", help="replace sheet and table if they are there")
    add_encoder_options(parser)
    args = parser.parse_args(argv)
    for name, other in (("max_pairs", "query"), ("top", "duplicates")):
        if getattr(args, name) is not None and getattr(args, other) is not None:
            parser.error(f"--{name}: does not go with --{other}")
    args.top, args.max_pairs = args.top or TOP, args.max_pairs or MAX_PAIRS
    args.out = args.out or ("similar.png" if args.query else "duplicates.png")
    args.query = list(dict.fromkeys(args.query or ()))
    return parser, args


def found(args: Namespace) -> tuple[LoadedCheckpoint, list[dict]]:
    """The encoder, and the rows of the table. Raises ValueError or OSError, naming the file."""
    source = open_source(args)
    files = listed(Path(args.data_root))
    with error_prefix("--query"):  # before the many: a wrong name is not to be found out at the end
        pixels = source.preprocess(args.query)
    bank = bank_of(args, source, files)
    if args.query:
        device = bank.features.device
        amp = devices.autocast(device, devices.setup_device(args)[1])
        return source, nearest(args, bank, finite(source.features(pixels, amp), args))
    rows, number = duplicates(args, bank)
    if number > len(rows):
        distributed.log(
            f"{number:,} pairs have a similarity of {args.duplicates} or more: the {len(rows):,} "
            "most similar are in the table (--max_pairs)"
        )
    return source, rows


def write(args: Namespace, source: LoadedCheckpoint, rows: list[dict]) -> None:
    """The sheet and the table, and a line that says so. Raises OSError."""
    table, columns = Path(args.out).with_suffix(".csv"), NEAREST if args.query else PAIRS
    if not rows:
        write_csv(table, rows, columns)
        remove(args.out)  # of another command: it is not what the table says
        distributed.log(
            f"no two images have a similarity of {args.duplicates} or more; a lower --duplicates "
            f"shows the most similar ones; wrote {table}, without a row"
        )
        return
    draw = sheet_of_nearest if args.query else sheet_of_pairs
    with atomic_write(args.out) as file:
        shown = draw(args, source, rows, file)
        write_csv(table, rows, columns)
    some = f", of which {args.out} shows the first {shown}" * (shown < len(rows))
    distributed.log(f"wrote {args.out} and {table}: {len(rows):,} rows{some}")


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser, args = parsed(argv)
    with warnings.catch_warnings(), parser.bad_input():
        ignore_pil_warnings()
        for path in (args.out, str(Path(args.out).with_suffix(".csv"))):
            utils.check_new("--out", path, args.overwrite)
        write(args, *found(args))


if __name__ == "__main__":
    utils.run_command(command)
