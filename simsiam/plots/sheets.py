"""Sheets of images, each with a caption: what is like what."""

from collections.abc import Sequence
from typing import IO

import numpy as np

from simsiam.plots.curves import VERMILION, drawing, mosaic
from simsiam.plots.lettering import drawable

WIDEST = 22  # columns of a caption's line, in the 1.35 inches that an image and its gap have


def captioned(
    tiles: np.ndarray,
    captions: Sequence[Sequence[Sequence[str]]],
    framed: np.ndarray,
    title: str,
    file: IO[bytes],
    format: str = "png",
) -> None:
    """Images in rows, the lines of its caption below each.

    `tiles`: rows x columns x side x side x 3 of uint8, white where there is no image; `captions`:
    for each row and column its lines, of which the middle of a long one is cut; `framed`: rows x
    columns, bool; `format`: one of `figures.FORMATS`.
    """
    from matplotlib.patches import Rectangle

    rows, columns, side = tiles.shape[:3]
    drawn = [[[drawable(line, WIDEST) for line in lines] for lines in row] for row in captions]
    letters = ["".join(lines) for row in drawn for lines in row]
    size = 1.35 * columns + 0.4, 1.35 * rows + 0.8
    with drawing(*size, file, title, letters, format) as figure:
        axes, pitch = mosaic(figure, tiles, gap=side * 7 // 16)
        look = {"fill": False, "edgecolor": VERMILION, "linewidth": 3, "clip_on": False}
        for r, row in enumerate(drawn):
            for c, lines in enumerate(row):
                corner = (c * pitch - 0.5, r * pitch - 0.5)
                if framed[r, c]:
                    axes.add_patch(Rectangle(corner, side, side, **look))
                place = {"x": corner[0] + side / 2, "y": corner[1] + side * 1.05}
                text = {"s": "\n".join(lines), "fontsize": 7, "parse_math": False}
                axes.text(**place, **text, ha="center", va="top")
