"""Every command and every Python block of the README runs, here on a tiny model in the place of the demo model."""

import re
import shlex
from pathlib import Path

import pytest

from helpers import save_tiny, text
from slimrank.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {
    "compress": ["--samples", "4", "--windows", "2"],
    "plan": ["--samples", "4"],
    "demo": ["--samples", "4"],
    "evaluate": ["--windows", "2"],
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands():
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with what the README speaks of; `demo` is a tiny model."""
    tiny = save_tiny(tmp_path / "tiny")
    monkeypatch.setattr("slimrank.models.load.demo_folder", lambda progress=None: tiny)
    (tmp_path / "text.txt").write_text(text())
    (tmp_path / "held-out.txt").write_text(text(seed=1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs(folder, capsys, in_this_process):
    ran = []
    for words in commands():
        if words[0] == "slimrank":
            with pytest.raises(SystemExit) as stopped:
                main([*words[1:], *SHORT.get(words[1], [])])
            assert not stopped.value.code, (words, capsys.readouterr().err)
            ran.append(words[1])
    assert {"demo", "plan", "compress", "evaluate", "benchmark", "methods"} <= set(ran)


def test_other_commands_are_known():
    others = [words for words in commands() if words[0] != "slimrank"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for words in others:
        assert words[0] in ("make", "git", "cd", "pip"), words
        if words[0] == "make":
            assert words[1] in targets
    assert [w for w in others if w[0] == "make"] == [["make", "demo"], ["make", "test"]]
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_every_python_block_runs(folder, monkeypatch):
    import slimrank
    from slimrank.recipe import Recipe

    monkeypatch.setattr(Recipe.model_fields["samples"], "default", 4)
    monkeypatch.setattr(Recipe.model_fields["windows"], "default", 2)
    Recipe.model_rebuild(force=True)
    main_blocks = blocks("python")
    assert len(main_blocks) >= 2
    with pytest.raises(SystemExit):
        main(["compress", "demo", "--keep", "0.8", "--samples", "4", "--windows", "2", "--out", "smaller"])
    space = {}
    for block in main_blocks:
        exec(block, space)
    monkeypatch.undo()
    Recipe.model_rebuild(force=True)
    assert slimrank.Recipe().samples == 64


@pytest.mark.parametrize(
    "example, told",
    [("own_method.py", "diagonal"), ("own_allocation.py", "ends {'extra': 0.1}"), ("from_python.py", "perplexity")],
)
def test_examples_run(example, told, folder, capsys, monkeypatch):
    import runpy
    import sys

    from slimrank.methods.allocator import ALLOCATORS
    from slimrank.methods.decomposer import DECOMPOSERS

    for registry in (ALLOCATORS, DECOMPOSERS):
        monkeypatch.setattr(registry, "entries", registry.all())
    monkeypatch.setattr(sys, "argv", [example, "tiny"])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert told in capsys.readouterr().out


def test_every_example_has_its_line():
    page = (ROOT / "examples" / "README.md").read_text()
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == set(re.findall(r"\]\((\w+\.py)\)", page))


def test_every_method_has_a_page():
    from slimrank.methods.allocator import ALLOCATORS
    from slimrank.methods.decomposer import DECOMPOSERS
    from slimrank.methods.recoverer import RECOVERERS
    from slimrank.methods.refiner import REFINERS

    assert {p.stem for p in (ROOT / "docs" / "methods").glob("*.md")} == set(DECOMPOSERS.all())
    assert {p.stem for p in (ROOT / "docs" / "refine").glob("*.md")} == {"README", *REFINERS.all()}
    assert {p.stem for p in (ROOT / "docs" / "allocation").glob("*.md")} == {"README", *ALLOCATORS.all()}
    assert {p.stem for p in (ROOT / "docs" / "recover").glob("*.md")} == {"README", *RECOVERERS.all()}
