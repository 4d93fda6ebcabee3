"""Ranks within a time: by a clock that is made up, so that figures are exact, and once by the real one."""

import copy
import re
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import slimrank
from architectures import random_model
from helpers import byte_tokenizer, tiny_model
from slimrank.budget.problem import Item, Problem
from slimrank.budget.timed import LayerTimes, least_seconds, timed
from slimrank.errors import BudgetError, RecipeError
from slimrank.layers.base import CompressedLinear
from slimrank.layers.forms import PIVOT, layer_form
from slimrank.layers.packed import group_of
from slimrank.layers.stand_ins import stand_in
from slimrank.methods.allocator import ALLOCATORS
from slimrank.models import memory_layout
from slimrank.pipeline.stages import latency, timed_layers
from slimrank.pipeline.stages.timed_layers import Together
from slimrank.progress import Progress
from slimrank.recipe import Recipe

OPTIONS = {"method": "svd", "allocation": "spectrum", "form": "pivot", "evaluation": None}
OVERHEAD, PER_NUMBER = 40e-6, 1e-6  # seconds of a layer with a rank, and of each number of any layer
JOINED = 25e-6  # seconds that each layer but the first of a group saves
BESIDES, IN_THE_MODEL = 5e-3, 1.4  # seconds of all else, and what a layer's time counts in the model


def seconds_of(layer):
    if isinstance(layer, Together):
        return sum(map(seconds_of, layer.layers)) - JOINED * (len(layer.layers) - 1)
    fixed = OVERHEAD if isinstance(layer, CompressedLinear) else 0.0
    return fixed + PER_NUMBER * sum(p.numel() for p in layer.parameters() if p.dim() > 1)


