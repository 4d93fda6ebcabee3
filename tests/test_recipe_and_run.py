import subprocess
import sys

import pytest
import torch

from slimrank.cli.recipe_flags import recipe_flags
from slimrank.errors import OutputError, RecipeError, RunError
from slimrank.recipe import Recipe
from slimrank.recipe_presets import PRESETS
from slimrank.store import Run, content_key, remove_run


def test_one_schema_for_yaml_and_python(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("keep_ratio: 0.7\nmethod: svd\nignore: ['*.o_proj']\nevaluation: null\n")
    recipe = Recipe.make(Recipe.read(path))
    assert recipe == Recipe(keep_ratio=0.7, method="svd", ignore=("*.o_proj",), evaluation=None)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 3


@pytest.mark.parametrize(
    "content, message",
    [
        ("keep_ratoi: 0.5", "did you mean 'keep_ratio'"),
        ("keep_ratio: [", "is not YAML"),
        ("- a", "holds no options"),
        ("samples: -1", "samples: Input should be greater"),
        ("dtype: float8", "dtype"),
        ("max_shard_size: big", "max_shard_size"),
        ("ranks: {q_proj: 8..4}", "'8..4' for 'q_proj' leaves no rank: MIN is more than MAX"),
    ],
)
def test_bad_recipes(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(RecipeError, match=message):
        Recipe.read(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.read(tmp_path / "none.yaml")


def test_every_preset_is_a_valid_recipe():
    names = {p.stem for p in PRESETS.glob("*.yaml")}
    assert names == {"fast", "balanced", "best", "small"}
    for name in names:
        budget = {"max_bytes": 10**8} if name == "small" else {"keep_ratio": 0.8}
        Recipe.make({**Recipe.preset(name), **budget}).need_budget()
    defaults = Recipe()
    assert all(getattr(defaults, k) == v for k, v in Recipe.preset("balanced").items())


def test_without_a_method_it_is_the_balanced_preset():
    balanced = Recipe.preset("balanced")
    made = Recipe(keep_ratio=0.5)
    assert {k: getattr(made, k) for k in balanced} == balanced
    assert made.model_fields_set == {"keep_ratio"}
    assert Recipe.make({"keep_ratio": 0.5, "allocation": "uniform"}).method == balanced["method"]
    assert Recipe.merged(made, {}) == made


def test_a_method_is_a_method_by_itself():
    plain = {name: field.default for name, field in Recipe.model_fields.items()}
    for made in (Recipe(method="svd"), Recipe.merged(Recipe(keep_ratio=0.5), {"method": "svd"})):
        named = {"method", "keep_ratio"}
        assert {k: v for k, v in dict(made).items() if k not in named} == {
            k: v for k, v in plain.items() if k not in named
        }


def test_what_is_given_settles_what_depends_on_it():
    assert Recipe(plan="p.json").form == "pair"
    assert Recipe(keep_ratio=0.5, store_form="pivot").form == "pair"
    assert Recipe(keep_ratio=0.5, refine="none").refine is None
    assert Recipe(keep_ratio=0.5, allocation="lems").allocation_options == {}
    assert Recipe(keep_ratio=0.5, refine="update").refine_options == {}
    more = Recipe(keep_ratio=0.5, refine_options={"ridge": 0.5}).refine_options
    assert more == {**Recipe.preset("balanced")["refine_options"], "ridge": 0.5}
    more = Recipe(keep_ratio=0.5, method_options={"trim": 0.0}).method_options
    assert more == {**Recipe.preset("balanced").get("method_options", {}), "trim": 0.0}


@pytest.mark.parametrize("wrong", [None, [1], "row_shrink"])
def test_options_that_are_no_mapping(wrong):
    with pytest.raises(RecipeError, match="method_options"):
        Recipe.make({"keep_ratio": 0.5, "method_options": wrong})


def test_every_option_is_described():
    assert all(field.description for field in Recipe.model_fields.values())


def test_former_names_are_accepted(tmp_path):
    (tmp_path / "r.yaml").write_text("keep_ratio: 0.5\nfactor_form: pair\nsecondary: pivot\n")
    options = Recipe.read(tmp_path / "r.yaml")
    assert options == {"keep_ratio": 0.5, "form": "pair", "store_form": "pivot"}
    recipe = Recipe(keep_ratio=0.5, factor_form="pair", secondary="pivot")
    assert recipe == Recipe.make(options) == Recipe.merged(Recipe(keep_ratio=0.5), options)
    assert (recipe.factor_form, recipe.secondary, recipe.stored_as) == ("pair", "pivot", "pivot")
    assert not {"factor_form", "secondary"} & recipe.described().keys()
    assert recipe_flags(keep_ratio=0.5, factor_form="pair", secondary="pivot") == options


def test_an_option_under_both_its_names_is_refused():
    given = {"keep_ratio": 0.5, "form": "pair", "factor_form": "pivot"}
    for attempt in (Recipe.make, lambda options: recipe_flags(**options)):
        with pytest.raises(RecipeError, match="'factor_form' is the former name of 'form'"):
            attempt(given)


def test_key_changes_with_every_part():
    parts = {"model": "a", "method": "svd", "seed": 0}
    keys = {content_key(parts)} | {content_key({**parts, k: "x"}) for k in parts}
    assert len(keys) == 4
    assert content_key(dict(reversed(parts.items()))) == content_key(parts)


def test_store_round_trip_and_damage(tmp_path):
    stage = Run(tmp_path / "run", {"a": 1}).store({"method": "svd"})
    assert not stage.has("x")
    tensors = {"t": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).t()}
    stage.save("x", tensors, {"about": [1, "two"]})
    loaded, about = Run(tmp_path / "run", {"a": 1}).store({"method": "svd"}).load("x")
    assert torch.equal(loaded["t"], tensors["t"])
    assert about == {"about": [1, "two"]}
    path = next((tmp_path / "run" / "store").rglob("x.safetensors"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RunError, match="cannot be read"):
        stage.load("x")


def test_one_process_at_a_time_in_a_run_directory(tmp_path):
    with Run(tmp_path / "run", {}):
        folder = f"Path({str(tmp_path / 'run')!r})"
        code = f"from pathlib import Path; from slimrank.store import Run; Run({folder}, {{}}).__enter__()"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another slimrank is at work" in found.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    with Run(tmp_path / "run", {}), Run(tmp_path / "run", {}):  # one process may, as notebooks do
        pass
    remove_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_directories_guard_their_inputs(tmp_path):
    Run(tmp_path / "run", {"model": "a", "text": "b"})
    with pytest.raises(RunError, match="text: b, now c"):
        Run(tmp_path / "run", {"model": "a", "text": "c"})
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(OutputError, match="cannot be used"):
        Run(tmp_path / "run", {})
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        Run(tmp_path / "file" / "run", {})
