"""Decomposition time and statistics memory of every method, against the straightforward way.

    python benchmarks/methods_cost.py [--blocks 6] [--methods svd_llm kfac_svd ...]      the demo model
    python benchmarks/methods_cost.py --llama3-block                                    one block, 4096 / 1024 / 14336

The straightforward way: a gram for each module by itself, of the full width; Cholesky of each; SVD of the whitened
weight; the inverse of the Cholesky factor applied to the result; all in float64, as ours. Its time does not depend on
what the grams hold, so it gets random ones. Both take turns weight by weight. Ours is the solver plus the cut of
factors at keep_ratio 0.8. "full" asks the SVD for all singular vectors (torch's default), "thin" only for min(m, n).

Prints one JSON document: for each method the ratios of time and memory, and the largest difference that cutting factors
in float32 makes, relative to the weight.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import slimrank
from slimrank.linalg.lowrank import Spectrum
from slimrank.methods.decomposer import DECOMPOSERS
from slimrank.models.load import load
from slimrank.pipeline.inputs import load_inputs
from slimrank.pipeline.prepare import Choices
from slimrank.pipeline.stages.calibrate import decompose
from slimrank.pipeline.state import State
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.store import Run

LLAMA3 = LlamaConfig(
    vocab_size=512, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=2048,
)  # fmt: skip


def spd(n):
    x = torch.randn(n, n // 4, dtype=torch.float64)
    c = x @ x.T
    c.diagonal().add_(1.0)
    return c


def straightforward(weight, sides, full):
    """Cholesky, SVD, inverse factors: what the papers' codes do for one (in) or two (in and out) grams."""
    m, n = weight.shape
    column = spd(n)
    row = spd(m) if sides == 2 else None
    start = time.perf_counter()
    r = torch.linalg.cholesky(column)
    whitened = weight.double() @ r
    if row is not None:
        left = torch.linalg.cholesky(row)
        whitened = left.T @ whitened
    u, _, vt = torch.linalg.svd(whitened, full_matrices=full)
    k = min(m, n)
    torch.linalg.solve_triangular(r, vt[:k], upper=False, left=False)
    if row is not None:
        torch.linalg.solve_triangular(left.T, u[:, :k], upper=True)
    return time.perf_counter() - start


def elements(statistics, seen):
    """Numbers held by the sums of one layer, shared ones once."""
    total = 0
    for part in (statistics.inputs, statistics.outputs, statistics.gradients, statistics.pulled):
        if part is not None and id(part) not in seen:
            seen.append(id(part))
            total += part.upper.numel()
    return total


def bench(id, model, tokenizer, args):
    method = DECOMPOSERS.get(id)
    sides = 2 if "row" in method.needs else 1
    rows, seen = [], []

    def timed(weight, statistics):
        m, n = weight.shape
        rank = int(0.8 * m * n / (m + n))
        start = time.perf_counter()
        spectrum = method.configured({}).solve(weight, statistics)
        a, b = spectrum.factors(weight, rank, torch.float32)
        ours = time.perf_counter() - start
        exact_a, exact_b = spectrum.factors(weight, rank)
        exact = exact_b @ exact_a
        rows.append(
            {
                "ours_s": ours,
                "thin_s": straightforward(weight, sides, False),
                "full_s": straightforward(weight, sides, True) if args.full else None,
                "elements": elements(statistics, seen),
                "straightforward_elements": n * n + (m * m if sides == 2 else 0),
                "float32": float((b.double() @ a.double() - exact).norm() / exact.norm()),
            }
        )
        return Spectrum(torch.zeros(1), torch.zeros(m, 1), "out")

    slimrank.decomposer(id="timed", title="timed", paper="benchmark", needs=method.needs)(timed)
    recipe = Recipe.make(
        {
            "keep_ratio": 0.8, "method": "timed", "samples": args.windows, "seq_len": 512, "batch_size": 4,
            "evaluation": None, "targets": args.targets or [f"re:layers\\.([0-{args.blocks - 1}])\\."],
        }
    )  # fmt: skip
    choices = Choices.of(recipe)
    stages = choices.stages
    inputs = load_inputs(choices, choices.requests, model, tokenizer, Progress())
    with tempfile.TemporaryDirectory() as folder:
        state = State(inputs, Run(Path(folder) / "run", {}), stages, Progress(), False, False, inputs.prepared.plan)
        decompose(state, state.store({}))

    def total(key):
        return sum(row[key] for row in rows)

    found = {
        "weights": len(rows),
        "thin_over_ours": total("thin_s") / total("ours_s"),
        "straightforward_memory_over_ours": total("straightforward_elements") / max(1, total("elements")),
        "largest_float32_difference": max(row["float32"] for row in rows),
        "ours_s": total("ours_s"),
        "thin_s": total("thin_s"),
    }
    if args.full:
        found |= {"full_over_ours": total("full_s") / total("ours_s"), "full_s": total("full_s")}
    return found


def byte_tokenizer(text, **_):
    return {"input_ids": list(text.encode())}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama3-block", action="store_true")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=["svd_llm", "svd_llm_v2", "drone", "kfac_svd"])
    parser.add_argument("--targets", nargs="+", help="patterns of layers, instead of all of --blocks")
    parser.add_argument("--no-full", dest="full", action="store_false", help="leave the full SVD out")
    args = parser.parse_args()
    if args.llama3_block:
        args.blocks = 1
        torch.manual_seed(0)
        model = LlamaForCausalLM(LLAMA3).eval()
        tokenizer = byte_tokenizer
    else:
        model, tokenizer = load("demo", "float32")
    result = {"benchmark": "methods: time and memory", "model": "llama3 block" if args.llama3_block else "demo"}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    for id in args.methods:
        result[id] = bench(id, model, tokenizer, args)
        print(id, result[id], flush=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
