"""What `export` says where the engine is missing or too old, and of arguments; none of this needs an engine."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from architectures import random_model
from helpers import tiny_model
from slimrank.cli import main
from slimrank.errors import MissingExtraError, ModelError, RecipeError, SlimrankError
from slimrank.exporting import engine
from slimrank.exporting.api import export
from slimrank.exporting.cached_step import CacheShape, cached_step
from slimrank.exporting.onnx.runner import OnnxModel
from slimrank.exporting.openvino.runner import OpenVinoModel


def versions(monkeypatch, found):
    def version(name):
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(engine.metadata, "version", version)


@pytest.mark.parametrize("options, message", [({"to": "openvinoo"}, "engine"), ({"weights": "int3"}, "int3")])
def test_unknown_arguments(tmp_path, options, message):
    with pytest.raises(RecipeError, match=message) as raised:
        export("nowhere", tmp_path / "out", **options)
    assert "did you mean" in raised.value.hint


@pytest.mark.parametrize("to, runner", [("openvino", OpenVinoModel), ("onnx", OnnxModel)])
def test_no_engine(monkeypatch, tmp_path, tiny_folder, capsys, to, runner):
    versions(monkeypatch, None)
    with pytest.raises(MissingExtraError) as raised:
        export(tiny_folder, tmp_path / "out", to=to)
    assert f"slimrank[{to}]" in raised.value.hint
    with pytest.raises(MissingExtraError, match="running an exported model"):
        runner(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tiny_folder), "--to", to, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 1
    assert f"pip install 'slimrank[{to}]'" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("to, old, needed", [("openvino", "2025.1.0", r"2026\.4"), ("onnx", "1.16.0", r"1\.23")])
def test_an_engine_that_is_too_old(monkeypatch, tmp_path, to, old, needed):
    versions(monkeypatch, old)
    with pytest.raises(SlimrankError, match=rf"needs {to} {needed} or newer; {old} is installed") as raised:
        export("nowhere", tmp_path / "out", to=to)
    assert f"--upgrade 'slimrank[{to}]'" in raised.value.hint


@pytest.mark.parametrize("extra", engine.LEAST)
def test_the_extra_asks_for_what_was_tried(extra):
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    stated = re.search(rf"^{extra} = \[(.*)\]", text, flags=re.MULTILINE).group(1)
    found = [Requirement(part) for part in re.findall(r'"([^"]+)"', stated)]
    tried = {name.replace("_", "-"): f">={least}" for name, least in engine.LEAST[extra].items()}
    assert {requirement.name: str(requirement.specifier) for requirement in found} == tried


def test_an_unknown_precision(tmp_path):
    with pytest.raises(RecipeError, match="precision"):
        OpenVinoModel(tmp_path, precision="int8")


@pytest.mark.parametrize("to, runner", [("openvino", OpenVinoModel), ("onnx", OnnxModel)])
def test_a_folder_that_holds_no_exported_model(monkeypatch, tmp_path, to, runner):
    monkeypatch.setattr(f"slimrank.exporting.{to}.runner.need", lambda *_: None)
    with pytest.raises(ModelError, match=r"model\.(xml|onnx) is missing"):
        runner(tmp_path)


@pytest.mark.parametrize("runner", ["OpenVinoModel", "OnnxModel"])
def test_the_runner_needs_no_torch(runner):
    program = f"import sys, slimrank; slimrank.{runner}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_step_takes_and_gives_the_cache_as_tensors():
    import torch

    model = tiny_model()
    step = cached_step(model)
    assert step.shape.names("past")[:3] == ["past.0.key", "past.0.value", "past.1.key"]
    ids = torch.arange(10).view(1, 10)
    empty = step.shape.example(1, 0, torch.float32)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        places = torch.arange(10)[None]
        first, *cache = step(ids[:, :6], torch.ones(1, 6, dtype=torch.long), places[:, :6], *empty)
        then, *_ = step(ids[:, 6:], torch.ones(1, 10, dtype=torch.long), places[:, 6:], *cache)
    assert torch.allclose(torch.cat([first, then], 1), whole, atol=1e-5)
    assert CacheShape((True,), ((2, 8), (2, 4))).example(3, 5, torch.float32)[1].shape == (3, 2, 5, 4)


@pytest.mark.parametrize("name", ["mamba", "mixtral", "deepseek_v3"])
def test_architectures_that_a_trace_does_not_follow(name):
    with pytest.raises(ModelError, match="cannot be exported") as raised:
        cached_step(random_model(name))
    assert raised.value.hint
