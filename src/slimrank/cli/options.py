"""Options that several commands share, and how they become a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_BUDGET, _DATA, _WHERE, _WHAT = "How small", "Text", "Where and how", "What to compress"

Model = Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, or the word demo.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")]

Keep = Annotated[
    float | None,
    typer.Option(
        "--keep", help="Fraction of the linears' parameters to KEEP: 0.8 keeps 80 %.", rich_help_panel=_BUDGET
    ),
]
KeepTotal = Annotated[
    float | None,
    typer.Option("--keep-total", help="Fraction of the whole model's parameters to keep.", rich_help_panel=_BUDGET),
]
MaxBytes = Annotated[
    int | None,
    typer.Option("--max-bytes", help="Largest size of all weights, in bytes.", rich_help_panel=_BUDGET),
]
PlanFile = Annotated[
    str | None,
    typer.Option("--plan", help="A rank plan (from 'slimrank plan --save') to follow.", rich_help_panel=_BUDGET),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="A YAML file of options; flags given here win over it.", rich_help_panel=_BUDGET),
]
Preset = Annotated[
    str | None,
    typer.Option("--preset", help="Options by name: fast, balanced or best.", rich_help_panel=_BUDGET),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="Decomposition method: see 'slimrank methods'.  \\[default: svd_llm]",
        rich_help_panel=_WHAT,
    ),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="Option of the method, as NAME=VALUE; repeatable.", rich_help_panel=_WHAT),
]
Refine = Annotated[
    str | None,
    typer.Option("--refine", help="Closed-form update after the cut: see 'slimrank methods'.", rich_help_panel=_WHAT),
]
RefineOptions = Annotated[
    list[str] | None,
    typer.Option("--refine-option", help="Option of the refiner, as NAME=VALUE; repeatable.", rich_help_panel=_WHAT),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        help="Rank allocation: see 'slimrank methods'.  \\[default: uniform]",
        rich_help_panel=_WHAT,
    ),
]
RankMultiple = Annotated[
    int | None,
    typer.Option("--rank-multiple", help="Make ranks multiples of this.  \\[default: 1]", rich_help_panel=_WHAT),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        help="Compress only layers like this ('*.mlp.*', 'q_proj', 're:...'); repeatable.",
        rich_help_panel=_WHAT,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="Leave layers like this alone; repeatable.", rich_help_panel=_WHAT),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text to calibrate on: a .txt, .jsonl or .parquet file, a folder, hub:ID[:CONFIG[:SPLIT]], demo, or "
        "self (the model writes it). Use text like your own.  \\[default: demo]",
        rich_help_panel=_DATA,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", help="Calibration windows.  \\[default: 128]", rich_help_panel=_DATA),
]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", help="Tokens per window.  \\[default: 512]", rich_help_panel=_DATA)
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Windows at a time.  \\[default: 8]", rich_help_panel=_DATA)
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the windows.  \\[default: 0]", rich_help_panel=_DATA)]
EvalText = Annotated[
    str | None,
    typer.Option("--eval-text", help="Text to measure perplexity on.  \\[default: demo]", rich_help_panel=_DATA),
]
NoEval = Annotated[bool, typer.Option("--no-eval", help="Measure nothing before and after.", rich_help_panel=_DATA)]
Windows = Annotated[
    int | None, typer.Option("--windows", help="Evaluation windows.  \\[default: 16]", rich_help_panel=_DATA)
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="auto, cpu, cuda, mps, ...  \\[default: auto]", rich_help_panel=_WHERE),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Stored dtype: auto, float32, bfloat16, float16.  \\[default: auto]",
        rich_help_panel=_WHERE,
    ),
]
Resident = Annotated[
    bool,
    typer.Option(
        "--resident",
        help="Keep the whole model on the device, not one block at a time.",
        rich_help_panel=_WHERE,
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option("--max-shard-size", help="Largest weight file.  \\[default: 5GB]", rich_help_panel=_WHERE),
]


def pairs(given: list[str] | None) -> dict[str, Any] | None:
    """NAME=VALUE options as a mapping; values are read as YAML, so that numbers are numbers.

    Raises:
        RecipeError: no equals sign.
    """
    import yaml

    from slimrank.errors import RecipeError

    found: dict[str, Any] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"'{text}' is not NAME=VALUE.", f"{name}=...")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(
                f"the value of '{text}' cannot be read: {error}", "a number, a word or [a, list]"
            ) from error
    return found or None


def recipe_options(
    preset: str | None, recipe_file: Path | None, flags: dict[str, Any], no_eval: bool = False
) -> dict[str, Any]:
    """Options of a recipe: those of the preset, then of the file, then the flags that were given."""
    from slimrank.recipe import BUDGETS, Recipe

    options = Recipe.preset(preset) if preset is not None else {}
    options |= Recipe.read(recipe_file) if recipe_file is not None else {}
    given = {name: value for name, value in flags.items() if value is not None and value is not False and value != []}
    if any(name in given for name in BUDGETS):
        options = {name: value for name, value in options.items() if name not in BUDGETS}
    merged = {**options, **given}
    if no_eval:
        merged["evaluation"] = None
    return merged
