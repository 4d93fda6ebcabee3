"""What plots and tables are made of, against a count of their own."""

import math

import pytest
import torch

from slimrank.linalg.lowrank import solve
from slimrank.pipeline.stages.spectrum_store import OUTLINE_POINTS, outline
from slimrank.report import layer_grid


def row(block, role, rank, **more):
    dense = rank == "dense"
    return {
        "path": f"layers.{block}.{role}", "block": block, "role": role, "shape": [4, 4], "rank": rank,
        "parameters_before": 16, "parameters_after": 16 if dense else 8 * rank,
        "relative_error": 0.0 if dense else 1 / rank, **more,
    }  # fmt: skip


def of(*rows):
    return {"targets": list(rows), "spectra": {}}


def test_names_are_as_short_as_they_can_be():
    assert layer_grid.short_names(["attn.c_proj", "mlp.c_proj", "mlp.c_fc", "c_fc2"]) == {
        "attn.c_proj": "attn.c_proj", "mlp.c_proj": "mlp.c_proj", "mlp.c_fc": "c_fc", "c_fc2": "c_fc2",
    }  # fmt: skip
    assert layer_grid.short_names(["up", "mlp.up"]) == {"up": "up", "mlp.up": "mlp.up"}


def test_kept_counts_parameters_of_all_layers_of_a_cell():
    experts = [row(0, "experts.*.up", 1), row(0, "experts.*.up", "dense"), row(1, "experts.*.up", 1)]
    found = layer_grid.kept_fraction(of(row(1, "q", "dense"), *experts))
    assert found.kinds == ("q", "up")
    assert found.blocks == (0, 1)
    assert found.cells == ((None, 1.0), ((8 + 16) / 32, 0.5))


def test_dense_layers_have_no_error():
    (found,) = layer_grid.errors(of(row(0, "q", "dense"), row(0, "up", 2), row(0, "up", "dense"))).values()
    assert found.cells == ((None,), (0.5,))


def test_errors_are_before_and_after_where_any_layer_is_refined():
    refined = {"refined": {"before": 0.4, "after": 0.1, "ridge": 0.0}}
    found = layer_grid.errors(of(row(0, "q", 1, **refined), row(1, "q", 1)))
    assert {title: g.cells for title, g in found.items()} == {
        "before refining": ((0.4, None),),
        "after refining": ((0.1, None),),
    }


def test_spectra_are_of_the_first_the_middle_and_the_last_block_that_have_them():
    rows = [row(block, "q", 2) for block in range(7)] + [row(3, "lone", "dense")]
    record = of(*rows)
    record["spectra"] = {r["path"]: {"ranks": [1, 4], "errors": [1.0, 0.0]} for r in rows if r["block"] != 6}
    found = layer_grid.spectra(record)
    assert [c.block for c in found["q"]] == [0, 3, 5]
    assert found["q"][0].taken == (2, 0.5)
    assert [(c.block, c.taken) for c in found["lone"]] == [(3, None)]


def test_only_the_largest_kinds_have_spectra():
    rows = [row(0, f"kind{i}", 1, parameters_before=i) for i in range(layer_grid.MAX_SPECTRUM_KINDS + 3)]
    record = {"targets": rows, "spectra": {r["path"]: {"ranks": [1], "errors": [0.0]} for r in rows}}
    assert list(layer_grid.spectra(record)) == [f"kind{i}" for i in range(3, layer_grid.MAX_SPECTRUM_KINDS + 3)]


@pytest.mark.parametrize("shape", [(1, 5), (7, 5), (80, 200)])
def test_the_outline_of_a_spectrum_is_the_error_of_every_best_approximation(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = outline(solve(weight))
    values = torch.linalg.svdvals(weight)
    assert found["ranks"][0] == 1
    assert found["ranks"][-1] == min(shape)
    assert len(found["ranks"]) <= OUTLINE_POINTS
    assert found["ranks"] == sorted(set(found["ranks"]))
    for rank, error in zip(found["ranks"], found["errors"], strict=True):
        exact = math.sqrt(float(values[rank:].square().sum() / values.square().sum()))
        assert error == pytest.approx(exact, rel=1e-3, abs=1e-6)


def test_the_cut_lies_on_the_curve(record):
    for target in record["targets"]:
        spectrum = record["spectra"][target["path"]]
        if target["rank"] in spectrum["ranks"]:
            at = spectrum["ranks"].index(target["rank"])
            assert spectrum["errors"][at] == pytest.approx(target["relative_error"], rel=1e-3, abs=1e-9)
