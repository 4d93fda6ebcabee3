"""Bytes of caches by formula are those that caches take."""

import warnings

import pytest
import torch
from transformers import DynamicCache

import slimrank
from architectures import random_model
from helpers import factored
from slimrank.layers.latent_cache import cache_name
from slimrank.layers.rotations import Rotations
from slimrank.models.cache import cache_bytes
from slimrank.models.kv_bytes import TOKENS, kv_bytes, planned_ranks

READ = 40
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "glm", "gpt2", "phi3", "falcon", "opt", "mistral", "stablelm"]


def taken(model, cache):
    """Return the bytes of a cache after some tokens of one text."""
    with torch.no_grad():
        output = model(input_ids=torch.zeros(1, READ, dtype=torch.long), **{cache_name(model): cache})
    sliding = [layer for layer in cache.layers if layer.is_sliding]  # holds a part of what came in, until the next step
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    angles = sum(each.cos.nbytes + each.sin.nbytes for each in getattr(cache, "rotations", Rotations()).all)
    assert sliding or held + angles == cache_bytes(output)
    return held + angles


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_those_of_caches(name, monkeypatch):
    monkeypatch.setattr("slimrank.models.kv_bytes.TOKENS", (READ,))
    model = factored(random_model(name, num_hidden_layers=3))
    found = kv_bytes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        latent = [slimrank.latent_cache(model, int8) for int8 in (False, True)]
    assert found["dynamic"][READ] == taken(model, DynamicCache(config=model.config))
    assert [found[each][READ] for each in ("latent", "latent-int8")] == [taken(model, cache) for cache in latent]


def test_a_model_without_weights_and_planned_ranks():
    with torch.device("meta"):
        model = random_model("llama")
    side = "model.layers.{}.self_attn.{}"
    forms = {side.format(b, name): ("pivot", 5) for b in (0, 1) for name in ("k_proj", "v_proj")}
    found = kv_bytes(model, planned_ranks(forms))
    assert found == kv_bytes(factored(random_model("llama"), "pivot"))
    assert list(found["latent"]) == list(TOKENS)
    assert found["dynamic"][4096] == 4096 * found["dynamic"][1] == 4096 * 2 * 2 * 16 * 4
    assert found["int8"][4096] == 4096 * 2 * 2 * 16 * (1 + 4 / 64)
    assert found["int4"][4096] == 4096 * 2 * 2 * 16 * (0.5 + 4 / 64)
    others = {side.format(0, "k_proj"): ("residual:int3-g64", 4), side.format(0, "v_proj"): ("pair", "dense")}
    assert planned_ranks(others) == {}
    assert planned_ranks({"a": ("pair:int4-g64", 8)}) == {"a": 8}


@pytest.mark.parametrize("name", ["deepseek_v3", "mamba"])
def test_caches_of_something_else_are_not_counted(name):
    assert kv_bytes(random_model(name)) is None
