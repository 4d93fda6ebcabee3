"""What single allocators promise: identities, neutral settings, and the best plan where it is known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from problems import SHAPES, KnownModel, problem
from slimrank.budget.curves import Curve, Limits
from slimrank.budget.hulls import Table
from slimrank.budget.knapsack import solve
from slimrank.budget.minimax import least_maximum
from slimrank.budget.problem import Allocation, Item, Problem
from slimrank.budget.proportional import project
from slimrank.errors import BudgetError, NonFiniteError, PlanError, RecipeError
from slimrank.layers.forms import PAIR, PIVOT
from slimrank.methods.allocate.dobi import SoftTruncation, _truncating
from slimrank.methods.allocate.lems import depth_bias
from slimrank.methods.allocate.mrcs import greedy
from slimrank.methods.allocator import ALLOCATORS
from slimrank.pipeline.rank_problem import provisional


def allocate(id, given, **options):
    return ALLOCATORS.get(id).configured(options).allocate(given)


def total(given, ranks):
    return given.probe.joint(ranks).kl


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.8])
def test_measured_divergences_that_add_up_give_the_best_plan(keep):
    """Here the divergence is importance times energy, so LEMS' curves are exact; the metric's own are not."""
    given = problem(keep)
    best = total(given, allocate("lems", given, solver="exact").ranks)
    for id in ALLOCATORS.all():
        if id not in ("from_plan", "dobi"):
            options = {"steps": 8} if id == "fermigrad" else {}
            assert total(given, allocate(id, given, **options).ranks) >= best * (1 - 1e-9)
    assert total(given, allocate("lems", given).ranks) <= best * 1.01
    assert best < total(given, allocate("spectrum", given).ranks) < total(given, allocate("uniform", given).ranks)


@pytest.mark.parametrize("anchors", [[0.1], [0.2, 0.6], [0.1, 0.4, 0.8]])
def test_the_curve_goes_through_what_was_measured(anchors):
    given = problem(0.6)
    found = allocate("lems", given, anchors=anchors)
    for item, curve in zip(given.items, found.curves, strict=True):
        for fraction in anchors:
            rank = max(1, round(fraction * PAIR.largest_rank(*item.shape)))
            measured = given.probe.single({item.path: [rank]})[item.path][0].kl
            assert curve.errors[curve.index(rank)] == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("solver", ["lagrange", "exact"])
@pytest.mark.parametrize("rest", [0.0, 1e-12, 1e-8, 1e-4])
def test_a_weight_of_nearly_low_rank(rest, solver):
    """Beyond its second rank nothing is lost: an anchor there has no say about the first."""
    plain, path = problem(0.6), "layers.1.mlp.up"
    values = plain.probe.values[path].copy()
    values[2:] *= rest
    probe = KnownModel(plain.items, {**plain.probe.values, path: values}, plain.probe.importance)
    given = replace(plain, spectra={**plain.spectra, path: (values, 0.0)}, probe=probe)
    found = allocate("lems", given, solver=solver)
    curve = next(c for c in found.curves if c.path == path)
    assert curve.errors[:2] == pytest.approx([probe.loss_of(path, 1), probe.loss_of(path, 2)], rel=1e-6, abs=1e-9)
    assert found.ranks[path] >= 2
    assert found.gap < 0.02


def test_depth_bias():
    """Against the formula, term by term, and the figures of the reference code."""
    for blocks, alpha, gamma in itertools.product((1, 2, 8), (0.0, 1.0, 3.0), (0.0, 5.0)):
        sums = [sum((k + 1) ** -alpha for k in range(b, blocks)) for b in range(blocks)]
        expected = [1 + gamma * (s - sums[-1]) / max(sums[0] - sums[-1], 1e-12) for s in sums]
        assert depth_bias(blocks, alpha, gamma) == pytest.approx(expected)
    assert depth_bias(8, 0, 5).round(2).tolist() == [6, 5.29, 4.57, 3.86, 3.14, 2.43, 1.71, 1]
    assert depth_bias(8, 1, 5).round(2).tolist() == [6, 4.07, 3.11, 2.46, 1.98, 1.6, 1.28, 1]


def test_gamma_zero_is_no_bias_and_is_always_tried():
    given = problem(0.6)
    plain = allocate("lems", given)
    assert allocate("lems", given, gamma=0.0, alpha=2.0).ranks == plain.ranks
    assert allocate("lems", given, gamma=5.0).ranks != plain.ranks
    searched = allocate("lems", given, search=True, gamma=5.0)
    assert total(given, searched.ranks) <= total(given, plain.ranks)
    assert "gamma 0 of" in searched.notes[0]


@pytest.mark.parametrize("id", ["lems", "asvd_plus", "mrcs_plus"])
def test_curves_are_divergences_whatever_the_bias(id):
    given = problem(0.6)
    found = allocate(id, given, gamma=5.0)
    assert found.divergence
    predicted = sum(float(c.errors[c.index(found.ranks[c.path])]) for c in found.curves)
    assert predicted == pytest.approx(total(given, found.ranks), rel=1e-6)
    assert not allocate("asvd", given).divergence


@pytest.mark.parametrize("id, each", [("lems", 1), ("asvd_plus", 1), ("asvd", 6)])
def test_layers_without_a_choice_are_not_measured(id, each):
    given = problem(0.7)
    fixed = {"layers.0.attn.q": Limits(dense=True), "layers.1.attn.q": Limits(9, 9)}
    items = tuple(replace(i, limits=fixed.get(i.path, i.limits)) for i in given.items)
    probe = KnownModel(given.items, given.probe.values, given.probe.importance)
    ranks = allocate(id, replace(given, items=items, probe=probe)).ranks
    assert (ranks["layers.0.attn.q"], ranks["layers.1.attn.q"]) == ("dense", 9)
    assert probe.calls == each * (len(items) - 2)


def test_the_bias_gives_first_blocks_more():
    given = problem(0.6, blocks=6, alike=True)

    def kept(gamma):
        ranks = allocate("lems", given, gamma=gamma).ranks
        sizes = np.array([PAIR.parameters(*i.shape, ranks[i.path]) for i in given.items])
        return sizes[: len(SHAPES) * 2].sum()

    assert kept(8.0) > kept(0.0)


def bounded_curves(seed):
    """Four curves of any shape, one of which cannot get below an error of 2, and a budget."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(4):
        costs, errors = np.cumsum(rng.integers(1, 9, 5)), np.sort(rng.random(5))[::-1]
        made.append(Curve(f"layer {i}", np.arange(1, 6), costs, errors + 2 * (i == seed % 4)))
    least, most = sum(int(c.costs[0]) for c in made), sum(int(c.costs[-1]) for c in made)
    return made, int(rng.integers(least, most + 1))


