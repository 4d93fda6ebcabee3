"""Every registered allocator through the same tests."""

from dataclasses import replace

import numpy as np
import pytest

from problems import KnownModel, problem
from slimrank.budget.curves import Limits
from slimrank.budget.rank_plan import RankPlan
from slimrank.errors import BudgetError, NonFiniteError, PlanError, RecipeError
from slimrank.layers.forms import PIVOT
from slimrank.methods.allocator import ALLOCATORS

IDS = list(ALLOCATORS.all())
QUICK = {"fermigrad": {"steps": 4}, "dobi": {"steps": 2}, "atp": {"trials": 3}, "asvd": {"fractions": [0.3, 0.6, 0.9]}}
EXACT = [id for id in IDS if id not in ("fermigrad", "dobi")]
SOLVING = [id for id in IDS if "solver" in ALLOCATORS.get(id).options.model_fields]
KEEPS = [0.4, 0.5, 0.8, 0.95]
ADDITIVE = ["spectrum", "lems"]  # they minimise the very sum that `problem` is made of, or one of its parts


@pytest.fixture
def options(tmp_path):
    """Options that make an allocator quick; `from_plan` gets the plan of uniform ranks."""

    def chosen(id, given, **more):
        if id != "from_plan":
            return {**QUICK.get(id, {}), **more}
        shapes = {item.path: item.shape for item in given.items}
        ranks = ALLOCATORS.get("uniform").configured({}).allocate(given).ranks
        plan = RankPlan.build(ranks, shapes, "uniform", given.budget, cost_model=given.form.name)
        plan.model_copy(update={"budget": None}).save(tmp_path / "plan.json")
        return {"file": str(tmp_path / "plan.json"), **more}

    return chosen


def allocate(id, given, options, **more):
    return ALLOCATORS.get(id).configured(options(id, given, **more)).allocate(given)


def cost(given, ranks):
    return sum(given.form.parameters(*item.shape, ranks[item.path]) for item in given.items)


def steps(given, ranks):
    """What the next candidate of each item would take."""
    for item, (candidates, costs) in zip(given.items, given.choices, strict=True):
        rank = ranks[item.path]
        index = candidates.tolist().index(-1 if rank == "dense" else rank)
        if index + 1 < len(costs):
            yield item, int(costs[index + 1] - costs[index])


