"""One call of a layer, and the tokens of its input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slimrank.errors import ModelError
from slimrank.statistics.catalogue import GatherOptions
from slimrank.statistics.token_weights import scales_anywhere, token_norms, token_scales
from slimrank.statistics.tokens import Places, Tokens

UNPLACED = (
    "the positions of its tokens are not known: gradients are neither trimmed nor clipped, but weigh as much in all as "
    "those of other layers"
)


@dataclass
class LayerCall:
    """The input of a layer in one call.

    Attributes:
        path: of the layer.
        x: its input (..., n).
        tokens: those of the batch.
        numbers: the token of each row of x; None if it is unknown.
        scales: what the gradient of each real row is multiplied with, once that is known.
    """

    path: str
    x: Tensor
    tokens: Tokens
    numbers: Tensor | None
    scales: Tensor | None = None

    def real(self, tensor: Tensor) -> Tensor:
        """Return the rows (rows x k) of real tokens, of a tensor (..., k) beside x."""
        return self.tokens.real(tensor, self.numbers)

    @cached_property
    def places(self) -> Places | None:
        """Return the indices of the real rows; None if they are unknown."""
        return self.tokens.places(self.x, self.numbers)

    def by_window(self, rows: Tensor) -> dict[int, Tensor]:
        """Return the real rows of each window.

        Raises:
            ModelError: there are several windows, and it is unknown which rows belong to which.
        """
        if self.places is not None:
            return self.places.by_window(rows)
        shape = self.tokens.shape_beside(self.x)
        if shape is None or shape[0] == 1:
            return {0: rows}
        raise ModelError(
            f"the layer '{self.path}' reads tokens in the shape {tuple(self.x.shape)}, and nothing tells their windows "
            "apart.",
            f"take one window at a time: --batch-size 1; or leave the layer out: --ignore '{self.path}'",
        )

    def weigh(self, g: Tensor, gathering: GatherOptions) -> tuple[Tensor, str]:
        """Return the `scales` of output gradients (real rows x m), and a note if they are unusual; remember them."""
        norms, shape, note = token_norms(g), self.tokens.shape_beside(self.x), ""
        if self.places is not None:
            self.scales = token_scales(norms, self.places, gathering.trim, gathering.clip)
        elif shape is None:
            self.scales = torch.ones_like(norms)
        else:
            self.scales, note = scales_anywhere(norms, torch.full((shape[0],), shape[1]), gathering.trim), UNPLACED
        return self.scales, note
