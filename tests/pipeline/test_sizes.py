"""Every tensor counts in its own dtype: what is written never exceeds max_bytes, and plan tells it beforehand."""

import pytest
import torch
from torch import nn

import slimrank
from architectures import random_model
from helpers import byte_tokenizer, save_tiny, tiny_model
from slimrank.models.load import load, skeleton
from slimrank.models.storage import saved_bytes, saved_tensors, stored_dtype

BF16, FLOAT = torch.bfloat16, torch.float32


def mixed(linears, others, name="llama"):
    """A tiny model whose linear layers have another dtype than all that is around them."""
    model = tiny_model(name)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            p.data = p.data.to(linears if isinstance(module, nn.Linear) else others)
    return model


def written(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


CHEAP = {"method": "svd", "evaluation": None, "seq_len": 16}


@pytest.mark.parametrize("form", ["pair", "pivot"])
@pytest.mark.parametrize("linears, others", [(BF16, FLOAT), (FLOAT, BF16)])
def test_mixed_dtypes_stay_under_max_bytes(tmp_path, linears, others, form):
    whole = saved_bytes(mixed(linears, others, "qwen2"))
    limit = int(0.85 * whole)
    report = slimrank.compress(
        mixed(linears, others, "qwen2"),
        byte_tokenizer(),
        max_bytes=limit,
        out=tmp_path / "out",
        form=form,
        **CHEAP,
    ).report
    assert report["size"]["bytes_before"] == whole
    assert 0.8 * limit < report["size"]["bytes_after"] == written(tmp_path / "out") <= limit


def test_linears_of_several_dtypes_stay_under_it_too(tmp_path):
    model = tiny_model("qwen2")
    model.model.layers[1].to(BF16)
    limit = int(0.85 * saved_bytes(model))
    slimrank.compress(model, byte_tokenizer(), max_bytes=limit, out=tmp_path / "out", **CHEAP)
    assert written(tmp_path / "out") <= limit


def test_saved_buffers_count(tmp_path):
    model = tiny_model("qwen2")
    model.model.register_buffer("table", torch.ones(9999))
    model.model.register_buffer("passing", torch.ones(10**6), persistent=False)
    limit = int(0.85 * saved_bytes(model))
    slimrank.compress(model, byte_tokenizer(), max_bytes=limit, out=tmp_path / "out", **CHEAP)
    assert written(tmp_path / "out") <= limit


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "mamba", "gpt_oss"])
def test_the_skeleton_has_the_dtypes_of_the_loaded_model(tmp_path, name, dtype):
    """Some architectures keep a part of theirs in float32, whatever they are loaded in."""
    random_model(name).to(BF16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    bones, loaded = skeleton(tmp_path, dtype).model, load(tmp_path, dtype)[0]
    dtypes = {key: t.dtype for key, t in saved_tensors(loaded).items()}
    assert {key: t.dtype for key, t in saved_tensors(bones).items()} == dtypes
    assert saved_bytes(bones) == saved_bytes(loaded)
    assert stored_dtype(bones) == stored_dtype(loaded)


@pytest.mark.parametrize("form", ["pair", "pivot", "remapped"])
def test_plan_tells_the_same_as_compress(tmp_path, form):
    """DeepSeek-V3 keeps routers and a buffer of theirs in float32."""
    random_model("deepseek_v3").to(BF16).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m")[0]
    assert len({t.dtype for t in saved_tensors(loaded).values()}) > 1
    wanted = {**CHEAP, "max_bytes": int(0.85 * saved_bytes(loaded)) + 30_000, "form": form}
    foretold = slimrank.preview(tmp_path / "m", **wanted)
    done = slimrank.compress(tmp_path / "m", **wanted).report
    saved = slimrank.compress(tmp_path / "m", **wanted, out=tmp_path / "out").report
    assert foretold["size"]["bytes_before"] == done["size"]["bytes_before"] == saved_bytes(loaded)
    assert foretold["size"]["bytes_after"] == done["size"]["bytes_after"] < saved["size"]["bytes_after"]
    assert saved["size"]["bytes_after"] == written(tmp_path / "out") <= wanted["max_bytes"]


def test_most_parameters_say_what_a_model_is_stored_in():
    model = tiny_model()
    model.model.embed_tokens.to(BF16)
    assert stored_dtype(model) == FLOAT
    assert stored_dtype(mixed(BF16, FLOAT, "qwen2")) == BF16


def test_tied_weights_are_written_once(tmp_path):
    model = load(save_tiny(tmp_path))[0]
    assert "lm_head.weight" in model.state_dict()
    assert 0 < written(tmp_path) - saved_bytes(model) < 160 * len(saved_tensors(model))
