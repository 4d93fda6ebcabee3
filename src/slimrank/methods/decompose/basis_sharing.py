"""Basis Sharing: one factor A for the same weights of neighbouring blocks, or for those that read the same input."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field
from torch import Tensor

from slimrank.linalg.forms import Form, Metric
from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.methods.decomposer import Member, decomposer
from slimrank.statistics.layer_statistics import LayerStatistics

INPUT_LAYERS = (  # names under which decoders know their query, key, value, gate and up projections
    "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "query", "key", "value", "in_proj",
    "gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "w1", "w3",
)  # fmt: skip

Layers = Annotated[int, Field(ge=1, description="Neighbouring blocks whose weights of the same name share a factor.")]
Within = Annotated[bool, Field(description="Weights of a block that read the same input share a factor, too.")]
Share = Annotated[tuple[str, ...], Field(description="Names of the layers that share; the others stay private.")]


def groups(members: Sequence[Member], *, layers: int, within: bool, share: tuple[str, ...]) -> list[list[str]]:
    """Group targets that share a factor, in model order."""
    found: dict[object, list[str]] = {}
    for member in members:
        found.setdefault(_group_of(member, layers, within, share), []).append(member.path)
    return list(found.values())


def _group_of(member: Member, layers: int, within: bool, share: tuple[str, ...]) -> object:
    parent, name = _place(member.path)
    if not any(fnmatchcase(name, pattern) for pattern in share):
        return member.path
    inner = f"{parent}.".split(f".{member.block}.", 1)[-1]  # "self_attn." of "model.layers.3.self_attn"
    return (member.block // layers, inner, member.shape[1]) if within else (
        member.block // layers, inner, name, member.shape
    )  # fmt: skip


def _place(path: str) -> tuple[str, str]:
    """Return where a layer is, and its name; the number of an expert (up.3) is a part of its place."""
    parent, _, name = path.rpartition(".")
    if not name.isdigit():
        return parent, name
    return f"{parent}.{name}", parent.rpartition(".")[2]


@decomposer(
    id="basis_sharing",
    title="Basis Sharing: one factor A for the same weights of neighbouring blocks",
    paper="Wang et al., Basis Sharing, arXiv 2410.03765",
    needs={"gram"},
    cost="one eigen-decomposition per group, on its smaller side",
    groups=groups,
)
def basis_sharing(
    weight: Tensor,
    statistics: LayerStatistics,
    *,
    layers: Layers = 2,
    within: Within = False,
    share: Share = INPUT_LAYERS,
) -> Spectrum:
    """Minimise sum_l || (W_l - B_l A) R ||_F^2, R R^T the sum of the members' grams.

    `weight` is the stack of the members (sum of m_l x n) and `statistics` holds their summed gram. Exact where the
    members read the same input.
    """
    return solve(weight, Metric(column=Form(statistics.gram)))
