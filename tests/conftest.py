import functools
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # the code of saved models is copied anew; removed at the end
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

from helpers import byte_tokenizer, nothing_drawn, save_tiny, text
from slimrank.models.machine import Machine

LIMIT = 60  # seconds of processor time that one test may take, with its fixtures and its processes
REFERENCE = 120e9  # float32 operations a second of a thread, on the servers that the limit is meant for

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    torch.set_num_threads(1)


class Deprecations(logging.Handler):
    """What transformers logs as deprecated is an error, as a warning of that kind is (see pyproject.toml)."""

    def emit(self, record):
        if "deprecated" in record.getMessage():
            raise DeprecationWarning(record.getMessage())


def pytest_configure(config):
    logging.getLogger("transformers").addHandler(Deprecations(logging.WARNING))


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    """What takes minutes first, so that no worker is left alone with it in the end."""
    items.sort(key=lambda item: item.get_closest_marker("demo") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    item.began = processor_time()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    yield
    took = processor_time() - item.began
    if took > LIMIT * slowness() and item.get_closest_marker("engine") is None:
        pytest.fail(f"took {took:.0f} s of processor time, more than {LIMIT * slowness():.0f}", pytrace=False)


@functools.cache
def slowness():
    """Return how much slower than the reference this processor is, from 1 to 3: about 2 without AVX-512."""
    a = torch.ones(1024, 1024)
    a @ a
    began = time.process_time()
    for _ in range(10):
        a @ a
    return min(3.0, max(1.0, REFERENCE * (time.process_time() - began) / (10 * 2 * 1024**3)))


def processor_time():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.fixture(autouse=True)
def _plots_where_they_count(request, monkeypatch):
    """Nothing is drawn but for the marker `plots`: it takes as long as compressing a tiny model."""
    if request.node.get_closest_marker("plots") is None:
        monkeypatch.setattr("slimrank.report.html._figures", nothing_drawn)


@pytest.fixture(autouse=True)
def _any_machine(monkeypatch):
    """No test goes by how fast or busy this machine is; to measure it takes as long as to compress a tiny model."""
    monkeypatch.setattr("slimrank.evaluate.benchmark.check_idle", lambda: None)
    for user in ("pipeline.compression", "pipeline.preview", "recovery.api"):
        monkeypatch.setattr(f"slimrank.{user}.measure_machine", lambda device, bfloat16: Machine(1e9, 1e9, 1e9, 1e9))


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
    from slimrank.comparison import processes, worker

    def work(request, log, progress):
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request, default=str) + "\n"))
        worker.main()
        return 0

    monkeypatch.setattr(worker, "_watch_stdin", lambda: None)
    monkeypatch.setattr(processes, "_work", work)
