"""Exported models compute what transformers computes, whatever their layers are stored as."""

import json
from functools import partial

import numpy as np
import pytest
import torch

import slimrank
from architectures import UNUSUAL, random_model
from helpers import byte_tokenizer, save_tiny, tiny_model
from slimrank.budget.rank_plan import RankPlan
from slimrank.cli import main
from slimrank.errors import ModelError, OutputError
from slimrank.exporting.api import export
from slimrank.exporting.cached_step import cached_step
from slimrank.exporting.check import difference
from slimrank.exporting.openvino.few_bits import FOR_GROUPS, FOR_PIVOTS
from slimrank.exporting.openvino.graph import graph_of
from slimrank.exporting.openvino.runner import OpenVinoModel
from slimrank.layers.base import compressed_layers

pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")

PROMPTS = torch.randint(250, (2, 20), generator=torch.Generator().manual_seed(3))  # longer than the windows of models
NEW = 12
compress = partial(slimrank.compress, tokenizer=byte_tokenizer(), evaluation=None)


def greedy(model, **given):
    """What transformers generates, without an end."""
    model.generation_config.eos_token_id = None
    return model.generate(PROMPTS, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **given).numpy()


def check(model, padded=True):
    """Logits and generation are those of the model."""
    graph = graph_of(cached_step(model))
    assert all(difference(OpenVinoModel(graph), model, pad) < 1e-5 for pad in {False, padded})
    assert np.array_equal(OpenVinoModel(graph).generate(PROMPTS, NEW), greedy(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "mistral", "phi3"])
def test_architectures(name):
    check(random_model(name))


@pytest.mark.parametrize("name", ["gemma3n", "gemma4", "minicpm3"])
def test_caches_that_layers_share_or_widen(name):
    if name not in UNUSUAL:
        pytest.skip("this transformers has no such model")
    check(random_model(name), padded=name == "gemma3n")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("form", ["pair", "pivot"])
def test_compressed(name, form):
    model = random_model(name)
    compress(model, keep_ratio=0.7, method="svd", form=form)
    check(model)


def mixed(model):
    """A plan with a dense block, pairs and pivot layers."""
    shapes = {target.path: target.shape for target in slimrank.find_targets(model)}
    forms = {path: (None, "pair", "pivot")[i % 3] if ".0." not in path else None for i, path in enumerate(shapes)}
    ranks = {path: 8 if form else "dense" for path, form in forms.items()}
    named = {path: form for path, form in forms.items() if form}
    return RankPlan.build(ranks, shapes, "by hand", 10**9, widths=dict.fromkeys(shapes, 32), forms=named)


def test_a_mixed_plan():
    model = tiny_model()
    compress(model, plan=mixed(model), method="svd")
    assert {type(layer).__name__ for layer in compressed_layers(model).values()} == {"LowRankLinear", "PivotLinear"}
    check(model)


@pytest.mark.parametrize("name, what", [("mamba", "Linear|no cache|cache of the class"), ("mixtral", "experts")])
def test_what_cannot_be_exported_is_named(name, what):
    with pytest.raises(ModelError, match=what):
        cached_step(random_model(name))


def test_positions_that_depend_on_the_length():
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ModelError, match="'dynamic'"):
        cached_step(model)


def test_beams_and_padding():
    model = random_model("llama")
    runner = OpenVinoModel(graph_of(cached_step(model)))
    first, last = PROMPTS[:, :10], PROMPTS[:, 10:12]
    mask = torch.ones_like(first)
    mask[0, :4] = 0
    runner.step(first, mask)
    found = runner.step(last, beams=[1, 1])
    whole = torch.cat([first[1:].expand(2, -1), last], 1)
    with torch.no_grad():
        expected = model(input_ids=whole).logits[:, -2:].numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    alone = OpenVinoModel(graph_of(cached_step(model))).generate(first[:1, 4:], 6)
    padded = runner.generate(first, 6, mask)
    assert np.array_equal(padded[0, 4:], alone[0])


def test_a_packed_model_computes_the_same_from_pairs(wide, tmp_path):
    compress(str(wide), keep_ratio=0.5, method="svd", form="pivot", out=tmp_path / "pivot")
    plain = export(tmp_path / "pivot", tmp_path / "plain", weights="float32")
    packed = export(tmp_path / "pivot", tmp_path / "packed", weights="float32", packed=True)
    assert packed.difference["written"] < 1e-5
    assert plain.bytes < packed.bytes
    assert any(note.startswith("packed: 21 pivot layers became pairs, and 6 groups") for note in packed.notes)
    runners = [OpenVinoModel(tmp_path / name) for name in ("plain", "packed")]
    assert np.array_equal(*(runner.generate(PROMPTS[:1], NEW) for runner in runners))
    dense = export(wide, tmp_path / "dense", packed=True)
    assert "the model has no compressed layers: nothing is packed" in dense.notes


