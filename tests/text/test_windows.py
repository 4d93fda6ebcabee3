import pytest
import torch

from helpers import byte_tokenizer, tiny_model
from slimrank.errors import DataError, NonFiniteError
from slimrank.text.self_sampling import sample_windows
from slimrank.text.tokens import bos_of
from slimrank.text.windows import (
    count_windows,
    draw_apart,
    draw_spread,
    draw_windows,
    leading_windows,
    tokens_digest,
)

TOKENS = torch.arange(100)


def test_windows_are_drawn_over_all_positions():
    windows = draw_windows(TOKENS, 4000, 10, seed=0)
    assert windows.shape == (4000, 10)
    assert bool((windows.diff(dim=1) == 1).all())
    starts = torch.bincount(windows[:, 0], minlength=91)
    assert len(starts) == 91
    assert int(starts.min()) > 0
    assert float(starts.float().std()) < 12  # uniform: mean 44, deviation 6.6


def test_the_seed_decides():
    state = torch.get_rng_state()
    a, b = draw_windows(TOKENS, 5, 10, seed=1), draw_windows(TOKENS, 5, 10, seed=1)
    assert torch.equal(a, b)
    assert not torch.equal(a, draw_windows(TOKENS, 5, 10, seed=2))
    assert torch.equal(state, torch.get_rng_state())
    assert tokens_digest(a) == tokens_digest(b) != tokens_digest(a.reshape(10, 5))


def test_leading_windows():
    assert leading_windows(TOKENS, 3, 20).tolist() == TOKENS[:60].reshape(3, 20).tolist()
    assert count_windows(TOKENS, 20) == 5
    with pytest.raises(DataError, match=r"100 tokens; 6 window\(s\) of 20 need 120"):
        leading_windows(TOKENS, 6, 20)
    with pytest.raises(DataError, match="100 tokens"):
        draw_windows(TOKENS, 1, 101, seed=0)


@pytest.mark.parametrize("count", [1, 7, 60, 100])
def test_windows_spread_evenly(count):
    """One in each of equal parts of the text; as many as it is long leave little of it out."""
    tokens = torch.arange(3000)
    windows = draw_spread(tokens, count, ([], 0), 30, seed=1)
    assert windows.shape == (count, 30)
    places = 3000 - 30 + 1
    edges = torch.arange(count + 1) * places / count
    assert ((windows[:, 0] >= edges[:-1].long()) & (windows[:, 0] <= edges[1:])).all()
    assert torch.equal(windows, windows[:, :1] + torch.arange(30))
    assert torch.equal(windows, draw_spread(tokens, count, ([], 0), 30, seed=1))


def test_spread_windows_keep_off_those_of_other_uses():
    tokens = torch.arange(3000)
    others, _ = draw_apart(tokens, [5, 3], 4, 30, seed=1)
    windows = draw_spread(tokens, 80, ([5, 3], 4), 30, seed=1)
    assert not set(windows.flatten().tolist()) & {t for some in others for t in some.flatten().tolist()}
    assert draw_spread(torch.arange(40), 9, ([5, 3], 4), 30, seed=1, bos=7).shape == (0, 30)


def test_no_more_spread_windows_than_fit():
    """Against a greedy count by hand."""
    for counts, seed in (([], 0), ([5, 3], 1), ([20, 9], 2)):
        free = torch.ones(3000, dtype=torch.bool)
        for windows in draw_apart(torch.arange(3000), counts, 4, 30, seed)[0]:
            free[windows.flatten()] = False
        fit = start = 0
        while start <= 2970:
            room = bool(free[start : start + 30].all())
            fit, start = fit + room, start + (30 if room else 1)
        assert len(draw_spread(torch.arange(3000), 500, (counts, 4), 30, seed)) == fit
    assert len(draw_spread(torch.arange(3000), 500, ([], 0), 30, seed=1).unique()) > 0.6 * 3000


def test_bos_stands_before_every_window():
    assert bos_of(byte_tokenizer(bos=True)) == 256
    assert bos_of(byte_tokenizer()) is None
    windows = leading_windows(TOKENS, 3, 20, bos=256)
    assert windows[:, 0].tolist() == [256] * 3
    assert windows[:, 1:].flatten().tolist() == list(range(57))
    assert draw_windows(TOKENS, 2, 101, 0, bos=256).shape == (2, 101)


def test_the_model_samples_its_own_text():
    model, tokenizer = tiny_model(), byte_tokenizer()
    state = torch.get_rng_state()
    a = sample_windows(model, tokenizer, 3, 12, seed=0)
    assert a.shape == (3, 12)
    assert a[:, 0].tolist() == [256] * 3
    assert torch.equal(a, sample_windows(model, tokenizer, 3, 12, seed=0))
    assert not torch.equal(a, sample_windows(model, tokenizer, 3, 12, seed=1))
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(NonFiniteError):
        sample_windows(model, tokenizer, 1, 4, seed=0)


def test_sampling_follows_the_model():
    """A model certain of its next token writes that token."""
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
    logits = torch.zeros(259)
    logits[65] = 50.0
    model.lm_head.register_forward_hook(lambda m, a, out: logits.expand_as(out))
    assert sample_windows(model, byte_tokenizer(), 2, 6, seed=0)[:, 1:].unique().tolist() == [65]
