"""What training brings after compression, and what it takes: perplexity on several texts, before and after.

    python benchmarks/recovery.py --calibration TRAIN.txt --train wikitext=TRAIN.txt \\
        --train mixed=a.txt:0.7,b.jsonl:0.3 --test wikitext2=TEST.txt --test c4=OTHER.txt --out DIR --runs DIR

Every start (--starts) is compressed to every --keep with --samples windows of --seq-len, and trained by --method on
each --train text, one pass or --tokens. Perplexity is that of the first --windows windows of each test text. Beside
each size stands the original in few bits: the widest of --widths that takes no more bytes than that part of 16-bit
linears, unless --widths is empty. Cells that stand in DIR/recovery.json already are not computed again; --runs keeps
compressed models, states of training and trained models, so an interrupted run goes on.
Writes recovery.json and recovery.md.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from quality import measure_rounded, windows_of

import slimrank
from slimrank.models.load import load
from slimrank.recipe import Recipe

STARTS = {
    "svd_llm": {"method": "svd_llm"},
    "spectrum": {"method": "kfac_svd", "allocation": "spectrum", "form": "pivot"},
    "fast": Recipe.preset("fast"),
    "balanced": Recipe.preset("balanced"),
    "best": Recipe.preset("best"),
}
INTRODUCTION = """# Training after compression: {model}

