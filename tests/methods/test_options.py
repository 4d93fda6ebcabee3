"""Options, ranks and the command line of methods and refiners."""

import json

import pytest
import torch

from method_runs import METHODS, compress, forbid_passes, low_rank, product, result_of, run
from slimrank.budget.problem import Item, Problem
from slimrank.budget.rank_plan import RankPlan
from slimrank.errors import RecipeError
from slimrank.methods.allocator import ALLOCATORS
from slimrank.methods.refiner import REFINERS
from slimrank.recipe import Recipe

# options -------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ("asvd", {"alpha": 2}, "less than or equal to 1, got 2", "alpha: number >= 0, <= 1; 0.5 by default"),
    ("asvd", {"alpah": 0.5}, "has no option 'alpah'", "did you mean 'alpha'"),
    ("asvd", {"scale": "median"}, "'mean' or 'max', got 'median'", "scale: mean, max; mean by default"),
    ("svd_llm", {"alpha": 0.5}, "has no option 'alpha'", "it has no options"),
    ("coala", {"alpha": 0.5}, "has no option 'alpha'", "mu"),
    ("coala", {"mu": -1}, "greater than or equal to 0", "mu: number >= 0 or adaptive"),
    ("kfac_svd", {"row_shrink": 1.5}, "less than or equal to 1", "number >= 0, <= 1; 0.1 by default"),
    ("kfac_svd", {"trim": 0.5}, "less than 0.5", "trim: number >= 0, < 0.5"),
    ("kfac_svd", {"clip": [2, 0.5]}, "0 <= low <= 1 <= high", "clip: list or null"),
    ("kfac_svd", {"accumulate": 2}, "has no option 'accumulate'", "known"),
    ("gfwsvd", {"accumulate": 0}, "greater than or equal to 1", "accumulate: integer >= 1; 4 by default"),
    ("drone", {"min_norm": "perhaps"}, "valid boolean", "min_norm: boolean"),
    ("basis_sharing", {"layers": 0}, "greater than or equal to 1", "layers: integer >= 1; 2 by default"),
    ("basis_sharing", {"layers": 1}, "finds no layers that could share", "layers=2"),
]


@pytest.mark.parametrize("method, options, message, hint", BAD_OPTIONS)
def test_bad_options_of_methods(method, options, message, hint, monkeypatch):
    forbid_passes(monkeypatch)
    with pytest.raises(RecipeError) as refused:
        compress(method=method, method_options=options)
    assert message in refused.value.message
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    "options, message",
    [
        ({"refine": "updat"}, "did you mean 'update'"),
        ({"refine": "update", "refine_options": {"anchor": 1.5}}, "less than or equal to 1"),
        ({"refine": "update", "refine_options": {"bias": "some"}}, "'none', 'existing' or 'all'"),
        ({"refine": "update", "refine_options": {"ancor": 1}}, "did you mean 'anchor'"),
        ({"refine": "update", "refine_options": {"iterations": 2}}, "has no option 'iterations'"),
        ({"refine": "update", "refine_options": {"stack_of_batch": 2}}, "has no option 'stack_of_batch'"),
        ({"refine": "ada_comp", "refine_options": {"iterations": 0}}, "greater than or equal to 1"),
        ({"refine": "ada_comp", "refine_options": {"stack_of_batch": 3}}, "a batch has 2"),
        ({"refine_options": {"anchor": 1}}, "but no refiner"),
        ({"method": "basis_sharing", "refine": "regress"}, "shares between layers"),
        ({"method": "basis_sharing", "refine": "ada_comp"}, "--refine update leaves them alone"),
    ],
)
def test_bad_options_of_refiners(options, message, monkeypatch, tmp_path):
    forbid_passes(monkeypatch)
    with pytest.raises(RecipeError, match=message):
        compress(**options)


@pytest.mark.parametrize(
    "method, options",
    [
        ("asvd", {"alpha": 0}), ("asvd", {"scale": "max"}), ("drone", {"min_norm": True}), ("coala", {"mu": 0.5}),
        ("coala", {"mu0": 30}), ("kfac_svd", {"row_shrink": 0.9}), ("kfac_svd", {"column_shrink": 0.9}),
        ("kfac_svd", {"shrink_target": "identity"}),
        ("kfac_svd", {"clip": [0.9, 1.1]}), ("kfac_svd", {"trim": 0.4}), ("gfwsvd", {"iterations": 1}),
        ("gfwsvd", {"shrink": 0.9}), ("gfwsvd", {"accumulate": 1}), ("basis_sharing", {"share": ["up_proj"]}),
    ],
    ids=str,
)  # fmt: skip
def test_every_option_changes_something(method, options):
    keys = {"samples": 1, "seq_len": 16} if method == "drone" else {}
    changed, default = compress(method=method, method_options=options, **keys), compress(method=method, **keys)
    differing = [
        path for path, layer in low_rank(changed.model).items()
        if layer.rank != (other := default.model.get_submodule(path)).rank
        or not torch.allclose(product(layer), product(other), atol=1e-6)
    ]  # fmt: skip
    assert differing
    described = json.loads(json.dumps(changed.report["provenance"]["method"]))
    used = {**described, **described["options"]}
    assert used | options == used


