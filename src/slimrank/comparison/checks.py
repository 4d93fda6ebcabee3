"""What a comparison asks of recipes before it computes: can they work, and which cells share a run directory?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimrank.comparison.cells import Cell
from slimrank.comparison.files import names_of, slug, state_of
from slimrank.comparison.request import Measurement
from slimrank.errors import RecipeError
from slimrank.evaluate.tasks import Tasks
from slimrank.pipeline.prepare import Choices
from slimrank.pipeline.preview import preview
from slimrank.recipe import Recipe
from slimrank.store import content_key
from slimrank.text.reading import read_parts
from slimrank.text.sources import read_source

LAYERS = ("dtype", "targets", "ignore", "split")
WINDOWS = ("calibration", "chat", "samples", "seq_len", "seed")


def check_cells(model: str | Path, cells: Sequence[Cell], measured: Measurement) -> None:
    """Refuse what needs no weights to be refused: names, options, budgets.

    Raises:
        RecipeError: no cell, two of the same name, or a recipe that cannot work.
    """
    if not cells:
        raise RecipeError("there is nothing to compare.", "--methods svd_llm,kfac_svd --keep 0.8, or recipe files")
    twice = [name for name, count in Counter(slug(cell.name) for cell in cells).items() if count > 1]
    if twice:
        raise RecipeError(f"two cells are called '{twice[0]}'.", "name the files otherwise, or leave one out")
    for cell in cells:
        recipe = cell.recipe().model_copy(update={"device": measured.device, "dtype": measured.dtype})
        with cell.named():
            preview(model, recipe)


def check_sources(cells: Sequence[Cell], measured: Measurement) -> None:
    """Read once everything besides the model that can be missing, before a cell has computed for hours.

    Raises:
        DataError: a text, a calibration source or a task cannot be read.
    """
    for source in measured.texts:
        read_source(source, "evaluation")
    recipes = [cell.recipe() for cell in cells]
    for calibration, chat in {(recipe.calibration, recipe.chat) for recipe in recipes if _calibrates(recipe)}:
        read_parts(calibration, "calibration", chat=chat)
    if measured.tasks is not None:
        Tasks(measured.tasks)


def run_folder(asked: Mapping[str, Any], folder: Path) -> Path:
    """Return the run directory of cells that the same windows of the same text calibrate, for the same layers."""
    if asked["options"] is None:
        return folder / "run"
    recipe = Recipe.make(asked["options"])
    about = {name: getattr(recipe, name) for name in LAYERS}
    sources = [str(asked["model"])]
    if Choices.of(recipe).reads_text:
        about |= {name: getattr(recipe, name) for name in WINDOWS}
        sources += names_of(recipe.calibration)
    files = [state_of(source) for source in sources]
    return folder / "run" / content_key({"model": str(asked["model"]), **about, "files": files})


def _calibrates(recipe: Recipe) -> bool:
    """Tell whether anything that the recipe asks for looks at calibration text."""
    return any(request.source == "calibration" for request in Choices.of(recipe).requests)
