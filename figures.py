"""What people look at: pictures of a run."""

from typing import IO


def curves(history: list[dict], title: str, file: IO[bytes]) -> None:
    """Loss, kNN accuracy, std and rank over the epochs, as a PNG.

    `history` has the rows of the statistics CSV; row 0 is the untrained encoder, and may have the
    kNN accuracy on raw pixels under `raw_acc@1`. What no row has (no labels) gets no panel.
    """
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    panels = [
        ("train_loss", "loss (−1: views identical)"),
        ("test_acc@1", "kNN top-1 (%)"),
        ("std", "std of z · √d (0: collapsed)"),
        ("rank", "effective rank of the features"),
    ]
    panels = [panel for panel in panels if any(row.get(panel[0]) is not None for row in history)]
    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    for axes, (column, label) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        points = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
        axes.plot(
            *zip(*points, strict=True), color="#0072B2", marker="." if len(points) < 50 else ""
        )
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if column == "test_acc@1":
            axes.set_ylim(0, 100)
            for value, name, color in (
                (history[0].get(column), "untrained encoder", "#D55E00"),
                (history[0].get("raw_acc@1"), "raw pixels", "#009E73"),
            ):
                if value is not None:
                    axes.axhline(value, color=color, linestyle="--", label=f"{name} {value:.1f}")
            axes.legend(loc="best", fontsize="small")
        elif column == "std":
            axes.set_ylim(0, 1.1)
    figure.suptitle(title, fontsize="medium", parse_math=False)  # a name may have a $
    figure.savefig(file, format="png", dpi=110)


def confusion(matrix: list[list[int]], classes: list[str], title: str, file: IO[bytes]) -> None:
    """A confusion matrix (rows: true class, columns: predicted) in shares of each row, as a PNG."""
    from matplotlib.figure import Figure

    shares = [[100 * cell / max(1, sum(row)) for cell in row] for row in matrix]
    side = 3 + 0.36 * min(len(classes), 40)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(classes) <= 40:  # more names or numbers would lie on one another
        axes.set_xticks(range(len(classes)), classes, rotation=90, parse_math=False)
        axes.set_yticks(range(len(classes)), classes, parse_math=False)
    if len(classes) <= 20:
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                color = "black" if share > 60 else "white"
                axes.text(x, y, f"{share:.0f}", ha="center", va="center", color=color, fontsize=7)
    figure.savefig(file, format="png", dpi=110)
