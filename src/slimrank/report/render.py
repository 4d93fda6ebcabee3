"""Templates of this package, filled."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from slimrank.report import number_format as words
from slimrank.report import tables as rows

FILTERS = {f.__name__: f for f in (words.millions, words.megabytes, words.percent, words.code, words.cell)}


def render(template: str, **content: Any) -> str:
    """Return a template, which finds the functions of `report.tables` as `rows`; in HTML pages values are escaped."""
    environment = Environment(
        loader=PackageLoader("slimrank.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
    )
    environment.filters |= FILTERS
    environment.globals["rows"] = rows
    return environment.get_template(template).render(content)
