"""The weighted solver with forms on both sides, against independent formulas in float64."""

from itertools import pairwise

import pytest
import torch

from observed import METRICS, damped, gram_of, observe, random, ridged
from slimrank.linalg.forms import Form, Metric
from slimrank.linalg.lowrank import RANDOMISED_BELOW, solve
from slimrank.methods.decomposer import DECOMPOSERS
from slimrank.statistics.accumulators import GramSum
from slimrank.statistics.layer_statistics import LayerStatistics

SHAPES = [(7, 7), (6, 11), (11, 6), (1, 5), (5, 1)]
ROOTS = ["cholesky", "eigen", "pseudo"]
SIDES = ["out", "in"]


def psd(n, seed, condition=1e4):
    """Dense, with eigenvalues from 1 down to 1 / condition."""
    q = torch.linalg.qr(random(n, n, seed=seed)).Q
    values = torch.logspace(0, -torch.log10(torch.tensor(float(condition))).item(), n, dtype=torch.float64)
    return q * values @ q.t()


def problem(m, n, condition=1e4):
    return random(m, n), Metric.of(psd(m, 1, condition), psd(n, 2, condition))


def product(w, spectrum, rank):
    a, b = spectrum.factors(w, rank)
    return b @ a


def close(found, expected, tolerance=1e-8):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def by_inverses(w, metric, rank):
    """F1 with symmetric square roots and explicit inverses."""
    left, right = (_square_root(form.matrix()) for form in (metric.row, metric.column))
    u, s, vt = torch.linalg.svd(left @ w @ right)
    inner = u[:, :rank] * s[:rank] @ vt[:rank]
    return torch.linalg.inv(left) @ inner @ torch.linalg.inv(right), s


def _square_root(c):
    values, vectors = torch.linalg.eigh(c)
    return vectors * values.sqrt() @ vectors.t()


@pytest.mark.parametrize("side", [None, *SIDES])
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("m, n", SHAPES)
def test_every_root_and_side_gives_the_closed_form(m, n, root, side):
    w, metric = problem(m, n)
    spectrum = solve(w, metric, root=root, side=side)
    for rank in range(1, min(m, n) + 1):
        expected, values = by_inverses(w, metric, rank)
        close(product(w, spectrum, rank), expected)
    close(spectrum.values, values[: min(m, n)])


@pytest.mark.parametrize("side", [None, *SIDES])
@pytest.mark.parametrize("m, n", SHAPES)
def test_loss_is_the_tail(m, n, side):
    w, metric = problem(m, n)
    spectrum = solve(w, metric, side=side)
    assert spectrum.tail(0) == pytest.approx(metric.squared(w), rel=1e-10)
    for rank in range(1, min(m, n) + 1):
        loss = metric.squared(w - product(w, spectrum, rank))
        assert loss == pytest.approx(spectrum.tail(rank), rel=1e-8, abs=1e-12 * spectrum.tail(0))
        assert spectrum.relative_error(rank) == pytest.approx((spectrum.tail(rank) / spectrum.tail(0)) ** 0.5)


