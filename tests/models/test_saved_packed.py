"""Models that are saved packed: they load packed, with slimrank and without, and every tool takes the folder."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import slimrank
from helpers import byte_tokenizer, save_tiny, text, tiny_model
from slimrank.layers.base import compressed_layers
from slimrank.layers.packed import is_joined
from slimrank.models import memory_layout
from slimrank.serving.plan import ServedPlan

IDS = torch.arange(24).reshape(2, 12) % 40 + 30
OPTIONS = {"keep_ratio": 0.6, "method": "svd", "evaluation": None}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def compressed(form="pair", name="llama", **options):
    return slimrank.compress(tiny_model(name), form=form, **{**OPTIONS, **options}).model.eval()


def joined(model):
    return [path for path, layer in compressed_layers(model).items() if is_joined(layer)]


def about(folder):
    return json.loads((folder / "config.json").read_text())["slimrank"]


def by_columns(model):
    return [name for name, weight in model.named_parameters() if not weight.is_contiguous()]


@pytest.fixture
def columns_win(monkeypatch):
    monkeypatch.setattr(memory_layout, "layer_seconds", lambda layers, x: [1.0, 0.5])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "out"
    slimrank.compress(tiny_model(), byte_tokenizer(), form="pair", packed=True, out=path, **OPTIONS)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text(2000))
    return str(path)


@pytest.mark.parametrize("form", ["pair", "pivot"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_it_loads_packed_and_computes_the_same(form, name, tmp_path, columns_win):
    model = compressed(form, name)
    before = logits(model)
    slimrank.pack(model)
    model.save_pretrained(tmp_path / "one")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info.values())
    assert joined(loaded) == joined(model) != []
    assert by_columns(loaded) == by_columns(model) != []
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "two")
    assert about(tmp_path / "two") == about(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert joined(again) == joined(model)
    assert torch.equal(logits(again), logits(loaded))


def test_first_factors_are_really_one_product_after_loading(folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows, own = [], torch.nn.functional.linear
    monkeypatch.setattr("slimrank.layers.packed.linear", lambda x, w: rows.append(len(w)) or own(x, w))
    logits(model)
    groups = about(folder)["transforms"][-1]["groups"]
    layers = compressed_layers(model)
    assert rows == [sum(layers[path].rank for path in paths) for paths in groups]
    assert len(groups) == 2 * len(model.model.layers)


def test_it_loads_packed_without_slimrank(folder, tmp_path):
    torch.save(logits(AutoModelForCausalLM.from_pretrained(folder)), tmp_path / "expected.pt")
    program = f"""
import sys
sys.modules["slimrank"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
assert "forward" in vars(model.model.layers[0].self_attn.q_proj)
ids = torch.arange(24).reshape(2, 12) % 40 + 30
with torch.no_grad():
    logits = model(input_ids=ids).logits
assert torch.equal(logits, torch.load("{tmp_path}/expected.pt"))
model.save_pretrained("{tmp_path}/again")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert joined(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    files = {path.name for path in folder.glob("*.py")}
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == files
    assert {"packed.py", "packed_model.py", "low_rank.py", "pivot.py"} <= files


def test_compress_says_that_it_packed(folder):
    notes = json.loads((folder / "report.json").read_text())["notes"]
    assert "packed: 6 groups of layers of the same inputs have one first product" in notes
    assert about(folder)["format"] == 5


def test_nothing_to_pack_is_said():
    result = slimrank.compress(tiny_model(), packed=True, ranks={"*": "dense"}, **{**OPTIONS, "keep_ratio": 1.0})
    assert any(note.startswith("packed: 0 groups") for note in result.report["notes"])
    assert not joined(result.model)


def test_unpacking_is_saved_as_well(tmp_path, columns_win):
    model = compressed()
    model.save_pretrained(tmp_path / "before")
    slimrank.pack(model)
    slimrank.unpack(model)
    model.save_pretrained(tmp_path / "after")
    assert about(tmp_path / "after") == about(tmp_path / "before")
    assert about(tmp_path / "after")["format"] == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert not joined(loaded)
    assert not by_columns(loaded)


def test_the_order_in_memory_is_for_the_dtype_that_was_measured(tmp_path, columns_win):
    model = compressed()
    slimrank.pack(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert joined(loaded)
    assert not by_columns(loaded)


def test_layers_that_share_their_first_factor_are_computed_by_themselves(words, tmp_path):
    text_options = {"calibration": words, "seq_len": 16, "samples": 4}
    result = slimrank.compress(
        tiny_model(), byte_tokenizer(), packed=True, **{**OPTIONS, "method": "basis_sharing"}, **text_options
    )
    layers = result.model.config.slimrank["layers"]
    shared = {path for path, layer in layers.items() if "share" in layer}
    shared |= {layers[path]["share"] for path in shared}
    assert shared
    assert not shared & set(joined(result.model))
    result.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(result.model), rtol=0, atol=1e-5)


def test_layers_of_few_bits_are_computed_by_themselves(tmp_path):
    result = slimrank.compress(
        tiny_model(), byte_tokenizer(), quantize="int8", quantize_options={"rounding": "nearest"}, packed=True,
        out=tmp_path / "out", **OPTIONS,
    )  # fmt: skip
    assert any(note.startswith("packed: 0 groups") for note in result.report["notes"])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(result.model))


@pytest.mark.parametrize(
    "paths",
    [
        ["model.layers.0.self_attn.q_proj", "model.layers.9.self_attn.q_proj"],
        ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"],
        ["model.embed_tokens", "model.layers.0.mlp.up_proj"],
    ],
)
def test_groups_that_cannot_be_are_refused(folder, tmp_path, paths):
    content = json.loads((folder / "config.json").read_text())
    content["slimrank"]["transforms"][-1]["groups"] = [paths]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{paths[0]}.* cannot be computed together"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# what others do to a packed model -------------------------------------------------------------------------------------


def test_adapters_on_packed_layers_count(folder):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["A", "B"], r=2, init_lora_weights=False))
    adapted = logits(model)
    assert not torch.allclose(adapted, before, atol=1e-3)
    largest = float(adapted.abs().max())  # random adapters are as large as the weights
    torch.testing.assert_close(logits(model.merge_and_unload()), adapted, rtol=0, atol=1e-5 * largest)


