"""slimrank plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import ConsoleProgress, duration, print_json, print_table, print_text, say_quietly
from slimrank.cli.heatmap import show_plan, show_trade_off

NEAR = 1.3  # factor between the sizes of forms that are shown together


@o.takes_recipe()
def plan(
    model: o.Model,
    chosen: dict[str, Any],
    out: Annotated[Path | None, typer.Option(help="Output folder of compress: checked, not written.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="As for compress; nothing is replaced.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the rank plan here, for compress --plan.")] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Compute the ranks of any allocation, and store what that takes here, for compress --run-dir."
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Show what compress would do: sizes, ranks by block and layer, time, memory, layers left out.

    It loads no weights and shows uniform ranks where an allocation needs spectra or measurements. With --run-dir or
    --save it computes these ranks.

    Example: slimrank plan demo --keep 0.8 --method kfac_svd --allocation spectrum --save plan.json --run-dir run
    """
    from slimrank.budget.rank_plan import check_place
    from slimrank.checkpoint.output_folder import OutputFolder
    from slimrank.pipeline.preview import preview

    if out is not None:
        OutputFolder(out, overwrite)
    if save is not None:
        check_place(save)
    say_quietly()
    with ConsoleProgress() as progress:
        wanted = run_dir is not None or save is not None
        found, allocation = _computed(model, chosen, run_dir, progress) if wanted else _expected(chosen)
        record = preview(model, progress=progress, **found)
    made = record.pop("plan")
    record["allocation"] = allocation
    if save is not None:
        made.save(save)
    if json:
        print_json({**record, "plan": made.model_dump()})
    else:
        _show(model, record, save)
        if allocation.get("provisional"):
            guess = "forms are a guess" if chosen.get("bits") else "ranks are uniform"
            if chosen.get("max_latency"):
                guess = "sizes are a guess, as nothing is timed yet"
            print_text(f"these {guess}; with --run-dir DIR, '{allocation['id']}' computes its own")
            return
        show_plan(made, record["blocks_path"])
        show_trade_off(allocation, made.kept_bits)


