"""Draws an explanation as a PNG picture: the text, each token on the colour of its probability, its rank below.

Needs matplotlib, from the extra ``explain``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tf_gpt2.explain.explanation import LEAST_PROBABILITY, ExplainedToken, Explanation, colour_of, escape

FONT = "DejaVu Sans Mono"
"""The font of the text; matplotlib contains it."""

POINTS, RANK_POINTS = 11.0, 6.5
CHAR_WIDTH, LINE_HEIGHT = 0.0922, 0.46
"""In inches: the width of a character of ``FONT`` at ``POINTS``, and the distance of lines."""

MARGIN = 0.3
COLUMNS = 88
LEGEND_STEPS = 60


class Placed(NamedTuple):
    """A token's place on the picture.

    Attributes:
        token: the token.
        label: its drawn text.
        line: counted from 0.
        column: of its first character.
        width: in characters, that of its label or its rank, whichever is wider.
    """

    token: ExplainedToken
    label: str
    line: int
    column: int
    width: int


def render_picture(explanation: Explanation) -> bytes:
    """Returns the picture as PNG.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    try:
        from matplotlib import font_manager
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a picture needs matplotlib: pip install 'tf_gpt2[explain]', or write an .html page"
        ) from error
    font_chars = font_manager.get_font(font_manager.findfont(FONT)).get_charmap().keys()
    places = list(arrange(explanation.tokens, [drawable(token.label, font_chars) for token in explanation.tokens]))
    columns = max(COLUMNS, *(place.column + place.width for place in places))
    size = columns * CHAR_WIDTH + 2 * MARGIN, (places[-1].line + 2) * LINE_HEIGHT + 2 * MARGIN
    figure = Figure(figsize=size, facecolor="white")
    FigureCanvasAgg(figure)
    # inches from the upper left corner
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0))
    axes.set_axis_off()
    for place in places:
        draw_token(axes, place)
    draw_legend(axes, MARGIN + (places[-1].line + 1.4) * LINE_HEIGHT)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def drawable(label: str, font_chars: Any) -> str:
    """Replaces blanks by signs, and characters that the font lacks by escapes."""
    signs = label.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return "".join(char if ord(char) in font_chars else escape(char) for char in signs)


def arrange(tokens: Sequence[ExplainedToken], labels: Sequence[str]) -> Iterator[Placed]:
    """Breaks the text into lines: after a line feed, and where ``COLUMNS`` are full."""
    line = column = 0
    for token, label in zip(tokens, labels, strict=True):
        width = max(len(label), math.ceil(len(str(token.rank or "")) * RANK_POINTS / POINTS))
        if column and column + width > COLUMNS:
            line, column = line + 1, 0
        yield Placed(token, label, line, column, width)
        column += width
        if token.label.endswith("\n"):
            line, column = line + 1, 0


def draw_token(axes: Any, place: Placed) -> None:
    """Draws a token's background, its text and its rank."""
    x, y = MARGIN + place.column * CHAR_WIDTH, MARGIN + place.line * LINE_HEIGHT
    width = place.width * CHAR_WIDTH - 0.015
    axes.add_patch(rectangle((x, y), width, 0.24, place.token.colour))
    colour = "#667080" if place.token.rank is None else "#1c2430"
    write(axes, x, y + 0.12, place.label, POINTS, colour)
    if place.token.rank is not None:
        write(axes, x, y + 0.31, str(place.token.rank), RANK_POINTS, "#667080")


def draw_legend(axes: Any, y: float) -> None:
    """Draws the palette, from improbable to probable."""
    left = MARGIN + 10 * CHAR_WIDTH
    write(axes, MARGIN, y, f"≤ {LEAST_PROBABILITY:.2%}", 8, "#1c2430")
    width = 2.4 / LEGEND_STEPS
    for i in range(LEGEND_STEPS):
        colour = colour_of(LEAST_PROBABILITY ** (1 - i / (LEGEND_STEPS - 1)))
        axes.add_patch(rectangle((left + i * width, y - 0.07), width * 1.05, 0.14, colour))
    text = "100%   probability of each token; below it its rank, 1 for the likeliest"
    write(axes, left + 2.5, y, text, 8, "#1c2430")


def rectangle(corner: tuple[float, float], width: float, height: float, colour: str) -> Any:
    """Makes a filled rectangle."""
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, facecolor=colour, linewidth=0)


def write(axes: Any, x: float, y: float, text: str, points: float, colour: str) -> None:
    """Writes text literally: a dollar sign does not start a formula."""
    axes.text(x, y, text, family=FONT, fontsize=points, color=colour, va="center_baseline", parse_math=False)
