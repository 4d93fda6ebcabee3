"""vLLM gives the tokens that transformers gives, for every kind of plan. Runs where vLLM is installed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimrank  # noqa: F401  # so that transformers knows the folders
from serving.served_models import PLANS, dense_model, save
from serving.vllm_tokens import PROMPTS

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make serve-check")
COUNT = 16


def engine_tokens(folder, processes=1, **options):
    """Of a process of its own, each with a core of its own where there are several."""
    program = [sys.executable, str(Path(__file__).parent / "vllm_tokens.py"), str(processes), str(COUNT), str(folder)]
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(processes)))} if processes > 1 else {}
    environment = {**os.environ, **cores, "SERVED_OPTIONS": json.dumps(options)}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])[str(folder)]


def tokens_of_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        given = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(given[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("name", PLANS)
def test_tokens_are_those_of_transformers(name, tmp_path):
    folder = save(name, tmp_path)
    wanted = tokens_of_transformers(folder)
    assert engine_tokens(folder) == wanted
    assert len({token for tokens in wanted for token in tokens}) > 4  # not one token again and again


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize("name", ["everything", "pivot"])
def test_two_processes_give_the_same_tokens(name, tmp_path):
    folder = save(name, tmp_path)
    assert engine_tokens(folder, processes=2) == tokens_of_transformers(folder)


def test_compiled_layers_give_the_same_tokens(tmp_path):
    folder = save("mixed", tmp_path)
    assert engine_tokens(folder, enforce_eager=False) == tokens_of_transformers(folder)


def test_the_code_in_the_folder_changes_nothing(tmp_path):
    folder = save("pair", tmp_path)
    assert engine_tokens(folder, trust_remote_code=True) == tokens_of_transformers(folder)


def test_a_dense_model_is_served_as_before(tmp_path):
    dense_model("llama").save_pretrained(tmp_path)
    assert engine_tokens(tmp_path, skip_tokenizer_init=True) == tokens_of_transformers(tmp_path)


def test_an_architecture_that_was_not_tried_is_refused(tmp_path):
    folder = save("pair", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["slimrank"]["base_model_type"] = "phi"
    (folder / "config.json").write_text(json.dumps(config))
    assert "'phi' were not tried with vLLM" in engine_tokens(folder)


def test_a_folder_that_lacks_a_factor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save("pair", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.B.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "lacks 1 tensors of 'model.layers.1.self_attn.q_proj', the first 'B.weight (1)'" in engine_tokens(folder)
