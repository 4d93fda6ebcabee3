"""How far the calibration text matters: which text, how many windows of it, and which windows by chance.

    python benchmarks/calibration_study.py --text wikitext2=TRAIN.txt --text c4=WEB.jsonl --test wikitext2=TEST.txt \\
        --test c4=OTHER.jsonl --out DIR

Every method compresses the model to --keep once for each draw of the windows (--seeds): with each of --sizes windows of
the first text, and with --samples windows of every text (SVD-LLM's figure 5 and table 6). A text may be a mixture
(`both=a.txt:0.5,b.jsonl:0.5`). Perplexity is that of the first --windows windows of each test, over the original's.
Cells that stand in DIR/calibration.json already are not computed again.
Writes calibration.json, calibration.md and, with matplotlib, calibration.svg.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from quality import windows_of

import slimrank
from slimrank.models.load import load

METHODS = {
    "SVD-LLM": {"method": "svd_llm"},
    "KFAC-SVD": {"method": "kfac_svd"},
    "spectrum": {"method": "kfac_svd", "allocation": "spectrum", "form": "pivot"},
}
INTRODUCTION = """# What the calibration text is worth: {model}

What `benchmarks/calibration_study.py` has measured: perplexity of the first {windows} windows of {seq_len} tokens, over
that of the original ({dense}), at keep {keep}. Each figure is the mean of the draws of the windows; in
brackets stand the lowest and the highest of them. {threads} threads, torch {torch}, {machine}.

![Perplexity by calibration windows](calibration.svg)
"""


def measured(args, method, text, samples, seed, tests):
    """Compress once; return the perplexities and the seconds."""
    start = time.perf_counter()
    result = slimrank.compress(
        args.model, keep_ratio=args.keep, calibration=text, samples=samples, seed=seed, seq_len=args.seq_len,
        dtype=args.dtype, evaluation=None, **METHODS[method],
    )  # fmt: skip
    found = {name: slimrank.perplexity(result.model, windows).perplexity for name, windows in tests.items()}
    return {
        "seconds": time.perf_counter() - start,
        "keep_ratio": result.report["size"]["keep_ratio"],
        "perplexity": found,
    }


def wanted(args, texts):
    """List the cells, those of few windows first: method, text, windows, seed."""
    first = next(iter(texts))
    pairs = sorted({*((size, first) for size in args.sizes), *((args.samples, name) for name in texts)})
    return [(m, text, size, seed) for size, text in pairs for m in args.methods for seed in range(args.seeds)]


def ratios(results, method, text, samples, test):
    """Return the ratios of all draws that are measured."""
    cells = results["cells"]
    names = (name_of((method, text, samples, seed)) for seed in range(int(results["settings"]["seeds"])))
    return [cells[name]["perplexity"][test] / results["dense"][test] for name in names if name in cells]


def name_of(cell):
    method, text, samples, seed = cell
    return f"{method}, {text}, {samples}, seed {seed}"


def _figure(found):
    if not found:
        return ""
    return f"{mean(found):.3f}" + (f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else "")


def _table(head, rows):
    return [
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def markdown(results):
    """Write the page: a table by size, and one by text."""
    settings, tests = results["settings"], list(results["dense"])
    dense = ", ".join(f"{name} {value:.2f}" for name, value in results["dense"].items())
    lines = [INTRODUCTION.format(dense=dense, **{**settings, **results["machine"]})]
    first, head = settings["texts"][0], [f"measured on {test}" for test in tests]
    by_size = [
        [method, str(size), *(_figure(ratios(results, method, first, size, test)) for test in tests)]
        for method in settings["methods"]
        for size in settings["sizes"]
    ]
    by_text = [
        [method, text, *(_figure(ratios(results, method, text, settings["samples"], test)) for test in tests)]
        for method in settings["methods"]
        for text in settings["texts"]
    ]
    lines += [f"## Windows of {first}\n", *_table(["method", "windows", *head], by_size)]
    lines += [f"## Text, {settings['samples']} windows\n", *_table(["method", "calibrated on", *head], by_text)]
    return "\n".join(lines).rstrip() + "\n"


def plot(results, path):
    """Draw the ratios by size, a line a method and a bar from the lowest to the highest draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings, test = results["settings"], next(iter(results["dense"]))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method in settings["methods"]:
        draws = {size: ratios(results, method, settings["texts"][0], size, test) for size in settings["sizes"]}
        draws = {size: found for size, found in draws.items() if found}
        middle = [mean(found) for found in draws.values()]
        below = [m - min(found) for m, found in zip(middle, draws.values(), strict=True)]
        above = [max(found) - m for m, found in zip(middle, draws.values(), strict=True)]
        axes.errorbar(list(draws), middle, yerr=[below, above], marker="o", capsize=3, label=method)
    axes.set(
        xscale="log", xlabel=f"calibration windows of {settings['seq_len']} tokens", ylabel=f"perplexity ratio, {test}"
    )
    axes.set_xticks(settings["sizes"], [str(size) for size in settings["sizes"]])
    axes.legend(fontsize="small")
    plt.rcParams["svg.hashsalt"] = "slimrank"  # the same figures give the same file
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", action="append", required=True, help="NAME=TEXT to calibrate on; the first is sized")
    parser.add_argument("--test", action="append", required=True, help="NAME=FILE to measure on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["SVD-LLM", "spectrum"])
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 64, 256], help="windows of the first text")
    parser.add_argument("--samples", type=int, default=64, help="windows of every text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stored = args.out / "calibration.json"
    results = json.loads(stored.read_text()) if stored.is_file() else {"cells": {}}
    texts = dict(each.split("=", 1) for each in args.text)
    settings = {k: getattr(args, k) for k in ("keep", "sizes", "samples", "seeds", "seq_len", "windows", "methods")}
    settings |= {"model": Path(args.model).name.removesuffix(".gguf"), "texts": list(texts)}
    fixed = ("keep", "seq_len", "windows", "model")
    if any(results.get("settings", settings)[key] != settings[key] for key in fixed):
        sys.exit(f"{stored} was measured with other settings: {results['settings']}")
    results["settings"] = settings
    results["machine"] = {
        "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip
    model, tokenizer = load(args.model, args.dtype)
    tests = {name: windows_of(path, tokenizer, args) for name, path in (each.split("=", 1) for each in args.test)}
    if list(results.get("dense", {})) != list(tests):
        results["dense"] = {name: slimrank.perplexity(model, windows).perplexity for name, windows in tests.items()}
    del model
    left = [cell for cell in wanted(args, texts) if name_of(cell) not in results["cells"]]
    for count, cell in enumerate(left):
        method, text, samples, seed = cell
        found = results["cells"][name_of(cell)] = measured(args, method, texts[text], samples, seed, tests)
        stored.write_text(json.dumps(results, indent=1) + "\n")
        print(
            f"{name_of(cell)}: {found['perplexity']}; {len(left) - count - 1} cells left", file=sys.stderr, flush=True
        )
    stored.write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "calibration.md").write_text(markdown(results))
    try:
        plot(results, args.out / "calibration.svg")
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    main()
