"""Digests of compressed weights, to show that a change of the code changes no result, bit for bit.

    python benchmarks/factor_digests.py [--only tiny/svd_llm ...] [--against benchmarks/results/factor_digests.json]

Compresses a tiny random model and the demo model with three recipes on one thread, and prints the sha256 of all
tensors of each result as JSON. With `--against` it compares them with earlier ones, and ends with 1 if any differs.
Equal bits need the same processor and the same torch: both are recorded.
"""

import argparse
import hashlib
import json
import platform
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import slimrank

RECIPES = {
    "svd_llm": {"method": "svd_llm", "allocation": "uniform", "samples": 8},
    "kfac_svd": {"method": "kfac_svd", "allocation": "spectrum", "form": "pivot", "samples": 8},
    "balanced": {"samples": 8},
}
TEXT = " ".join(f"the {i * 7919 % 997} of {i * 104729 % 211} is {i % 13}." for i in range(4000))


def tiny():
    """A random llama of two blocks and a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {chr(code): code for code in range(256)}
    tokenizer = Tokenizer(models.BPE(words, [], byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def digest(model):
    """sha256 of all tensors of a model, in order of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def compressed(name):
    """The digest of one model compressed by one recipe."""
    model, recipe = name.split("/")
    options = {"keep_ratio": 0.8, "evaluation": None, **RECIPES[recipe]}
    if model == "tiny":
        result = slimrank.compress(*tiny(), calibration=[TEXT], seq_len=64, **options)
    else:
        result = slimrank.compress("demo", **options)
    return digest(result.model)


def main():
    names = [f"{model}/{recipe}" for model in ("tiny", "demo") for recipe in RECIPES]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    parser.add_argument("--against")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "machine": platform.machine(), "processor": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
        "digests": {name: compressed(name) for name in args.only},
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if args.against:
        with open(args.against, encoding="utf-8") as file:
            before = json.load(file)["digests"]
        differing = [name for name in args.only if found["digests"][name] != before[name]]
        if differing:
            sys.exit(f"these results differ: {', '.join(differing)}")


if __name__ == "__main__":
    main()
