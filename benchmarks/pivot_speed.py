"""Pivot layers against pairs of the same rank and against dense: one token, and 512 tokens, through a stack of layers.

    python benchmarks/pivot_speed.py [--widths 1024 2048] [--keeps 0.5 0.8] [--dtype float32] [--device cpu]

Layers are square and random; ranks are such that the pair stores a fraction `keep` of the dense weight. Several layers
follow each other, so that weights come from memory as they do in a model. The forms run turn by turn; figures are
medians of ratios, above 1 where the pivot layers are faster. Prints one JSON document.
"""

import argparse
import json
import platform
import statistics
import time

import torch
from torch import nn

from slimrank.layers import LowRankLinear, PivotLinear

TOKENS = {"decode": 1, "prefill": 512}


def make(form, width, rank, args):
    place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    if form == "dense":
        return nn.Linear(width, width, bias=False, **place)
    if form == "pair":
        return LowRankLinear(width, width, rank, **place)
    layer = PivotLinear(width, width, rank, side=form.removeprefix("pivot_"), **place)
    layer.order = torch.randperm(width).to(layer.order)
    return layer


def seconds(stack, x, args):
    start = time.perf_counter()
    for _ in range(args.inner):
        stack(x)
    if args.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / args.inner


def row(width, keep, args):
    rank = int(keep * width / 2)
    forms = ("dense", "pair", "pivot_out", "pivot_in")
    stacks = {f: nn.Sequential(*(make(f, width, rank, args) for _ in range(args.layers))).eval() for f in forms}
    found = {
        "width": width, "keep": keep, "rank": rank,
        "parameters_pivot_over_pair": (2 * width - rank) / (2 * width),
    }  # fmt: skip
    for kind, tokens in TOKENS.items():
        x = torch.randn(tokens, width, device=args.device, dtype=getattr(torch, args.dtype))
        for stack in stacks.values():
            seconds(stack, x, args)
        turns = [{form: seconds(stack, x, args) for form, stack in stacks.items()} for _ in range(args.repeats)]
        found[kind] = {"pair_over_dense": statistics.median(t["dense"] / t["pair"] for t in turns)}
        for form in ("pivot_out", "pivot_in"):
            found[kind][f"{form}_over_pair"] = statistics.median(t["pair"] / t[form] for t in turns)
            found[kind][f"{form}_over_dense"] = statistics.median(t["dense"] / t[form] for t in turns)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--inner", type=int, default=1, help="passes that are timed together")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [row(width, keep, args) for width in args.widths for keep in args.keeps]
    about = {"benchmark": "speed of pivot layers over pairs of the same rank and over dense", "rows": rows}
    about |= {name: getattr(args, name) for name in ("layers", "dtype", "device", "repeats")}
    about |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(json.dumps({**about, "machine": machine}, indent=1))


if __name__ == "__main__":
    main()
