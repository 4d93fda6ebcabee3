"""Every causal language model that the installed transformers knows, tiny and random, cut, saved and loaded.

    python benchmarks/any_architecture.py [MODEL_TYPE ...]

One configuration is made for all, of whatever fields a class has; classes that cannot be built from it, or not small,
are counted and left out. Prints a line for each and a summary.
"""

import logging
import sys
import tempfile
import warnings
from collections import Counter

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import slimrank

SIZES = {
    2: "num_hidden_layers num_layers n_layer n_layers decoder_layers num_key_value_heads num_experts_per_tok n_group "
       "linear_num_key_heads mamba_expand expand num_experts_per_token moe_k moe_topk num_blocks linear_num_heads",
    4: "num_attention_heads n_head n_heads decoder_attention_heads attention_heads num_heads num_local_experts "
       "num_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads linear_num_value_heads "
       "qk_rope_head_dim mamba_d_state state_size ssm_state_size zero_expert_num",
    8: "head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim rotary_dim linear_head_dim "
       "hidden_size_per_layer_input mamba_dt_rank",
    16: "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim sliding_window chunk_size mamba_chunk_size",
    24: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size",
    32: "hidden_size d_model n_embd embedding_dim word_embed_proj_dim attention_hidden_size",
    48: "intermediate_size ffn_hidden_size decoder_ffn_dim intermediate_size_mlp",
    64: "n_inner ffn_dim mamba_d_ssm",
    128: "max_position_embeddings n_positions max_seq_len",
    260: "vocab_size vocab_size_per_layer_input",
    1: "n_shared_experts num_shared_experts topk_group first_k_dense_replace n_groups mamba_n_groups num_hidden_groups",
    0: "num_kv_shared_layers bos_token_id eos_token_id pad_token_id",
}  # fmt: skip
FIELDS = {name: size for size, names in SIZES.items() for name in names.split()}
TYPES = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
VARIANTS = (  # the first that can be built and run is taken
    {},
    {"head_dim": 4, "num_key_value_heads": 4, "qk_head_dim": 12},
    {"num_hidden_layers": 4},
    {"num_key_value_heads": 4},
    {"head_dim": 16, "n_groups": 1, "num_heads": 4},
    {"head_dim": 4},
)
LARGEST = 3e7
TEXT = " ".join(f"{a} and {b} make {a + b}." for a in range(40) for b in range(9))
IDS = torch.arange(10)[None]


def configuration(kind, changes):
    """A small configuration of a class, or an exception."""
    defaults = CONFIG_MAPPING[kind]().to_dict()
    fields = {name: size for name, size in ({**FIELDS, **changes}).items() if name in defaults}
    depth = fields.get("num_hidden_layers", 2)
    for name in TYPES:
        if isinstance(defaults.get(name), list):
            each = list(dict.fromkeys(defaults[name]))
            fields[name] = (each * depth)[: max(depth, len(each))]
            fields |= {"num_hidden_layers": len(fields[name])} if "num_hidden_layers" in fields else {}
    return CONFIG_MAPPING[kind](**fields)


def build(kind):
    """A tiny model, or the first reason why there is none."""
    reason = None
    for changes in VARIANTS:
        try:
            config = configuration(kind, changes)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > LARGEST:
                return None, f"too large: {size:,} parameters"
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval().float()
            with torch.no_grad():
                model(input_ids=IDS)
            return model, None
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return None, reason


def byte_tokenizer():
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def attempt(model, tokenizer):
    """Outcome, and what share of the matrices was covered."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = slimrank.compress(
                model, tokenizer, keep_ratio=0.6, method="svd_llm", form="pivot", calibration=(TEXT,), samples=4,
                seq_len=24, evaluation=None, out=f"{folder}/out",
            )  # fmt: skip
            loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/out").float()
            with torch.no_grad():
                found, expected = (m(input_ids=IDS, use_cache=False).logits for m in (loaded, made.model))
            same = torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
            return ("compressed" if same else "loads as another"), made.report["coverage"]["of_matrices"]
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", 0.0


def main():
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    tokenizer, outcomes = byte_tokenizer(), Counter()
    for kind in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model, reason = build(kind)
        if model is None:
            outcomes["not built"] += 1
            print(f"{kind}: not built ({reason})", flush=True)
            continue
        outcome, covered = attempt(model, tokenizer)
        whole = outcome == "compressed" and covered >= 0.98
        outcomes["compressed, at least 98 % of the matrices" if whole else outcome.split(":")[0]] += 1
        print(f"{kind}: {outcome}, {covered:.3f} of the matrices", flush=True)
    print(f"\ntransformers {transformers.__version__}")
    print(*(f"{count:4} {outcome}" for outcome, count in outcomes.most_common()), sep="\n")


if __name__ == "__main__":
    main()
