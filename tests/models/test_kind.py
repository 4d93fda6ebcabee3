"""What a checkpoint is, is seen before its weights are read: every command refuses the same models, for the reason."""

import json

import pytest
import torch
import transformers

import slimrank
from helpers import byte_tokenizer, save_tiny, tiny_model
from slimrank.comparison.cells import Cell
from slimrank.comparison.running import compare
from slimrank.doctor import diagnose
from slimrank.errors import ModelError
from slimrank.evaluate.api import benchmark, evaluate
from slimrank.models.load import load, skeleton

SMALL = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "n_embd": 32, "n_layer": 1,
    "emb_dim": 32, "n_layers": 1, "n_heads": 2, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip


def edit(folder, **fields):
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def diagnosed(folder):
    """The doctor tells problems and raises none."""
    problems = diagnose(folder)["problems"]
    if problems:
        raise ModelError(problems[0]["message"], problems[0]["hint"])


def compared(folder):
    text = folder.parent / "text.txt"
    text.write_text("the cat eats a cat. " * 99)
    cell = Cell("half", {"keep_ratio": 0.5, "method": "svd"})
    compare(folder, [cell], folder.parent / "cells", texts=(str(text),), windows=2, seq_len=16)


COMMANDS = {
    "plan": lambda folder: slimrank.preview(folder, keep_ratio=0.8),
    "doctor": diagnosed,
    "compress": lambda folder: slimrank.compress(folder, keep_ratio=0.8, method="svd", evaluation=None),
    "evaluate": lambda folder: evaluate(folder, texts=()),
    "benchmark": lambda folder: benchmark(folder, folder),
}


@pytest.fixture(params=COMMANDS)
def command(request):
    return COMMANDS[request.param]


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """A model whose code leaves a file behind when it runs; whoever asks a question fails."""

    def asked(*_):
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    folder, ran = save_tiny(tmp_path / "custom"), tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(
            code + "class C(LlamaConfig): model_type = 'own'\nclass M(LlamaForCausalLM): pass\n"
        )
    yield folder
    assert not ran.exists()


OWN = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}


def test_code_of_its_own_is_never_run(custom, command):
    edit(custom, model_type="own", auto_map=OWN)
    with pytest.raises(ModelError, match="custom code, which slimrank never runs"):
        command(custom)


def test_compare_does_not_run_it_either(custom, in_this_process):
    edit(custom, model_type="own", auto_map=OWN)
    with pytest.raises(ModelError, match="custom code"):
        compared(custom)


def test_a_class_of_its_own_for_a_known_type_is_refused(custom):
    edit(custom, architectures=["MyLlama"], auto_map=OWN)
    with pytest.raises(ModelError, match=r"MyLlama.*custom code"):
        skeleton(custom)


def test_what_transformers_has_itself_is_taken_from_there(custom):
    edit(custom, auto_map=OWN)
    assert type(load(custom)[0]) is transformers.LlamaForCausalLM
    assert type(skeleton(custom).model) is transformers.LlamaForCausalLM


def test_names_of_the_hub_may_differ_in_capitals(custom):
    """MPTForCausalLM of the hub is MptForCausalLM in transformers."""
    edit(custom, architectures=["LLaMAForCausalLM"], auto_map=OWN)
    assert type(load(custom)[0]) is transformers.LlamaForCausalLM


def test_a_tokenizer_of_its_own_is_refused(custom):
    path = custom / "tokenizer_config.json"
    about = {**json.loads(path.read_text()), "tokenizer_class": "OwnTokenizer"}
    about["auto_map"] = {"AutoTokenizer": ["tokenization_own.C", None]}
    path.write_text(json.dumps(about))
    with pytest.raises(ModelError, match=r"tokenizer of .* custom code"):
        load(custom)


def test_a_model_of_ours_loads_though_it_carries_code(tmp_path, monkeypatch, text_file):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = save_tiny(tmp_path / "tiny")
    out = tmp_path / "out"
    slimrank.compress(folder, out=out, keep_ratio=0.6, method="svd", evaluation=None, seq_len=16)
    code = out / "modeling_slimrank.py"
    code.write_text("raise SystemExit('the code of the folder was run')\n")
    assert evaluate(out, texts=(str(text_file),), windows=1, seq_len=16)["perplexity"] > 1


