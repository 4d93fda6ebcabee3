"""Every registered refiner through the same tests, and what a bias makes up for."""

import pytest
import torch

from observed import random
from slimrank.errors import RecipeError
from slimrank.linalg.forms import Metric
from slimrank.linalg.lowrank import solve
from slimrank.linalg.regression import Regression, best_b, reduced_rank
from slimrank.methods.refiner import REFINERS
from slimrank.statistics.paired_inputs import StreamSums

REFINERS_HERE = REFINERS.all()
SHAPES = [(12, 12), (8, 20), (20, 8)]
ANCHORS = [0.0, 0.5, 1.0]


def streams(n, anchor, count=120, seed=0):
    """Inputs x' in the compressed model, and the mixture that the target is made from; their means are not zero."""
    x = random(count, n, seed=seed) @ (random(n, n, seed=seed + 1) / n**0.5 + torch.eye(n, dtype=torch.float64)) + 1.5
    compressed = x + 0.5 * random(count, n, seed=seed + 2) - 0.4
    return compressed, torch.lerp(compressed, x, anchor)


def gathered(compressed, wanted, anchor):
    sums = StreamSums.empty(compressed.shape[1], torch.device("cpu"), own=anchor == 0)
    assert sums.add(compressed, wanted)
    return sums


def setting(m, n, anchor=1.0, ridge=0.0, rank=4):
    """A weight, its plain factors, and the problem that the pass would hand to a refiner."""
    weight = random(m, n, seed=5)
    compressed, wanted = streams(n, anchor)
    problem = gathered(compressed, wanted, anchor).problem(weight, centred=False).towards(weight, ridge)
    return weight, problem, *solve(weight).factors(weight, rank)


def refined(name, weight, problem, a, b, **options):
    return REFINERS_HERE[name].configured(options).refine(problem, weight, a, b)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-6)])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("m, n", SHAPES)
def test_the_problem_is_that_of_raw_tokens(m, n, anchor, centred, dtype, tolerance):
    weight = random(m, n, seed=5)
    compressed, wanted = (v.to(dtype) for v in streams(n, anchor))
    problem = gathered(compressed, wanted, anchor).problem(weight, centred)
    inputs, targets = compressed.double(), wanted.double() @ weight.t()
    expected = Regression.of(*(v - v.mean(0) if centred else v for v in (inputs, targets)))
    for found, wanted in ((problem.gram, expected.gram), (problem.cross, expected.cross)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    assert problem.energy == pytest.approx(expected.energy, rel=tolerance)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("name", REFINERS_HERE)
def test_the_loss_falls(name, m, n, anchor, ridge):
    weight, problem, a, b = setting(m, n, anchor, ridge)
    before = problem.loss(b @ a)
    new_a, new_b = refined(name, weight, problem, a, b)
    assert (new_a.shape, new_b.shape) == (a.shape, b.shape)
    assert problem.loss(new_b @ new_a) < before


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("name", REFINERS_HERE)
def test_the_loss_does_not_rise_from_the_optimum(name, m, n):
    weight, problem, _, _ = setting(m, n)
    spectrum, best = reduced_rank(problem)
    a, b = spectrum.factors(best, 4)
    new_a, new_b = refined(name, weight, problem, a, b)
    assert problem.loss(new_b @ new_a) <= problem.loss(b @ a) * (1 + 1e-10)


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("name", REFINERS_HERE)
def test_nothing_changes_where_the_inputs_are_the_original_ones(name, m, n):
    """From factors that are optimal on the very inputs that the layer reads."""
    weight = random(m, n, seed=5)
    compressed, wanted = streams(n, 0.0)
    problem = gathered(compressed, wanted, 0.0).problem(weight, centred=False)
    a, b = solve(weight, Metric.of(column=problem.gram)).factors(weight, 4)
    new_a, new_b = refined(name, weight, problem, a, b)
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", REFINERS_HERE)
def test_a_is_left_alone_where_the_refiner_says_so(name):
    weight, problem, a, b = setting(12, 12)
    kept = a.clone(), b.clone()
    new_a, new_b = refined(name, weight, problem, a, b)
    assert torch.equal(new_a, a) == (not REFINERS_HERE[name].changes_a)
    assert not torch.equal(new_b, b)
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])


