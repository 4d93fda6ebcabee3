"""Every registered decomposer through the same tests. A new method runs through them by registering itself.

What it is optimal in must be written down once more in `observed.METRICS`, from raw tokens and gradients.
"""

import math
from typing import Annotated

import pytest
import torch
from pydantic import Field

from observed import METRICS, gram_of, observe, projector_loss, random, ridged
from slimrank.errors import RecipeError
from slimrank.linalg.forms import Form, Metric
from slimrank.linalg.lowrank import solve
from slimrank.methods.decomposer import DECOMPOSERS, decomposer

Power = Annotated[float, Field(ge=0, le=2, description="Power of the energy.")]


@decomposer(id="energies", title="a method from outside the package", paper="none", needs={"gram", "row"})
def energies(weight, statistics, *, power: Power = 1.0):
    """Channel energies on the side of the inputs, gradients on that of the outputs."""
    return solve(weight, Metric(statistics.row.with_ridge(0.1), Form(energy(statistics.gram, power))))


def energy(gram, power):
    return gram.diagonal() ** power


def energies_metric(observed, power=1.0):
    return Metric.of(ridged(gram_of(observed.gradients), 0.1), energy(gram_of(observed.inputs), power))


METHODS = DECOMPOSERS.all()
METRICS_HERE = {**METRICS, "energies": energies_metric}
del DECOMPOSERS.entries["energies"]  # other files look at what the package itself registers

SHAPES = {
    "square": (12, 12), "wide": (8, 20), "tall": (20, 8), "row": (1, 9), "column": (9, 1), "gqa": (8, 32),
    "mlp": (32, 8),
}  # fmt: skip
MATRICES = ["square", "wide", "tall", "gqa", "mlp"]
VARIANTS = {
    "asvd": {"scale": "max", "alpha": 1.0},
    "coala": {"mu": 0.3},
    "gfwsvd": {"iterations": 1, "shrink": 0.0},
    "kfac_svd": {"row_shrink": 0.0, "column_shrink": 0.0},
    "energies": {"power": 0.5},
}
CASES = [pytest.param(id, {}, id=id) for id in METHODS] + [
    pytest.param(id, options, id=f"{id}-variant") for id, options in VARIANTS.items()
]
# coala's adaptive mu has no metric known beforehand; dobi_svd's loss is not that of a metric and has tests of its own
OPTIMAL = [c for c in CASES if c.id not in ("coala", "dobi_svd")]


def planned(shape):
    return max(1, min(SHAPES[shape]) // 2)


def run(method, options, shape, **how):
    m, n = SHAPES[shape]
    observed = observe(METHODS[method], m, n, rank=planned(shape), **how)
    return observed, METHODS[method].configured(options).solve(observed.weight, observed.statistics)


def product(observed, spectrum, rank):
    a, b = spectrum.factors(observed.weight, rank)
    return b @ a


def assert_same(found, expected, tolerance=1e-7):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected.double(), rtol=tolerance, atol=tolerance * scale)


