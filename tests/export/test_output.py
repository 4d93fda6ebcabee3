import errno
import json
from pathlib import Path

import pytest

from slimrank.errors import OutputError
from slimrank.export.output import CARD, MANIFEST, OutputFolder, need_space, write_manifest


def write(path, content, overwrite=False, **files):
    with OutputFolder(path, overwrite).writing() as partial:
        (partial / "model.safetensors").write_text(content)
        for name, text in files.items():
            (partial / name).write_text(text)
        write_manifest(partial, {"made": "by a test"})


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_written_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    write(out, "one")
    assert names(out) == ["model.safetensors", MANIFEST]
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["files"]["model.safetensors"]["bytes"] == 3
    assert names(tmp_path) == ["out"]


def test_an_existing_folder_is_refused(tmp_path):
    out = tmp_path / "out"
    write(out, "one")
    with pytest.raises(OutputError, match="--overwrite"):
        write(out, "two")
    assert (out / "model.safetensors").read_text() == "one"
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        OutputFolder(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    OutputFolder(tmp_path / "empty")


def test_overwriting_keeps_what_others_wrote(tmp_path):
    out = tmp_path / "out"
    write(out, "one", old_shard="x")
    (out / "notes.txt").write_text("mine")
    (out / "results").mkdir()
    (out / "results" / "a").touch()
    write(out, "two", overwrite=True)
    assert names(out) == ["model.safetensors", "notes.txt", "results", MANIFEST]
    assert (out / "model.safetensors").read_text() == "two"
    assert names(tmp_path) == ["out"]


def test_a_card_that_was_changed_stays_one_that_was_not_is_replaced(tmp_path):
    out = tmp_path / "out"
    write(out, "one", **{CARD: "ours"})
    assert not OutputFolder(out, overwrite=True).keeps_card
    write(out, "two", overwrite=True, **{CARD: "ours, newer"})
    assert (out / CARD).read_text() == "ours, newer"
    for card in ("changed", "and again"):  # the second time the manifest does not name it any more
        (out / CARD).write_text(card)
        assert OutputFolder(out, overwrite=True).keeps_card
        write(out, "three", overwrite=True)
        assert (out / CARD).read_text() == card
    assert names(tmp_path) == ["out"]


def test_a_foreign_folder_is_never_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("the original")
    with pytest.raises(OutputError, match="not written by slimrank"):
        OutputFolder(out, overwrite=True)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "a").touch()
    with pytest.raises(OutputError, match="in the way"):
        OutputFolder(tmp_path / "new")


def test_a_foreign_file_of_the_same_name_survives(tmp_path):
    out = tmp_path / "out"
    write(out, "one")
    (out / "extra").write_text("mine")
    with pytest.raises(OutputError, match="kept there"):
        write(out, "two", overwrite=True, extra="ours")
    assert (tmp_path / "out.old" / "extra").read_text() == "mine"


@pytest.mark.parametrize("existing", [False, True])
def test_disk_full_leaves_nothing_half_written(tmp_path, existing):
    out = tmp_path / "out"
    if existing:
        write(out, "one")
    with pytest.raises(OutputError, match="No space left"), OutputFolder(out, existing).writing() as partial:
        (partial / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == (["out"] if existing else [])
    if existing:
        assert (out / "model.safetensors").read_text() == "one"


def test_a_killed_write_is_cleaned_up_by_the_next(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), OutputFolder(out).writing() as partial:
        (partial / "half").write_text("half")
        raise KeyboardInterrupt
    write(out, "whole")
    assert names(out) == ["model.safetensors", MANIFEST]
    assert names(tmp_path) == ["out"]


def test_space_is_checked_beforehand(tmp_path):
    need_space(tmp_path / "a" / "b", 1)
    with pytest.raises(OutputError, match=r"GB free; about 1000000000\.00 GB are needed"):
        need_space(tmp_path / "a" / "b", 10**18)


def test_odd_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="no place for a model"):
        OutputFolder(Path("/"))
    write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "two", overwrite=True)
    assert (tmp_path / "real" / "model.safetensors").read_text() == "two"
    assert (tmp_path / "link").is_symlink()
