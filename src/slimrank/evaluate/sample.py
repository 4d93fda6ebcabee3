"""A short sample of what a model writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slimrank.models.contexts import evaluating

PROMPT_TOKENS = 32


def sample(model: Any, tokenizer: Any, window: Tensor, new_tokens: int = 40) -> dict[str, str]:
    """Return the beginning of a window of text as "prompt", and the model's greedy continuation as "text"."""
    prompt: str = tokenizer.decode(window[:PROMPT_TOKENS], skip_special_tokens=True).strip()
    return {"prompt": prompt, "text": continue_text(model, tokenizer, prompt, new_tokens)}


def continue_text(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 40) -> str:
    """Continue a prompt greedily; return the new text without the prompt."""
    device = next(model.parameters()).device
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    inputs.pop("token_type_ids", None)
    with evaluating(model):
        output = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()
