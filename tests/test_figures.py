"""Figures show the right values and labels, and no text lies on another or outside the figure."""

import io
import itertools
import warnings

import matplotlib.figure
import matplotlib.text
import numpy as np
import pytest
import torch
from matplotlib.legend import Legend
from PIL import Image

from simsiam.plots import style
from simsiam.plots.curves import plot_confusion, plot_curves, plot_embedding, plot_worth
from simsiam.plots.run import Board
from simsiam.plots.sheets import plot_captions, plot_neighbours, plot_views
from studies import figures


@pytest.fixture
def draw(monkeypatch):
    """A function that plots, checks the picture, and returns its matplotlib Figure.

    No text is outside or on another text, no legend is on a panel, and nothing warns.
    """
    saved, texts, legends = [], {}, {}
    save, draw_text = matplotlib.figure.Figure.savefig, matplotlib.text.Text.draw
    draw_legend = Legend.draw

    def record_text(self, renderer):
        if self.get_visible() and self.get_text().strip():
            texts[self] = self.get_text(), self.get_window_extent(renderer)
        draw_text(self, renderer)

    def record_legend(self, renderer):
        panels = [axes.get_window_extent(renderer) for axes in self.get_figure(root=True).axes]
        legends[self] = self.get_window_extent(renderer), panels
        draw_legend(self, renderer)

    def record_figure(self, file, **options):
        texts.clear()  # the layout was tried before
        legends.clear()
        save(self, file, **options)
        saved.append((self, options["dpi"]))

    monkeypatch.setattr(matplotlib.text.Text, "draw", record_text)
    monkeypatch.setattr(Legend, "draw", record_legend)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", record_figure)

    def draw(plot, *args):
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plot(*args, file)
        figure, dpi = saved.pop()
        figure.pixels = np.asarray(Image.open(file).convert("RGB"))
        width, height = figure.get_size_inches() * dpi
        for text, box in texts.values():
            assert -1 <= box.x0 <= box.x1 <= width + 1, text
            assert -1 <= box.y0 <= box.y1 <= height + 1, text
        for (a, one), (b, other) in itertools.combinations(texts.values(), 2):
            # Letters may touch by a pixel; a box has room above and below its letters.
            wide = min(one.x1, other.x1) - max(one.x0, other.x0)
            tall = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert wide <= 1 or tall <= 2, (a, b)
        for box, panels in legends.values():
            assert not any(box.overlaps(panel) for panel in panels)
        return figure

    return draw


def texts_of(items):
    return [item.get_text() for item in items]


def random_tiles(rows, columns):
    shape = (rows, columns, 32, 32, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def history(epochs, labelled=True):
    """Rows of a statistics table."""
    rows = [{"epoch": 0, "rank": 6.3, "test_acc@1": 29.6, "raw_acc@1": 41.4}]
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "train_loss": -1 + 1 / epoch, "std": 0.99, "rank": 6 + epoch / 100}
        rows.append(row | {"test_acc@1": 100 - 60 / epoch})
    return [{name: row[name] for name in row if labelled or "acc" not in name} for row in rows]


# ---- curves -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "labelled"), [(20, False), (800, True)])
def test_curves(draw, epochs, labelled):
    rows = history(epochs, labelled)
    figure = draw(plot_curves, {"a $strange$ name": rows})
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert ("top-1 on test images (%)" in panels) == labelled
    assert {"std of z · √d (0: collapsed)", "effective rank of the features"} <= panels.keys()
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    line = panels["training loss"].lines[0]
    assert line.get_xdata().tolist() == list(range(1, epochs + 1))
    assert line.get_ydata().tolist() == [row["train_loss"] for row in rows[1:]]
    legend = texts_of(figure.legends[0].get_texts()) if figure.legends else []
    assert legend == (["untrained encoder 29.6", "raw pixels 41.4"] if labelled else [])


def test_curves_of_several_runs(draw):
    runs = {f"a run with a longer name, the number {i}": history(5 + i) for i in range(12)}
    figure = draw(plot_curves, runs)
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 12  # more than there are colours
    assert texts_of(figure.legends[0].get_texts()) == list(runs)


# ---- embedding, confusion, worth ----------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 40, None])
def test_embedding(draw, classes):
    rng = np.random.default_rng(0)
    names = [f"class number {i}" for i in range(classes or 3)]
    labels = np.arange(82) % classes if classes else None
    features = rng.normal(size=(82, 8)) * 0.1
    if classes == 2:
        features[:, 0] += 10 * labels
    words = [names[i] for i in labels] if classes else None
    figure = draw(plot_embedding, features.astype(np.float32), words, names, "title")
    clouds = [points.get_offsets() for points in figure.axes[0].collections]
    assert sum(map(len, clouds)) == 82
    legend = texts_of(figure.legends[0].get_texts()) if figure.legends else []
    assert legend == (names if classes in (2, 40) else [])
    if classes == 2:  # distant classes stay distant
        distance = np.linalg.norm(clouds[0].mean(0) - clouds[1].mean(0))
        assert distance > 2 * max(cloud.std(0).max() for cloud in clouds)
    if classes == 40:
        looks = {
            (tuple(points.get_facecolor()[0]), points.get_paths()[0].vertices.tobytes())
            for points in figure.axes[0].collections
        }
        assert len(looks) == 40