def test_hooks_on_first_factors_are_called(folder):
    model, seen = AutoModelForCausalLM.from_pretrained(folder), []
    logits(model)
    layer = compressed_layers(model)["model.layers.0.self_attn.k_proj"]
    layer.A.register_forward_hook(lambda part, args, output: seen.append(output.shape))
    logits(model)
    assert seen == [(*IDS.shape, layer.rank)]


def test_other_weights_that_are_loaded_into_it_count():
    model = compressed("pivot")
    expected = compressed("pivot")
    slimrank.pack(model)
    layer = compressed_layers(expected)["model.layers.0.self_attn.q_proj"]
    layer.order = layer.order.flip(0)
    model.load_state_dict(expected.state_dict())
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)


def test_a_layer_whose_call_another_library_replaced_is_left_alone():
    model = compressed()
    layer, calls = compressed_layers(model)["model.layers.0.self_attn.q_proj"], []
    own = layer.forward
    layer.forward = lambda x: calls.append(1) or own(x)
    slimrank.pack(model)
    logits(model)
    slimrank.unpack(model)
    logits(model)
    assert len(calls) >= 2
    assert not is_joined(layer)


def test_weights_that_are_offloaded_are_fetched(folder):
    accelerate = pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert compressed_layers(model)["model.layers.0.self_attn.q_proj"].A.weight.is_meta
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_quantisers_of_others_leave_layers_alone(folder):
    pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    before = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert not joined(model)
    assert float((logits(model).float() - before).norm() / before.norm()) < 0.1


# tools ----------------------------------------------------------------------------------------------------------------


def test_engines_take_its_layers_as_they_are_stored(folder):
    assert set(ServedPlan.read(about(folder)).layers) == set(about(folder)["layers"])


def test_it_is_evaluated_as_the_unpacked_one(folder):
    model, plain = (slimrank.load(folder)[0] for _ in range(2))
    slimrank.unpack(plain)
    assert joined(model)
    windows = torch.arange(64).reshape(2, 32) % 200
    found, expected = (slimrank.perplexity(each, windows).perplexity for each in (model, plain))
    assert found == pytest.approx(expected, rel=1e-5)


def test_it_recovers_and_stays_packed(folder, original, words, tmp_path):
    options = {"tokens": 480, "batch_size": 4, "checks": 2, "held_out": 4}
    slimrank.recover(folder, original, out=tmp_path / "out", text=words, evaluation=(), seq_len=24, options=options)
    assert joined(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.layers.0.mlp.up_proj.A.weight"], after["model.layers.0.mlp.up_proj.A.weight"])


def test_corrections_are_those_of_the_unpacked_one(folder, original, words, tmp_path):
    model, tokenizer = slimrank.load(folder)
    slimrank.unpack(model)
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    found = []
    for number, place in enumerate((folder, tmp_path / "plain")):
        out = tmp_path / str(number)
        slimrank.correct(place, original, out=out, rank=2, calibration=words, evaluation=(), samples=4, seq_len=16)
        found.append(load_file(next(out.glob("adapter*.safetensors"))))
    packed, plain = found
    assert packed.keys() == plain.keys()
    for name in packed:
        torch.testing.assert_close(packed[name], plain[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_exported(folder, packed, tmp_path):
    pytest.importorskip("openvino")
    record = slimrank.export(folder, tmp_path / "out", packed=packed)
    assert record.difference["written"] < 1e-4
    assert any("saved packed; its layers are exported by themselves" in note for note in record.notes) != packed
