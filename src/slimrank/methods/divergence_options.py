"""Options of every allocator that measures divergence."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

DROPPED = 256  # positions of a long window


class DivergenceOptions(BaseModel):
    """Options of the divergence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Annotated[float, Field(gt=0, description="Logits are divided by it before they are compared.")] = 0.6
    dropped: Annotated[
        int | None,
        Field(ge=0, description="Leading positions of a window that do not count; null: 256, or half a short window."),
    ] = None

    plans: Annotated[
        int,
        Field(
            ge=0,
            description="Random plans measured to check, in the report, that errors of layers add up; up to 1: none.",
        ),
    ] = 20

    def positions(self, seq_len: int) -> int:
        """Return the leading positions to drop of windows of this length; at least two are left."""
        wanted = min(DROPPED, seq_len // 2) if self.dropped is None else self.dropped
        return min(wanted, seq_len - 2)
