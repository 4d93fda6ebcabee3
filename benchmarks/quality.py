"""Quality at a given size: methods of the papers, our presets, and what each part of them brings.

    python benchmarks/quality.py --text TRAIN.txt --test wikitext2=TEST.txt --test c4=OTHER.txt --out DIR --runs DIR

Every row is compressed to every --keep with the same calibration tokens (--samples windows of --seq-len; presets refine
on multiples of them) and measured on the first --windows windows of the test text (of other texts at the largest --keep
only). Below them stands the original in few bits (`--widths`): at every --keep the largest width that takes no more
bytes than that part of 16-bit linears. "passes" is the time over that of one forward and backward pass over all text
that the row reads, on the same threads, measured before and after it. Cells that stand in DIR/quality.json already are
not computed again; --runs keeps statistics and spectra, so only in a fresh folder is the time of a row the whole of it.
Writes quality.json, quality.md and, with matplotlib, quality.svg.
"""

import argparse
import json
import platform
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import slimrank
from slimrank.models.load import load
from slimrank.recipe import Recipe
from slimrank.text.sources import read_source
from slimrank.text.tokens import bos_of, tokenise
from slimrank.text.windows import count_windows, leading_windows

KFAC = {"method": "kfac_svd", "method_options": {"row_shrink": 0.3, "column_shrink": 0.1, "shrink_target": "identity"}}
PAPERS = {
    "SVD-LLM": {"method": "svd_llm"},
    "SVD-LLM, updated": {
        "method": "svd_llm", "refine": "update", "refine_options": {"anchor": 0, "residual": False, "held_out": 0},
    },
    "SVD-LLM V2": {"method": "svd_llm_v2", "allocation": "svd_llm_v2"},
    "AdaSVD": {"method": "svd_llm", "allocation": "ada_cr", "refine": "ada_comp", "refine_options": {
        "anchor": 0, "residual": False, "held_out": 0}},
    "Basis Sharing": {"method": "basis_sharing"},
    "Dobi-SVD, learned ranks": {"method": "dobi_svd", "allocation": "dobi"},
    "KFAC-SVD": KFAC,
    "KFAC-SVD + LEMS": {**KFAC, "allocation": "lems", "allocation_options": {"plans": 0}},
}  # fmt: skip
PRESETS = {name: Recipe.preset(name) for name in ("fast", "balanced", "best")}
_BEST = Recipe.preset("best")
for _part, _factor in {"three eighths": 3, "half": 4}.items():
    PRESETS[f"best, refined on {_part} of its text"] = {
        **_BEST, "refine_options": {**_BEST["refine_options"], "samples_factor": _factor},
    }  # fmt: skip
PIVOT = {**KFAC, "allocation": "spectrum", "form": "pivot"}
REGRESS = {"refine": "regress", "refine_options": {"anchor": 1.0, "ridge": 0.01, "ridge_unit": "identity"}}
MORE_TEXT = {
    "refine": "regress",
    "refine_options": {"anchor": 1.0, "ridge": 0.01, "ridge_unit": "identity", "samples_factor": 4},
}
ABLATION = {
    "spectrum, pairs": {**KFAC, "allocation": "spectrum"},
    "spectrum, pivot": PIVOT,
    "lems, pivot": {**PIVOT, "allocation": "lems", "allocation_options": {"plans": 0}},
    "spectrum, pivot, regress": {**PIVOT, **REGRESS},
    "spectrum, pivot, regress on 4 times the text": {**PIVOT, **MORE_TEXT},
    "spectrum, pivot, 4 corrections": {**PIVOT, "corrections": 4},
    "spectrum, pivot, 8 corrections": {**PIVOT, "corrections": 8},
    "spectrum, pivot, regress, 4 corrections": {**PIVOT, **REGRESS, "corrections": 4},
    "svd_llm, uniform, pivot": {"method": "svd_llm", "form": "pivot"},
    "svd_llm, ada_cr, pivot": {"method": "svd_llm", "allocation": "ada_cr", "form": "pivot"},
    "svd_llm, uniform, pivot, regress": {
        "method": "svd_llm", "form": "pivot", "refine": "regress", "refine_options": {"anchor": 0.5},
    },
}  # fmt: skip
INTRODUCTION = """# Quality of {model} at equal sizes

What `benchmarks/quality.py` has measured: perplexity on {main}, unless another text is named, and in brackets over that
of the original ({dense}). {samples} windows of {seq_len} tokens calibrate; {windows} of each text are
measured. Seconds are those of the slowest cell, less where statistics were there already; passes are the seconds over
those of one forward and backward pass over all text that the row reads, where that was measured.

![Perplexity by size](quality.svg)
"""
GREYS, COLOURS = ("Greys", 0.4, 1.0), ("plasma", 0.7, 0.0)  # colour map, from, to
SECTIONS = {"methods of the papers": PAPERS, "presets": PRESETS, "ablation": ABLATION}


