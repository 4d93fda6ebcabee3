"""The HTML report: well formed, self-contained, escaped, repeatable, and fit for a phone."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

import slimrank
from slimrank.report.html import html
from slimrank.report.plots import COLOURS, heat_map
from slimrank.report.svg import INK
from slimrank.report.write import markdown, write_reports

pytestmark = pytest.mark.plots

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
EVIL = """<script>alert("1")</script>'><img src=x onerror=alert(2)>{{ 7 * 7 }}"""


class Page(HTMLParser):
    """What stands in a page: tags with attributes and what is around them, ids, text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text, self.ids = [], [], "", []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes, list(self.open)))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in VOID:
            self.open.append((tag, attributes.get("class", "")))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [(attributes, around) for name, attributes, around in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(record):
    return html(record)


def test_both_are_written(run, page):
    assert (run.out / "report.html").read_text() == page
    assert json.loads((run.out / "report.json").read_text()) == run.report


def test_it_is_well_formed(page):
    found = Page(page)
    assert page.startswith("<!DOCTYPE html>")
    assert len(found.all("h1")) == len(found.all("title")) == len(found.all("main")) == 1
    assert len(found.ids) == len(set(found.ids))
    inside = re.findall(r'(?:url\(#|href="#)([^)"]+)', page)
    assert inside
    assert set(inside) <= set(found.ids)


def test_it_needs_nothing_from_outside(page):
    found = Page(page)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "image"} & {
        tag for tag, _, _ in found.tags
    }
    for tag, attributes, _ in found.tags:
        assert not {name for name in attributes if name in ("src", "srcset", "data", "action") or name.startswith("on")}
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#") or tag == "a"
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    policy = next(a["content"] for a, _ in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_nothing_is_wider_than_the_screen(page):
    """Tables and plots scroll in boxes of their own; nothing else has a width."""
    found = Page(page)
    (viewport,) = [a["content"] for a, _ in found.all("meta") if a.get("name") == "viewport"]
    assert "width=device-width" in viewport
    assert found.all("table")
    assert found.all("svg")
    for _, around in found.all("table") + found.all("svg"):
        assert "scroll" in [kind for _, kind in around]
    for tag, attributes, _ in found.tags:
        if "width" in attributes.get("style", "").replace("stroke-width", ""):
            assert tag == "svg"
            assert "max-width: 100%" in attributes["style"]
    for width in re.findall(r"[^-]width: *([\d.]+)(?:px|rem)", page.split("</style>")[0]):
        raise AssertionError(width)


def test_light_and_dark(page):
    assert "prefers-color-scheme: dark" in page
    assert INK not in page
    assert page.count("currentColor") > 50
    assert all(contrast(colour, back) > 3 for colour in COLOURS for back in ("#ffffff", "#14171a"))
    assert {"#ffffff", "#14171a"} <= set(re.findall(r"--page: (#\w+)", page))


def contrast(one, other):
    """WCAG 2.1, relative luminance and contrast ratio."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_everything_is_told(record, page):
    told = " ".join(Page(page).text.split())
    before, after = (f"{record[side]['perplexity']['perplexity']:.2f}" for side in ("before", "after"))
    digests = record["provenance"]["inputs"]
    for words in (
        before, after, "embeddings and lm_head", "Corrections", "before refining", digests["model"],
        digests["calibration"], record["provenance"]["versions"]["torch"], "keep_ratio", "calibrate and decompose",
    ):  # fmt: skip
        assert words in told
        assert words in markdown(record)
    for row in record["targets"]:
        assert row["path"] in told
    assert page.count("<svg") == 1 + 7 + 2  # ranks, a spectrum for each kind of layer, before and after refining


def test_what_models_and_texts_say_is_escaped(record):
    evil = copy.deepcopy(record)
    evil["model"] |= {"name": EVIL, "class": EVIL}
    evil["notes"].append(EVIL)
    evil["before"]["sample"] = {"prompt": EVIL, "text": EVIL}
    evil["after"]["sample"] = {"prompt": EVIL, "text": EVIL}
    evil["provenance"]["recipe"] |= {"evaluation": EVIL, "calibration": EVIL, "method": EVIL}
    evil["allocation"]["id"] = EVIL
    evil["coverage"]["left_out"][EVIL] = 1
    evil["seconds"][EVIL] = 1.0
    for row in evil["targets"]:
        row["role"] += "<script>$x$</script>"
        row["path"] += EVIL
    evil["spectra"] = {path + EVIL: spectrum for path, spectrum in evil["spectra"].items()}
    written = html(evil)
    found = Page(written)
    assert not found.all("script")
    assert not found.all("img")
    assert found.text.count(EVIL) > 10
    assert [tag for tag, _, _ in found.tags if tag == "svg"] == ["svg"] * 10
    assert "<script" not in written


def test_the_same_record_gives_the_same_bytes(record, page, tmp_path):
    import matplotlib

    (tmp_path / "record.json").write_text(json.dumps(record))
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.hashsalt": "x", "svg.fonttype": "path"}):
        assert html(json.loads((tmp_path / "record.json").read_text())) == page
        assert matplotlib.rcParams["font.size"] == 30
    program = (
        "import json, sys; from slimrank.report.html import html; print(html(json.load(open(sys.argv[1]))), end='')"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "record.json"],
        check=True, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert shown.stdout == page


def test_without_matplotlib_the_page_says_what_would_bring_plots(record, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_reports({**record, "notes": [f"note number {i}." for i in range(30)]}, tmp_path)
    written = (tmp_path / "report.html").read_text()
    told = Page(written).text
    assert "<svg" not in written
    assert "slimrank[report]" in told
    assert all(f"note number {i}." in told for i in range(30))
    assert "and 22 more" in told
    with pytest.raises(slimrank.errors.MissingExtraError):
        heat_map(slimrank.report.layer_grid.kept_fraction(record), "ranks")


@pytest.mark.parametrize("change", ["all dense", "not evaluated", "many blocks", "one layer"])
def test_odd_records(record, change):
    odd = copy.deepcopy(record)
    if change == "all dense":
        odd["targets"] = [
            {**row, "rank": "dense", "parameters_after": row["parameters_before"]} for row in odd["targets"]
        ]
        for row in odd["targets"]:
            row.pop("refined", None)
    elif change == "not evaluated":
        odd |= {"before": {}, "after": {}, "corrections": [], "notes": []}
    elif change == "many blocks":
        odd["targets"] = [{**row, "block": row["block"] + 3 * i} for i in range(30) for row in odd["targets"]]
    else:
        odd["targets"] = odd["targets"][:1]
    page, told = html(odd), markdown(odd)
    assert Page(page).all("svg")
    assert ("Sample" in page) == ("A sample" in told) == (change != "not evaluated")


def test_it_is_small(record, page):
    assert len(page) < 400_000
    points = [len(spectrum["ranks"]) for spectrum in record["spectra"].values()]
    assert max(points) <= 32


def test_markdown_tables_are_whole(record):
    """Every row of a table has as many cells as its head, whatever stands in them."""
    evil = copy.deepcopy(record)
    evil["provenance"]["recipe"]["calibration"] = "a | b\nc"
    width = None
    for line in markdown(evil).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert cells is None or width is None or cells == width, line
        width = cells
    assert math.prod(1 for line in markdown(evil).splitlines() if "a \\| b c" in line) == 1
