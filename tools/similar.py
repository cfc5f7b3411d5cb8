"""Find the images of a folder that an encoder takes for most similar.

python -m tools.similar --model_path results/..._model.pth --data_root my_images --query a.jpg b.jpg
python -m tools.similar --model_path results/..._model.pth --data_root my_images --duplicates 0.99

Similarity is the cosine of two images' features, from -1 to 1. --query lists the nearest images of
each query; a query is not compared with itself. --duplicates lists all pairs whose similarity is at
least a threshold. Both write a CSV table and, beside it, a sheet that shows its first images.
"""

import filecmp
import os
import sys
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
from tools.common import (
    MODEL_HELP,
    add_encoder_options,
    open_source,
    picture_format,
    picture_path,
)
from tools.features import extract

TOP, MAX_PAIRS = 20, 100_000
NEAREST_COLUMNS = ("query", "rank", "file", "similarity")
PAIR_COLUMNS = ("file_a", "file_b", "similarity", "same_bytes")
DIGITS = 6  # of a similarity: the last bits of fp32 differ even for equal images
SHEET_IMAGES, SHEET_PAIRS = 210, 30  # at most
TILE = 96  # pixels of an image's side on the sheet
SHEET_COLUMNS = 7  # images per row


# ---- similarities -------------------------------------------------------------------------------


def list_images(root: Path) -> list[Path]:
    """Return all images below a folder, or those of a CSV list.

    Raises FileNotFoundError or ValueError, naming the root.
    """
    if not root.is_dir():
        return folders.find_images(root, scored=False).train.files
    listing = folders.list_folder(root, labelled=False)
    distributed.log(folders.summarize(root, [("", listing)]))
    return listing.files


def normalise(features: Tensor, args: Namespace) -> Tensor:
    """L2-normalise features in place. Raises ValueError if one is not finite."""
    if not features.isfinite().all():
        raise ValueError(f"{args.model_path}: its features are not finite: try --amp off")
    return F.normalize(features, dim=1, out=features)


def nearest(args: Namespace, files: list[Path], features: Tensor, queries: Tensor) -> list[dict]:
    """Return rows of NEAREST_COLUMNS: the `args.top` nearest of each query, nearest first.

    `features`: of the files, N x d. `queries`: M x d. Raises ValueError if there is no file but
    the query.
    """
    cosines, indices = nearest_neighbors(features, queries, args.top + 1)
    rows = []
    for query, values, neighbors in zip(
        args.query, round_cosines(cosines), indices.tolist(), strict=True
    ):
        path = os.path.realpath(query)
        pairs = [(value, files[i]) for value, i in zip(values, neighbors, strict=True)]
        pairs = [pair for pair in pairs if os.path.realpath(pair[1]) != path][: args.top]
        if not pairs:
            raise ValueError(f"--data_root {args.data_root}: has no image besides {query}")
        for rank, (value, file) in enumerate(pairs, 1):
            rows.append(dict(zip(NEAREST_COLUMNS, (query, rank, str(file), value), strict=True)))
    return rows


def duplicates(args: Namespace, files: list[Path], features: Tensor) -> list[dict]:
    """Return rows of PAIR_COLUMNS, the most similar first, at most `args.max_pairs`."""
    if len(files) < 2:
        raise ValueError(f"--data_root {args.data_root}: has one image, and a pair needs two")
    threshold = args.duplicates - 0.5 * 10**-DIGITS
    cosines, indices, number = similar_pairs(features, threshold, args.max_pairs)
    pairs = zip(round_cosines(cosines), indices.tolist(), strict=True)
    rows = []
    for value, (i, j) in sorted(pairs, key=lambda pair: (-pair[0], pair[1])):
        values = (str(files[i]), str(files[j]), value, filecmp.cmp(files[i], files[j], False))
        rows.append(dict(zip(PAIR_COLUMNS, values, strict=True)))
    if number > len(rows):
        distributed.log(
            f"{number:,} pairs have a similarity of at least {args.duplicates}: the table has the "
            f"{len(rows):,} most similar (--max_pairs)"
        )
    return rows


def round_cosines(cosines: Tensor) -> list:
    """Return cosines as (nested) lists, rounded to DIGITS, within [-1, 1]."""
    return np.round(cosines.clamp(-1, 1).double().cpu().numpy(), DIGITS).tolist()


# ---- the sheet ----------------------------------------------------------------------------------


class Tile(NamedTuple):
    """An image of a sheet, its caption, and whether it has a frame. Without a file: a gap."""

    file: str | None = None
    lines: tuple[str, ...] = ()
    is_framed: bool = False


def short_name(args: Namespace, file: str) -> str:
    """Return a file's path below --data_root, or its name if it lies elsewhere."""
    root, path = Path(args.data_root), Path(file)
    root = root if root.is_dir() else root.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def nearest_tiles(args: Namespace, rows: list[dict]) -> tuple[list[Tile], int, int]:
    """Return the first queries, each framed and before its nearest, the columns and the rows."""
    rows_of_query, tiles, number = {}, [], 0
    for row in rows:
        rows_of_query.setdefault(row["query"], []).append(row)
    columns = min(SHEET_COLUMNS, 1 + max(map(len, rows_of_query.values())))
    for query, neighbors in rows_of_query.items():
        block = [Tile(query, ("query", short_name(args, query)), True)]
        for row in neighbors[: SHEET_IMAGES - 1]:
            caption = (f"{row['rank']}: {row['similarity']:.4f}", short_name(args, row["file"]))
            block.append(Tile(row["file"], caption))
        if tiles and len(tiles) + len(block) > SHEET_IMAGES:
            break
        number += len(block) - 1
        tiles += block + [Tile()] * (-len(block) % columns)
    return tiles, columns, number