def slack_is_spent(id, given, ranks):
    """The budget contract: nothing that may grow alone could. For `shared` that are groups; `uniform`, and the plan
    that `from_plan` is given here, hold every layer to its own share of the budget.
    """
    left = given.budget - cost(given, ranks)
    alike = {}
    for item, step in steps(given, ranks):
        key = (item.shape, item.role, item.block // 2) if id == "shared" else item.path
        alike[key] = alike.get(key, 0) + step
        if id in ("uniform", "from_plan"):
            share = given.budget * item.parameters / given.sizes.sum()
            now = given.form.parameters(*item.shape, ranks[item.path])
            assert now <= share < now + step
    if id not in ("uniform", "from_plan"):
        assert all(step > left for step in alike.values())


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("id", IDS)
def test_the_budget_is_kept_and_spent(id, keep, multiple, options):
    given = problem(keep, multiple)
    ranks = allocate(id, given, options).ranks
    assert list(ranks) == [item.path for item in given.items]
    assert cost(given, ranks) <= given.budget
    slack_is_spent(id, given, ranks)
    for item in given.items:
        assert ranks[item.path] == "dense" or ranks[item.path] % multiple == 0
        assert ranks[item.path] == "dense" or 1 <= ranks[item.path] < min(item.shape)


@pytest.mark.parametrize("more", [{}, {"multiple": 4, "form": PIVOT, "keep": 0.7}], ids=["pair", "pivot"])
@pytest.mark.parametrize("id", IDS)
def test_ranks_do_not_depend_on_the_width_of_weights(id, more, options):
    """A budget in bits is the one in parameters, so many times; a budget below a whole parameter buys nothing."""
    given, wide = problem(**{"keep": 0.6, **more}), problem(**{"keep": 0.6, **more}, width=16)
    assert wide.budget == 16 * given.budget
    assert (wide.unit, wide.noun) == (16, "parameters")
    assert allocate(id, wide, options).ranks == allocate(id, given, options).ranks


def flat(given, least):
    """Spectra that are zero from some index on: beyond it nothing is gained."""
    values = {path: np.where(np.arange(len(v)) < least, v, 0.0) for path, v in given.probe.values.items()}
    probe = KnownModel(given.items, values, given.probe.importance)
    return replace(given, spectra={path: (v, 0.0) for path, v in values.items()}, probe=probe)


@pytest.mark.parametrize("least", [4, 48])
@pytest.mark.parametrize("solver", ["lagrange", "exact"])
@pytest.mark.parametrize("id", SOLVING)
def test_every_solver_spends_the_budget_on_flat_spectra_too(id, solver, least, options):
    for given in (flat(problem(0.6), least), flat(problem(0.6, form=PIVOT), least)):
        ranks = allocate(id, given, options, solver=solver).ranks
        assert cost(given, ranks) <= given.budget
        slack_is_spent(id, given, ranks)


@pytest.mark.parametrize("id", IDS)
def test_keeping_all_is_dense(id, options):
    assert set(allocate(id, problem(1.0), options).ranks.values()) == {"dense"}


@pytest.mark.parametrize("id", IDS)
def test_the_same_again(id, options):
    assert allocate(id, problem(0.6), options).ranks == allocate(id, problem(0.6), options).ranks


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("id", EXACT)
def test_the_order_of_layers_does_not_matter(id, alike, options):
    """Nor where layers are alike, so that all choices between them are ties."""
    given = problem(0.6, alike=alike, blocks=4)
    turned = replace(given, items=given.items[::-1])
    assert allocate(id, turned, options).ranks == allocate(id, given, options).ranks


@pytest.mark.parametrize("keep", [0.45, 0.6, 0.75])
@pytest.mark.parametrize("id", [id for id in EXACT if id not in ("ada_cr", "atp", "shared")])
def test_equal_layers_get_nearly_equal_ranks(id, keep, options):
    """Up to one step, which the budget allows some of them and not others. Where errors are added up some stay dense
    and the others are cut the deeper, a pair at break-even being no good; these are equal but for the one that the
    budget is filled up with.
    """
    given = problem(keep, alike=True, blocks=4)
    ranks = allocate(id, given, options).ranks
    for role in {item.role for item in given.items}:
        numbers = [ranks[i.path] for i in given.items if i.role == role]
        cut = sorted(r for r in numbers if r != "dense")
        if id not in ("spectrum", "lems"):
            assert len(cut) in (0, len(numbers))
            assert not cut or cut[-1] - cut[0] <= 1
        else:
            assert len(cut) < 3 or cut[-2] - cut[0] <= 1


@pytest.mark.parametrize("id", IDS)
def test_budgets_below_the_smallest_ranks(id, options):
    given = problem(0.6)
    least = sum(int(costs[0]) for _, costs in given.choices)
    with pytest.raises(BudgetError, match="keep_ratio of at least"):
        ALLOCATORS.get(id).configured(options(id, given)).allocate(replace(given, budget=least - 1))
    if id not in ("uniform", "from_plan"):
        assert cost(given, allocate(id, replace(given, budget=least), options).ranks) == least


@pytest.mark.parametrize("id", IDS)
def test_limits_are_kept(id, options):
    given = problem(0.6)
    limits = {
        "layers.0.attn.q": Limits(dense=True),
        "layers.1.attn.q": Limits(9, 9),
        "layers.1.mlp.up": Limits(20, None),
        "layers.2.mlp.up": Limits(1, 4),
    }
    items = tuple(replace(i, limits=limits.get(i.path, i.limits)) for i in given.items)
    bounded = replace(given, items=items)
    ranks = allocate(id, bounded, options, **({"layers": 1} if id == "shared" else {})).ranks
    assert ranks["layers.0.attn.q"] == "dense"
    assert ranks["layers.1.attn.q"] == 9
    assert ranks["layers.1.mlp.up"] == "dense" or ranks["layers.1.mlp.up"] >= 20
    assert ranks["layers.2.mlp.up"] <= 4
    assert cost(given, ranks) <= given.budget


@pytest.mark.parametrize("id", IDS)
def test_pivots_cost_less(id, options):
    given = problem(0.6, form=PIVOT)
    ranks = allocate(id, given, options).ranks
    assert cost(given, ranks) <= given.budget
    slack_is_spent(id, given, ranks)


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda ranks: {**ranks, "layers.0.attn.q": "dense", "layers.0.mlp.up": "dense"}, "parameters, over"),
        (lambda ranks: {**ranks, "layers.0.attn.q": 0}, "rank 0, which is not one of its candidates"),
        (lambda ranks: dict(list(ranks.items())[1:]), "left out, or added, 'layers"),
        (lambda ranks: {**ranks, "nonsense": 3}, "left out, or added, 'nonsense'"),
    ],
)
def test_an_allocator_that_breaks_its_contract_is_refused(broken, message):
    given = problem(0.6)
    real = ALLOCATORS.get("spectrum")
    bad = replace(real, allocate=lambda p, **o: replace(found := real.allocate(p, **o), ranks=broken(found.ranks)))
    with pytest.raises(PlanError, match=message):
        bad.configured({}).allocate(given)


