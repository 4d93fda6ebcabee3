"""Folders as they are in real life: they load, or the error says what is wrong with them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import slimrank
from architectures import random_model
from helpers import byte_tokenizer, save_tiny, tiny_model
from slimrank.errors import ModelError
from slimrank.models import load as load_module
from slimrank.models.explained import reason_of
from slimrank.models.load import load, load_model, skeleton

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 134\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "m")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs(folder, name):
    if name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{name}' is a pointer of Git LFS"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": {"lm_head.weight": "other.safetensors"}}'])
def test_an_index_beside_a_single_file_is_not_looked_at(folder, content):
    (folder / INDEX).write_text(content)
    assert load(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": []}'])
def test_a_damaged_index(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(content)
    with pytest.raises(ModelError, match="is not an index of weight files"):
        load(folder)


@pytest.mark.parametrize("content", ["[]", '["model_type"]'])
def test_a_configuration_that_is_no_object(folder, content):
    (folder / "config.json").write_text(content)
    for read in (load, skeleton):
        with pytest.raises(ModelError, match=r"its config\.json holds no JSON object"):
            read(folder)


def test_a_damaged_generation_configuration(folder):
    (folder / "generation_config.json").write_text('{"temperature": 0.6,')
    with pytest.raises(ModelError, match=r"the generation configuration of '.*' cannot be loaded: .*not a valid JSON"):
        load(folder)


class Code:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("code ran",)


def test_code_in_a_pickled_file_is_not_run(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"something other than tensors, which slimrank never runs.*\n.*safetensors"):
        load(folder)


def test_a_reason_that_takes_two_lines_is_given_whole(folder):
    two_lines = ValueError("Validation error for field 'num_hidden_layers':\n    TypeError: got 'three'\nmore")
    assert reason_of(two_lines) == "Validation error for field 'num_hidden_layers': TypeError: got 'three'"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": "three"}))
    with pytest.raises(ModelError, match=r"config\.json may be damaged"):
        skeleton(folder)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\xff" * 40])
def test_what_is_no_weight_file(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors' is damaged or cut off"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04K\x01."])
def test_a_damaged_pickle(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(ModelError, match=r"no weights that transformers reads; it holds model\.fp16\.safetensors"):
        load(folder)
    assert skeleton(folder).model.config.num_hidden_layers == 3


@pytest.mark.parametrize("error", [IndexError("i"), TypeError("t"), NotImplementedError(), ImportError("no package")])
def test_whatever_loading_raises_is_explained(folder, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", fail)
    with pytest.raises(ModelError, match=str(error) or "NotImplementedError"):
        load(folder)


def test_want_of_memory_is_not_a_damaged_file(folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", fail)
    with pytest.raises(RuntimeError, match="can't allocate"):
        load(folder)


# adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", [load, skeleton])
def test_an_adapter_beside_a_model(folder, look):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelError, match="holds a model and an adapter"):
        look(folder)


@pytest.mark.parametrize("look", [load, skeleton])
def test_an_adapter_alone(tmp_path, look):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelError, match=r"is an adapter \(LoRA\), not a model"):
        look(tmp_path)


# tokenizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"]])
def test_no_tokenizer(folder, left):
    for name in {"tokenizer.json", "tokenizer_config.json"} - set(left):
        (folder / name).unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer: tokenizer\.json is missing") as raised:
        load(folder)
    assert "tokenizer.json" in raised.value.hint


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"the tokenizer of .* cannot be loaded"):
        load(folder)


def test_more_tokens_than_the_embedding_has(folder):
    assert load_model(folder).notes == []
    tokenizer = byte_tokenizer().__class__.from_pretrained(folder)
    tokenizer.add_tokens(["cat", "dog"])
    tokenizer.save_pretrained(folder)
    note = load_model(folder).notes[0]
    assert note.startswith("the tokenizer has 261 tokens, the model's embedding 259")


# quantised weights ----------------------------------------------------------------------------------------------------


METHODS = [
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"load_in_4bit": True}, {"quant_method": "torchao"},
    {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}, {"bits": 2},
    {"quant_method": "compressed-tensors"}, {"quant_method": "fbgemm_fp8"}, {"quant_algo": "NVFP4"},
]  # fmt: skip


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.mark.parametrize("about", METHODS, ids=str)
def test_quantised_weights_are_refused_by_the_configuration(folder, about):
    edit(folder, quantization_config=about)
    (folder / "model.safetensors").unlink()
    for look in (load, skeleton):
        with pytest.raises(ModelError, match=r"is quantised \(.+\); slimrank compresses dense weights"):
            look(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}}, {"quantization": {"bits": 4}},
        {"dtype": "float8_e4m3fn"}, {"compression_config": {"quant_method": "compressed-tensors"}},
    ],
)  # fmt: skip
def test_wherever_the_configuration_says_it(folder, fields):
    with pytest.raises(ModelError, match="is quantised"):
        skeleton(edit(folder, **fields))


def test_float64_is_not_narrow(tmp_path):
    folder = tmp_path / "m"
    tiny_model().double().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert load(folder)[0].dtype == skeleton(folder).model.dtype == torch.float64


def test_quantised_weights_that_the_configuration_keeps_quiet_about(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for look in (load, skeleton):
        with pytest.raises(ModelError, match=rf"is quantised: '{name}' is stored as I8"):
            look(folder)


def test_a_loaded_model_that_is_quantised_in_part_is_refused_before_any_work():
    model = tiny_model()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        ModelError, match=r"is quantised, e\.g\. 'model\.layers\.0\.mlp\.up_proj\.weight' \(torch\.int8\)"
    ):
        slimrank.compress(model, byte_tokenizer(), keep_ratio=0.7, method="svd", evaluation=None)


@pytest.fixture
def fp8(folder):
    """A tiny checkpoint whose linears are FP8 in blocks of 16 x 16, and what they are when widened."""
    weights, dense = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if "_proj" in name]:
        rows, columns = weights[name].shape
        blocks = weights[name].reshape(rows // 16, 16, columns // 16, 16)
        scale = blocks.abs().amax((1, 3)) / 448
        narrow = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        dense[name] = (narrow.float() * scale[:, None, :, None]).reshape(rows, columns)
        weights |= {name: narrow.reshape(rows, columns), f"{name}_scale_inv": scale}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    about = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    return edit(folder, quantization_config=about), dense


def test_fp8_is_widened_and_says_so(fp8, tmp_path):
    pytest.importorskip("transformers.integrations.finegrained_fp8")  # some versions need triton even to widen
    folder, dense = fp8
    given = (folder / "model.safetensors").stat().st_size
    loaded = load_model(folder)
    assert loaded.file_bytes == given
    assert loaded.notes == [
        f"the model is quantised (fp8), and widened to dense weights; its files take {given:,} bytes"
    ]
    for name, weight in dense.items():
        torch.testing.assert_close(loaded.model.get_parameter(name), weight)
    plan = slimrank.preview(folder, keep_ratio=0.7, method="svd", evaluation=None)
    report = slimrank.compress(folder, keep_ratio=0.7, method="svd", evaluation=None, out=tmp_path / "out").report
    assert report["size"]["bytes_before"] == plan["size"]["bytes_before"] == given < plan["size"]["bytes_loaded"]
    assert loaded.notes[0] in report["notes"]
    assert plan["notes"] == loaded.notes
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())["base_config"]
    assert load(tmp_path / "out")


def test_mxfp4_is_widened(tmp_path):
    pytest.importorskip("transformers.integrations.mxfp4")
    model = random_model("gpt_oss", intermediate_size=32)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        blocks = torch.full((experts, outputs, inputs // 32, 16), 0x22, dtype=torch.uint8)  # 0x2 is 1.0
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:3], 126, dtype=torch.uint8)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    edit(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    loaded = load_model(tmp_path)
    assert "is quantised (mxfp4), and widened to dense weights" in loaded.notes[0]
    assert loaded.model.model.layers[0].mlp.experts.gate_up_proj.unique().tolist() == [0.5]


def test_the_size_of_a_gguf_file_is_told(tmp_path, monkeypatch):
    """What a file holds in 4 bits is not claimed to have been float32."""
    model = tiny_model()
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF" * 25)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: model.config)
    monkeypatch.setattr("slimrank.models.load.load_gguf", lambda *_: (tiny_model(), byte_tokenizer(), []))
    for loaded in (load_model(path), skeleton(path)):
        assert loaded.file_bytes == 100
        assert loaded.notes == ["the model is quantised (GGUF), and widened to dense weights; its files take 100 bytes"]


def test_the_size_of_quantised_files_of_the_hub_is_told(fp8, monkeypatch):
    """A model of the hub, of which the files are in the cache."""
    pytest.importorskip("transformers.integrations.finegrained_fp8")
    folder, _ = fp8
    read = load_module._read

    def from_the_hub(spec, progress):
        return replace(read(folder, progress), folder=None)

    monkeypatch.setattr(load_module, "_read", from_the_hub)
    assert load_model("org/name").file_bytes == (folder / "model.safetensors").stat().st_size
