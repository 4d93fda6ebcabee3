"""Perplexity of every allocation under svd_llm and kfac_svd, on one set of tokens.

    python benchmarks/allocation_perplexity.py --text TRAIN.txt --test TEST.txt --out results.json --runs DIR

Calibration 64 x 512 tokens, evaluation the first 40 windows of 512; plans are measured on --search-samples windows of
the calibration text. Cells that stand in --out already are not computed again; --runs keeps calibrations and
measurements. Writes JSON, and prints the table as Markdown, with the seconds that each allocation took.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

import slimrank
from slimrank.methods.allocator import ALLOCATORS
from slimrank.models.load import load
from slimrank.text.sources import read_source
from slimrank.text.tokens import bos_of, tokenise
from slimrank.text.windows import leading_windows

VARIANTS = {
    "spectrum relative": ("spectrum", {"scale": "relative"}),
    "spectrum metric": ("spectrum", {"scale": "metric"}),
    "shared metric": ("shared", {"scale": "metric"}),
    "lems 0.5": ("lems", {"anchors": [0.5]}),
    "lems 0.1, 0.4, 0.8": ("lems", {"anchors": [0.1, 0.4, 0.8]}),
    "lems search": ("lems", {"search": True}),
    "svd_llm_v2 literal": ("svd_llm_v2", {"variant": "literal"}),
}


def rows_of(names):
    every = {id: (id, {}) for id in ALLOCATORS.all() if id != "from_plan"} | VARIANTS
    return {name: every[name] for name in (names or every)}


def measure(args, method, keep, multiple, allocation, options, test):
    needs = ALLOCATORS.get(allocation).options.model_fields
    quiet = {"plans": args.plans} if "plans" in needs else {}
    start = time.perf_counter()
    result = slimrank.compress(
        args.model, keep_ratio=keep, allocation=allocation, allocation_options={**options, **quiet}, method=method,
        calibration=args.text, samples=args.samples, seq_len=args.seq_len, search_samples=args.search_samples,
        rank_multiple=multiple, evaluation=None, run_dir=Path(args.runs) / method,
    )  # fmt: skip
    about = result.report["allocation"]
    return {
        "perplexity": slimrank.perplexity(result.model, test).perplexity,
        "keep_ratio": result.report["size"]["keep_ratio"],
        "allocate_seconds": result.report["seconds"].get("allocate", 0.0),
        "seconds": time.perf_counter() - start,
        "gap": about.get("gap"),
        "spearman": about.get("additivity", {}).get("spearman"),
    }


def markdown(results):
    columns = sorted({key for row in results["rows"].values() for key in row}, reverse=True)
    lines = ["| allocation | " + " | ".join(columns) + " | seconds |", "|---" * (len(columns) + 2) + "|"]
    for name, row in results["rows"].items():
        cells = [f"{row[c]['perplexity']:,.1f}" if c in row else "" for c in columns]
        slowest = max(cell["allocate_seconds"] for cell in row.values()) if row else 0
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {slowest:,.1f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", required=True, help="folder for run directories")
    parser.add_argument("--rows", nargs="*", help="some of the rows; all by default")
    parser.add_argument("--methods", nargs="+", default=["svd_llm", "kfac_svd"])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--search-samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--plans", type=int, default=0, help="random plans of the additivity diagnostic")
    args = parser.parse_args()
    model, tokenizer = load(args.model, "auto")
    tokens = tokenise(read_source(args.test, "evaluation"), tokenizer)
    test = leading_windows(tokens, args.windows, args.seq_len, bos_of(tokenizer))
    results = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": {}}
    names = ("model", "text", "test", "samples", "search_samples", "seq_len", "windows")
    settings = {k: str(getattr(args, k)) for k in names}
    if results.setdefault("settings", settings) != settings:
        sys.exit(f"{args.out} was measured with other settings: {results['settings']}")
    if "dense" not in results:
        results["dense"] = slimrank.perplexity(model, test).perplexity
    del model
    results |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    for name, (allocation, options) in rows_of(args.rows).items():
        row = results["rows"].setdefault(name, {})
        for method in args.methods:
            for keep in args.keep:
                for multiple in args.multiples:
                    key = f"{method} {keep:g} x{multiple}"
                    if key not in row:
                        row[key] = measure(args, method, keep, multiple, allocation, options, test)
                        args.out.write_text(json.dumps(results, indent=1) + "\n")
                        print(name, key, round(row[key]["perplexity"], 2), flush=True, file=sys.stderr)
    print(markdown(results))


if __name__ == "__main__":
    main()