@pytest.mark.parametrize("seed", range(30))
def test_the_threshold_is_the_smallest_of_all_plans(seed):
    """The largest errors in order, so that a layer whose ranks are bounded does not hide the others."""
    curves, budget = bounded_curves(seed)

    def worst(picks):
        return sorted((float(c.errors[p]) for c, p in zip(curves, picks, strict=True)), reverse=True)[:2]

    found = least_maximum(curves, budget)
    assert sum(int(c.costs[p]) for c, p in zip(curves, found, strict=True)) <= budget
    fitting = [
        picks for picks in itertools.product(range(5), repeat=4)
        if sum(int(c.costs[p]) for c, p in zip(curves, picks, strict=True)) <= budget
    ]  # fmt: skip
    assert worst(found)[0] == min(map(worst, fitting))[0]
    if worst(found)[0] == min(curves[seed % 4].errors):
        assert worst(found) == min(map(worst, fitting))


@pytest.mark.parametrize("id", ["asvd", "asvd_plus"])
def test_a_bounded_layer_takes_the_rank_of_least_error(id):
    given = problem(0.6)
    items = tuple(replace(i, limits=Limits(2, 20) if i.path == "layers.2.mlp.up" else i.limits) for i in given.items)
    assert allocate(id, replace(given, items=items)).ranks["layers.2.mlp.up"] == 20