def pair_tiles(args: Namespace, rows: list[dict]) -> tuple[list[Tile], int, int]:
    """Return the first pairs, three per line with gaps between, the columns and the rows."""
    tiles, per_line, rows = [], min(3, len(rows)), rows[:SHEET_PAIRS]
    for i, row in enumerate(rows):
        tiles += [Tile()] * (i % per_line > 0)
        similarity = f"{row['similarity']:.4f}" + ", same bytes" * row["same_bytes"]
        for name, line in (("file_a", similarity), ("file_b", "")):
            tiles.append(Tile(row[name], (line, short_name(args, row[name]))))
    return tiles, 3 * per_line - 1, len(rows)


def draw_sheet(args: Namespace, source: LoadedCheckpoint, rows: list[dict], file: IO[bytes]) -> int:
    """Draw the first rows of the table in the format of `args.out`; return their number."""
    tiles, columns, number = (nearest_tiles if args.query else pair_tiles)(args, rows)
    tiles += [Tile()] * (-len(tiles) % columns)
    has_image = [tile.file is not None for tile in tiles]
    files = [tile.file for tile in tiles if tile.file is not None]
    images, _ = decode_files(files, TILE, args.num_workers, options=source.decode)
    pixels = np.full((len(tiles), TILE, TILE, 3), 255, np.uint8)
    pixels[has_image] = images[:, arrays.rgb_channels(images.shape[1])].permute(0, 2, 3, 1)
    title = f"{'nearest images' if args.query else 'pairs'}, and cosines of features"
    plot_captions(
        pixels.reshape(-1, columns, TILE, TILE, 3),
        [[tile.lines for tile in tiles[i : i + columns]] for i in range(0, len(tiles), columns)],
        np.array([tile.is_framed for tile in tiles]).reshape(-1, columns),
        f"{Path(args.data_root).resolve().name}: {title}\n{Path(args.model_path).name}",
        file,
        picture_format(args.out),
    )
    return number


# ---- the command --------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[utils.Parser, Namespace]:
    """Parse the command line."""
    parser = utils.Parser("tools.similar", __doc__)
    add, count = parser.add_argument, utils.number(int, 1)
    add("--model_path", required=True, help=MODEL_HELP)
    add("--data_root", required=True, help="a folder of images, at any depth, or a CSV list")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--query", nargs="+", metavar="FILE", help="find the nearest of these images")
    text = "find the pairs of images of at least this similarity, such as 0.99"
    mode.add_argument("--duplicates", type=utils.number(float, -1, 1), metavar="X", help=text)
    add("--top", type=count, help=f"with --query: number of nearest images ({TOP})")
    text = f"with --duplicates: rows of the table at most ({MAX_PAIRS})"
    add("--max_pairs", type=count, help=text)
    text = "the sheet; the table is a .csv of the same name (similar.png or duplicates.png)"
    add("--out", type=picture_path, help=text)
    add("--overwrite", action="store_true", help="replace an existing sheet and table")
    add_encoder_options(parser)
    args = parser.parse_args(argv)
    for name, other in (("max_pairs", "query"), ("top", "duplicates")):
        if getattr(args, name) is not None and getattr(args, other) is not None:
            parser.error(f"--{name}: cannot be combined with --{other}")
    args.top, args.max_pairs = args.top or TOP, args.max_pairs or MAX_PAIRS
    args.out = args.out or ("similar.png" if args.query else "duplicates.png")
    args.query = list(dict.fromkeys(args.query or ()))
    return parser, args


def find_similar(args: Namespace) -> tuple[LoadedCheckpoint, list[dict]]:
    """Return the encoder and the rows of the table. Raises ValueError or OSError."""
    source = open_source(args)
    files = list_images(Path(args.data_root))
    with error_prefix("--query"):  # first, so that a wrong name is refused at once
        pixels = source.preprocess(args.query)
    features, read = extract(source, source.net.backbone, files, args)
    device = next(source.net.parameters()).device
    features = normalise(torch.from_numpy(features).to(device), args)
    files = [files[i] for i in read]
    if not args.query:
        return source, duplicates(args, files, features)
    amp = devices.autocast(device, devices.setup_device(args)[1])
    queries = normalise(source.features(pixels, amp), args)
    return source, nearest(args, files, features, queries)


def write(args: Namespace, source: LoadedCheckpoint, rows: list[dict]) -> None:
    """Write the sheet and the table. Raises OSError."""
    table = Path(args.out).with_suffix(".csv")
    columns = NEAREST_COLUMNS if args.query else PAIR_COLUMNS
    if not rows:
        write_csv(table, rows, columns)
        remove(args.out)  # an earlier sheet would not show what the table says
        distributed.log(
            f"no two images have a similarity of at least {args.duplicates}: try a lower "
            f"--duplicates; wrote {table}, without a row"
        )
        return
    with atomic_write(args.out) as file:
        number = draw_sheet(args, source, rows, file)
        write_csv(table, rows, columns)
    part = f", of which {args.out} shows the first {number}" if number < len(rows) else ""
    distributed.log(f"wrote {args.out} and {table}: {len(rows):,} rows{part}")


def command(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser, args = parse(argv)
    with parser.bad_input():
        ignore_pil_warnings()
        for path in (args.out, str(Path(args.out).with_suffix(".csv"))):
            utils.check_new("--out", path, args.overwrite)
        write(args, *find_similar(args))


if __name__ == "__main__":
    utils.run_command(command)
