"""vLLM gives the tokens that transformers gives, for every kind of plan. Runs where vLLM is installed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slimrank  # noqa: F401  # so that transformers knows the folders
from helpers import byte_tokenizer
from serving.served_models import PLANS, dense_model, save
from serving.vllm_tokens import PROMPTS

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make serve-check"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # by the compressed-tensors that vLLM needs
]
COUNT = 16
SIDES = ("model", "against")
NAMES = list(PLANS)
TOGETHER = [NAMES[i : i + 3] for i in range(0, len(NAMES), 3)]  # vLLM takes long to begin


def engine_tokens(folders, processes=1, **options):
    """Of a process of its own; where there are several, each has a core of its own."""
    program = [sys.executable, str(Path(__file__).parent / "vllm_tokens.py"), str(processes), str(COUNT)]
    program += map(str, folders)
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(processes)))} if processes > 1 else {}
    environment = {**os.environ, **cores, "SERVED_OPTIONS": json.dumps(options)}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return [found[str(folder)] for folder in folders]


def tokens_of_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        given = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(given[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("names", TOGETHER, ids=", ".join)
def test_tokens_are_those_of_transformers(names, tmp_path):
    folders = [save(name, tmp_path / name) for name in names]
    wanted = [tokens_of_transformers(folder) for folder in folders]
    assert dict(zip(names, engine_tokens(folders), strict=True)) == dict(zip(names, wanted, strict=True))
    for of_one in wanted:
        assert len({token for tokens in of_one for token in tokens}) > 4  # not one token again and again


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize("name", ["everything", "pivot"])
def test_two_processes_give_the_same_tokens(name, tmp_path):
    folder = save(name, tmp_path)
    assert engine_tokens([folder], processes=2) == [tokens_of_transformers(folder)]


def test_compiled_layers_give_the_same_tokens(tmp_path):
    folder = save("mixed", tmp_path)
    assert engine_tokens([folder], enforce_eager=False) == [tokens_of_transformers(folder)]


def test_the_code_in_the_folder_changes_nothing(tmp_path):
    folder = save("pair", tmp_path)
    assert engine_tokens([folder], trust_remote_code=True) == [tokens_of_transformers(folder)]


def test_a_dense_model_is_served_as_before(tmp_path):
    dense_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert engine_tokens([tmp_path]) == [tokens_of_transformers(tmp_path)]


def test_folders_that_would_load_wrong_are_refused(tmp_path):
    untried, broken = save("pair", tmp_path / "untried"), save("pair", tmp_path / "broken")
    config = json.loads((untried / "config.json").read_text())
    config["slimrank"]["base_model_type"] = "phi"
    (untried / "config.json").write_text(json.dumps(config))
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.B.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    of_untried, of_broken = engine_tokens([untried, broken])
    assert "'phi' were not tried with vLLM" in of_untried
    assert "lacks 1 tensors of 'model.layers.1.self_attn.q_proj', the first 'B.weight (1)'" in of_broken


def test_benchmark_measures_a_folder_against_a_dense_model(tmp_path):
    folder = save("mixed", tmp_path / "mixed")
    dense_model("qwen3").save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    program = [
        sys.executable,
        "-m",
        "slimrank",
        "benchmark",
        folder,
        "--against",
        tmp_path / "dense",
        "--engine",
        "vllm",
    ]
    program += ["--prompt", "16,400", "--batch", "2", "--new-tokens", "8", "--repeats", "2", "--busy", "--json"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(list(map(str, program)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert [(row["batch"], row["prompt"]) for row in record["rows"]] == [(2, 16), (2, 119)]
    assert all(row[side][kind] > 0 for row in record["rows"] for side in SIDES for kind in ("prefill", "decode"))
    assert record["model"]["parameters"] < record["against"]["parameters"]
    assert record["model"]["bytes"] < record["against"]["bytes"]
    assert record["machine"]["vllm"]
