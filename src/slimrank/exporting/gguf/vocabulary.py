"""The tokenizer of a model, as GGUF holds it."""

from __future__ import annotations

import json
from typing import Any

from slimrank.errors import ModelError
from slimrank.exporting.gguf.architectures import ELSEWHERE

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_WORDS + _REST: "qwen2", _WORDS + "{1,3}" + _REST: "llama-bpe"}  # pattern -> its name in llama.cpp
SPACE = "▁"


def add_vocabulary(writer: Any, gguf: Any, tokenizer: Any, size: int) -> None:
    """Add the tokenizer to a GGUF file.

    Args:
        writer: of the file.
        gguf: the package.
        tokenizer: of the model.
        size: tokens that the model has embeddings for; those without a text are called unused.

    Raises:
        ModelError: llama.cpp does not have such a tokenizer.
    """
    content = _content(tokenizer)
    words, merges = content["model"]["vocab"], [_pair(merge) for merge in content["model"]["merges"]]
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens = {number: text for text, number in words.items()} | {n: token["content"] for n, token in added.items()}
    kind = _kind(content)
    writer.add_tokenizer_model("llama" if kind == SPACE else "gpt2")
    writer.add_tokenizer_pre("default" if kind == SPACE else kind)
    writer.add_token_list([tokens.get(number, f"[UNUSED{number}]") for number in range(size)])
    writer.add_token_types([_type(gguf.TokenType, number, tokens, added, content) for number in range(size)])
    if kind == SPACE:
        writer.add_token_scores(_scores(tokens, merges, size))
        writer.add_add_space_prefix(_prefixes(content))
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    _add_special(writer, tokenizer)


def _content(tokenizer: Any) -> dict[str, Any]:
    """Return what tokenizer.json holds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    if content.get("model", {}).get("type") != "BPE":
        raise ModelError("the tokenizer cannot be written as GGUF here: it does not merge pairs (BPE).", ELSEWHERE)
    return content


def _kind(content: dict[str, Any]) -> str:
    """Return how text is split before merging, by its name in llama.cpp; `SPACE` if it is not split.

    Raises:
        ModelError: the way is not known here.
    """
    if content["model"].get("byte_fallback"):
        return SPACE
    steps = content["pre_tokenizer"] or {}
    parts = steps.get("pretokenizers", [steps])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
        name = SPLITS.get(parts[0]["pattern"].get("Regex", ""))
        if name is not None:
            return name
    raise ModelError(
        f"the tokenizer cannot be written as GGUF here: how it splits text ({', '.join(map(str, kinds))}) is "
        "not known.",
        ELSEWHERE,
    )


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first, second


def _type(types: Any, number: int, tokens: dict[int, str], added: dict[int, Any], content: dict[str, Any]) -> int:
    """Return the type of a token."""
    text = tokens.get(number)
    if text is None:
        return int(types.UNUSED)
    if content["model"].get("byte_fallback") and text == content["model"].get("unk_token"):
        return int(types.UNKNOWN)
    if number in added:
        return int(types.CONTROL if added[number]["special"] else types.USER_DEFINED)
    is_byte = content["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x")
    return int(types.BYTE if is_byte else types.NORMAL)


def _scores(tokens: dict[int, str], merges: list[tuple[str, str]], size: int) -> list[float]:
    """Return scores by which merging takes the pairs in their order: the earlier a token is made, the higher."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(tokens.get(number, ""), len(merges))) for number in range(size)]


def _prefixes(content: dict[str, Any]) -> bool:
    """Tell whether a space is put in front of a text."""
    steps = content["normalizer"] or {}
    return any(part.get("type") == "Prepend" for part in steps.get("normalizers", [steps]))


def _add_special(writer: Any, tokenizer: Any) -> None:
    """Add special tokens, whether texts begin with one, and the chat template."""
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)
