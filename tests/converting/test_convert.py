"""Published models of LEMS and ASVD become folders of slimrank that compute the same."""

import json

import pytest
import torch
from foreign import RANKS, loads, logits, write_asvd, write_lems
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

import slimrank
from helpers import save_tiny
from slimrank.cli import main
from slimrank.errors import ModelError, NonFiniteError, OutputError
from slimrank.layers import LowRankLinear


@pytest.mark.parametrize("name, changes", [("llama", {}), ("qwen2", {}), ("opt", {}), ("gemma", {})])
def test_a_folder_of_lems(tmp_path, name, changes):
    theirs = write_lems(tmp_path / "theirs", name, **changes)
    result = slimrank.convert(tmp_path / "theirs", tmp_path / "ours")
    ours = loads(tmp_path / "ours")
    assert torch.equal(logits(ours), logits(theirs))
    assert torch.equal(logits(result.model), logits(theirs))
    assert type(ours).__module__.startswith("transformers.models.")
    layers = {path: m.rank for path, m in ours.named_modules() if isinstance(m, LowRankLinear)}
    assert layers == dict(result.record.ranks)
    assert set(layers.values()) <= set(RANKS.values())


@pytest.mark.parametrize("shard, pickled", [("5GB", False), ("40KB", False), ("5GB", True)])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_folder_of_asvd(tmp_path, name, shard, pickled):
    theirs = write_asvd(tmp_path / "theirs", name, shard, pickled)
    result = slimrank.convert(tmp_path / "theirs", tmp_path / "ours")
    assert torch.equal(logits(loads(tmp_path / "ours")), logits(theirs))
    assert (result.record.layout, result.record.base) == ("asvd", "facebook/base")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1 or shard == "5GB"


def test_what_the_folder_holds(tmp_path):
    theirs = write_lems(tmp_path / "theirs")
    record = slimrank.convert(tmp_path / "theirs", tmp_path / "ours").record
    out = tmp_path / "ours"
    assert json.loads((out / "conversion.json").read_text()) == json.loads(json.dumps(record.plain()))
    assert record.facts == {"compression_method": "kfac_svd", "target_ratio": 0.8}
    dense = sum(p.numel() for p in loads(save_tiny(tmp_path / "dense")).parameters())
    kept = sum(p.numel() for name, p in theirs.named_parameters() if "dummy" not in name and p.numel() != 1)
    assert (record.parameters, record.dense_parameters) == (kept, dense)
    card = ModelCard.load(out / "README.md").data.to_dict()
    assert (card["base_model"], card["base_model_relation"], card["license"]) == ("org/base", "quantized", "mit")
    assert json.loads((out / "slimrank.json").read_text())["convert"]["layout"] == "lems"
    assert "modeling_low_rank.py" not in {path.name for path in out.iterdir()}
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["slimrank"]["format"]) == ("slimrank", 1)
    assert config["base_config"]["architectures"] == ["LlamaForCausalLM"]