def test_asvd_at_power_zero_is_the_plain_svd():
    ours, plain = compress(method="asvd", method_options={"alpha": 0}), result_of("svd", "llama")
    for path, layer in low_rank(ours.model).items():
        torch.testing.assert_close(product(layer), product(plain.model.get_submodule(path)), rtol=1e-4, atol=1e-6)


def test_kfac_without_a_row_side_is_svd_llm():
    settings = {"row_shrink": 1.0, "column_shrink": 0.0, "shrink_target": "identity"}
    ours, plain = compress(method="kfac_svd", method_options=settings), result_of("svd_llm", "llama")
    for path, layer in low_rank(ours.model).items():
        one, other = product(layer), product(plain.model.get_submodule(path))
        assert float((one - other).norm() / other.norm()) < 1e-3


# ranks ---------------------------------------------------------------------------------------------------------


def test_ranks_are_integers_and_survive_everything(tmp_path):
    """A rank that goes through a float ratio comes back one smaller for about 5 % of ranks."""
    m, n = 4096, 1024  # 819 is the largest rank at which the pair is smaller
    ranks = {f"layer{r}": r for r in range(1, 901)}
    plan = RankPlan.build(ranks, dict.fromkeys(ranks, (m, n)), "by hand", 900 * m * n * 2)
    plan.save(tmp_path / "plan.json")
    loaded = RankPlan.load(tmp_path / "plan.json")
    assert loaded.factored() == ranks
    assert all(type(rank) is int for rank in loaded.factored().values())
    assert loaded.parameters == sum(r * (m + n) for r in ranks.values())
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_budget_of_exactly_one_rank_gives_that_rank():
    m, n = 4096, 1024
    for rank in range(1, 901):
        for budget, cut in ((rank * (m + n), rank), (rank * (m + n) + m + n - 1, rank)):
            expected = cut if budget < m * n else "dense"
            given = Problem((Item("layer", (m, n)),), budget)
            assert ALLOCATORS.get("uniform").configured({}).allocate(given).ranks == {"layer": expected}


def test_ranks_of_a_plan_are_those_of_the_layers():
    plan = result_of("svd", "gpt2").plan
    targets = {path: t.model_copy(update={"rank": 1 + i}) for i, (path, t) in enumerate(plan.targets.items())}
    edited = plan.model_copy(update={"targets": targets, "budget": None})
    result = compress("gpt2", method="svd", plan=edited, keep_ratio=None)
    assert {path: layer.rank for path, layer in low_rank(result.model).items()} == edited.factored()


