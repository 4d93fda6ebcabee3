"""Templates of this package, filled."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from slimrank.report import tables
from slimrank.report.number_format import cell, code, megabytes, millions, percent

FILTERS = {f.__name__: f for f in (millions, megabytes, percent, code, cell)}


def render(template: str, **content: Any) -> str:
    """Fill a template, which finds the module `report.tables` as `tables`; text in an HTML page is escaped."""
    environment = Environment(
        loader=PackageLoader("slimrank.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
    )
    environment.filters |= FILTERS
    environment.globals["tables"] = tables
    return environment.get_template(template).render(content)
