"""Results in the JSON of LowRankArena (schema 1.1): a file for perplexity, and one for the tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from slimrank._version import __version__
from slimrank.errors import OutputError
from slimrank.evaluate.suite_means import metric_of

SCHEMA_VERSION = "1.1"


def write_arena(record: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Write ppl__NAME.json and mcq__NAME.json.

    Args:
        record: of `evaluate` with the suite `arena`.
        folder: made if it does not exist.
        name: of the model, for names of files and the field `checkpoint`.

    Raises:
        OutputError: the folder cannot be written.
    """
    paths = []
    for suite, payload in (("ppl", _perplexities(record)), ("mcq", _choices(record))):
        path = folder / f"{suite}__{name}.json"
        content = {**_frame(record, suite, name), **payload}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"'{path}' cannot be written: {error}", "choose another --arena-dir") from error
        paths.append(path)
    return paths


def _frame(record: Mapping[str, Any], suite: str, name: str) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "eval",
        "status": "completed",
        "generated_at": datetime.now(timezone.utc).isoformat(),
        "run": {"label": "ad_hoc", "is_smoke": False, "is_leaderboard": False, "strict_validation": False},
        "checkpoint": {
            "name": name, "locator": record["model"], "model_family": None, "variant": None, "method": None,
            "source": "local" if Path(record["model"]).exists() else "huggingface",
            "repo_id": None if Path(record["model"]).exists() else record["model"], "revision": None, "subpath": None,
            "benchmarks": [], "enabled": True, "notes": None,
        },
        "suite": {"id": suite, "path": suite, "name": suite},
        "artifacts": {},
        "runtime": {"slimrank": __version__, "device": record["device"], "dtype": record["dtype"]},
        "validation": {},
    }  # fmt: skip


def _perplexities(record: Mapping[str, Any]) -> dict[str, Any]:
    texts = {"c4_stream" if text == "c4" else text: found for text, found in record["texts"].items()}
    figures = {text: found["perplexity"] for text, found in texts.items()}
    summary = {
        "primary_metric": "ppl", "mean": sum(figures.values()) / len(figures), "task_count": len(figures),
        "scored_task_count": len(figures), "aggregation": "macro_mean", "tracked_metrics": ["ppl"],
        "by_metric": {"ppl": figures},
    }  # fmt: skip
    tasks = [
        {
            "name": text, "ppl": found["perplexity"],
            "negative_log_likelihood_sum": math.fsum(found["nll"]) * (found["seq_len"] - 1),
            "token_count": found["tokens"], "block_count": found["windows"], "max_length": found["seq_len"],
            "tokens_sha256": found["tokens_sha256"],
        }
        for text, found in texts.items()
    ]  # fmt: skip
    return {
        "backend": {"name": "contiguous_ppl", "version": "1.0"},
        "config": {
            "datasets": list(texts), "metric": "ppl", "metric_aggregation": "macro_mean",
            "max_length": tasks[0]["max_length"],
            "tokenization": {"apply_chat_template": False, "add_special_tokens": False},
        },
        "metrics": summary,
        "details": {"summary": summary, "tasks": tasks},
    }  # fmt: skip


def _choices(record: Mapping[str, Any]) -> dict[str, Any]:
    tasks = {task: _choice(result) for task, result in record["tasks"].items()}
    values = [found["value"] for found in tasks.values()]
    summary = {
        "primary_metric": "acc_norm", "resolved_metrics": sorted({found["metric"] for found in tasks.values()}),
        "mean": sum(values) / len(values), "task_count": len(tasks), "scored_task_count": len(tasks),
    }  # fmt: skip
    settings = record["task_settings"]
    return {
        "backend": {"name": "lm_eval_harness", "version": settings["lm_eval"]},
        "config": {
            "metric": "acc_norm", "metric_fallbacks": ["acc_norm", "acc"], "num_fewshot": 0, "tasks": list(tasks),
            "batch_size": settings["batch_size"], "limit": settings["limit"],
        },
        "metrics": summary,
        "details": {"summary": summary, "tasks": tasks},
    }  # fmt: skip


def _choice(result: Mapping[str, Any]) -> dict[str, Any]:
    metric = metric_of(result, "acc_norm")
    found = result["metrics"][metric]
    return {
        "metric": metric, "metric_key": f"{metric},none", "filter": "none", "value": found["value"],
        "stderr": found["stderr"], "available_metrics": list(result["metrics"]), "questions": result["count"],
        "of": result["available"],
    }  # fmt: skip
