"""How figures look: size, colours, fonts, and names that fit.

Figures are made without pyplot, so without a window system and global state. The colours are those
of Okabe and Ito, which colour-blind people tell apart; what a colour says, a shape, a frame or a
number says too.
"""

import contextlib
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib takes its time to import: only where a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, SKY_BLUE = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", SKY_BLUE, "#000000", "#B8A800")
COLOURS += ("#882255", "#999999")  # two of Tol's, so that each of ten classes has its own colour
MARKERS = "o^sDvP*"  # their number is coprime to that of the colours: 70 pairs
LINES = ("-", "--", ":", "-.")
DPI = 110
FORMATS = ("png", "pdf", "svg", "jpg", "jpeg", "webp")
NAME_WIDTH = 24  # columns of a class or run name
# matplotlib takes a glyph from the first of these fonts that has it. Of those for Chinese, Japanese
# and Korean, one is usual on each system: Noto or WenQuanYi on Linux, the others on macOS, Windows.
FALLBACK_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Nirmala UI",
    "Arial Unicode MS",
)


@contextlib.contextmanager
def new_figure(
    width: float, height: float, file: IO[bytes], title: str = "", format: str = "png"
) -> "Iterator[Figure]":
    """Yield a figure of `width` x `height` inches, and write it to `file` when the block ends.

    `format`: one of FORMATS. Each line of the title is shortened to the figure's width.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    installed = fontManager.get_font_names()  # matplotlib warns of each font that is not
    fonts = [name for name in FALLBACK_FONTS if name in installed]
    fonts = [*matplotlib.rcParams["font.family"], *fonts]
    with matplotlib.rc_context({"font.family": fonts}), warnings.catch_warnings():
        # A character that no font has is drawn as a box.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        if title:
            lines = [fit_text(line, int(10 * width)) for line in title.split("\n")]
            figure.suptitle("\n".join(lines), fontsize="medium", parse_math=False)
        yield figure
        figure.savefig(file, format=format, dpi=DPI)


def line_style(i: int) -> dict:
    """Return the colour, marker and line style of the i-th line."""
    style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
    return style | {"linestyle": LINES[i % len(LINES)]}


def add_grid(axes: "Axes") -> None:
    """Add a light grid behind the data, and remove the frame's upper and right side."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# ---- names --------------------------------------------------------------------------------------


def escape(text: str) -> str:
    r"""Escape control characters, and bytes that are not UTF-8, as Python does: \n, \udcff."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def text_width(text: str) -> int:
    """Return the width of a text in columns, of which an East Asian character takes two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def fit_text(text: str, width: int) -> str:
    """Escape a text, and replace its middle by an ellipsis if it is wider than `width` columns."""
    parts = [escape(character) for character in text]
    if sum(map(text_width, parts)) <= width:
        return "".join(parts)
    while sum(map(text_width, parts)) >= width:
        del parts[len(parts) // 2]
    parts.insert((len(parts) + 1) // 2, "…")
    return "".join(parts)


def fit_names(names: Iterable[str], width: int = NAME_WIDTH) -> dict[str, str]:
    """Return the text for each name by `fit_text`, numbered where two names would look alike."""
    texts = {name: fit_text(name, width) for name in names}
    counts = Counter(texts.values())
    return {
        name: f"{text} ({i})" if counts[text] > 1 else text
        for i, (name, text) in enumerate(texts.items(), 1)
    }


def legend_label(text: str) -> str:
    """Return a legend's text without math between dollars; one that starts with _ is not hidden."""
    return " " * text.startswith("_") + text.replace("$", r"\$")
