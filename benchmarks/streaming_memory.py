"""Peak memory of streaming against resident mode, on a random Llama-shaped model stored in bfloat16.

    python benchmarks/streaming_memory.py [--blocks 24] [--width 768] [--samples 16] [--method svd_llm]

Each mode calibrates and decomposes in a process of its own. Prints one JSON document: peak memory above what an
idle process with the libraries loaded uses, beside the bound model on disk + one block in float32 + hidden states (for
a method that needs gradients, of three: hidden states, gradients, and the stored inputs of a block).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from slimrank.methods.decomposer import DECOMPOSERS


def build(folder, blocks, width):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from slimrank.models.load import load

    _, tokenizer = load("demo")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def one_run(folder, samples, method, resident):
    """In a process of its own: the peak before and after calibration and decomposition, in bytes."""
    import torch

    import slimrank.pipeline as pipeline
    from slimrank.evaluate.memory import peak_memory

    torch.ones(512, 512) @ torch.ones(512, 512)
    torch.linalg.eigh(torch.eye(512, dtype=torch.float64))
    idle = peak_memory(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as run_dir:
        pipeline.compress(
            folder, keep_ratio=0.8, samples=samples, seq_len=512, batch_size=2, resident=resident, evaluation=None,
            method=method, run_dir=run_dir,
        )  # fmt: skip
    print(json.dumps({"idle": idle, "peak": peak_memory(torch.device("cpu"))}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--method", default="svd_llm")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        one_run(args.run[0], args.samples, args.method, args.run[1] == "resident")
        return
    with tempfile.TemporaryDirectory() as folder:
        build(folder, args.blocks, args.width)
        disk = sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))
        results = {}
        for mode in ("streaming", "resident"):
            command = [sys.executable, __file__, "--samples", str(args.samples), "--method", args.method]
            command += ["--run", folder, mode]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
            results[mode] = json.loads(output.strip().splitlines()[-1])
    block = 4 * (4 * args.width**2 + 3 * 4 * args.width**2)
    hidden = args.samples * 512 * args.width * 4 * (3 if DECOMPOSERS.get(args.method).takes == "backward" else 1)
    bound = disk + block + hidden
    above = {mode: r["peak"] - r["idle"] for mode, r in results.items()}
    print(
        json.dumps(
            {
                "benchmark": "peak memory of streaming",
                "method": args.method,
                "model_on_disk_MB": disk / 1e6,
                "one_block_MB": block / 1e6,
                "hidden_states_MB": hidden / 1e6,
                "bound_MB": bound / 1e6,
                "streaming_MB": above["streaming"] / 1e6,
                "resident_MB": above["resident"] / 1e6,
                "streaming_over_bound": above["streaming"] / bound,
                "streaming_over_resident": above["streaming"] / above["resident"],
                "idle_process_MB": results["streaming"]["idle"] / 1e6,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
