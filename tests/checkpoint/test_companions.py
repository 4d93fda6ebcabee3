"""What transformers may refuse to save is found out before any work."""

import json

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import slimrank
from helpers import byte_tokenizer, save_tiny, text, tiny_model
from slimrank.errors import ModelError, OutputError

OPTIONS = {"keep_ratio": 0.6, "method": "svd", "evaluation": None}


@pytest.fixture
def no_work(monkeypatch):
    """Cutting a layer, or anything else that takes long, fails the test."""
    monkeypatch.setattr("slimrank.pipeline.stages.calibrate.decompose", lambda *_: pytest.fail("work began"))


def test_a_generation_configuration_that_transformers_refuses_is_written_as_it_is(tmp_path):
    written = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
    model = tiny_model()
    model.generation_config = GenerationConfig(**written, pad_token_id=258)
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "plain")
    result = slimrank.compress(model, byte_tokenizer(), **OPTIONS, out=tmp_path / "out")
    content = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: content[name] for name in written} == written
    assert content["pad_token_id"] == 258
    assert model.generation_config.temperature == 0.9
    assert ["temperature" in note for note in result.report["notes"]] == [True]
    again = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (again.temperature, again.top_p, again.pad_token_id) == (0.9, 0.6, 258)


def test_a_good_generation_configuration_is_written_as_ever(tmp_path):
    model = tiny_model()
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5)
    model.save_pretrained(tmp_path / "plain")
    result = slimrank.compress(model, byte_tokenizer(), **OPTIONS, out=tmp_path / "out")
    plain, ours = (json.loads((tmp_path / at / "generation_config.json").read_text()) for at in ("plain", "out"))
    assert plain == ours
    assert result.report["notes"] == []


def test_a_configuration_or_tokenizer_that_cannot_be_saved(tmp_path, no_work, monkeypatch):
    model = tiny_model()
    model.config.odd = object()
    with pytest.raises(ModelError, match="the configuration cannot be saved"):
        slimrank.compress(model, byte_tokenizer(), **OPTIONS, out=tmp_path / "out")
    del model.config.odd
    with pytest.raises(ModelError, match=r"the tokenizer cannot be saved: .*save_pretrained"):
        slimrank.compress(model, object(), **OPTIONS, out=tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not list(tmp_path.iterdir())


def test_code_that_a_tokenizer_came_with_and_does_not_need_is_not_named(tmp_path):
    """The file is not in the output, so that loading with trust_remote_code=True would fail."""
    folder = save_tiny(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}))
    result = slimrank.compress(folder, **OPTIONS, out=tmp_path / "out")
    assert ["auto_map" in note for note in result.report["notes"]] == [True]
    assert "auto_map" not in json.loads((tmp_path / "out" / path.name).read_text())
    again = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert again("a b")["input_ids"] == byte_tokenizer()("a b")["input_ids"]


def test_a_foreign_file_in_the_old_output(tmp_path, monkeypatch):
    out = tmp_path / "out"
    slimrank.compress(tiny_model(), byte_tokenizer(), **OPTIONS, out=out)
    manifest = json.loads((out / "slimrank.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (out / "slimrank.json").write_text(json.dumps(manifest))
    (out / "tokenizer.json").write_text("mine")
    monkeypatch.setattr("slimrank.pipeline.stages.calibrate.decompose", lambda *_: pytest.fail("work began"))
    with pytest.raises(OutputError, match=r"tokenizer\.json' was not written by slimrank"):
        slimrank.compress(tiny_model(), byte_tokenizer(), **OPTIONS, out=out, overwrite=True)
    assert (out / "tokenizer.json").read_text() == "mine"


def test_several_chat_templates_are_overwritten(tmp_path):
    tokenizer = byte_tokenizer.__wrapped__()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    for _ in range(2):
        slimrank.compress(tiny_model(), tokenizer, **OPTIONS, out=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_adapters_are_refused(tmp_path, no_work):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    loaded = tiny_model()
    loaded._hf_peft_config_loaded = True  # as transformers marks a model with adapters of its own
    for model in (wrapped, wrapped.base_model.model, loaded):
        with pytest.raises(ModelError, match="adapters") as raised:
            slimrank.compress(model, byte_tokenizer(), **OPTIONS)
        assert "merge_and_unload" in raised.value.hint


def test_an_error_of_transformers_in_the_last_step_is_told(tmp_path, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model), "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shared")))
    with pytest.raises(ModelError, match="the model cannot be saved: shared"):
        slimrank.compress(model, byte_tokenizer(), **OPTIONS, out=tmp_path / "out")


@pytest.mark.parametrize("copied", [False, True])
def test_perplexity_on_the_calibration_text_is_said(tmp_path, copied):
    calibration = tmp_path / "a.txt"
    calibration.write_text(text(3000))
    copy = tmp_path / "b.txt"
    copy.write_text("Something before it. " + text(3000))
    options = {**OPTIONS, "method": "svd_llm", "samples": 4, "seq_len": 64, "windows": 3}
    options["evaluation"] = str(copy) if copied else "demo"
    result = slimrank.compress(
        tiny_model(), byte_tokenizer(), **options, calibration=str(calibration), out=tmp_path / "out"
    )
    said = "the calibration text contains 3 of the 3 evaluation windows, "
    assert (said in result.report["overlap"]) is bool(result.report["overlap"]) is copied
    assert [said in note for note in result.report["notes"]] == [True] * copied
    for name in ("README.md", "report.md", "report.html"):
        assert (said in (tmp_path / "out" / name).read_text()) is copied
