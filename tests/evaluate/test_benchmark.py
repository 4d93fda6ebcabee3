"""`benchmark`: rows and ratios, engines, busy machines, and bad input."""

import json
import math
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

import slimrank
from helpers import save_tiny
from slimrank.cli.app import app
from slimrank.errors import MissingExtraError, ModelError, RecipeError, SlimrankError
from slimrank.evaluate import benchmark as module
from slimrank.evaluate import busy
from slimrank.evaluate.api import benchmark
from slimrank.evaluate.benchmark import median_and_interval
from slimrank.evaluate.engine import ENGINES, Engine, Round, Running

QUICK = {"prompts": [6], "new_tokens": 2, "repeats": 2, "busy": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    save_tiny(folder / "one")
    save_tiny(folder / "other", seed=1)
    return folder / "one", folder / "other"


class Clock(Running):
    """A model whose rounds take what they are told to."""

    def __init__(self, name, seconds):
        self.name, self.seconds, self.seen = name, iter(seconds), []
        self.dtype, self.parameters, self.weight_bytes, self.vocabulary = "float32", 10, 40, 50
        self.context, self.notes = None, []

    def round(self, ids, new_tokens):
        self.seen.append(ids)
        seconds = next(self.seconds)
        return Round(seconds, 2 * seconds, 8)


@pytest.fixture
def clocks(monkeypatch):
    """An engine in which the first model needs 1, 2, 4 s after its warm-up, and the other twice as long."""
    made = {"ours": Clock("ours", [99, 1, 2, 4, 8]), "theirs": Clock("theirs", [99, 2, 4, 8, 16])}

    class Told(Engine):
        id, title = "told", "told"

        def load(self, model, loading):
            return made[model]

        def versions(self):
            return {}

    monkeypatch.setitem(ENGINES.entries, "told", Told)
    return made


def test_figures_are_medians_of_rounds_in_turns(clocks):
    record = benchmark("ours", "theirs", engine="told", batches=[3], prompts=[5], new_tokens=4, repeats=3, busy=True)
    (row,) = record["rows"]
    assert row["model"] == {"prefill": 15 / 2, "decode": 12 / 4, "cache_bytes": 8}
    assert row["against"] == {"prefill": 15 / 4, "decode": 12 / 8, "cache_bytes": 8}
    assert row["ratios"] == {"prefill": (2.0, 2.0, 2.0), "decode": (2.0, 2.0, 2.0)}
    assert record["ratios"] == {"parameters": 1.0, "bytes": 1.0}
    ids = clocks["ours"].seen[0]
    assert ids.shape == (3, 5)
    assert int(ids.max()) < 50
    assert all(torch.equal(ids, seen) for clock in clocks.values() for seen in clock.seen)


@pytest.mark.parametrize("n", range(1, 25))
def test_the_interval_covers_the_median_as_often_as_it_says(n):
    """Of n values of any distribution, all subsets of signs are equally likely around the true median."""
    _, low, high = median_and_interval([float(i) for i in range(n)])
    first = int(low)
    assert high == n - 1 - first
    beyond = 2 * sum(math.comb(n, k) for k in range(first + 1)) / 2**n
    assert beyond <= 0.05 or first == 0
    one_more = 2 * sum(math.comb(n, k) for k in range(first + 2)) / 2**n
    assert one_more > 0.05  # it is not wider than it must be


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch, of itself
@pytest.mark.parametrize("engine", ["transformers", "compile", "packed"])
def test_every_engine_measures_real_models(engine, models):
    record = benchmark(*models, engine=engine, batches=[1, 2], **QUICK)
    assert [(row["batch"], row["prompt"]) for row in record["rows"]] == [(1, 6), (2, 6)]
    sides = [row[side] for row in record["rows"] for side in ("model", "against")]
    assert all(side["prefill"] > 0 and side["decode"] > 0 for side in sides)
    assert [side["cache_bytes"] > 0 for side in sides] == [True] * 4
    assert sides[2]["cache_bytes"] == 2 * sides[0]["cache_bytes"]
    assert {"processor", "threads", "torch", "transformers"} <= set(record["machine"])
    assert json.loads(json.dumps(record))["engine"] == engine


def test_a_busy_machine_is_refused_and_noted(models, monkeypatch):
    monkeypatch.setattr(module, "check_idle", busy.check_idle)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            with busy.others() as found:
                time.sleep(0.5)
            assert found.processors > 0.3
            with pytest.raises(SlimrankError, match="too busy to measure: other processes keep"):
                benchmark(*models, **{**QUICK, "busy": False})
            assert benchmark(*models, **{**QUICK, "repeats": 12})["others"] > 0.3
        finally:
            process.kill()


def test_own_work_does_not_count_as_busy():
    start = time.perf_counter()
    with busy.others() as idle:
        time.sleep(0.3)
    with busy.others() as found:
        while time.perf_counter() - start < 0.9:
            sum(range(1000))
    assert found.processors < idle.processors + 0.5


@pytest.mark.parametrize("engine, to", [("openvino", "openvino"), ("onnxruntime", "onnx")])
def test_engines_that_measure_exported_folders(models, tmp_path, engine, to):
    pytest.importorskip(engine)
    for name, model in zip(("one", "other"), models, strict=True):
        slimrank.export(model, tmp_path / name, to=to)
    record = benchmark(tmp_path / "one", tmp_path / "other", engine=engine, **QUICK)
    assert record["rows"][0]["model"]["decode"] > 0
    assert record["model"]["dtype"] == "float32"
    assert engine in record["machine"]
    with pytest.raises(ModelError, match="is not an exported model"):
        benchmark(*models, engine=engine, **QUICK)
    with pytest.raises(RecipeError, match="with the weights of the folder"):
        benchmark(*models, engine=engine, dtype="bfloat16", **QUICK)
    (tmp_path / "one" / "export.json").write_text('{"engine": "another"}')
    with pytest.raises(ModelError, match=f"was exported to another, not to {to}"):
        benchmark(tmp_path / "one", tmp_path / "other", engine=engine, **QUICK)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_that_is_not_installed_says_what_to_install(models, monkeypatch, engine):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(MissingExtraError, match=engine):
        benchmark(*models, engine=engine, **QUICK)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_engine_vllm_says_what_to_install(models):
    with pytest.raises(MissingExtraError, match="vllm"):
        benchmark(*models, engine="vllm", **QUICK)


def test_the_engine_vllm_says_what_it_cannot_do(models, monkeypatch, tmp_path):
    monkeypatch.setattr("slimrank.evaluate.engines.vllm.need_engine", lambda: None)
    with pytest.raises(RecipeError, match="runs on the device that it was built for"):
        benchmark(*models, engine="vllm", device="cpu", **QUICK)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="does not load the GGUF file"):
        benchmark(tmp_path / "model.gguf", models[1], engine="vllm", **QUICK)