def test_greedy_with_tiny_quotas_is_the_threshold():
    given = problem(0.5)
    curves = given.curves()
    table = Table.of(curves)
    worst = [
        table.errors[np.arange(len(p)), p].max()
        for p in (greedy(curves, given.budget, 3000), least_maximum(curves, given.budget))
    ]
    assert worst[0] == pytest.approx(worst[1], rel=0.1)


def test_asvd_stops_at_a_perplexity():
    given = problem(0.9)
    full, stopped = allocate("asvd", given), allocate("asvd", given, max_rise=1e9)
    assert total(given, stopped.ranks) > total(given, full.ranks)
    rise = float(np.exp(total(given, full.ranks))) * 1.5
    found = allocate("asvd", given, max_rise=rise)
    assert np.exp(total(given, found.ranks)) <= rise
    size = sum(PAIR.parameters(*i.shape, found.ranks[i.path]) for i in given.items)
    assert size < given.budget
    assert found.notes == ()
    missed = allocate("asvd", given, max_rise=1 + 1e-9)
    assert missed.ranks == full.ranks
    assert missed.notes == ("the budget does not keep the perplexity within 1 times the original's",)


def test_asvd_does_not_cut_where_nothing_was_measured():
    """A layer whose loss does not rise is kept at the least fraction that was measured, while the budget allows it."""
    given = problem(0.75)
    idle = given.items[0].path
    weights = {**given.probe.importance, idle: 0.0}
    given = replace(given, probe=KnownModel(given.items, given.probe.values, weights))
    least = {i.path: round(0.4 * PAIR.largest_rank(*i.shape)) for i in given.items}
    ranks = allocate("asvd", given).ranks
    assert ranks[idle] == least[idle]
    assert all(r == "dense" or r >= least[path] for path, r in ranks.items())
    tight = problem(0.25)
    ranks = allocate("asvd", tight).ranks
    parts = [ranks[i.path] / PAIR.largest_rank(*i.shape) for i in tight.items]
    assert max(parts) - min(parts) < 0.15


def test_svd_llm_v2():
    alike = problem(0.6, alike=True)
    uniform = allocate("uniform", alike).ranks
    for variant in ("relative", "literal"):
        ranks = allocate("svd_llm_v2", alike, variant=variant).ranks
        assert all(abs(ranks[p] - uniform[p]) <= 1 for p in ranks)
    given = problem(0.6, blocks=5)
    ranks = allocate("svd_llm_v2", given).ranks
    scaled = {path: (values * 1000, 0.0) for path, (values, _) in given.spectra.items()}
    assert allocate("svd_llm_v2", replace(given, spectra=scaled)).ranks == ranks
    assert allocate("svd_llm_v2", replace(given, spectra=scaled), variant="literal").ranks != ranks


@pytest.mark.parametrize("form", [PAIR, PIVOT], ids=lambda c: c.name)
def test_svd_llm_v2_keeps_more_of_what_loses_more_at_the_uniform_rank(form):
    given = replace(problem(0.6, blocks=5), form=form)
    ranks = allocate("svd_llm_v2", given).ranks
    for role in SHAPES:
        members = [i for i in given.items if i.role == role]
        at = [form.within(*i.shape, int(0.6 * i.parameters)) for i in members]
        loss = [given.tail(i)[r] / given.tail(i)[0] for i, r in zip(members, at, strict=True)]
        kept = [form.parameters(*i.shape, ranks[i.path]) for i in members]
        assert [kept[j] for j in np.argsort(loss)] == sorted(kept)


@pytest.mark.parametrize("variant", ["relative", "literal"])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.6, 0.8, 0.9])
def test_svd_llm_v2_leaves_every_role_its_share(keep, variant):
    """Up to one step of a layer, which rounding takes of one and gives to another."""
    given = problem(keep, blocks=5)
    ranks = allocate("svd_llm_v2", given, variant=variant).ranks
    for role in SHAPES:
        members = [i for i in given.items if i.role == role]
        kept = sum(PAIR.parameters(*i.shape, ranks[i.path]) for i in members)
        gap = max(
            int(np.diff(costs).max())
            for i, (_, costs) in zip(given.items, given.choices, strict=True)
            if i.role == role
        )
        assert abs(kept - keep * sum(i.parameters for i in members)) <= len(members) * gap


