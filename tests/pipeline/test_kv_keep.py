"""`kv_keep` bounds the ranks of keys and values, whatever chooses the others."""

import warnings

import pytest

import slimrank
from helpers import byte_tokenizer, text, tiny_model
from slimrank.errors import PlanError, RecipeError

COMMON = {"calibration": [text()], "samples": 8, "seq_len": 32, "evaluation": None}
RANKS = ("k_proj", "v_proj")


def ranks(plan, names):
    return {t.rank for path, t in plan.targets.items() if path.rpartition(".")[2] in names}


@pytest.mark.parametrize(
    "more",
    [
        {"method": "svd"},
        {"method": "svd_llm", "allocation": "spectrum", "form": "pivot"},
        {"method": "svd_llm", "allocation": "spectrum", "store_form": "pivot"},
        {"method": "svd_llm", "quantize": "int8"},
    ],
)
def test_ranks_and_bytes_are_bounded(more):
    given = {"keep_ratio": 0.95, "kv_keep": 0.5, **COMMON, **more}
    result = slimrank.compress(tiny_model("llama"), byte_tokenizer(), **given)
    assert max(ranks(result.plan, RANKS)) <= 8  # of 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert slimrank.latent_cache(result.model).ordinary == {}
    found = result.report["kv_bytes"]
    angles = 2 * 8 * 4  # of each token, besides latents
    assert found["latent"]["4096"] <= 0.5 * found["dynamic"]["4096"] + 4096 * angles


def test_a_plan_tells_it(tiny_folder):
    record = slimrank.preview(tiny_folder, keep_ratio=0.95, kv_keep=0.5, method="svd", evaluation=None)
    found = record["kv_bytes"]
    assert found["latent"][4096] <= 0.5 * found["dynamic"][4096] + 4096 * 2 * 8 * 4


def test_without_it_they_may_be_larger():
    result = slimrank.compress(tiny_model("llama"), byte_tokenizer(), keep_ratio=0.95, method="svd", **COMMON)
    assert max(r for r in ranks(result.plan, RANKS) if r != "dense") > 8


def test_bounds_add_up():
    given = {"keep_ratio": 0.8, "method": "svd", "kv_keep": 0.5, **COMMON}
    result = slimrank.compress(tiny_model("llama"), byte_tokenizer(), ranks={"k_proj": "2..6"}, **given)
    assert ranks(result.plan, ("k_proj",)) <= {2, 3, 4, 5, 6}
    with pytest.raises(PlanError, match=r"kv_keep 0.5 allows 'model.layers.0.self_attn.k_proj' ranks up to 8"):
        slimrank.compress(tiny_model("llama"), byte_tokenizer(), ranks={"k_proj": "dense"}, **given)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(RecipeError, match="no target is called so"):
        slimrank.compress(tiny_model("gpt2"), byte_tokenizer(), keep_ratio=0.8, method="svd", kv_keep=0.5, **COMMON)