def test_options_that_do_nothing_are_errors():
    """Random plans are compared with predicted divergences, which these do not have."""
    for id in ("atp", "asvd"):
        with pytest.raises(RecipeError, match="has no option 'plans'"):
            ALLOCATORS.get(id).configured({"plans": 3})
    assert ALLOCATORS.get("lems").configured({"plans": 3}).passes(10, 2) == 10 * 0.5 + 3


@pytest.mark.parametrize("id", IDS)
def test_unknown_options_are_errors(id):
    with pytest.raises(RecipeError, match=f"the allocation '{id}' has no option 'nonsense'"):
        ALLOCATORS.get(id).configured({"nonsense": 1})


@pytest.mark.parametrize("id", [id for id in IDS if "spectra" in ALLOCATORS.get(id).needs])
def test_spectra_that_are_cut_short_are_refused(id, options):
    given = problem(0.6)
    spectra = {path: (values[:5], 0.0) for path, (values, _) in given.spectra.items()}
    with pytest.raises(PlanError, match=r"the spectrum of 'layers\.\d\.\w+\.\w+' holds 5 of"):
        allocate(id, replace(given, spectra=spectra), options)


class Broken(KnownModel):
    def single(self, ranks):
        return {path: [effect._replace(kl=np.nan) for effect in some] for path, some in super().single(ranks).items()}


@pytest.mark.parametrize("id", ["lems", "asvd", "asvd_plus", "mrcs_plus"])
def test_divergences_that_are_not_finite_are_never_zero(id, options):
    given = problem(0.6)
    probe = Broken(given.items, given.probe.values, given.probe.importance)
    with pytest.raises(PlanError, match=r"'layers\.0\.attn\.q' is not finite"):
        allocate(id, replace(given, probe=probe), options)


class Exploding(KnownModel):
    def joint(self, ranks):
        return super().joint(ranks)._replace(kl=np.nan, nll=np.nan)

    def influence(self):
        return [0.5, np.nan, 0.5]


@pytest.mark.parametrize(
    "id, more",
    [("atp", {}), ("lems", {"search": True}), ("asvd", {}), ("fermigrad", {}), ("dobi", {}), ("ada_cr", {})],
)
def test_plans_whose_effect_is_not_finite_are_never_the_best(id, more, options):
    given = problem(0.6)
    probe = Exploding(given.items, given.probe.values, given.probe.importance)
    with pytest.raises(NonFiniteError, match=r"(divergence of a plan|influence of block 1) is NaN"):
        allocate(id, replace(given, probe=probe), options, **more)


@pytest.mark.parametrize("id", ["spectrum", "lems", "asvd_plus", "mrcs_plus"])
@pytest.mark.parametrize("keep", [0.4, 0.7])
def test_a_layer_that_matters_more_gets_no_less(id, keep, options):
    sizes = []
    for factor in (0.1, 1.0, 10.0):
        given = problem(keep)
        path = "layers.1.mlp.up"
        values, beyond = given.spectra[path]
        spectra = {**given.spectra, path: (values * factor**0.5, beyond)} if id == "spectrum" else given.spectra
        importance = {**given.probe.importance, path: given.probe.importance[path] * factor}
        probe = KnownModel(given.items, given.probe.values, importance)
        ranks = allocate(id, replace(given, spectra=spectra, probe=probe), options).ranks
        sizes.append(given.form.parameters(96, 48, ranks[path]))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
