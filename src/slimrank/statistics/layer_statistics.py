"""The statistics of one layer, as a method takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimrank.linalg.forms import Form
from slimrank.statistics.accumulators import ChannelSums, GramSum, SampleGradients
from slimrank.statistics.catalogue import Need


@dataclass
class LayerStatistics:
    """The statistics of a layer y = W x + b, W m x n. Those that nothing asked for are None.

    Attributes:
        shape: (m, n).
        needs: what the method asks for; needs that no token or gradient reached count as zero.
        inputs: sum of x x^T; the same object for layers that read the same tensor.
        outputs: sum of W x (W x)^T, gathered instead of `inputs` where it is smaller.
        input_energies: sum of x_i^2 for each channel (n, float64), gathered with `outputs`.
        channels: sums per input channel; shared as `inputs` is.
        gradients: sum of g g^T, g the gradient of the loss by the layer's output at one token.
        pulled: sum of W^T g (W^T g)^T, gathered instead of `gradients` where it is smaller.
        gradient_energies: sum of g_i^2 for each output (m, float64), gathered with `pulled`.
        weight_squares: squared weight gradients of single windows, summed over windows and outputs (n).
        samples: weight gradients of single samples.
        slope: sum of g x^T (m x n, float64), the gradient of the loss by W.
        projector: sum of U U^T over batches, U (m x k) the leading left singular vectors of a batch's outputs;
            in coordinates of an orthonormal basis of W's columns where m > n.
        rank: the planned rank; None if the target stays dense or nothing is planned yet.
        tokens: tokens seen.
        notes: anything unusual, for the report.
    """

    shape: tuple[int, int]
    needs: frozenset[Need] = frozenset()
    inputs: GramSum | None = None
    outputs: GramSum | None = None
    input_energies: Tensor | None = None
    channels: ChannelSums | None = None
    gradients: GramSum | None = None
    pulled: GramSum | None = None
    gradient_energies: Tensor | None = None
    weight_squares: Tensor | None = None
    samples: SampleGradients | None = None
    slope: Tensor | None = None
    projector: Tensor | None = None
    rank: int | None = None
    tokens: int = 0
    notes: tuple[str, ...] = ()

    @property
    def gram(self) -> Tensor:
        """Return C = sum of x x^T (n x n, float64).

        Raises:
            ValueError: the method does not list "gram" among its needs.
        """
        n = self.shape[1]
        return self._asked("gram", torch.zeros(n, n)) if self.inputs is None else self.inputs.gram

    @property
    def column(self) -> Form:
        """Return C as a form, whole or as W C W^T.

        Raises:
            ValueError: the method lists neither "column" nor "gram".
        """
        if self.outputs is not None:
            return Form(self.outputs.gram, seen=True, diagonal=self.input_energies)
        if self.inputs is not None:
            return Form(self.inputs.gram)
        return Form(self._asked("column", torch.zeros(self.shape[1])))

    @property
    def row(self) -> Form:
        """Return G = sum of g g^T as a form, whole or as W^T G W.

        Raises:
            ValueError: the method does not list "row".
        """
        if self.pulled is not None:
            return Form(self.pulled.gram, seen=True, diagonal=self.gradient_energies)
        if self.gradients is not None:
            return Form(self.gradients.gram)
        return Form(self._asked("row", torch.zeros(self.shape[0])))

    def _asked(self, need: Need, nothing: Tensor) -> Tensor:
        if need not in self.needs:
            raise ValueError(f"these statistics were not gathered: add '{need}' to the method's needs")
        return nothing

    def merged(self, other: LayerStatistics) -> LayerStatistics:
        """Merge the inputs of both layers, for a factor that they share; only `inputs` is merged.

        Raises:
            ValueError: the method does not list "gram".
        """
        if self.inputs is None or other.inputs is None:
            raise ValueError("these statistics were not gathered: add 'gram' to the method's needs")
        return LayerStatistics(
            shape=(self.shape[0] + other.shape[0], self.shape[1]),
            needs=self.needs,
            inputs=self.inputs + other.inputs,
            rank=self.rank,
            tokens=self.tokens + other.tokens,
        )
