"""Hooks that gather statistics while a block runs, forwards or backwards.

Keyed by input tensor instead of module: layers that read the same tensor (q, k and v; gate and up) share one gram. The
gradients are those of layer outputs and of each layer's own part of the input gradient, taken by hooks on tensors; no
gradient of a weight is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError, NonFiniteError
from slimrank.layers.dense import weight_of
from slimrank.statistics.accumulators import (
    ChannelSums,
    GramSum,
    SampleGradients,
    squares_of,
    weight_gradient_squares,
)
from slimrank.statistics.calls import LayerCall
from slimrank.statistics.catalogue import GatherOptions
from slimrank.statistics.dobi_projectors import truncate_output
from slimrank.statistics.layer_statistics import LayerStatistics
from slimrank.statistics.precision import exact
from slimrank.statistics.routing import Routing
from slimrank.statistics.tokens import Tokens
from slimrank.statistics.windows import BatchWindows, Part

INPUT_NEEDS = {"column", "gram", "channels"}


@dataclass
class Collector:
    """Gathers `LayerStatistics` for some layers of a block.

    Attributes:
        layers: module path -> module.
        gathering: what to gather.
        device: where sums are stored.
        alone: layers that share their input with no other; the gram of their outputs may replace that of their inputs.
        ranks: planned ranks by path, for statistics that depend on them.
        routed: layers (experts) that only some tokens reach.
        routing: knows these tokens for some of the layers.
        leaders: module path -> path of the first layer seen to read the same tensor (itself, if none).
        statistics: module path -> what was gathered; absent for a layer that no token reached.
    """

    layers: Mapping[str, nn.Module]
    gathering: GatherOptions
    device: torch.device
    alone: frozenset[str] = frozenset()
    ranks: Mapping[str, int] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, LayerStatistics] = field(default_factory=dict)
    routed: frozenset[str] = frozenset()
    routing: Routing = field(default_factory=Routing)

    def __post_init__(self) -> None:
        self._tokens = Tokens()
        self._batch = -1
        self._seen: list[tuple[Tensor, int, str]] = []
        self._calls: dict[str, LayerCall] = {}
        self._windows = BatchWindows()
        self._batch_grams: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Collector:
        self._handles += self.routing.watch()
        for path, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(exact(self._reads(path))))
            self._handles.append(layer.register_forward_hook(exact(self._writes(path))))
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        if error is None:
            self._end_batch()
        self._calls, self._windows = {}, BatchWindows()
        self._seen, self._batch_grams = [], {}

    def begin(self, mask: Tensor | None, shape: tuple[int, ...] | None = None) -> None:
        """Prepare for a new batch.

        Args:
            mask: its padding mask (1 = a real token).
            shape: (windows, tokens), which identifies tokens whatever the shape of a layer's input.
        """
        self._end_batch()
        self._tokens, self._seen, self._batch_grams = Tokens(mask, shape), [], {}
        self._batch += 1

    def _end_batch(self) -> None:
        """Take what is left of windows where some call of a layer got no gradient."""
        for path in list(self._windows.parts):
            self._add_samples(path, self._windows.take(path))
        self._windows = BatchWindows()

    # forwards -----------------------------------------------------------------------------------------------

    def _reads(self, path: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0]
            mine = self._of(path, module)
            call = self._calls[path] = LayerCall(path, x.detach(), self._tokens, self._numbers(path, x))
            rows = call.real(call.x)
            mine.tokens += len(rows)
            leader = next((name for known, version, name in self._seen if _same(known, version, x)), None)
            if leader is None:
                self._seen.append((x, x._version, path))
                leader = path
                self._add_inputs(path, mine, rows)
            known = self.leaders.setdefault(path, leader)
            if known != leader:
                raise ModelError(
                    f"the layer '{path}' reads the same tensor as '{known if leader == path else leader}' in some "
                    "batches only.",
                    f"leave it out: --ignore '{path}'",
                )
            first = self.statistics[leader]
            if leader != path and first.inputs is None and self._sums_inputs(path, mine):
                self._add_gram(path, mine, rows)
            else:
                mine.inputs = first.inputs
            mine.channels = first.channels
            return self._own_view(call, args) if self._pulls(mine) and x.requires_grad else None

        return observe

    def _numbers(self, path: str, x: Tensor) -> Tensor | None:
        """Return the token of each row of a layer's inputs or outputs; None if it is unknown."""
        return self.routing.numbers(path) if path in self.routed else self._tokens.numbers(x)

    def _of(self, path: str, module: nn.Module) -> LayerStatistics:
        if path not in self.statistics:
            m, n = weight_of(module).shape
            self.statistics[path] = LayerStatistics((m, n), self.gathering.needs, rank=self.ranks.get(path))
        return self.statistics[path]

    def _add_inputs(self, path: str, mine: LayerStatistics, rows: Tensor) -> None:
        needs, n = self.gathering.needs, rows.shape[-1]
        finite = True
        if self._sums_inputs(path, mine):
            self._add_gram(path, mine, rows)
        if "channels" in needs:
            mine.channels = mine.channels or ChannelSums.empty(n, self.device)
            finite = mine.channels.add(rows) and finite
        if "projectors" in needs:
            batch = GramSum.empty(n, self.device)
            finite = batch.add(rows) and finite
            self._batch_grams[path] = batch.gram
        self._check(path, finite, "inputs")

    def _sums_inputs(self, path: str, mine: LayerStatistics) -> bool:
        needs = self.gathering.needs
        return "gram" in needs or ("column" in needs and not self._by_outputs(path, mine))

    def _add_gram(self, path: str, mine: LayerStatistics, rows: Tensor) -> None:
        mine.inputs = mine.inputs or GramSum.empty(rows.shape[-1], self.device)
        self._check(path, mine.inputs.add(rows), "inputs")

    def _writes(self, path: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
            mine = self.statistics[path]
            if "column" in self.gathering.needs and self._by_outputs(path, mine):
                self._add_outputs(self._calls[path], mine, module, output.detach())
            if "projectors" in self.gathering.needs and mine.rank is not None:
                return truncate_output(mine, module, self._batch_grams[self.leaders[path]], output)
            if self.gathering.backward and output.requires_grad:
                call = self._calls[path]
                self._windows.expected[path] += 1
                output.register_hook(lambda g: self._add_gradients(call, mine, g))
            return None

        return observe

    def _add_outputs(self, call: LayerCall, mine: LayerStatistics, module: nn.Module, y: Tensor) -> None:
        bias = getattr(module, "bias", None)
        rows = call.real(y if bias is None else y - bias)
        mine.outputs = mine.outputs or GramSum.empty(mine.shape[0], self.device)
        mine.input_energies = self._added(mine.input_energies, call.real(call.x))
        self._check(call.path, mine.outputs.add(rows), "outputs")

    def _added(self, energies: Tensor | None, rows: Tensor) -> Tensor:
        """Return the energy of each channel, with those of more tokens (tokens x n) added; float64."""
        squares = squares_of(rows.to(self.device))
        return squares if energies is None else energies + squares

    def _by_outputs(self, path: str, mine: LayerStatistics) -> bool:
        return path in self.alone and mine.shape[0] < mine.shape[1] and "gram" not in self.gathering.needs

    # backwards ----------------------------------------------------------------------------------------------

    def _pulls(self, mine: LayerStatistics) -> bool:
        return "row" in self.gathering.needs and mine.shape[0] > mine.shape[1]

    def _own_view(self, call: LayerCall, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with a separate view of x, so that its gradient is that of this layer alone: W^T g."""
        view = args[0].view_as(args[0])
        view.register_hook(lambda pulled: self._add_pulled(call, pulled))
        return (view, *args[1:])

    def _add_gradients(self, call: LayerCall, mine: LayerStatistics, g: Tensor) -> None:
        needs, path = self.gathering.needs, call.path
        rows_g, rows_x = call.real(g), call.real(call.x)
        if "row" in needs:
            scales, note = call.weigh(rows_g, self.gathering)
            mine.notes = tuple(dict.fromkeys((*mine.notes, *filter(None, [note]))))
            self._add_row(path, mine, rows_g, scales)
        if "slope" in needs:
            self._add_slope(path, mine, rows_g, rows_x)
        if needs & {"weight_squares", "gradients"}:
            self._windows.add(path, call.by_window(rows_g), call.by_window(rows_x))
            self._add_samples(path, self._windows.complete(path))

    def _add_row(self, path: str, mine: LayerStatistics, g: Tensor, scales: Tensor) -> None:
        """Add output gradients, trimmed and clipped; only their energy, where their pull-back comes later."""
        if self._pulls(mine):
            mine.gradient_energies = self._added(mine.gradient_energies, g * scales[:, None])
        else:
            mine.gradients = mine.gradients or GramSum.empty(mine.shape[0], self.device)
            self._check(path, mine.gradients.add(g * scales[:, None]), "gradients")

    def _add_pulled(self, call: LayerCall, pulled: Tensor) -> None:
        mine = self.statistics[call.path]
        mine.pulled = mine.pulled or GramSum.empty(mine.shape[1], self.device)
        assert call.scales is not None  # the gradient by the output comes first
        self._check(call.path, mine.pulled.add(call.real(pulled) * call.scales[:, None]), "gradients")

    def _add_slope(self, path: str, mine: LayerStatistics, g: Tensor, x: Tensor) -> None:
        if mine.slope is None:
            mine.slope = torch.zeros(mine.shape, dtype=torch.float64, device=self.device)
        wide = torch.promote_types(x.dtype, torch.float32)
        slope = (g.to(wide).t() @ x.to(wide)).to(mine.slope.device)
        mine.slope += slope
        self._check(path, bool(torch.isfinite(slope).all()), "gradients")

    def _add_samples(self, path: str, windows: Iterable[Part]) -> None:
        for g, x in windows:
            self._add_sample(path, self.statistics[path], g, x)

    def _add_sample(self, path: str, mine: LayerStatistics, g: Tensor, x: Tensor) -> None:
        if "weight_squares" in self.gathering.needs:
            squares = weight_gradient_squares(g, x).to(self.device)
            mine.weight_squares = squares if mine.weight_squares is None else mine.weight_squares + squares
            self._check(path, bool(torch.isfinite(squares).all()), "gradients")
        if "gradients" in self.gathering.needs:
            if mine.samples is None:  # not `or`: to ask an object for its length closes its open sample
                mine.samples = SampleGradients(self.gathering.accumulate)
            self._check(path, bool(torch.isfinite(g).all()), "gradients")
            mine.samples.add(g.float().to(self.device), x.float().to(self.device))

    def _check(self, path: str, finite: bool, what: str) -> None:
        if not finite:
            raise NonFiniteError(
                f"NaN or infinity in the {what} of layer '{path}' (batch {self._batch}).",
                "run in float32 (--dtype float32); check that the model itself is sound",
            )


def _same(known: Tensor, version: int, x: Tensor) -> bool:
    """Tell whether x is the same memory as an earlier tensor, with the same content.

    A reference to the tensor ensures that its memory was not reused, and its version that it was not changed in
    place.
    """
    return (
        known.data_ptr() == x.data_ptr()
        and version == x._version
        and (known.shape, known.stride(), known.dtype) == (x.shape, x.stride(), x.dtype)
    )