@pytest.mark.parametrize("m, n", [(7, 7), (6, 11), (11, 6)])
def test_loss_falls_strictly_and_factors_are_nested(m, n):
    w, metric = problem(m, n)
    spectrum = solve(w, metric)
    full_a, full_b = spectrum.factors(w, min(m, n))
    tails = [spectrum.tail(rank) for rank in range(min(m, n) + 1)]
    assert all(later < earlier for earlier, later in pairwise(tails))
    for rank in range(1, min(m, n)):
        a, b = spectrum.factors(w, rank)
        close(a, full_a[:rank])
        close(b, full_b[:, :rank])
    close(full_b @ full_a, w)
    torch.testing.assert_close(full_b.norm(dim=0), torch.ones(min(m, n), dtype=torch.float64))
    assert bool((full_b.gather(0, full_b.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("m, n", [(7, 7), (6, 11), (11, 6)])
def test_a_solution_is_its_own_solution(m, n):
    w, metric = problem(m, n)
    found = product(w, solve(w, metric), 3)
    close(product(found, solve(found, metric), 3), found, 1e-7)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e-1])
@pytest.mark.parametrize("m, n", [(7, 7), (6, 11), (11, 6)])
def test_no_perturbation_of_the_factors_is_better(m, n, size):
    w, metric = problem(m, n)
    a, b = solve(w, metric).factors(w, 3)
    best = metric.squared(w - b @ a)
    for seed in range(50):
        other = (b + size * random(m, 3, seed=seed)) @ (a + size * random(3, n, seed=seed + 99))
        assert metric.squared(w - other) >= best * (1 - 1e-12)


@pytest.mark.parametrize("m, n", [(7, 7), (6, 11), (11, 6)])
def test_no_alternating_solution_is_better(m, n):
    w, metric = problem(m, n, condition=50)
    g, c = metric.row.matrix(), metric.column.matrix()
    best = solve(w, metric).tail(3)
    a = random(50, 3, n, seed=7)
    for _ in range(100):
        b = torch.linalg.qr(torch.linalg.solve(a @ c @ a.mT, a @ c @ w.t()).mT).Q
        a = torch.linalg.solve(b.mT @ g @ b, b.mT @ g @ w)
    losses = [metric.squared(w - other) for other in b @ a]
    assert min(losses) >= best * (1 - 1e-9)
    assert min(losses) <= best * 1.001


@pytest.mark.parametrize("m, n", SHAPES)
def test_the_dual_problem(m, n):
    """solve(W, G, C) is the transpose of solve(W^T, C, G)."""
    w, metric = problem(m, n)
    dual = Metric(metric.column, metric.row)
    for rank in range(1, min(m, n) + 1):
        close(product(w.t(), solve(w.t(), dual), rank).t(), product(w, solve(w, metric), rank))


@pytest.mark.parametrize("m, n", SHAPES)
def test_scales_do_not_matter_even_where_forms_are_damped(m, n):
    w = random(m, n)
    g, c = psd(m, 1), psd(n, 2)
    one = solve(w, Metric(Form(g).shrunk(0.3), Form(c).with_ridge(0.1)))
    other = solve(w, Metric(Form(1e-9 * g).shrunk(0.3), Form(1e7 * c).with_ridge(0.1)))
    for rank in range(1, min(m, n) + 1):
        close(product(w, other, rank), product(w, one, rank))
        assert other.relative_error(rank) == pytest.approx(one.relative_error(rank), abs=1e-7)


@pytest.mark.parametrize("m, n", [(7, 7), (6, 11), (11, 6)])
def test_permutations_and_rotations_of_either_side(m, n):
    w, metric = problem(m, n)
    g, c = metric.row.matrix(), metric.column.matrix()
    shuffles = [torch.eye(k, dtype=torch.float64).roll(2, dims=0) for k in (m, n)]
    rotations = [torch.linalg.qr(random(k, k, seed=8)).Q for k in (m, n)]
    for p, q in (shuffles, rotations):
        turned = solve(p @ w @ q.t(), Metric.of(p @ g @ p.t(), q @ c @ q.t()))
        close(product(p @ w @ q.t(), turned, 3), p @ product(w, solve(w, metric), 3) @ q.t(), 1e-7)


@pytest.mark.parametrize("m, n", [(7, 7), (6, 11), (11, 6)])
def test_a_diagonal_form_is_the_matrix_with_that_diagonal(m, n):
    w = random(m, n)
    g, c = random(m, seed=1).square() + 0.01, random(n, seed=2).square() + 0.01
    for thin, whole in (
        (Metric.of(g, c), Metric.of(g.diag(), c.diag())),
        (Metric.of(None, c), Metric.of(torch.eye(m, dtype=torch.float64), c.diag())),
        (Metric.of(g, None), Metric.of(g.diag(), torch.eye(n, dtype=torch.float64))),
    ):
        for root in ROOTS:
            close(product(w, solve(w, thin, root=root), 3), product(w, solve(w, whole), 3))
        assert thin.squared(w) == pytest.approx(whole.squared(w))


# D1: whitening rows with L in the place of L^T ----------------------------------------------------------------


def without_the_transpose(w, g, c, rank):
    """What lems does: it minimises in L^T L and not in G = L L^T."""
    left, right = torch.linalg.cholesky(g), torch.linalg.cholesky(c)
    u, s, vt = torch.linalg.svd(left @ w @ right)
    return torch.linalg.inv(left) @ (u[:, :rank] * s[:rank] @ vt[:rank]) @ torch.linalg.inv(right)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("m, n", [(24, 24), (20, 30), (30, 20)])
def test_rows_are_whitened_by_the_transpose(m, n, side, root):
    w, metric = problem(m, n, condition=1e4)
    rank = 6
    wrong = metric.squared(w - without_the_transpose(w, metric.row.matrix(), metric.column.matrix(), rank))
    no_rows = metric.squared(w - product(w, solve(w, Metric(column=metric.column)), rank))
    spectrum = solve(w, metric, side=side, root=root)
    right = metric.squared(w - product(w, spectrum, rank))
    assert right == pytest.approx(spectrum.tail(rank), rel=1e-8)
    assert right < 0.7 * wrong
    assert right < 0.7 * no_rows
    # the same mistake on the side of the inputs
    flipped = without_the_transpose(w.t(), metric.column.matrix(), metric.row.matrix(), rank).t()
    assert right < 0.7 * metric.squared(w - flipped)


# T5: equalities between methods --------------------------------------------------------------------------------


def solved(method, observed, **options):
    return DECOMPOSERS.get(method).configured(options).solve(observed.weight, observed.statistics)


ALL_NEEDS = {"gram", "channels", "row", "weight_squares", "gradients"}
M_N = [(12, 12), (8, 20), (20, 8)]


def same(observed, one, other):
    for rank in range(1, one.full_rank + 1):
        close(product(observed.weight, one, rank), product(observed.weight, other, rank))
        assert one.relative_error(rank) == pytest.approx(other.relative_error(rank), abs=1e-7)


@pytest.mark.parametrize(
    "method, options",
    [
        ("svd_llm_v2", {}),
        ("drone", {}),
        ("drone", {"min_norm": True}),
        ("coala", {"mu": 0.0}),
        ("kfac_svd", {"row_shrink": 1.0, "column_shrink": 0.0, "shrink_target": "identity"}),
        ("basis_sharing", {}),
    ],
)
@pytest.mark.parametrize("m, n", M_N)
def test_methods_that_are_svd_llm(m, n, method, options):
    observed = observe(ALL_NEEDS, m, n)
    same(observed, solved(method, observed, **options), solved("svd_llm", observed))


@pytest.mark.parametrize(
    "method, options",
    [
        ("asvd", {"alpha": 0.0}),
        ("coala", {"mu": 1e12}),
        ("kfac_svd", {"row_shrink": 1.0, "column_shrink": 1.0, "shrink_target": "identity"}),
        ("gfwsvd", {"shrink": 1.0, "shrink_target": "identity"}),
    ],
)
@pytest.mark.parametrize("m, n", M_N)
def test_methods_that_are_svd(m, n, method, options):
    observed = observe(ALL_NEEDS, m, n)
    same(observed, solved(method, observed, **options), solved("svd", observed))


@pytest.mark.parametrize("m, n", M_N)
def test_kfac_without_inputs_is_svd_llm_of_the_transpose(m, n):
    observed = observe(ALL_NEEDS, m, n)
    found = solved("kfac_svd", observed, row_shrink=0.0, column_shrink=1.0, shrink_target="identity")
    gradients = GramSum.empty(m)
    gradients.add(torch.cat([g.reshape(-1, m) for g in observed.gradients]))
    turned = DECOMPOSERS.get("svd_llm").solve(observed.weight.t(), LayerStatistics((n, m), inputs=gradients))
    close(product(observed.weight, found, 3), product(observed.weight.t(), turned, 3).t())


@pytest.mark.parametrize("method, options", [("fwsvd", {}), ("asvd", {}), ("asvd", {"alpha": 1.0, "scale": "max"})])
@pytest.mark.parametrize("m, n", M_N)
def test_fwsvd_and_asvd_have_diagonal_forms(m, n, method, options):
    observed = observe(ALL_NEEDS, m, n)
    form = METRICS[method](observed, **options).column.matrix()
    scales = form.sqrt()
    u, s, vt = torch.linalg.svd(observed.weight * scales, full_matrices=False)
    spectrum = solved(method, observed, **options)
    for rank in range(1, min(m, n) + 1):
        close(product(observed.weight, spectrum, rank), (u[:, :rank] * s[:rank] @ vt[:rank]) / scales, 1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("m, n", M_N)
def test_dobi_with_one_batch_is_svd_llm_at_that_rank(m, n, rank):
    one = observe({"projectors", "rank", "gram"}, m, n, batches=1, rank=rank)
    close(product(one.weight, solved("dobi_svd", one), rank), product(one.weight, solved("svd_llm", one), rank))
    several = observe({"projectors", "rank", "gram"}, m, n, batches=3, rank=rank)
    found, other = (product(several.weight, solved(method, several), rank) for method in ("dobi_svd", "svd_llm"))
    assert float((found - other).abs().max()) > 1e-3  # with several, it is another method


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_basis_sharing_of_equal_inputs_is_the_stack(rank):
    """Of members that read the same input, no shared factor can do better."""
    parts = [random(m, 10, seed=m) for m in (7, 9)]
    x = random(50, 10, seed=3)
    sums = GramSum.empty(10)
    sums.add(x)
    first, second = (LayerStatistics(tuple(w.shape), inputs=sums) for w in parts)
    stack = torch.cat(parts)
    merged = first.merged(second)
    assert merged.shape == (16, 10)
    found = product(stack, DECOMPOSERS.get("basis_sharing").solve(stack, merged), rank)
    close(found, product(stack, solve(stack, Metric.of(column=x.t() @ x)), rank))


def test_basis_sharing_sums_the_inputs_of_its_members():
    parts, inputs = [random(m, 10, seed=m) for m in (7, 9)], [random(50, 10, seed=s) * s for s in (1, 3)]
    statistics = []
    for w, x in zip(parts, inputs, strict=True):
        sums = GramSum.empty(10)
        sums.add(x)
        statistics.append(LayerStatistics(tuple(w.shape), inputs=sums, tokens=len(x)))
    merged = statistics[0].merged(statistics[1])
    stack, total = torch.cat(parts), sum(x.t() @ x for x in inputs)
    assert merged.tokens == 100
    found = product(stack, DECOMPOSERS.get("basis_sharing").solve(stack, merged), 4)
    close(found, product(stack, solve(stack, Metric.of(column=total)), 4))


# T7: singular forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["cholesky", "eigen"])
@pytest.mark.parametrize("side", [None, *SIDES])
@pytest.mark.parametrize("m, n", [(8, 8), (6, 12), (12, 6)])
def test_singular_forms_on_both_sides(m, n, side, root):
    w, x, g = random(m, n), random(4, n, seed=1), random(3, m, seed=2)
    metric = Metric.of(g.t() @ g, x.t() @ x)
    spectrum = solve(w, metric, side=side, root=root)
    total = metric.squared(w)
    for rank in range(1, min(m, n) + 1):
        found = product(w, spectrum, rank)
        assert bool(torch.isfinite(found).all())
        assert metric.squared(w - found) == pytest.approx(spectrum.tail(rank), rel=1e-6, abs=1e-10 * total)
    if side is None:  # on the larger side no more than what the forms see is sure to come back
        close(product(w, spectrum, min(m, n)), w, 1e-5)
    assert spectrum.relative_error(3) < 1e-5  # three gradients: all that is seen has rank 3
    assert any("rank-deficient" in note for note in spectrum.notes)


@pytest.mark.parametrize("zero", ["row", "column", "both"])
@pytest.mark.parametrize("m, n", [(8, 8), (6, 12), (12, 6)])
def test_a_zero_form_is_taken_for_the_identity(m, n, zero):
    w, metric = problem(m, n)
    row = None if zero in ("row", "both") else metric.row.matrix()
    column = None if zero in ("column", "both") else metric.column.matrix()
    nothing = [torch.zeros(k, k, dtype=torch.float64) for k in (m, n)]
    given = Metric.of(nothing[0] if row is None else row, nothing[1] if column is None else column)
    found, expected = solve(w, given), solve(w, Metric.of(row, column))
    assert torch.equal(found.values, expected.values)
    assert torch.equal(product(w, found, 3), product(w, expected, 3))
    assert len(found.notes) == (2 if zero == "both" else 1)
    assert all(("plain SVD" if zero == "both" else "the identity") in note for note in found.notes)


@pytest.mark.parametrize("m, n", [(20, 16), (16, 20)])
def test_massive_activations_in_float32_on_both_sides(m, n):
    w, x, g = random(m, n), random(400, n, seed=1), random(400, m, seed=2)
    x[:, 3] *= 3000
    g[:, 5] *= 3000
    exact = Metric.of(g.t() @ g, x.t() @ x)
    inputs, gradients = GramSum.empty(n), GramSum.empty(m)
    inputs.add(x.float())
    gradients.add(g.float())
    spectrum = solve(w, Metric.of(gradients.gram, inputs.gram))
    for rank in (1, 4, 8, 12):
        assert exact.squared(w - product(w, spectrum, rank)) <= solve(w, exact).tail(rank) * (1 + 1e-3)


# forms seen through the weight ---------------------------------------------------------------------------------

DAMPING = {
    "none": lambda form: form,
    "shrunk": lambda form: form.shrunk(0.3),
    "shrunk to the identity": lambda form: form.shrunk(0.3, "identity"),
    "ridge": lambda form: form.with_ridge(0.2),
    "both": lambda form: form.with_ridge(0.2).shrunk(0.3),
    "twice": lambda form: form.shrunk(0.1).shrunk(0.3),
}


def seen(form, w):
    c = form.matrix()
    return Form(w @ c @ w.t(), seen=True, diagonal=c.diagonal())


@pytest.mark.parametrize("rows", [None, "dense"])
@pytest.mark.parametrize("damping", DAMPING)
@pytest.mark.parametrize("m, n", [(8, 8), (6, 12), (1, 5), (12, 6)])
def test_a_seen_form_of_the_inputs_gives_the_same(m, n, damping, rows):
    w, metric = problem(m, n, condition=100)
    damp = DAMPING[damping]
    row = Form() if rows is None else damp(metric.row)
    whole = solve(w, Metric(row, damp(metric.column)))
    small = solve(w, Metric(row, damp(seen(metric.column, w))))
    for rank in range(1, min(m, n) + 1):
        close(product(w, small, rank), product(w, whole, rank), 1e-7)
    close(small.values, whole.values, 1e-6)


@pytest.mark.parametrize("damping", DAMPING)
@pytest.mark.parametrize("m, n", [(12, 6), (5, 1)])
def test_a_seen_form_of_the_gradients_gives_the_same(m, n, damping):
    w, metric = problem(m, n, condition=100)
    damp = DAMPING[damping]
    whole = solve(w, Metric(damp(metric.row), damp(metric.column)))
    small = solve(w, Metric(damp(seen(metric.row, w.t())), damp(metric.column)))
    for rank in range(1, min(m, n) + 1):
        close(product(w, small, rank), product(w, whole, rank), 1e-7)
    close(small.values, whole.values, 1e-6)


def test_damping_is_what_it_says():
    c = psd(6, 1)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(Form(c).shrunk(0.3).matrix(), 0.7 * c + 0.3 * c.diagonal().diag())
    torch.testing.assert_close(Form(c).shrunk(0.3, "identity").matrix(), damped(c, 0.3))
    torch.testing.assert_close(Form(c).with_ridge(0.3).matrix(), ridged(c, 0.3))
    twice = Form(c).shrunk(0.3, "identity").shrunk(0.5, "identity")
    torch.testing.assert_close(twice.matrix(), damped(damped(c, 0.3), 0.5))
    torch.testing.assert_close(Form(c).shrunk(1).matrix(), c.diagonal().diag())
    torch.testing.assert_close(Form(c).shrunk(1, "identity").matrix(), c.trace() / 6 * eye)
    diagonal = Form(c.diagonal())
    torch.testing.assert_close(diagonal.shrunk(0.3).matrix(), c.diagonal())
    torch.testing.assert_close(diagonal.shrunk(0.3, "identity").matrix().diag(), damped(c.diagonal().diag(), 0.3))
    assert Form().shrunk(0.3).matrix() is None
    assert torch.equal(c, psd(6, 1))  # damping copies


def test_a_dead_channel_counts_as_a_typical_one():
    """A ridge of zero would leave the weights that read it unprotected."""
    c = psd(6, 1)
    c[2] = c[:, 2] = 0
    alive = c.diagonal()[c.diagonal() > 0]
    assert Form(c).shrunk(0.3).matrix()[2, 2] == pytest.approx(0.3 * float(alive.median()))
    assert not bool(Form(torch.zeros(3, 3)).shrunk(0.3).matrix().any())
    assert Form(torch.zeros(3, 3)).shrunk(0.3).is_zero


SCALES = [1e-3, 1.0, 30.0, 1e4]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("through", ["whole", "seen"])
@pytest.mark.parametrize("m, n", [(8, 8), (6, 12), (12, 6)])
def test_shrinkage_does_not_depend_on_the_scale_of_a_channel(m, n, through, scale):
    """The same function with one input channel times k, its weights over k, one output times k: the same cut."""
    w, metric = problem(m, n, condition=100)
    left, right = torch.ones(m, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    left[1] = right[2] = scale

    def cut(weight, row, column):
        if through == "seen":
            row, column = (row, seen(column, weight)) if m <= n else (seen(row, weight.t()), column)
        return solve(weight, Metric(row.shrunk(0.3), column.shrunk(0.1)))

    row, column = metric.row.matrix(), metric.column.matrix()
    scaled = left[:, None] * w / right
    found = cut(scaled, Form(row / torch.outer(left, left)), Form(column * torch.outer(right, right)))
    expected = cut(w, Form(row), Form(column))
    close(found.values, expected.values, 1e-6)
    close(product(scaled, found, 3) / left[:, None] * right, product(w, expected, 3), 1e-6)


def test_what_a_seen_form_cannot_do():
    w, metric = problem(6, 6)
    column, row = seen(metric.column, w), seen(metric.row, w.t())
    with pytest.raises(ValueError, match="has no root"):
        solve(w, Metric(column=column), side="in")
    with pytest.raises(ValueError, match="has no root"):
        solve(w, Metric(row, metric.column), side="out")
    with pytest.raises(ValueError, match="cannot measure"):
        Metric(column=column).squared(w)
    with pytest.raises(ValueError, match="diagonal is given"):
        Form(column.data, seen=True).shrunk(0.1)


# the randomised solver -----------------------------------------------------------------------------------------


def slowly_falling(m, n, power=0.5):
    """A weight and dense inputs, with singular values i^-power in the metric of the inputs."""
    u, v = (torch.linalg.qr(random(k, min(m, n), seed=k)).Q for k in (m, n))
    sigma = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power
    c = psd(n, 2, condition=100)
    return u * sigma @ torch.linalg.solve(torch.linalg.cholesky(c), v, left=True).t(), c


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("m, n", [(160, 200), (200, 160)])
def test_randomised_for_small_ranks_only(m, n, rows, power):
    w, c = slowly_falling(m, n, power)
    metric = Metric.of(psd(m, 1, 100) if rows else None, c)
    limit = 160 // RANDOMISED_BELOW
    exact = solve(w, metric)
    for rank in (1, limit // 2, limit):
        spectrum = solve(w, metric, rank=rank)
        assert spectrum.full_rank == rank
        assert spectrum.notes == (f"randomised solver for {rank} of 160 components",)
        loss = metric.squared(w - product(w, spectrum, rank))
        assert exact.tail(rank) * (1 - 1e-9) <= loss <= exact.tail(rank) * 1.001
        assert spectrum.tail(0) == pytest.approx(exact.tail(0), rel=1e-9)
        if m <= n or rows:
            assert spectrum.tail(rank) == pytest.approx(loss, rel=1e-9)
        assert loss * (1 - 1e-9) <= spectrum.tail(rank) <= loss * 1.001
    for rank in (limit + 1, 100, None):
        spectrum = solve(w, metric, rank=rank)
        assert spectrum.notes == ()
        assert torch.equal(spectrum.values, exact.values)


def test_the_randomised_solver_is_deterministic():
    w, c = slowly_falling(96, 120)
    state = torch.get_rng_state()
    one, other = (solve(w, Metric.of(column=c), rank=8) for _ in range(2))
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.basis, other.basis)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_spectrum_solved_for_a_rank_has_no_more():
    w, c = slowly_falling(64, 80)
    with pytest.raises(ValueError, match=r"outside 1\.\.4"):
        solve(w, Metric.of(column=c), rank=4).factors(w, 5)


def test_gram_of_batches_is_that_of_the_collector():
    """The ground under the tests of whole methods: their raw tokens are what the collector saw."""
    observed = observe({"gram", "row"}, 6, 6)
    torch.testing.assert_close(observed.statistics.gram, gram_of(observed.inputs))
    torch.testing.assert_close(observed.statistics.row.matrix(), gram_of(observed.gradients))


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("rows", [False, True])
def test_the_form_on_the_outputs_can_be_read_off_the_spectrum(m, n, rows):
    """Whole where it was solved on the outputs' side, else as W^T G W; damping included."""
    weight, row = random(m, n, seed=1), Form(psd(m, 1)).shrunk(0.3) if rows else Form()
    found = solve(weight, Metric(row, Form(psd(n, 2)))).row()
    whole = torch.eye(m, dtype=torch.float64) if row.matrix() is None else row.matrix()
    if found.seen:
        close(found.data, weight.t() @ whole @ weight)
    else:
        close(torch.eye(m, dtype=torch.float64) if found.data is None else found.data, whole)


def test_leading_components_do_not_hold_the_form_on_the_outputs():
    found = solve(random(40, 40, seed=1), Metric.of(row=psd(40, 2)), rank=3)
    with pytest.raises(ValueError, match="leading components"):
        found.row()
