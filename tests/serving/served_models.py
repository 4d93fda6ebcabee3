"""Tiny random models of every kind of plan, large enough for the attention of vLLM: heads 32 wide."""

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import byte_tokenizer
from slimrank.checkpoint.save import mark_model, replace_linears, save_model
from slimrank.layers.forms import layer_form
from slimrank.layers.residual import ResidualLinear
from slimrank.layers.split import split_linears

WIDTHS = {
    "vocab_size": 259, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 258, "initializer_range": 0.15,
}  # fmt: skip
SMALL = {**WIDTHS, "head_dim": 32}
TIED = {"tie_word_embeddings": True}
FAMILIES = {
    "llama": ("LlamaConfig", {**WIDTHS, **TIED}),
    "llama-untied": ("LlamaConfig", {**WIDTHS, "tie_word_embeddings": False}),
    "llama-bias": ("LlamaConfig", {**WIDTHS, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**WIDTHS, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", WIDTHS),
    "qwen3": ("Qwen3Config", SMALL),
    "gemma": ("GemmaConfig", SMALL),
    "gemma3_text": ("Gemma3TextConfig", {**SMALL, "sliding_window": 16}),
    "phi3": ("Phi3Config", WIDTHS),
    "olmo2": ("Olmo2Config", WIDTHS),
    "cohere": ("CohereConfig", WIDTHS),
    "glm": ("GlmConfig", SMALL),
    "granite": ("GraniteConfig", WIDTHS),
    "smollm3": ("SmolLM3Config", WIDTHS),
    "starcoder2": ("Starcoder2Config", {**WIDTHS, "sliding_window": None}),
}
PLANS = {  # name -> family, form of the layer of a number; the number counts layers through the model
    "pair": ("llama", lambda i: "pair"),
    "pivot": ("llama", lambda i: "pivot"),
    "mixed": ("qwen3", lambda i: None if i < 7 else ("pair", "pivot", None)[i % 3]),
    "bias pair": ("qwen2", lambda i: "pair"),
    "bias pivot": ("llama-bias", lambda i: "pivot"),
    "bias residual": ("qwen2", lambda i: "residual:int8-g16/float"),
    "untied": ("llama-untied", lambda i: ("pair", "pivot")[i % 2]),
    "sliding": ("mistral", lambda i: ("pivot", "pair")[i % 2]),
    "quantised dense": ("llama", lambda i: ("dense:int8", "dense:int4-g32", "dense:int8-g64-sym")[i % 3]),
    "quantised pair": ("llama", lambda i: ("pair:int8-g16", "pair:int4-g16-sym/float")[i % 2]),
    "quantised pivot": ("llama-bias", lambda i: ("pivot:int8", "pivot:int8-sym")[i % 2]),
    "residual": ("llama", lambda i: ("residual:int4-g32/int8", "residual:int2-g32/float")[i % 2]),
    "everything": (
        "qwen2",
        lambda i: (None, "pair", "pivot", "dense:int4-g32", "pair:int8-g16", "pivot:int8", "residual:int4-g32/int8")[
            (i * 5 + i // 7) % 7
        ],
    ),
    "shared": ("llama", "share"),
    "split": ("phi3", lambda i: ("pair", "pivot", None)[i % 3] if i < 14 else None),
}
OTHERS = ["gemma", "gemma3_text", "olmo2", "cohere", "glm", "granite", "smollm3", "starcoder2"]
PLANS |= {f"family {name}": (name, lambda i: ("pair", "pivot", None)[i % 3]) for name in OTHERS}


def dense_model(family, seed=0):
    """Biases, norms and everything else random, too."""
    kind, settings = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:
                    p.add_(torch.randn_like(p) * 0.1)
            if family.startswith("gemma"):  # scales embeddings up, so that every token would be followed by itself
                model.model.embed_tokens.weight.mul_(0.1)
    return model.eval()


def linears(model):
    """Paths of the linear layers in the blocks, in order."""
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in path]


def planned_model(name):
    """The model of a kind of plan; ranks differ by layer."""
    family, form_of = PLANS[name]
    model = dense_model(family)
    if family == "phi3":
        model_splits(model)
    if form_of == "share":
        share(model)
    else:
        for number, path in enumerate(linears(model)):
            form = form_of(number)
            if form is not None:
                compress(model, path, form, 16 * (2 + number % 3))
    mark_model(model)
    return model


def model_splits(model):
    """Store q, k, v and gate, up of Phi-3 each by itself, but for the last block."""
    for block in model.model.layers[:-1]:
        split_linears(block, {"self_attn.qkv_proj": [128, 64, 64], "mlp.gate_up_proj": [192, 192]})


def truncated(weight, rank):
    u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return s[:rank, None] * v[:rank], u[:, :rank]


def compress(model, path, form, rank):
    """Replace one layer by its truncation, rounded to the nearest where the form says so."""
    old = model.get_submodule(path)
    base = form.partition(":")[0]
    if base == "dense":
        new = layer_form(form).nearest(old, torch.float32)
    elif base in ("pair", "pivot"):
        replace_linears(model, [((path,), truncated(old.weight, rank)[1])], truncated(old.weight, rank)[0], base)
        new = model.get_submodule(path)
        new = new if form == base else layer_form(form).nearest(new, torch.float32)
    else:
        start = ResidualLinear(old.in_features, old.out_features, rank)
        rounded = layer_form("dense:" + form.partition(":")[2].partition("/")[0]).nearest(old, torch.float32)
        a, b = truncated(old.weight - rounded.weight, rank)
        start.base.weight.data, start.A.weight.data, start.B.weight.data = old.weight.data, a.float(), b.float()
        new = layer_form(form).nearest(start, torch.float32)
    bias = None if old.bias is None else old.bias.detach().clone()
    if hasattr(new, "set_bias"):
        new.set_bias(bias)
    else:
        new.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    model.set_submodule(path, new)


def share(model):
    """Give q, k, v one factor A in each block, and gate of all blocks one."""
    groups = [[f"model.layers.{i}.self_attn.{x}_proj" for x in "qkv"] for i in range(3)]
    groups.append([f"model.layers.{i}.mlp.gate_proj" for i in range(3)])
    for paths in groups:
        weights = [model.get_submodule(path).weight for path in paths]
        a, b = truncated(torch.cat(list(weights)), 64)
        members = [((path,), part) for path, part in zip(paths, b.split([len(w) for w in weights]), strict=True)]
        replace_linears(model, members, a)


def save(name, folder):
    model = planned_model(name)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, byte_tokenizer(), folder, "5GB")
    return folder
