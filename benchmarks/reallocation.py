"""Ranks allocated once more after refinement: each layer's spectrum scaled by what refining saved of its error.

    python benchmarks/reallocation.py --text TRAIN.txt --test TEST.txt --runs DIR [MODEL] [--keep 0.6] [--rounds 1]

Round 0 is `spectrum` and `regress`; each further round is cut anew, by the curves of round 0 times (error after / error
before refinement)^2 of the round before. Prints one JSON document.
"""

import argparse
import json
import platform
import sys

import torch

import slimrank
from slimrank.methods.solver_options import least_error
from slimrank.recipe import Recipe


@slimrank.allocator(
    id="again", title="spectra, scaled by what refining saved", paper="benchmark", needs=["spectra"], solves=True
)
def again(problem, *, left: dict[str, float] | None = None, **solving):
    """The same as `spectrum`, of curves times what is left of each layer's squared error (layer -> fraction)."""
    return least_error(
        problem, problem.curves({item.path: (left or {}).get(item.path, 1.0) for item in problem.items}), solving
    )


def left_of(report):
    """Layer -> (error after refinement / error before)^2, of those that were refined."""
    rows = {row["path"]: row["refined"] for row in report["targets"] if "refined" in row}
    return {path: (errors["after"] / errors["before"]) ** 2 for path, errors in rows.items() if errors["before"] > 0}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--runs", required=True)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--search-samples", type=int, default=4)
    parser.add_argument("--samples-factor", type=int, default=1)
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    preset = Recipe.preset("balanced")
    options = {**preset["refine_options"], "samples_factor": args.samples_factor}
    rows, plans, left = [], [], {}
    for number in range(args.rounds + 1):
        chosen = {"allocation": "again", "allocation_options": {"left": left}} if number else {}
        recipe = {**preset, "samples": args.samples, "refine_options": options, **chosen}
        result = slimrank.compress(
            args.model, keep_ratio=args.keep, calibration=args.text, evaluation=args.test, windows=args.windows,
            search_samples=args.search_samples, run_dir=args.runs, keep_statistics=True, **recipe,
        )  # fmt: skip
        plans.append(result.plan)
        left = left | left_of(result.report)
        rows.append({**row_of(result.report), "moved": moved(*plans[-2:]) if number else 0, "left": spread(left)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"rows": rows, "torch": torch.__version__, "machine": platform.machine()}, indent=1))


def row_of(report):
    return {
        "perplexity": report["after"]["perplexity"]["perplexity"],
        "dense": report["before"]["perplexity"]["perplexity"],
        "undone": len({row["block"] for row in report["targets"] if row.get("refined", {}).get("undone")}),
    }


def moved(before, after):
    """Fraction of the stored parameters that went to another layer."""
    form = before.stored_as
    gained = [max(0, after.targets[p].cost(form) - target.cost(form)) for p, target in before.targets.items()]
    return sum(gained) / before.stored_parameters


def spread(scales):
    values = sorted(scales.values())
    return {"least": values[0], "median": values[len(values) // 2], "most": values[-1]}


if __name__ == "__main__":
    main()