def seconds_of_model(use, model):
    layers = [m for m in model.model.layers.modules() if isinstance(m, CompressedLinear)]
    inside = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    layers += [m for m in model.model.layers.modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    groups = {id(group) for layer in layers if (group := group_of(layer))}
    saved = JOINED * (sum(group_of(layer) is not None for layer in layers) - len(groups))
    return BESIDES + IN_THE_MODEL * (sum(map(seconds_of, layers)) - saved)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(timed_layers, "layer_seconds", lambda layers, x: [seconds_of(layer) for layer in layers])
    monkeypatch.setattr(memory_layout, "layer_seconds", lambda layers, x: [1.0, 1.0])
    monkeypatch.setattr(latency.Use, "seconds", seconds_of_model)


def reached(result):
    return seconds_of_model(None, result.model) / seconds_of_model(None, tiny_model())


@pytest.mark.parametrize("form", ["pair", "pivot"])
@pytest.mark.parametrize("asked", [0.6, 0.75, 0.9])
def test_the_time_that_was_asked_for_is_reached(form, asked, clock):
    result = slimrank.compress(tiny_model(), max_latency=asked, **{**OPTIONS, "form": form})
    found = result.report["allocation"]["latency"]
    assert found["reached"] == pytest.approx(reached(result), rel=1e-9)
    assert reached(result) == pytest.approx(asked, rel=0.03)
    (section,) = [s for s in result.report["sections"] if s["title"] == "Latency"]
    assert section["rows"][0][0] == f"{asked:.2f}"


@pytest.mark.parametrize("form", ["pair", "pivot"])
@pytest.mark.parametrize("asked", [0.75, 0.9])
def test_layers_are_timed_as_packing_leaves_them(form, asked, clock):
    options = {**OPTIONS, "form": form, "max_latency": asked}
    packed, plain = (slimrank.compress(tiny_model(), packed=packed, **options) for packed in (True, False))
    found = packed.report["allocation"]["latency"]
    assert found["packed"]
    assert found["reached"] == pytest.approx(reached(packed), rel=1e-9)
    assert reached(packed) == pytest.approx(asked, rel=0.03)
    kept = [sum(p.numel() for p in result.model.parameters()) for result in (packed, plain)]
    assert kept[0] > kept[1]  # what joining saves is spent on ranks
    (section,) = [s for s in packed.report["sections"] if s["title"] == "Latency"]
    assert "with packed layers of these ranks" in section["note"]


def test_the_times_of_layers_in_a_group_add_up_to_that_of_the_group(clock):
    state = SimpleNamespace(
        model=tiny_model(),
        progress=Progress(),
        prepared=SimpleNamespace(
            recipe=Recipe.make({**OPTIONS, "packed": True}), targets=slimrank.find_targets(tiny_model())
        ),
    )
    layers = timed_layers.TimedLayers(state, lambda width, like: torch.ones(1, 1, width))
    times = layers.times()
    paths = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    alone = [stand_in("pivot", state.model.get_submodule(path), times[path].ranks[3]) for path in paths]
    expected = seconds_of(Together(alone))
    assert sum(times[path].seconds[3] for path in paths) == pytest.approx(expected, rel=1e-9)
    path = "model.layers.1.mlp.up_proj"
    own = stand_in("pivot", state.model.get_submodule(path), times[path].ranks[3])
    assert times[path].seconds[3] == pytest.approx(seconds_of(own))


def test_copies_of_layers_together_are_together():
    linears = [nn.Linear(24, rows, bias=False) for rows in (16, 8)]
    layers = [stand_in("pair", linear, 4) for linear in linears]
    together = Together(layers)
    x = torch.randn(3, 24)
    expected = [layer(x) for layer in [layer.to_dense() for layer in layers]]
    other = copy.deepcopy(together)
    for module in (together, other):
        for found, y in zip(module(x), expected, strict=True):
            torch.testing.assert_close(found, y)
        groups = {id(group_of(layer)) for layer in module.layers}
        assert len(groups) == 1
        assert None not in map(group_of, module.layers)
        with torch.no_grad():
            for layer in module.layers:
                layer.A.weight.zero_()
    assert group_of(together.layers[0]) is not group_of(other.layers[0])


def test_layers_that_would_not_be_faster_stay_dense(clock, monkeypatch):
    monkeypatch.setattr(f"{__name__}.OVERHEAD", 900e-6)  # more than all numbers of the small layers
    result = slimrank.compress(tiny_model(), max_latency=0.9, **OPTIONS)
    ranks = {path: target.rank for path, target in result.plan.targets.items()}
    assert all(rank == "dense" for path, rank in ranks.items() if "k_proj" in path or "v_proj" in path)
    assert any(rank != "dense" for rank in ranks.values())


def test_a_time_that_cannot_be_met_is_refused_and_the_hint_works(clock):
    with pytest.raises(BudgetError, match=r"decode cannot take 0.05 of the original's time") as caught:
        slimrank.compress(tiny_model(), max_latency=0.05, **OPTIONS)
    hint = float(re.search(r"at least ([\d.]+)", caught.value.hint)[1])
    result = slimrank.compress(tiny_model(), max_latency=hint, **OPTIONS)
    assert reached(result) == pytest.approx(hint, rel=0.05)


def test_bad_combinations_are_refused():
    for options, message in (
        ({"max_latency": 0.7, "allocation": "uniform"}, "'uniform' cannot spend time"),
        ({"max_latency": 0.7, "method": "basis_sharing"}, "shares factors between layers"),
        ({"max_latency": 0.7, "quantize": "int8"}, "leave out quantize and store_form"),
        ({"max_latency": 0.7, "keep_ratio": 0.8}, "give only one of keep_ratio and max_latency"),
        ({"max_latency": 1.5}, "max_latency"),
        ({"keep_ratio": 0.7, "latency": "prefill"}, "latency is given, but no max_latency"),
        ({"max_latency": 0.7, "latency": "both"}, "latency"),
    ):
        with pytest.raises(RecipeError, match=message):
            slimrank.compress(tiny_model(), byte_tokenizer(), **{**OPTIONS, **options})
    with pytest.raises(RecipeError, match="the time of experts depends on the tokens"):
        slimrank.compress(random_model("mixtral"), max_latency=0.7, **OPTIONS)


def test_the_plan_can_be_followed_and_a_run_goes_on_without_measuring(clock, monkeypatch, tmp_path):
    options = {**OPTIONS, "max_latency": 0.7, "run_dir": tmp_path / "run"}
    first = slimrank.compress(tiny_model(), **options)
    monkeypatch.setattr(timed_layers, "layer_seconds", None)
    again = slimrank.compress(tiny_model(), **options)
    assert again.plan == first.plan
    assert again.report["allocation"]["latency"] == first.report["allocation"]["latency"]
    first.plan.save(tmp_path / "plan.json")
    followed = slimrank.compress(tiny_model(), method="svd", plan=str(tmp_path / "plan.json"), evaluation=None)
    assert {p: t.rank for p, t in followed.plan.targets.items()} == {p: t.rank for p, t in first.plan.targets.items()}


# the problem in time --------------------------------------------------------------------------------------------------


def test_times_lie_between_measured_ones_and_do_not_fall():
    times = LayerTimes(5.0, (2, 4, 8), (1.0, 3.0, 2.0))
    assert [times.at(rank) for rank in (1, 2, 3, 4, 6, 8, 9)] == [1.0, 1.0, 1.75, 2.5, 2.5, 2.5, 2.5]
    assert times.at("dense") == 5.0


def test_time_is_spent_as_well_as_trying_everything():
    shapes, draw = {"a": (4, 6), "b": (6, 4), "c": (5, 5)}, np.random.default_rng(0)
    spectra = {path: (np.sort(draw.random(min(shape)))[::-1], 0.0) for path, shape in shapes.items()}
    problem = Problem(
        tuple(Item(path, shape) for path, shape in shapes.items()), budget=10, form=PIVOT, spectra=spectra, in_loss=True
    )
    times = {path: LayerTimes(2.0, (1, 2, 3), tuple(0.3 + 0.5 * draw.random(3).cumsum())) for path in shapes}
    errors = {path: np.append(np.cumsum((v**2)[::-1])[::-1], 0.0) for path, (v, _) in spectra.items()}
    for seconds in (2.0, 3.5, 4.5, 6.0):
        made = timed(problem, times, seconds)
        options = [[*range(1, PIVOT.largest_rank(*shape) + 1), "dense"] for shape in shapes.values()]
        best = min(
            sum(0.0 if rank == "dense" else errors[path][rank] for path, rank in zip(shapes, ranks, strict=True))
            for ranks in product(*options)
            if sum(times[path].at(rank) for path, rank in zip(shapes, ranks, strict=True)) <= seconds + 1e-9
        )
        found = ALLOCATORS.get("spectrum").configured({"solver": "exact"}).allocate(made)
        total = sum(0.0 if rank == "dense" else errors[path][rank] for path, rank in found.ranks.items())
        assert sum(times[path].at(rank) for path, rank in found.ranks.items()) <= seconds + 1e-8
        assert total == pytest.approx(best)
    assert least_seconds(timed(problem, times, 1.0)) == pytest.approx(sum(times[path].at(1) for path in shapes))


@pytest.mark.parametrize("form", ["pair", "pivot"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_stand_ins_are_like_real_layers(form, shape, bias):
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=torch.bfloat16)
    a, b = torch.randn(7, shape[1]), torch.randn(shape[0], 7)
    real = layer_form(form).build(a, b, linear.bias, torch.bfloat16)
    found = stand_in(form, linear, 7)
    assert found.entry() == real.entry()
    assert {n: (t.shape, t.dtype) for n, t in found.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in real.state_dict().items()
    }
    assert torch.isfinite(found(torch.randn(3, shape[1], dtype=torch.bfloat16)).float()).all()


def test_the_real_clock_leaves_the_model_as_it_was():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Recipe.make({**OPTIONS, "max_latency": 0.99})
    use = latency.Use(recipe.latency, 1, 8)
    layers = [model.model.layers[0].mlp.up_proj, stand_in("pair", model.model.layers[0].mlp.up_proj, 2)]
    assert all(
        seconds > 0 for seconds in timed_layers.layer_seconds(layers, use.inputs(layers[0].in_features, torch.ones(1)))
    )
    assert use.seconds(model) > 0
    assert latency.Use("prefill", 2, 8).seconds(model) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
