"""The real demo model: through the command line, in processes as a user starts them, and how much is lost."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimrank import compress
from slimrank.evaluate.perplexity import perplexity
from slimrank.layers.base import compressed_layers
from slimrank.layers.forms import layer_form
from slimrank.text.sources import read_source
from slimrank.text.tokens import tokenise
from slimrank.text.windows import leading_windows

pytestmark = pytest.mark.demo
FIRST = (r"re:model\.layers\.[0-2]\..*",)
WINDOWS, SEQ_LEN = 4, 128
SMALL = ["--method", "svd_llm", "--samples", 16, "--windows", WINDOWS, "--seq-len", SEQ_LEN]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits.double()


def slimrank(*arguments, check=True, all_cores=False):
    every = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS" or not all_cores}
    every["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait for each other take no time
    command = [sys.executable, "-m", "slimrank", *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True, text=True, env=every)


def windows(folder):
    """What the reports here measure perplexity on."""
    tokens = tokenise(read_source("demo", "evaluation"), AutoTokenizer.from_pretrained(folder))
    return leading_windows(tokens, WINDOWS, SEQ_LEN)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = slimrank("compress", "demo", "--keep", 0.9, *SMALL, "--out", folder / "slim", "--json", check=False)
    assert result.returncode == 0, result.stderr
    return folder / "slim", json.loads(result.stdout)


def test_it_is_smaller_and_still_a_language_model(run):
    out, report = run
    size = report["size"]
    assert size["linears_before"] == 106_168_320
    assert size["parameters_before"] == 134_515_008
    assert 0.895 < size["keep_ratio"] <= 0.9
    on_disk = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert on_disk == pytest.approx(4 * size["parameters_after"], rel=0.01)
    before, after = (report[side]["perplexity"]["perplexity"] for side in ("before", "after"))
    assert 8 < before < 20
    assert before < after < 4 * before
    assert len(report["before"]["sample"]["prompt"]) > 30
    assert len(report["after"]["sample"]["text"]) > 10
    assert report["coverage"]["of_matrices"] == 1.0
    assert len({row["group"] for row in report["targets"]}) == 30 * 4


def test_pivot_layers_of_all_its_pairs_lose_nothing(run):
    """Each product within 100 eps; logits no further from those in float64 than rounding takes them."""
    model = AutoModelForCausalLM.from_pretrained(run[0])
    ids = torch.arange(1000, 1256)[None]
    before, expected, saved = sum(p.numel() for p in model.parameters()), logits(model.double(), ids), 0
    of_pairs = logits(model.float(), ids)
    for path, layer in compressed_layers(model).items():
        a, b = layer.factors()
        pivot = layer_form("pivot").build(a, b, layer.bias, dtype=torch.float32)
        new_a, new_b = pivot.factors()
        assert float((new_b @ new_a - b @ a).norm() / (b @ a).norm()) < 100 * torch.finfo(torch.float32).eps
        model.set_submodule(path, pivot)
        saved += layer.rank**2
    assert sum(p.numel() for p in model.parameters()) == before - saved
    assert saved > 0.1 * before
    assert (logits(model, ids) - expected).norm() < 10 * (of_pairs - expected).norm()


def test_evaluate_gives_the_same_figure_as_the_report_and_as_an_independent_loop(run):
    out, report = run
    record = json.loads(slimrank("evaluate", out, *SMALL[-4:], "--json", all_cores=True).stdout)
    assert record["perplexity"] == pytest.approx(report["after"]["perplexity"]["perplexity"], rel=1e-5)
    program = """
import math, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "slimrank" not in sys.modules
total = 0.0
for ids in torch.load(sys.argv[2]):
    with torch.no_grad():
        logp = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
    total -= float(logp.gather(1, ids[1:, None]).mean())
print(total / 4)
"""
    torch.save(windows(out), out.parent / "windows.pt")
    shown = subprocess.run(
        [sys.executable, "-c", program, str(out), str(out.parent / "windows.pt")],
        check=True, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert math.exp(float(shown.stdout.split()[-1])) == pytest.approx(record["perplexity"], rel=1e-5)


def test_svd_llm_beats_svd_by_far(run):
    """Even where svd cuts a third of the blocks only."""
    out, report = run
    plain = compress("demo", method="svd", keep_ratio=0.9, ignore=(r"re:model\.layers\.\d\d\..*",), evaluation=None)
    assert len(plain.report["targets"]) == 10 * 7
    assert report["after"]["perplexity"]["perplexity"] < perplexity(plain.model, windows(out)).perplexity / 10


def test_the_demo_needs_no_network_the_second_time():
    """An index that does not exist: pip could fetch nothing."""
    environment = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "slimrank", "plan", "demo", "--keep", "0.8", "--method", "svd_llm", "--json"],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    plan = json.loads(result.stdout)["plan"]
    assert plan["targets"]["model.layers.0.self_attn.q_proj"]["rank"] == 230
    assert len(plan["targets"]) == 210


def test_without_a_method_it_is_the_balanced_preset(run, tmp_path):
    """All its stages, on little text, where a cut costs most; `svd_llm` loses 43 % there."""
    out, report = run
    little = {"samples": 8, "search_samples": 4, "corrections": 1, "correction_windows": 2, "seq_len": SEQ_LEN}
    little |= {"refine_options": {"held_out": 1, "samples_factor": 1}, "evaluation": None, "targets": FIRST}
    found = compress("demo", keep_ratio=0.9, **little, out=tmp_path / "slim")
    assert found.report["provenance"]["recipe"]["method"] == "kfac_svd"
    assert found.report["size"]["stored_as"] == "pivot"
    assert 0.895 < found.report["size"]["keep_ratio"] <= 0.9
    assert any("refined" in row for row in found.report["targets"])
    assert len(found.report["corrections"]) == 1
    before, after = report["before"]["perplexity"]["perplexity"], perplexity(found.model, windows(out)).perplexity
    assert before < after < 1.3 * before
    assert "## Corrections" in (tmp_path / "slim" / "report.md").read_text()
