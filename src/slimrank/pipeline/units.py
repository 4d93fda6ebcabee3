"""Units: the targets that are decomposed together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimrank.errors import RecipeError
from slimrank.layers.dense import weight_of
from slimrank.layers.forms import layer_form
from slimrank.methods.decomposer import Configured, Member
from slimrank.models.targets import Target, TargetSet


@dataclass(frozen=True)
class Unit:
    """Targets that share the factor A; usually a single one."""

    targets: tuple[Target, ...]

    @property
    def path(self) -> str:
        """Return the path of the first target, which names the unit."""
        return self.targets[0].path

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape (m, n) of the stacked weight."""
        return sum(t.shape[0] for t in self.targets), self.targets[0].shape[1]

    def weight(self, model: nn.Module, device: torch.device) -> Tensor:
        """Return the stacked weight (m x n) of a model, on a device."""
        return torch.cat([weight_of(model.get_submodule(t.path)).to(device) for t in self.targets])

    @property
    def blocks(self) -> set[int]:
        """Return the decoder blocks of its targets."""
        return {t.block for t in self.targets}


def units_of(method: Configured, targets: TargetSet, form: str) -> list[Unit]:
    """Group the targets into the units of a method, to be stored in a form.

    Raises:
        RecipeError: the method shares factors and finds no layers to share them, or the form cannot share.
    """
    known = {t.path: t for t in targets}
    groups = method.groups(Member(t.path, t.shape, t.block) for t in targets)
    if method.method.groups is not None and all(len(group) == 1 for group in groups):
        raise RecipeError(
            f"'{method.method.id}' finds no layers that could share a factor.",
            "name them: --option share=[q_proj,k_proj]; or --option layers=2",
        )
    if not layer_form(form).shares and any(len(group) > 1 for group in groups):
        raise RecipeError(
            f"'{method.method.id}' shares factors between layers; those of the form '{form}' have none to share.",
            "a method that does not share, or pairs (without --form and --store-form)",
        )
    return [Unit(tuple(known[path] for path in group)) for group in groups]


def shares_of(units: list[Unit]) -> dict[str, str]:
    """Map each target that uses another's factor A to that target."""
    return {t.path: unit.path for unit in units for t in unit.targets[1:]}
