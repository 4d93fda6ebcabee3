"""Statistics of every architecture: the same whatever the batch size, streamed or resident, and those of plain autograd."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from architectures import ARCHITECTURES, UNUSUAL, random_model
from slimrank.layers.dense import weight_of
from slimrank.layers.experts import unfuse
from slimrank.models.blocks import Batch
from slimrank.models.targets import find_targets
from slimrank.statistics.needs import Gathering
from test_gradients import close, ids, resident, row_gram, streamed

WINDOWS, TOKENS = 5, 10
NEEDS = {"gram", "channels", "row", "weight_squares", "gradients", "slope"}
PLAIN = Gathering(needs=NEEDS, accumulate=1, trim=0, clip=None)
TRIMMED = Gathering(needs=NEEDS, accumulate=2, trim=0.2, clip=(0.7, 1.2))


def model_of(name):
    model = random_model(name)
    unfuse(model)
    return model


def batches(size):
    return [Batch(part) for part in ids(WINDOWS, TOKENS).split(size)]


def by_windows(model):
    """Path -> (inputs, output gradients) as float64 tokens of each window, taken through the whole model alone."""
    seen = {target.path: [] for target in find_targets(model)}

    def hook(path):
        def remember(module, args, output):
            output.retain_grad()
            seen[path].append((args[0], output))

        return remember

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in seen]
    for batch in batches(1):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        cross_entropy(logits[0, :-1], batch.input_ids[0, 1:], reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {path: [_rows(x, y) for x, y in calls if y.grad is not None] for path, calls in seen.items()}


def _rows(x, y):
    return x.detach().double().flatten(0, -2), y.grad.double().flatten(0, -2)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *UNUSUAL])
def test_the_same_for_any_batch_and_way(name, monkeypatch):
    model = model_of(name)
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
            close(other[path].slope, found.slope, 1e-3)
            close(other[path].row.data, found.row.data, 1e-3)
            assert other[path].row.average == pytest.approx(found.row.average, rel=1e-3)
            close(other[path].weight_squares, found.weight_squares, 1e-3)
            assert len(other[path].samples) == len(found.samples)
            eye = torch.eye(found.shape[1], dtype=torch.float64)
            close(other[path].samples.row(eye), found.samples.row(eye), 1e-3)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *UNUSUAL])
def test_those_of_plain_autograd(name):
    model = model_of(name)
    found, reference = streamed(model, batches(WINDOWS), PLAIN), by_windows(model)
    for path, statistics in found.items():
        xs, gs = (torch.cat(parts) for parts in zip(*reference[path], strict=True))
        gram, pulled = row_gram(gs, weight_of(model.get_submodule(path)).detach().double())
        dense = [g.T @ x for x, g in reference[path]]
        close(statistics.gram, xs.T @ xs, 1e-3)
        close(statistics.row.data, pulled if statistics.row.seen else gram, 1e-3)
        close(statistics.slope, sum(dense), 1e-3)
        close(statistics.weight_squares, sum(d.square().sum(dim=0) for d in dense), 1e-3)
        assert len(statistics.samples) == len(dense)