def pass_seconds(model, windows):
    """Seconds of a forward and backward pass a window, the second of two windows."""
    for ids in windows[:2, None]:
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        seconds = time.perf_counter() - start
    return seconds


def measure(args, row, keep, tests, one_pass):
    before, start = one_pass(), time.perf_counter()
    recipe = {k: v for k, v in row.items() if k not in ("samples", "search_samples")}
    result = slimrank.compress(
        args.model, keep_ratio=keep, calibration=args.text, samples=args.samples, seq_len=args.seq_len,
        search_samples=args.search_samples, evaluation=None, run_dir=args.runs, keep_statistics=True, **recipe,
    )  # fmt: skip
    seconds, report = time.perf_counter() - start, result.report
    read = args.samples * row.get("refine_options", {}).get("samples_factor", 1)
    return {
        "seconds": seconds,
        "passes": seconds / ((before + one_pass()) / 2 * read),
        "stages": report["seconds"],
        "keep_ratio": report["size"]["keep_ratio"],
        "perplexity": {name: slimrank.perplexity(result.model, windows).perplexity for name, windows in tests.items()},
        "dense_layers": sum(target.rank == "dense" for target in result.plan.targets.values()),
        "corrections": report["corrections"],
        "undone_blocks": len({row["block"] for row in report["targets"] if row.get("refined", {}).get("undone")}),
    }


def measure_rounded(args, width, tests):
    """The original rounded to one width, in bfloat16: bits a weight with scales and zero points, and perplexities."""
    result = slimrank.compress(
        args.model, method="svd", keep_ratio=1.0, quantize=f"int{width}-g64", dtype="bfloat16", calibration=args.text,
        samples=args.samples, seq_len=args.seq_len, evaluation=None,
    )  # fmt: skip
    weights = sum(m * n for m, n in (target.shape for target in result.plan.targets.values()))
    return {
        "bits": 8 * result.report["size"]["linears_bytes"] / weights,
        "perplexity": {name: slimrank.perplexity(result.model, windows).perplexity for name, windows in tests.items()},
    }


def rounded_cells(results, keeps, tests):
    """One row: for every size the widest rounded original of no more bytes, on the main text and on the others."""
    main, others = tests[0], tests[1:]

    def cell(keep, test):
        fitting = [each for each in results["rounded"].values() if each["bits"] <= 16 * keep]
        best = max(fitting, key=lambda each: each["bits"], default=None)
        if best is None:
            return ""
        found = best["perplexity"][test]
        return f"{found:,.1f} ({found / results['dense'][test]:,.3f}; {best['bits']:.2f} bits)"

    return [*(cell(keep, main) for keep in keeps), *(cell(keeps[0], other) for other in others), "", ""]


