import math

import pytest
import torch

from helpers import VOCABULARY, byte_tokenizer, tiny_model
from slimrank.errors import DataError, NonFiniteError
from slimrank.evaluate import perplexity as module
from slimrank.evaluate.memory import peak_memory
from slimrank.evaluate.perplexity import perplexity
from slimrank.evaluate.sample import sample
from slimrank.evaluate.speed import measure_speeds


def windows(count=5, length=20):
    return torch.randint(VOCABULARY - 3, (count, length), generator=torch.Generator().manual_seed(0))


def reference(model, ids):
    """In float64, token by token."""
    model = model.double()
    total = 0.0
    for row in ids.tolist():
        logits = model(input_ids=torch.tensor([row])).logits[0]
        for t in range(len(row) - 1):
            p = torch.softmax(logits[t], dim=0)[row[t + 1]]
            total -= math.log(float(p))
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma"])
def test_equals_a_float64_reference(name):
    model = tiny_model(name)
    result = perplexity(model, windows())
    assert result.tokens == 5 * 19
    with torch.no_grad():
        assert result.perplexity == pytest.approx(reference(model, windows()), rel=1e-5)
    assert math.exp(sum(result.nll) / 5) == pytest.approx(result.perplexity)


def test_grouping_of_windows_does_not_matter(monkeypatch):
    model = tiny_model()
    together = perplexity(model, windows())
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 1)
    assert perplexity(model, windows()).perplexity == pytest.approx(together.perplexity, rel=1e-6)


def test_the_training_flag_survives():
    model = tiny_model().train()
    perplexity(model, windows(1))
    assert model.training


def test_nan_names_the_layer_that_makes_it():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"window 0.*'model\.layers\.1\.mlp\.up_proj'"):
        perplexity(model, windows())


def test_a_perplexity_beyond_any_number():
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.register_forward_hook(lambda m, a, out: out * 1e6)
    with pytest.raises(NonFiniteError, match="beyond any number"):
        perplexity(model, windows(1))


def test_nothing_to_predict():
    with pytest.raises(DataError):
        perplexity(tiny_model(), windows(2, 1))


def test_speed_and_sample_and_memory():
    a, b = measure_speeds([tiny_model(), tiny_model("gpt2")], prompt=16, new_tokens=4, repeats=1)
    assert min(a.prefill, a.decode, b.prefill, b.decode) > 0
    shown = sample(tiny_model(), byte_tokenizer(), torch.tensor([256, *b"ab"]), new_tokens=3)
    assert shown["prompt"] == byte_tokenizer().decode(list(b"ab"))
    assert isinstance(shown["text"], str)
    assert peak_memory(torch.device("cpu")) > 50_000_000


def test_memory_of_an_accelerator_where_it_is_counted(monkeypatch):
    """Some versions of torch have the function, and raise for mps."""
    asked, host = [], peak_memory(torch.device("cpu"))

    def counted(device):
        asked.append(device)
        if device.type == "mps":
            raise RuntimeError("Allocator for mps is not a DeviceAllocator")
        return 2**50

    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", counted, raising=False)
    assert peak_memory(torch.device("cuda", 1)) == 2**50
    assert host <= peak_memory(torch.device("mps")) < 2**50
    assert asked == [torch.device("cuda", 1), torch.device("mps")]
