"""slimrank evaluate."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import ConsoleProgress, one_line, print_json, print_table, print_text, say_quietly
from slimrank.processes import is_leader, together
from slimrank.progress import Progress
from slimrank.report.number_format import verdict

_SUITES = "Suites"


def evaluate(
    model: o.Model,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to measure perplexity on (as for compress --calibration); repeatable.  "
            "\\[default: demo; none with --tasks]"
        ),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="First windows of each text.  \\[default: all]", min=1)] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens per window; seq-len - 1 of them are predicted.  \\[default: 512]", min=2),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Read rows of chats as such, by the tokenizer's chat template.")
    ] = False,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Texts and tasks of others under their conventions, from --data-dir: paper, svd_llm or arena.",
            rich_help_panel=_SUITES,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of texts and questions: see the docs.", rich_help_panel=_SUITES)
    ] = None,
    arena_dir: Annotated[
        Path | None,
        typer.Option(help="Also write the JSON files of LowRankArena here (--suite arena).", rich_help_panel=_SUITES),
    ] = None,
    tasks: o.Tasks = None,
    tasks_dir: o.TasksDir = None,
    shots: o.Shots = None,
    limit: o.Limit = None,
    against: Annotated[
        str | None,
        typer.Option(help="Compare with this model on the same windows and questions: usually the original."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    json: o.Json = False,
) -> None:
    """Measure a model, compressed or not: perplexity, tasks, tokens per second, memory, a sample of its text.

    Examples: slimrank evaluate smaller --text wiki.txt --windows 40

    slimrank evaluate smaller --against org/original --tasks arc_easy,piqa

    slimrank evaluate smaller --against org/original --suite paper --data-dir data
    """
    from slimrank.errors import RecipeError
    from slimrank.evaluate.api import evaluate as library_evaluate
    from slimrank.recipe import Recipe

    Recipe.make({"dtype": dtype, "device": device})
    chosen = requested_suite(suite, data_dir, {"limit": limit, "windows": windows, "seq_len": seq_len})
    if arena_dir is not None and suite != "arena":
        raise RecipeError("--arena-dir is about the suite 'arena'.", "--suite arena --data-dir FOLDER")
    if chosen is not None:
        limit = windows = seq_len = None
    request = requested_tasks(tasks, tasks_dir, shots, limit)
    say_quietly()
    with together(), ConsoleProgress() if is_leader() else nullcontext(Progress()) as progress:
        record = library_evaluate(
            model, text or None, windows, seq_len,
            device=device, dtype=dtype, progress=progress, tasks=request, against=against, chat=chat, suite=chosen,
        )  # fmt: skip
    if not is_leader():
        return
    if arena_dir is not None:
        from slimrank.evaluate.arena import write_arena

        write_arena(record, arena_dir, Path(model).name)
    if json:
        print_json(record)
    else:
        _show(record)


def requested_suite(name: str | None, data: Path | None, size: dict[str, Any]) -> Any:
    """Return the suite that is asked for, if any.

    Raises:
        RecipeError: no such suite, or a suite without its data, or the other way round.
        DataError: there is no such folder.
    """
    from slimrank.errors import RecipeError
    from slimrank.evaluate.published import SuiteRequest

    if (name is None) != (data is None):
        raise RecipeError("--suite and --data-dir belong together.", "--suite paper --data-dir FOLDER")
    return None if name is None or data is None else SuiteRequest(name, data, **size)


def requested_tasks(tasks: str | None, tasks_dir: Path | None, shots: int | None, limit: int | None) -> Any:
    """Return what is asked of lm-evaluation-harness, if anything.

    Raises:
        RecipeError: an option about tasks, and no task.
    """
    from slimrank.errors import RecipeError
    from slimrank.evaluate.tasks import TaskRequest

    if tasks is not None:
        return TaskRequest(tuple(name.strip() for name in tasks.split(",")), tasks_dir, shots, limit)
    for option, value in {"--tasks-dir": tasks_dir, "--shots": shots, "--limit": limit}.items():
        if value is not None:
            raise RecipeError(f"{option} is about tasks, and none is named.", "--tasks arc_easy,piqa")
    return None


def _show(record: dict[str, Any]) -> None:
    _show_texts(record)
    _show_tasks(record)
    if "suite" in record:
        _show_means(record["suite"])
    if record["against"] is not None:
        _show_differences(record["against"])
    _show_metrics(record)
    speed = record["speed"]
    print_text(
        f"speed: prefill {speed['prefill']:.0f} tokens/s, decode {speed['decode']:.1f} tokens/s "
        f"({record['device']}, {record['dtype']})"
    )
    print_text(f"peak memory of this process: {record['peak_memory'] / 1e9:.2f} GB")
    print_text(f"{one_line(record['sample']['prompt'])} ... {one_line(record['sample']['text'])}")


def _show_texts(record: dict[str, Any]) -> None:
    rows = [
        (name, f"{m['perplexity']:.3f}", str(m["windows"]), str(m["seq_len"]), f"{m['tokens']:,}")
        for name, m in record["texts"].items()
    ]
    if rows:
        print_table("", ("text", "perplexity", "windows", "seq-len", "predictions"), rows)


def _show_tasks(record: dict[str, Any]) -> None:
    rows = [
        (task, name, f"{m['value']:.4f}", _number(m["stderr"], ".4f"), f"{r['count']:,}", _number(r["shots"]))
        for task, r in record["tasks"].items()
        for name, m in r["metrics"].items()
    ]
    if rows:
        print_table("", ("task", "metric", "value", "std. error", "questions", "shots"), rows)


def _show_means(suite: dict[str, Any]) -> None:
    against = suite["against"] or {}
    columns = (f"mean of {len(suite['averaged'])} tasks", "value", "its value", "difference (95 %)", "significant")
    rows = [
        (
            metric,
            f"{value:.4f}",
            *(
                (
                    f"{d['value']:.4f}",
                    f"{d['difference']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})",
                    verdict(d["significant"]),
                )
                if (d := against.get(metric))
                else ("", "", "")
            ),
        )
        for metric, value in suite["means"].items()
    ]
    shown = len(columns) if suite["against"] is not None else 2
    print_table("", columns[:shown], [row[:shown] for row in rows])


def _show_differences(against: dict[str, Any]) -> None:
    texts = [
        (
            name,
            f"{m['perplexity']:.3f}",
            f"{m['ratio']:.3f} ({m['ratio_low']:.3f} to {m['ratio_high']:.3f})",
            verdict(m["significant"]),
            f"{m['kl']:.4f}",
            f"{m['top1']:.1f} %",
        )
        for name, m in against["texts"].items()
    ]
    columns = ("text", "its perplexity", "ratio (95 %)", "significant", "KL, nats/token", "same top token")
    if texts:
        print_table(f"against {against['model']}", columns, texts)
    tasks = [
        (
            task,
            name,
            f"{m['value']:.4f}",
            f"{m['difference']:+.4f} ({m['low']:+.4f} to {m['high']:+.4f})",
            verdict(m["significant"]),
            _number(m.get("lost")),
            _number(m.get("gained")),
        )
        for task, metrics in against["tasks"].items()
        for name, m in metrics.items()
    ]
    if tasks:
        shown = ("task", "metric", "its value", "difference (95 %)", "significant", "lost", "gained")
        print_table(f"against {against['model']}", shown, tasks)
    for task, metrics in against["too_few"].items():
        print_text(f"{task} ({', '.join(metrics)}) is not compared: it has fewer than two questions")


def _show_metrics(record: dict[str, Any]) -> None:
    """Show metrics from outside slimrank."""
    against = record["against"] or {"texts": {}}
    rows = [
        row
        for text, found in record["texts"].items()
        for row in _metric_rows(text, found, against["texts"].get(text, {}))
    ]
    rows += _metric_rows("", record, against)
    if rows:
        columns = ("text", "metric", "value", "better", "its value", "difference")
        shown = len(columns) if record["against"] is not None else 4
        print_table("", columns[:shown], [row[:shown] for row in rows])


def _metric_rows(text: str, record: dict[str, Any], against: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each field that describes itself, as those of metrics from outside slimrank do."""
    return [
        (
            text,
            found["title"],
            f"{found['value']:,.4g} {found['unit']}".strip(),
            found["better"],
            _number(against.get(name, {}).get("value"), ",.4g"),
            _number(against.get(name, {}).get("difference"), "+,.4g"),
        )
        for name, found in record.items()
        if isinstance(found, dict) and {"value", "title", "unit", "better"} <= found.keys()
    ]


def _number(value: float | None, form: str = ",") -> str:
    return "" if value is None else format(value, form)
