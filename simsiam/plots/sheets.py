"""Figures of images: nearest neighbours, augmented views, images with captions."""

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

import numpy as np

from simsiam.plots.style import GREEN, VERMILION, fit_names, fit_text, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION_WIDTH = 22  # columns of a caption's line, in the 1.35 inches of an image and its gap


def draw_mosaic(figure: "Figure", tiles: np.ndarray, gap: int) -> "tuple[Axes, int]":
    """Draw images in rows and columns with a gap of `gap` pixels, in one Axes without ticks.

    `tiles`: rows x columns x H x W x 3, uint8. Returns the Axes, whose unit is a pixel, and the
    pitch: the upper left corner of the tile in row r and column c is at (c, r) * pitch.
    """
    rows, columns, height, width = tiles.shape[:4]
    pitch = max(height, width) + gap
    canvas = np.full((rows * pitch - gap, columns * pitch - gap, 3), 255, np.uint8)
    for r in range(rows):
        for c in range(columns):
            canvas[r * pitch :, c * pitch :][:height, :width] = tiles[r, c]
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes, pitch


def plot_views(
    tiles: np.ndarray,
    names: Sequence[str],
    texts: dict[tuple[int, int], str],
    title: str,
    file: IO[bytes],
) -> None:
    """Plot images and their views, in columns with `names`.

    `tiles`: rows x columns x H x W x 3, uint8; `texts`: by row and column, a text that starts at
    the upper left of that tile.
    """
    rows, columns, height, width = tiles.shape[:4]
    with new_figure(1.3 * columns + 0.6, 1.3 * rows + 0.6, file, title) as figure:
        axes, pitch = draw_mosaic(figure, tiles, gap=max(1, height // 16))
        axes.set_xticks([pitch * c + width / 2 for c in range(columns)], names)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        for (r, c), text in texts.items():
            axes.text(pitch * c, pitch * r, text, va="top", fontsize=6.5)


def plot_neighbours(
    tiles: np.ndarray,
    cosines: np.ndarray,
    is_same_class: np.ndarray | None,
    names: Sequence[str],
    title: str,
    file: IO[bytes],
) -> None:
    """Plot a query per row, followed by its nearest images in the feature bank, nearest first.

    `tiles`: rows x (1 + k) x side x side x 3, uint8, the query first; `cosines`: rows x k;
    `is_same_class`: rows x k, bool, neighbours of the query's class get a frame; None without
    labels. `names`: the classes of the queries.
    """
    from matplotlib.patches import Patch, Rectangle

    rows, columns, side = tiles.shape[:3]
    labels = fit_names(dict.fromkeys(names))
    with new_figure(0.85 * columns + 1, 0.85 * rows + 1, file, title) as figure:
        axes, pitch = draw_mosaic(figure, tiles, gap=max(4, side * 5 // 16))
        frame = {"fill": False, "edgecolor": GREEN, "linewidth": 3}
        for r in range(rows):
            for c in range(1, columns):
                left, top = c * pitch - 0.5, r * pitch - 0.5
                if is_same_class is not None and is_same_class[r, c - 1]:
                    axes.add_patch(Rectangle((left, top), side, side, clip_on=False, **frame))
                place = (left + side / 2, top + side * 1.04)
                axes.text(*place, f"{cosines[r, c - 1]:.3f}", ha="center", va="top", fontsize=7)
        ticks = [pitch * r + side / 2 for r in range(rows)]
        axes.set_yticks(ticks, [labels[name] for name in names], parse_math=False)
        ticks = [side / 2, pitch * columns / 2]
        axes.set_xticks(ticks, ["query", "nearest in the bank, with cosine"])
        axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize="small")
        if is_same_class is not None:
            handle = Patch(**frame, label="of the query's class")
            figure.legend(handles=[handle], loc="outside lower center", fontsize="small")


def plot_captions(
    tiles: np.ndarray,
    captions: Sequence[Sequence[Sequence[str]]],
    has_frame: np.ndarray,
    title: str,
    file: IO[bytes],
    format: str = "png",
) -> None:
    """Plot images in rows, each above the lines of its caption.

    `tiles`: rows x columns x side x side x 3, uint8, white where there is no image; `captions`: by
    row and column, the lines, shortened to CAPTION_WIDTH; `has_frame`: rows x columns, bool;
    `format`: one of FORMATS.
    """
    from matplotlib.patches import Rectangle

    rows, columns, side = tiles.shape[:3]
    with new_figure(1.35 * columns + 0.4, 1.35 * rows + 0.8, file, title, format) as figure:
        axes, pitch = draw_mosaic(figure, tiles, gap=side * 7 // 16)
        frame = {"fill": False, "edgecolor": VERMILION, "linewidth": 3, "clip_on": False}
        for r, row in enumerate(captions):
            for c, lines in enumerate(row):
                left, top = c * pitch - 0.5, r * pitch - 0.5
                if has_frame[r, c]:
                    axes.add_patch(Rectangle((left, top), side, side, **frame))
                text = "\n".join(fit_text(line, CAPTION_WIDTH) for line in lines)
                place = {"ha": "center", "va": "top", "fontsize": 7, "parse_math": False}
                axes.text(left + side / 2, top + side * 1.05, text, **place)
