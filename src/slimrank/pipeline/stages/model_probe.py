"""The model as allocations measure it on the search windows: see `budget.problem.Probe`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from slimrank.budget.problem import Effect, Transform
from slimrank.budget.ranks import Rank
from slimrank.errors import NonFiniteError
from slimrank.methods.divergence_options import DivergenceOptions
from slimrank.models.contexts import swapped
from slimrank.models.divergence import Scorer
from slimrank.models.gradients import frozen, logits_of, next_token_loss
from slimrank.models.recording import Batch
from slimrank.models.states import HiddenState
from slimrank.pipeline.stages.spectrum_store import SpectrumStore
from slimrank.pipeline.units import Unit
from slimrank.progress import Forecast
from slimrank.statistics.precision import exact, widened
from slimrank.store import Store, content_key

if TYPE_CHECKING:
    from slimrank.pipeline.state import State


MAX_HELD_BYTES = 2**30  # bytes of final hidden states, of cuts that are compared at a time
Cut = tuple[str, int]  # path and rank


class ModelProbe:
    """Effects of truncating targets, on search windows.

    A change in block b leaves everything before b as it was. So the original's hidden states go through the blocks
    once, and for each target only the blocks from its own on run. Measurements are stored at least after every
    block and after every plan of all targets.

    Args:
        state: holds the model and the search windows.
        spectra: the source of the factors.
        store: where measurements are stored.
        measuring: temperature and dropped positions.
        forecast: receives every forward pass, or part of one.
    """

    def __init__(
        self, state: State, spectra: SpectrumStore, store: Store, measuring: DivergenceOptions, forecast: Forecast
    ) -> None:
        assert state.texts.get("search") is not None
        self.state, self.spectra, self.store, self.forecast = state, spectra, store, forecast
        self.units = {unit.path: unit for unit in state.prepared.units}
        self.runner = state.runner(state.prepared.recipe.resident)
        self._batches = [Batch(ids) for ids in state.texts["search"].split(state.prepared.recipe.batch_size)]
        self._scorer = Scorer(
            self.runner, measuring.temperature, measuring.positions(int(state.texts["search"].shape[1]))
        )
        self._embedded: list[HiddenState] = []
        self._stack = ExitStack()

    def __enter__(self) -> ModelProbe:
        self._stack.enter_context(self.runner.session())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    # divergence ---------------------------------------------------------------------------------------------

    def single(self, ranks: Mapping[str, Sequence[int]]) -> dict[str, list[Effect]]:
        """Measure the effects of each target alone at some ranks."""
        known = self._known("effects")
        missing = {p: [r for r in found if str(r) not in known.get(p, {})] for p, found in ranks.items()}
        self.forecast.did(sum(self._share(p) * (len(found) - len(missing[p])) for p, found in ranks.items()))
        if any(missing.values()):
            self._embed()
            states = list(self._embedded)
            for index in range(len(self.runner)):
                mine = [(p, r) for p, some in missing.items() for r in some if min(self.units[p].blocks) == index]
                for group in self._groups(mine):
                    for path, effects in self._block(index, states, group).items():
                        known.setdefault(path, {}).update(effects)
                    self.store.save("effects", {}, known)
                states = self.runner.through(states, index, index + 1)
        return {p: [Effect(*known[p][str(r)]) for r in found] for p, found in ranks.items()}

    def _share(self, path: str) -> float:
        """Return the part of a forward pass that one cut of this target takes: from its block on."""
        return 1 - min(self.units[path].blocks) / len(self.runner)

    def _groups(self, cuts: Sequence[Cut]) -> list[Sequence[Cut]]:
        """Split the cuts into groups whose final hidden states fit in memory."""
        one = sum(hidden.nbytes for hidden in self._scorer.original)
        count = max(1, MAX_HELD_BYTES // max(1, one))
        return [cuts[start : start + count] for start in range(0, len(cuts), count)]

    def _block(
        self, index: int, states: list[HiddenState], cuts: Sequence[Cut]
    ) -> dict[str, dict[str, tuple[float, float]]]:
        """Measure the effects of cuts that begin in this block; compare them with the original together."""
        finals = []
        for path, rank in cuts:
            layers = self.spectra.layers(self.units[path], rank)
            with _measuring(f"'{path}' cut to rank {rank}"), swapped(self.state.model, layers):
                finals.append(self._scorer.to_host(self.runner.finals(states, index)))
            self.forecast.did(self._share(path))
        found: dict[str, dict[str, tuple[float, float]]] = {}
        for (path, rank), effect in zip(cuts, self._scorer.score(finals), strict=True):
            if not torch.isfinite(torch.tensor(effect)).all():
                raise NonFiniteError(f"the divergence of '{path}' at rank {rank} is NaN or infinite.", _FLOAT32)
            found.setdefault(path, {})[str(rank)] = effect
        return found

    def joint(self, ranks: Mapping[str, Rank]) -> Effect:
        """Measure the effect of all targets at these ranks."""
        known = self._known("plans")
        name = content_key({path: str(rank) for path, rank in ranks.items() if rank != "dense"})
        if name not in known:
            known[name] = self._joint(ranks)
            if all(map(isfinite, known[name])):
                self.store.save("plans", {}, known)
        self.forecast.did(1)
        return Effect(*known[name])

    def _joint(self, ranks: Mapping[str, Rank]) -> tuple[float, float]:
        self._embed()
        layers: dict[str, nn.Module] = {}
        for path, rank in ranks.items():
            layers |= self.spectra.layers(self.units[path], rank) if rank != "dense" else {}
        with _measuring("a plan of the allocation"), swapped(self.state.model, layers):
            final = self._scorer.to_host(self.runner.finals(self._embedded, 0))
        return self._scorer.score([final])[0]

    def _known(self, name: str) -> dict[str, Any]:
        """Load earlier measurements: effects by path and rank, or effects of plans by a digest of their ranks."""
        return self.store.load(name)[1] if self.store.has(name) else {}

    def _embed(self) -> None:
        """Embed the windows and compute the original's final hidden states, once."""
        if self._embedded:
            return
        self.runner.embed(self._batches)
        self._embedded = list(self.runner.states)
        self._scorer.original = self._scorer.to_host(self.runner.finals(self._embedded, 0))

    # influence ----------------------------------------------------------------------------------------------

    def influence(self) -> list[float]:
        """Return, for each decoder block, the mean over tokens of the cosine of its input and output."""
        self.runner.embed(self._batches)
        states, found = list(self.runner.states), []
        for index in range(len(self.runner)):
            after = self.runner.through(states, index, index + 1)
            pairs = [(a.hidden.cpu().double(), b.hidden.cpu().double()) for a, b in zip(states, after, strict=True)]
            cosines = [cosine_similarity(*pair, dim=-1).flatten() for pair in pairs]
            found.append(float(torch.cat(cosines).mean()))
            states = after
            self.forecast.did(1 / len(self.runner))
        return found

    # gradients ----------------------------------------------------------------------------------------------

    def batches(self) -> int:
        """Count the batches of search windows."""
        return len(self._batches)

    def factors(self, path: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a target at its full rank, on the device that the model runs on."""
        unit = self.units[path]
        a, parts = self.spectra.factors(unit, self.spectra.of(unit)[0].full_rank)
        return a.to(self.state.prepared.device), torch.cat(list(parts)).to(self.state.prepared.device)

    def loss(self, transforms: Mapping[str, Transform], batch: int) -> Tensor:
        """Return the next-token loss in nats a token, with the outputs of these layers transformed."""
        ids = self._batches[batch].input_ids
        with self._whole(), _as_placed(), _transformed(self.state.model, self.units, transforms), torch.enable_grad():
            logits = logits_of(self.state.model, Batch(ids), self.state.prepared.device)
            self.forecast.did(self.state.prepared.choices.allocator.gradient_passes / self.batches())
            return next_token_loss(logits, Batch(ids)) / ids[:, 1:].numel()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Hold the whole model on the device, its weights frozen."""
        with frozen(self.state.model), self.runner.placed(self.state.model):
            yield


@contextmanager
def _measuring(what: str) -> Iterator[None]:
    """Add what was being measured to the error about a number that is not finite."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"while {what} was measured: {error.message}", error.hint) from error


def _as_placed() -> Any:
    """Make autograd hold the weights of the forward pass: on the way back they are no longer placed."""
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved)


@contextmanager
def _transformed(model: nn.Module, units: Mapping[str, Unit], transforms: Mapping[str, Transform]) -> Iterator[None]:
    """Transform the outputs of these layers inside the context."""
    handles = []
    for path, transform in transforms.items():
        start = 0
        for target in units[path].targets:
            rows = slice(start, start := start + target.shape[0])
            handles.append(model.get_submodule(target.path).register_forward_hook(_hook(transform, rows)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(transform: Transform, rows: slice) -> Any:
    def replace_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        bias, x, wide = getattr(module, "bias", None), widened(args[0]), widened(output)
        if bias is None:
            return transform(x, wide, rows).to(output.dtype)
        return (transform(x, wide - bias, rows) + bias).to(output.dtype)

    return exact(replace_output)


_FLOAT32 = "run in float32 (--dtype float32)"
