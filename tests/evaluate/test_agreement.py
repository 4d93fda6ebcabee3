import math

import pytest
import torch

from helpers import VOCABULARY, tiny_model
from slimrank.errors import DataError, ModelError, NonFiniteError
from slimrank.evaluate import perplexity as perplexity_module
from slimrank.evaluate.agreement import agreement
from slimrank.evaluate.perplexity import perplexity
from slimrank.models import divergence


def windows(count=5, length=20):
    return torch.randint(VOCABULARY - 3, (count, length), generator=torch.Generator().manual_seed(0))


def near(model, by=0.05):
    """The same model, moved a little."""
    generator = torch.Generator().manual_seed(1)
    moved = tiny_model(model)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * by)
    return moved


@torch.no_grad()
def reference(model, dense, ids):
    """Whole logits in float64, position by position: KL in nats a token, and the percent of equal first choices."""
    model, dense = model.double(), dense.double()
    kl, same, count = 0.0, 0, 0
    for row in ids.tolist():
        q, p = (torch.softmax(m(input_ids=torch.tensor([row])).logits[0], dim=-1) for m in (model, dense))
        for t in range(len(row) - 1):
            kl += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p[t], q[t], strict=True))
            same += int(p[t].argmax() == q[t].argmax())
            count += 1
    return kl / count, 100 * same / count


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equals_a_float64_reference(name):
    model, dense = near(name, 0.02), tiny_model(name)
    found = agreement(model, dense, windows())
    kl, top1 = reference(model, dense, windows())
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.top1 == pytest.approx(top1)
    assert 0 < found.top1 < 100


def test_it_is_the_divergence_from_the_dense_model_and_not_the_other_way():
    model, dense = near("llama", 0.2), tiny_model()
    there, back = agreement(model, dense, windows()).kl, agreement(dense, model, windows()).kl
    assert there == pytest.approx(reference(model, dense, windows())[0], rel=1e-4)
    assert abs(there - back) > 0.01 * there


def test_perplexities_are_those_measured_alone():
    model, dense = near("llama"), tiny_model()
    found = agreement(model, dense, windows(), bos=True)
    assert found.model == perplexity(model, windows(), bos=True)
    assert found.dense == perplexity(dense, windows(), bos=True)


def test_a_model_agrees_with_itself():
    found = agreement(tiny_model(), tiny_model(), windows())
    assert (found.kl, found.top1) == (0.0, 100.0)


def test_parts_do_not_matter(monkeypatch):
    model, dense = near("llama"), tiny_model()
    whole = agreement(model, dense, windows())
    monkeypatch.setattr(perplexity_module, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(divergence, "CACHED", 1)
    parts = agreement(model, dense, windows())
    assert parts.kl == pytest.approx(whole.kl, rel=1e-5)
    assert parts.top1 == whole.top1


def test_what_is_computed_of_logits_stays_small(monkeypatch):
    """Log-probabilities are made for so many positions that they hold at most `CACHED` numbers."""
    from slimrank.evaluate import agreement as module

    sizes = []
    monkeypatch.setattr(divergence, "CACHED", 3 * VOCABULARY)
    monkeypatch.setattr(module, "log_softmax", lambda z, dim: sizes.append(len(z)) or torch.log_softmax(z, dim))
    agreement(tiny_model(), tiny_model(), windows(2, 20))
    assert max(sizes) == 3
    assert sum(sizes) == 2 * 2 * 19


def test_training_flags_survive():
    model, dense = tiny_model().train(), tiny_model()
    agreement(model, dense, windows(1))
    assert model.training
    assert not dense.training


def test_other_vocabularies_are_refused():
    with pytest.raises(ModelError, match=r"259 and 300"):
        agreement(tiny_model(), tiny_model(vocab_size=300), windows())


def test_nothing_to_predict():
    with pytest.raises(DataError):
        agreement(tiny_model(), tiny_model(), windows(2, 1))


def test_logits_that_are_no_numbers():
    broken = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="lm_head"):
        agreement(tiny_model(tie_word_embeddings=False), broken, windows())
    masking = tiny_model(tie_word_embeddings=False)
    masking.lm_head.register_forward_hook(lambda m, a, out: out.index_fill(-1, torch.tensor([258]), -math.inf))
    with pytest.raises(NonFiniteError, match="infinite"):
        agreement(masking, tiny_model(tie_word_embeddings=False), windows())