def _expected(chosen: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the recipe, and whether uniform ranks are shown instead of those of its allocation."""
    from slimrank.pipeline.prepare import Choices
    from slimrank.recipe import Recipe

    recipe = Recipe.make(chosen)
    return chosen, {"id": recipe.allocation, "provisional": Choices.of(recipe).computes_ranks}


def _computed(
    model: str, chosen: dict[str, Any], run_dir: Path | None, progress: ConsoleProgress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the recipe with a plan instead of its budget, where the allocation has to be computed."""
    from slimrank.pipeline import find_plan
    from slimrank.pipeline.prepare import Choices
    from slimrank.recipe import BUDGETS, Recipe

    recipe = Recipe.make(chosen)
    if not Choices.of(recipe).computes_ranks:
        return chosen, {"id": recipe.allocation}
    plan, about = find_plan(model, recipe=recipe, run_dir=run_dir, progress=progress)
    return {**{k: v for k, v in chosen.items() if k not in (*BUDGETS, "bits", "quantize")}, "plan": plan}, about


def _show(model: str, record: dict[str, Any], save: Path | None) -> None:
    _show_size(model, record["size"], record["quantizes"])
    _show_ranks(record["kinds"])
    _show_forms(record)
    _show_caches(record["kv_bytes"])
    _show_coverage(record["coverage"])
    _show_cost(record)
    for note in record["notes"]:
        print_text(f"note: {note}")
    if save is not None:
        print_text(f"plan written to {save}")


def _show_size(model: str, size: dict[str, Any], quantizes: bool) -> None:
    from slimrank.report.number_format import megabytes, millions, percent

    kept = f"{percent(size['keep_ratio'])} of the linears, {percent(size['keep_total'])} of the model"
    if quantizes:
        kept = f"{percent(size['bytes_after'] / size['bytes_loaded'])} of the bytes"
    rows = [
        ("parameters of the model", millions(size["parameters_before"]), millions(size["parameters_after"])),
        ("size on disk", megabytes(size["bytes_before"]), megabytes(size["bytes_after"])),
    ]
    print_table(f"{model}: would keep {kept}", ("", "before", "after"), rows)


def _show_ranks(kinds: list[dict[str, Any]]) -> None:
    from slimrank.report.number_format import millions

    rows = [
        (k["name"], str(k["count"]), "{} x {}".format(*k["shape"]), _ranks(k["ranks"]), millions(k["parameters"]))
        for k in kinds
    ]
    print_table("ranks", ("layers", "how many", "shape", "rank", "parameters after"), rows)
    forms = [(k["name"], _counted(k["forms"])) for k in kinds if k["forms"]]
    if forms:
        print_table("stored as", ("layers", "how many in which form"), forms)


def _show_forms(record: dict[str, Any]) -> None:
    """Show what the budget allows, and what one form for all layers would take and lose."""
    bits = record["bits_a_weight"]
    if bits is not None:
        print_text(f"the budget leaves {bits:.2f} bits for each weight of the linears")
    if bits is not None and record["size"]["keep_ratio"] < 1 and not record["quantizes"]:
        print_text("fewer bits lose less than such low ranks: --preset small chooses both within the same bytes")
    known = record["allocation"].get("alternatives") or record["alternatives"]
    size = record["size"]["linears_bytes"]
    near = [each for each in known if 1 / NEAR < each["size"] / size < NEAR]
    if near:
        print_table("one form for all layers, at about that size", *_alternatives(near, record["allocation"]))


def _alternatives(found: list[dict[str, Any]], allocation: dict[str, Any]) -> tuple[tuple[str, ...], list[Any]]:
    """Return headings and rows; the predicted loss is over that of the plan, where it is known."""
    from slimrank.budget.alternatives import form_and_rank
    from slimrank.report.number_format import megabytes

    rows = [(form_and_rank(each), megabytes(each["size"])) for each in found]
    if "predicted" not in allocation:
        return ("all layers as", "size of the linears"), rows
    losses = [f"{each['error'] / (allocation['predicted'] or 1.0):.2f}" for each in found]
    return ("all layers as", "size of the linears", "predicted loss, over the plan's"), [
        (*row, loss) for row, loss in zip(rows, losses, strict=True)
    ]


def _counted(forms: dict[str, int]) -> str:
    return ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))


def _show_caches(found: dict[str, dict[int, int]] | None) -> None:
    """Show what caches of one text take; before compression, keys and values are kept as they are."""
    from slimrank.report.kv_table import kv_headings, kv_rows

    if found is not None:
        print_table("cache of keys and values, of one text", kv_headings(found), kv_rows(found))


def _show_coverage(coverage: dict[str, Any]) -> None:
    from slimrank.report.number_format import millions, percent

    left_out = sorted(coverage["left_out"].items(), key=lambda item: -item[1])
    counts = {"compressed": coverage["targets"]} | {f"not: {reason}": count for reason, count in left_out}
    rows = [(what, millions(count), percent(count / coverage["total"])) for what, count in counts.items()]
    title = f"covers {percent(coverage['of_matrices'])} of the decoder's weight matrices"
    print_table(title, ("", "parameters", "of the model"), rows)


def _show_cost(record: dict[str, Any]) -> None:
    stages = ", ".join(f"{name} {duration(s)}" for name, s in record["seconds"].items() if s >= 0.5)
    of_these = f" ({stages})" if stages else ""
    print_text(f"time: about {duration(sum(record['seconds'].values()))}{of_these}")
    print_text(f"memory: about {record['peak_memory'] / 1e9:.1f} GB")
    print_text(f"disk: about {record['run_bytes'] / 1e9:.1f} GB while it runs, besides the result")


def _ranks(ranks: list[Any]) -> str:
    numbers = sorted(r for r in ranks if r != "dense")
    parts = [f"{numbers[0]} .. {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])] if numbers else []
    return ", ".join(parts + (["dense"] if "dense" in ranks else []))
