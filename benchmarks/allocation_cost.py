"""What allocating costs: seconds of the budget solver at several sizes, its gap, and the passes that measuring takes.

    python benchmarks/allocation_cost.py [--text TRAIN.txt --run DIR] [--method kfac_svd]

Without --text: power-law spectra of the shapes of Llama-3-8B, Llama-3-70B and of a mixture of 128 experts, ranks in
steps of 8. With it, the demo model's own curves as well: the gap to the optimum (HiGHS), and the time that measuring
the divergence of every layer takes over that of as many forward passes with logits (of the processor, so that other
work on the machine counts little). Prints one JSON document.
"""

import argparse
import json
import time
from dataclasses import replace

import numpy as np
import torch

from slimrank.budget.curves import candidates, spectral_curve, tails
from slimrank.budget.exact import solve_exactly
from slimrank.budget.knapsack import solve

LLAMA_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
LLAMA_70B = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
EXPERTS = [(768, 2048)] * 250 + [(2048, 768)] * 126
MODELS = {"Llama-3-8B": (LLAMA_8B, 32), "Llama-3-70B": (LLAMA_70B, 80), "128 experts": (EXPERTS, 32)}
KEEPS = (0.9, 0.8, 0.6, 0.4)


def curves_of(shapes, blocks):
    random = np.random.default_rng(0)
    curves = []
    for block in range(blocks):
        for place, shape in enumerate(shapes):
            values = np.exp(random.normal()) * np.arange(1, min(shape) + 1) ** -random.uniform(0.4, 0.9)
            path = f"{block:03d}.{place:03d}"
            curves.append(spectral_curve(path, tails(values, 0.0, shape, path), *candidates(path, shape, 8)))
    return curves


def solver_row(curves):
    whole = sum(int(c.costs[-1]) for c in curves)
    seconds, gaps = [], []
    for keep in KEEPS:
        start = time.perf_counter()
        found = solve(curves, int(keep * whole))
        seconds.append(time.perf_counter() - start)
        gaps.append(found.gap)
    return {"targets": len(curves), "seconds": max(seconds), "certified_gap": max(gaps)}


def plain_pass(model, windows):
    """Processor seconds of a forward pass over the search windows, logits of all positions included."""
    start = time.process_time()
    with torch.no_grad():
        for ids in windows.split(2):
            model(input_ids=ids, use_cache=False)
    return time.process_time() - start


def demo_rows(text, run_dir, method, samples, search):
    """On the demo model: gaps of the solver on its own curves, and the cost of measuring every layer once."""
    import slimrank
    from slimrank.budget.problem import Allocation
    from slimrank.methods.allocator import ALLOCATORS, allocator

    found = {}

    @allocator("timed", "for this benchmark", "none", needs=["spectra", "divergence"])
    def timed(problem):
        for multiple in (1, 8):
            curves = replace(problem, multiple=multiple).curves()
            whole = sum(int(c.costs[-1]) for c in curves)
            pairs = [(solve(curves, int(k * whole)), solve_exactly(curves, int(k * whole))) for k in KEEPS]
            gaps = [(ours.error - best.error) / best.error for ours, best in pairs]
            found[f"gap to HiGHS, multiples of {multiple}"] = max(gaps)
        probe = problem.probe
        probe.joint({item.path: "dense" for item in problem.items})
        forward = min(plain_pass(probe.state.model, probe.state.texts["search"]) for _ in range(2))
        start = time.process_time()
        probe.single({item.path: [max(1, problem.form.largest_rank(*item.shape) // 10)] for item in problem.items})
        passes = (time.process_time() - start) / forward
        found["measuring every layer, over as many passes"] = passes / len(problem.items)
        return Allocation(ALLOCATORS.get("uniform").configured({}).allocate(problem).ranks)

    slimrank.compress(
        "demo", keep_ratio=0.8, method=method, allocation="timed", allocation_options={"plans": 0}, calibration=text,
        samples=samples, search_samples=search, seq_len=512, evaluation=None, run_dir=run_dir,
    )  # fmt: skip
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text")
    parser.add_argument("--run", help="run directory to take spectra from and leave them in")
    parser.add_argument("--method", default="kfac_svd")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--search-samples", type=int, default=4)
    args = parser.parse_args()
    result = {name: solver_row(curves_of(*model)) for name, model in MODELS.items()}
    if args.text:
        result["demo"] = demo_rows(args.text, args.run, args.method, args.samples, args.search_samples)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