What `benchmarks/recovery.py` has measured: perplexity of the first {windows} windows of {seq_len} tokens, over that of
the original ({dense}), before and after training. {samples} windows calibrate.
{threads} threads, torch {torch}, {machine}.
"""


def compressed(args, start, keep):
    """The folder of a compressed model."""
    folder = args.runs / f"{start}-{keep:g}"
    if not folder.is_dir():
        options = {"samples": args.samples, "seq_len": args.seq_len, "compute_dtype": args.compute_dtype}
        slimrank.compress(
            args.model, out=folder, keep_ratio=keep, calibration=args.calibration, evaluation=None,
            run_dir=args.runs / "statistics", keep_statistics=True, **(options | STARTS[start]),
        )  # fmt: skip
    return folder


def measure(folder, tests):
    """Perplexities of a model by test text."""
    model, _ = load(folder, "auto")
    return {name: slimrank.perplexity(model, windows).perplexity for name, windows in tests.items()}


def trained(args, folder, name, text):
    """Train the model of a folder; return the folder of the result and what was done."""
    out, options = args.runs / name, {"compute_dtype": args.training_dtype}
    if args.tokens:
        options["tokens"] = args.tokens
    options |= dict(option.split("=", 1) for option in args.option)
    if not out.is_dir():
        slimrank.recover(
            folder, args.model, out=out, text=text, method=args.method, options=options, evaluation=(),
            seq_len=args.seq_len, chat=args.chat,
        )  # fmt: skip
    return out, json.loads((out / "recovery.json").read_text())["phases"]


def markdown(results):
    tests = list(results["dense"])
    dense = ", ".join(f"{name} {value:.2f}" for name, value in results["dense"].items())
    lines = [INTRODUCTION.format(dense=dense, **results["settings"], **results["machine"])]
    head = ["compressed by", "keep", "trained by", "on", "tokens", "minutes", "tokens/s", "held-out loss"]
    head += [f"{test}: before, after" for test in tests]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cell in results["cells"].values():
        tokens, seconds = (sum(phase[key] for phase in cell["phases"]) for key in ("tokens", "seconds"))
        method = ", ".join([cell["method"], *cell["options"]])
        row = [cell["start"], f"{cell['keep']:g}", method, cell["text"], f"{tokens:,}", f"{seconds / 60:.0f}"]
        row += [f"{tokens / seconds:.0f}", f"{cell['phases'][0]['before']:.3f}, {cell['phases'][-1]['after']:.3f}"]
        for test in tests:
            both = (cell[side][test] / results["dense"][test] for side in ("before", "after"))
            row.append(", ".join(f"{ratio:.3f}" for ratio in both))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, *_few_bits(results), *_curves(results)]) + "\n"


def _few_bits(results):
    """For each size, the widest rounded original of no more bytes."""
    lines, rounded = [], sorted(results.get("rounded", {}).items(), key=lambda each: -each[1]["bits"])
    for keep in sorted({cell["keep"] for cell in results["cells"].values()}, reverse=True):
        width, found = next(((w, f) for w, f in rounded if f["bits"] <= 16 * keep), (None, None))
        if found:
            ratios = ", ".join(f"{test} {found['perplexity'][test] / d:.3f}" for test, d in results["dense"].items())
            lines.append(f"- The original in {width} bits takes no more bytes than keep {keep:g} in 16: {ratios}.")
    return ["", *lines] if lines else []


def _curves(results):
    """Held-out loss by tokens."""
    lines = ["", "Held-out loss (nats a token) by thousand tokens:", ""]
    for name, cell in results["cells"].items():
        for phase in cell["phases"]:
            each = phase["tokens"] / max(step for step, *_ in phase["curve"])
            points = [f"{step * each / 1000:.0f}: {held:.3f}" for step, _, held in phase["curve"] if held is not None]
            lines.append(f"- {name}, {phase['name']}: 0: {phase['before']:.3f}, {', '.join(points)}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True, help="text that compression reads")
    parser.add_argument("--train", action="append", required=True, help="NAME=TEXT to train on")
    parser.add_argument("--test", action="append", required=True, help="NAME=FILE to measure on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder of models and states")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=["spectrum", "balanced"])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.5])
    parser.add_argument("--method", default="distill")
    parser.add_argument("--option", action="append", default=[], help="NAME=VALUE of the method")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--widths", nargs="*", default=[8, 6, 5, 4, 3], help="bits of the original in few bits")
    parser.add_argument("--compute-dtype", default="auto", help="of compression")
    parser.add_argument("--training-dtype", default="auto")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.text = args.calibration  # as measure_rounded wants it
    stored = args.out / "recovery.json"
    results = json.loads(stored.read_text()) if stored.is_file() else {"cells": {}}
    settings = {k: str(getattr(args, k)) for k in ("samples", "seq_len", "windows")}
    results["settings"] = settings | {"model": Path(args.model).name.removesuffix(".gguf")}
    threads = torch.get_num_threads()
    results["machine"] = {"threads": threads, "torch": torch.__version__, "machine": platform.machine()}

    def keep_results():
        stored.write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "recovery.md").write_text(markdown(results))

    model, tokenizer = load(args.model, "auto")
    tests = {name: windows_of(path, tokenizer, args) for name, path in (text.split("=", 1) for text in args.test)}
    if list(results.get("dense", {})) != list(tests):
        results["dense"] = {name: slimrank.perplexity(model, windows).perplexity for name, windows in tests.items()}
    del model
    for width in map(str, args.widths):
        if width not in results.setdefault("rounded", {}):
            results["rounded"][width] = measure_rounded(args, width, tests)
            keep_results()
    for start in args.starts:
        for keep in args.keep:
            for text, source in (each.split("=", 1) for each in args.train):
                options = "".join(f", {option}" for option in args.option)
                name = f"{start} {keep:g}, {args.method} on {text}{options}"
                if name in results["cells"]:
                    continue
                folder = compressed(args, start, keep)
                before, began = measure(folder, tests), time.perf_counter()
                out, phases = trained(args, folder, name.replace(" ", "-").replace(",", ""), source)
                results["cells"][name] = {
                    "start": start, "keep": keep, "method": args.method, "options": args.option, "text": text,
                    "phases": phases,
                    "seconds": time.perf_counter() - began, "before": before, "after": measure(out, tests),
                }  # fmt: skip
                keep_results()
                print(markdown(results), flush=True)


if __name__ == "__main__":
    main()
