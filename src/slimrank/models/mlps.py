"""Find the MLPs of a model by trying: layers whose hidden units are each made and read by one row and one column.

Hidden unit j is made by row j of one or two layers (two rows of a fused one), and read by column j of another. So the
units can be taken away, and put in another order, without changing what the others compute. Attention is different: a
channel of its queries reaches all channels that the output projection reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimrank.layers.base import compressed_layers
from slimrank.layers.dense import weight_of
from slimrank.layers.experts import Experts
from slimrank.models.contexts import evaluating
from slimrank.models.structure import find_blocks, without_numbers

Rows = Literal["whole", "halves", "pairs"]
TOKENS = 32  # that are tried
LINEARS = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Mlp:
    """An MLP, or one expert.

    Attributes:
        block: index of its decoder block.
        width: number of hidden units, n.
        makers: path of each layer that makes them -> which of its rows make unit j. "whole": row j, "halves": rows j
            and n + j, "pairs": rows 2 j and 2 j + 1.
        reader: path of the layer that reads them.
    """

    block: int
    width: int
    makers: Mapping[str, Rows]
    reader: str

    @property
    def paths(self) -> list[str]:
        """Return the paths of all its layers."""
        return [*self.makers, self.reader]


def rows_of_units(units: Tensor, width: int, rows: Rows) -> Tensor:
    """Return the rows of a layer that make some hidden units, in the order that a narrower layer has them in."""
    if rows == "halves":
        return torch.cat([units, width + units])
    return torch.stack([2 * units, 2 * units + 1], dim=1).flatten() if rows == "pairs" else units


def find_mlps(model: nn.Module) -> list[Mlp]:
    """Find all MLPs of a model, whose experts are linear layers already, in the order of its blocks.

    The first of each role is tried on a few tokens; the others of this role are like it.

    Args:
        model: with weights, on any device.
    """
    root, blocks = find_blocks(model)
    trial = _Trial(model)
    known: dict[str, dict[str, Rows]] = {}
    found = []
    with evaluating(model):
        for index, block in enumerate(blocks):
            for reader, makers in _candidates(block, f"{root}.{index}"):
                role = without_numbers(reader)
                if role not in known:
                    known[role] = {without_numbers(path): rows for path, rows in trial.makers(reader, makers).items()}
                mine = {
                    path: known[role][without_numbers(path)] for path in makers if without_numbers(path) in known[role]
                }
                if mine:
                    found.append(Mlp(index, _inputs(model.get_submodule(reader)), mine, reader))
    return _untied(model, found)


def _candidates(block: nn.Module, root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the path of every layer that may read hidden units, with those that may make them."""
    for name, module in block.named_modules():
        path = f"{root}.{name}".rstrip(".")
        if isinstance(module, Experts):
            yield from ((f"{path}.down.{i}", [f"{path}.up.{i}"]) for i in range(len(module.down)))
            continue
        linears = {child: layer for child, layer in module.named_children() if isinstance(layer, LINEARS)}
        for child, layer in linears.items():
            width = _inputs(layer)
            makers = [f"{path}.{n}" for n, m in linears.items() if n != child and _outputs(m) in (width, 2 * width)]
            if makers and not _holds(module, linears, width):
                yield f"{path}.{child}", makers


def _holds(parent: nn.Module, linears: Mapping[str, nn.Module], width: int) -> bool:
    """Tell whether a module that holds an MLP has weights of its own for each hidden unit."""
    parts = [part for name, part in parent.named_children() if name not in linears and not _has_linears(part)]
    tensors = [*parent.parameters(recurse=False), *(t for part in parts for t in part.parameters())]
    return any(width in tensor.shape for tensor in tensors)


def _has_linears(module: nn.Module) -> bool:
    return any(isinstance(part, LINEARS) for part in module.modules())


def _inputs(layer: Any) -> int:
    return int(weight_of(layer).shape[1])


def _outputs(layer: Any) -> int:
    return int(weight_of(layer).shape[0])


def _untied(model: nn.Module, found: list[Mlp]) -> list[Mlp]:
    """Return the MLPs whose weights no other module holds."""
    holders: dict[int, int] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            holders[id(weight)] = holders.get(id(weight), 0) + 1
    return [mlp for mlp in found if all(holders[id(model.get_submodule(p).weight)] == 1 for p in mlp.paths)]


