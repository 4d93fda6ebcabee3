import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from slimrank.checkpoint.output_folder import CARD, MANIFEST, OutputFolder, need_space, write_manifest
from slimrank.errors import OutputError
from slimrank.store import disk_error


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
    with pytest.raises(OutputError, match="cannot hold a model"):
        OutputFolder(Path("/"))
    write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "two", overwrite=True)
    assert (tmp_path / "real" / "model.safetensors").read_text() == "two"
    assert (tmp_path / "link").is_symlink()


def test_subfolders_are_ours_too(tmp_path):
    out = tmp_path / "out"
    for content in ("one", "two"):
        with OutputFolder(out, overwrite=True).writing() as partial:
            (partial / "templates").mkdir()
            (partial / "templates" / f"{content}.jinja").write_text(content)
            write_manifest(partial, {})
        if content == "one":
            assert "templates/one.jinja" in json.loads((out / MANIFEST).read_text())["files"]
            (out / "templates" / "mine.jinja").write_text("mine")
    assert names(out / "templates") == ["mine.jinja", "two.jinja"]
    assert names(tmp_path) == ["out"]


def test_an_equal_file_that_no_manifest_names_is_replaced(tmp_path):
    """As earlier versions left them: subfolders stood in no manifest."""
    out = tmp_path / "out"
    write(out, "one")
    for _ in range(2):
        with OutputFolder(out, overwrite=True).writing() as partial:
            (partial / "templates").mkdir()
            (partial / "templates" / "a.jinja").write_text("a")
            (partial / MANIFEST).write_text('{"files": {}, "reports": []}')
    assert (out / "templates" / "a.jinja").read_text() == "a"
    assert names(tmp_path) == ["out"]


def test_names_of_foreign_files_are_found_beforehand(tmp_path):
    out, files = tmp_path / "out", tmp_path / "files"
    write(out, "one")
    (files / "templates").mkdir(parents=True)
    (files / "model.safetensors").write_text("ours")
    (files / "templates" / "a.jinja").write_text("new")
    output = OutputFolder(out, overwrite=True)
    output.check_names(files)
    (out / "templates").mkdir()
    (out / "templates" / "a.jinja").write_text("new")
    output.check_names(files)
    (out / "templates" / "a.jinja").write_text("mine")
    with pytest.raises(OutputError, match=r"a\.jinja' was not written by slimrank"):
        output.check_names(files)


def test_a_rehearsal_leaves_nothing_behind(tmp_path):
    write(tmp_path / "out", "one")
    OutputFolder(tmp_path / "out", overwrite=True).rehearse()
    OutputFolder(tmp_path / "new" / "folder" / "out").rehearse()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["model.safetensors", MANIFEST]


def test_a_rehearsal_disturbs_no_other_process(tmp_path):
    with OutputFolder(tmp_path / "out").writing() as partial:
        (partial / "model.safetensors").touch()
        OutputFolder(tmp_path / "out").rehearse()
        assert (partial / "model.safetensors").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_what_cannot_be_renamed_is_found_beforehand(tmp_path, monkeypatch, existing):
    out = tmp_path / "new" / "out"
    if existing:
        write(out, "one")

    def refuse(self, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="busy") as raised:
        OutputFolder(out, overwrite=existing).rehearse()
    assert "resumes" not in raised.value.hint
    assert existing or not (tmp_path / "new").exists()


def test_mount_points_and_locked_folders_are_found_beforehand(tmp_path, monkeypatch):
    write(tmp_path / "out", "one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "out" / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name in ("empty", "disk"))
    for place, point in (("empty", "empty"), ("out", "disk")):
        with pytest.raises(OutputError, match=f"{point}' is a mount point"):
            OutputFolder(tmp_path / place, overwrite=True)
    monkeypatch.undo()
    for locked, message in (("out", "nothing can be removed from"), ("", "nothing can be written to")):
        monkeypatch.setattr(os, "access", lambda path, mode, locked=locked: Path(path) != tmp_path / locked)
        with pytest.raises(OutputError, match=message):
            OutputFolder(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {}}', '{"files": {"../other": 1}, "reports": []}'])
def test_a_damaged_manifest_is_found_beforehand(tmp_path, content):
    write(tmp_path / "out", "one")
    (tmp_path / "out" / MANIFEST).write_text(content)
    with pytest.raises(OutputError, match="does not say which files"):
        OutputFolder(tmp_path / "out", overwrite=True)


def test_what_is_left_of_the_old_output_is_said(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "one")

    def refuse(self, missing_ok=False):
        raise PermissionError(errno.EACCES, "Permission denied")

    folder, unlink, mark = OutputFolder(out, overwrite=True), Path.unlink, ".slimrank-partial"
    monkeypatch.setattr(Path, "unlink", lambda self, **k: (unlink if self.name == mark else refuse)(self, **k))
    with pytest.raises(OutputError, match=r"is written to .* cannot be removed"), folder.writing() as partial:
        (partial / "model.safetensors").write_text("two")
    assert (out / "model.safetensors").read_text() == "two"
    assert names(tmp_path) == ["out", "out.old"]


def test_names_that_no_disk_allows(tmp_path):
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(OutputError, match="cannot be written"):
            OutputFolder(tmp_path / name).rehearse()


def test_only_a_full_disk_lets_the_run_resume(tmp_path):
    for number, resumes in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False), (errno.EXDEV, False)):
        hint = disk_error(OSError(number, "x"), tmp_path).hint
        assert ("resumes" in hint) is resumes
    assert "resumes" in disk_error(SafetensorError("I/O error: No space left on device (os error 28)"), tmp_path).hint
