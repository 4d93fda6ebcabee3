"""Imports point one way, and importing slimrank costs next to nothing."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import slimrank

ROOT = Path(slimrank.__file__).parent
BASE = {"errors", "progress", "registry", "options", "_version"}
ALLOWED = {  # room -> rooms it may know, besides itself and BASE
    "linalg": set(),
    "layers": {"linalg"},
    "run": set(),
    "recipe": {"allocate"},
    "statistics": {"layers", "linalg"},
    "decompose": {"linalg", "statistics"},
    "refine": {"linalg"},
    "allocate": {"linalg"},
    "export": {"layers", "linalg", "run"},
    "models": {"layers", "linalg", "export"},
    "calibration": {"linalg", "models"},
    "evaluate": {"models"},
    "report": {"run", "recipe", "allocate", "models"},
    "estimate": {"models"},
    "inputs": {"calibration", "models", "recipe"},
    "sizes": {"allocate", "linalg", "models", "recipe"},
    "planning": {"allocate", "decompose", "estimate", "linalg", "models", "recipe", "refine", "sizes"},
    "evaluation": {"calibration", "evaluate", "inputs", "models"},
}
ANYTHING = {"cli", "pipeline", "dry_run", "doctor", "comparison", "__init__", "__main__"}


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slimrank"):
            yield [*node.module.split("."), "__init__"][1]
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("slimrank."))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    room = room_of(path)
    if room in ANYTHING:
        return
    allowed = ALLOWED.get(room, set()) | BASE | {room}
    assert set(imported_rooms(path)) <= allowed


@pytest.mark.parametrize("name", ["low_rank", "pivot", "experts"])
def test_layers_that_go_into_saved_models_need_nothing_but_torch(name):
    tree = ast.walk(ast.parse((ROOT / "layers" / f"{name}.py").read_text()))
    modules = [[node.module] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names]
               for node in tree if isinstance(node, (ast.Import, ast.ImportFrom))]  # fmt: skip
    assert {m.split(".")[0] for found in modules for m in found} <= {"__future__", "typing", "torch"}


def test_files_stay_short():
    long = {str(p): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_every_module_imports():
    for module in pkgutil.walk_packages(slimrank.__path__, "slimrank."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def test_every_public_name_is_there():
    for name in slimrank.__all__:
        assert getattr(slimrank, name) is not None
    assert set(slimrank.__all__) <= set(dir(slimrank))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = slimrank.nonsense


def test_importing_is_light_and_changes_nothing():
    program = """
import os, random, sys, time
before, state = set(sys.modules), random.getstate()
start = time.perf_counter()
import slimrank
seconds = time.perf_counter() - start
heavy = {"torch", "transformers", "numpy", "scipy", "rich", "typer"} & set(sys.modules)
assert not heavy, heavy
assert random.getstate() == state
assert seconds < 0.3, seconds
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_extras_are_optional():
    """Every module imports where only the core dependencies are to be had."""
    program = """
import importlib, pkgutil, sys
for name in ("gguf", "datasets", "pyarrow", "peft", "pandas", "matplotlib", "lm_eval"):
    sys.modules[name] = None
import slimrank
for module in pkgutil.walk_packages(slimrank.__path__, "slimrank."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_no_cuda_outside_the_device_module():
    for path in ROOT.rglob("*.py"):
        assert "torch.cuda" not in path.read_text(), path