def assert_sound(observed, spectrum, tolerance=1e-6):
    """Finite at every rank, and the weight itself at full rank."""
    for rank in range(1, spectrum.full_rank + 1):
        assert bool(torch.isfinite(product(observed, spectrum, rank)).all())
        assert math.isfinite(spectrum.relative_error(rank))
    assert_same(product(observed, spectrum, spectrum.full_rank), observed.weight, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method, options", CASES)
def test_shapes_dtypes_and_full_rank(method, options, shape, dtype):
    observed, spectrum = run(method, options, shape, dtype=dtype)
    m, n = SHAPES[shape]
    assert observed.weight.dtype == dtype
    assert spectrum.values.shape == (min(m, n),)
    assert spectrum.values.dtype == torch.float64
    a, b = spectrum.factors(observed.weight, min(m, n))
    assert (a.shape, b.shape) == ((min(m, n), n), (m, min(m, n)))
    assert a.dtype == b.dtype == torch.float64
    assert_same(b @ a, observed.weight, 1e-8)
    a, b = spectrum.factors(observed.weight, min(m, n), torch.float32)
    assert a.dtype == b.dtype == torch.float32
    assert_same((b @ a).double(), observed.weight, 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method, options", CASES)
def test_deterministic(method, options, shape):
    runs = [run(method, options, shape, dtype=torch.float32) for _ in range(2)]
    assert torch.equal(runs[0][1].values, runs[1][1].values)
    factors = [spectrum.factors(observed.weight, planned(shape)) for observed, spectrum in runs]
    for one, other in zip(*factors, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method, options", CASES)
def test_signs_are_canonical_and_columns_have_unit_norm(method, options, shape):
    observed, spectrum = run(method, options, shape)
    _, b = spectrum.factors(observed.weight, spectrum.full_rank)
    assert bool((b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all())
    torch.testing.assert_close(b.norm(dim=0), torch.ones(spectrum.full_rank, dtype=torch.float64))


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("method, options", CASES)
def test_factors_are_nested(method, options, shape):
    observed, spectrum = run(method, options, shape)
    full_a, full_b = spectrum.factors(observed.weight, spectrum.full_rank)
    for rank in range(1, spectrum.full_rank):
        a, b = spectrum.factors(observed.weight, rank)
        assert_same(a, full_a[:rank])
        assert_same(b, full_b[:, :rank])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method, options", CASES)
def test_error_falls_with_rank_to_nothing(method, options, shape):
    _, spectrum = run(method, options, shape)
    errors = [spectrum.relative_error(rank) for rank in range(1, spectrum.full_rank + 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1
    assert errors[-1] == 0


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method, options", OPTIMAL)
def test_loss_in_its_own_metric_is_the_tail(method, options, shape, alone):
    observed, spectrum = run(method, options, shape, alone=alone)
    metric = METRICS_HERE[method](observed, **options)
    total = metric.squared(observed.weight)
    scale = total / spectrum.tail(0)  # a metric counts up to a factor
    for rank in range(1, spectrum.full_rank + 1):
        loss = metric.squared(observed.weight - product(observed, spectrum, rank))
        assert loss == pytest.approx(scale * spectrum.tail(rank), rel=1e-6, abs=1e-9 * total)
        assert spectrum.relative_error(rank) == pytest.approx((loss / total) ** 0.5, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_dobi_loss_is_the_tail(shape):
    observed, spectrum = run("dobi_svd", {}, shape, batches=3)
    for rank in range(1, spectrum.full_rank + 1):
        _, b = spectrum.factors(observed.weight, rank)
        loss = projector_loss(observed, planned(shape), b)
        assert loss == pytest.approx(spectrum.tail(rank), rel=1e-8, abs=1e-8)


def alternating(weight, metric, rank, starts, rounds):
    """Factors by exact least squares for one and the other in turn, from random starts, without any root."""
    g, c = (
        torch.eye(size, dtype=torch.float64) if form.matrix() is None
        else form.matrix() if form.matrix().dim() == 2 else form.matrix().diag()
        for form, size in zip((metric.row, metric.column), weight.shape, strict=True)
    )  # fmt: skip
    a = random(starts, rank, weight.shape[1], seed=5)
    for _ in range(rounds):
        b = torch.linalg.solve(a @ c @ a.mT, a @ c @ weight.t()).mT
        b = torch.linalg.qr(b).Q
        a = torch.linalg.solve(b.mT @ g @ b, b.mT @ g @ weight)
    return b @ a


@pytest.mark.parametrize("method, options", OPTIMAL)
def test_no_alternating_solution_is_better(method, options):
    observed, spectrum = run(method, options, "square")
    metric = METRICS_HERE[method](observed, **options)
    best = metric.squared(observed.weight - product(observed, spectrum, 4))
    others = alternating(observed.weight, metric, 4, starts=50, rounds=60)
    losses = [metric.squared(observed.weight - other) for other in others]
    assert min(losses) >= best * (1 - 1e-9)
    assert min(losses) <= best * 1.01  # so that the comparison means something


def test_no_subspace_is_better_than_that_of_dobi():
    observed, spectrum = run("dobi_svd", {}, "square", batches=3)
    _, b = spectrum.factors(observed.weight, 4)
    best = projector_loss(observed, planned("square"), b)
    step = random(50, *b.shape, seed=6)
    for size in (1e-3, 1e-1, 100.0):
        losses = [projector_loss(observed, planned("square"), b + size * d) for d in step]
        assert min(losses) > best * (1 - 1e-9)


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("method, options", CASES)
def test_fewer_tokens_than_channels(method, options, shape, tokens):
    assert_sound(*run(method, options, shape, windows=1, batches=1, tokens=tokens))


@pytest.mark.parametrize("how", [{"outlier": 2}, {"dead": (0, 3)}, {"dead": (1,), "outlier": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("method, options", CASES)
def test_outliers_and_dead_channels(method, options, shape, dtype, how):
    assert_sound(*run(method, options, shape, dtype=dtype, **how))


@pytest.mark.parametrize("how", [{"outlier": 2}, {"dead": (0, 3)}], ids=str)
@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("method, options", OPTIMAL)
def test_optimal_with_outliers_and_dead_channels(method, options, shape, how):
    observed, spectrum = run(method, options, shape, dtype=torch.float32, tokens=64, **how)
    metric = METRICS_HERE[method](observed, **options)
    weight = observed.weight.double()
    for rank in range(1, spectrum.full_rank):
        loss = metric.squared(weight - product(observed, spectrum, rank))
        assert loss <= solve(weight, metric).tail(rank) * (1 + 1e-3) + 1e-12 * metric.squared(weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method, options", CASES)
def test_no_tokens_is_plain_svd(method, options, shape):
    observed, spectrum = run(method, options, shape, padded=True)
    assert_sound(observed, spectrum)
    rank = planned(shape)
    assert_same(product(observed, spectrum, rank), product(observed, solve(observed.weight), rank))


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("method, options", CASES)
def test_a_weight_of_low_rank_is_exact_at_that_rank(method, options, shape):
    m, n = SHAPES[shape]
    observed, spectrum = run(method, options, shape, weight=random(m, 2, seed=3) @ random(2, n, seed=4))
    assert_sound(observed, spectrum)
    for rank in range(2, min(m, n)):
        assert_same(product(observed, spectrum, rank), observed.weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method, options", CASES)
def test_a_zero_weight(method, options, shape):
    observed, spectrum = run(method, options, shape, weight_scale=0.0)
    for rank in range(1, spectrum.full_rank + 1):
        assert bool((product(observed, spectrum, rank) == 0).all())
        assert math.isfinite(spectrum.relative_error(rank))


def same_product(method, options, shape, one, other, factor=1.0):
    """The product of the first is that of the second, times a factor, at several ranks."""
    first, second = run(method, options, shape, **one), run(method, options, shape, **other)
    for rank in {1, planned(shape), first[1].full_rank - 1}:
        assert_same(product(*first, rank), factor * product(*second, rank))


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("method, options", CASES)
def test_a_bias_changes_nothing(method, options, shape):
    same_product(method, options, shape, {"bias": True, "alone": True}, {"alone": True})
    same_product(method, options, shape, {"bias": True}, {})


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("method, options", CASES)
def test_a_weight_that_is_stored_transposed(method, options, shape):
    same_product(method, options, shape, {"conv1d": True}, {})


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("method, options", CASES)
def test_statistics_of_the_outputs_serve_as_well(method, options, shape):
    same_product(method, options, shape, {"alone": True}, {"alone": False})


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30], ids=["small", "large"])  # exact in any float
@pytest.mark.parametrize("what", ["weight_scale", "input_scale", "loss_scale"])
@pytest.mark.parametrize("shape", ["square", "wide", "tall"])
@pytest.mark.parametrize("method, options", CASES)
def test_scales_do_not_matter(method, options, shape, what, scale):
    same_product(method, options, shape, {what: scale}, {}, factor=scale if what == "weight_scale" else 1.0)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'svd_llm'"):
        DECOMPOSERS.get("svd-llm")


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_option_names_the_nearest(method):
    names = list(METHODS[method].options.model_fields)
    for name in names:
        with pytest.raises(RecipeError, match=rf"the method '{method}' has no option '{name}z'") as caught:
            METHODS[method].configured({f"{name}z": 1})
        assert repr(name) in caught.value.hint
    if not names:
        with pytest.raises(RecipeError, match="it has no options"):
            METHODS[method].configured({"alpha": 1})


def wrong_values(schema):
    """Values outside the range that a schema states, of the wrong type, or not finite."""
    parts = schema.get("anyOf", [schema])
    yield {"not": "an option"}
    yield "nonsense"
    if any(part.get("type") in ("number", "integer") for part in parts):
        yield math.nan
        yield math.inf
    for part in parts:
        yield from (part[key] - 1 for key in ("minimum", "exclusiveMinimum") if key in part)
        yield from (part[key] + 1 for key in ("maximum", "exclusiveMaximum") if key in part)


@pytest.mark.parametrize(
    "method, name, value",
    [
        (method, name, value)
        for method in METHODS
        for name, schema in METHODS[method].options.model_json_schema().get("properties", {}).items()
        for value in wrong_values(schema)
    ],
)
def test_an_option_out_of_range_is_refused(method, name, value):
    with pytest.raises(RecipeError, match=rf"option {name}.* of the method '{method}'"):
        METHODS[method].configured({name: value})


@pytest.mark.parametrize("method", METHODS)
def test_options_have_descriptions_and_defaults_that_are_valid(method):
    configured = METHODS[method].configured({})
    assert configured.gathering.needs == METHODS[method].needs
    defaults = {name: field.default for name, field in METHODS[method].options.model_fields.items()}
    assert METHODS[method].configured(defaults).options == configured.options
    assert all(field.description for field in METHODS[method].options.model_fields.values())
