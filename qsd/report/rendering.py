"""The common part of all pages: one complete HTML file with its figures, without scripts or further files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from qsd.plots import data_uri

_PIXELS = 96  # CSS pixels in an inch


@dataclass(frozen=True)
class PageFigure:
    """A figure on a page.

    Attributes:
        uri: The image, as a data URI.
        alt: Description of the image, for readers who do not see it.
        caption: Description of the figure, and the images that were measured.
        width: Width in CSS pixels.
        height: Height in CSS pixels.
    """

    uri: str
    alt: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Finding:
    """A sentence at the top of the page.

    Attributes:
        kind: ``"good"``, ``"bad"``, or ``"plain"``.
        title: The finding in a few words.
        text: The figures of the finding.
    """

    kind: str
    title: str
    text: str


def render(template: str, **values: Any) -> str:
    """Fill a template of this package.

    Args:
        template: File name of the template.
        **values: Values of the names in the template.
    """
    environment = Environment(
        loader=PackageLoader("qsd.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"significant": significant, "count": count, "scientific": scientific}
    return environment.get_template(template).render(**values)


def series(figures: Sequence[Figure], alt: str, caption: str) -> list[PageFigure]:
    """The parts of one figure, numbered.

    Args:
        figures: The parts.
        alt: Description of the image, for readers who do not see it.
        caption: Description of the figure, and the images that were measured.
    """
    if len(figures) == 1:
        return [page_figure(figures[0], alt, caption)]
    parts = [f" Part {i} of {len(figures)}." for i in range(1, len(figures) + 1)]
    return [page_figure(figure, f"{alt}.{part}", f"{caption}{part}") for figure, part in zip(figures, parts)]


def page_figure(figure: Figure, alt: str, caption: str) -> PageFigure:
    """A figure for a page.

    Args:
        figure: A figure of matplotlib.
        alt: Description of the image, for readers who do not see it.
        caption: Description of the figure, and the images that were measured.
    """
    width, height = figure.get_size_inches() * _PIXELS
    return PageFigure(data_uri(figure), alt, caption, round(width), round(height))


def significant(value: float, digits: int = 3) -> str:
    """A number with a given number of significant digits; an exponent stands only where the number would be long.

    Args:
        value: The number.
        digits: Number of significant digits.
    """
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -5 <= exponent < 6:
        return f"{value:.{max(0, digits - 1 - exponent)}f}"
    return f"{value:.{digits - 1}e}"


def scientific(value: float) -> str:
    """A number with two digits and its power of ten.

    Args:
        value: The number.
    """
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}\N{NO-BREAK SPACE}·\N{NO-BREAK SPACE}10{power}"


def count(value: float | None) -> str:
    """A number of operations with its thousands, millions or billions.

    Args:
        value: The number, or ``None`` for a dash.
    """
    if value is None:
        return "–"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{significant(value / size)}{unit}"
    return significant(value)
