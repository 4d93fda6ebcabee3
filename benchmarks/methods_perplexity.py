"""Perplexity of every method, and of every refinement after svd_llm, on one set of tokens, under uniform ranks.

    python benchmarks/methods_perplexity.py --text TRAIN.txt --test TEST.txt --out results.json

Each row is a method at each keep_ratio; cells that stand in --out already are not computed again. With --runs the
calibration of each method is kept there, too. Writes JSON, and prints the table as Markdown.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

import slimrank
from slimrank.methods.decomposer import DECOMPOSERS
from slimrank.models.load import load
from slimrank.text.sources import read_source
from slimrank.text.tokens import bos_of, tokenise
from slimrank.text.windows import leading_windows

REFINED = {
    f"svd_llm + {name}": {"method": "svd_llm", "refine": refiner, "refine_options": options}
    for name, refiner, options in [
        ("update self", "update", {"anchor": 0}),
        ("update mixture 0.5", "update", {"anchor": 0.5}),
        ("update anchored", "update", {"anchor": 1}),
        ("update anchored at once", "update", {"anchor": 1, "true_sequential": False}),
        ("regress self", "regress", {"anchor": 0}),
        ("regress mixture 0.5", "regress", {"anchor": 0.5}),
        ("regress anchored", "regress", {"anchor": 1}),
        ("ada_comp 1", "ada_comp", {"iterations": 1, "anchor": 0.5}),
        ("ada_comp 3", "ada_comp", {"iterations": 3, "anchor": 0.5}),
        ("ada_comp 15", "ada_comp", {"iterations": 15, "anchor": 0.5}),
    ]
}
LEMS = {"row_shrink": 0.3, "column_shrink": 0.1, "shrink_target": "identity"}
VARIANTS = {
    "asvd max": {"method": "asvd", "method_options": {"scale": "max"}},
    "coala mu=0.1": {"method": "coala", "method_options": {"mu": 0.1}},
    "basis_sharing within block": {"method": "basis_sharing", "method_options": {"layers": 1, "within": True}},
    "kfac_svd, LEMS' shrinkage": {"method": "kfac_svd", "method_options": LEMS},
    "kfac_svd unshrunk": {"method": "kfac_svd", "method_options": {"row_shrink": 0.01, "column_shrink": 0.001}},
}


def rows_of(names):
    methods = {id: {"method": id} for id in DECOMPOSERS.all()}
    known = {**methods, **VARIANTS, **REFINED}
    return {name: known[name] for name in (names or known)}


def measure(recipe, keep, args, test, run_dir):
    start = time.perf_counter()
    result = slimrank.compress(
        args.model, keep_ratio=keep, allocation="uniform", calibration=args.text, samples=args.samples,
        seq_len=args.seq_len, evaluation=None, run_dir=run_dir, **recipe,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    report = result.report
    return {
        "perplexity": slimrank.perplexity(result.model, test).perplexity,
        "keep_ratio": report["size"]["keep_ratio"],
        "seconds": seconds,
        "stages": report["seconds"],
        "notes": len(report["notes"]),
    }


def markdown(results):
    keeps = sorted({float(k) for row in results["rows"].values() for k in row}, reverse=True)
    lines = ["| method | " + " | ".join(f"{k:g}" for k in keeps) + " |", "|---" * (len(keeps) + 1) + "|"]
    for name, row in results["rows"].items():
        cells = [f"{row[str(k)]['perplexity']:,.1f}" if str(k) in row else "" for k in keeps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", help="folder for run directories; a temporary one by default")
    parser.add_argument("--rows", nargs="*", help="some of the rows; all by default")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    model, tokenizer = load(args.model, "auto")
    tokens = tokenise(read_source(args.test, "evaluation"), tokenizer)
    test = leading_windows(tokens, args.windows, args.seq_len, bos_of(tokenizer))
    results = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": {}}
    settings = {k: str(getattr(args, k)) for k in ("model", "text", "test", "samples", "seq_len", "windows")}
    if results.setdefault("settings", settings) != settings:
        sys.exit(f"{args.out} was measured with other settings: {results['settings']}")
    if "dense" not in results:
        results["dense"] = slimrank.perplexity(model, test).perplexity
    del model
    results |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    with tempfile.TemporaryDirectory() if args.runs is None else nullcontext(args.runs) as runs:
        for name, recipe in rows_of(args.rows).items():
            row = results["rows"].setdefault(name, {})
            run_dir = Path(runs) / recipe["method"]  # rows of one method share its calibration
            for keep in args.keep:
                if str(keep) not in row:
                    row[str(keep)] = measure(recipe, keep, args, test, run_dir)
                    args.out.write_text(json.dumps(results, indent=1) + "\n")
                    print(name, keep, round(row[str(keep)]["perplexity"], 2), flush=True, file=sys.stderr)
    print(markdown(results))


if __name__ == "__main__":
    main()
