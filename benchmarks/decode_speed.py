"""A decoding step of a model at keep_ratio 0.5 against dense: batch 1, float32, CPU, wide layers.

    python benchmarks/decode_speed.py [--width 2048] [--blocks 2] [--keep 0.5]

A random Llama-shaped model is cut by plain SVD; both models decode turn by turn. Prints one JSON document.
"""

import argparse
import copy
import json
import platform

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import slimrank
from slimrank.evaluate.speed import measure_speeds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()
    config = LlamaConfig(
        vocab_size=1000, hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=args.blocks,
        num_attention_heads=args.width // 64, num_key_value_heads=args.width // 64,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config).eval()
    slim = copy.deepcopy(dense)
    slimrank.compress(slim, keep_ratio=args.keep, method="svd", evaluation=None)
    slim_speed, dense_speed = measure_speeds([slim, dense], prompt=64, new_tokens=args.steps, repeats=7)
    print(
        json.dumps(
            {
                "benchmark": "decode step at half the parameters",
                "ratio": slim_speed.decode / dense_speed.decode,
                "bound": 1.5,
                "prefill_ratio": slim_speed.prefill / dense_speed.prefill,
                "dense_tokens_per_s": dense_speed.decode,
                "slim_tokens_per_s": slim_speed.decode,
                "width": args.width,
                "keep_ratio": args.keep,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "machine": platform.processor() or platform.machine(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
