"""The latent cache of a compressed model beside the ordinary one: bytes, logits, and the perplexity through it.

    python benchmarks/latent_cache.py FOLDER [FOLDER ...] [--text FILE] [--windows 8] [--piece 16]

Text is read in pieces, as a chat is: each piece attends to what the cache holds of those before it. Figures go to
stdout as lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import warnings

import torch
from transformers import DynamicCache

import slimrank
from slimrank.layers.latent_cache import cache_name
from slimrank.models.cache import cache_bytes
from slimrank.models.kv_bytes import kv_bytes
from slimrank.models.load import load_model
from slimrank.text.sources import read_source

CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "latent": slimrank.latent_cache,
    "latent-int8": lambda model: slimrank.latent_cache(model, int8=True),
}


def main():
    options = arguments()
    for folder in options.models:
        read = load_model(folder, options.dtype)
        ids = windows(read.tokenizer, options)
        print(json.dumps({"model": folder, **measured(read.model.eval(), ids, options.piece)}), flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--piece", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


def windows(tokenizer, options):
    text = read_source(options.text, "evaluation")
    ids = tokenizer(text[: options.windows * options.length * 8], return_tensors="pt").input_ids[0]
    return ids[: len(ids) // options.length * options.length].view(-1, options.length)[: options.windows]


@torch.no_grad()
def measured(model, ids, piece):
    """Return bytes, largest relative difference of logits, and perplexity of each cache."""
    found, first = {}, None
    for name, make in CACHES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = make(model)
        logits, size = through(model, ids, piece, cache)
        first = logits if first is None else first
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        found[name] = {
            "bytes": size,
            "perplexity": losses.exp().item(),
            "logits": ((logits - first).norm() / first.norm()).item(),
            "largest": (logits - first).abs().max().item(),
            "ordinary": len(getattr(cache, "ordinary", {})),
        }
    return {"dtype": str(model.dtype), "tokens": ids.numel(), "caches": found, "kv_bytes": kv_bytes(model)}


def through(model, ids, piece, cache):
    """Return the logits of texts that are read in pieces, and the bytes of the cache at the end."""
    found, output = [], None
    for start in range(0, ids.shape[1], piece):
        output = model(input_ids=ids[:, start : start + piece], use_cache=True, **{cache_name(model): cache})
        found.append(output.logits)
    return torch.cat(found, 1), cache_bytes(output)


if __name__ == "__main__":
    main()
