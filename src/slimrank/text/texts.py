"""The texts of a run: read before any long work, tokenised once the model is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimrank.errors import RecipeError
from slimrank.models.placement import placed, resolve_device
from slimrank.models.structure import context_of
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.text.overlap import windows_found
from slimrank.text.self_sampling import sample_windows
from slimrank.text.sources import read_source
from slimrank.text.tokens import bos_of, check_tokens, tokenise
from slimrank.text.window_draws import Draws, FromModel, FromText
from slimrank.text.windows import count_windows, leading_windows, tokens_digest

DEFAULT_SEQ_LEN = 512
TOO_SHORT = "the calibration text is too short for windows of their own to search, judge and correct on: they overlap"


@dataclass(frozen=True)
class Texts:
    """Token windows of a run; None where a text is not needed. `refinement`: where it is not that of calibration.

    `overlap` says that evaluation windows are found in the calibration text; empty if they are not.
    """

    calibration: Tensor | None = None
    refinement: Tensor | None = None
    search: Tensor | None = None
    correction: Tensor | None = None
    evaluation: Tensor | None = None
    bos: bool = False
    notes: list[str] = field(default_factory=list)
    overlap: str = ""

    @property
    def calibration_tokens(self) -> int:
        """Tokens of calibration."""
        return 0 if self.calibration is None else self.calibration.numel()

    @property
    def refinement_tokens(self) -> int:
        """Tokens that factors are refined on."""
        return self.calibration_tokens if self.refinement is None else self.refinement.numel()

    @property
    def search_tokens(self) -> int:
        """Tokens that plans are measured on."""
        return 0 if self.search is None else self.search.numel()

    @property
    def search_digest(self) -> str | None:
        """sha256 of the search windows."""
        return None if self.search is None else tokens_digest(self.search)

    @property
    def refinement_digest(self) -> str | None:
        """sha256 of the windows that factors are refined on, where they are others than those of calibration."""
        return None if self.refinement is None else tokens_digest(self.refinement)

    @property
    def correction_digest(self) -> str | None:
        """sha256 of the windows that factors are corrected on."""
        return None if self.correction is None else tokens_digest(self.correction)

    @property
    def evaluation_tokens(self) -> int:
        """Tokens of one evaluation."""
        return 0 if self.evaluation is None else self.evaluation.numel()

    @property
    def evaluation_windows(self) -> int:
        """Windows of one evaluation."""
        return 0 if self.evaluation is None else len(self.evaluation)

    @property
    def calibration_digest(self) -> str | None:
        """sha256 of the calibration windows."""
        return None if self.calibration is None else tokens_digest(self.calibration)

    @property
    def evaluation_digest(self) -> str | None:
        """sha256 of the evaluation windows."""
        return None if self.evaluation is None else tokens_digest(self.evaluation)


@dataclass(frozen=True)
class RawTexts:
    """The texts as read; `calibration` is None for text that the model samples, or none at all.

    `refining` counts the windows that factors are refined on, where they are others than those of calibration.
    `notes` name what reading skipped or changed.
    """

    calibrates: bool
    searches: bool
    refining: int | None
    calibration: str | None
    evaluation: str | None
    notes: list[str]

    def tokenised(self, recipe: Recipe, model: Any, tokenizer: Any, progress: Progress) -> Texts:
        """Token windows, of the length that the recipe says.

        Raises:
            DataError: too little text.
            ModelError: tokens that the model has no embedding for.
            RecipeError: no tokenizer, or windows longer than the model's context.
        """
        if not self.calibrates and not self.searches and self.evaluation is None:
            return Texts()
        if tokenizer is None:
            raise RecipeError(
                "a tokenizer is needed to read text.", "compress(model, tokenizer, ...), or evaluation=None"
            )
        bos = bos_of(tokenizer)
        notes = list(self.notes)
        evaluation = None
        if self.evaluation is not None:
            evaluation = _evaluation(recipe, self.evaluation, model, tokenizer, bos, notes)
        if not (self.calibrates or self.searches):
            return Texts(evaluation=evaluation, bos=bos is not None, notes=notes)
        draws = self._draws(recipe, model, tokenizer, bos, progress)
        search = correction = None
        if self.searches:
            (search, correction), apart = draws.kept_apart()
            if not apart:
                notes.append(TOO_SHORT)
        calibration = draws.calibration() if self.calibrates else None
        refinement = self._refinement(draws, notes)
        overlap = "" if evaluation is None else _overlap(evaluation, draws, [calibration, refinement], bos)
        return Texts(
            calibration=calibration,
            refinement=refinement,
            search=search,
            correction=correction if recipe.corrections else None,
            evaluation=evaluation,
            bos=bos is not None,
            notes=[*notes, overlap] if overlap else notes,
            overlap=overlap,
        )

    def _refinement(self, draws: Draws, notes: list[str]) -> Tensor | None:
        """Windows that factors are refined on; None for those of calibration, also where no more fit."""
        if self.refining is None:
            return None
        windows = draws.refinement(self.refining)
        count = max(len(windows), draws.samples)
        if count < self.refining:
            notes.append(f"the calibration text is short: factors are refined on {count} windows, not {self.refining}")
        return windows if len(windows) == count else None

    def _draws(self, recipe: Recipe, model: Any, tokenizer: Any, bos: int | None, progress: Progress) -> Draws:
        def sampled(count: int, seq_len: int, seed: int) -> Tensor:
            with placed([model], resolve_device(recipe.device), upcast=False):
                return sample_windows(model, tokenizer, count, seq_len, seed, progress)

        samples = recipe.samples if self.calibrates else 0
        apart = (recipe.search_samples, recipe.corrections * recipe.correction_windows) if self.searches else ()
        shared = samples, apart, recipe.seq_len or DEFAULT_SEQ_LEN, recipe.seed
        if self.calibration is None:
            return FromModel(*shared, sampled)
        tokens = tokenise(self.calibration, tokenizer)
        check_tokens(tokens, tokenizer, model)
        return FromText(*shared, tokens, bos)


def _evaluation(recipe: Recipe, text: str, model: Any, tokenizer: Any, bos: int | None, notes: list[str]) -> Tensor:
    wanted, seq_len = recipe.windows, recipe.seq_len or DEFAULT_SEQ_LEN
    tokens = tokenise(text, tokenizer, most=wanted * seq_len)
    check_tokens(tokens, tokenizer, model)
    available = count_windows(tokens, seq_len, bos)
    if available < wanted:
        notes.append(f"the evaluation text holds {available} windows of {seq_len}, not {wanted}")
    return leading_windows(tokens, max(1, min(available, wanted)), seq_len, bos)


def _overlap(evaluation: Tensor, draws: Draws, drawn: Sequence[Tensor | None], bos: int | None) -> str:
    """Say how many evaluation windows are found in the calibration text, and in the windows drawn from it."""
    skipped = int(bos is not None)
    windows = evaluation[:, skipped:]
    found = draws.holds(windows)
    if not bool(found.any()):
        return ""
    in_drawn = torch.zeros_like(found)
    for some in drawn:
        if some is not None:
            in_drawn |= windows_found(windows, some[:, skipped:])
    return f"{found_note(found)} {int(in_drawn.sum())} of them are among the windows that calibrate."


def found_note(found: Tensor) -> str:
    """Say how many evaluation windows are found in the calibration text."""
    return (
        f"the calibration text contains {int(found.sum())} of the {len(found)} evaluation windows, so the perplexity "
        "shows less of the loss than other text would."
    )


def prepare_texts(recipe: Recipe, calibrates: bool, searches: bool = False, refining: int | None = None) -> RawTexts:
    """Read the texts of a recipe; what for: see `RawTexts`.

    Raises:
        DataError: a missing, unreadable or empty source.
    """
    own = recipe.calibration == "self" or not (calibrates or searches)
    notes: list[str] = []
    return RawTexts(
        calibrates,
        searches,
        refining,
        None if own else read_source(recipe.calibration, "calibration", notes.append),
        None if recipe.evaluation is None else read_source(recipe.evaluation, "evaluation", notes.append),
        notes,
    )


def window_length(model: Any, wanted: int | None) -> int:
    """Tokens per window: what was asked for, else 512 or the model's context, whichever is less.

    Raises:
        RecipeError: more was asked for than the model was made for.
    """
    context = context_of(model)
    if wanted is None:
        return min(DEFAULT_SEQ_LEN, context or DEFAULT_SEQ_LEN)
    if context is not None and context < wanted:
        raise RecipeError(
            f"seq_len {wanted} is more than the model's context of {context} tokens.", f"--seq-len {context}"
        )
    return wanted
