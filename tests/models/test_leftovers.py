"""Every tensor of a checkpoint is used, named as harmless, or an error."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import slimrank
from architectures import random_model
from helpers import byte_tokenizer, save_tiny, tiny_model
from slimrank.errors import ModelError
from slimrank.models.load import load, load_model
from slimrank.progress import Progress


def with_weights(folder, **more):
    """A tiny checkpoint with further weights in its file."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **{name: torch.ones(2) for name in more}}, path, {"format": "pt"})
    return folder


def added(folder, *names):
    return with_weights(folder, **dict.fromkeys(names))


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "name",
    [
        "score.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.up_proj.lora_A.weight",
        "model.layers.0.mlp.up_proj.weight_scale_inv",
        "vision_tower.patches.weight",
        "encoder.layers.0.weight",
    ],
)
def test_a_weight_without_a_place_is_an_error(tmp_path, name):
    with pytest.raises(ModelError, match=rf"holds 1 weights that LlamaForCausalLM has no place for, e.g. '{name}'"):
        load(added(save_tiny(tmp_path), name))


def test_layers_that_the_configuration_does_not_count(tmp_path):
    edit(save_tiny(tmp_path), num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"holds 9 weights .* 'model\.layers\.2.*counts 2 layers"):
        load(tmp_path)


LEFT_OVER = {
    "llama": [
        *(
            f"model.layers.0.self_attn.{name}"
            for name in ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "_extra_state")
        ),
        "rope.freqs",
    ],
    "gpt2": ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "h.1.attn.masked_bias"],
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_leftovers_of_old_checkpoints_are_harmless_and_named(tmp_path, name):
    told = []
    progress = Progress()
    progress.note = told.append
    notes = load_model(added(save_tiny(tmp_path, name), *LEFT_OVER[name]), progress=progress).notes
    assert told == notes
    assert re.match(rf"left out: {len(LEFT_OVER[name])} weights, which the model computes itself: ", notes[0])
    assert LEFT_OVER[name][0].rpartition("h.0")[2] in notes[0]


def test_they_are_in_the_report(tmp_path):
    folder = added(save_tiny(tmp_path), "model.layers.0.self_attn.rotary_emb.inv_freq")
    report = slimrank.compress(folder, keep_ratio=0.7, method="svd", evaluation=None).report
    assert any("inv_freq" in note for note in report["notes"])


@pytest.mark.parametrize(
    "names, fields",
    [
        (["mtp.layers.0.mlp.up_proj.weight"], {}),
        (["model.layers.3.eh_proj.weight", "model.layers.3.mlp.up_proj.weight"], {"num_nextn_predict_layers": 1}),
    ],
)
def test_draft_heads_are_named(tmp_path, names, fields):
    edit(added(save_tiny(tmp_path), *names), **fields)
    notes = load_model(tmp_path).notes
    assert len(notes) == 1
    assert f"{len(names)} weights, a draft head" in notes[0]


def test_what_a_class_declares_as_negligible_is_named_but_no_layer_of_its_own(tmp_path):
    model = random_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    added(tmp_path, "model.layers.61.mlp.up_proj.weight")  # struck out by transformers itself
    edit(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(ModelError, match=r"'model\.layers\.61"):
        load(tmp_path)
    edit(tmp_path, num_nextn_predict_layers=1)
    assert "draft head" in load_model(tmp_path).notes[0]


def test_no_family_has_leftovers(tmp_path):
    """What transformers writes it takes again, whatever it is called in files."""
    for name in ("gpt_oss", "qwen3_moe", "llava", "mamba"):
        folder = tmp_path / name
        random_model(name).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        assert load_model(folder).notes == []


def test_a_head_of_its_own_that_the_configuration_denies(tmp_path):
    head = tiny_model("qwen2").lm_head.weight
    edit(save_tiny(tmp_path / "m", "qwen2"), tie_word_embeddings=True)
    loaded = load_model(tmp_path / "m")
    assert any("a separate head" in note for note in loaded.notes)
    assert torch.equal(loaded.model.lm_head.weight, head)
    slimrank.compress(tmp_path / "m", keep_ratio=0.7, method="svd", evaluation=None, out=tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")[0].lm_head.weight, head)


def test_the_class_is_as_it_was(tmp_path):
    loaded = load(save_tiny(tmp_path))[0]
    assert type(loaded) is transformers.LlamaForCausalLM
    assert not hasattr(loaded, "untaken")