@pytest.mark.parametrize("kind", ["Bart", "Whisper", "Marian", "Pegasus", "T5"])
def test_encoder_decoders_are_refused_for_what_they_are(tmp_path, kind):
    getattr(transformers, f"{kind}Config")(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        skeleton(tmp_path)


def test_an_encoder_inside_is_seen(tmp_path):
    text = transformers.Pix2StructTextConfig(vocab_size=259).to_dict()
    transformers.Pix2StructConfig(text_config=text).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        skeleton(tmp_path)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra", "RoFormer", "XLM", "XLNet", "BertGeneration"])
def test_encoders_are_refused_for_what_they_are(tmp_path, kind):
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is an encoder: its tokens see later ones"):
        skeleton(tmp_path)


def test_an_encoder_that_was_trained_as_a_decoder_is_one(tmp_path):
    transformers.BertConfig(**SMALL, is_decoder=True).save_pretrained(tmp_path)
    assert type(skeleton(tmp_path).model) is transformers.BertLMHeadModel


def test_a_decoder_that_looks_both_ways_is_an_encoder(tmp_path):
    transformers.Gemma3TextConfig(**SMALL, use_bidirectional_attention=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is an encoder"):
        skeleton(tmp_path)


def test_every_command_refuses_an_encoder(tmp_path, command):
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is an encoder"):
        command(tmp_path)


def test_a_loaded_encoder_is_refused_too():
    model = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL))
    with pytest.raises(ModelError, match="is an encoder"):
        slimrank.compress(model, byte_tokenizer(), keep_ratio=0.8, method="svd", evaluation=None)


def test_a_model_of_another_task_is_refused(tmp_path, command):
    base = tiny_model()
    model = transformers.LlamaForSequenceClassification(base.config)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification.* another task"):
        command(tmp_path)


def test_the_bare_decoder_of_tied_embeddings_is_taken(tmp_path):
    model = tiny_model()
    model.model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaModel"]
    loaded, ids = load(tmp_path)[0], torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# of several classes, the one that the configuration names -------------------------------------------------------------


def images_and_text(**changes):
    text = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, **changes)


@pytest.mark.parametrize("named", [["Gemma3ForConditionalGeneration"], None])
def test_the_vision_tower_stays(tmp_path, named):
    model = transformers.Gemma3ForConditionalGeneration(images_and_text())
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    edit(tmp_path, architectures=named)
    loaded = load(tmp_path)[0]
    assert type(loaded) is type(skeleton(tmp_path).model) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_a_class_that_cannot_do_without_images_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    def forward(self, pixel_values, input_ids=None, **_):
        raise AssertionError("not reached")

    monkeypatch.setattr(transformers.Gemma3ForConditionalGeneration, "forward", forward)
    images_and_text(architectures=["Gemma3ForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot compute text without images"):
        skeleton(tmp_path)


def test_llama_4_keeps_its_vision_tower_or_is_refused(tmp_path):
    """Its class for images and text is the one that is published; that for text alone would drop the tower."""
    text = {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size_mlp": 32, "num_local_experts": 2}
    vision = {"hidden_size": 32, "num_hidden_layers": 1}
    config = transformers.Llama4Config(text_config=text, vision_config=vision, pad_token_id=258)
    config.save_pretrained(tmp_path)
    refused = ""
    try:
        names = list(skeleton(tmp_path).model.state_dict())
    except ModelError as error:  # in some versions it cannot compute without images
        names, refused = [], error.message
    assert "without images" in refused or any("vision" in name for name in names)


def test_kernels_of_other_packages_are_not_needed(tmp_path):
    folder = edit(save_tiny(tmp_path / "m"), _attn_implementation="flash_attention_2")
    read = skeleton(folder)
    assert read.notes == ["config.json asks for attention by 'flash_attention_2'; PyTorch's own is used"]
    assert load(folder)[0].config._attn_implementation == "sdpa"
