"""Names as a picture can show them: in a font that has their letters, or escaped; not too long."""

import functools
import unicodedata
from collections import Counter
from collections.abc import Iterable

LONGEST = 24  # columns of a name; a letter of China, Japan or Korea takes two


@functools.cache
def characters(path: str) -> frozenset[int]:
    """The characters that the font at `path` has; none where it cannot be read."""
    from matplotlib.font_manager import get_font

    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def font_of(character: str) -> str | None:
    """The family of a font that has it: matplotlib's own, else an installed one; None without."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    usual = FontProperties()
    if ord(character) in characters(findfont(usual)):
        return usual.get_family()[0]
    fonts = sorted(
        fontManager.ttflist, key=lambda font: (font.style, font.weight) != ("normal", 400)
    )
    for font in fonts:  # a last resort has a box for each character, and emoji are no outlines
        strange = "last resort" in font.name.lower() or "emoji" in font.name.lower()
        if not strange and ord(character) in characters(font.fname):
            return font.name
    return None


def escaped(letter: str) -> str:
    r"""As Python writes it: \n, \xe9, \u732b."""
    return letter.encode("unicode_escape").decode()


def printable(text: str) -> str:
    """The text with line breaks, and bytes that are no UTF-8, escaped."""
    return "".join(letter if letter.isprintable() else escaped(letter) for letter in text)


def columns_of(text: str) -> int:
    """How wide a text is: letters of China, Japan and Korea count twice."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def drawable(text: str, longest: int) -> str:
    """The text in characters that can be drawn; of more than `longest` columns the middle is cut.

    Others are escaped, as in Python: two texts that differ stay so, unless they are cut.
    """
    there = {letter for letter in set(text) if font_of(letter)}
    parts = [printable(c) if c in there else escaped(c) for c in text]
    if sum(map(columns_of, parts)) <= longest:
        return "".join(parts)
    while sum(map(columns_of, parts)) >= longest:
        del parts[len(parts) // 2]
    parts.insert((len(parts) + 1) // 2, "…")
    return "".join(parts)


def drawable_names(names: Iterable[str], longest: int = LONGEST) -> dict[str, str]:
    """What is drawn for each name; those that a cut has made alike are numbered."""
    drawn = {name: drawable(name, longest) for name in names}
    number = Counter(drawn.values())
    return {
        name: f"{text} ({i})" if number[text] > 1 else text
        for i, (name, text) in enumerate(drawn.items(), 1)
    }


def in_legend(text: str) -> str:
    """A label without mathematics between dollars; one that began with _ would be left out."""
    return " " * text.startswith("_") + text.replace("$", r"\$")
