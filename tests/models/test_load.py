import json

import pytest
import torch

from helpers import save_tiny, tiny_model
from slimrank.errors import ModelError, NonFiniteError
from slimrank.models.load import digest, load, skeleton
from slimrank.models.storage import stored_dtype


def test_a_folder(tiny_folder):
    model, tokenizer = load(tiny_folder)
    assert digest(model) == digest(tiny_model())
    assert tokenizer("ab")["input_ids"] == [64 + 1, 64 + 2] or len(tokenizer("ab")["input_ids"]) == 2


def test_dtype(tiny_folder):
    assert load(tiny_folder, "bfloat16")[0].dtype == torch.bfloat16
    assert load(tiny_folder, "auto")[0].dtype == torch.float32


def test_skeleton_has_no_weights(tiny_folder):
    bones = skeleton(tiny_folder).model
    assert all(p.is_meta for p in bones.parameters())
    assert stored_dtype(bones) == torch.float32


@pytest.mark.parametrize("spec", ["/no/such/folder", "./nowhere", "missing.gguf"])
def test_a_missing_path(spec):
    with pytest.raises(ModelError, match="not a model folder"):
        load(spec)


@pytest.mark.parametrize("spec", ["x" * 300, "~no-such-user/model", ""])
def test_a_name_that_no_disk_allows(spec, tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder)
    with pytest.raises(ModelError, match=r"cannot be loaded|is not a model folder"):
        skeleton(spec)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)


def test_an_unknown_hub_id():
    with pytest.raises(ModelError, match="cannot be loaded"):
        load("nobody/no-such-model-here")
    with pytest.raises(ModelError, match="cannot be loaded"):
        skeleton("nobody/no-such-model-here")


def test_not_a_language_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="is not a language model"):
        skeleton(tmp_path)


def test_missing_shards(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of {len(shards)} weight files: {shards[1].name}"):
        load(tmp_path)


def test_missing_weights(tmp_path):
    folder = save_tiny(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lacks 9 weights, e\.g\. 'model\.layers\.3"):
        load(folder)


def test_nan_in_weights_names_the_weight():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight"):
        digest(model)


def test_digest_sees_values_names_and_dtype():
    a, b = tiny_model(seed=0), tiny_model(seed=1)
    assert digest(a) == digest(tiny_model(seed=0)) != digest(b)
    assert digest(a.to(torch.bfloat16)) != digest(tiny_model(seed=0))
    other = tiny_model(seed=0)
    other.config.rms_norm_eps = 1e-3
    assert digest(other) != digest(tiny_model(seed=0))
    with torch.device("meta"), pytest.raises(ModelError, match="not in memory"):
        digest(torch.nn.Linear(2, 2))


def test_damaged_weights(tmp_path):
    folder = save_tiny(tmp_path / "m")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_weights_of_another_configuration(tmp_path):
    folder = save_tiny(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["hidden_size"], config["head_dim"] = 16, 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"'model.*' is \(.*32.*\) in the files and \(.*16.*\) by config.json"):
        load(folder)
