"""A tiny random model of every family that slimrank is tried on: one line each, nothing downloaded."""

from inspect import signature

import torch
import transformers
import transformers.models.gemma3n.modeling_gemma3n
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

WIDTHS = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
GROUPED = {**WIDTHS, "num_key_value_heads": 2}
SMALL = {**GROUPED, "head_dim": 8}
GPT = {"vocab_size": 259, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip

ARCHITECTURES = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", SMALL),
    "gemma2": ("Gemma2Config", SMALL),
    "gemma3": ("Gemma3TextConfig", {**SMALL, "sliding_window": 16}),
    "phi3": ("Phi3Config", GROUPED),
    "gpt2": ("GPT2Config", GPT),
    "gpt_neox": ("GPTNeoXConfig", WIDTHS),
    "opt": ("OPTConfig", {**WIDTHS, "ffn_dim": 64, "word_embed_proj_dim": 24}),
    "falcon": ("FalconConfig", {**WIDTHS, "alibi": False}),
    "stablelm": ("StableLmConfig", GROUPED),
    "cohere": ("CohereConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "glm": ("GlmConfig", SMALL),
    "mixtral": ("MixtralConfig", {**GROUPED, **FOUR}),
    "qwen3_moe": ("Qwen3MoeConfig", {**SMALL, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3Config", {**WIDTHS, **LATENT, **SHARED, "moe_intermediate_size": 24, **FOUR}),
    "gpt_oss": ("GptOssConfig", {**SMALL, **FOUR, "sliding_window": 16}),
    "llama4": (
        "Llama4TextConfig",
        {**SMALL, **FOUR, "intermediate_size_mlp": 48, "moe_layers": [1], "attention_chunk_size": 16},
    ),
    "mamba": ("MambaConfig", {**WIDTHS, "state_size": 4}),
    "llava": ("LlavaConfig", {"text": ("LlamaConfig", GROUPED), "vision": ("CLIPVisionConfig", VISION)}),
}

SHARING = {**SMALL, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 259, "num_kv_shared_layers": 2}
LATENT_ATTENTION = {**WIDTHS, **LATENT, **SHARED}
UNUSUAL = {  # what blocks are called with, or read, has another form; not put through all of test_architectures.py
    "gemma3n": ("Gemma3nTextConfig", {**SHARING, "num_hidden_layers": 4, "sliding_window": 16}),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **SHARING, "num_hidden_layers": 4, "sliding_window": 16, "global_head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "glm_moe_dsa": (
        "GlmMoeDsaConfig",
        {
            **LATENT_ATTENTION, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
            "num_hidden_layers": 3, "index_topk": 6, "index_n_heads": 2, "index_head_dim": 8,
            "indexer_types": ["full", "shared", "shared"], "num_key_value_heads": 4,
        },
    ),
    "zaya": (
        "ZayaConfig",
        {**SMALL, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 24},
    ),
    "deepseek_v2": ("DeepseekV2Config", {**LATENT_ATTENTION, "moe_intermediate_size": 24, "num_experts_per_tok": 2}),
    "minicpm3": ("MiniCPM3Config", {**WIDTHS, **LATENT}),
    "deepseek_v4": (
        "DeepseekV4Config",
        {
            **SMALL, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16,
            "o_lora_rank": 8, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
            "qk_rope_head_dim": 4, "sliding_window": 16, "hc_mult": 2, "num_key_value_heads": 1,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "mlp_layer_types": ["hash_moe", "moe"],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        },
    ),
}  # fmt: skip

UNUSUAL = {name: of for name, of in UNUSUAL.items() if hasattr(transformers, of[0])}  # older ones know fewer


def hands_on(name):
    """Whether the blocks of a family hand states on; those of Gemma 3n did so in the cache only, in older versions."""
    attention = transformers.models.gemma3n.modeling_gemma3n.Gemma3nTextAttention
    return name in UNUSUAL and (name != "gemma3n" or "shared_kv_states" in signature(attention.forward).parameters)


def random_model(name, seed=0, **changes):
    """Biases, norms and routers random as well, so that nothing is hidden behind zeros and ones."""
    kind, settings = {**ARCHITECTURES, **UNUSUAL}[name]
    config = _config(kind, {**settings, **changes})
    auto = AutoModelForImageTextToText if name == "llava" else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def _config(kind, settings):
    parts = {key: settings[key] for key in ("text", "vision") if key in settings}
    rest = {key: value for key, value in settings.items() if key not in parts}
    nested = {f"{key}_config": _config(*part) for key, part in parts.items()}
    return getattr(transformers, kind)(**rest, **nested)
