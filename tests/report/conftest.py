"""One run for all tests of reports."""

import pytest

import slimrank
from helpers import save_tiny, text

SMALL = {"samples": 4, "search_samples": 4, "seq_len": 24, "batch_size": 2, "windows": 2}


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run with everything: gradients, allocation, refined pivot layers, corrections, evaluation."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(text())
    options = {"calibration": str(folder / "text.txt"), "corrections": 1, "correction_windows": 4, **SMALL}
    return slimrank.compress(save_tiny(folder / "model"), out=folder / "out", keep_ratio=0.6, **options)


@pytest.fixture(scope="session")
def record(run):
    return run.report
