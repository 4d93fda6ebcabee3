"""Perplexity at equal bytes: dense weights of few bits, compressed models of few bits, and bits chosen within a budget.

    python benchmarks/few_bits.py [--rows int4-g64 small:57 pivot:0.8:int6-g64 ...] [--rotated] [--samples 32]

Every row is one compression of a model in bfloat16 on the demo texts, for each of --seeds. A row is a scheme (the dense
model rounded to it), `small:MB` (the preset, at so many megabytes of linears), or `FORM:KEEP:SCHEME` (compressed by the
default preset, then rounded). Printed are the bytes of the linears (numbers, scales, zero points), the divergence from
the original, the perplexity over that of the original, and the 95 % interval of the paired difference. Rounding is a
draw: rows that are nearer than their seeds are equal.

The demo model was dequantised from 4-bit blocks of 32 columns, which flatters schemes of 4 bits and more. `--rotated`
folds the norms into the weights and turns the residual stream by a random rotation first: the model computes the same,
and its weights lie on no grid.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch

import slimrank
from slimrank.evaluate.agreement import agreement
from slimrank.evaluate.windows import windows_of
from slimrank.models.load import load_model
from slimrank.progress import Progress
from slimrank.text.sources import read_source

READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
HEADER_BYTES = 1_000_000  # of the file: names and shapes of its tensors
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@torch.no_grad()
def rotate(model, seed=0):
    """Turn the residual stream of a Llama by a random rotation, in place; its output head gets weights of its own."""
    inner = model.model
    width = inner.embed_tokens.weight.shape[1]
    draw = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64)).Q

    def changed(weight, left=None, right=None):
        w = weight.double()
        w = w if left is None else left @ w
        return (w if right is None else w @ right).to(weight.dtype)

    head = torch.nn.Linear(width, model.config.vocab_size, bias=False, dtype=inner.embed_tokens.weight.dtype)
    head.weight.data = changed(model.lm_head.weight * inner.norm.weight, right=turn)
    model.config.tie_word_embeddings = False
    model.lm_head = head
    model._tied_weights_keys = None
    model.all_tied_weights_keys = {}
    inner.norm.weight.data.fill_(1)
    inner.embed_tokens.weight = torch.nn.Parameter(changed(inner.embed_tokens.weight, right=turn))
    for block in inner.layers:
        for norm, names in ((block.input_layernorm, READERS[:3]), (block.post_attention_layernorm, READERS[3:])):
            for name in names:
                layer = block.get_submodule(name)
                layer.weight.data = changed(layer.weight * norm.weight, right=turn)
            norm.weight.data.fill_(1)
        for name in WRITERS:
            layer = block.get_submodule(name)
            layer.weight.data = changed(layer.weight, left=turn.t())
    return model


def options_of(row, rest):
    """The options of a row; `rest` is the bytes of everything but the linears."""
    parts = row.split(":")
    if parts[0] == "small":
        return {**slimrank.Recipe.preset("small"), "max_bytes": int(float(parts[1]) * 1e6) + rest}
    if len(parts) == 1:
        return {"method": "svd", "keep_ratio": 1.0, "quantize": row}
    return {"form": parts[0], "keep_ratio": float(parts[1]), "quantize": parts[2], "rank_multiple": 64}


def measured(model, original, windows):
    """KL a token, and the ratio of the perplexities with the 95 % interval of the paired difference."""
    found = agreement(model, original, windows)
    gaps = torch.tensor(found.model.nll).double() - torch.tensor(found.dense.nll).double()
    mean, spread = float(gaps.mean()), 1.96 * float(gaps.std()) / len(gaps) ** 0.5
    interval = [round(math.exp(mean - spread), 4), round(math.exp(mean + spread), 4)]
    return {"kl": round(found.kl, 5), "ratio": round(math.exp(mean), 4), "interval": interval}


def main():
    """Compress once for every row and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", default=["int6-g64", "int5-g64", "int4-g64", "int3-g64", "small:57", "small:46"]
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rotated", action="store_true")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1, help="draws of the calibration windows")
    parser.add_argument("--largest", type=float, default=4.0, help="quantize_options of the recipe")
    parser.add_argument("--runs", type=Path, help="run directory, of statistics")
    args = parser.parse_args()
    loaded = load_model(args.model, "float32", Progress())
    original = (rotate(loaded.model) if args.rotated else loaded.model).bfloat16()
    size = {"windows": args.windows, "seq_len": 512, "least": 2}
    windows = windows_of("demo", read_source("demo", "evaluation"), original, loaded.tokenizer, **size)
    targets = sum(2 * target.parameters for target in slimrank.find_targets(original))
    rest = 2 * sum(p.numel() for p in {id(p): p for p in original.parameters()}.values()) - targets + HEADER_BYTES
    for row, seed in ((row, seed) for row in args.rows for seed in range(args.seeds)):
        start, model = time.time(), copy.deepcopy(original)
        options = {"evaluation": None, **options_of(row, rest), "samples": args.samples, "seed": seed}
        options["quantize_options"] = {"largest": args.largest}
        report = slimrank.compress(model, loaded.tokenizer, run_dir=args.runs, **options).report
        found = {
            "row": row,
            "rotated": args.rotated,
            "seed": seed,
            "largest": args.largest,
            "megabytes": round(report["size"]["linears_bytes"] / 1e6, 2),
            **measured(model, original, windows),
            "seconds": round(time.time() - start),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
