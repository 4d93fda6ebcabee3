"""GGUF files hold what transformers computes, and the tokenizer; llama.cpp itself is run by a benchmark."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import slimrank
from architectures import random_model
from helpers import byte_tokenizer, save_tiny
from slimrank.cli.app import app
from slimrank.errors import ModelError, RecipeError
from slimrank.exporting.api import export
from slimrank.exporting.gguf.architectures import rope_factors
from slimrank.exporting.gguf.read_back import ReadBack
from slimrank.exporting.gguf.vocabulary import _kind, _scores
from slimrank.models.load import load

IDS = torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(0))
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SIX = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}


def save(folder, name, **changes):
    random_model(name, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}), ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}), ("qwen2", {}), ("gemma3", SIX),
    ],
)  # fmt: skip
def test_transformers_reads_the_same_model(name, changes, tmp_path):
    folder = save(tmp_path / "model", name, **changes)
    record = export(folder, tmp_path / "out", to="gguf")
    assert record.difference["graph"] < 1e-5
    assert record.difference["written"] < 1e-5
    found = ReadBack(tmp_path / "out").step(IDS)
    with torch.no_grad():
        expected = load(folder, "float32")[0](IDS).logits
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)


@pytest.mark.parametrize(("weights", "kind", "bound"), [("float16", "f16", 1e-2), ("int8", "q8_0", 5e-2)])
def test_weights_of_few_bits(weights, kind, bound, tmp_path):
    folder = save(tmp_path / "model", "llama", intermediate_size=64)
    record = export(folder, tmp_path / "out", to="gguf", weights=weights)
    assert 0 < record.difference["written"] < bound
    assert set(record.numbers) == {"f32", kind}
    assert sum(record.numbers.values()) == random_model("llama", intermediate_size=64).num_parameters()


def test_rows_that_blocks_do_not_divide_are_in_float16(tmp_path):
    record = export(save(tmp_path / "model", "llama"), tmp_path / "out", to="gguf", weights="int8")
    assert record.numbers["f16"] == 2 * 32 * 48  # down_proj
    assert any("float16" in note for note in record.notes)


def test_a_narrow_model_is_written(tmp_path):
    save_tiny(tmp_path / "model")
    narrow = slimrank.narrow(
        tmp_path / "model", out=tmp_path / "narrow", keep_ratio=0.8, multiple=4, samples=4, seq_len=32, evaluation=()
    )
    record = export(tmp_path / "narrow", tmp_path / "out", to="gguf", weights="float32")
    assert sum(record.numbers.values()) == narrow.record.after.parameters
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert reader.fields["llama.feed_forward_length"].contents() == 32


def test_the_frequencies_of_llama_3_are_those_of_transformers():
    model = random_model("llama", rope_parameters=LLAMA3, head_dim=32)
    factors = rope_factors(model)
    plain = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq)
    assert float(factors.max()) == pytest.approx(8.0)
    assert rope_factors(random_model("llama")) is None


def test_the_tokenizer_is_in_the_file(tmp_path):
    export(save(tmp_path / "model", "llama"), tmp_path / "out", to="gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    vocabulary = byte_tokenizer().get_vocab()
    assert all(tokens[number] == token for token, number in vocabulary.items())
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert [types[i] for i in (0, 256)] == [gguf.TokenType.NORMAL, gguf.TokenType.CONTROL]
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == byte_tokenizer().eos_token_id
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert read("the cat").input_ids == byte_tokenizer()("the cat").input_ids


def test_ways_to_split_text_are_known_by_their_patterns():
    byte_level = {"type": "ByteLevel", "use_regex": False}
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

    def kind(*parts, **model):
        return _kind({"model": model, "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(parts)}})

    assert kind({"type": "Split", "pattern": {"Regex": words}}, byte_level) == "llama-bpe"
    assert kind({"type": "Split", "pattern": {"Regex": words.replace("{1,3}", "")}}, byte_level) == "qwen2"
    assert kind({"type": "Digits", "individual_digits": True}, {**byte_level, "use_regex": True}) == "smollm"
    assert kind(byte_fallback=True) == "▁"
    with pytest.raises(ModelError, match="how it splits text"):
        kind({"type": "Split", "pattern": {"Regex": "x"}}, byte_level)


def test_scores_order_tokens_as_merges_do():
    tokens = {0: "a", 1: "b", 2: "ab", 3: "abab"}
    scores = _scores(tokens, [("a", "b"), ("ab", "ab")], 4)
    assert scores[2] > scores[3] > scores[0] == scores[1]


def test_what_cannot_be_written_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="model_type is none of"):
        export(save(tmp_path / "gpt2", "gpt2"), tmp_path / "out", to="gguf")
    with pytest.raises(ModelError, match="five of six"):
        export(save(tmp_path / "gemma3", "gemma3", layer_types=["full_attention"] * 2), tmp_path / "out", to="gguf")
    with pytest.raises(ModelError, match="have biases"):
        export(save(tmp_path / "biased", "llama", attention_bias=True), tmp_path / "out", to="gguf")
    with pytest.raises(ModelError, match="activation relu"):
        export(save(tmp_path / "relu", "llama", hidden_act="relu"), tmp_path / "out", to="gguf")
    with pytest.raises(RecipeError, match="float32, float16, int8, not of int4"):
        export("demo", tmp_path / "out", to="gguf", weights="int4")
    save_tiny(tmp_path / "model")
    slimrank.compress(tmp_path / "model", keep_ratio=0.6, method="svd", evaluation=None, out=tmp_path / "factored")
    with pytest.raises(ModelError, match="layers of factors"):
        export(tmp_path / "factored", tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    folder = save(tmp_path / "model", "qwen2")
    asked = ["export", str(folder), "--to", "gguf", "--weights", "float16", "--out", str(tmp_path / "out"), "--json"]
    record = json.loads(CliRunner().invoke(app, asked).stdout)
    assert record["engine"] == "gguf"
    assert record["bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert {"token_embd.weight", "blk.0.attn_q.bias", "blk.1.ffn_down.weight"} <= names
    assert np.isfinite(record["difference"]["written"])
