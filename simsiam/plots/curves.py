"""Figures of numbers: curves, t-SNE embedding, confusion matrix, accuracy by number of labels."""

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

import numpy as np

from simsiam.plots.style import (
    COLOURS,
    GREEN,
    LINES,
    MARKERS,
    VERMILION,
    add_grid,
    fit_names,
    fit_text,
    legend_label,
    line_style,
    new_figure,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Columns of the statistics that have a panel, and the labels of their axes.
PANELS = {
    "train_loss": "training loss",
    "test_acc@1": "top-1 on test images (%)",
    "train_acc@1": "top-1 in training (%)",
    "std": "std of z · √d (0: collapsed)",
    "rank": "effective rank of the features",
}
MAX_NAMED_CLASSES = 40  # names of more classes would overlap


def plot_curves(runs: dict[str, list[dict]], file: IO[bytes], format: str = "png") -> None:
    """Plot loss, accuracy, std and rank over the epochs, of one run or of several for comparison.

    `runs`: by name, the rows of the statistics CSV. Row 0 of a pre-training is the untrained
    encoder, and may have the kNN accuracy on raw pixels under `raw_acc@1`; for a single run both
    are drawn as lines. Panels without values (no labels) are left out. `format`: one of FORMATS.
    """
    rows = [row for history in runs.values() for row in history]
    panels = [name for name in PANELS if any(row.get(name) is not None for row in rows)]
    several = len(runs) > 1
    last = max(row["epoch"] for row in rows)  # all panels show the same epochs
    width = 3.7 * max(1, len(panels))
    names = fit_names(runs, int(9 * width))
    title = "" if several else next(iter(runs))
    # The legend is below the panels, where it covers no curve.
    widest = max(map(text_width, names.values())) if several else len("untrained encoder 99.9")
    columns = max(1, min(3, int(width / (0.08 * widest + 0.6))))
    height = 3.2 + 0.22 * -(-len(names) // columns)
    with new_figure(width, height, file, title, format) as figure:
        figure.get_layout_engine().set(w_pad=0.12)
        handles = []
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, column in zip(all_axes, panels, strict=True):
            lines = [
                plot_run(axes, i, history, column, names[name])
                for i, (name, history) in enumerate(runs.items())
            ]
            axes.set(xlabel="epoch", ylabel=PANELS[column], xlim=(-0.04 * last, 1.04 * last))
            axes.xaxis.get_major_locator().set_params(integer=True)
            add_grid(axes)
            if column.endswith("acc@1"):
                axes.set_ylim(0, 102)  # keeps a line at 100 off the border
            elif column == "std":
                axes.set_ylim(0, max(1.1, 1.05 * max(row.get("std", 0) for row in rows)))
            if several:
                handles = lines
            elif column == "test_acc@1":
                handles = plot_baselines(axes, rows[0])
        if handles:
            figure.legend(
                handles=handles, loc="outside lower center", ncols=columns, fontsize="small"
            )


def plot_run(axes: "Axes", i: int, history: list[dict], column: str, name: str) -> "Line2D":
    """Plot a column of the i-th run's statistics, at the epochs that have a value."""
    points = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
    (line,) = axes.plot(
        *(zip(*points, strict=True) if points else ((), ())),
        color=COLOURS[i % len(COLOURS)],
        linestyle=LINES[i // len(COLOURS) % len(LINES)],
        marker="." if len(points) < 50 else "",
        label=legend_label(name),
    )
    return line


def plot_baselines(axes: "Axes", start: dict) -> "list[Line2D]":
    """Plot horizontal lines at the accuracies before training, from the first row."""
    untrained = start.get("test_acc@1") if start["epoch"] == 0 else None
    baselines = (
        (untrained, "untrained encoder", VERMILION, "--"),
        (start.get("raw_acc@1"), "raw pixels", GREEN, ":"),
    )
    return [
        axes.axhline(value, color=colour, linestyle=style, label=f"{name} {value:.1f}")
        for value, name, colour, style in baselines
        if value is not None
    ]


def plot_embedding(
    features: np.ndarray,
    labels: Sequence[str] | None,
    classes: Sequence[str],
    title: str,
    file: IO[bytes],
) -> None:
    """Plot the t-SNE embedding of features, with a colour and shape for each class.

    van der Maaten and Hinton 2008; perplexity 30, or less for few points. `features`: M x d;
    `labels`: M names of `classes`, or None. With more than MAX_NAMED_CLASSES, classes share colours
    and shapes, and there is no legend.
    """
    from sklearn.manifold import TSNE  # takes a second to import

    perplexity = min(30, max(1, (len(features) - 1) / 3))
    points = np.zeros((len(features), 2))
    if len(features) > 1:
        # The principal components would be 0 / 0 for a collapsed run: start at random.
        tsne = TSNE(init="random", perplexity=perplexity, random_state=0)
        points = tsne.fit_transform(features)
    has_legend = labels is not None and len(classes) <= MAX_NAMED_CLASSES
    names = fit_names(classes if has_legend else ())
    columns = -(-len(names) // 20)
    width = 6 + columns * (0.5 + 0.08 * max(map(text_width, names.values()), default=0))
    with new_figure(width, 6, file, title) as figure:
        axes = figure.subplots()
        size = 12 if len(points) > 300 else 25
        for i in range(1 if labels is None else len(classes)):
            of_class = points if labels is None else points[np.array(labels) == classes[i]]
            axes.scatter(
                *of_class.T,
                s=size,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                linewidths=0,
                alpha=0.8,
                label=legend_label(names[classes[i]]) if names else None,
            )
        axes.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
        axes.set_aspect("equal", "datalim")
        if names:
            figure.legend(
                loc="outside right center", ncols=columns, fontsize="small", markerscale=1.5
            )


def plot_confusion(
    matrix: list[list[int]], classes: Sequence[str], title: str, file: IO[bytes]
) -> None:
    """Plot a confusion matrix (rows: true class, columns: predicted) in percent of each row.

    Up to MAX_NAMED_CLASSES are named, and the numbers of up to 20 written.
    """
    shares = [[100 * cell / max(1, sum(row)) for cell in row] for row in matrix]
    names = fit_names(classes if len(classes) <= MAX_NAMED_CLASSES else ())
    side = 3 + 0.36 * min(len(classes), MAX_NAMED_CLASSES)
    side += 0.08 * max(0, max(map(text_width, names.values()), default=0) - 10)
    correct, total = sum(row[i] for i, row in enumerate(matrix)), sum(map(sum, matrix))
    title = f"{title}\ntop-1 {100 * correct / max(1, total):.2f} % of {total} images"
    with new_figure(side + 1, side, file, title) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
        figure.colorbar(image, label="% of the true class", shrink=0.8)
        axes.set(xlabel="predicted", ylabel="true")
        if names:
            texts = [names[name] for name in classes]
            axes.set_xticks(range(len(classes)), texts, rotation=90, parse_math=False)
            axes.set_yticks(range(len(classes)), texts, parse_math=False)
        if len(classes) <= 20:
            for y, row in enumerate(shares):
                for x, share in enumerate(row):
                    colour = "black" if share > 60 else "white"
                    place = {"ha": "center", "va": "center", "fontsize": 7}
                    axes.text(x, y, f"{share:.0f}", color=colour, **place)


def plot_worth(methods: dict[str, dict[int, list[float]]], title: str, file: IO[bytes]) -> None:
    """Plot accuracy over the number of labels for each method: the seeds' mean and range.

    `methods`: by name, then by number of labels, the top-1 of each seed in percent.
    """
    with new_figure(9, 5, file, title) as figure:
        axes, lines = figure.subplots(), []
        for i, points in enumerate(methods.values()):
            labels, means = list(points), [np.mean(top1) for top1 in points.values()]
            (line,) = axes.plot(labels, means, **line_style(i), markersize=5)
            lines.append(line)
            lowest, highest = (list(map(bound, points.values())) for bound in (min, max))
            axes.fill_between(labels, lowest, highest, color=line.get_color(), alpha=0.15, lw=0)
        axes.set(xlabel="labels", ylabel="top-1 on test images (%)", xscale="log")
        numbers = sorted({number for points in methods.values() for number in points})
        axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
        axes.minorticks_off()
        add_grid(axes)
        names = [legend_label(fit_text(name, 40)) for name in methods]
        figure.legend(lines, names, loc="outside right upper", fontsize=9)