@pytest.mark.parametrize("number", [1, 5])
def test_embedding_of_few_or_equal_images(draw, number):
    draw(plot_embedding, np.ones((number, 4), np.float32), None, [], "collapsed")


@pytest.mark.parametrize("classes", [10, 41])
def test_confusion(draw, classes):
    matrix = np.full((classes, classes), 1) + 98 * np.eye(classes, dtype=int)
    names = [f"class number {i}" for i in range(classes)]
    figure = draw(plot_confusion, matrix.tolist(), names, "a_run")
    axes = figure.axes[0]
    assert ("class number 1" in texts_of(axes.get_yticklabels())) == (classes <= 40)
    share = 100 * 99 / (98 + classes)
    assert f"top-1 {share:.2f} % of {classes * (98 + classes)} images" in figure.get_suptitle()
    cells = texts_of(axes.texts)
    assert len(cells) == (classes**2 if classes <= 20 else 0)
    if cells:
        assert cells[: classes + 1 : classes + 1] == [f"{share:.0f}"]


def test_worth(draw):
    methods = {"linear": {100: [50.0, 60.0], 1000: [70.0]}, "_$scratch$": {100: [20.0, 22.0]}}
    (axes,) = (figure := draw(plot_worth, methods, "title")).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[55, 70], [21]]
    assert texts_of(axes.get_xticklabels()) == ["100", "1,000"]
    assert texts_of(figure.legends[0].get_texts()) == ["linear", r" _\$scratch\$"]


# ---- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
def test_neighbours(draw, labelled):
    rng, tiles = np.random.default_rng(0), random_tiles(8, 9)
    is_same, cosines = rng.random((8, 8)) < 0.5, rng.random((8, 8))
    names = ["a class"] * 8
    figure = draw(plot_neighbours, tiles, cosines, is_same if labelled else None, names, "title")
    axes = figure.axes[0]
    assert texts_of(axes.texts) == [f"{cosine:.3f}" for cosine in cosines.flat]
    canvas, framed = axes.images[0].get_array(), np.zeros((8, 8), bool)
    for patch in axes.patches:  # a frame is around a neighbour, never around a query
        x, y = (round(corner + 0.5) for corner in patch.get_xy())
        r, c = y // 42, x // 42
        framed[r, c - 1] = True
        assert (canvas[y : y + 32, x : x + 32] == tiles[r, c]).all()
    assert (framed == (is_same & labelled)).all()


def test_views(draw):
    texts = {(0, 1): "crop 71%: 29 x 25\nhue +0.05", (7, 2): "gray"}
    names = ["image", "view 1", "view 2"]
    figure = draw(plot_views, random_tiles(8, 3), names, texts, "a long name: what is seen of it")
    positions = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert positions == {texts[0, 1]: (34, 0), "gray": (68, 238)}  # 32 pixels, and a gap of 2
    assert texts_of(figure.axes[0].get_xticklabels()) == names


def test_captions(draw):
    has_frame = np.array([[True, False], [False, False]])
    captions = [[("query", "a.png"), ("0.912", "x" * 40)], [("$a_b$",), ()]]
    axes = draw(plot_captions, random_tiles(2, 2), captions, has_frame, "title").axes[0]
    assert [patch.get_xy() for patch in axes.patches] == [(-0.5, -0.5)]
    shown = texts_of(axes.texts)
    assert shown[0] == "query\na.png"
    assert shown[1].startswith("0.912\nxxx")
    assert "…" in shown[1]
    assert shown[2:] == ["$a_b$", ""]


# ---- studies ------------------------------------------------------------------------------------


def test_ablations(draw):
    names = ["default", "stop_grad off", "a setting with a longer name: 4"]
    rows = [{"setting": name, "knn": 88.0, "untrained_knn": 29.6} for name in names * 2]
    rows[3]["knn"] = 60.0
    figure = draw(figures.plot_ablations, rows, "data: what it shows")
    (axes,) = figure.axes
    assert [round(bar.get_height(), 3) for bar in axes.patches] == [74, 88, 88]
    assert texts_of(axes.get_xticklabels()) == names
    assert texts_of(axes.texts) == ["74.0", "88.0", "88.0"]
    assert texts_of(figure.legends[0].get_texts()) == ["untrained 29.6"]