def test_atp():
    given = problem(0.6, blocks=5, alike=True)
    flat = allocate("atp", given, spread=0.0, trials=1).ranks
    steep = allocate("atp", given, spread=1.0, trials=1).ranks
    uniform = allocate("uniform", given).ranks
    assert all(abs(flat[p] - uniform[p]) <= 1 for p in flat)
    for role in SHAPES:
        falling = [PAIR.parameters(*i.shape, steep[i.path]) for i in given.items if i.role == role]
        assert falling == sorted(falling, reverse=True)
        assert falling[0] > falling[-1]
    best = allocate("atp", given)
    assert total(given, best.ranks) <= min(total(given, flat), total(given, steep))
    assert "divergence" in best.notes[0]
    one = problem(0.6, blocks=1)
    assert allocate("atp", one).ranks


def test_ada_cr():
    given = problem(0.6, blocks=5, alike=True)
    neutral = allocate("ada_cr", given, least=0.6).ranks
    assert all(abs(neutral[p] - r) <= 1 for p, r in allocate("uniform", given).ranks.items())
    ranks = allocate("ada_cr", given, least=0.3).ranks
    for role in SHAPES:  # the known model's first blocks change their input most
        kept = [PAIR.parameters(*i.shape, ranks[i.path]) for i in given.items if i.role == role]
        assert kept == sorted(kept, reverse=True)
        assert kept[0] > kept[-1]
    assert allocate("ada_cr", given, least=0.3).notes == ()
    bent = allocate("ada_cr", given, least=0.9)
    assert bent.ranks == neutral
    assert bent.notes == ("least 0.9 is more than all blocks keep together, 0.600: uniform",)
    turned = allocate("ada_cr", given, least=0.3, importance="similarity").ranks
    assert turned["layers.0.mlp.up"] < turned["layers.4.mlp.up"]


@pytest.mark.parametrize("id", ["spectrum", "shared"])
def test_errors_in_the_unit_of_the_loss_are_absolute_and_all_others_relative(id):
    given = problem(0.6)
    other = replace(given, in_loss=False)
    plans = {scale: allocate(id, given, scale=scale).ranks for scale in ("auto", "metric", "relative")}
    assert plans["auto"] == plans["metric"] != plans["relative"]
    assert allocate(id, other).ranks == plans["relative"]
    units = {item.path: 10.0**i for i, item in enumerate(given.items)}
    spectra = {path: (values * units[path], 0.0) for path, (values, _) in given.spectra.items()}
    assert allocate(id, replace(other, spectra=spectra)).ranks == plans["relative"]


def test_shared_ranks():
    given = problem(0.6, blocks=6)
    ranks = allocate("shared", given, layers=3).ranks
    for role, half in itertools.product(SHAPES, range(2)):
        assert len({ranks[f"layers.{3 * half + b}.{role}"] for b in range(3)}) == 1
    assert allocate("shared", given, layers=1).ranks == allocate("spectrum", given).ranks
    with pytest.raises(RecipeError, match="cannot be combined with ranks shared"):
        ALLOCATORS.get("shared").configured({"monotone": True}).check(replace(given, spectra={}))
    bounded = {"layers.0.mlp.up": Limits(3, 3), "layers.1.mlp.up": Limits(5, 5)}
    items = tuple(replace(i, limits=bounded.get(i.path, i.limits)) for i in given.items)
    with pytest.raises(PlanError, match=r"no rank is allowed for all of layers\.0\.mlp\.up, layers\.1\.mlp\.up"):
        ALLOCATORS.get("shared").configured({}).check(replace(given, items=items, spectra={}))
    bounded = {"layers.0.mlp.up": Limits(1, 9), "layers.1.mlp.up": Limits(9, None)}
    items = tuple(replace(i, limits=bounded.get(i.path, i.limits)) for i in given.items)
    tight = replace(given, items=items, spectra={}, budget=sum(int(costs[0]) for _, costs in given.choices) + 8 * 144)
    with pytest.raises(BudgetError, match=r"'layers\.0\.mlp\.up' alone takes 2,592 at rank 9"):
        ALLOCATORS.get("shared").configured({}).check(tight)


