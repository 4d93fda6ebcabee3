"""An independent SVD-LLM in float64, to hold slimrank to.

    python benchmarks/reference_svd_llm.py --text TRAIN.txt --test TEST.txt [--keep 0.9 0.8 0.6 0.4]

It shares nothing with slimrank but the way windows are drawn: whole-model forward passes, hooks on every
linear, Grams by float64 products, Cholesky, full SVD of W S, the explicit inverse of S, dense W' written back, and
its own perplexity loop. Then slimrank compresses the same model on the same tokens. Prints one JSON document with
both perplexities at each keep_ratio; they must agree to 0.5 %.
"""

import argparse
import json
import math
import platform
import sys
import tempfile

import torch
from torch import nn

import slimrank
from slimrank.models.load import load
from slimrank.text.windows import draw_windows, leading_windows


def grams_float64(model, windows):
    grams, handles = {}, []

    def hook(name):
        def add(module, args):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            grams[name] = grams.get(name, 0) + x.T @ x

        return add

    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        for ids in windows.split(8):
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return grams


def whitened_svd(weight, gram):
    w = weight.double()
    s = torch.linalg.cholesky(gram)
    u, sigma, vt = torch.linalg.svd(w @ s, full_matrices=False)
    return u, sigma, vt @ torch.linalg.inv(s)


def reference_perplexity(model, windows):
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in windows:
            logp = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            total -= float(logp.gather(1, ids[1:, None]).sum())
            count += len(ids) - 1
    return math.exp(total / count)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    model, tokenizer = load(args.model, "float32")
    model.eval()

    def ids(path):
        with open(path, encoding="utf-8", newline="") as file:
            return torch.tensor(tokenizer(file.read(), add_special_tokens=False, verbose=False)["input_ids"])

    test = leading_windows(ids(args.test), args.windows, args.seq_len)
    grams = grams_float64(model, draw_windows(ids(args.text), args.samples, args.seq_len, seed=0))
    layers = dict(model.model.layers.named_modules())
    original = {name: layers[name].weight.detach().clone() for name in grams}
    parts = {name: whitened_svd(original[name], grams.pop(name)) for name in list(grams)}
    rows = [{"keep": 1.0, "reference": reference_perplexity(model, test)}]
    for keep in args.keep:
        for name, (u, sigma, vt) in parts.items():
            m, n = original[name].shape
            r = math.floor(keep * m * n / (m + n))
            layers[name].weight.data = ((u[:, :r] * sigma[:r]) @ vt[:r]).float()
        rows.append({"keep": keep, "reference": reference_perplexity(model, test)})
    del parts, original, model, layers
    with tempfile.TemporaryDirectory() as run_dir:
        for row in rows:
            result = slimrank.compress(
                args.model, keep_ratio=row["keep"], method="svd_llm", allocation="uniform", run_dir=run_dir,
                calibration=args.text, samples=args.samples, seq_len=args.seq_len, evaluation=None,
            )  # fmt: skip
            row["slimrank"] = slimrank.perplexity(result.model, test).perplexity
            row["ratio"] = row["slimrank"] / row["reference"]
            print(row, flush=True, file=sys.stderr)
    record = {
        "benchmark": "svd_llm against an independent float64 reference",
        "rows": rows,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
