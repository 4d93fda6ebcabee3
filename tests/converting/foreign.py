"""Tiny models in the layouts that others publish, written here as their repositories write them."""

import json

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import byte_tokenizer, tiny_model

RANKS = {"self_attn.q_proj": 5, "self_attn.o_proj": 7, "mlp.down_proj": 9, "fc1": 6, "attn.c_attn": 0}


class Sequential(nn.Module):
    """Two factors, as LEMS names them."""

    def __init__(self, linear, rank):
        super().__init__()
        self.mod_a, self.mod_b, bias = factors(linear, rank)
        self.bias = bias
        self.dummy_weight = nn.Parameter(torch.empty(1))
        self.weight = self.dummy_weight

    def forward(self, x):
        out = self.mod_b(self.mod_a(x))
        return out if self.bias is None else out + self.bias


class Svd(nn.Module):
    """Two factors, as ASVD names them: B is applied first."""

    def __init__(self, linear, rank):
        super().__init__()
        self.BLinear, self.ALinear, bias = factors(linear, rank)
        if bias is not None:
            self.ALinear.bias = bias

    def forward(self, x):
        return self.ALinear(self.BLinear(x))


def factors(linear, rank):
    u, s, v = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    first = nn.Linear(linear.in_features, rank, bias=False)
    second = nn.Linear(rank, linear.out_features, bias=False)
    first.weight = nn.Parameter((s[:rank, None] * v[:rank]).to(linear.weight.dtype).contiguous())
    second.weight = nn.Parameter(u[:, :rank].to(linear.weight.dtype).contiguous())
    return first, second, linear.bias


def factored(name, kind, **changes):
    """A tiny model with some linear layers of that kind, and their ranks."""
    model, ranks = tiny_model(name, **changes), {}
    for path, module in list(model.named_modules()):
        rank = next((rank for end, rank in RANKS.items() if path.endswith(end)), 0)
        if rank and isinstance(module, nn.Linear):
            model.set_submodule(path, kind(module, rank))
            ranks[path] = rank
    return model, ranks


def logits(model):
    ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


def write_lems(folder, name="llama", base="org/base", **changes):
    """A folder as `save_compressed` of LEMS writes it."""
    model, ranks = factored(name, Sequential, **changes)
    folder.mkdir()
    content = {
        "model_type": "low_rank_compressed", "architectures": ["LowRankCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_low_rank.LowRankConfig",
            "AutoModelForCausalLM": "modeling_low_rank.LowRankCausalLM",
        },
        "base_config": model.config.to_dict(), "base_model_type": model.config.model_type, "base_model_id": base,
        "rank_dict": ranks, "compression_method": "kfac_svd", "target_ratio": 0.8,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    state = {f"wrapped_model.{k}": v.clone() for k, v in model.state_dict().items() if "dummy_weight" not in k}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    byte_tokenizer().save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    for code in ("configuration_low_rank.py", "modeling_low_rank.py"):
        (folder / code).write_text("raise RuntimeError('this code must not run')\n")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/base\n---\n# A model\n")
    return model


def write_asvd(folder, name="opt", shard="5GB", pickled=False, **changes):
    """A folder as the builder of ASVD writes it."""
    model, ranks = factored(name, Svd, **changes)
    byte_tokenizer().save_pretrained(folder)
    if pickled:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        model.generation_config.save_pretrained(folder)
    else:
        model.save_pretrained(folder, max_shard_size=shard)
    kind = model.config.model_type.upper()
    content = {
        **model.config.to_dict(), "truncation_ranks": ranks, "_name_or_path": "facebook/base",
        "architectures": [f"ASVD{kind}ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": f"modeling_asvd.ASVD{kind}ForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "modeling_asvd.py").write_text("raise RuntimeError('this code must not run')\n")
    return model


def loads(folder):
    return AutoModelForCausalLM.from_pretrained(folder)
