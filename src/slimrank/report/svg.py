"""A matplotlib figure as SVG that stands inside an HTML page: text and axes in the colour of the page's text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from xml.etree import ElementTree

from slimrank.errors import MissingExtraError

INK = "#010203"  # stands for the colour of text until the figure is written: matplotlib knows no currentColor
SMALLEST = 0.72  # of its size: as far as a figure shrinks; where there is less room it scrolls
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
    "font.size": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
    "grid.color": INK,
    "grid.alpha": 0.2,
    "axes.grid": True,
}


@contextmanager
def figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Iterator[Any]:
    """Open a figure of so many inches to draw on, in one style whatever the user's own is.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "drawing plots") from error
    settings: Any = matplotlib.rcParams
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings.update(_STYLE)
        yield Figure((width, height), layout=layout)


def inline(drawn: Any, label: str) -> str:
    """Return a figure as an `<svg>` element, the same bytes for the same figure; call it inside `figure`.

    Args:
        drawn: the figure.
        label: what is shown, for those who do not see it; no other figure of the page has the same.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    name, written = re.sub(r"\W+", "-", label.lower()), io.StringIO()
    matplotlib.rcParams["svg.hashsalt"] = name
    FigureCanvasSVG(drawn).print_svg(written, metadata={"Date": None})  # savefig would draw everything twice
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", written.getvalue()))
    _strip(root)
    width = float(root.get("viewBox", "").split()[2])
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    sizes = f"width: {width:.0f}pt; max-width: 100%; min-width: {SMALLEST * width:.0f}pt"
    root.attrib |= {"role": "img", "aria-label": label, "style": sizes}
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    text = ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace(INK, "currentColor")


def _strip(root: ElementTree.Element) -> None:
    """Take out what a page does not need: metadata, style that would hold for the whole page, ids nothing refers to."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        if element.tag == f"{{{_SVG}}}g":
            element.attrib.pop("id", None)
