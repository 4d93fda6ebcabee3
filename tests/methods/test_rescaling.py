"""One channel of every norm scaled and the next weights scaled back: the same function, with a massive activation."""

import pytest
import torch

from helpers import tiny_model
from method_runs import compress, logits

CHANNEL = 3


def scaled(factor):
    """A model of float64 whose norms give one channel `factor` times; what reads it has its weights divided."""
    model = tiny_model().double()
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            readers = {
                block.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
                block.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
            }
            for norm, layers in readers.items():
                norm.weight[CHANNEL] *= factor
                for layer in layers:
                    layer.weight[:, CHANNEL] /= factor
    return model


RECIPES = {
    "cut": {"method": "kfac_svd"},
    "refined": {"method": "kfac_svd", "refine": "regress", "refine_options": {"held_out": 0, "ridge": 0.01}},
    "ridge auto": {"method": "kfac_svd", "refine": "regress", "refine_options": {"held_out": 0, "ridge": "auto"}},
    "corrected": {"method": "kfac_svd", "corrections": 1, "correction_windows": 2, "search_samples": 2},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_scale_of_a_channel_does_not_matter(recipe):
    torch.testing.assert_close(logits(scaled(300.0)), logits(scaled(1.0)))
    found, expected = (logits(compress(scaled(k), **RECIPES[recipe]).model) for k in (300.0, 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_shrinkage_towards_the_identity_follows_the_largest_channel():
    """The rule of LEMS, which is an option."""
    options = {"method": "kfac_svd", "method_options": {"shrink_target": "identity"}}
    found, expected = (logits(compress(scaled(k), **options).model) for k in (300.0, 1.0))
    assert float((found - expected).abs().max()) > 1e-3
