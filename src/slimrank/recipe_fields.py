"""The options of a recipe: name, type, default, and the help text of the flag that is made of each."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from slimrank.budget.rank_plan import RankPlan
from slimrank.recipe_values import form_list, form_name, scheme_name, split_parts, widths

Parts = Annotated[int | list[int] | Literal["qkv"], BeforeValidator(split_parts)]
Form = Annotated[str, BeforeValidator(form_name)]
Multiple = Annotated[int, Field(ge=1)] | Literal["auto"]
Widths = Annotated[tuple[int, ...], BeforeValidator(widths)]
Names = Annotated[tuple[str, ...], BeforeValidator(form_list), Field(min_length=1)]
Scheme = Annotated[str, BeforeValidator(scheme_name)]


def _option(panel: str, default: Any, description: str, flag: str = "", shape: str = "", **bounds: Any) -> Any:
    """Declare an option of a recipe and its flag.

    Args:
        panel: the group of the help that lists the flag.
        default: of the option.
        description: of the option; also the help of the flag.
        flag: its name, where it is not that of the option.
        shape: how to write one value of a repeatable flag, where it is not just the value.
        bounds: of the value, as pydantic takes them.
    """
    extra: dict[str, Any] = {"panel": panel, "flag": flag, "shape": shape}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


_NAMED, _BY_PATTERN = "NAME=VALUE", "PATTERN=VALUE"

_how_small = partial(_option, "How small")
_what = partial(_option, "What to compress")
_text = partial(_option, "Text")
_where = partial(_option, "Where and how")


class RecipeFields(BaseModel):
    """The options of a recipe; see `slimrank.recipe.Recipe`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep_ratio: float | None = _how_small(
        None, "Fraction of the linears' parameters to KEEP: 0.8 keeps 80 %.", flag="--keep", gt=0, le=1
    )
    keep_total: float | None = _how_small(None, "Fraction of the whole model's parameters to keep.", gt=0, le=1)
    max_bytes: int | None = _how_small(None, "Largest size of all weights on disk, in bytes.", gt=0)
    max_latency: float | None = _how_small(
        None, "Largest time of decoding (or --latency prefill), over the original's, on this machine.", gt=0, lt=1
    )
    latency: Literal["decode", "prefill"] = _how_small("decode", "What --max-latency bounds.")
    latency_batch: int = _how_small(1, "Texts at once, for --max-latency.", ge=1)
    latency_tokens: int = _how_small(128, "Tokens of the prompt, for --max-latency.", ge=1)
    plan: str | RankPlan | None = _how_small(
        None, "A rank plan (a JSON file from 'slimrank plan --save') to follow, instead of a budget."
    )
    method: str = _what(
        "svd_llm",
        "Decomposition method, used alone: see 'slimrank methods'. Without it, options that you do not give come from "
        "the preset balanced.",
    )
    method_options: dict[str, Any] = _what(
        {}, "Options of the method: see 'slimrank methods ID'.", flag="--option", shape=_NAMED
    )
    refine: str | None = _what(
        None, "Closed-form update of the factors after truncation: see 'slimrank methods'; or none."
    )
    refine_options: dict[str, Any] = _what(
        {}, "Options of the refiner: see 'slimrank methods ID'.", flag="--refine-option", shape=_NAMED
    )
    corrections: int = _what(
        0, "Rounds that move all factors against the gradient of the divergence from the original.", ge=0
    )
    correction_windows: int = _what(16, "Windows of one round of correction.", ge=1)
    recover: str | None = _what(
        None, "Train the compressed model towards the original, before weights are rounded: see 'slimrank methods'."
    )
    recover_options: dict[str, Any] = _what(
        {}, "Options of that training: see 'slimrank methods ID'.", flag="--recover-option", shape=_NAMED
    )
    recover_text: str | None = _what(None, "Text to train on; by default the calibration text.")
    stages: dict[str, dict[str, Any]] = _what(
        {},
        "Your own stages to run, and their options: see docs/extending.md.",
        flag="--stage",
        shape="NAME, or NAME={OPTION: VALUE}",
    )
    allocation: str = _what("uniform", "Rank allocation: see 'slimrank methods'.")
    allocation_options: dict[str, Any] = _what(
        {}, "Options of the allocation: see 'slimrank methods ID'.", flag="--allocation-option", shape=_NAMED
    )
    ranks: dict[str, str | int] = _what(
        {},
        "Bounds of ranks by pattern: N, MIN..MAX (either may be left out), or dense.",
        flag="--rank",
        shape=_BY_PATTERN,
    )
    kv_keep: float | None = _what(
        None,
        "Largest rank of keys and values (k_proj, v_proj), as a fraction of their outputs: a latent cache takes about "
        "so much of the ordinary one.",
        gt=0,
        le=1,
    )
    form: Form = _what(
        "pair",
        "Form that ranks are chosen for and stored in: pair (two thin factors), pivot (fewer parameters at the same "
        "rank), or remapped (two factors in 8 and 16 bits).",
    )
    store_form: Form | None = _what(
        None, "Smaller form to store ranks in that were chosen for pairs: pivot. The model computes the same."
    )
    packed: bool = _what(
        False, "Pack the result: it computes layers of the same inputs together, and --max-latency times them so."
    )
    quantize: Scheme | None = _what(
        None,
        "Round the weights of all targets to integers: int8, int4-g64 (groups of 64 columns), int4-g64-sym (no zero "
        "points). Ranks are multiples of the group.",
    )
    bits: Widths = _what(
        (),
        "Widths that may be chosen for each layer, together with its form and rank, within --max-bytes: 2 to 8.",
        shape="WIDTH, or 3,4,6",
    )
    forms: Names = _what(
        ("dense", "residual"),
        "Forms that may be chosen for each layer with --bits: dense (few bits), residual (few bits and a low-rank "
        "correction), pair and pivot (few bits and a low rank).",
    )
    baselines: Widths = _what(
        (),
        "Widths of the dense model to compare with: the largest of them that takes no more bytes than the result is "
        "measured, too.",
        shape="WIDTH, or 8,6,4,3",
    )
    group_size: int = _what(64, "Columns that share a scale with --bits and --baselines; 0: all of a row.", ge=0)
    symmetric: bool = _what(False, "No zero points with --bits and --baselines.")
    quantize_options: dict[str, Any] = _what(
        {}, "Options of rounding: see docs/quantization.md.", flag="--quantize-option", shape=_NAMED
    )
    rank_multiple: Multiple = _what(
        1, "Make ranks multiples of this: 8 or 16 suit GPUs; auto measures what is fast on this device."
    )
    targets: tuple[str, ...] = _what(
        (), "Compress only layers that match a pattern: '*.mlp.*', 'q_proj', 're:...'.", flag="--target"
    )
    ignore: tuple[str, ...] = _what((), "Do not compress layers that match a pattern.")
    split: dict[str, Parts] = _what(
        {},
        "Treat a fused layer as several layers, by pattern: 2 (equal parts), [64,32,32] (outputs of each), or qkv.",
        shape=_BY_PATTERN,
    )
    calibration: str | tuple[str, ...] = _text(
        "demo",
        "Text to calibrate on: a .txt, .jsonl, .json or .parquet file, a folder, hub:ID[:CONFIG[:SPLIT]], demo, or "
        "self (the model writes it); or a mixture by shares of tokens: a.txt:0.7,b.jsonl:0.3. Use text like your own.",
    )
    chat: bool = _text(
        False,
        "Read rows with messages, or with instruction, input and output, as chats, and render them by the tokenizer's "
        "chat template.",
    )
    samples: int = _text(128, "Calibration windows.", ge=1)
    search_samples: int = _text(16, "Held-out windows that allocations measure plans on.", ge=1)
    seq_len: int | None = _text(
        None, "Tokens per window, in calibration and evaluation; by default 512, or the model's context.", ge=2
    )
    batch_size: int = _text(8, "Windows that run through a block at once.", ge=1)
    seed: int = _text(0, "Seed of the calibration windows, and of text that the model writes.", ge=0)
    evaluation: str | None = _text(
        "demo",
        "Text to measure perplexity on, before and after; null (--no-eval) measures nothing.",
        flag="--eval-text",
    )
    windows: int = _text(16, "Evaluation windows.", ge=1)
    device: str = _where("auto", "Where to compute: auto, cpu, cuda, mps, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _where(
        "auto", "Stored dtype: auto (that of the checkpoint), float32, bfloat16 or float16."
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = _where(
        "auto",
        "Precision of the blocks' products in calibration, allocation, refining, corrections and rounding: auto "
        "(float32 on a CPU, the stored dtype elsewhere), float32, or bfloat16 where the device has it. Sums and solves "
        "are always in float32 or float64.",
    )
    resident: bool = _where(False, "Keep the whole model on the device instead of one block at a time.")
    max_shard_size: str = _where("5GB", "Size of the largest weight file.", pattern=r"^\d+(KB|MB|GB)$")