# the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "asvd", "--option", "alpha=2"], "less than or equal to 1, got 2"),
        (["--method", "asvd", "--option", "alpah=1"], "did you mean 'alpha'"),
        (["--method", "svd_llm", "--option", "alpha=1"], "has no option 'alpha'"),
        (["--method", "asvd", "--option", "alpha"], "is not NAME=VALUE"),
        (["--method", "asvd", "--option", "alpha=["], "cannot be read"),
        (["--refine", "update", "--refine-option", "anchor=2"], "less than or equal to 1, got 2"),
        (["--method", "svd_llm", "--refine-option", "anchor=1"], "but no refiner"),
        (["--method", "basis_sharing", "--refine", "regress"], "shares between layers"),
    ],
)
def test_errors_on_the_command_line(capsys, tiny_folder, tmp_path, arguments, message):
    common = ["compress", tiny_folder, "--keep", 0.6, "--no-eval", "--out", tmp_path / "out"]
    code, shown, error = run(capsys, *common, *arguments)
    assert (code, shown) == (1, "")
    assert message in error
    assert "try:" in error
    code, shown, _ = run(capsys, *common, *arguments, "--json")
    record = json.loads(shown)["error"]
    assert (code, record["type"]) == (1, "RecipeError")
    assert message in record["message"] + record["hint"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, method, expected",
    [
        (["--method", "asvd", "--option", "alpha=0.25", "--option", "scale=max"], {"alpha": 0.25, "scale": "max"}, {}),
        (["--method", "kfac_svd", "--option", "clip=[0.5,2]", "--option", "trim=0"], {}, {"clip": [0.5, 2], "trim": 0}),
        (["--method", "kfac_svd", "--option", "clip=null"], {}, {"clip": None}),
        (["--method", "basis_sharing", "--option", "share=[up_proj,q_proj]"], {"share": ["up_proj", "q_proj"]}, {}),
        (["--method", "coala", "--option", "mu=adaptive"], {"mu": "adaptive"}, {}),
        (["--method", "drone", "--option", "min_norm=true"], {"min_norm": True}, {}),
    ],
)
def test_options_on_the_command_line(capsys, tiny_folder, text_file, tmp_path, arguments, method, expected):
    code, shown, error = run(
        capsys, "compress", tiny_folder, "--keep", 0.6, "--no-eval", "--out", tmp_path / "out", "--calibration",
        text_file, "--samples", 3, "--seq-len", 16, "--refine", "update", "--refine-option", "anchor=0.5",
        "--json", *arguments,
    )  # fmt: skip
    assert code == 0, error
    record = json.loads(shown)
    described = record["provenance"]["method"]
    assert described["id"] == arguments[1]
    assert described["options"] | method == described["options"]
    assert described | expected == described
    assert record["provenance"]["recipe"]["refine_options"] == {"anchor": 0.5}
    assert all(row["refined"]["after"] > 0 for row in record["targets"])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == record


def test_the_list_of_methods(capsys):
    code, shown, _ = run(capsys, "methods")
    assert code == 0
    assert all(name in shown for name in [*METHODS, *REFINERS.all(), *ALLOCATORS.all()])
    assert "backward pass" in shown
    assert "no pass over text" in shown
    code, shown, _ = run(capsys, "methods", "--json")
    listed = json.loads(shown)
    assert [m["id"] for m in listed["decompose"]] == METHODS
    assert [r["id"] for r in listed["refine"]] == list(REFINERS.all())
    assert {m["id"] for m in listed["decompose"] if m["pass"] == "backward"} == {"fwsvd", "gfwsvd", "kfac_svd"}
    assert {m["id"] for m in listed["decompose"] if m["pass"] == "none"} == {"svd"}


@pytest.mark.parametrize("id", sorted({*METHODS, *REFINERS.all(), *ALLOCATORS.all()}))
def test_one_method(capsys, id):
    code, shown, _ = run(capsys, "methods", id)
    found = json.loads(run(capsys, "methods", id, "--json")[1])
    assert code == 0
    for record in found if isinstance(found, list) else [found]:
        assert record["id"] == id
        assert record["paper"] in shown.replace("\n", " ")
        for name, about in record["options"].items():
            assert name in shown
            assert about["description"]
            assert about["range"]
        if not record["options"]:
            assert "It has no options." in shown


def test_a_method_and_an_allocation_of_one_name(capsys):
    """`asvd` is both."""
    assert [entry["kind"] for entry in json.loads(run(capsys, "methods", "asvd", "--json")[1])] == [
        "decompose",
        "allocate",
    ]
    _, shown, _ = run(capsys, "methods", "asvd")
    assert "--method asvd" in shown
    assert "--allocation asvd" in shown


def test_ranges_and_defaults_of_a_method(capsys):
    options = json.loads(run(capsys, "methods", "kfac_svd", "--json")[1])["options"]
    assert set(options) == {"row_shrink", "column_shrink", "shrink_target", "trim", "clip"}
    assert options["row_shrink"]["default"] == 0.1
    assert options["row_shrink"]["range"] == "number >= 0, <= 1"
    assert options["trim"]["range"] == "number >= 0, < 0.5"
    assert options["clip"]["default"] == [0.1, 10.0]
    _, shown, _ = run(capsys, "methods", "kfac_svd")
    assert ">= 0, <= 1" in shown
    code, _, error = run(capsys, "methods", "kfac")
    assert code == 1
    assert "did you mean 'kfac_svd'" in error


def test_a_recipe_file_may_name_method_and_options(tmp_path):
    (tmp_path / "r.yaml").write_text("keep_ratio: 0.6\nmethod: asvd\nmethod_options:\n  alpha: 0.25\nrefine: update\n")
    read = Recipe.make(Recipe.read(tmp_path / "r.yaml"))
    assert (read.method, read.method_options, read.refine) == ("asvd", {"alpha": 0.25}, "update")
    result = compress(method=read.method, method_options=read.method_options)
    assert result.report["provenance"]["method"]["options"]["alpha"] == 0.25
