"""Speed of wide layers, dense and compressed: prefill and decode of random Llama blocks, turn by turn.

    python benchmarks/wide_speed.py [--shapes 2048x5632 4096x14336] [--blocks 1 4] [--dtypes bfloat16 float32]
        [--keeps 0.8 0.5] [--threads 2]

Weights are random, and so are the factors: only shapes matter to speed. The vocabulary is small, so that blocks are
all of the work. Every setting holds the dense model and its compressed ones, as they are loaded and after
`slimrank.pack`. They run one after the other in every round. Ratios (above 1: faster than dense) are medians over
rounds, with their extremes. The limit is 1 / keep. Prints a JSON document for each setting.
"""

import argparse
import copy
import gc
import json
import platform
import statistics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import slimrank
from slimrank.evaluate.busy import others
from slimrank.evaluate.speed import one_round
from slimrank.layers.forms import layer_form
from slimrank.layers.stand_ins import stand_in

KINDS = ("prefill", "decode")


def rank_of(form, m, n, keep, multiple):
    """The largest rank whose layer stores no more than that part of the weight."""
    ranks = range(multiple, min(m, n), multiple)
    fitting = [r for r in ranks if layer_form(form).parameters(m, n, r) <= keep * m * n]
    return max(fitting, default=multiple)


def compressed(dense, form, keep, multiple):
    model = copy.deepcopy(dense)
    for target in slimrank.find_targets(dense):
        layer = dense.get_submodule(target.path)
        model.set_submodule(target.path, stand_in(form, layer, rank_of(form, *layer.weight.shape, keep, multiple)))
    return model


def models_of(shape, blocks, args, dtype):
    """The dense model and the compressed ones, by what they are."""
    width, hidden = map(int, shape.split("x"))
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=hidden, num_hidden_layers=blocks,
        num_attention_heads=width // 128, num_key_value_heads=max(1, width // 512),
    )  # fmt: skip
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    found = {"dense": dense}
    for form in args.forms:
        for keep in args.keeps:
            model = compressed(dense, form, keep, args.rank_multiple)
            if "plain" in args.ways:
                found[f"{form} {keep:g}"] = copy.deepcopy(model)
            if "packed" in args.ways:
                slimrank.pack(model)
                found[f"{form} {keep:g}, packed"] = model
    return found


def measure(models, args):
    """The seconds of every model, kind and round."""
    ids = torch.randint(1000, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    rounds = []
    for turn in range(args.repeats + 1):
        order = list(models) if turn % 2 else list(models)[::-1]
        found = {name: one_round(models[name], ids, args.new_tokens)[:2] for name in order}
        rounds += [found] if turn else []
    return rounds


def row(name, rounds, args):
    found = {"model": name}
    for index, kind in enumerate(KINDS):
        ratios = [each["dense"][index] / each[name][index] for each in rounds]
        tokens = (args.prompt, args.new_tokens)[index]
        found[kind] = {
            "ratio": round(statistics.median(ratios), 3),
            "extremes": [round(min(ratios), 3), round(max(ratios), 3)],
            "tokens_per_s": round(tokens / statistics.median(each[name][index] for each in rounds), 1),
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["2048x5632", "4096x14336"], help="width x hidden units")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--forms", nargs="+", default=["pair", "pivot"])
    parser.add_argument("--ways", nargs="+", default=["plain", "packed"], choices=["plain", "packed"])
    parser.add_argument("--rank-multiple", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for shape in args.shapes:
        for dtype in args.dtypes:
            for blocks in args.blocks:
                with torch.no_grad(), others() as busy:
                    models = models_of(shape, blocks, args, dtype)
                    rounds = measure(models, args)
                about = {"shape": shape, "blocks": blocks, "dtype": dtype, "threads": torch.get_num_threads()}
                about |= {"others": round(busy.processors, 2), "torch": torch.__version__}
                about |= {"machine": platform.machine(), "rows": [row(name, rounds, args) for name in models]}
                print(json.dumps(about), flush=True)
                del models
                gc.collect()


if __name__ == "__main__":
    main()