def test_side_constraints_through_an_allocator():
    given = problem(0.6, blocks=4)
    ranks = allocate("spectrum", given, monotone=True, block_floor=0.4).ranks
    sizes = [PAIR.parameters(*i.shape, ranks[i.path]) for i in given.items]
    kept = np.reshape(sizes, (4, len(SHAPES))).sum(axis=1) / given.sizes[: len(SHAPES)].sum()
    assert kept.tolist() == sorted(kept.tolist(), reverse=True)
    assert kept.min() >= 0.4


def test_a_floor_between_the_sizes_of_a_block_is_refused_before_there_are_spectra():
    """Blocks of one rank or the whole: they keep a little or all."""
    given = problem(0.6, multiple=20, blocks=4)
    few = tuple(replace(i, limits=Limits() if i.role == "mlp.up" else Limits(2, 2)) for i in given.items)
    bare = replace(given, items=few, spectra={})
    ALLOCATORS.get("spectrum").configured({"block_floor": 0.3}).check(bare)
    message = r"no ranks of block 0 keep 0\.35 to 0\.4 .* the nearest keep 0\.2839"
    with pytest.raises(BudgetError, match=message) as raised:
        ALLOCATORS.get("spectrum").configured({"block_floor": 0.35, "block_cap": 0.4}).check(bare)
    assert "a block_floor of at most 0.2838" in raised.value.hint


@pytest.mark.parametrize("start", ["spectrum", "uniform"])
@pytest.mark.parametrize("form", [PAIR, PIVOT], ids=lambda c: c.name)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (4.0, 1.0)])
def test_fermigrad_finds_the_best_of_two_layers(form, weights, start):
    """The toy of the paper's figure, smaller: within a rank of brute force where the loss is a sum."""
    items = (Item("a", (64, 64), 0, "a"), Item("b", (64, 64), 1, "b"))
    k = np.arange(1, 65)
    values = {"a": np.exp(-k / 12.0), "b": np.exp(-k / 40.0)}
    probe = KnownModel(items, values, dict(zip("ab", weights, strict=True)))
    budget = int(0.6 * 2 * 64 * 64)
    given = Problem(items, budget, 1, form, {p: (v, 0.0) for p, v in values.items()}, probe, True)
    found = allocate("fermigrad", given, start=start).ranks
    best = min(
        ((probe.joint({"a": r, "b": q}).kl, r, q) for r in k.tolist() for q in k.tolist()
         if min(form.parameters(64, 64, r), 4096) + min(form.parameters(64, 64, q), 4096) <= budget),
    )  # fmt: skip
    for path, rank in zip("ab", best[1:], strict=True):
        assert abs((64 if found[path] == "dense" else found[path]) - rank) <= 1


@pytest.mark.parametrize("id, start", [("fermigrad", "spectrum"), ("fermigrad", "uniform"), ("dobi", "uniform")])
@pytest.mark.parametrize("keep", [0.6, 0.8])
def test_a_descent_is_no_worse_than_where_it_began(id, start, keep):
    given = problem(keep)
    options = {"steps": 8, "start": start} if id == "fermigrad" else {"steps": 2}
    found = allocate(id, given, **options)
    begin = allocate("spectrum", given).ranks if start == "spectrum" else provisional(given).ranks
    assert total(given, found.ranks) <= total(given, begin)
    assert "divergences: descent" in found.notes[0]
    assert [curve.path for curve in found.curves] == [i.path for i in given.items if id == "fermigrad"]


