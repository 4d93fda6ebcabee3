"""Models exported to ONNX compute what transformers computes, whatever their layers are stored as."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import slimrank
from architectures import UNUSUAL, random_model
from helpers import byte_tokenizer, save_tiny, tiny_model
from slimrank.cli import main
from slimrank.errors import ModelError, OutputError
from slimrank.exporting.api import export
from slimrank.exporting.cached_step import cached_step
from slimrank.exporting.check import difference
from slimrank.exporting.onnx.blocks import own_blocks, rounded
from slimrank.exporting.onnx.graph import graph_of
from slimrank.exporting.onnx.in_memory import InMemoryModel
from slimrank.exporting.onnx.runner import OnnxModel
from slimrank.exporting.openvino.few_bits import FOR_PIVOTS
from slimrank.layers.quantized import quantized_layers

pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")

PROMPTS = torch.randint(250, (2, 20), generator=torch.Generator().manual_seed(3))  # longer than the windows of models
NEW = 12
compress = partial(slimrank.compress, tokenizer=byte_tokenizer(), evaluation=None)
to_onnx = partial(export, to="onnx")


def greedy(model):
    """What transformers generates, without an end."""
    model.generation_config.eos_token_id = None
    return model.generate(PROMPTS, max_new_tokens=NEW, do_sample=False, pad_token_id=0).numpy()


def runner_of(model):
    return InMemoryModel(graph_of(cached_step(model)))


def check(model):
    """Logits and generation are those of the model, with padding and without."""
    runner = runner_of(model)
    assert all(difference(runner, model, padded) < 1e-5 for padded in (False, True))
    assert np.array_equal(runner.generate(PROMPTS, NEW), greedy(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3", "gpt2", "opt", "phi3"])
def test_architectures(name):
    check(random_model(name))


def test_a_cache_whose_keys_are_wider_than_its_values():
    if "minicpm3" not in UNUSUAL:
        pytest.skip("this transformers has no such model")
    check(random_model("minicpm3"))


@pytest.mark.parametrize("name, form", [("llama", "pair"), ("llama", "pivot"), ("gpt2", "pair")])
def test_compressed(name, form):
    model = random_model(name)
    compress(model, keep_ratio=0.7, method="svd", form=form)
    check(model)


def test_beams_and_padding():
    model = random_model("llama")
    runner = runner_of(model)
    first, last = PROMPTS[:, :10], PROMPTS[:, 10:12]
    mask = torch.ones_like(first)
    mask[0, :4] = 0
    runner.step(first, mask)
    found = runner.step(last, beams=[1, 1])
    whole = torch.cat([first[1:].expand(2, -1), last], 1)
    with torch.no_grad():
        expected = model(input_ids=whole).logits[:, -2:].numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    alone = runner.generate(first[:1, 4:], 6)
    padded = runner.generate(first, 6, mask)
    assert np.array_equal(padded[0, 4:], alone[0])


# weights --------------------------------------------------------------------------------------------------------


WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("wide") / "wide", **WIDE)


@pytest.mark.parametrize(
    "weights, kinds, most",
    [("float32", {"f32"}, 1e-5), ("float16", {"f16"}, 5e-3), ("int8", {"u8"}, 0.1), ("int4", {"u4", "u8"}, 0.5)],
)
def test_weights(wide, tmp_path, weights, kinds, most):
    record = to_onnx(wide, tmp_path / "out", weights=weights)
    assert set(record.numbers) == kinds
    assert record.difference["graph"] < 1e-5
    assert record.difference["written"] < most
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == record.plain()
    assert record.wide == {}
    bytes_each = {"f32": 4, "f16": 2, "u8": 1.125, "u4": 0.625}  # with a scale of 4 bytes for 32 numbers
    least = sum(count * bytes_each[kind] for kind, count in record.numbers.items())
    graph = (tmp_path / "out" / "model.onnx").stat().st_size
    assert least <= record.bytes <= 1.2 * least + graph
    model, _ = slimrank.load(wide, dtype="float32")
    found = OnnxModel(tmp_path / "out").step(PROMPTS)
    expected = model(input_ids=PROMPTS).logits.detach().numpy()
    assert np.abs(found - expected).max() < most * np.abs(expected).max()


@pytest.mark.parametrize("bits, most", [(4, 1 / 8), (8, 1 / 128)])
@pytest.mark.parametrize("columns", [64, 40])
def test_rounding_is_to_the_nearest(bits, most, columns):
    weight = np.random.default_rng(0).standard_normal((6, columns)).astype(np.float32)
    weight[2] = 0
    blocks = rounded(weight, bits)
    step = np.abs(blocks.scales).repeat(32, 1)[:, :columns]
    error = np.abs(blocks.numbers() - weight)
    assert np.all(error <= step * 1.001)  # the largest number of the other sign may be clipped by one
    assert np.mean(error <= step * 0.501) > 0.97
    assert np.abs(blocks.scales[:2]).max() <= np.abs(weight).max() * most * 1.001
    assert np.array_equal(blocks.numbers()[2], weight[2])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 40, 72])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_engine_reads_blocks_as_we_do(bits, columns, zeros):
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    blocks = rounded(rng.standard_normal((50, columns)).astype(np.float32), bits)
    if zeros:
        points = rng.integers(0, 2**bits, blocks.scales.shape).astype(np.uint8)
        blocks = replace(blocks, zeros=points)
    tensors = {"codes": blocks.packed(), "scales": blocks.scales} | ({"zeros": blocks.packed_zeros()} if zeros else {})
    sizes = {"N": 50, "K": columns, "bits": bits, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", **sizes)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    weights = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph([node], "product", ports[:1], ports[1:], weights)
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.standard_normal((7, columns)).astype(np.float32)
    expected = x @ blocks.numbers().T
    assert np.abs(session.run(None, {"x": x})[0] - expected).max() < 1e-5 * np.abs(expected).max()


def test_four_bits_leave_pivot_layers_in_eight(wide, tmp_path):
    compress(str(wide), keep_ratio=0.7, method="svd", form="pivot", out=tmp_path / "pivot")
    record = to_onnx(tmp_path / "pivot", tmp_path / "out", weights="int4")
    assert record.wide[FOR_PIVOTS] == 2 * 7
    assert set(record.numbers) == {"u8"}
    assert record.difference["written"] < 0.2


def test_a_tied_head_shares_the_integers_of_the_embedding(tmp_path):
    folder = save_tiny(tmp_path / "tied", **WIDE, tie_word_embeddings=True)
    record = to_onnx(folder, tmp_path / "out", weights="int8")
    model, _ = slimrank.load(folder)
    assert record.numbers == {"u8": sum(p.numel() for p in model.parameters() if p.dim() > 1)}
    assert record.difference["written"] < 0.1


def test_linear_layers_with_their_bias_inside_the_product(tmp_path):
    model = random_model("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    record = to_onnx(tmp_path / "gpt2", tmp_path / "out", weights="int8")
    assert set(record.numbers) == {"u8"}
    assert record.difference["written"] < 0.1


def test_weights_of_16_bits_are_written_in_16(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    byte_tokenizer().save_pretrained(tmp_path / "half")
    record = to_onnx(tmp_path / "half", tmp_path / "out")
    assert record.weights == "float16"
    assert record.difference["written"] < 1e-5  # float16 holds these numbers of bfloat16


@pytest.fixture(scope="module")
def integers(tmp_path_factory):
    """A folder whose layers slimrank has quantised, by their scheme."""
    pytest.importorskip("compressed_tensors")
    made = {}

    def get(quantize):
        if quantize not in made:
            made[quantize] = tmp_path_factory.mktemp("quantised") / quantize
            settings = {"keep_ratio": 0.8, "quantize": quantize, "rank_multiple": 16, "samples": 4, "seq_len": 16}
            compress(tiny_model(**WIDE), method="svd_llm", out=made[quantize], **settings)
        return made[quantize]

    return get


@pytest.mark.parametrize("quantize, kind", [("int8", "u8"), ("int4-g16", "u4"), ("int3-g16-sym", "u4")])
def test_integers_of_slimrank_stay_as_they_are(integers, quantize, kind, tmp_path):
    model, _ = slimrank.load(integers(quantize), dtype="float32")
    layers = quantized_layers(model)
    for layer in layers.values():
        assert np.allclose(own_blocks(layer).numbers(), layer.weight.detach().numpy(), atol=1e-6)
    record = to_onnx(integers(quantize), tmp_path / "out", weights="int8")
    assert record.own_integers == len(layers)
    assert record.numbers[kind] >= sum(layer.weight.numel() for layer in layers.values())
    assert record.difference["written"] < 0.1
    assert not record.wide


def test_integers_that_become_numbers_again_are_noted(integers, tmp_path):
    record = to_onnx(integers("int4-g16"), tmp_path / "out", weights="float32")
    assert any("--weights int8 or int4 keeps them" in note for note in record.notes)
    assert record.difference["written"] < 1e-5
    record = to_onnx(integers("int4-g8"), tmp_path / "other", weights="int4")
    assert record.own_integers == 0
    assert any("16 does not divide" in note for note in record.notes)
    assert {"f32", "u8"} == set(record.numbers)


# the folder -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    to_onnx(save_tiny(folder / "tiny"), folder / "out")
    return folder


def test_the_folder_is_one_of_the_native_architecture(exported):
    config = json.loads((exported / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    names = {path.name for path in (exported / "out").iterdir()}
    assert {"model.onnx", "model.onnx_data", "tokenizer.json", "generation_config.json"} <= names
    assert {"export.json", "slimrank.json"} <= names


def test_names_and_sizes_are_those_that_others_expect(exported):
    session = OnnxModel(exported / "out", threads=1).session
    inputs = {port.name: port.shape for port in session.get_inputs()}
    assert inputs["input_ids"] == ["batch", "tokens"]
    assert inputs["attention_mask"] == ["batch", "total"]
    assert inputs["position_ids"] == ["batch", "tokens"]
    batch, heads, past, width = inputs["past_key_values.0.key"]
    assert (batch, past) == ("batch", "past")
    assert isinstance(heads, int)
    assert isinstance(width, int)
    assert [port.name for port in session.get_outputs()][:3] == ["logits", "present.0.key", "present.0.value"]


def test_the_file_says_nothing_of_the_machine_that_wrote_it(exported):
    content = (exported / "out" / "model.onnx").read_bytes()
    assert not [part for part in (b".py", b"site-packages", b"transformers") if part in content]


def test_generation_ends_at_the_end(exported):
    runner = OnnxModel(exported / "out")
    assert runner.stops == {257}
    runner.stops = frozenset()
    long = runner.generate(PROMPTS[:1], NEW)[0]
    runner.stops = frozenset([int(long[23])])
    short = runner.generate(PROMPTS[:1], NEW)[0]
    end = list(long[20:]).index(long[23]) + 21
    assert np.array_equal(short, long[:end])


def test_an_output_folder_in_use(exported):
    with pytest.raises(OutputError, match="exists"):
        to_onnx(exported / "tiny", exported / "out")


def test_an_interrupt_leaves_nothing(tiny_folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("slimrank.exporting.api.write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        to_onnx(tiny_folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_the_exporter_does_not_take_is_refused(tiny_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("step 1 of 3") from ValueError("no such operation\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be exported: .*no such operation"):
        to_onnx(tiny_folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_command(tiny_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tiny_folder), "--to", "onnx", "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert not stopped.value.code
    assert "logits differ" in shown
    assert "for ONNX Runtime" in shown
