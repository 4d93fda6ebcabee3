"""Pack: compute layers of the same inputs together from now on, wherever the result is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimrank.layers.base import compressed_layers
from slimrank.models.packing import pack
from slimrank.pipeline.forecast import Cost, Shape
from slimrank.pipeline.stage import STAGES, Stage

if TYPE_CHECKING:
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State


@STAGES.add
class Pack(Stage):
    """Pack the result, as `slimrank.pack` does, where the recipe asks for it."""

    id, order, title = "pack", 95, "pack"

    def wanted(self, choices: Choices) -> bool:
        return choices.recipe.packed

    def cost(self, prepared: Prepared, shape: Shape) -> Cost:
        return Cost()

    def key(self, state: State) -> dict[str, Any]:
        return {}

    def run(self, state: State) -> None:
        with state.timed(self.title, 1):
            groups = pack(state.model) if compressed_layers(state.model) else 0
        few = "" if groups else " (shared factors and parts of few bits are computed by themselves)"
        state.notes.append(f"packed: {groups} groups of layers of the same inputs have one first product{few}")
