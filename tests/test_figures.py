"""The pictures: nothing lies on anything else, for few and many classes, epochs and images."""

import io
import itertools
import warnings

import matplotlib.figure
import matplotlib.text
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from matplotlib.legend import Legend
from PIL import Image

from simsiam.plots import curves as figures
from simsiam.plots.lettering import columns_of, drawable, drawable_names
from simsiam.plots.run import Board


@pytest.fixture
def drawn(monkeypatch):
    """Draw, and the Figure back, of which nothing is outside and no two texts overlap.

    No legend lies on a panel, and matplotlib warns of nothing.
    """
    # The layout is tried before it is drawn: the last place counts.
    saved, texts, legends = [], {}, {}
    save, write = matplotlib.figure.Figure.savefig, matplotlib.text.Text.draw
    write_legend = Legend.draw

    def draw_text(self, renderer):
        if self.get_visible() and self.get_text().strip():
            texts[self] = self.get_text(), self.get_window_extent(renderer)
        write(self, renderer)

    def draw_legend(self, renderer):
        panels = [axes.get_window_extent(renderer) for axes in self.get_figure(root=True).axes]
        legends[self] = self.get_window_extent(renderer), panels
        write_legend(self, renderer)

    def savefig(self, file, **how):
        texts.clear()
        legends.clear()
        save(self, file, **how)
        saved.append((self, how["dpi"]))

    monkeypatch.setattr(matplotlib.text.Text, "draw", draw_text)
    monkeypatch.setattr(Legend, "draw", draw_legend)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)

    def draw(function, *args):
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            function(*args, file)
        figure, dpi = saved.pop()
        assert np.asarray(Image.open(file).convert("RGB")).std() > 5
        width, height = figure.get_size_inches() * dpi
        for text, box in texts.values():
            assert -1 <= box.x0 <= box.x1 <= width + 1, text
            assert -1 <= box.y0 <= box.y1 <= height + 1, text
        for (a, one), (b, other) in itertools.combinations(texts.values(), 2):
            # Letters may touch by a pixel; boxes hold the room above and below them too.
            wide = min(one.x1, other.x1) - max(one.x0, other.x0)
            tall = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert wide <= 1 or tall <= 2, (a, b)
        for box, panels in legends.values():
            assert not any(box.overlaps(panel) for panel in panels)
        return figure

    return draw


def history(epochs, labelled=True):
    """Rows of a statistics table."""
    rows = [{"epoch": 0, "rank": 6.3, "test_acc@1": 29.6, "raw_acc@1": 41.4}]
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "train_loss": -1 + 1 / epoch, "std": 0.99, "rank": 6 + epoch / 100}
        rows.append(row | {"test_acc@1": 100 - 60 / epoch})
    return [{name: row[name] for name in row if labelled or "acc" not in name} for row in rows]


@pytest.mark.parametrize("epochs", [1, 20, 800])
@pytest.mark.parametrize("labelled", [True, False])
def test_curves(drawn, epochs, labelled):
    rows = history(epochs, labelled)
    figure = drawn(figures.curves, {"a $strange$ name": rows})
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert ("top-1 on test images (%)" in labels) == labelled
    assert "std of z · √d (0: collapsed)" in labels
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == list(range(1, epochs + 1))
    assert line.get_ydata().tolist() == [row["train_loss"] for row in rows[1:]]


def test_curves_of_several_runs_over_one_another(drawn):
    runs = {f"a run with a longer name, the number {i}": history(5 + i) for i in range(12)}
    figure = drawn(figures.curves, runs)
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 12  # more than there are colours
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)


@pytest.mark.parametrize("classes", [2, 10, 40, 100, None])
def test_embedding(drawn, classes):
    rng = np.random.default_rng(0)
    names = [f"class number {i}" for i in range(classes or 3)]
    labels = rng.integers(0, classes, 200) if classes else None
    features = rng.normal(size=(200, 8)) * 0.1
    if classes == 2:
        features[:, 0] += 10 * labels
    words = [names[i] for i in labels] if classes else None
    figure = drawn(figures.embedding, features.astype(np.float32), words, names, "title")
    clouds = [c.get_offsets() for c in figure.axes[0].collections]
    assert sum(map(len, clouds)) == 200
    legend = figure.legends[0].get_texts() if figure.legends else []
    assert len(legend) == (classes if classes and classes <= 40 else 0)
    if classes == 2:  # far apart stays far apart
        apart = np.linalg.norm(clouds[0].mean(0) - clouds[1].mean(0))
        assert apart > 2 * max(cloud.std(0).max() for cloud in clouds)
    if classes == 40:
        looks = {
            (tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes())
            for c in figure.axes[0].collections
        }
        assert len(looks) == 40


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_embedding_of_few_or_equal_images(drawn, number):
    drawn(figures.embedding, np.ones((number, 4), np.float32), None, [], "collapsed")


