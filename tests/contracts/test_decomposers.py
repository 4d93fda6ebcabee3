"""Every registered decomposer through the same tests. A new method runs through them by registering itself."""

import pytest
import torch

from slimrank.decompose.registry import DECOMPOSERS
from slimrank.errors import RecipeError

METHODS = list(DECOMPOSERS.all())
SHAPES = {"square": (12, 12), "wide": (8, 20), "tall": (20, 8), "row": (1, 9), "column": (9, 1)}


def make(shape, dtype=torch.float32, tokens=80, seed=0):
    g = torch.Generator().manual_seed(seed)
    m, n = SHAPES[shape]
    x = torch.randn(tokens, n, generator=g, dtype=torch.float64)
    return torch.randn(m, n, generator=g).to(dtype), x.T @ x


@pytest.fixture(params=METHODS)
def method(request):
    return DECOMPOSERS.get(request.param)


def solved(method, weight, gram):
    return method.solve(weight, gram if "gram" in method.needs else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_dtypes_and_full_rank(method, shape, dtype):
    weight, gram = make(shape, dtype)
    spectrum = solved(method, weight, gram)
    m, n = weight.shape
    assert spectrum.values.shape == (min(m, n),)
    assert spectrum.values.dtype == torch.float64
    a, b = spectrum.factors(weight, min(m, n))
    assert (a.shape, b.shape) == ((min(m, n), n), (m, min(m, n)))
    torch.testing.assert_close(b @ a, weight.double(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_deterministic(method, shape):
    weight, gram = make(shape)
    first, second = (solved(method, weight, gram).factors(weight, 1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", ["square", "wide", "tall"])
def test_loss_is_the_tail_and_falls_with_rank(method, shape):
    weight, gram = make(shape)
    spectrum = solved(method, weight, gram)
    metric = gram if "gram" in method.needs else torch.eye(len(gram), dtype=torch.float64)
    errors = []
    for rank in range(1, spectrum.full_rank + 1):
        a, b = spectrum.factors(weight, rank)
        e = weight.double() - b @ a
        loss = float((e @ metric * e).sum())
        assert loss == pytest.approx(spectrum.tail(rank), rel=1e-6, abs=1e-9 * spectrum.tail(0))
        errors.append(spectrum.relative_error(rank))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("shape", ["square", "wide", "tall"])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens(method, shape, tokens):
    weight, gram = make(shape, tokens=tokens)
    spectrum = solved(method, weight, gram)
    a, b = spectrum.factors(weight, 4)
    assert bool(torch.isfinite(a).all() & torch.isfinite(b).all())
    a, b = spectrum.factors(weight, spectrum.full_rank)
    torch.testing.assert_close(b @ a, weight.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", ["square", "wide", "tall"])
def test_scale_of_the_weight(method, shape):
    weight, gram = make(shape)
    small = solved(method, weight * 1e-4, gram)
    torch.testing.assert_close(small.values, solved(method, weight, gram).values * 1e-4, rtol=1e-4, atol=1e-9)


def test_unknown_methods_name_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'svd_llm'"):
        DECOMPOSERS.get("svd-llm")