def test_update_leaves_a_as_it_is_to_the_bit():
    weight, problem, a, b = setting(8, 20)
    for stored in (a, a.float(), a.bfloat16()):
        new_a, new_b = refined("update", weight, problem, stored, b)
        assert torch.equal(new_a, stored)
        assert new_a.dtype == stored.dtype
        torch.testing.assert_close(new_b, best_b(problem, stored))


@pytest.mark.parametrize("m, n", SHAPES)
def test_more_iterations_are_no_worse(m, n):
    weight, problem, a, b = setting(m, n)
    found = [refined("ada_comp", weight, problem, a, b, iterations=i) for i in (1, 2, 3, 5, 15)]
    losses = [problem.loss(new_b @ new_a) for new_a, new_b in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("anchor", [0.5, 1.0])
@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("name", [name for name in REFINERS_HERE if name != "regress"])
def test_none_is_better_than_regress(name, m, n, anchor, ridge):
    weight, problem, a, b = setting(m, n, anchor, ridge)
    best_a, best_b_ = refined("regress", weight, problem, a, b)
    new_a, new_b = refined(name, weight, problem, a, b)
    assert problem.loss(best_b_ @ best_a) <= problem.loss(new_b @ new_a) * (1 + 1e-10)


@pytest.mark.parametrize("name", REFINERS_HERE)
def test_few_tokens_stay_finite(name):
    weight = random(8, 12, seed=5)
    a, b = solve(weight).factors(weight, 4)
    for count in (0, 1, 3):
        compressed, wanted = streams(12, 1.0, count=count)
        problem = gathered(compressed, wanted, 1.0).problem(weight, centred=count > 0)
        for ridge in (0.0, 1e-3):
            new_a, new_b = refined(name, weight, problem.towards(weight, ridge), a, b)
            assert bool(torch.isfinite(new_b @ new_a).all())


# options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options",
    [(name, options) for name in REFINERS_HERE for options in (
        {"anchor": -0.1}, {"anchor": 1.1}, {"ridge": -1}, {"ridge": float("inf")}, {"ridge": float("nan")},
        {"bias": "some"},
    )]
    + [("ada_comp", {"iterations": 0}), ("ada_comp", {"stack_of_batch": 0}), ("ada_comp", {"stack_of_batch": 1.5})],
)  # fmt: skip
def test_an_option_out_of_range_is_refused(name, options):
    with pytest.raises(RecipeError, match=rf"option {next(iter(options))} of the refiner '{name}'"):
        REFINERS_HERE[name].configured(options)


@pytest.mark.parametrize("name", REFINERS_HERE)
def test_an_unknown_option_names_the_nearest(name):
    with pytest.raises(RecipeError, match=f"the refiner '{name}' has no option 'anchr'") as caught:
        REFINERS_HERE[name].configured({"anchr": 1})
    assert "'anchor'" in caught.value.hint


def test_an_unknown_refiner_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'ada_comp'"):
        REFINERS.get("adacomp")


@pytest.mark.parametrize("name", REFINERS_HERE)
def test_options_of_the_pass_are_kept_apart_from_those_of_the_refiner(name):
    configured = REFINERS_HERE[name].configured({"anchor": 0.25, "ridge": 0.5, "bias": "all"})
    following = configured.following
    assert (following.anchor, following.ridge, following.bias, following.stack_of_batch) == (0.25, 0.5, "all", 1)
    assert set(configured.options) == ({"iterations"} if name == "ada_comp" else set())
    assert configured.described()["id"] == name
    assert all(field.description for field in REFINERS_HERE[name].options.model_fields.values())


def test_only_ada_comp_stacks_batches():
    assert REFINERS_HERE["ada_comp"].configured({"stack_of_batch": 4}).following.stack_of_batch == 4
    assert "averaged" in REFINERS_HERE["ada_comp"].options.model_fields["stack_of_batch"].description
    for name in set(REFINERS_HERE) - {"ada_comp"}:
        with pytest.raises(RecipeError, match="has no option 'stack_of_batch'"):
            REFINERS_HERE[name].configured({"stack_of_batch": 4})