def test_generation_ends_at_the_end(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    export(folder, tmp_path / "out")
    runner = OpenVinoModel(tmp_path / "out")
    assert runner.stops == {257}
    runner.stops = frozenset()
    long = runner.generate(PROMPTS[:1], NEW)[0]
    runner.stops = frozenset([int(long[23])])
    short = runner.generate(PROMPTS[:1], NEW)[0]
    end = list(long[20:]).index(long[23]) + 21
    assert np.array_equal(short, long[:end])


# weights --------------------------------------------------------------------------------------------------------


WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}  # 64 divides both


@pytest.fixture
def wide(tmp_path):
    """A folder whose layers have groups of 64 columns."""
    return save_tiny(tmp_path / "wide", **WIDE)


@pytest.mark.parametrize(
    "weights, kinds, most", [("float32", {"f32"}, 1e-5), ("float16", {"f16"}, 5e-3), ("int8", {"u8"}, 0.1)]
)
def test_weights(wide, tmp_path, weights, kinds, most):
    if weights == "int8":
        pytest.importorskip("nncf")
    record = export(wide, tmp_path / "out", weights=weights)
    assert set(record.numbers) - {"f32"} == kinds - {"f32"}
    assert sum(count for kind, count in record.numbers.items() if kind in kinds) > 0.95 * sum(record.numbers.values())
    assert record.difference["graph"] < 1e-5
    assert record.difference["written"] < most
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == record.plain()


def test_four_bits_leave_embeddings_pivots_and_odd_widths_in_eight(wide, tmp_path):
    pytest.importorskip("nncf")
    record = export(wide, tmp_path / "dense", weights="int4")
    assert record.wide == {}
    assert {"i4", "u8"} <= set(record.numbers)
    compress(str(wide), keep_ratio=0.7, method="svd", form="pivot", out=tmp_path / "pivot")
    record = export(tmp_path / "pivot", tmp_path / "1", weights="int4")
    assert record.wide[FOR_PIVOTS] == 2 * 21
    assert "i4" not in record.numbers
    assert record.difference["written"] < 0.2
    compress(str(wide), keep_ratio=0.7, method="svd", rank_multiple=1, out=tmp_path / "pair")
    record = export(tmp_path / "pair", tmp_path / "2", weights="int4")
    assert record.wide[FOR_GROUPS] == 21  # the factors B, whose columns are ranks
    assert record.numbers["i4"] > 10_000
    assert any("21 linear layers have 8 bits" in note for note in record.notes)


def test_weights_of_16_bits_are_written_in_16(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    byte_tokenizer().save_pretrained(tmp_path / "half")
    record = export(tmp_path / "half", tmp_path / "out")
    assert record.weights == "float16"
    assert record.difference["written"] < 1e-5  # float16 holds these numbers of bfloat16


def test_numbers_that_float16_cannot_hold(tmp_path):
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "large")
    byte_tokenizer().save_pretrained(tmp_path / "large")
    with pytest.raises(ModelError, match="too large for float16"):
        export(tmp_path / "large", tmp_path / "out", weights="float16")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", ["pair", "pivot", "residual"])
@pytest.mark.parametrize("quantize", ["int8", "int4-g8", "int3-g8-sym", "int8-g8-sym"])
def test_integers_of_slimrank_stay_as_they_are(form, quantize, tmp_path):
    pytest.importorskip("compressed_tensors")
    if form == "residual":
        model = tiny_model()
        shapes = {target.path: target.shape for target in slimrank.find_targets(model)}
        forms = dict.fromkeys(shapes, f"residual:{quantize}/int8")
        ranks, widths = dict.fromkeys(shapes, 8), dict.fromkeys(shapes, 32)
        options = {"plan": RankPlan.build(ranks, shapes, "by hand", 10**9, widths=widths, forms=forms)}
    else:
        model, options = tiny_model(), {"keep_ratio": 0.8, "form": form, "quantize": quantize, "rank_multiple": 8}
    compress(model, method="svd_llm", samples=4, seq_len=16, out=tmp_path / "o", **options)
    record = export(tmp_path / "o", tmp_path / "out", weights="float32")
    assert record.own_integers >= 2 * 21
    assert {"i8", "u8", "i4", "u4"} & set(record.numbers)
    assert record.difference["written"] < 1e-5


