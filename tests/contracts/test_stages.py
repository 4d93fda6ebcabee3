"""What every stage keeps to, one from outside the package included."""

import json
import os
import subprocess
import sys
from typing import Annotated

import pytest
import torch
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM

import slimrank
from helpers import save_tiny, text
from slimrank.errors import RecipeError
from slimrank.models.load import skeleton
from slimrank.pipeline.forecast import Cost, Shape, expected_tokens
from slimrank.pipeline.prepare import Choices, Prepared
from slimrank.pipeline.stage import STAGES, Stage
from slimrank.pipeline.stages.save import Save
from slimrank.recipe import Recipe
from slimrank.report.section import Section
from slimrank.text.texts import WindowRequest

EVERYTHING = {
    "keep_ratio": 0.6, "method": "kfac_svd", "allocation": "lems", "refine": "regress", "corrections": 1,
    "correction_windows": 2, "samples": 4, "search_samples": 2, "seq_len": 24, "evaluation": None,
}  # fmt: skip


class Grid(BaseModel):
    step: Annotated[float, Field(gt=0)] = 0.25


class Rounding(Stage):
    """Round all factors to a grid."""

    id, title, settings = "rounding", "round factors", Grid

    def windows(self, choices):
        return [WindowRequest("rounding", 2, disjoint=True)]

    def cost(self, prepared, shape):
        return Cost(float32=shape.tokens["rounding"] * shape.parameters)

    def run(self, state):
        assert state.texts["rounding"].shape == (2, state.prepared.recipe.seq_len)
        store, rows = state.store(state.chained(self.id)), []
        for path in state.plan.factored():
            with state.timed(self.title, 1):
                for factor in state.model.get_submodule(path).parameters():
                    factor.data = (factor.data / self.options.step).round() * self.options.step
            rows.append((path, f"{self.options.step:.2f}"))
        store.save("rounded", {}, {"layers": len(rows)})
        return Section(stage=self.id, title="Rounded layers", columns=("layer", "step"), rows=rows, note="On a grid.")


@pytest.fixture
def rounding(monkeypatch):
    monkeypatch.setitem(STAGES.entries, Rounding.id, Rounding)


@pytest.fixture
def prepared(tmp_path):
    choices = Choices.of(Recipe.make({**EVERYTHING, "stages": {"rounding": {}}}))
    return Prepared.of(choices, skeleton(save_tiny(tmp_path / "tiny"), "auto").model)


ALL = [*(kind() for kind in STAGES.all().values()), Save(None), Rounding()]


@pytest.mark.parametrize("stage", ALL, ids=lambda stage: stage.id)
def test_every_stage_keeps_the_contract(stage, rounding, prepared):
    choices = prepared.choices
    stage.check(choices)
    windows = stage.windows(choices) if stage.wanted(choices) else []
    assert all(isinstance(request, WindowRequest) and request.count > 0 for request in windows)
    shape = Shape.of(prepared, expected_tokens(choices.requests, 24))
    if stage.wanted(choices):
        cost = stage.cost(prepared, shape)
        assert min(cost.float32, cost.float64, cost.products, cost.peak, cost.stored, cost.written) >= 0
    assert (stage.cost_before(prepared, shape) is None) == (not stage.before_title)
    assert stage.id
    assert stage.title
    json.dumps(stage.options.model_dump(mode="json"))


def test_names_of_stages_are_their_own(rounding, prepared):
    stages = prepared.choices.stages
    for names in ([s.id for s in stages], [s.title for s in stages]):
        assert len(set(names)) == len(names)
    assert [s.id for s in stages] == [
        "measure_before", "calibrate", "allocate", "refine", "correct", "rounding", "measure_after",
    ]  # fmt: skip


def test_a_stage_from_outside_runs_is_stored_saved_loaded_and_reported(rounding, tmp_path):
    (tmp_path / "text.txt").write_text(text())
    chosen = {"keep_ratio": 0.6, "method": "svd", "evaluation": None, "seq_len": 24, "samples": 2}
    chosen |= {"calibration": str(tmp_path / "text.txt"), "stages": {"rounding": {"step": 0.125}}}
    folder = save_tiny(tmp_path / "tiny")
    told = slimrank.preview(folder, **chosen)
    assert told["seconds"]["round factors"] > 0
    result = slimrank.compress(folder, out=tmp_path / "out", run_dir=tmp_path / "run", **chosen)
    path = next(iter(result.plan.factored()))
    factor = result.model.get_submodule(path).A.weight
    assert torch.equal(factor, (factor / 0.125).round() * 0.125)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_submodule(path).A.weight, factor)
    assert "round factors" in result.report["seconds"]
    (section,) = result.report["sections"]
    assert section["rows"][0] == [path, "0.12"]
    for name in ("report.md", "report.html"):
        shown = (tmp_path / "out" / name).read_text()
        assert "Rounded layers" in shown
        assert "On a grid." in shown


def test_stages_and_their_options_are_checked(rounding):
    with pytest.raises(RecipeError, match=r"no stage 'calibrate' that .*\n.*other options ask for it"):
        Choices.of(Recipe.make({"keep_ratio": 0.5, "stages": {"calibrate": {}}}))
    with pytest.raises(RecipeError, match=r"no stage 'roundin' that .*\n.*'rounding'"):
        Choices.of(Recipe.make({"keep_ratio": 0.5, "stages": {"roundin": {}}}))
    with pytest.raises(RecipeError, match="stage 'rounding' has no option 'stepp'"):
        Choices.of(Recipe.make({"keep_ratio": 0.5, "stages": {"rounding": {"stepp": 1}}}))
    with pytest.raises(RecipeError, match="option step of the stage 'rounding'"):
        Choices.of(Recipe.make({"keep_ratio": 0.5, "stages": {"rounding": {"step": 0}}}))


PLUGIN = """
from slimrank.pipeline.stage import STAGES, Stage


@STAGES.add
class Nothing(Stage):
    id, title = "nothing", "do nothing"

    def run(self, state):
        with state.timed(self.title, 1):
            pass
"""


def installed(folder, code):
    """A package with an entry point of the group `slimrank`, in a folder of installed packages."""
    (folder / "plugged.py").write_text(code)
    about = folder / "plugged-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[slimrank]\nplugged = plugged\n")


@pytest.mark.parametrize("works", [True, False])
def test_an_installed_package_brings_stages_to_the_command_line(works, tmp_path):
    installed(tmp_path, PLUGIN if works else "import nothing_of_this_name")
    command = [sys.executable, "-m", "slimrank", "compress", str(save_tiny(tmp_path / "tiny")), "--keep", "0.6"]
    command += ["--method", "svd", "--no-eval", "--stage", "nothing", "--out", str(tmp_path / "out"), "--json"]
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **paths})
    found = json.loads(done.stdout)
    if works:
        assert "do nothing" in found["seconds"]
    else:
        assert "the plug-in 'plugged' (plugged) cannot be imported" in found["error"]["message"]
        assert found["error"]["hint"] == "update or uninstall the package 'plugged'"
