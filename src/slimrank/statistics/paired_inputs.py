"""Statistics of two streams at once: the inputs of a layer in the compressed model and in the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError, NonFiniteError
from slimrank.linalg.outliers import hides_small_spectrum
from slimrank.linalg.regression import Regression
from slimrank.statistics.accumulators import CHUNK_TOKENS, GramSum
from slimrank.statistics.precision import exact, widened
from slimrank.statistics.residual_gap import ResidualGap
from slimrank.statistics.tokens import Tokens

CONSTANT = (1e-6, 1e-12)  # of a channel's energy: rounding of sums of float32 products, and of float64 ones


@dataclass
class StreamSums:
    """Sums over tokens of x', an input in the compressed model, and x, the mixture that the target is made from.

    Attributes:
        inputs: sum of x' x'^T.
        wanted: sum of x x^T; the same object as `inputs` where the target is self.
        cross: sum of x x'^T (n x n, float64); None if it equals `inputs`.
        exact: whether all products of x' are of float64.
    """

    inputs: GramSum
    wanted: GramSum
    cross: Tensor | None = None
    exact: bool = True

    @classmethod
    def empty(cls, n: int, device: torch.device, own: bool) -> StreamSums:
        """Return the sums of no tokens; `own` if the target is self."""
        inputs = GramSum.empty(n, device)
        if own:
            return cls(inputs, inputs)
        return cls(inputs, GramSum.empty(n, device), torch.zeros(n, n, dtype=torch.float64, device=device))

    def add(self, inputs: Tensor, wanted: Tensor) -> bool:
        """Add tokens (tokens x n) of both; says whether the sums are still finite."""
        finite = self.inputs.add(inputs)
        exact = finite and (inputs.dtype == torch.float64 or hides_small_spectrum(self.inputs.gram))
        self.exact = self.exact and exact
        if self.cross is None:
            return finite
        for x, t in zip(inputs.split(CHUNK_TOKENS), wanted.split(CHUNK_TOKENS), strict=True):
            self.cross += _product(t, x, exact, self.cross.device)
        return self.wanted.add(wanted) and finite

    def __add__(self, other: StreamSums) -> StreamSums:
        inputs, exact = self.inputs + other.inputs, self.exact and other.exact
        if self.cross is None or other.cross is None:
            return StreamSums(inputs, inputs, exact=exact)
        return StreamSums(inputs, self.wanted + other.wanted, self.cross + other.cross, exact)

    def problem(self, weight: Tensor, centred: bool, lack: ResidualGap | None = None) -> Regression:
        """Make the least-squares problem of reproducing W x (+ e) from x'; around the means of all, if `centred`.

        Around its mean, a channel that never changes leaves only rounding. It counts as zero there.

        Args:
            weight: W (m x n).
            centred: whether a bias compensates the means.
            lack: sums of e, which the target also compensates.
        """
        w, gram, wanted = weight.to(self.inputs.upper), self.inputs.gram, self.wanted.gram
        cross = gram if self.cross is None else self.cross
        if centred and self.inputs.count > 1:  # around itself, one token leaves nothing but rounding
            mean, aim = self.means()
            n = self.inputs.count
            around, wanted = gram - n * torch.outer(mean, mean), wanted - n * torch.outer(aim, aim)
            varies = (around.diagonal() > CONSTANT[self.exact] * gram.diagonal()).to(gram)
            cross = (cross - n * torch.outer(aim, mean)) * varies
            gram = around * torch.outer(varies, varies)
            lack = lack.centred(mean, aim, n, varies) if lack is not None else None
        plain = Regression(gram, w @ cross, float((w @ wanted * w).sum()), cross)
        if lack is None:
            return plain
        energy = plain.energy + 2 * float((w * lack.by_wanted).sum()) + lack.energy
        return Regression(gram, plain.cross + lack.by_inputs, energy)

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the means of x' and of x."""
        count = max(1, self.inputs.count)
        return self.inputs.total / count, self.wanted.total / count

    def bias_change(self, weight: Tensor, compressed: Tensor, lack: ResidualGap | None = None) -> Tensor:
        """Return the bias change that makes the mean output that of the target: W mean(x) (+ mean(e)) - W' mean(x')."""
        mean, aim = self.means()
        change = weight.to(aim) @ aim - compressed.to(mean) @ mean
        return change if lack is None else change + lack.total / max(1, self.inputs.count)


def _product(left: Tensor, right: Tensor, exact: bool, device: torch.device) -> Tensor:
    """Return left^T right in float32 or better, in float64 where `exact`."""
    if exact:
        return left.to(device).double().t() @ right.to(device).double()  # in this order: mps has no float64
    wide = torch.promote_types(right.dtype, torch.float32)
    return (left.to(wide).t() @ right.to(wide)).to(device)


@dataclass(frozen=True)
class LayerSums:
    """All sums that a layer is refined by.

    Attributes:
        streams: of its inputs in both models.
        lack: of the gap of the residual stream there, if the layer compensates it.
    """

    streams: StreamSums
    lack: ResidualGap | None = None

    def __add__(self, other: LayerSums) -> LayerSums:
        lack = None if self.lack is None or other.lack is None else self.lack + other.lack
        return LayerSums(self.streams + other.streams, lack)

    def problem(self, weight: Tensor, centred: bool) -> Regression:
        """See `StreamSums.problem`."""
        return self.streams.problem(weight, centred, self.lack)

    def bias_change(self, weight: Tensor, compressed: Tensor) -> Tensor:
        """See `StreamSums.bias_change`."""
        return self.streams.bias_change(weight, compressed, self.lack)