class _Trial:
    """Changes what layers put out on a few tokens, and looks at what another layer reads."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        draw = torch.Generator().manual_seed(0)
        self.ids = torch.randint(min(256, rows), (2, TOKENS // 2), generator=draw)

    def makers(self, reader: str, candidates: list[str]) -> dict[str, Rows]:
        """Return which of these layers make the units that `reader` reads, and by which rows; none in other layers."""
        if compressed_layers(self.model):
            return {}
        path = next(
            (parent for parent in _parents(reader) if isinstance(self.model.get_submodule(parent), Experts)), ""
        )
        run = self._of_experts(path, reader) if path else self._of_model(reader)
        before = run({})
        found: dict[str, Rows] = {}
        for candidate in candidates:
            changed = [self._changed(run, before, candidate, rows) for rows in self._rows(candidate, reader)]
            if all(each is None for each in changed):
                return {}  # its rows reach other units
            rows = next((r for r, c in zip(self._rows(candidate, reader), changed, strict=True) if c), None)
            if rows is not None:
                found[candidate] = rows
        return found if before is not None else {}

    def _rows(self, maker: str, reader: str) -> tuple[Rows, ...]:
        twice = _outputs(self.model.get_submodule(maker)) != _inputs(self.model.get_submodule(reader))
        return ("halves", "pairs") if twice else ("whole",)

    def _changed(self, run: Callable[..., Tensor | None], before: Tensor | None, maker: str, rows: Rows) -> bool | None:
        """Tell whether some units change with their rows: True, or False for none; None if others change as well."""
        if before is None:
            return None
        width = before.shape[-1]
        some = torch.arange(0, width, 2)
        for units in (some, torch.arange(width // 2)):
            after = run({maker: rows_of_units(units, width, rows)})
            if after is None or after.shape != before.shape:
                return None
            moved = ((after - before).abs() > 1e-4 * before.abs().amax()).flatten(0, -2).any(dim=0)
            others = torch.ones(width, dtype=torch.bool)
            others[units] = False
            if bool(moved.cpu()[others].any()):
                return None
            if not bool(moved.any()):
                return False
        return True

    def _of_model(self, reader: str) -> Callable[[Mapping[str, Tensor]], Tensor | None]:
        def run(changed: Mapping[str, Tensor]) -> Tensor | None:
            read: list[Tensor] = []
            layer = self.model.get_submodule(reader)
            handle = layer.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
            try:
                with _other_outputs(self.model, changed):
                    self.model(input_ids=self.ids.to(self.model.device), use_cache=False)  # type: ignore[arg-type]
            finally:
                handle.remove()
            return read[0].float() if read else None

        return run

    def _of_experts(self, path: str, reader: str) -> Callable[[Mapping[str, Tensor]], Tensor | None]:
        experts: Any = self.model.get_submodule(path)
        up, down = experts.up[0], self.model.get_submodule(reader)
        draw = torch.Generator().manual_seed(0)
        made = torch.randn(TOKENS, _outputs(up), generator=draw).to(up.weight)
        width = _inputs(down)

        def run(changed: Mapping[str, Tensor]) -> Tensor | None:
            given = made.clone()
            for rows in changed.values():
                given[:, rows.to(given.device)] = _other(made[:, rows.to(given.device)])
            hidden = experts._between(given)
            return hidden.float() if hidden.shape[-1] == width else None

        return run


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


@contextmanager
def _other_outputs(model: nn.Module, changed: Mapping[str, Tensor]) -> Iterator[None]:
    """Let layers put out something else in some of their rows."""

    def hook(rows: Tensor) -> Any:
        def other(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output, places = output.clone(), rows.to(output.device)
            output[..., places] = _other(output[..., places])
            return output

        return other

    handles = [model.get_submodule(path).register_forward_hook(hook(rows)) for path, rows in changed.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _other(values: Tensor) -> Tensor:
    """Return other values of the same size, all positive, so that no activation is flat there."""
    size = values.float().abs().amax().clamp(min=1e-3)
    wave = torch.linspace(0, values.numel(), values.numel(), device=values.device).sin().view(values.shape)
    return (size * (1.5 + 0.4 * wave)).to(values)
