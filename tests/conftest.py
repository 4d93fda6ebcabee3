import io
import json
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

from helpers import byte_tokenizer, save_tiny, text

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    torch.set_num_threads(1)


class Deprecations(logging.Handler):
    """What transformers logs as deprecated is an error, as a warning of that kind is (see pyproject.toml)."""

    def emit(self, record):
        if "deprecated" in record.getMessage():
            raise DeprecationWarning(record.getMessage())


def pytest_configure(config):
    logging.getLogger("transformers").addHandler(Deprecations(logging.WARNING))


def pytest_collection_modifyitems(items):
    """What takes minutes first, so that no worker is left alone with it in the end."""
    items.sort(key=lambda item: item.get_closest_marker("demo") is None)


@pytest.fixture(autouse=True)
def _plots_where_they_count(request, monkeypatch):
    """Nothing is drawn but for the marker `plots`: it takes as long as compressing a tiny model."""
    if request.node.get_closest_marker("plots") is None:
        from slimrank.report import html

        monkeypatch.setattr(html, "_figures", lambda record: html.Figures(missing="not drawn in this test"))


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text(), encoding="utf-8")
    return path


@pytest.fixture
def tiny_folder(tmp_path):
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def in_this_process(monkeypatch):
    """The real work of a comparison's cells, without the seconds that a process takes to begin."""
    from slimrank.comparison import running, worker

    def work(request, log, progress):
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request, default=str) + "\n"))
        worker.main()
        return 0

    monkeypatch.setattr(worker, "_watch_stdin", lambda: None)
    monkeypatch.setattr(running, "_work", work)
