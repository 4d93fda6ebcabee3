"""A budget stated in any of three ways, as parameters that the targets may store."""

from __future__ import annotations

from fractions import Fraction

from slimrank.errors import BudgetError


def budget_in_parameters(
    targets: int,
    total: int,
    itemsize: int,
    keep_ratio: float | None = None,
    keep_total: float | None = None,
    max_bytes: int | None = None,
) -> int:
    """Parameters that the targets together may store.

    Args:
        targets: parameters of the targets before compression.
        total: parameters of the whole model.
        itemsize: bytes per stored parameter.
        keep_ratio: fraction of the targets' parameters to keep, or
        keep_total: fraction of the whole model's parameters to keep, or
        max_bytes: bytes of all weights. Exactly one of the three is given.

    Raises:
        BudgetError: what cannot be compressed alone is over the budget.
    """
    rest = total - targets
    if keep_ratio is not None:
        return int(Fraction(str(keep_ratio)) * targets)
    if keep_total is not None:
        allowed, wish = int(Fraction(str(keep_total)) * total), f"keep_total {keep_total}"
    else:
        assert max_bytes is not None
        allowed, wish = max_bytes // itemsize, f"max_bytes {max_bytes:,}"
    if allowed <= rest:
        raise BudgetError(
            f"{wish} allows {allowed:,} parameters; embeddings, norms and other parts that are not compressed "
            f"already take {rest:,} of {total:,}.",
            f"keep more than {rest / total:.3f} of the whole model",
        )
    return min(allowed - rest, targets)
