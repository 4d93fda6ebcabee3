"""Bytes of a model before and after compression: every tensor in its own dtype, saved buffers included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from slimrank.budget.rank_plan import RankPlan
from slimrank.budget.stated import BYTE_BITS
from slimrank.layers.forms import layer_form
from slimrank.models.storage import saved_bytes, saved_tensors
from slimrank.models.targets import Target, TargetSet
from slimrank.recipe import Recipe

HEADER_BYTES = 160  # of a safetensors file, per tensor; more where names are long
FIELD_BYTES = 100  # of an entry in that header, besides the name
PART_NAME = len(".interpolation.weight_zero_point")


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of the tensors of a model before compression.

    Attributes:
        total: of all tensors that saving writes.
        itemsizes: bytes per parameter of each target, by path.
        targets: of the targets' weights.
    """

    total: int
    itemsizes: dict[str, int]
    targets: int

    @classmethod
    def of(cls, model: Any, targets: TargetSet) -> ModelBytes:
        """Count the bytes of a model, whose weights may be on the meta device."""
        itemsizes = {t.path: model.get_submodule(t.path).weight.element_size() for t in targets}
        return cls(saved_bytes(model), itemsizes, sum(t.parameters * itemsizes[t.path] for t in targets))

    @property
    def rest(self) -> int:
        """Return the bytes of everything that is not a target."""
        return self.total - self.targets

    @property
    def largest_item(self) -> int:
        """Return the bytes per parameter of the widest target."""
        return max(self.itemsizes.values())

    def compressed(self, recipe: Recipe, plan: RankPlan, targets: TargetSet) -> int:
        """Count the bytes of the tensors that a plan leads to, headers left out."""
        factored = [t for t in targets if plan.targets[t.path].rank != "dense"]
        stored = self.linears(plan)
        biases = sum(new_biases(recipe, [t]) * self.itemsizes[t.path] for t in factored if not t.bias)
        return self.rest + stored + biases + sum(index_bytes(plan.form_of(t.path), [t]) for t in targets)

    def linears(self, plan: RankPlan) -> int:
        """Count the bytes that a plan's targets store: numbers, scales and zero points."""
        widths = {path: BYTE_BITS * size for path, size in self.itemsizes.items()}
        return ceil(sum(t.bits(plan.stored_as, widths[path]) for path, t in plan.targets.items()) / BYTE_BITS)

    def widths(self, option: str) -> dict[str, int]:
        """Return the bits that a parameter of each target counts for a budget stated as this option.

        Fractions are of parameters, which all count alike; bytes are those of each target's own dtype.
        """
        own = option == "max_bytes"
        return {path: BYTE_BITS * (size if own else self.largest_item) for path, size in self.itemsizes.items()}

    def besides(self, recipe: Recipe, model: Any, targets: TargetSet) -> int:
        """Count the bytes that a model's files may take besides the targets' weights."""
        biased = {t.path: new_biases(recipe, [t]) for t in targets if not t.bias}
        others = self.rest + sum(count * self.itemsizes[path] for path, count in biased.items())
        return _header_bytes(_possible_forms(recipe), model, targets) + others


def new_biases(recipe: Recipe, targets: Iterable[Target]) -> int:
    """Count the parameters of the biases that refining would give to these targets."""
    given = recipe.refine is not None and recipe.refine_options.get("bias") == "all"
    return sum(t.shape[0] for t in targets if not t.ties) if given else 0


def index_bytes(form: str, targets: Iterable[Target]) -> int:
    """Count the bytes of indices that layers of a form store, for every place of a target."""
    if form == "dense":
        return 0
    return sum(layer_form(form).index_bytes(*t.shape) * (1 + len(t.ties)) for t in targets)


def _possible_forms(recipe: Recipe) -> list[str]:
    """Return forms of all kinds that a target may be stored in."""
    if recipe.bits:
        return [f"{form}:int8" for form in recipe.forms]
    return [recipe.quantized_as() if recipe.quantize else recipe.stored_as]


def _header_bytes(forms: Sequence[str], model: Any, targets: TargetSet) -> int:
    """Estimate from above the bytes of a model's files that are not parameters."""
    added = max(sum(layer_form(form).more_tensors(1 + len(t.ties)) for t in targets) for form in forms)
    names = list(saved_tensors(model))
    each = max(HEADER_BYTES, FIELD_BYTES + PART_NAME + max(map(len, names)))
    return each * (len(names) + added + 2) + max(index_bytes(form, targets) for form in forms)
