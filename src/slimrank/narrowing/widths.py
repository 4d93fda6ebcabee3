"""The fields of a configuration that state the widths of MLPs, and the widths that fit a budget."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from slimrank.errors import BudgetError, ModelError
from slimrank.layers.dense import weight_of
from slimrank.layers.experts import unfuse
from slimrank.models.mlps import Mlp

NAMES = re.compile("inter|ffn|inner|mlp|feed|d_ff|hidden_dim")  # of fields that may be widths of MLPs


@dataclass(frozen=True)
class Field:
    """A field of the configuration, and the MLPs whose widths are a multiple of it.

    Attributes:
        name: of the field, in the part of the configuration that is about text.
        value: what it states now.
        mlps: the MLPs that it decides on.
    """

    name: str
    value: int
    mlps: tuple[Mlp, ...]

    def times(self, mlp: Mlp) -> int:
        """Return what the width of one of its MLPs is a multiple by: shared experts are as wide as several."""
        return mlp.width // self.value

    def fitting(self, share: Fraction, multiple: int) -> int:
        """Return the largest value of at most this share: a multiple of `multiple`, or the value that it has now."""
        return self.value if share >= 1 else int(share * self.value) // multiple * multiple


def width_fields(model: Any, mlps: Sequence[Mlp]) -> list[Field]:
    """Find the fields that state the widths of these MLPs, by building the model without weights with other values.

    Args:
        model: of a class of transformers itself; its experts are linear layers.
        mlps: all of its MLPs.

    Raises:
        ModelError: there are no MLPs, or no field states their width.
    """
    what = type(model).__name__
    if not mlps:
        raise ModelError(
            f"{what} has no MLP whose hidden units could be taken away.", "slimrank compress works on any linear layer"
        )
    config = model.config.get_text_config()
    names = sorted(name for name, value in vars(config).items() if NAMES.search(name) and _may_be_width(value))
    found = [field for name in names if (field := _field(model, name, getattr(config, name), mlps)) is not None]
    if not found:
        raise ModelError(
            f"the configuration of {what} has no field that states the width of its MLPs, so a narrower model of this "
            "class does not exist.",
            "slimrank compress works on any linear layer",
        )
    return found


def _may_be_width(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 1)


def _field(model: Any, name: str, value: int | None, mlps: Sequence[Mlp]) -> Field | None:
    """Return a field with its MLPs; None if it decides on anything else, or on none of them."""
    widths = {mlp.width for mlp in mlps}
    now = value if value is not None else next(iter(widths)) if len(widths) == 1 else None
    if now is None:
        return None
    other = now // 2
    try:
        changed = _changed(model, {name: other})
    except Exception:  # configurations and constructors refuse other values in many ways
        return None
    mine = tuple(mlp for mlp in mlps if changed.keys() & set(mlp.paths))
    fits = all(mlp.width % now == 0 and changed.get(mlp.reader) == mlp.width // now * other for mlp in mine)
    return Field(name, now, mine) if mine and fits and changed.keys() == {p for m in mine for p in m.paths} else None


def _changed(model: Any, values: Mapping[str, int]) -> dict[str, int]:
    """Return the inputs of every module whose weights have other shapes in a model of these values."""
    there = built(model, values)
    unfuse(there)
    here = {name: p.shape for name, p in model.named_parameters()}
    shapes = {name: p.shape for name, p in there.named_parameters()}
    if here.keys() != shapes.keys():
        raise ValueError("it has other weights")
    paths = dict.fromkeys(name.rpartition(".")[0] for name in here if here[name] != shapes[name])
    return {path: int(weight_of(there.get_submodule(path)).shape[1]) for path in paths}


def built(model: Any, values: Mapping[str, int]) -> Any:
    """Build a model of the same class without weights, with other values in its configuration."""
    config = copy.deepcopy(model.config)
    set_fields(config, values)
    with torch.device("meta"):
        return type(model)._from_config(config)


def set_fields(config: Any, values: Mapping[str, int]) -> None:
    """Set fields of the part of a configuration that is about text."""
    for name, value in values.items():
        setattr(config.get_text_config(), name, value)


@dataclass(frozen=True)
class Widths:
    """The values that the fields of a configuration get.

    Attributes:
        fields: the fields.
        values: name -> new value.
        linears: parameters of all linear layers of the blocks, before.
        left: the same after.
    """

    fields: tuple[Field, ...]
    values: Mapping[str, int]
    linears: int
    left: int

    @property
    def keep_ratio(self) -> float:
        """Return the fraction of the linears' parameters that is kept."""
        return self.left / self.linears

    def of(self) -> dict[str, int]:
        """Return the new width of each MLP, by its reader."""
        return {m.reader: field.times(m) * self.values[field.name] for field in self.fields for m in field.mlps}


def fitting_widths(model: Any, fields: Sequence[Field], linears: int, keep_ratio: float, multiple: int) -> Widths:
    """Return the largest widths, of the same share in all fields, that fit a budget.

    Args:
        model: as for `width_fields`.
        fields: found there.
        linears: parameters of all linear layers of the blocks.
        keep_ratio: fraction of them to keep at most.
        multiple: that new widths are multiples of.

    Raises:
        BudgetError: not even the smallest widths fit.
    """
    steps = {Fraction(i * multiple, f.value) for f in fields for i in range(1, -(-f.value // multiple))}
    for share in [Fraction(1), *sorted(steps, reverse=True)]:
        values = {field.name: field.fitting(share, multiple) for field in fields}
        if not all(values.values()):
            break
        left = linears - _removed(model, fields, values)
        if left <= keep_ratio * linears:
            return Widths(tuple(fields), values, linears, left)
        least = left / linears
    raise BudgetError(
        f"keeping {keep_ratio:g} of the linears is less than MLPs of {multiple} hidden units take, which is "
        f"{least:.3f}.",
        f"--keep {least + 0.0005:.3f} or more, or a smaller --multiple; or slimrank compress on top",
    )


def _removed(model: Any, fields: Sequence[Field], values: Mapping[str, int]) -> int:
    """Count the weights of the hidden units that are taken away."""
    return sum((m.width - f.times(m) * values[f.name]) * _unit(model, m) for f in fields for m in f.mlps)


def _unit(model: Any, mlp: Mlp) -> int:
    """Count the weights of one hidden unit."""
    weights = [weight_of(model.get_submodule(path)).numel() for path in mlp.paths]
    return sum(weights) // mlp.width
