"""Statistics of every architecture: the same for any batch size, streamed or resident, and those of plain autograd."""

import pytest
import torch
from test_gradients import close, ids, resident, row_gram, streamed
from torch.nn.functional import cross_entropy

from architectures import ARCHITECTURES, UNUSUAL, random_model
from slimrank.errors import ModelError
from slimrank.layers.dense import weight_of
from slimrank.layers.experts import unfuse
from slimrank.models.blocks import Batch
from slimrank.models.targets import find_targets
from slimrank.statistics.catalogue import GatherOptions

WINDOWS, TOKENS = 5, 10
NAMES = [*ARCHITECTURES, *(name for name in UNUSUAL if name != "zaya")]  # a layer of it is refused: see below
NEEDS = {"gram", "channels", "row", "weight_squares", "gradients", "slope"}
PLAIN = GatherOptions(needs=NEEDS, accumulate=1, trim=0, clip=None)
TRIMMED = GatherOptions(needs=NEEDS, accumulate=2, trim=0.2, clip=(0.7, 1.2))


def model_of(name):
    model = random_model(name)
    unfuse(model)
    return model


def batches(size):
    return [Batch(part) for part in ids(WINDOWS, TOKENS).split(size)]


def by_windows(model):
    """Path -> (inputs, output gradients) as float64 tokens of each window, which goes through the whole model alone."""
    calls, windows = {target.path: [] for target in find_targets(model)}, {}

    def hook(path):
        def remember(module, args, output):
            if output.requires_grad:
                output.retain_grad()
                calls[path].append((args[0], output))

        return remember

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in calls]
    for batch in batches(1):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        cross_entropy(logits[0, :-1], batch.input_ids[0, 1:], reduction="sum").backward()
        for path, seen in calls.items():
            if any(y.grad is not None for _, y in seen):
                windows.setdefault(path, []).append(_rows(seen))
            seen.clear()
    for handle in handles:
        handle.remove()
    return windows


def _rows(seen):
    parts = [
        (x.detach().double().flatten(0, -2), y.grad.double().flatten(0, -2)) for x, y in seen if y.grad is not None
    ]
    return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_for_any_batch_and_way(name, monkeypatch):
    model = model_of(name)
    learning = by_windows(model)  # what chooses tokens (an indexer) is not differentiable
    first = streamed(model, batches(1), TRIMMED)
    many = streamed(model, batches(WINDOWS), TRIMMED)
    monkeypatch.setattr("slimrank.models.gradients.LOGITS_AT_ONCE", 2 * TOKENS * 259)  # two windows at a time
    whole = resident(model, batches(WINDOWS), TRIMMED)
    assert first.keys() == many.keys() == whole.keys()
    for other in (many, whole):
        for path, found in first.items():
            assert other[path].tokens == found.tokens
            assert other[path].notes == found.notes == ()
            close(other[path].gram, found.gram)
            if path not in learning:
                assert other[path].slope is None
                continue
            close(other[path].slope, found.slope, 1e-3)
            close(other[path].row.data, found.row.data, 1e-3)
            assert other[path].row.average == pytest.approx(found.row.average, rel=1e-3)
            close(other[path].weight_squares, found.weight_squares, 1e-3)
            assert len(other[path].samples) == len(found.samples)
            eye = torch.eye(found.shape[1], dtype=torch.float64)
            close(other[path].samples.row(eye), found.samples.row(eye), 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_those_of_plain_autograd(name):
    model = model_of(name)
    found, reference = streamed(model, batches(WINDOWS), PLAIN), by_windows(model)
    assert set(reference) == {path for path, statistics in found.items() if statistics.slope is not None}
    for path in reference:
        statistics = found[path]
        xs, gs = (torch.cat(parts) for parts in zip(*reference[path], strict=True))
        gram, pulled = row_gram(gs, weight_of(model.get_submodule(path)).detach().double())
        dense = [g.T @ x for x, g in reference[path]]
        close(statistics.gram, xs.T @ xs, 1e-3)
        close(statistics.row.data, pulled if statistics.row.seen else gram, 1e-3)
        close(statistics.slope, sum(dense), 1e-3)
        close(statistics.weight_squares, sum(d.square().sum(dim=0) for d in dense), 1e-3)
        assert len(statistics.samples) == len(dense)


@pytest.mark.skipif("zaya" not in UNUSUAL, reason="this transformers has no Zaya")
def test_a_layer_that_reads_with_others_in_one_of_its_calls_is_refused():
    with pytest.raises(ModelError, match=r"v_proj_delayed' reads the same tensor as 'model\..*q_proj' in some"):
        streamed(model_of("zaya"), batches(WINDOWS), PLAIN)