def markdown(results):
    tests = list(results["dense"])
    main, others = tests[0], tests[1:]
    keeps = sorted({float(k) for row in results["rows"].values() for k in row}, reverse=True)
    dense = ", ".join(f"{name} {value:.2f}" for name, value in results["dense"].items())
    lines = [INTRODUCTION.format(main=main, dense=dense, **results["settings"])]
    for section, names in SECTIONS.items():
        if not any(results["rows"].get(n) for n in names):
            continue
        texts = [*(f"keep {k:g}" for k in keeps), *(f"{o} at {keeps[0]:g}" for o in others)]
        head = [section, *texts, "seconds", "passes"]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name in (n for n in names if results["rows"].get(n)):
            row = results["rows"][name]
            cells = [_cell(row, keep, main, results["dense"]) for keep in keeps]
            cells += [_cell(row, keeps[0], other, results["dense"]) for other in others]
            passes = [cell["passes"] for cell in row.values() if "passes" in cell]
            cells += [f"{max(c['seconds'] for c in row.values()):,.0f}", f"{max(passes):.1f}" if passes else ""]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if results.get("rounded"):
            cells = rounded_cells(results, keeps, tests)
            lines.append("| the original in few bits, of no more bytes | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cell(row, keep, test, dense):
    if str(keep) not in row or test not in row[str(keep)]["perplexity"]:
        return ""
    found = row[str(keep)]["perplexity"][test]
    return f"{found:,.1f} ({found / dense[test]:,.2f})"


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    main = next(iter(results["dense"]))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for section, style, colours in (("methods of the papers", "--", GREYS), ("presets", "-", COLOURS)):
        names = [name for name in SECTIONS[section] if results["rows"].get(name)]
        for name, colour in zip(names, plt.get_cmap(colours[0])(np.linspace(*colours[1:], len(names))), strict=True):
            cells = sorted((c["keep_ratio"], c["perplexity"][main]) for c in results["rows"][name].values())
            axes.plot(*zip(*cells, strict=True), style, marker="o", color=colour, label=name)
    axes.axhline(results["dense"][main], color="black", linewidth=1, label="original")
    axes.set(xlabel="stored parameters of the linears over the original's", ylabel=f"perplexity, {main}", yscale="log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks([t for t in (20, 30, 50, 100, 200, 300, 500, 1000) if axes.get_ylim()[0] < t < axes.get_ylim()[1]])
    axes.legend(fontsize="small")
    plt.rcParams["svg.hashsalt"] = "slimrank"  # the same figures give the same file
    figure.savefig(path, metadata={"Date": None})


def windows_of(path, tokenizer, args):
    tokens = tokenise(read_source(path, "evaluation"), tokenizer)
    bos = bos_of(tokenizer)
    return leading_windows(tokens, min(args.windows, count_windows(tokens, args.seq_len, bos)), args.seq_len, bos)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True, help="calibration text: a file or a folder")
    parser.add_argument("--test", action="append", required=True, help="NAME=FILE; the first is the main one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", required=True, help="run directory, of statistics and spectra")
    parser.add_argument("--rows", nargs="*", help="some of the rows; all by default")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.5])
    parser.add_argument("--widths", nargs="*", default=[8, 6, 5, 4, 3], help="bits of the original in few bits")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--search-samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stored = args.out / "quality.json"
    results = json.loads(stored.read_text()) if stored.is_file() else {"rows": {}}
    settings = {k: str(getattr(args, k)) for k in ("samples", "search_samples", "seq_len", "windows")}
    settings |= {"model": Path(args.model).name.removesuffix(".gguf")}
    if results.setdefault("settings", settings) != settings:
        sys.exit(f"{stored} was measured with other settings: {results['settings']}")
    model, tokenizer = load(args.model, "auto")
    tests = {name: windows_of(path, tokenizer, args) for name, path in (text.split("=", 1) for text in args.test)}
    if list(results.get("dense", {})) != list(tests):
        results["dense"] = {name: slimrank.perplexity(model, windows).perplexity for name, windows in tests.items()}
        stored.write_text(json.dumps(results, indent=1) + "\n")
    one_pass = partial(pass_seconds, model, windows_of(args.text, tokenizer, args))
    results |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    rounded = results.setdefault("rounded", {})
    for width in map(str, args.widths):
        if width not in rounded:
            rounded[width] = measure_rounded(args, width, tests)
            stored.write_text(json.dumps(results, indent=1) + "\n")
    only = {name: tests[name] for name in list(tests)[:1]}
    every = {name: row for rows in SECTIONS.values() for name, row in rows.items()}
    for name in args.rows or every:
        row = results["rows"].setdefault(name, {})
        for keep in args.keep:
            if str(keep) not in row:
                row[str(keep)] = measure(args, every[name], keep, tests if keep == max(args.keep) else only, one_pass)
                stored.write_text(json.dumps(results, indent=1) + "\n")
                print(name, keep, row[str(keep)]["perplexity"], flush=True, file=sys.stderr)
    (args.out / "quality.md").write_text(markdown(results))
    try:
        plot(results, args.out / "quality.svg")
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    print(markdown(results))


if __name__ == "__main__":
    main()
