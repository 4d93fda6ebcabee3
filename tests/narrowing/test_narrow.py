"""`slimrank narrow`: a smaller model of the same class, which loads where slimrank is not installed."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from architectures import ARCHITECTURES, random_model
from helpers import byte_tokenizer, save_tiny, text
from slimrank import compress, narrow
from slimrank.cli.app import app
from slimrank.errors import BudgetError, ModelError, OutputError, RecipeError
from slimrank.layers.experts import unfuse
from slimrank.models.targets import find_targets

QUICK = {"samples": 8, "seq_len": 32, "windows": 4, "multiple": 4}
IDS = torch.tensor(byte_tokenizer()(text(8000)).input_ids[-96:]).reshape(4, 24)  # least squares holds for such text
NONE = ("mamba",)


def save(name, folder):
    random_model(name).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text(8000))
    return str(path)


@torch.no_grad()
def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits.double()


def linears(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    unfuse(model)
    return find_targets(model).coverage.targets


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in (*NONE, "llava")])
def test_every_architecture_stays_of_its_class_and_within_the_budget(name, tmp_path, words):
    folder = save(name, tmp_path / "model")
    result = narrow(folder, out=tmp_path / "narrow", keep_ratio=0.8, calibration=words, evaluation=(), **QUICK)
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert config["architectures"] == [type(random_model(name)).__name__]
    assert "slimrank" not in config
    assert not list((tmp_path / "narrow").glob("*.py"))
    assert 0.6 < result.record.keep_ratio <= 0.8
    assert linears(tmp_path / "narrow") == result.record.after.linears <= 0.8 * linears(folder)
    difference = (logits(tmp_path / "narrow") - logits(folder)).norm() / logits(folder).norm()
    assert 0 < float(difference) < 0.4


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "mixtral"])
def test_it_is_exact_when_nothing_is_removed(name, tmp_path, words):
    folder = save(name, tmp_path / "model")
    result = narrow(folder, out=tmp_path / "narrow", keep_ratio=1.0, calibration=words, evaluation=(), **QUICK)
    assert torch.equal(logits(tmp_path / "narrow"), logits(folder))
    assert result.record.keep_ratio == 1
    assert result.record.before == result.record.after


WITHOUT = """
import sys
sys.modules["slimrank"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
given = tokenizer("the cat finds", return_tensors="pt")
made = model.generate(**given, max_new_tokens=8, do_sample=False)
assert not [name for name in sys.modules if name.startswith("slimrank.")]
print(type(model).__name__, made.shape[1] - given["input_ids"].shape[1])
"""


def test_it_loads_and_generates_where_slimrank_is_not_installed(tmp_path, words):
    save_tiny(tmp_path / "model")
    narrow(tmp_path / "model", out=tmp_path / "narrow", keep_ratio=0.8, calibration=words, evaluation=(), **QUICK)
    program = [sys.executable, "-c", WITHOUT, str(tmp_path / "narrow")]
    done = subprocess.run(program, capture_output=True, text=True, env={"PATH": "", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LlamaForCausalLM", "8"]


def test_the_command_reports_size_and_quality(tmp_path, words):
    save_tiny(tmp_path / "model")
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in QUICK.items()]
    asked = ["narrow", str(tmp_path / "model"), "--keep", "0.8", "--out", str(tmp_path / "narrow"), *flags]
    done = CliRunner().invoke(app, [*asked, "--calibration", words, "--eval-text", words, "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "narrow" / "narrow.json").read_text())
    assert record["widths"] == {"intermediate_size": [48, 32]}
    assert record["measured"][words]["ratio"] > 0.9
    files = sum(p.stat().st_size for p in (tmp_path / "narrow").glob("*.safetensors"))
    assert 0 < files - record["size"]["after"]["bytes"] < 10_000  # the header
    card = (tmp_path / "narrow" / "README.md").read_text()
    assert "intermediate_size 48 -> 32" in card
    assert "trust_remote_code" not in card


def test_compress_takes_a_narrow_model(tmp_path, words):
    save_tiny(tmp_path / "model")
    narrow(tmp_path / "model", out=tmp_path / "narrow", keep_ratio=0.8, calibration=words, evaluation=(), **QUICK)
    result = compress(tmp_path / "narrow", keep_ratio=0.7, method="svd", evaluation=None)
    assert result.report["size"]["linears_before"] == linears(tmp_path / "narrow")


def test_what_cannot_be_narrow_is_refused_by_name(tmp_path, words):
    quick = {**QUICK, "calibration": words, "evaluation": (), "out": tmp_path / "narrow"}
    mamba = save("mamba", tmp_path / "mamba")
    with pytest.raises(ModelError, match="MambaForCausalLM has no MLP"):
        narrow(mamba, keep_ratio=0.8, **quick)
    save_tiny(tmp_path / "model")
    with pytest.raises(BudgetError, match=r"keeping 0\.1 of the linears"):
        narrow(tmp_path / "model", keep_ratio=0.1, **quick)
    compress(tmp_path / "model", keep_ratio=0.6, method="svd", evaluation=None, out=tmp_path / "factored")
    with pytest.raises(ModelError, match="already compressed"):
        narrow(tmp_path / "factored", keep_ratio=0.8, **quick)
    with pytest.raises(RecipeError, match="keep_ratio"):
        narrow(tmp_path / "model", keep_ratio=1.2, **quick)
    with pytest.raises(RecipeError, match="no option 'keep'"):
        narrow(tmp_path / "model", keep=0.8, **quick)
    (tmp_path / "narrow").mkdir()
    (tmp_path / "narrow" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        narrow(tmp_path / "model", keep_ratio=0.8, **quick)


def test_a_configuration_without_a_width_is_refused(tmp_path, words):
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4, bos_token_id=256, eos_token_id=257)
    BloomForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="no field that states the width"):
        narrow(tmp_path / "model", out=tmp_path / "n", keep_ratio=0.8, calibration=words, evaluation=(), **QUICK)
