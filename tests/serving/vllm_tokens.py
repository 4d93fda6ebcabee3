"""Print, as JSON, the greedy tokens that vLLM gives for each folder, or the error that it raises.

A process of its own: vLLM sets up much that later tests would see.

    python vllm_tokens.py PROCESSES TOKENS FOLDER ...

The environment variable SERVED_OPTIONS holds more options of the engine, as JSON.
"""

import gc
import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

PROMPTS = [[72, 101, 108, 108, 111], [84, 104, 101, 32, 99, 97, 116, 32, 101, 97, 116, 115], list(range(97, 123))]


def tokens_of(folder, processes, count):
    from vllm import LLM, SamplingParams

    options = {"max_model_len": 96, "max_num_seqs": 4, "enforce_eager": True, "disable_log_stats": True}
    options |= {"dtype": "float32", "tensor_parallel_size": processes}
    engine = LLM(folder, **options | json.loads(os.environ.get("SERVED_OPTIONS", "{}")))
    wanted = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    given = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], wanted, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in given]


def main():
    processes, count, *folders = sys.argv[1:]
    found = {}
    for folder in folders:
        try:
            found[folder] = tokens_of(folder, int(processes), int(count))
        except Exception as error:
            found[folder] = f"{type(error).__name__}: {error}"
        gc.collect()
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
