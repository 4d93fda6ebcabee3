"""Calibration (statistics of all targets) against the plain forward pass over the same tokens.

    python benchmarks/calibration_cost.py [MODEL] [--windows 16] [--seq-len 512] [--rounds 3]

Prints one JSON document. Both run in the same process, turn by turn; the figure is the median of the ratios.
The plain forward pass ends after the last block (no logits), which makes the comparison harder, not easier.
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
from slimrank.models.blocks import Batch, BlockRunner
from slimrank.models.load import load
from slimrank.models.targets import find_targets


def plain_forward(model, batches):
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=1)


def calibrate(model, batches, targets):
    runner = BlockRunner(model, torch.device("cpu"), upcast=True, resident=False)
    with runner.session():
        runner.embed(batches)
        for index in range(len(runner)):
            layers = {t.path: model.get_submodule(t.path) for t in targets.in_block(index)}
            with StatisticsCollector(layers, torch.device("cpu")) as collector:
                runner.step(index, lambda batch: collector.begin(batch.attention_mask))
            grams = [collector.of(path).gram for path in collector.statistics]
            assert len(grams) == 4, "q/k/v, o, gate/up and down read four tensors"


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model, tokenizer = load(args.model, "float32")
    model.eval()
    targets = find_targets(model)
    tokens = tokenise(read_source("demo", "calibration"), tokenizer)
    windows = draw_windows(tokens, args.windows, args.seq_len, seed=0)
    batches = [Batch(ids) for ids in windows.split(args.batch)]
    plain_forward(model, batches[:1])
    rounds = []
    for _ in range(args.rounds):
        forward = seconds(lambda: plain_forward(model, batches))
        rounds.append((forward, seconds(lambda: calibrate(model, batches, targets))))
    print(
        json.dumps(
            {
                "benchmark": "calibration over plain forward",
                "ratio": statistics.median(c / f for f, c in rounds),
                "bound": 1.6,
                "rounds": [{"forward_s": f, "calibration_s": c} for f, c in rounds],
                "tokens": windows.numel(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "machine": platform.processor() or platform.machine(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