def test_compile_without_a_compiler_is_refused(models, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SlimrankError, match="needs a C\\+\\+ compiler"):
        benchmark(*models, engine="compile", **QUICK)


def test_prompts_are_shortened_to_the_context(clocks):
    clocks["ours"].context = 20
    record = benchmark("ours", "theirs", engine="told", prompts=[4, 500, 600], new_tokens=64, repeats=1, busy=True)
    assert [(row["prompt"], row["new_tokens"]) for row in record["rows"]] == [(4, 10), (10, 10)]
    assert record["notes"] == ["the context holds 20 tokens: measured are prompts of [4, 10] and 10 new tokens"]


def test_bad_input_is_refused(models):
    with pytest.raises(RecipeError, match="there is no engine 'compil'"):
        benchmark(*models, engine="compil")
    for flag, value in (("--batch", "1,x"), ("--prompt", "0"), ("--prompt", "")):
        result = CliRunner().invoke(app, ["benchmark", "a", "--against", "b", flag, value])
        assert isinstance(result.exception, RecipeError) or "is not a list of whole numbers" in result.output


def test_the_cache_is_one_of_latents(tmp_path, monkeypatch):
    slimrank.compress(
        save_tiny(tmp_path / "one"), keep_ratio=0.6, method="svd", evaluation=None, out=tmp_path / "small"
    )
    found = {
        cache: benchmark(tmp_path / "small", tmp_path / "one", cache=cache, **QUICK)
        for cache in ("dynamic", "latent", "latent-int8")
    }
    bytes_of = {
        cache: [record["rows"][0][side]["cache_bytes"] for side in ("model", "against")]
        for cache, record in found.items()
    }
    formula = found["dynamic"]["model"]["kv_bytes"]
    tokens = 6 + 2
    assert bytes_of["dynamic"] == [tokens * formula["dynamic"][1]] * 2
    assert bytes_of["latent"] == [tokens * formula["latent"][1], tokens * formula["dynamic"][1]]
    assert bytes_of["latent-int8"][0] == tokens * formula["latent-int8"][1] < bytes_of["latent"][0]
    assert any(note.endswith("it is not compressed") for note in found["latent"]["notes"])
    assert not found["dynamic"]["notes"]
    run = ["benchmark", str(tmp_path / "small"), "--against", str(tmp_path / "one"), "--cache", "latent-int8"]
    shown = CliRunner().invoke(app, [*run, "--prompt", "6", "--new-tokens", "2", "--repeats", "1", "--busy"])
    assert shown.exit_code == 0
    assert "latents, int8" in shown.stdout


def test_caches_that_are_not_there(models, clocks):
    with pytest.raises(RecipeError, match="no cache 'latents'"):
        benchmark(*models, cache="latents", **QUICK)
    with pytest.raises(RecipeError, match="one of transformers"):
        benchmark("ours", "theirs", engine="told", cache="latent", busy=True)