@pytest.mark.parametrize("right", [True, False])
def test_neighbours(drawn, right):
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (8, 9, 32, 32, 3), dtype=np.uint8)
    framed = rng.random((8, 8)) < 0.5 if right else None
    figure = drawn(figures.neighbours, tiles, rng.random((8, 8)), framed, ["a class"] * 8, "title")
    axes = figure.axes[0]
    assert len(axes.patches) == (framed.sum() if right else 0)
    canvas = axes.images[0].get_array()
    for patch in axes.patches:  # a frame is around a neighbour, never a query
        x, y = (round(v + 0.5) for v in patch.get_xy())
        r, c = y // 42, x // 42
        assert (x, y) == (42 * c, 42 * r)
        assert framed[r, c - 1]
        assert (canvas[y : y + 32, x : x + 32] == tiles[r, c]).all()


def test_sheet(drawn):
    tiles = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32, 3), dtype=np.uint8)
    texts = {(0, 1): "crop 71%: 29 x 25\nhue +0.05", (7, 2): "gray"}
    names = ["image", "view 1", "view 2"]
    figure = drawn(figures.sheet, tiles, names, texts, "a long name: what is seen of it")
    written = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert written == {texts[0, 1]: (34, 0), "gray": (68, 238)}  # 32 pixels, and a gap of 2


@pytest.mark.parametrize("classes", [2, 10, 40, 100])
def test_confusion(drawn, classes):
    matrix = np.full((classes, classes), 1) + 98 * np.eye(classes, dtype=int)
    figure = drawn(
        figures.confusion, matrix.tolist(), [f"class number {i}" for i in range(classes)], "a_run"
    )
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert ("class number 1" in names) == (classes <= 40)
    written = [text.get_text() for text in figure.axes[0].texts]
    assert len(written) == (classes**2 if classes <= 20 else 0)
    share = 100 * 99 / (98 + classes)
    assert f"top-1 {share:.2f} % of" in figure.get_suptitle()
    if written:
        assert written[0] == f"{share:.0f}"


def test_ablations(drawn):
    names = ["default", "stop_grad off", "a setting with a longer name: 4"]
    rows = [{"setting": name, "knn": 88.0, "untrained_knn": 29.6} for name in names * 2]
    rows[3]["knn"] = 60.0
    figure = drawn(figures.ablations, rows, "data: what it shows")
    (axes,) = figure.axes
    assert [round(bar.get_height(), 3) for bar in axes.patches] == [74, 88, 88]
    assert [text.get_text() for text in axes.get_xticklabels()] == names
    assert [text.get_text() for text in axes.texts] == ["74.0", "88.0", "88.0"]
    for text, bar in zip(axes.texts, axes.patches, strict=True):  # a mean is not above its bar
        assert text.get_position()[1] + 5 < bar.get_height()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["untrained 29.6"]


def test_ablation_curves(drawn):
    names = ["default", "stop_grad off"]
    runs = {name: [history(5), history(5)] for name in (*names, "not shown")}
    runs["default"][1][-1]["test_acc@1"] = 60.0
    figure = drawn(figures.ablation_curves, runs, names, "data: what it shows")
    assert [len(axes.lines) for axes in figure.axes] == [2 * (2 + 1)] * 3  # seeds, and their mean
    mean = figure.axes[2].lines[2]
    assert mean.get_label() == "default"
    assert mean.get_ydata()[-1] == (88 + 60) / 2