@dataclass
class StreamCollector:
    """Gathers `StreamSums` for the layers of a block that runs twice for each batch: the original, then compressed.

    Attributes:
        originals: module path -> module of the original block; empty where only the compressed stream counts.
        compressed: module path -> module of the compressed block.
        anchor: weight of the original stream in the target.
        stack: windows averaged into one.
        device: where sums are stored.
        adding: layers that add to the residual stream and compensate its gap; see `add_lack`.
        largest: tokens whose inputs are more than so many times as large as the median count as if they were not
            larger than that; 0: all count by their size. Means then lose their meaning.
        routed: layers (experts) that may be sent other tokens in either model: their target is self, whatever `anchor`.
        sums: module path -> sums; one object for layers that read the same tensor.
        lacks: module path -> sums of the gap of the residual stream there.
    """

    originals: Mapping[str, nn.Module]
    compressed: Mapping[str, nn.Module]
    anchor: float
    stack: int
    device: torch.device
    adding: frozenset[str] = frozenset()
    routed: frozenset[str] = frozenset()
    largest: float = 0.0
    sums: dict[str, StreamSums] = field(default_factory=dict)
    lacks: dict[str, ResidualGap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._read: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._batch = Tokens()
        self._original: dict[str, list[Tensor]] = {}  # one for each call of a layer
        self._seen: list[tuple[Tensor, str]] = []
        self._leaders: dict[str, str] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> StreamCollector:
        for path, layer in self.originals.items():
            self._handles.append(layer.register_forward_pre_hook(self._remember(path)))
        for path, layer in self.compressed.items():
            self._handles.append(layer.register_forward_pre_hook(exact(self._add(path))))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._original, self._seen, self._read = {}, [], {}

    def begin(self, mask: Tensor | None, shape: tuple[int, ...] | None = None) -> None:
        """Prepare for a new batch, with this padding mask and (windows, tokens)."""
        self._batch, self._seen, self._original, self._read = Tokens(mask, shape), [], {}, {}

    def add_lack(self, path: str, lack: Tensor) -> None:
        """Add e (windows x tokens x m) of the batch that one of the layers `adding` has just read."""
        inputs, wanted, scale = self._read[path]
        if path not in self.lacks:
            self.lacks[path] = ResidualGap.empty(lack.shape[-1], inputs.shape[-1], self.device)
        rows = self._rows(path, lack.to(inputs.device))
        self.lacks[path].add(rows if scale is None else rows * scale, inputs, wanted)

    def of(self, path: str) -> LayerSums | None:
        """Return the sums of one layer; None if no token reached it."""
        sums = self.sums.get(path)
        return LayerSums(sums, self.lacks.get(path)) if sums is not None and sums.inputs.count else None

    def _remember(self, path: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._original.setdefault(path, []).append(args[0])

        return observe

    def _add(self, path: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            leader = next((name for known, name in self._seen if known is x), path)
            if self._leaders.setdefault(path, leader) != leader:
                raise ModelError(
                    f"the layer '{path}' reads the same tensor as '{leader}' in some batches only.",
                    f"leave it out: --ignore '{path}'",
                )
            if leader != path:
                self.sums[path] = self.sums[leader]
                if path not in self.adding:
                    return
            wide = widened(x)
            inputs, wanted = self._rows(path, wide), self._rows(path, self._wanted(path, wide))
            scale = self._scale(wanted)
            read = (inputs, wanted) if scale is None else (inputs * scale, wanted * scale)
            if path in self.adding:
                self._read[path] = (*read, scale)
            if leader != path:
                return
            self._seen.append((x, path))
            if path not in self.sums:
                self.sums[path] = StreamSums.empty(x.shape[-1], self.device, self._own(path))
            if not self.sums[path].add(*read):
                raise NonFiniteError(
                    f"NaN or infinity in the inputs of layer '{path}' of the compressed model.",
                    "run in float32 (--dtype float32), or keep more",
                )

        return observe

    def _scale(self, wanted: Tensor) -> Tensor | None:
        """Return what tokens (tokens x n) that are too large in the original count by (tokens x 1); None if all do."""
        if not self.largest or not len(wanted):
            return None
        norms = wanted.norm(dim=-1, keepdim=True)
        return (self.largest * norms.median() / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)

    def _wanted(self, path: str, x: Tensor) -> Tensor:
        """Return the mixture of the layer's inputs in both models."""
        if self._own(path):
            return x
        original = next(iter(self._original.get(path, ())), None)
        if original is None or original.shape != x.shape:
            raise ModelError(
                f"the layer '{path}' reads other tokens in the compressed model than in the original.",
                "--refine-option anchor=0 does without the original",
            )
        del self._original[path][0]
        return torch.lerp(x, original.to(x), self.anchor)

    def _own(self, path: str) -> bool:
        return self.anchor == 0 or path in self.routed

    def _rows(self, path: str, x: Tensor) -> Tensor:
        """Return real tokens, or means over `stack` windows, position by position."""
        numbers, shape = None if path in self.routed else self._batch.numbers(x), self._batch.shape_beside(x)
        if self.stack == 1 or numbers is None or shape is None:
            return self._batch.real(x, numbers)
        if self._batch.mask is not None:
            raise ValueError("stack_of_batch averages windows position by position: they must not be padded")
        windows = x.reshape(shape[0], -1, x.shape[-1])
        return torch.cat([part.mean(dim=0) for part in windows.split(self.stack)])
