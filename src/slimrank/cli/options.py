"""Options that several commands share, and how they become a recipe."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

_BUDGET, _DATA, _WHERE, _WHAT = "How small", "Text", "Where and how", "What to compress"
_TASKS = "Tasks"

Model = Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, or the word demo.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")]

Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks of lm-evaluation-harness, separated by commas (extra: eval). See 'lm_eval ls tasks'.",
        rich_help_panel=_TASKS,
    ),
]
TasksDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder of task files, which win over tasks of the same name; local_NAME is found as NAME.",
        rich_help_panel=_TASKS,
    ),
]
Shots = Annotated[
    int | None,
    typer.Option(help="Examples before each question.  \\[default: the task's own]", rich_help_panel=_TASKS),
]
Limit = Annotated[
    int | None, typer.Option(help="First questions of each task.  \\[default: all]", rich_help_panel=_TASKS)
]

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
        help="Decomposition method by itself: see 'slimrank methods'. Without one, all of the preset balanced.",
        rich_help_panel=_WHAT,
    ),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="Option of the method, as NAME=VALUE; repeatable.", rich_help_panel=_WHAT),
]
Refine = Annotated[
    str | None,
    typer.Option(
        "--refine", help="Closed-form update after the cut: see 'slimrank methods'; or none.", rich_help_panel=_WHAT
    ),
]
RefineOptions = Annotated[
    list[str] | None,
    typer.Option("--refine-option", help="Option of the refiner, as NAME=VALUE; repeatable.", rich_help_panel=_WHAT),
]
Corrections = Annotated[
    int | None,
    typer.Option(
        "--corrections",
        help="Rounds that move all factors against the gradient of the divergence from the original.  "
        "\\[default with --method: 0]",
        rich_help_panel=_WHAT,
    ),
]
CorrectionWindows = Annotated[
    int | None,
    typer.Option(
        "--correction-windows",
        help="Windows of one round, apart from those that calibrate.  \\[default: 16]",
        rich_help_panel=_WHAT,
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        help="Rank allocation: see 'slimrank methods'.  \\[default with --method: uniform]",
        rich_help_panel=_WHAT,
    ),
]
AllocationOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--allocation-option", help="Option of the allocation, as NAME=VALUE; repeatable.", rich_help_panel=_WHAT
    ),
]
Ranks = Annotated[
    list[str] | None,
    typer.Option(
        "--rank",
        help="Bound the rank of layers: PATTERN=N, PATTERN=MIN..MAX or PATTERN=dense; repeatable.",
        rich_help_panel=_WHAT,
    ),
]
FactorForm = Annotated[
    str | None,
    typer.Option(
        "--factor-form",
        help="What ranks are chosen for and stored as: pair, or pivot (fewer parameters at a rank).  "
        "\\[default with --method: pair]",
        rich_help_panel=_WHAT,
    ),
]
Secondary = Annotated[
    str | None,
    typer.Option(
        "--secondary", help="Store ranks chosen for pairs as something smaller: pivot.", rich_help_panel=_WHAT
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
Split = Annotated[
    list[str] | None,
    typer.Option(
        "--split",
        help="Treat fused layers as several: PATTERN=2 (equal parts), PATTERN=[64,32,32] (outputs of each) or "
        "PATTERN=qkv; repeatable.",
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
        help="Text to calibrate on: a .txt, .jsonl, .json or .parquet file, a folder, hub:ID[:CONFIG[:SPLIT]], demo, "
        "or self (the model writes it). Use text like your own.  \\[default: demo]",
        rich_help_panel=_DATA,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples", help="Calibration windows.  \\[default: 128; with a preset, its own]", rich_help_panel=_DATA
    ),
]
SearchSamples = Annotated[
    int | None,
    typer.Option(
        "--search-samples", help="Windows that plans are measured on.  \\[default: 16]", rich_help_panel=_DATA
    ),
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


def recipe_flags(
    keep: Keep = None,
    keep_total: KeepTotal = None,
    max_bytes: MaxBytes = None,
    plan: PlanFile = None,
    preset: Preset = None,
    recipe: RecipeFile = None,
    method: Method = None,
    option: MethodOptions = None,
    refine: Refine = None,
    refine_option: RefineOptions = None,
    corrections: Corrections = None,
    correction_windows: CorrectionWindows = None,
    allocation: Allocation = None,
    allocation_option: AllocationOptions = None,
    rank: Ranks = None,
    factor_form: FactorForm = None,
    secondary: Secondary = None,
    rank_multiple: RankMultiple = None,
    target: Targets = None,
    ignore: Ignore = None,
    split: Split = None,
    calibration: Calibration = None,
    samples: Samples = None,
    search_samples: SearchSamples = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    eval_text: EvalText = None,
    no_eval: NoEval = False,
    windows: Windows = None,
    device: Device = None,
    dtype: Dtype = None,
    resident: Resident = False,
    max_shard_size: MaxShardSize = None,
) -> dict[str, Any]:
    """Options of a recipe out of the flags that were given."""
    flags = {
        "keep_ratio": keep, "keep_total": keep_total, "max_bytes": max_bytes, "plan": plan,
        "method": method, "method_options": pairs(option), "refine": refine, "refine_options": pairs(refine_option),
        "corrections": corrections, "correction_windows": correction_windows,
        "allocation": allocation, "allocation_options": pairs(allocation_option), "ranks": pairs(rank),
        "factor_form": factor_form, "secondary": secondary,
        "rank_multiple": rank_multiple, "targets": target, "ignore": ignore, "split": pairs(split),
        "calibration": calibration,
        "samples": samples, "search_samples": search_samples, "seq_len": seq_len, "batch_size": batch_size,
        "seed": seed, "evaluation": eval_text, "windows": windows, "device": device, "dtype": dtype,
        "resident": resident, "max_shard_size": max_shard_size,
    }  # fmt: skip
    return recipe_options(preset, recipe, flags, no_eval)


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all flags of a recipe; they reach it as one mapping, its parameter `chosen`."""
    own, shared = inspect.signature(command, eval_str=True), inspect.signature(recipe_flags, eval_str=True)

    @functools.wraps(command)
    def with_flags(**given: Any) -> None:
        flags = {name: given.pop(name) for name in shared.parameters}
        command(chosen=recipe_flags(**flags), **given)

    mine = [p for name, p in own.parameters.items() if name != "chosen"]
    required = [p for p in mine if p.default is p.empty]
    optional = [p for p in mine if p.default is not p.empty]
    parameters = [*required, *shared.parameters.values(), *optional]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_flags


