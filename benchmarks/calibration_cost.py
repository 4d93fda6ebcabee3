"""Statistics of all targets against the plain forward pass over the same tokens, for every kind of statistics.

    python benchmarks/calibration_cost.py [MODEL] [--windows 16] [--seq-len 512] [--rounds 3] [--rows column ...]

The pipeline's own calibration runs, with methods that gather and solve nothing, turn by turn with the plain forward
pass in the same process; figures are medians of ratios. Forward-only statistics are held against a forward pass that
ends after the last block (no logits), which makes the comparison harder; gradients need the loss, and are held against
a forward pass with its logits. Prints one JSON document.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

import slimrank
from slimrank.linalg.lowrank import Spectrum
from slimrank.models.load import load
from slimrank.pipeline.inputs import load_inputs
from slimrank.pipeline.prepare import Choices
from slimrank.pipeline.stages.calibrate import decompose
from slimrank.pipeline.state import State
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.store import Run

ROWS = {  # name -> needs, resident, bound
    "column": ({"column"}, False, 1.6),
    "gram": ({"gram"}, False, None),
    "channels": ({"channels"}, False, None),
    "column and row, streamed": ({"column", "row"}, False, 4.0),
    "column and row, resident": ({"column", "row"}, True, 3.0),
    "weight_squares, streamed": ({"weight_squares"}, False, None),
    "gradients, streamed": ({"gradients"}, False, None),
}


def register():
    for name, (needs, _, _) in ROWS.items():

        @slimrank.decomposer(id=f"gather: {name}", title=name, paper="benchmark", needs=needs)
        def nothing(weight, statistics):
            return Spectrum(torch.zeros(1), torch.zeros(weight.shape[0], 1), "out")


def calibrate(name, model, tokenizer, args, **options):
    """Seconds that the pipeline takes to gather statistics of all blocks, stored files included."""
    recipe = Recipe.make(
        {
            "keep_ratio": 0.8, "method": f"gather: {name}", "samples": args.windows, "seq_len": args.seq_len,
            "batch_size": args.batch, "resident": ROWS[name][1], "evaluation": None, **options,
        }
    )  # fmt: skip
    choices = Choices.of(recipe)
    stages = choices.stages
    inputs = load_inputs(choices, choices.requests, model, tokenizer, Progress())
    with tempfile.TemporaryDirectory() as folder:
        state = State(inputs, Run(Path(folder) / "run", {}), stages, Progress(), False, False, inputs.prepared.plan)
        decompose(state, state.store({}))
    return state.seconds["calibrate and decompose"]


def forward(model, windows, batch, logits):
    start = time.perf_counter()
    with torch.no_grad():
        for ids in windows.split(batch):
            model(input_ids=ids, use_cache=False, logits_to_keep=0 if logits else 1)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    args = parser.parse_args()
    register()
    model, tokenizer = load(args.model, "float32")
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    windows = torch.randint(vocabulary, (args.windows, args.seq_len), generator=torch.Generator().manual_seed(0))
    forward(model, windows[: args.batch], args.batch, False)
    found = {name: [] for name in args.rows}
    for _ in range(args.rounds):
        for name in args.rows:
            plain = forward(model, windows, args.batch, logits=ROWS[name][0] & {"row", "weight_squares", "gradients"})
            found[name].append((plain, calibrate(name, model, tokenizer, args)))
    rows = {
        name: {
            "ratio": statistics.median(c / f for f, c in rounds),
            "bound": ROWS[name][2],
            "rounds": [{"forward_s": f, "statistics_s": c} for f, c in rounds],
        }
        for name, rounds in found.items()
    }
    about = {"tokens": windows.numel(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(
        json.dumps(
            {"benchmark": "statistics over plain forward", **about, "machine": platform.machine(), **rows}, indent=1
        )
    )


if __name__ == "__main__":
    main()