def test_a_descent_leaves_dense_layers_dense(monkeypatch):
    """Rounded to the budget they became pairs of the same size: the divergence was 50 times that of the start."""
    from slimrank.methods.allocate import fermigrad

    plans = {}
    monkeypatch.setattr(fermigrad, "best_of", lambda given, found: plans.update(found) or Allocation(found["start"]))
    given = problem(0.8)
    allocate("fermigrad", given)
    dense = {name: {p for p, rank in ranks.items() if rank == "dense"} for name, ranks in plans.items()}
    assert dense["start"] <= dense["descent"]
    assert total(given, plans["descent"]) < 2 * total(given, plans["start"])


class Nan(KnownModel):
    def loss(self, transforms, batch):
        return super().loss(transforms, batch) * (np.nan if transforms else 1.0)


@pytest.mark.parametrize("id", ["fermigrad", "dobi"])
def test_a_loss_that_is_not_finite_names_the_step(id):
    given = problem(0.6)
    bad = replace(given, probe=Nan(given.items, given.probe.values, given.probe.importance))
    with pytest.raises(NonFiniteError, match=r"(step 1 of 2|at the start)"):
        allocate(id, bad, steps=2)


def test_gradients_by_soft_truncation(monkeypatch):
    monkeypatch.setattr("slimrank.methods.allocate.dobi.BLUR", 0.0)
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 4), (4, 6), (5, 5), (2, 5, 7)):
        y = torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        t = torch.rand(min(shape[-2:]), dtype=torch.float64, generator=generator).requires_grad_()
        assert torch.autograd.gradcheck(SoftTruncation.apply, (y, t))


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4])
def test_gradients_are_finite_at_equal_singular_values(values):
    u, v = (torch.linalg.qr(torch.randn(n, 4, generator=torch.Generator().manual_seed(n))).Q for n in (6, 5))
    y = (u * torch.tensor(values) @ v.T).requires_grad_()
    t = torch.tensor([1.0, 0.7, 0.2, 0.0, 0.0], requires_grad=True)
    SoftTruncation.apply(y, t).square().sum().backward()
    assert bool(torch.isfinite(y.grad).all())
    assert bool(torch.isfinite(t.grad).all())


def test_a_sharp_step_cuts_at_the_rank():
    y = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, vh = torch.linalg.svd(y, full_matrices=False)
    cut = SoftTruncation.apply(y, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(cut, (u[:, :2] * s[:2]) @ vh[:2])


@pytest.mark.parametrize("tokens, m, n", [(200, 96, 32), (200, 32, 96), (20, 96, 32), (20, 32, 96)])
def test_a_layer_loses_what_lies_beyond_its_rank(tokens, m, n):
    """Outputs of a tall layer have n singular values: a fraction of min(tokens, m) hardly cut anything."""
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((tokens, n), (m, n)))
    y = x @ w.T
    count = min(tokens, m, n)
    cut = _truncating(torch.tensor((count // 2 + 0.5) / count), 1e6)(x, y, slice(0, m))
    tail = torch.linalg.svdvals(y)[count // 2 : count].square().sum()
    torch.testing.assert_close((cut - y).square().sum(), tail)


def test_projection_keeps_what_it_should():
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted, sizes = rng.normal(0.6, 0.4, 12), rng.integers(1, 100, 12).astype(float)
        low, high = np.full(12, 0.1), np.full(12, 1.0)
        total = rng.uniform(0.15, 0.95) * sizes.sum()
        found = project(wanted, sizes, low, high, total)
        assert (found * sizes).sum() == pytest.approx(total, rel=1e-9)
        inside = (found > low + 1e-9) & (found < high - 1e-9)
        assert np.ptp((found - wanted)[inside]) < 1e-9 if inside.any() else True
        assert bool((found[wanted.argsort()][1:] >= found[wanted.argsort()][:-1] - 1e-12).all())


def test_a_curve_that_several_plans_share():
    curve = Curve("a", np.array([1, 2]), np.array([3, 6]), np.array([2.0, 1.0]))
    assert solve([curve], 6).ranks == {"a": 2}
