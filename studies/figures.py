"""Figures of the studies: ablations, effective rank and kNN, and learning over the minutes."""

from collections.abc import Sequence
from typing import IO

import numpy as np

from simsiam.plots.curves import PANELS
from simsiam.plots.style import (
    BLUE,
    COLOURS,
    GREEN,
    SKY_BLUE,
    VERMILION,
    add_grid,
    fit_text,
    legend_label,
    line_style,
    new_figure,
)


def plot_ablation_curves(
    runs: dict[str, list[list[dict]]], settings: Sequence[str], title: str, file: IO[bytes]
) -> None:
    """Plot loss, std and kNN over the epochs as the paper's Fig. 2: means, and thin lines of seeds.

    `runs`: by setting, the statistics of a run per seed; `settings`: those to show.
    """
    with new_figure(11, 3.6, file, title) as figure:
        columns = ("train_loss", "std", "test_acc@1")
        for axes, column in zip(figure.subplots(1, 3), columns, strict=True):
            for i, setting in enumerate(settings):
                lines = [
                    [(row["epoch"], row[column]) for row in history if column in row]
                    for history in runs[setting]
                ]
                for line in lines:
                    axes.plot(*zip(*line, strict=True), color=COLOURS[i], linewidth=0.6, alpha=0.6)
                mean = np.mean(np.array(lines, dtype=float), axis=0)
                axes.plot(*mean.T, **line_style(i), label=setting)
            axes.set(xlabel="epoch", ylabel=PANELS[column])
            axes.xaxis.get_major_locator().set_params(integer=True)
            add_grid(axes)
            if column != "train_loss":
                axes.set_ylim(0, 1.1 if column == "std" else 102)
        place = {"loc": "outside lower center", "ncols": len(settings), "fontsize": 9}
        figure.legend(*axes.get_legend_handles_labels(), **place)


def plot_ablations(rows: list[dict], title: str, file: IO[bytes]) -> None:
    """Plot a bar per setting of the kNN at the end of the runs; the first setting is the default.

    `rows`: the table of studies.ablate. Bars, and the numbers at their feet, are means over seeds;
    dots are seeds.
    """
    settings = {}
    for row in rows:
        settings.setdefault(row["setting"], []).append(row["knn"])
    untrained = np.mean([row["untrained_knn"] for row in rows])
    with new_figure(11, 4.2, file, title) as figure:
        axes = figure.subplots()
        for x, knn in enumerate(settings.values()):
            axes.bar(x, np.mean(knn), color=GREEN if x == 0 else SKY_BLUE, width=0.7)
            axes.plot([x] * len(knn), knn, "k.", markersize=5)
            axes.text(x, 1.5, f"{np.mean(knn):.1f}", ha="center", fontsize=8)
        label = f"untrained {untrained:.1f}"
        line = axes.axhline(untrained, color=VERMILION, linestyle="--", label=label)
        axes.set(ylabel="kNN top-1 (%)", ylim=(0, 102), xlim=(-0.6, len(settings) - 0.4))
        rotation = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(settings)), settings, **rotation)
        add_grid(axes)
        figure.legend(handles=[line], loc="outside upper right", fontsize=9)


def plot_rank_and_knn(rows: list[dict], file: IO[bytes]) -> None:
    """Plot the kNN over the effective rank at the end of runs, with Spearman's rho, per data set.

    `rows`: the table of studies.ablate. Runs with a collapse warning are hollow triangles; rho is
    that of all runs, and of those without a warning.
    """
    from scipy.stats import spearmanr

    data = list(dict.fromkeys(row["data"] for row in rows))
    with new_figure(5 * len(data), 4.4, file) as figure:
        for axes, name in zip(figure.subplots(1, len(data), squeeze=False)[0], data, strict=True):
            runs = [row for row in rows if row["data"] == name]
            rank, knn = (np.array([row[key] for row in runs], float) for key in ("rank", "knn"))
            warned = np.array(["warned_at_step" in row for row in runs])
            axes.plot(rank[~warned], knn[~warned], "o", color=BLUE, alpha=0.8, label="no warning")
            hollow = {"color": VERMILION, "fillstyle": "none", "label": "warned"}
            axes.plot(rank[warned], knn[warned], "^", **hollow)
            untrained = runs[0]["untrained_rank"], runs[0]["untrained_knn"]
            axes.plot(*untrained, "*", color="black", markersize=11, label="untrained")
            rho, rho_healthy = (
                spearmanr(rank[some], knn[some]).statistic for some in (warned | True, ~warned)
            )
            axes.set(xlabel="effective rank of the features", ylabel="kNN top-1 (%)")
            axes.set_title(
                f"{fit_text(name, 34)}: {len(runs)} runs, Spearman's ρ {rho:.2f}\n"
                f"({sum(~warned)} without a warning: ρ {rho_healthy:.2f})",
                fontsize="medium",
                parse_math=False,
            )
            add_grid(axes)
        place = {"loc": "outside lower center", "ncols": 3, "fontsize": "small"}
        figure.legend(*axes.get_legend_handles_labels(), **place)


def plot_learning(
    recipes: dict[str, list[list[tuple[float, float]]]], title: str, file: IO[bytes]
) -> None:
    """Plot the kNN top-1 over the minutes of training, in a colour per recipe.

    `recipes`: by name, the points (minutes, top-1) of each run. The legend has the highest top-1 at
    the end of a run.
    """
    with new_figure(9, 5, file, title) as figure:
        axes, handles, labels = figure.subplots(), [], []
        for i, (name, runs) in enumerate(recipes.items()):
            for points in runs:
                (line,) = axes.plot(*zip(*points, strict=True), **line_style(i), markersize=4)
            top1 = max(points[-1][1] for points in runs)
            handles.append(line)
            labels.append(legend_label(fit_text(f"{name}: {top1:.1f} % at the end", 60)))
        axes.set(xlabel="minutes of training", ylabel="kNN top-1 on test images (%)")
        axes.set_xscale("log", subs=(2, 3, 5))  # the first minutes matter as much as the hours
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        add_grid(axes)
        place = {"loc": "outside lower center", "ncols": 1 + (len(recipes) > 3), "fontsize": 9}
        figure.legend(handles, labels, **place)