def recipe_options(
    preset: str | None, recipe_file: Path | None, flags: dict[str, Any], no_eval: bool = False
) -> dict[str, Any]:
    """Options of a recipe: those of the preset, then of the file, then the flags that were given.

    Raises:
        RecipeError: a plan and an allocation are asked for at once.
    """
    from slimrank.errors import RecipeError
    from slimrank.recipe import BUDGETS, Recipe

    options = Recipe.preset(preset) if preset is not None else {}
    if recipe_file is not None:
        options = _later(options, Recipe.read(recipe_file), BUDGETS)
    given = {name: value for name, value in flags.items() if value is not None and value is not False and value != []}
    if "plan" in given and given.keys() & {"allocation", "allocation_options"}:
        raise RecipeError("the ranks of a plan are fixed in it; no allocation is made.", "--plan or --allocation")
    merged = _later(options, given, BUDGETS)
    if no_eval:
        merged["evaluation"] = None
    return merged


def _later(options: dict[str, Any], given: dict[str, Any], budgets: Sequence[str]) -> dict[str, Any]:
    """Options with those given later: one budget for another; options of a method that stays are added to."""
    if any(name in given for name in budgets):
        replaced = {*budgets, "ranks", "rank_multiple"} if "plan" in given else budgets
        options = {name: value for name, value in options.items() if name not in replaced}
    given = dict(given)
    for which, extra in (
        ("method", "method_options"),
        ("refine", "refine_options"),
        ("allocation", "allocation_options"),
    ):
        if given.get(which, options.get(which)) == options.get(which) and extra in options:
            given[extra] = {**options[extra], **given.get(extra, {})}
        elif extra in options:
            given.setdefault(extra, {})
    return {**options, **given}
