"""What llama.cpp (the package xllamacpp) predicts, for benchmarks that compare it with transformers."""

import json

import torch
import xllamacpp


def server_of(path, adapter=None):
    """A server of a GGUF file with a cache of float32, and with a LoRA adapter if one is given."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 256, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        params.lora_adapters = [info]
    return xllamacpp.Server(params)


def predictions(server, prompts, likeliest):
    """For each prompt, given as tokens, the likeliest next tokens and their log-probabilities."""
    found = []
    for ids in prompts:
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "n_probs": likeliest, "cache_prompt": False}
        answer = server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        found.append({each["id"]: each["logprob"] for each in _tops(answer)})
    return found


def _tops(answer):
    """The likeliest tokens in an answer, whose layout has changed between versions."""
    if "completion_probabilities" in answer:
        return answer["completion_probabilities"][0]["top_logprobs"]
    return answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]


@torch.no_grad()
def largest_difference(model, prompts, theirs):
    """The largest difference of a log-probability that llama.cpp gave."""
    gaps = []
    for ids, found in zip(prompts, theirs, strict=True):
        ours = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        gaps += [abs(float(ours[token]) - logprob) for token, logprob in found.items()]
    return max(gaps)