def test_the_result_is_a_folder_like_any_other(tmp_path, text_file):
    write_lems(tmp_path / "theirs")
    slimrank.convert(tmp_path / "theirs", tmp_path / "ours")
    tokenizer = slimrank.load(tmp_path / "ours")[1]
    assert len(tokenizer) == 259
    slimrank.recover(
        tmp_path / "ours", save_tiny(tmp_path / "dense"), out=tmp_path / "better", text=str(text_file), seq_len=24,
        evaluation=(), options={"tokens": 200},
    )  # fmt: skip
    assert loads(tmp_path / "better").config.slimrank
    with pytest.raises(ModelError, match="needs no conversion"):
        slimrank.convert(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(OutputError, match="exists"):
        slimrank.convert(tmp_path / "theirs", tmp_path / "ours")
    slimrank.convert(tmp_path / "theirs", tmp_path / "ours", overwrite=True)


def test_a_model_of_the_hub(tmp_path, monkeypatch):
    repo = tmp_path / "models--org--small"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    theirs = write_lems(repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    slimrank.convert("org/small", tmp_path / "ours")
    assert torch.equal(logits(loads(tmp_path / "ours")), logits(theirs))
    with pytest.raises(ModelError, match="'org/none' cannot be loaded"):
        slimrank.convert("org/none", tmp_path / "again")


def config_of(folder, **changes):
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def tensors_of(folder, change):
    path = folder / "model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path, {"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: config_of(f, rank_dict={}), "table of ranks is empty"),
        (lambda f: config_of(f, rank_dict={Q: -1}), "rank of .* is -1"),
        (lambda f: config_of(f, rank_dict=None), "has no 'rank_dict'"),
        (lambda f: config_of(f, rank_dict={Q: 6}), r"the factors of .* are \(32, 5\) and \(5, 32\), but its rank is 6"),
        (lambda f: config_of(f, rank_dict={Q: 5}), "in the files and"),
        (lambda f: config_of(f, rank_dict={"model.none": 5}), "hold no factors of 'model.none'"),
        (lambda f: config_of(f, base_model_type="magic"), "does not know by itself"),
        (lambda f: config_of(f, base_model_type="bert"), "encoder|not a language model|cannot be loaded"),
        (lambda f: config_of(f, model_type="llama"), "no layout of compressed models"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: tensors_of(f, lambda t: t.pop(f"wrapped_model.{Q}.mod_a.weight")), "hold no factors"),
        (lambda f: tensors_of(f, lambda t: t.pop("wrapped_model.model.norm.weight")), "lacks 1 weights"),
        (lambda f: tensors_of(f, lambda t: t.update(extra=torch.ones(2))), "no place for"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 40), "damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    ],
)
def test_wrong_layouts_leave_nothing(tmp_path, spoil, message):
    write_lems(tmp_path / "theirs")
    spoil(tmp_path / "theirs")
    with pytest.raises(ModelError, match=message) as refused:
        slimrank.convert(tmp_path / "theirs", tmp_path / "ours")
    assert ".partial" not in str(refused.value)
    assert refused.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"theirs"}


def test_numbers_that_are_none_are_refused(tmp_path):
    write_lems(tmp_path / "theirs")
    tensors_of(tmp_path / "theirs", lambda t: t[f"wrapped_model.{Q}.mod_a.weight"].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=r"q_proj\.A\.weight"):
        slimrank.convert(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


class Trap:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("the pickle was read",)


def test_pickles_of_svd_llm_are_refused_unread(tmp_path, capsys):
    folder = tmp_path / "svd_llm"
    folder.mkdir()
    torch.save({"model": Trap(), "tokenizer": None}, folder / "llama_whitening_only_0.8.pt")
    for spec in (folder, folder / "llama_whitening_only_0.8.pt"):
        code, _, error = run(capsys, "convert", spec, "--out", tmp_path / "ours")
        assert code == 1
        assert "a pickle of whole Python objects" in error
        assert "--method svd_llm" in error
    write_asvd(tmp_path / "asvd", pickled=True)
    torch.save({"a": Trap()}, tmp_path / "asvd" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="slimrank never runs"):
        slimrank.convert(tmp_path / "asvd", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_command(tmp_path, capsys):
    write_asvd(tmp_path / "theirs")
    code, shown, _ = run(capsys, "convert", tmp_path / "theirs", "--out", tmp_path / "a")
    assert code == 0
    assert "compressed layers of ASVD, ranks 5 to 6" in shown
    _, shown, _ = run(capsys, "convert", tmp_path / "theirs", "--out", tmp_path / "b", "--json")
    assert json.loads(shown)["layout"] == "asvd"
    for spec, message in (("/no/folder", "not a folder"), (tmp_path / "a" / "config.json", "not a folder")):
        code, _, error = run(capsys, "convert", spec, "--out", tmp_path / "c")
        assert (code, message in error) == (1, True)
