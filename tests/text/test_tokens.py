"""Long texts are tokenised in pieces, and give the ids of the whole."""

import functools
import json
import random

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers import byte_tokenizer, text, tiny_model
from slimrank.errors import ModelError
from slimrank.text import tokens
from slimrank.text.tokens import check_tokens, tokenise

WORDS = ["the", "a", "river", "token", "matrix", "é", "漢字", "x1", "don't", "2024", "---", '"quoted",', "end.", "</s>"]
WORDS += ["👩\u200d👧", "e\u0301"]
GAPS = [" "] * 12 + ["\n", "\n\n", "\n\n\n", "  ", "\t", "\r\n\r\n", ".\n\n"]
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@functools.cache
def mixed():
    """Words, line ends and characters of many kinds."""
    generator = random.Random(0)
    return "".join(generator.choice(WORDS) + generator.choice(GAPS) for _ in range(6000))


def byte_level(split=None, normalizer=None):
    """BPE over bytes, as GPT-2 or, with a pattern of its own, Llama 3 and Qwen have it."""
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    parts = [level] if split is None else [pre_tokenizers.Split(Regex(split), "isolated"), level]
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [mixed()], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["</s>"])
    )
    return made


def metaspace_unigram(split):
    """Unigram with a prefix before the text, as T5 has it."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        [mixed()], trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>", "</s>"])
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    return made


def unsplit_bpe():
    """BPE over the whole text, with a prefix before it, as Llama 2 has it."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    known = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator([mixed()], trainers.BpeTrainer(vocab_size=600, special_tokens=known))
    content = json.loads(made.to_str())
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaced]}
    return Tokenizer.from_str(json.dumps({**content, "pre_tokenizer": None}))


MADE = {
    "byte level": byte_level,
    "byte level, own pattern": lambda: byte_level(LLAMA3, normalizers.NFC()),
    "unigram": lambda: metaspace_unigram(True),
    "unigram, not split": lambda: metaspace_unigram(False),
    "bpe, not split": unsplit_bpe,
}


@pytest.fixture
def calls(monkeypatch):
    """Pieces are small; gives the lengths of the texts that were tokenised."""
    seen = []
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 4096)
    monkeypatch.setattr(tokens, "OVERLAP_CHARACTERS", 1024)
    call = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "__call__",
        lambda self, text, **more: seen.append(len(text)) or call(self, text, **more),
    )
    return seen


@pytest.mark.parametrize("kind", MADE)
def test_pieces_give_the_ids_of_the_whole(kind, calls):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=MADE[kind]())
    whole = tokenizer._tokenizer.encode(mixed(), add_special_tokens=False).ids
    assert tokenise(mixed(), tokenizer).tolist() == whole
    if kind == "unigram, not split":  # ties between tokens depend on all that is before them
        assert calls == [len(mixed())]
    else:
        assert max(calls) == 4096
        assert sum(calls) < 1.5 * len(mixed())


def test_no_more_pieces_than_needed(calls):
    tokenizer = byte_tokenizer()
    whole = tokenise(text(4000), tokenizer)
    calls.clear()
    assert torch.equal(tokenise(text(4000), tokenizer, most=500), whole[:500])
    assert len(calls) == 2
    assert torch.equal(tokenise(text(4000), tokenizer, most=10**6), whole)


@pytest.mark.parametrize("kind", ["byte level", "unigram"])
def test_where_a_text_only_repeats_itself_pieces_grow(kind, calls):
    """A repeated word gives no place to join two pieces at: its tokens may depend on where it ends."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=MADE[kind]())
    odd = mixed()[:5000] + "ab" * 5000 + "\n" * 5000 + mixed()[:5000]
    assert tokenise(odd, tokenizer).tolist() == tokenizer._tokenizer.encode(odd, add_special_tokens=False).ids
    assert max(calls) > 4096


def test_short_texts_and_none(calls):
    assert tokenise("ab\n", byte_tokenizer(bos=True)).shape == (3,)
    assert tokenise("", byte_tokenizer()).shape == (0,)


def test_every_token_has_an_embedding():
    model = tiny_model(vocab_size=257)
    check_tokens(torch.tensor([0, 256]), byte_tokenizer(), model)
    check_tokens(torch.tensor([], dtype=torch.long), byte_tokenizer(), model)
    with pytest.raises(ModelError, match=r"token 258 \('<pad>'\) .* ends at 256"):
        check_tokens(torch.tensor([[0, 258]]), byte_tokenizer(), model)
    with pytest.raises(ModelError, match="token 256"):
        check_tokens(torch.tensor([0]), byte_tokenizer(bos=True), tiny_model(vocab_size=200))
