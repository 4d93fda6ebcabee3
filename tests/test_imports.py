"""Imports point one way, and importing slimrank costs next to nothing."""

import ast
import importlib
import pkgutil
import statistics
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import slimrank
from helpers import byte_tokenizer, tiny_model

ROOT = Path(slimrank.__file__).parent
BASE = {"errors", "processes", "progress", "registry", "options", "_version"}
ALLOWED = {  # package -> packages it may import, besides itself and BASE
    "linalg": set(),
    "layers": {"linalg"},
    "store": set(),
    "budget": {"layers", "linalg"},
    "recipe": {"budget", "linalg", "recipe_fields", "recipe_presets", "recipe_values"},
    "recipe_fields": {"budget", "recipe_values"},
    "recipe_presets": set(),
    "recipe_values": {"layers", "linalg"},
    "statistics": {"layers", "linalg"},
    "methods": {"budget", "layers", "linalg", "statistics"},
    "checkpoint": {"layers", "linalg", "store"},
    "converting": {"checkpoint", "layers", "models", "store"},
    "hub": {"checkpoint"},
    "models": {"layers", "linalg", "checkpoint"},
    "text": {"linalg", "models", "recipe"},
    "evaluate": {"exporting", "layers", "models", "serving", "text"},
    "exporting": {"checkpoint", "layers", "models", "store"},
    "recovery": {
        "checkpoint",
        "evaluate",
        "layers",
        "methods",
        "models",
        "report",
        "store",
        "text",
    },
    "report": {"budget", "models", "recipe", "store"},
    "serving": {"layers", "linalg"},
}
ANYTHING = {"cli", "pipeline", "correcting", "narrowing", "doctor", "comparison", "__init__", "__main__"}


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


def parsed(path):
    return ast.parse(path.read_text())


def modules_of(path):
    """Names of the modules that a file imports, relative ones with their dots."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


LOADER = [ROOT / "checkpoint" / f"{name}_slimrank.py" for name in ("configuration", "code", "modeling", "few_bits")]
FOLDERS = [ROOT / "layers", ROOT / "linalg"]
COPIED_LAYERS = [p for folder in FOLDERS for p in folder.glob("*.py") if "Copied into" in ast.get_docstring(parsed(p))]
COPIED_NAMES = {f"slimrank.{path.parent.name}.{path.stem}" for path in COPIED_LAYERS}
MORE = {  # what the layers of a file need besides torch
    "quantized": {"compressed_tensors"},
    "latent_cache": {"transformers"},
    "latent_layer": {"transformers"},
}


@pytest.mark.parametrize("path", COPIED_LAYERS, ids=lambda path: path.stem)
def test_layers_that_go_into_saved_models_need_nothing_but_torch(path):
    found = {module.split(".")[0] for module in modules_of(path) if module not in COPIED_NAMES}
    assert found <= sys.stdlib_module_names | {"torch"} | MORE.get(path.stem, set())


@pytest.mark.parametrize("path", LOADER, ids=lambda path: path.stem)
def test_the_loader_in_saved_models_needs_nothing_but_transformers(path):
    found = {module.split(".")[0] for module in modules_of(path) if module not in COPIED_NAMES}
    assert found <= sys.stdlib_module_names | {"torch", "transformers", ""}  # "": .configuration_slimrank


def test_all_code_in_a_saved_model_is_looked_at(tmp_path):
    slimrank.compress(tiny_model(), byte_tokenizer(), keep_ratio=0.6, method="svd", evaluation=None, out=tmp_path / "o")
    written = {path.name for path in (tmp_path / "o").glob("*.py")}
    names = {path.name for path in LOADER} | {path.name for path in COPIED_LAYERS}
    assert {*(path.name for path in LOADER), "base.py", "transforms.py", "factors.py", "low_rank.py"} == written
    assert written <= names
    table = (ROOT.parents[1] / "docs" / "saved-models.md").read_text()
    assert not [name for name in names | {path.name for path in (tmp_path / "o").iterdir()} if f"`{name}`" not in table]


def test_files_stay_short():
    long = {str(p): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 300}
    assert not long


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def parameters_of(function):
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [parameter.arg for parameter in named if parameter.arg not in ("self", "cls")]


def test_functions_take_six_parameters_at_most():
    """Commands are exempt: each of their parameters is a flag."""
    paths = [path for path in ROOT.rglob("*.py") if room_of(path) != "cli"]
    many = [f"{path.name}: {f.name}" for path in paths for f in functions(path) if len(parameters_of(f)) > 6]
    assert not many


def test_the_median_function_is_short():
    lengths = [f.end_lineno - f.lineno + 1 for path in ROOT.rglob("*.py") for f in functions(path)]
    assert statistics.median(lengths) < 10


def imported_at_once(path):
    """Modules of slimrank that importing a file imports: not those inside functions, nor those for types alone."""
    tree = ast.parse(path.read_text())
    guarded = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    for node in (n for n in tree.body if n not in guarded):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slimrank"):
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_no_module_imports_itself_by_way_of_others():
    paths = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts): p for p in ROOT.rglob("*.py")}
    graph = {name: {other for other in imported_at_once(path) if other in paths} for name, path in paths.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


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


def test_the_help_of_slimrank_reads_no_recipe():
    program = """
import sys
from slimrank.cli import main
try:
    main(["--help"])
finally:
    assert not {"torch", "pydantic", "slimrank.recipe"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(f" {name} " in result.stdout for name in ("compress", "plan", "doctor"))


def test_extras_are_optional():
    """Every module imports where only the core dependencies are to be had."""
    program = """
import importlib, pkgutil, sys
missing = "gguf datasets pyarrow peft pandas matplotlib lm_eval openvino nncf onnx onnx_ir onnxscript onnxruntime"
for name in missing.split():
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
