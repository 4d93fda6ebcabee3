"""All spectra of a model's weights in float64, against Cholesky + full SVD of W S per weight.

    python benchmarks/decomposition_cost.py [MODEL] [--blocks 6] [--rounds 3]

Grams come from a real calibration of the first blocks; both routes then solve the same weights, turn by turn.
Prints one JSON document; the figure is the median of the ratios ours / reference.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from slimrank.calibration.sources import read_source
from slimrank.calibration.statistics import StatisticsCollector
from slimrank.calibration.windows import draw_windows, tokenise
from slimrank.linalg.eigen import psd_root
from slimrank.linalg.lowrank import solve
from slimrank.models.blocks import Batch, BlockRunner
from slimrank.models.load import load
from slimrank.models.targets import find_targets, weight_of


def problems(model, tokenizer, blocks):
    """(weight, gram) of every target in the first blocks."""
    targets = find_targets(model)
    tokens = tokenise(read_source("demo", "calibration"), tokenizer)
    batches = [Batch(ids) for ids in draw_windows(tokens, 16, 512, seed=0).split(8)]
    runner = BlockRunner(model, torch.device("cpu"), upcast=True, resident=False)
    found = []
    with runner.session():
        runner.embed(batches)
        for index in range(min(blocks, len(runner))):
            layers = {t.path: model.get_submodule(t.path) for t in targets.in_block(index)}
            with StatisticsCollector(layers, torch.device("cpu")) as collector:
                runner.step(index, lambda batch: collector.begin(None))
            found += [(weight_of(layer), collector.of(path).gram) for path, layer in layers.items()]
    return found, len(targets)


def reference(weight, gram, full):
    s = torch.linalg.cholesky(gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
    return torch.linalg.svd(weight.double() @ s, full_matrices=full)


def seconds(work, items):
    start = time.perf_counter()
    for item in items:
        work(*item)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model, tokenizer = load(args.model, "float32")
    items, total = problems(model, tokenizer, args.blocks)
    seconds(solve, items[:7])
    rounds = []
    for _ in range(args.rounds):
        ours = seconds(solve, items)
        full = seconds(lambda w, c: reference(w, c, True), items)
        thin = seconds(lambda w, c: reference(w, c, False), items)
        rounds.append({"ours_s": ours, "cholesky_full_svd_s": full, "cholesky_thin_svd_s": thin})
    worst = max(
        float(
            (solve(w, c).values - (exact := torch.linalg.svdvals(w.double() @ psd_root(c)[0]))).abs().max() / exact[0]
        )
        for w, c in items[:14]
    )
    print(
        json.dumps(
            {
                "benchmark": "decomposition over Cholesky + full SVD",
                "ratio": statistics.median(r["ours_s"] / r["cholesky_full_svd_s"] for r in rounds),
                "ratio_to_thin_svd": statistics.median(r["ours_s"] / r["cholesky_thin_svd_s"] for r in rounds),
                "bound": 1 / 3,
                "weights": len(items),
                "weights_of_the_model": total,
                "largest_difference_of_singular_values": worst,
                "rounds": rounds,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "machine": platform.processor() or platform.machine(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
