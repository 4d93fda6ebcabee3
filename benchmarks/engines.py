"""Speed of compressed models over their original in the same engine, and of each engine over plain transformers.

    slimrank compress demo --keep 0.8 --method kfac_svd --allocation spectrum --form pivot --no-eval --out pivot-80
    slimrank compress demo --keep 0.5 --method kfac_svd --allocation spectrum --form pivot --no-eval --out pivot-50
    python benchmarks/engines.py pivot-80 pivot-50 [--original demo] [--rounds 7] [--prompt 256] [--threads 1]

Needs the extra `openvino`. All models run turn by turn in all engines, batch 1. Figures are medians: tokens/s, and
ratios within a round with their range. `busy` says that other processes computed at the time. Then take the ratios in
seconds of the processor (`by_processor`, meant for one thread). `--exports DIR` keeps what was exported. Prints one
JSON document.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import openvino
import torch
import transformers

import slimrank
from slimrank.evaluate.speed import VOCABULARY_USED
from slimrank.models.cache import next_inputs
from slimrank.models.load import skeleton

ENGINES = {  # name -> engine, dtype or weights, precision of what is between layers
    "transformers float32": ("transformers", "float32", None),
    "transformers bfloat16": ("transformers", "bfloat16", None),
    "openvino float32": ("openvino", "float32", "float32"),
    "openvino float16": ("openvino", "float16", "auto"),
    "openvino int8": ("openvino", "int8", "auto"),
}
TYPES = {"between": "INFERENCE_PRECISION_HINT", "cache": "KV_CACHE_PRECISION"}
PLAIN = "transformers float32"
KINDS = ("prefill", "decode")


def now():
    return np.array([time.perf_counter(), time.process_time()])


def openvino_round(runner, ids, new_tokens):
    """Seconds of reading the prompt, and of generating: on the clock, and of the processor."""
    runner.reset()
    start = now()
    logits = runner.step(ids)
    middle = now()
    for _ in range(new_tokens):
        logits = runner.step(logits[:, -1:].argmax(-1))
    return middle - start, now() - middle


def transformers_round(model, ids, new_tokens):
    """See `openvino_round`."""
    start = now()
    output, seen = model(input_ids=ids, use_cache=True), ids
    middle = now()
    for _ in range(new_tokens):
        seen = torch.cat([seen, output.logits[:, -1:].argmax(-1)], 1)
        output = model(**next_inputs(model, output, seen), use_cache=True)
    return middle - start, now() - middle


def runner_of(spec, name, folder, args):
    """A function that measures one round of one model in one engine, and the types that this computes in."""
    engine, weights, precision = ENGINES[name]
    ids = args.ids
    if engine == "transformers":
        model, _ = slimrank.load(spec, weights)
        model.eval()
        return lambda: transformers_round(model, ids, args.new_tokens), {
            "weights": weights,
            "between": weights,
            "cache": weights,
        }
    if not folder.exists():
        slimrank.export(spec, folder, weights=weights, packed=args.packed)
    runner = slimrank.OpenVinoModel(folder, precision, args.threads)
    found = {key: runner.compiled.get_property(name).get_type_name() for key, name in TYPES.items()}
    return lambda: openvino_round(runner, ids.numpy(), args.new_tokens), {"weights": weights, **found}


def busy(threads):
    """Load of the last minute beyond what this process may cause."""
    return os.getloadavg()[0] > threads + 0.3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("compressed", nargs="+")
    parser.add_argument("--original", default="demo")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exports")
    parser.add_argument(
        "--packed", action="store_true", help="export with pairs, and products of the same inputs joined"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    specs = [args.original, *args.compressed]
    vocabulary = min(VOCABULARY_USED, skeleton(args.original).model.get_input_embeddings().weight.shape[0])
    args.ids = torch.randint(vocabulary, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    tokens = {"prefill": args.prompt, "decode": args.new_tokens}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        scratch = Path(args.exports or temporary)
        keys = [(name, spec) for name in args.engines for spec in specs]
        places = {
            (name, spec): scratch / f"{Path(spec).name}{'-packed' * args.packed}-{ENGINES[name][1]}"
            for name, spec in keys
        }
        made = {key: runner_of(key[1], key[0], places[key], args) for key in keys}
        runners = {key: run for key, (run, _) in made.items()}
        for run in runners.values():
            run()
        was_busy = busy(args.threads)
        rounds = [{key: run() for key, run in runners.items()} for _ in range(args.rounds)]
        was_busy |= busy(args.threads)

    def ratio(kind, key, over):
        """Median, and the smallest and largest, of how much faster one is than another."""
        found = np.array([r[over][KINDS.index(kind)] / r[key][KINDS.index(kind)] for r in rounds])
        (clock, processor), least, most = np.median(found, 0), found.min(0), found.max(0)
        return {"by_clock": clock, "range": [least[0], most[0]], "by_processor": processor}

    rows = []
    for name, spec in keys:
        seconds = list(zip(*(r[name, spec] for r in rounds), strict=True))
        row = {"engine": name, "model": spec, **made[name, spec][1]}
        for kind, times in zip(KINDS, seconds, strict=True):
            row[f"{kind}_tokens_per_s"] = tokens[kind] / statistics.median(t[0] for t in times)
            row[f"{kind}_tokens_per_processor_s"] = tokens[kind] / statistics.median(t[1] for t in times)
            row[f"{kind}_over_original"] = ratio(kind, (name, spec), (name, args.original))
            if PLAIN in args.engines:
                row[f"{kind}_over_plain_original"] = ratio(kind, (name, spec), (PLAIN, args.original))
        rows.append(row)
    about = {"benchmark": "speed of compressed models by engine", "busy": was_busy, "rows": rows}
    about |= {name: getattr(args, name) for name in ("rounds", "prompt", "new_tokens", "threads")}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__, "openvino": openvino.__version__}
    print(json.dumps({**about, "machine": platform.processor() or platform.machine()}, indent=1))


if __name__ == "__main__":
    main()
