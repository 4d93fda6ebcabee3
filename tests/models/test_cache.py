"""A model continues from its cache, under the name that this version of transformers gives to it."""

import pytest
import torch
from torch import nn

from architectures import random_model
from slimrank.models.cache import NAMES, cache_bytes, next_inputs

IDS = torch.arange(24).reshape(2, 12)


class Named(nn.Module):
    """A model that knows its cache by one name, and calls it by another in what it returns."""

    def __init__(self, taken):
        super().__init__()
        exec(f"def forward(input_ids, {taken}=None, use_cache=None): pass", space := {})
        self.forward = space["forward"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "mamba"])
def test_it_goes_on_as_if_it_read_all(name):
    model = random_model(name)
    with torch.no_grad():
        inputs, expected = {"input_ids": IDS[:, :8]}, model(input_ids=IDS, use_cache=False).logits
        for end in range(8, 12):
            output = model(**inputs, use_cache=True)
            torch.testing.assert_close(output.logits[:, -1], expected[:, end - 1], rtol=1e-4, atol=1e-4)
            inputs = next_inputs(model, output, IDS[:, : end + 1])
            assert inputs["input_ids"].shape == (2, 1)


@pytest.mark.parametrize("taken", NAMES)
@pytest.mark.parametrize("returned", NAMES)
def test_the_name_is_that_of_forward(taken, returned):
    inputs = next_inputs(Named(taken), {"logits": None, returned: "cache"}, IDS)
    assert inputs.keys() == {"input_ids", taken}
    assert inputs[taken] == "cache"


@pytest.mark.parametrize("output", [{"logits": None}, {"logits": None, "past_key_values": None}])
def test_without_a_cache_all_is_read_again(output):
    assert next_inputs(Named("past_key_values"), output, IDS) == {"input_ids": IDS}
    assert next_inputs(Named("state"), {"state": 1}, IDS) == {"input_ids": IDS}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_bytes_of_the_cache_are_those_of_its_tensors(name):
    model = random_model(name)
    config, expected = model.config, 0
    if name == "llama":
        expected = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * IDS.numel() * 4
    elif name == "gpt2":
        expected = 2 * config.n_layer * config.n_embd * IDS.numel() * 4
    else:
        states = config.intermediate_size * (config.state_size + config.conv_kernel)
        expected = config.num_hidden_layers * states * len(IDS) * 4
    assert cache_bytes(model(input_ids=IDS, use_cache=True)) == expected
    assert cache_bytes(model(input_ids=IDS, use_cache=False)) == 0