def test_ablation_curves(draw):
    names = ["default", "stop_grad off"]
    runs = {name: [history(5), history(5)] for name in (*names, "not shown")}
    runs["default"][1][-1]["test_acc@1"] = 60.0
    figure = draw(figures.plot_ablation_curves, runs, names, "data: what it shows")
    assert [len(axes.lines) for axes in figure.axes] == [2 * (2 + 1)] * 3  # seeds, and their mean
    mean = figure.axes[2].lines[2]
    assert mean.get_label() == "default"
    assert mean.get_ydata()[-1] == (88 + 60) / 2


def test_rank_and_knn(draw):
    """The run with a warning spoils the order: rho is 1 without it."""
    start = {"data": "textures", "untrained_rank": 6, "untrained_knn": 30}
    rows = [start | {"rank": rank, "knn": 10 * rank} for rank in (4, 5, 6, 7)]
    rows.append(start | {"rank": 2, "knn": 90, "warned_at_step": 25})
    rows += [row | {"data": "others", "knn": row["knn"] / 2} for row in rows]
    figure = draw(figures.plot_rank_and_knn, rows)
    assert len(figure.axes) == 2
    for axes, name in zip(figure.axes, ("textures", "others"), strict=True):
        # Of ranks 1..5 by rank, those by knn are 5 1 2 3 4: rho = 1 - 6 (16 + 4 * 1) / 120 = 0.
        assert axes.get_title().startswith(f"{name}: 5 runs, Spearman's ρ 0.00")
        assert "(4 without a warning: ρ 1.00)" in axes.get_title()
        assert [len(line.get_xdata()) for line in axes.lines] == [4, 1, 1]


def test_learning(draw):
    recipes = {"short": [[(1, 30.0), (4, 50.0)], [(1, 31.0), (5, 52.0)]], "fast": [[(2, 60.0)]]}
    figure = draw(figures.plot_learning, recipes, "title")
    assert len(figure.axes[0].lines) == 3
    legend = texts_of(figure.legends[0].get_texts())
    assert legend == ["short: 52.0 % at the end", "fast: 60.0 % at the end"]


# ---- names --------------------------------------------------------------------------------------


def test_an_installed_font_draws_what_the_default_font_lacks(draw, monkeypatch):
    """Without one a character is a box, and nothing warns. matplotlib ships STIXGeneral."""
    monkeypatch.setattr(style, "FALLBACK_FONTS", ())
    box, latin = (draw(plot_curves, {name: history(1)}).pixels for name in ("ℊ", "cat"))
    monkeypatch.setattr(style, "FALLBACK_FONTS", ("not installed", "STIXGeneral"))
    assert (draw(plot_curves, {"ℊ": history(1)}).pixels != box).any()
    assert (draw(plot_curves, {"cat": history(1)}).pixels == latin).all()


CLASSES = ["猫", "a\nb", "bytes \udcff", "_hidden", "$5$", "long_" * 20 + "a", "long_" * 20 + "b"]
CLASSES += ["x" * 50 + middle + "y" * 50 for middle in "ab"]  # alike without their middle
TEXTS = ["猫", "a\\nb", "bytes \\udcff", "_hidden", "$5$", "long_long_lo…long_long_a"]
TEXTS += ["long_long_lo…long_long_b", *(f"xxxxxxxxxxxx…yyyyyyyyyyy ({i})" for i in (8, 9))]


def test_names_of_any_script_and_length(draw):
    """Control characters are escaped, long names lose their middle, and all stay distinct."""
    title = "運" * 300
    figure = draw(plot_confusion, np.eye(9, dtype=int).tolist(), CLASSES, title)
    assert texts_of(figure.axes[0].get_yticklabels()) == TEXTS
    features = np.random.default_rng(0).normal(size=(18, 4)).astype(np.float32)
    figure = draw(plot_embedding, features, CLASSES * 2, CLASSES, title)
    legend = texts_of(figure.legends[0].get_texts())
    assert [text.strip().replace(r"\$", "$") for text in legend] == TEXTS
    draw(plot_neighbours, random_tiles(8, 9), np.ones((8, 8)), None, CLASSES[1:], title)
    draw(plot_curves, {name: history(5) for name in ("_a", *CLASSES)})
    draw(plot_curves, {name: history(5, labelled=False) for name in (title, "y" * 240)})


def test_tensorboard_gets_a_line_per_name(tmp_path):
    board = Board(str(tmp_path), [], ())
    images = [torch.zeros(3, 3, 8, 8, dtype=torch.uint8)]
    board.add_features(torch.eye(3), ["a\nb", "bytes \udcff", "猫"], images, 1)
    board.close()
    (table,) = tmp_path.rglob("metadata.tsv")
    assert table.read_text(encoding="utf-8").splitlines() == [r"a\nb", r"bytes \udcff", "猫"]
