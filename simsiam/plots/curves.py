"""Pictures from numbers: curves, neighbours, embedding, confusion matrix, ablations.

No pyplot, so no window system and no global state. Colours are those of Okabe and Ito, which
colour-blind people tell apart; what matters is told by a shape, a frame or a number besides.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING

import numpy as np

from simsiam.plots.lettering import columns_of, drawable, drawable_names, font_of, in_legend

if TYPE_CHECKING:  # imported where a picture is drawn, at the end of a run: it takes its time
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
COLOURS += ("#882255", "#999999")  # and two of Tol's, so that ten classes have one each
MARKERS = "o^sDvP*"  # as many as have no factor in common with the colours: 70 pairs
LINES = ("-", "--", ":", "-.")
DPI = 110
FORMATS = ("png", "pdf", "svg", "jpg", "jpeg", "webp")

PANELS = {
    "train_loss": "training loss",
    "test_acc@1": "top-1 on test images (%)",
    "train_acc@1": "top-1 in training (%)",
    "std": "std of z · √d (0: collapsed)",
    "rank": "effective rank of the features",
}


# ---- parts of pictures --------------------------------------------------------------------------


@contextlib.contextmanager
def drawing(
    width: float,
    height: float,
    file: IO[bytes],
    title: str = "",
    names: Iterable[str] = (),
    format: str = "png",
) -> "Iterator[Figure]":
    """A figure of that size in inches, whose parts make room for one another; written at the end.

    `names`: texts with letters that matplotlib's own font may lack; `format`: one of FORMATS.
    """
    import matplotlib
    from matplotlib.figure import Figure

    title = "\n".join(drawable(line, int(10 * width)) for line in title.split("\n"))
    usual = matplotlib.rcParams["font.family"]
    more = {font_of(letter) for letter in set("".join((*names, title)))} - {None, *usual}
    with matplotlib.rc_context({"font.family": [*usual, *sorted(more)]}):
        figure = Figure(figsize=(width, height), layout="constrained")
        if title:
            figure.suptitle(title, fontsize="medium", parse_math=False)
        yield figure
        figure.savefig(file, format=format, dpi=DPI)


def bare(axes: "Axes") -> None:
    """A light grid, and no frame on the upper and right side."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def curves(runs: dict[str, list[dict]], file: IO[bytes], format: str = "png") -> None:
    """Loss, accuracy, std and rank over the epochs, of one run or of several over one another.

    `runs`: by name the rows of the statistics CSV. Row 0 of a pre-training is the untrained
    encoder, and may have the kNN accuracy on raw pixels under `raw_acc@1`; of a single run, both
    are lines. A panel that no row has a value for (no labels) is left out. `format`: of FORMATS.
    """
    rows = [row for history in runs.values() for row in history]
    panels = [name for name in PANELS if any(row.get(name) is not None for row in rows)]
    several = len(runs) > 1
    last = max(row["epoch"] for row in rows)  # all panels have the same epochs
    width = 3.7 * max(1, len(panels))
    names = drawable_names(runs, int(9 * width))
    title = "" if several else next(iter(runs))
    # The legend is below the panels, where it lies on no curve.
    widest = max(map(columns_of, names.values())) if several else len("untrained encoder 99.9")
    columns = max(1, min(3, int(width / (0.08 * widest + 0.6))))
    height = 3.2 + 0.22 * -(-len(names) // columns)
    with drawing(width, height, file, title, names.values(), format) as figure:
        figure.get_layout_engine().set(w_pad=0.12)
        shown = []
        places = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, column in zip(places, panels, strict=True):
            lines = [
                plot_run(axes, i, history, column, names[name])
                for i, (name, history) in enumerate(runs.items())
            ]
            axes.set(xlabel="epoch", ylabel=PANELS[column], xlim=(-0.04 * last, 1.04 * last))
            axes.xaxis.get_major_locator().set_params(integer=True)
            bare(axes)
            if column.endswith("acc@1"):
                axes.set_ylim(0, 102)  # a line at 100 is not to lie on the border
            elif column == "std":
                axes.set_ylim(0, max(1.1, 1.05 * max(row.get("std", 0) for row in rows)))
            if several:
                shown = lines
            elif column == "test_acc@1":
                shown = plot_baselines(axes, rows[0])
        if shown:
            figure.legend(
                handles=shown, loc="outside lower center", ncols=columns, fontsize="small"
            )


def plot_run(axes: "Axes", i: int, history: list[dict], column: str, name: str) -> "Line2D":
    """The line of run number i, where it has values."""
    points = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
    (line,) = axes.plot(
        *(zip(*points, strict=True) if points else ((), ())),
        color=COLOURS[i % len(COLOURS)],
        linestyle=LINES[i // len(COLOURS) % len(LINES)],
        marker="." if len(points) < 50 else "",
        label=in_legend(name),
    )
    return line


def plot_baselines(axes: "Axes", start: dict) -> "list[Line2D]":
    """Lines of the accuracies before training that the first row has."""
    untrained = start.get("test_acc@1") if start["epoch"] == 0 else None
    found = (
        (untrained, "untrained encoder", VERMILION, "--"),
        (start.get("raw_acc@1"), "raw pixels", GREEN, ":"),
    )
    return [
        axes.axhline(value, color=colour, linestyle=style, label=f"{name} {value:.1f}")
        for value, name, colour, style in found
        if value is not None
    ]


def mosaic(figure: "Figure", tiles: np.ndarray, gap: int) -> "tuple[Axes, int]":
    """Rows of images, rows x columns x H x W x 3 of uint8, in one Axes without a scale.

    Returns it and the distance of the tiles in its units, pixels of the images. The tile in row r
    and column c begins at (c, r) times that.
    """
    rows, columns, side = tiles.shape[0], tiles.shape[1], max(tiles.shape[2:4])
    pitch = side + gap
    canvas = np.full((rows * pitch - gap, columns * pitch - gap, 3), 255, np.uint8)
    for r in range(rows):
        for c in range(columns):
            tile = tiles[r, c]
            canvas[r * pitch :, c * pitch :][: tile.shape[0], : tile.shape[1]] = tile
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes, pitch


def sheet(tiles: np.ndarray, names: list[str], texts: dict, title: str, file: IO[bytes]) -> None:
    """Images in columns of `names`: rows x columns x H x W x 3 of uint8.

    `texts`: what is written at the upper left of a tile, by its row and column.
    """
    with drawing(1.3 * tiles.shape[1] + 0.6, 1.3 * tiles.shape[0] + 0.6, file, title) as figure:
        axes, pitch = mosaic(figure, tiles, gap=max(1, tiles.shape[2] // 16))
        axes.set_xticks([pitch * c + tiles.shape[3] / 2 for c in range(len(names))], names)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        for (r, c), text in texts.items():
            axes.text(pitch * c, pitch * r, text, va="top", fontsize=6.5)


def neighbours(
    tiles: np.ndarray,
    similarity: np.ndarray,
    right: np.ndarray | None,
    names: Sequence[str],
    title: str,
    file: IO[bytes],
) -> None:
    """A query a row, and its nearest images in the bank, nearest first.

    `tiles`: rows x (1 + k) x H x W x 3 of uint8, the query first; `similarity`: rows x k, cosines;
    `right`: rows x k, whether a neighbour has the query's class, to be framed; None without labels.
    `names`: the queries' classes.
    """
    from matplotlib.patches import Patch, Rectangle

    rows, columns, side = tiles.shape[:3]
    drawn = drawable_names(dict.fromkeys(names))
    size = 0.85 * columns + 1, 0.85 * rows + 1
    with drawing(*size, file, title, drawn.values()) as figure:
        axes, pitch = mosaic(figure, tiles, gap=max(4, side * 5 // 16))
        look = {"fill": False, "edgecolor": GREEN, "linewidth": 3}
        for r in range(rows):
            for c in range(1, columns):
                corner = (c * pitch - 0.5, r * pitch - 0.5)
                if right is not None and right[r, c - 1]:
                    axes.add_patch(Rectangle(corner, side, side, clip_on=False, **look))
                x, y = corner[0] + side / 2, corner[1] + side * 1.04
                axes.text(x, y, f"{similarity[r, c - 1]:.3f}", ha="center", va="top", fontsize=7)
        ticks = [pitch * r + side / 2 for r in range(rows)]
        axes.set_yticks(ticks, [drawn[name] for name in names], parse_math=False)
        ticks = [side / 2, pitch * columns / 2]
        axes.set_xticks(ticks, ["query", "nearest in the bank, with cosine"])
        axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize="small")
        if right is not None:
            frame = Patch(**look, label="of the query's class")
            figure.legend(handles=[frame], loc="outside lower center", fontsize="small")


def embedding(
    features: np.ndarray,
    labels: Sequence[str] | None,
    classes: Sequence[str],
    title: str,
    file: IO[bytes],
) -> None:
    """t-SNE of M x d features, each point with the colour and shape of its class, if known.

    van der Maaten and Hinton 2008; perplexity 30, for few points less. `labels`: M, of `classes`.
    Up to 40 classes are named; more share colours and shapes, and have no names.
    """
    from sklearn.manifold import TSNE  # here, since it takes a second to import

    few = min(30, max(1, (len(features) - 1) / 3))
    # Not from the principal components: of a collapsed run these would be 0 / 0.
    points = np.zeros((len(features), 2))
    if len(features) > 1:
        points = TSNE(init="random", perplexity=few, random_state=0).fit_transform(features)
    drawn = drawable_names(classes if labels is not None and len(classes) <= 40 else ())
    columns = -(-len(drawn) // 20)
    widest = max(map(columns_of, drawn.values()), default=0)
    width = 6 + columns * (0.5 + 0.08 * widest)
    with drawing(width, 6, file, title, drawn.values()) as figure:
        axes = figure.subplots()
        size = 12 if len(points) > 300 else 25
        for i in range(1 if labels is None else len(classes)):
            those = points if labels is None else points[np.array(labels) == classes[i]]
            axes.scatter(
                *those.T,
                s=size,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                linewidths=0,
                alpha=0.8,
                label=in_legend(drawn[classes[i]]) if drawn else None,
            )
        axes.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", "datalim")
        if drawn:
            place = {"loc": "outside right center", "ncols": columns}
            figure.legend(**place, fontsize="small", markerscale=1.5)


def confusion(matrix: list[list[int]], classes: list[str], title: str, file: IO[bytes]) -> None:
    """A confusion matrix (rows: true class, columns: predicted) in shares of each row.

    Up to 40 classes are named, and of up to 20 the shares written.
    """
    shares = [[100 * cell / max(1, sum(row)) for cell in row] for row in matrix]
    drawn = drawable_names(classes if len(classes) <= 40 else ())  # more would lie on one another
    side = 3 + 0.36 * min(len(classes), 40)
    side += 0.08 * max(0, max(map(columns_of, drawn.values()), default=0) - 10)
    right, number = sum(row[i] for i, row in enumerate(matrix)), sum(map(sum, matrix))
    title = f"{title}\ntop-1 {100 * right / max(1, number):.2f} % of {number} images"
    with drawing(side + 1, side, file, title, drawn.values()) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
        figure.colorbar(image, label="% of the true class", shrink=0.8)
        axes.set(xlabel="predicted", ylabel="true")
        if drawn:
            names = [drawn[name] for name in classes]
            axes.set_xticks(range(len(classes)), names, rotation=90, parse_math=False)
            axes.set_yticks(range(len(classes)), names, parse_math=False)
        if len(classes) <= 20:
            for y, row in enumerate(shares):
                for x, share in enumerate(row):
                    look = {"color": "black" if share > 60 else "white", "fontsize": 7}
                    axes.text(x, y, f"{share:.0f}", ha="center", va="center", **look)


def ablation_curves(
    runs: dict[str, list[list[dict]]], shown: Sequence[str], title: str, file: IO[bytes]
) -> None:
    """Loss, std and kNN over the epochs as the paper's Fig. 2: lines are means, thin ones seeds.

    `runs`: by setting, statistics of one run a seed; `shown`: which settings.
    """
    columns = ("train_loss", "std", "test_acc@1")
    with drawing(11, 3.6, file, title) as figure:
        for axes, column in zip(figure.subplots(1, 3), columns, strict=True):
            for i, name in enumerate(shown):
                lines = [
                    [(row["epoch"], row[column]) for row in history if column in row]
                    for history in runs[name]
                ]
                for line in lines:
                    axes.plot(*zip(*line, strict=True), color=COLOURS[i], linewidth=0.6, alpha=0.6)
                mean = np.mean(np.array(lines, dtype=float), axis=0)
                look = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": LINES[i % 4]}
                axes.plot(*mean.T, **look, label=name)
            axes.set(xlabel="epoch", ylabel=PANELS[column])
            axes.xaxis.get_major_locator().set_params(integer=True)
            bare(axes)
            if column != "train_loss":
                axes.set_ylim(0, 1.1 if column == "std" else 102)
        place = {"loc": "outside lower center", "ncols": len(shown), "fontsize": 9}
        figure.legend(*axes.get_legend_handles_labels(), **place)


def ablations(rows: list[dict], title: str, file: IO[bytes]) -> None:
    """A bar of the last kNN a setting, the first of which is the default.

    `rows`: of studies.ablate's table. Bars, and the numbers at their feet, are means; dots seeds.
    """
    runs = {}
    for row in rows:
        runs.setdefault(row["setting"], []).append(row["knn"])
    untrained = np.mean([row["untrained_knn"] for row in rows])
    with drawing(11, 4.2, file, title) as figure:
        axes = figure.subplots()
        for x, knn in enumerate(runs.values()):
            axes.bar(x, np.mean(knn), color=GREEN if x == 0 else "#56B4E9", width=0.7)
            axes.plot([x] * len(knn), knn, "k.", markersize=5)
            axes.text(x, 1.5, f"{np.mean(knn):.1f}", ha="center", fontsize=8)
        label = f"untrained {untrained:.1f}"
        line = axes.axhline(untrained, color=VERMILION, linestyle="--", label=label)
        axes.set(ylabel="kNN top-1 (%)", ylim=(0, 102), xlim=(-0.6, len(runs) - 0.4))
        axes.set_xticks(range(len(runs)), runs, rotation=40, ha="right", rotation_mode="anchor")
        bare(axes)
        figure.legend(handles=[line], loc="outside upper right", fontsize=9)


def rank_and_knn(rows: list[dict], file: IO[bytes]) -> None:
    """Effective rank against kNN at the end of runs, a panel a data set, with Spearman's rho.

    `rows`: of studies.ablate's table. Runs that were warned of a collapse are hollow triangles; rho
    is that of all runs, and of the others alone.
    """
    from scipy.stats import spearmanr

    names = list(dict.fromkeys(row["data"] for row in rows))
    with drawing(5 * len(names), 4.4, file, names=names) as figure:
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            those = [row for row in rows if row["data"] == name]
            rank, knn = (np.array([row[key] for row in those], float) for key in ("rank", "knn"))
            warned = np.array(["warned_at_step" in row for row in those])
            axes.plot(rank[~warned], knn[~warned], "o", color=BLUE, alpha=0.8, label="no warning")
            hollow = {"color": VERMILION, "fillstyle": "none", "label": "warned"}
            axes.plot(rank[warned], knn[warned], "^", **hollow)
            untrained = those[0]["untrained_rank"], those[0]["untrained_knn"]
            axes.plot(*untrained, "*", color="black", markersize=11, label="untrained")
            rho = [spearmanr(rank[some], knn[some]).statistic for some in (warned | True, ~warned)]
            axes.set(xlabel="effective rank of the features", ylabel="kNN top-1 (%)")
            axes.set_title(
                f"{drawable(name, 34)}: {len(those)} runs, Spearman's ρ {rho[0]:.2f}\n"
                f"({sum(~warned)} without a warning: ρ {rho[1]:.2f})",
                fontsize="medium",
                parse_math=False,
            )
            bare(axes)
        place = {"loc": "outside lower center", "ncols": 3, "fontsize": "small"}
        figure.legend(*axes.get_legend_handles_labels(), **place)


def learning(runs: dict[str, list[list[list[float]]]], title: str, file: IO[bytes]) -> None:
    """The kNN's top-1 over the minutes of training, a colour a recipe.

    `runs`: by recipe, for each run its points, minutes and accuracy. The legend has the best of the
    last ones.
    """
    with drawing(9, 5, file, title, runs) as figure:
        axes, lines = figure.subplots(), []
        for i, curves in enumerate(runs.values()):
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            look |= {"linestyle": LINES[i % 4], "markersize": 4}
            for points in curves:
                (line,) = axes.plot(*zip(*points, strict=True), **look)
            lines.append(line)
        axes.set(xlabel="minutes of training", ylabel="kNN top-1 on test images (%)")
        axes.set_xscale("log", subs=(2, 3, 5))  # the first minutes matter as the hours do
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        bare(axes)
        best = {name: max(points[-1][1] for points in curves) for name, curves in runs.items()}
        labels = [drawable(f"{name}: {top1:.1f} % at the end", 60) for name, top1 in best.items()]
        place = {"loc": "outside lower center", "ncols": 1 + (len(runs) > 3), "fontsize": 9}
        figure.legend(lines, labels, **place)


def worth(methods: dict[str, dict[int, list[float]]], title: str, file: IO[bytes]) -> None:
    """Accuracy against the number of labels, a colour a method: means, and the seeds' spread.

    `methods`: by name, by the number of labels, the top-1 of each seed in percent.
    """
    with drawing(9, 5, file, title, methods) as figure:
        axes, lines = figure.subplots(), []
        for i, points in enumerate(methods.values()):
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            means = [np.mean(found) for found in points.values()]
            (line,) = axes.plot(list(points), means, **look, linestyle=LINES[i % 4], markersize=5)
            least, most = (list(map(of, points.values())) for of in (min, max))
            axes.fill_between(list(points), least, most, color=look["color"], alpha=0.15, lw=0)
            lines.append(line)
        axes.set(xlabel="labels", ylabel="top-1 on test images (%)", xscale="log")
        numbers = sorted({number for points in methods.values() for number in points})
        axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
        axes.minorticks_off()
        bare(axes)
        names = [drawable(name, 40) for name in methods]
        figure.legend(lines, names, loc="outside right upper", fontsize=9)
