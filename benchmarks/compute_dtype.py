"""Products of blocks in bfloat16 (autocast) against float32: speed, and the perplexity after compression.

    python benchmarks/compute_dtype.py [MODEL] [--windows 16] [--rounds 3] [--test-windows 40] [--parts products ...]

- products: one linear layer on 4096 tokens, both dtypes turn by turn; the median of the ratios.
- calibration: the pipeline gathers statistics and solves nothing, both dtypes turn by turn.
- rounding: KL(float32 || bfloat16) of the next tokens of the original model, in nats a token.
- perplexity: of the compressed model, whose evaluation is the same for both.

Prints one JSON document.
"""

import argparse
import json
import statistics
import time

import torch
from calibration_cost import calibrate, register
from torch import nn

import slimrank
from slimrank.models.blocks import BlockRunner
from slimrank.models.divergence import Scorer
from slimrank.models.load import load
from slimrank.models.placement import has_bfloat16
from slimrank.models.recording import Batch
from slimrank.text.sources import read_source
from slimrank.text.tokens import bos_of, tokenise
from slimrank.text.windows import leading_windows

CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16")
SHAPES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048)]
GATHERED = ("column", "column and row, streamed")
RECIPES = {
    "svd_llm": {"method": "svd_llm"},
    "kfac_svd + spectrum": {"method": "kfac_svd", "allocation": "spectrum"},
}


def product_ratio(m, n, rounds):
    layer, x = nn.Linear(n, m, bias=False), torch.randn(4096, n)

    def seconds(bfloat16):
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            layer(x)
        return time.perf_counter() - start

    seconds(True), seconds(False)
    return statistics.median(seconds(False) / seconds(True) for _ in range(rounds))


def products(args):
    return {f"{m} x {n}": product_ratio(m, n, 5 * args.rounds) for m, n in SHAPES}


def calibration(args):
    register()
    found = {}
    model, tokenizer = load(args.model, "float32")
    for name in GATHERED:
        turns = [
            [calibrate(name, model, tokenizer, args, compute_dtype=dtype) for dtype in DTYPES]
            for _ in range(args.rounds)
        ]
        found[name] = {"ratio": statistics.median(wide / narrow for wide, narrow in turns), "seconds": turns}
    return found


def test_windows(tokenizer, args, count):
    tokens = tokenise(read_source("demo", "evaluation"), tokenizer)
    return leading_windows(tokens, count, args.seq_len, bos_of(tokenizer))


def rounding(args):
    model, tokenizer = load(args.model, "auto")
    finals = []
    for bfloat16 in (False, True):
        runner = BlockRunner(model, CPU, upcast=True, resident=False, bfloat16=bfloat16)
        with runner.session():
            runner.embed([Batch(test_windows(tokenizer, args, 4))])
            finals.append(runner.finals(runner.states, 0))
    scorer = Scorer(runner, 1.0, 0)
    scorer.original = finals[0]
    return scorer.score([finals[1]])[0][0]


def perplexity(args):
    model, tokenizer = load(args.model, "auto")
    test = test_windows(tokenizer, args, args.test_windows)
    found = {"original": slimrank.perplexity(model, test).perplexity}
    for name, recipe in RECIPES.items():
        row = {}
        for dtype in DTYPES:
            result = slimrank.compress(
                args.model, keep_ratio=0.8, samples=args.windows, seq_len=args.seq_len, batch_size=args.batch,
                evaluation=None, compute_dtype=dtype, **recipe,
            )  # fmt: skip
            row[dtype] = slimrank.perplexity(result.model, test).perplexity
            row[f"seconds, {dtype}"] = result.report["seconds"]
        found[name] = {**row, "change": row["bfloat16"] / row["float32"] - 1}
    return found


PARTS = {"products": products, "calibration": calibration, "rounding": rounding, "perplexity": perplexity}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--test-windows", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "native": has_bfloat16(CPU)}
    found = {part: PARTS[part](args) for part in args.parts}
    print(json.dumps({"benchmark": "products of blocks in bfloat16", **about, **found}, indent=1))


if __name__ == "__main__":
    main()
