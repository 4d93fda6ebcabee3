"""Narrowing block by block, against least squares on the tokens themselves."""

import copy

import pytest
import torch

from architectures import random_model
from slimrank.errors import BudgetError
from slimrank.layers.dense import weight_of
from slimrank.models.blocks import BlockRunner
from slimrank.models.mlps import find_mlps
from slimrank.models.recording import Batch
from slimrank.models.targets import find_targets
from slimrank.narrowing.blocks import Narrower, NarrowOptions
from slimrank.narrowing.layers import keep_units, set_weight
from slimrank.narrowing.widths import fitting_widths, width_fields
from slimrank.pipeline.stages.dual_stream import DualStream
from slimrank.progress import Progress

IDS = torch.randint(0, 259, (16, 24), generator=torch.Generator().manual_seed(0))


def narrowed(model, keep=0.8, **options):
    chosen = NarrowOptions(**options)
    targets = find_targets(model)
    fields = width_fields(model, find_mlps(model))
    widths = fitting_widths(model, fields, targets.coverage.targets, keep, 4)
    layers = {b: [t.path for t in targets.in_block(b)] for b in range(8)}
    runner = BlockRunner(model, torch.device("cpu"), True, False)
    streams = DualStream(runner, [Batch(ids) for ids in IDS.split(4)], torch.device("cpu"), chosen.following())
    return Narrower(streams, widths, layers, chosen).run(Progress())


@torch.no_grad()
def inputs_of(model, path):
    read = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, args: read.append(args[0]))
    model(IDS, use_cache=False)
    handle.remove()
    return read[0].flatten(0, -2).double()


def reader_of(model, block):
    return next(mlp.reader for mlp in find_mlps(model) if mlp.block == block)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_first_reader_is_the_least_squares_fit_to_the_original(name):
    """With the bias, where there is one: least squares with a constant input."""
    original = random_model(name)
    model = copy.deepcopy(original)
    narrowed(model, refit="readers", ridge=0.0)
    path = reader_of(model, 0)
    old, new = original.get_submodule(path), model.get_submodule(path)
    target = inputs_of(original, path) @ weight_of(old).double().t()
    hidden = inputs_of(model, path)
    if old.bias is not None:
        target = target + old.bias.double()
        hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1)
    expected = torch.linalg.lstsq(hidden, target).solution.t()
    found = weight_of(new).double()
    if old.bias is not None:
        found = torch.cat([found, new.bias.double()[:, None]], dim=1)
    assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))


def test_later_readers_also_make_up_for_the_error_of_the_residual_stream():
    original = random_model("llama")
    model = copy.deepcopy(original)
    narrowed(model, refit="readers", ridge=0.0)
    path = reader_of(model, 1)
    after = [torch.cat([inputs_of(m, "model.norm")]) for m in (original, model)]
    hidden = inputs_of(model, path)
    rest = after[1] - hidden @ model.get_submodule(path).weight.double().t()  # of the narrow model's stream
    expected = torch.linalg.lstsq(hidden, after[0] - rest).solution.t()
    assert torch.allclose(model.get_submodule(path).weight.double(), expected, atol=3e-3 * float(expected.abs().max()))


def test_an_infinite_ridge_leaves_the_nystrom_approximation_of_the_weight_itself():
    original = random_model("llama")
    model = copy.deepcopy(original)
    narrowed(model, refit="readers", ridge=1e12)
    path = reader_of(model, 1)
    before = copy.deepcopy(model)  # the second MLP whole again, on the narrow stream
    before.model.layers[1].mlp = copy.deepcopy(original.model.layers[1].mlp)
    target = inputs_of(before, path) @ original.get_submodule(path).weight.double().t()
    expected = torch.linalg.lstsq(inputs_of(model, path), target).solution.t()
    found = model.get_submodule(path).weight.double()
    assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("refit", ["readers", "all"])
def test_relabelled_hidden_units_give_the_same_model(refit):
    first = random_model("llama")
    second = copy.deepcopy(first)
    for mlp in find_mlps(second):
        order = torch.randperm(mlp.width, generator=torch.Generator().manual_seed(mlp.block))
        keep_units(second, mlp.makers, mlp.width, order)
        reader = second.get_submodule(mlp.reader)
        set_weight(reader, reader.weight[:, order])
    narrowed(first, refit=refit)
    narrowed(second, refit=refit)
    with torch.no_grad():
        one, other = (m(IDS, use_cache=False).logits for m in (first, second))
    assert torch.allclose(one, other, atol=1e-3 * float(one.abs().max()))


def test_refitting_all_layers_is_nearer_to_the_original():
    original = random_model("llama")
    with torch.no_grad():
        wanted = original(IDS).logits
        errors = []
        for refit in ("readers", "all"):
            model = copy.deepcopy(original)
            narrowed(model, refit=refit)
            errors.append(float((model(IDS).logits - wanted).norm()))
    assert errors[1] < errors[0]


def test_the_reported_error_is_that_of_the_outputs():
    original = random_model("llama")
    model = copy.deepcopy(original)
    found = narrowed(model, refit="readers")
    path = reader_of(model, 0)
    outputs = [inputs_of(m, path) @ m.get_submodule(path).weight.double().t() for m in (original, model)]
    expected = (outputs[0] - outputs[1]).square().sum() / outputs[0].square().sum()
    assert found[0].error == pytest.approx(float(expected), rel=1e-3)


def test_the_largest_widths_within_the_budget_are_taken():
    model = random_model("deepseek_v3")
    from slimrank.layers.experts import unfuse

    unfuse(model)
    fields = width_fields(model, find_mlps(model))
    total = find_targets(model).coverage.targets
    for keep in (1.0, 0.95, 0.8, 0.7):
        widths = fitting_widths(model, fields, total, keep, 4)
        assert widths.keep_ratio <= keep
        assert all(value % 4 == 0 or value == f.value for f, value in zip(fields, widths.values.values(), strict=True))
    assert fitting_widths(model, fields, total, 1.0, 7).left == total
    with pytest.raises(BudgetError, match="--keep"):
        fitting_widths(model, fields, total, 0.05, 4)
