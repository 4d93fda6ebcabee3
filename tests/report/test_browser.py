"""The report in a real browser, where there is one: it fits a phone, and its pictures are not blank."""

import shutil
import subprocess
from html import escape

import pytest

from slimrank.report.comparison import write_comparison
from slimrank.report.html import html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.plots, pytest.mark.skipif(BROWSER is None, reason="no chromium: see .ci/run")]
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
OPTIONS += ["--no-first-run", "--hide-scrollbars"]
WIDTHS = [375, 1280]
MEASURE = "<script>onload = () => parent.found(innerWidth, document.documentElement.scrollWidth)</script>"
FRAME = '<iframe style="width: {}px; height: 800px; border: 0" srcdoc="{}"></iframe>'


def browse(folder, *arguments):
    command = [BROWSER, *OPTIONS, f"--user-data-dir={folder}/profile", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def compared():
    """A comparison of eight cells on two texts and a task, one of which has failed."""
    texts, error = ["a/rather/long/path/to/a/text.txt", "demo"], {"message": "killed", "hint": "see cells/x.log"}
    tasks = {"arc_easy": {"metrics": {name: {"value": 0.25, "stderr": 0.0125} for name in ("acc", "words")}}}
    differs = {"difference": -0.05, "low": -0.1, "high": 0.0, "significant": False, "lost": 12, "gained": 1_000}
    against = {"ratio": 1.5, "ratio_low": 1.25, "ratio_high": 1.75, "kl": 0.5, "top1": 90.0}
    cells = {
        f"kfac_svd spectrum 0.{i}": {
            "error": None, "keep_ratio": i / 10, "keep_total": i / 9, "bytes": i * 10**8, "parameters": i * 10**7,
            "texts": {text: {"perplexity": 30.0 / i} for text in texts}, "against": dict.fromkeys(texts, against),
            "tasks": tasks, "task_differences": {"arc_easy": {"acc": differs, "words": differs}},
            "sample": {"prompt": "Once", "text": "upon " * 40}, "notes": ["a layer was left out"] * (i % 3),
            "inputs": {"model": "0" * 64, "calibration": "1" * 64},
            "speed_ratio": {"decode": 1.25, "prefill": 1.0}, "seconds": 1234.0, "peak_memory": 10**9,
            "options": {"method": "kfac_svd"},
        }
        for i in range(2, 9)
    }  # fmt: skip
    dense = {
        "texts": {text: {"perplexity": 3.0} for text in texts}, "tasks": tasks, "bytes": 10**9,
        "sample": {"prompt": "Once " * 30, "text": "upon a time"},
        "environment": {
            "slimrank": "1", "python": "3.12", "versions": {"torch": "2.13.0"}, "threads": 2, "device": "cpu",
            "dtype": "float32", "texts": dict.fromkeys(texts, "2" * 64),
        },
    }  # fmt: skip
    return {
        "slimrank": "1", "model": "org/model", "texts": texts, "windows": 16, "seq_len": None, "dense": dense,
        "cells": {**cells, "svd uniform 0.5": {"error": error, "options": {}}}, "pareto": list(cells)[:3],
        "baselines": list(cells)[1:2],
    }  # fmt: skip


@pytest.fixture(scope="module", params=["report", "comparison"])
def page(request, record, tmp_path_factory):
    """Of a model with as many blocks as a real one; of a comparison."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "comparison":
        write_comparison(compared(), folder)
        return folder / "comparison.html"
    many = [{**row, "block": row["block"] + 3 * i} for i in range(10) for row in record["targets"]]
    (folder / "report.html").write_text(html({**record, "targets": many}))
    return folder / "report.html"


def test_the_page_does_not_scroll_sideways(page, tmp_path):
    """In frames of those widths, since a browser's own window may not be as narrow as a phone."""
    written = page.read_text()
    policy = '<meta http-equiv="Content-Security-Policy"'
    start = written.index(policy)
    free = written[:start] + written[written.index("\n", start) :].replace("<details>", "<details open>")
    (tmp_path / "frame.html").write_text(
        "<title></title><script>found = (inner, whole) => document.title += `${inner} ${whole};`</script>"
        + "".join(FRAME.format(width, escape(free + MEASURE)) for width in WIDTHS)
    )
    shown = ["--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/frame.html"]
    title = browse(tmp_path, *shown).split("<title>")[1].split(";</title>")[0]
    found = sorted(tuple(map(int, pair.split())) for pair in title.split(";"))
    assert [inner for inner, _ in found] == WIDTHS
    assert all(whole <= inner for inner, whole in found)


@pytest.mark.parametrize("scheme", [0, 1])
def test_it_is_dark_where_dark_is_wanted(page, tmp_path, scheme):
    """The corner of the page has its background; plots are seen on either."""
    Image = pytest.importorskip("PIL.Image")
    shot, theme = tmp_path / "shot.png", f"--blink-settings=preferredColorScheme={scheme}"
    browse(tmp_path, "--window-size=800,2000", theme, f"--screenshot={shot}", page)
    picture = Image.open(shot).convert("L")
    assert (picture.getpixel((2, 2)) < 60) == (scheme == 0)
    assert len(picture.getcolors(256)) > 50
