"""The text windows of a run, by request: read before any long work, tokenised after the model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from slimrank.errors import RecipeError
from slimrank.models.placement import placed, resolve_device
from slimrank.models.structure import context_of
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.text.mixtures import Part
from slimrank.text.overlap import windows_found
from slimrank.text.reading import Counts, ReadPart, draws_of, read_parts, without_chats
from slimrank.text.self_sampling import sample_windows
from slimrank.text.sources import read_documents
from slimrank.text.tokens import bos_of, check_tokens, tokenise
from slimrank.text.window_draws import Draws
from slimrank.text.windows import count_windows, leading_windows, tokens_digest

DEFAULT_SEQ_LEN = 512
NO_CHATS = "chats are asked for (chat), but no text holds any"
TOO_SHORT = (
    "the calibration text is too short for separate windows to calibrate, search, check and correct on: they overlap"
)


@dataclass(frozen=True)
class WindowRequest:
    """Windows that a stage asks for.

    Attributes:
        name: their use; requests of one name share their windows.
        count: their number.
        source: the text they come from. Those of the evaluation text are its first windows.
        disjoint: they overlap neither the windows that calibrate nor other disjoint ones.
        spread: they are spread evenly over the text, and overlap no disjoint ones. Others are drawn at random.
    """

    name: str
    count: int
    source: Literal["calibration", "evaluation"] = "calibration"
    disjoint: bool = False
    spread: bool = False


def merged(requests: Iterable[WindowRequest]) -> list[WindowRequest]:
    """Join requests of one name; the largest count holds."""
    found: dict[str, WindowRequest] = {}
    for request in requests:
        known = found.setdefault(request.name, request)
        if request.count > known.count:
            found[request.name] = request
    return list(found.values())


@dataclass(frozen=True)
class Texts:
    """Token windows of a run by the name of their request.

    Attributes:
        windows: name -> token ids (windows x seq_len), for every request that could be met.
        bos: whether every window begins with a BOS token.
        notes: what reading and drawing skipped or changed.
        overlap: a sentence if evaluation windows are found in the calibration text; else empty.
    """

    windows: Mapping[str, Tensor] = field(default_factory=dict)
    bos: bool = False
    notes: list[str] = field(default_factory=list)
    overlap: str = ""

    def __getitem__(self, name: str) -> Tensor:
        """Return the windows of a request."""
        return self.windows[name]

    def get(self, name: str) -> Tensor | None:
        """Return the windows of a request; None if nobody asked for them."""
        return self.windows.get(name)

    def digest(self, name: str) -> str | None:
        """Return the sha256 of the windows of a request; None if there are none."""
        return tokens_digest(self.windows[name]) if name in self.windows else None

    def tokens(self) -> dict[str, int]:
        """Count the tokens of each request."""
        return {name: ids.numel() for name, ids in self.windows.items()}


@dataclass(frozen=True)
class RawTexts:
    """The texts as read.

    Attributes:
        requests: the windows to make of them.
        calibration: the parts of the text to calibrate on; none if it is not needed.
        evaluation: the text to measure on, in the same way.
        notes: what reading skipped or changed.
    """

    requests: list[WindowRequest]
    calibration: Sequence[ReadPart]
    evaluation: Sequence[ReadPart]
    notes: list[str]

    def tokenised(self, recipe: Recipe, model: Any, tokenizer: Any, progress: Progress) -> Texts:
        """Make the token windows, of the length in the recipe.

        Raises:
            DataError: too little text.
            ModelError: tokens that the model has no embedding for.
            RecipeError: no tokenizer, or windows longer than the model's context.
        """
        if not self.requests:
            return Texts()
        if tokenizer is None:
            raise RecipeError(
                "a tokenizer is needed to read text.", "call compress(model, tokenizer, ...), or pass evaluation=None"
            )
        bos, notes = bos_of(tokenizer), list(self.notes)
        windows = {
            request.name: _leading(request, self.evaluation[0].text(tokenizer), recipe, model, tokenizer, notes)
            for request in self._from("evaluation")
        }
        drawn = self._from("calibration")
        if not drawn:
            return Texts(windows, bos is not None, notes)
        draws = self._draws(recipe, model, tokenizer, progress)
        found = _drawn(draws, drawn, notes)
        overlap = _overlap(windows.values(), draws, list(_calibrating(found, drawn)), bos)
        return Texts({**found, **windows}, bos is not None, [*notes, overlap] if overlap else notes, overlap)

    def _from(self, source: str) -> list[WindowRequest]:
        return [request for request in self.requests if request.source == source]

    def _draws(self, recipe: Recipe, model: Any, tokenizer: Any, progress: Progress) -> Draws:
        def sampled(count: int, seq_len: int, seed: int) -> Tensor:
            with placed([model], resolve_device(recipe.device), upcast=False):
                return sample_windows(model, tokenizer, count, seq_len, seed, progress)

        requests = self._from("calibration")
        samples = max((r.count for r in requests if not (r.disjoint or r.spread)), default=0)
        apart = tuple(r.count for r in requests if r.disjoint)
        counts = Counts(samples, apart, recipe.seq_len or DEFAULT_SEQ_LEN, recipe.seed)
        return draws_of(
            self.calibration, counts, tokenizer, sampled, lambda tokens: check_tokens(tokens, tokenizer, model)
        )


def _drawn(draws: Draws, requests: Sequence[WindowRequest], notes: list[str]) -> dict[str, Tensor]:
    """Draw the windows of all requests; add to the notes where the text is too short for one."""
    found: dict[str, Tensor] = {}
    disjoint = [request.name for request in requests if request.disjoint]
    if disjoint:
        windows, apart = draws.kept_apart()
        found |= dict(zip(disjoint, windows, strict=True))
        if not apart:
            notes.append(TOO_SHORT)
    for request in requests:
        if not (request.disjoint or request.spread):
            found[request.name] = draws.calibration()[: request.count]
        elif request.spread and (spread := _spread(draws, request, notes)) is not None:
            found[request.name] = spread
    return found


def _spread(draws: Draws, request: WindowRequest, notes: list[str]) -> Tensor | None:
    """Draw windows spread over the text; None where fewer fit than calibrate, which then serve instead."""
    windows = draws.refinement(request.count)
    count = max(len(windows), draws.samples)
    if count < request.count:
        what = "factors are refined on" if request.name == "refinement" else f"'{request.name}' has"
        notes.append(f"the calibration text is short: {what} {count} windows, not {request.count}")
    return windows if len(windows) == count else None


def _calibrating(found: Mapping[str, Tensor], requests: Sequence[WindowRequest]) -> Iterable[Tensor]:
    """Yield the windows that results are fitted to."""
    return (found[r.name] for r in requests if not r.disjoint and r.name in found)


def _leading(request: WindowRequest, text: str, recipe: Recipe, model: Any, tokenizer: Any, notes: list[str]) -> Tensor:
    """Return the first windows of a text; add to the notes if it holds fewer."""
    wanted, seq_len, bos = request.count, recipe.seq_len or DEFAULT_SEQ_LEN, bos_of(tokenizer)
    tokens = tokenise(text, tokenizer, most=wanted * seq_len)
    check_tokens(tokens, tokenizer, model)
    available = count_windows(tokens, seq_len, bos)
    if available < wanted:
        notes.append(f"the evaluation text holds {available} windows of {seq_len}, not {wanted}")
    return leading_windows(tokens, max(1, min(available, wanted)), seq_len, bos)


def _overlap(evaluation: Iterable[Tensor], draws: Draws, drawn: Sequence[Tensor], bos: int | None) -> str:
    """Say how many evaluation windows are found in the calibration text, and in the windows drawn from it."""
    skipped = int(bos is not None)
    for windows in (some[:, skipped:] for some in evaluation):
        found = draws.holds(windows)
        if bool(found.any()):
            in_drawn = torch.zeros_like(found)
            for some in drawn:
                in_drawn |= windows_found(windows, some[:, skipped:])
            return f"{found_note(found)} {int(in_drawn.sum())} of them are among the windows that calibrate."
    return ""


def found_note(found: Tensor) -> str:
    """Say how many evaluation windows are found in the calibration text."""
    return (
        f"the calibration text contains {int(found.sum())} of the {len(found)} evaluation windows, so the perplexity "
        "hides some of the loss: evaluate on other text."
    )


def read_texts(recipe: Recipe, requests: Iterable[WindowRequest]) -> RawTexts:
    """Read the texts that some windows are made of.

    Raises:
        DataError: a missing, unreadable or empty source.
        RecipeError: the notation of a mixture is wrong.
    """
    wanted, notes = merged(requests), list[str]()
    calibration, evaluation = list[ReadPart](), list[ReadPart]()
    sources = {request.source for request in wanted}
    if "calibration" in sources:
        calibration = read_parts(recipe.calibration, "calibration", notes.append, recipe.chat)
    if "evaluation" in sources and recipe.evaluation is not None:
        documents = read_documents(recipe.evaluation, "evaluation", notes.append, recipe.chat)
        evaluation = [ReadPart(Part(recipe.evaluation), documents)]
    if recipe.chat and wanted and without_chats([*calibration, *evaluation]):
        notes.append(NO_CHATS)
    return RawTexts(wanted, calibration, evaluation, notes)


def window_length(model: Any, wanted: int | None) -> int:
    """Return the tokens per window: as asked for, else 512 or the model's context, whichever is less.

    Raises:
        RecipeError: a length above the model's context.
    """
    context = context_of(model)
    if wanted is None:
        return min(DEFAULT_SEQ_LEN, context or DEFAULT_SEQ_LEN)
    if context is not None and context < wanted:
        raise RecipeError(
            f"seq_len {wanted} is more than the model's context of {context} tokens.", f"use --seq-len {context}"
        )
    return wanted