@pytest.mark.parametrize("weights", ["float16", "int8", "int4"])
def test_integers_of_slimrank_stay_whatever_the_weights(weights, tmp_path):
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("nncf")
    options = {"keep_ratio": 0.8, "quantize": "int4-g8", "rank_multiple": 8}
    compress(tiny_model(), method="svd_llm", samples=4, seq_len=16, out=tmp_path / "o", **options)
    integers = export(tmp_path / "o", tmp_path / "float", weights="float32").numbers["u4"]
    record = export(tmp_path / "o", tmp_path / "out", weights=weights)
    assert record.numbers["u4"] == integers
    assert record.difference["written"] < 0.05
    assert record.wide == {}


# the folder -----------------------------------------------------------------------------------------------------


def test_the_folder_is_one_of_the_native_architecture(wide, tmp_path):
    compress(str(wide), keep_ratio=0.7, method="svd", out=tmp_path / "small")
    export(tmp_path / "small", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert not {"slimrank", "auto_map"} & set(config)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"openvino_model.xml", "openvino_model.bin", "tokenizer.json", "generation_config.json"} <= names
    assert {"openvino_tokenizer.xml", "openvino_detokenizer.xml", "export.json", "slimrank.json"} <= names


def test_an_output_folder_in_use(tiny_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            export(tiny_folder, tmp_path / "mine", overwrite=overwrite)
    export(tiny_folder, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        export(tiny_folder, tmp_path / "out")
    export(tiny_folder, tmp_path / "out", weights="float16", overwrite=True)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["weights"] == "float16"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ModelError])
def test_what_ends_the_work_leaves_nothing(tiny_folder, tmp_path, monkeypatch, error):
    def stop(*_):
        raise error("stopped")

    monkeypatch.setattr("slimrank.exporting.api.write_manifest", stop)
    with pytest.raises(OutputError if error is OSError else error):
        export(tiny_folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_result_that_computes_something_else_is_refused(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("slimrank.exporting.api.difference", lambda *_: float("nan"))
    with pytest.raises(ModelError, match="computes something else"):
        export(tiny_folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_without_a_form_is_noted(tiny_folder, tmp_path, monkeypatch):
    import openvino_tokenizers

    def never(*_, **__):
        raise RuntimeError("no such tokenizer")

    monkeypatch.setattr(openvino_tokenizers, "convert_tokenizer", never)
    record = export(tiny_folder, tmp_path / "out")
    assert any("no such tokenizer" in note for note in record.notes)
    assert not list((tmp_path / "out").glob("openvino_tokenizer*"))


def test_the_command(tiny_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tiny_folder), "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert not stopped.value.code
    assert "logits differ" in shown
    assert "written to" in shown
    with pytest.raises(SystemExit):
        main(["export", str(tiny_folder), "--out", str(tmp_path / "other"), "--json"])
    assert json.loads(capsys.readouterr().out)["weights"] == "float32"


def test_an_interrupted_command(tiny_folder, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("slimrank.exporting.targets.openvino.graph_of", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tiny_folder), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 130
    assert "nothing was written" in capsys.readouterr().err


def test_openvino_genai_generates_with_it(wide, tmp_path):
    genai = pytest.importorskip("openvino_genai")
    export(wide, tmp_path / "out")
    pipe = genai.LLMPipeline(str(tmp_path / "out"), "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32")
    tokens = genai.TokenizedInputs(_tensor(PROMPTS[:1]), _tensor(torch.ones_like(PROMPTS[:1])))
    found = pipe.generate(tokens, max_new_tokens=NEW, do_sample=False, ignore_eos=True).tokens[0]
    runner = OpenVinoModel(tmp_path / "out")
    runner.stops = frozenset()
    assert list(runner.generate(PROMPTS[:1], NEW)[0, 20:]) == found


def _tensor(values):
    import openvino

    return openvino.Tensor(values.numpy())


@pytest.mark.demo
def test_the_demo_model(tmp_path):
    record = export("demo", tmp_path / "out")
    assert record.weights == "float32"
    assert record.difference["written"] < 1e-3
    model, tokenizer = slimrank.load("demo")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert np.array_equal(OpenVinoModel(tmp_path / "out").generate(ids, NEW), expected.numpy())