# biases --------------------------------------------------------------------------------------------------------


def output_error(targets, compressed, product, bias):
    return float((targets - compressed @ product.t() - bias).square().sum())


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("m, n", SHAPES)
def test_a_bias_never_makes_the_outputs_worse(m, n, anchor):
    weight, _, a, b = setting(m, n, anchor)
    compressed, wanted = streams(n, anchor)
    sums = gathered(compressed, wanted, anchor)
    change = sums.bias_change(weight, b @ a)
    targets = wanted @ weight.t()
    without = output_error(targets, compressed, b @ a, 0)
    best = (targets - compressed @ (b @ a).t()).mean(0)
    torch.testing.assert_close(change, best, rtol=1e-4, atol=1e-5)
    assert output_error(targets, compressed, b @ a, change) < without


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("name", REFINERS_HERE)
def test_refining_with_a_bias_is_no_worse_than_without(name, m, n, anchor):
    weight, plain, a, b = setting(m, n, anchor)
    compressed, wanted = streams(n, anchor)
    sums = gathered(compressed, wanted, anchor)
    targets = wanted @ weight.t()
    new_a, new_b = refined(name, weight, plain, a, b)
    without = output_error(targets, compressed, new_b @ new_a, 0)
    new_a, new_b = refined(name, weight, sums.problem(weight, centred=True), a, b)
    with_bias = output_error(targets, compressed, new_b @ new_a, sums.bias_change(weight, new_b @ new_a))
    if name != "ada_comp" or anchor == 0:  # a finite number of rounds on another problem has no such order
        assert with_bias <= without * (1 + 1e-6)
    assert with_bias < output_error(targets, compressed, b @ a, 0)


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("m, n", SHAPES)
def test_a_centred_update_is_regression_with_an_intercept(m, n, anchor):
    weight, _, a, b = setting(m, n, anchor)
    compressed, wanted = streams(n, anchor)
    sums = gathered(compressed, wanted, anchor)
    new_a, new_b = refined("update", weight, sums.problem(weight, centred=True), a, b)
    features = torch.cat([compressed @ a.t(), torch.ones(len(compressed), 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(features, wanted @ weight.t()).solution
    torch.testing.assert_close(new_b, expected[:-1].t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.bias_change(weight, new_b @ new_a), expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m, n", SHAPES)
def test_a_centred_regression_is_unbounded_regression_with_an_intercept(m, n):
    weight = random(m, n, seed=5)
    compressed, wanted = streams(n, 1.0)
    sums = gathered(compressed, wanted, 1.0)
    full = min(m, n)
    a, b = solve(weight).factors(weight, full)
    new_a, new_b = refined("regress", weight, sums.problem(weight, centred=True), a, b)
    features = torch.cat([compressed, torch.ones(len(compressed), 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(features, wanted @ weight.t()).solution
    torch.testing.assert_close(new_b @ new_a, expected[:-1].t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.bias_change(weight, new_b @ new_a), expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, offset", [(torch.float64, 3000), (torch.float32, 300)])
@pytest.mark.parametrize("name", REFINERS_HERE)
def test_a_channel_with_a_large_mean_leaves_the_rest_as_it_is(name, dtype, offset):
    """Such as a massive activation: what is left around the mean is a small difference of large sums."""
    weight = random(8, 12, seed=5)
    a, b = solve(weight).factors(weight, 4)
    errors = []
    for shift in (0, offset):
        compressed, wanted = streams(12, 1.0, count=2000)
        compressed[:, 3] += shift
        wanted[:, 3] += shift
        compressed, wanted = compressed.to(dtype), wanted.to(dtype)
        sums = gathered(compressed, wanted, 1.0)
        new_a, new_b = refined(name, weight, sums.problem(weight, centred=True), a, b)
        change = sums.bias_change(weight, new_b @ new_a)
        errors.append(output_error(wanted.double() @ weight.t(), compressed.double(), new_b @ new_a, change))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