def test_rank_and_knn(drawn):
    """A run that was warned is the one that spoils the order: rho is 1 without it."""
    start = {"data": "textures", "untrained_rank": 6, "untrained_knn": 30}
    rows = [start | {"rank": rank, "knn": 10 * rank} for rank in (4, 5, 6, 7)]
    rows.append(start | {"rank": 2, "knn": 90, "warned_at_step": 25})
    rows += [row | {"data": "others", "knn": row["knn"] / 2} for row in rows]
    figure = drawn(figures.rank_and_knn, rows)
    assert len(figure.axes) == 2
    for axes, name in zip(figure.axes, ("textures", "others"), strict=True):
        title = axes.get_title()
        # Of ranks 1..5 by rank, those by knn are 5 1 2 3 4: rho = 1 - 6 (16 + 4 * 1) / 120 = 0.
        assert title.startswith(f"{name}: 5 runs, Spearman's ρ 0.00")
        assert "(4 without a warning: ρ 1.00)" in title
        assert [len(line.get_xdata()) for line in axes.lines] == [4, 1, 1]


# ---- names --------------------------------------------------------------------------------------


@pytest.fixture
def font(tmp_path, monkeypatch):
    """An installed font that has two letters of China, each a square, and no others."""
    builder = FontBuilder(1000, isTTF=True)
    pen = TTGlyphPen(None)
    for i, point in enumerate([(0, 0), (0, 800), (800, 800), (800, 0)]):
        (pen.lineTo if i else pen.moveTo)(point)
    pen.closePath()
    glyphs = [".notdef", "cat", "dog"]
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord("猫"): "cat", ord("狗"): "dog"})
    builder.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (900, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Two Animals", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "animals.ttf")
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist])
    fontManager.addfont(tmp_path / "animals.ttf")


CLASSES = ["猫", "狗", "鳥", "a\nb", "bytes \udcff", "_hidden", "$5$", "long_" * 20 + "a"]
CLASSES += ["long_" * 20 + "b", "n02111889_samoyed_and_other_dogs_of_the_north", "鳥" * 40]


def test_names_of_any_script_and_length_are_told_apart(drawn, font):
    """Letters of an installed font are drawn; others escaped, as are line breaks and bad bytes."""
    shown = [*drawable_names(CLASSES).values()]
    assert shown[:7] == ["猫", "狗", "\\u9ce5", "a\\nb", "bytes \\udcff", "_hidden", "$5$"]
    assert shown[7:9] == ["long_long_lo…long_long_a", "long_long_lo…long_long_b"]
    assert len(set(shown)) == len(CLASSES)
    title = "運" * 300
    figure = drawn(figures.confusion, np.eye(11, dtype=int).tolist(), CLASSES, title)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == shown
    assert "Two Animals" in axes.get_yticklabels()[0].get_fontfamily()
    features = np.random.default_rng(0).normal(size=(22, 4)).astype(np.float32)
    figure = drawn(figures.embedding, features, CLASSES * 2, CLASSES, title)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text.strip().replace(r"\$", "$") for text in legend] == shown
    tiles = np.random.default_rng(0).integers(0, 256, (8, 9, 32, 32, 3), dtype=np.uint8)
    drawn(figures.neighbours, tiles, np.ones((8, 8)), None, CLASSES[3:], title)
    drawn(figures.curves, {title: history(5)})
    drawn(figures.curves, {name: history(5) for name in ("_a", *CLASSES)})
    drawn(figures.curves, {name: history(5, labelled=False) for name in ("x" * 240, "y" * 240)})


def test_tensorboard_gets_a_line_a_name(tmp_path):
    board = Board(str(tmp_path), [], ())
    images = [torch.zeros(3, 3, 8, 8, dtype=torch.uint8)]
    board.features(torch.eye(3), ["a\nb", "bytes \udcff", "猫"], images, 1)
    board.close()
    (table,) = tmp_path.rglob("metadata.tsv")
    assert table.read_text(encoding="utf-8").splitlines() == [r"a\nb", r"bytes \udcff", "猫"]


def test_a_long_name_loses_its_middle():
    assert drawable("abcdefghij", 10) == "abcdefghij"
    assert drawable("abcdefghijk", 10) == "abcde…hijk"
    assert columns_of("ab猫") == 4
    alike = ["x" * 50 + middle + "y" * 50 for middle in "ab"]  # in what is left of them
    assert [text[-4:] for text in drawable_names([*alike, "c"]).values()] == [" (1)", " (2)", "c"]
