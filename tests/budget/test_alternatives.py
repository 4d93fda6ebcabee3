"""One form for all targets, beside a plan that gives each its own."""

import pytest
from test_menu import losses, recipe

from slimrank.budget.alternatives import alternatives
from slimrank.budget.curves import Limits
from slimrank.layers.forms import layer_form
from slimrank.pipeline.menus import menu_of

SHAPES = {"a": (64, 96), "b": (96, 64), "c": (64, 96)}


@pytest.mark.parametrize("dense", [(), ("b",)])
def test_sizes_and_losses_are_sums(dense):
    menus = {
        path: menu_of(recipe(), shape, 16, Limits(dense=path in dense)).measured(losses(0.01 * (1 + len(path))))
        for path, shape in SHAPES.items()
    }
    energies = {"a": 1.0, "b": 2.0, "c": 4.0}
    found = alternatives(menus, energies)
    assert [each.size for each in found] == sorted(each.size for each in found)
    assert {each.form.partition(":")[0] for each in found} == {"dense", "residual"}
    for each in found:
        bits = {path: layer_form(each.form).bits(*shape, each.rank, 16) for path, shape in SHAPES.items()}
        bits |= dict.fromkeys(dense, 16 * 64 * 96)
        assert each.size == sum(bits.values()) / 8
    four = next(each for each in found if each.form == "dense:int4-g16")
    assert four.error == pytest.approx(0.02 * sum(e for path, e in energies.items() if path not in dense))


def test_nothing_to_choose_from():
    menus = {path: menu_of(recipe(), shape, 16, Limits(dense=True)) for path, shape in SHAPES.items()}
    assert alternatives(menus, dict.fromkeys(SHAPES, 1.0)) == []
