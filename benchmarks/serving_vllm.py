"""Tokens a second of a dense model and compressed ones in vLLM, turn by turn in one process.

    python benchmarks/serving_vllm.py [DENSE COMPRESSED ...] [--dtype bfloat16] [--batch 1 8] [--repeats 5]

Without folders it makes a random Llama, 2048 wide, and compresses it by plain SVD to keep 0.8 and 0.5. Prints one JSON
document. Ratios are to the dense model; each is a median of turns, with the smallest and largest one.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

PROMPT, SHORT = 512, 32


def random_folders(root, width, blocks, keeps, form):
    import copy

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import slimrank

    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    dense.save_pretrained(root / "dense")
    folders = [root / "dense"]
    for keep in keeps:
        slim = copy.deepcopy(dense)
        slimrank.compress(slim, keep_ratio=keep, method="svd", evaluation=None, form=form)
        slim.save_pretrained(root / f"{form}-{keep}")
        folders.append(root / f"{form}-{keep}")
    return folders


def engines(folders, dtype, batch):
    from vllm import LLM

    options = {"max_model_len": 1024, "max_num_seqs": batch, "enable_prefix_caching": False, "disable_log_stats": True}
    options |= {"enforce_eager": True, "skip_tokenizer_init": True, "dtype": dtype}
    return [LLM(str(folder), **options) for folder in folders]


def seconds(engine, batch, length, new):
    """Time for `batch` prompts of that length and `new` tokens each."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [(7 * i + 3 * row) % 900 + 5 for i in range(length)]} for row in range(batch)]
    wanted = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    engine.generate(prompts, wanted, use_tqdm=False)
    return time.perf_counter() - start


def rates(engine, batch, new):
    """Tokens a second: of a long prompt, and of those that follow a short one."""
    prefill = batch * PROMPT / seconds(engine, batch, PROMPT, 1)
    first = seconds(engine, batch, SHORT, 1)
    return {"prefill": prefill, "decode": batch * (new - 1) / (seconds(engine, batch, SHORT, new) - first)}


def compare(served, batch, new, repeats):
    """Rates of all engines, turn by turn."""
    for engine in served:  # the first calls set things up
        rates(engine, batch, 8)
    turns = [[rates(engine, batch, new) for engine in served] for _ in range(repeats)]
    rows = []
    for number in range(len(served)):
        row = {"batch": batch}
        for kind in ("prefill", "decode"):
            row[f"{kind}_tokens_per_s"] = round(statistics.median(turn[number][kind] for turn in turns), 1)
            ratios = sorted(turn[number][kind] / turn[0][kind] for turn in turns)
            row[f"{kind}_ratio"] = [round(value, 3) for value in (statistics.median(ratios), ratios[0], ratios[-1])]
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.8, 0.5])
    parser.add_argument("--form", default="pair")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    from slimrank.serving.vllm import need_engine

    need_engine()
    with tempfile.TemporaryDirectory() as scratch:
        made = args.folders or random_folders(Path(scratch), args.width, args.blocks, args.keep, args.form)
        served = engines(made, args.dtype, max(args.batch))
        rows = {str(folder.name): [] for folder in made}
        for batch in args.batch:
            for name, row in zip(rows, compare(served, batch, args.new, args.repeats), strict=True):
                rows[name].append(row)
    import torch
    import vllm

    about = {"vllm": vllm.__version__, "torch": torch.__version__, "dtype": args.dtype}
    about |= {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    about["machine"] = platform.processor() or platform.machine()
    print(
        json.dumps({"benchmark": "serving by vLLM", "prompt": PROMPT, "new": args.new, **about, "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
