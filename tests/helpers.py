"""Tiny random models of several layouts, a byte tokenizer, and text: all made here, nothing downloaded."""

import functools
import os
import random
import subprocess
import sys
import tempfile

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

VOCABULARY = 259

CONFIGS = {
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=256, eos_token_id=257,
    ),
    "qwen2": lambda: Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=256, eos_token_id=257, use_sliding_window=True, sliding_window=16, max_window_layers=1,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_inner=64, n_layer=3, n_head=4, n_positions=128,
        bos_token_id=256, eos_token_id=257,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
        word_embed_proj_dim=24, max_position_embeddings=128, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    ),
    "gemma": lambda: GemmaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=128, bos_token_id=256, eos_token_id=257,
        pad_token_id=258,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, bos_token_id=256, eos_token_id=257,
    ),
}  # fmt: skip


def tiny_model(name="llama", seed=0, **changes):
    """A random model, biases and norms random as well, so that nothing is hidden behind zeros and ones."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.05))
    return model.eval()


def factored(model, form="pair", rank=5, names=("q_proj", "k_proj", "v_proj")):
    """Give these layers of a model a rank, in place; nothing else is done to them."""
    from slimrank.checkpoint.save import mark_model, replace_linears

    for path in [path for path, _ in model.named_modules() if path.rpartition(".")[2] in names]:
        layer = model.get_submodule(path)
        if isinstance(layer, torch.nn.Linear):
            u, s, v = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
            r = min(rank, len(s))
            replace_linears(model, [((path,), u[:, :r] * s[:r])], v[:r], form)
    mark_model(model)
    return model


@functools.cache
def byte_tokenizer(bos=False):
    """One token per byte; 256 = BOS, 257 = EOS, 258 = PAD."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<s>": 256, "</s>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def text(words=3000, seed=0):
    """Repeatable nonsense with some structure."""
    generator = random.Random(seed)
    nouns = ["cat", "rank", "matrix", "river", "token", "model"]
    verbs = ["eats", "shrinks", "finds", "carries", "splits"]
    return " ".join(
        f"the {generator.choice(nouns)} {generator.choice(verbs)} a {generator.choice(nouns)}."
        for _ in range(words // 5)
    )


def save_tiny(folder, name="llama", bos=False, **changes):
    """A tiny model with its tokenizer as a folder."""
    model = tiny_model(name, **changes)
    model.save_pretrained(folder)
    byte_tokenizer(bos).save_pretrained(folder)
    return folder


def check_without_slimrank(folder, ids, expected):
    """Load a folder by its own code where slimrank cannot be imported; its logits are exactly the expected ones."""
    program = """
import sys
sys.modules["slimrank"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids, expected = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
"""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save((ids, expected), file.name)
        command = [sys.executable, "-c", program, str(folder), file.name]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr


def nothing_drawn(record):
    """What stands for the plots of a report where they do not count."""
    from slimrank.report.html import Figures

    return Figures(missing="not drawn in this test")
