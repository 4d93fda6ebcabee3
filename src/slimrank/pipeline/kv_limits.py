"""Bounds of the ranks of keys and values, by what a latent cache may take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from slimrank.budget.curves import Limits
from slimrank.errors import PlanError, RecipeError
from slimrank.layers.latent_attention import KEYS, VALUES
from slimrank.models.targets import Target

NAMES = (KEYS, VALUES)


def kv_limits(keep: float, targets: Iterable[Target], limits: Mapping[str, Limits]) -> dict[str, Limits]:
    """Return the limits of the ranks of keys and values: those that there are, and at most `keep` of their outputs.

    Raises:
        RecipeError: no target is called k_proj or v_proj.
        PlanError: the limits that there are leave no such rank.
    """
    found = {t.path: _bounded(t, keep, limits[t.path]) for t in targets if t.path.rpartition(".")[2] in NAMES}
    if not found:
        raise RecipeError(
            "kv_keep bounds the ranks of k_proj and v_proj, and no target is called so.",
            "leave out --kv-keep; a model with one layer for q, k and v has no latent cache",
        )
    return found


def _bounded(target: Target, keep: float, limits: Limits) -> Limits:
    most = max(1, int(keep * target.shape[0]))
    both = limits.both(Limits(most=most))
    if both is None:
        raise PlanError(
            f"kv_keep {keep:g} allows '{target.path}' ranks up to {most}; 'ranks' ask for others.",
            "another --kv-keep, or other bounds with --rank",
        )
    return both
