"""Which layers add to the residual stream, by layouts that are known."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig

from helpers import VOCABULARY, tiny_model
from slimrank.models.blocks import Batch, BlockRunner
from slimrank.models.residual_layers import residual_places
from slimrank.models.targets import find_targets

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def places(model, dtype=torch.float32, outlier=0.0):
    model = model.to(dtype)
    runner = BlockRunner(model, torch.device("cpu"), upcast=False, resident=False)
    ids = torch.randint(VOCABULARY - 3, (2, 16), generator=torch.Generator().manual_seed(0))
    layers = {t.path: model.get_submodule(t.path) for t in find_targets(model).in_block(1)}
    with runner.session():
        runner.embed([Batch(ids)])
        runner.step(0)
        runner.hidden[0][0, 0, 0] += outlier
        state = runner.states[0]
        found = residual_places(runner.blocks[1], layers, lambda: runner.run(1, 0, state).hidden, state.hidden)
    assert not any(layer._forward_hooks for layer in layers.values())
    return {path.partition(".1.")[2]: place for path, place in found.items()}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("llama", {"self_attn.o_proj": "entry", "mlp.down_proj": "exit"}),
        ("gemma", {"self_attn.o_proj": "entry", "mlp.down_proj": "exit"}),
        ("gpt2", {"attn.c_proj": "entry", "mlp.c_proj": "exit"}),
        ("opt", {"self_attn.out_proj": "entry", "fc2": "exit"}),
    ],
)
def test_blocks_that_add_twice(name, expected):
    assert places(tiny_model(name)) == expected


def test_a_coarser_dtype_changes_nothing():
    assert places(tiny_model("llama"), torch.bfloat16) == places(tiny_model("llama"))


def test_beside_an_outlier_answers_are_lost_in_rounding():
    """A massive activation, beside which bfloat16 does not see whether an answer was added."""
    assert places(tiny_model("llama"), torch.bfloat16, outlier=300.0) == places(tiny_model("llama"))


def test_experts_are_weighted_before_they_are_added():
    assert places(tiny_model("qwen3_moe")) == {"self_attn.o_proj": "entry"}


def test_parallel_attention_and_mlp_both_add_to_the_output():
    config = GPTNeoXConfig(**SMALL, num_hidden_layers=2, use_parallel_residual=True)
    found = places(AutoModelForCausalLM.from_config(config).eval())
    assert found == {"attention.dense": "exit", "mlp.dense_4h_to_h": "exit"}


def test_layers_before_a_norm_do_not_count():
    config = Gemma2Config(**SMALL, num_hidden_layers=2, num_key_value_heads=2, head_dim=8)
    assert places(AutoModelForCausalLM.from_config(config).eval()) == {}
