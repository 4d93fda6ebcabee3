import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimrank.report.html
from helpers import CONFIGS, VOCABULARY, byte_tokenizer, nothing_drawn, save_tiny, text, tiny_model
from slimrank.errors import (
    BudgetError,
    DataError,
    ModelError,
    NonFiniteError,
    OutputError,
    PlanError,
    RecipeError,
    RunError,
)
from slimrank.layers import LowRankLinear, PivotLinear
from slimrank.pipeline import find_plan
from slimrank.progress import Progress
from slimrank.text.tokens import tokenise
from slimrank.text.windows import draw_windows

SMALL = {"method": "svd_llm", "samples": 4, "seq_len": 24, "batch_size": 2, "windows": 2}


def options(text_file, **changes):
    return {"keep_ratio": 0.6, "calibration": str(text_file), "evaluation": None, **SMALL, **changes}


def files_of(folder):
    """Every file but the reports, which hold measured times."""
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if not p.name.startswith("report.")}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_by_default(name, tmp_path, text_file):
    """Without a method: gradients, allocation, pivot layers and refinement, and corrections, all in one run."""
    folder = save_tiny(tmp_path / "model", name)
    small = {"samples": 4, "search_samples": 4, "seq_len": 24, "batch_size": 2, "windows": 2}
    chosen = {"calibration": str(text_file), "corrections": 1, "correction_windows": 4, **small}
    result = slimrank.compress(folder, out=tmp_path / "out", keep_ratio=0.6, **chosen)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, result.model(input_ids=ids).logits)
    assert 0.5 < result.report["size"]["keep_ratio"] <= 0.6
    assert len(result.report["corrections"]) == 1
    assert any("refined" in row for row in result.report["targets"])
    assert any(isinstance(m, PivotLinear) for m in loaded.modules())
    foretold = slimrank.preview(folder, keep_ratio=0.6, **chosen)
    assert set(foretold["seconds"]) >= set(result.report["seconds"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_end_to_end(name, tmp_path, text_file):
    folder = save_tiny(tmp_path / "model", name)
    result = slimrank.compress(folder, out=tmp_path / "out", **options(text_file, evaluation=str(text_file)))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, result.model(input_ids=ids).logits)
    assert result.plan.keep_ratio <= 0.6
    assert result.plan.parameters == sum(
        m.A.weight.numel() + m.B.weight.numel() for m in loaded.modules() if isinstance(m, LowRankLinear)
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["after"]["perplexity"]["perplexity"] > 1
    size = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert size == report["size"]["bytes_after"]
    planned = sum(p.numel() for p in result.model.parameters()) * 4
    assert 0 <= size - planned < 16384  # the header of a safetensors file
    assert "rank" in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out.run").exists()
    modes = {p.stat().st_mode for p in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_layer_outputs_equal_an_independent_svd_llm(name, text_file):
    """Whitening, full SVD and the explicit inverse, on inputs gathered by plain hooks, in float64."""
    dense, model = tiny_model(name), tiny_model(name)
    result = slimrank.compress(model, byte_tokenizer(), **options(text_file, samples=16))
    ids = draw_windows(tokenise(text_file.read_text(), byte_tokenizer()), 16, 24, seed=0)
    for row in result.report["targets"]:
        layer, inputs = dense.get_submodule(row["path"]), []
        handle = layer.register_forward_pre_hook(lambda m, a, inputs=inputs: inputs.append(a[0].flatten(0, 1)))
        with torch.no_grad():
            dense(input_ids=ids)
        handle.remove()
        x = torch.cat(inputs).double().T
        w = layer.weight.detach().double()
        w = w if row["kind"] == "linear" else w.T
        values, q = torch.linalg.eigh(x @ x.T)
        s = q * values.clamp(min=1e-10 * float(values[-1])).sqrt()
        u, sigma, vt = torch.linalg.svd(w @ s, full_matrices=False)
        r = row["rank"]
        reference = u[:, :r] * sigma[:r] @ vt[:r] @ torch.linalg.inv(s)
        ours = model.get_submodule(row["path"]).weight.detach().double()
        reference_output, our_output = reference @ x, ours @ x
        assert float((our_output - reference_output).norm() / reference_output.norm()) < 1e-3
        expected = float(sigma[r:].square().sum().sqrt() / sigma.square().sum().sqrt())
        assert row["relative_error"] == pytest.approx(expected, rel=1e-3)


def test_shared_inputs_are_reported_as_groups(text_file):
    result = slimrank.compress(tiny_model(), byte_tokenizer(), **options(text_file))
    groups = {row["path"].split(".", 3)[3]: row["group"].split(".", 3)[3] for row in result.report["targets"][:7]}
    assert groups["self_attn.v_proj"] == "self_attn.q_proj"
    assert groups["mlp.up_proj"] == groups["mlp.gate_proj"] == "mlp.gate_proj"


def test_streaming_and_resident_give_the_same_bytes(tmp_path, text_file):
    save_tiny(tmp_path / "model")
    for resident in (True, False):
        out = tmp_path / f"out-{resident}"
        slimrank.compress(tmp_path / "model", out=out, **options(text_file, resident=resident))
    a, b = files_of(tmp_path / "out-True"), files_of(tmp_path / "out-False")
    assert a["model.safetensors"] == b["model.safetensors"]


def test_same_command_same_bytes_other_seed_other_bytes(tmp_path, text_file):
    save_tiny(tmp_path / "model")
    folders = [tmp_path / f"out{i}" for i in range(3)]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        slimrank.compress(tmp_path / "model", out=folder, **options(text_file, seed=seed))
    first, second, third = map(files_of, folders)
    assert first == second
    assert first["model.safetensors"] != third["model.safetensors"]


def test_no_global_random_state_is_touched(text_file):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    slimrank.compress(
        tiny_model(), byte_tokenizer(), **options(text_file, calibration="self", evaluation=str(text_file))
    )
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_dtype(tmp_path, text_file, dtype):
    save_tiny(tmp_path / "model")
    result = slimrank.compress(tmp_path / "model", out=tmp_path / "out", **options(text_file, dtype=dtype))
    assert {p.dtype for p in result.model.parameters()} == {getattr(torch, dtype)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == getattr(torch, dtype)


def test_a_loaded_model_is_changed_in_place_and_saves_like_any_other(tmp_path, text_file):
    model = tiny_model()
    result = slimrank.compress(model, byte_tokenizer(), **options(text_file))
    assert result.model is model
    assert result.out is None
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_text_as_a_list_needs_no_file():
    documents = [text(200, seed=i) for i in range(5)]
    result = slimrank.compress(
        tiny_model(), byte_tokenizer(), keep_ratio=0.5, calibration=documents, evaluation=None, **SMALL
    )
    assert result.report["provenance"]["recipe"]["calibration"] == "5 documents given as a list"


def test_the_report_holds_the_resolved_recipe(text_file):
    chosen = options(text_file)
    del chosen["seq_len"]
    result = slimrank.compress(tiny_model(), byte_tokenizer(), **chosen)
    provenance = result.report["provenance"]
    assert provenance["recipe"]["seq_len"] == 128
    assert provenance["recipe"]["samples"] == 4
    assert set(provenance["inputs"]) == {"model", "calibration", "targets", "ignore", "split"}


def test_keeping_everything_changes_nothing(text_file):
    model, dense = tiny_model(), tiny_model()
    result = slimrank.compress(model, byte_tokenizer(), **options(text_file, keep_ratio=1.0))
    assert result.plan.factored() == {}
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, dense(input_ids=ids).logits)


def test_a_plan_may_be_edited_and_passed_back(tmp_path, text_file):
    plan = slimrank.preview(save_tiny(tmp_path / "model"), method="svd_llm", keep_ratio=0.5)["plan"]
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    content["targets"]["model.layers.0.mlp.up_proj"]["rank"] = "dense"
    content["targets"]["model.layers.1.mlp.up_proj"]["rank"] = 3
    content["budget"] = None
    (tmp_path / "plan.json").write_text(json.dumps(content))
    chosen = options(text_file, plan=str(tmp_path / "plan.json"))
    del chosen["keep_ratio"]
    model = slimrank.compress(tmp_path / "model", **chosen).model
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert model.model.layers[1].mlp.up_proj.rank == 3


def test_other_budgets(tmp_path, text_file):
    folder = save_tiny(tmp_path / "model")
    for budget in ({"keep_total": 0.8}, {"max_bytes": 95_000}):
        chosen = {**options(text_file, **budget)}
        del chosen["keep_ratio"]
        result = slimrank.compress(folder, out=tmp_path / next(iter(budget)), **chosen)
        total = sum(p.numel() for p in result.model.parameters())
        if "keep_total" in budget:
            assert 0.75 < total / sum(p.numel() for p in tiny_model().parameters()) <= 0.8
        else:
            written = (tmp_path / "max_bytes" / "model.safetensors").stat().st_size
            assert 85_000 < written <= 95_000


# interruption --------------------------------------------------------------------------------------------------

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_pipeline", "slimrank.pipeline", "transformers.models.llama.modeling_llama"])


class Killer(Progress):
    """Kills its own process at a step of a stage, and remembers notes."""

    def __init__(self, stage, step):
        self.at, self.notes = (stage, step), []

    def stage(self, name, steps):
        self.name, self.count = name, 0
        self.step(0)

    def step(self, done=1):
        self.count += done
        if (self.name, self.count) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def note(self, message):
        self.notes.append(message)


def compress_and_tell(pipe, model, text, out, killer):
    slimrank.report.html._figures = nothing_drawn
    small = {"calibration": text, "evaluation": text, **SMALL}
    slimrank.compress(model, out=out, progress=killer, keep_ratio=0.6, **small)
    pipe.send(killer.notes)


def compress_in_a_process(model, text, out, stage=None, step=None):
    """The exit code, and the notes of a process that came to its end."""
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=compress_and_tell, args=(there, model, text, out, Killer(stage, step)))
    process.start()
    process.join()
    return process.exitcode, here.recv() if process.exitcode == 0 else None


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A model, a text, and the output of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    model, written = save_tiny(folder / "model"), folder / "text.txt"
    written.write_text(text(), encoding="utf-8")
    assert compress_in_a_process(model, written, folder / "out")[0] == 0
    return model, written, folder / "out"


@pytest.mark.parametrize(
    "stage, step, resumes",
    [
        ("calibrate and decompose", 0, ""),
        ("calibrate and decompose", 2, "resuming at block 2 of 3"),
        ("cut factors", 1, "resuming at block 3 of 3"),
        ("write", 0, "resuming at block 3 of 3"),
    ],
)
def test_killed_and_resumed_gives_the_same_bytes(tmp_path, straight, stage, step, resumes):
    model, written, uninterrupted = straight
    killed, _ = compress_in_a_process(model, written, tmp_path / "out", stage, step)
    assert killed == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    again, notes = compress_in_a_process(model, written, tmp_path / "out")
    assert again == 0
    assert resumes in "\n".join(notes)
    assert files_of(uninterrupted) == files_of(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kept_run_directory_serves_another_budget(tmp_path, text_file, monkeypatch):
    folder = save_tiny(tmp_path / "model")
    slimrank.compress(folder, run_dir=tmp_path / "run", **options(text_file))
    monkeypatch.setattr("slimrank.models.blocks.BlockRunner.step", None)  # would fail if it calibrated again
    again = slimrank.compress(folder, run_dir=tmp_path / "run", **options(text_file, keep_ratio=0.3))
    monkeypatch.undo()
    fresh = slimrank.compress(folder, **options(text_file, keep_ratio=0.3))
    for a, b in zip(again.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_directory_made_by_other_inputs_is_refused(tmp_path, text_file):
    folder = save_tiny(tmp_path / "model")
    slimrank.compress(folder, run_dir=tmp_path / "run", **options(text_file))
    with pytest.raises(RunError, match=r"belongs to a different run \(calibration: "):
        slimrank.compress(folder, run_dir=tmp_path / "run", **options(text_file, seed=1))
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(RunError, match=r"\(model: "):
        slimrank.compress(other, run_dir=tmp_path / "run", **options(text_file))
    with pytest.raises(RunError, match="is not a run directory"):
        slimrank.compress(folder, run_dir=folder, **options(text_file))


@pytest.mark.parametrize("place", ["out", "out/run", "out.partial", "out.partial/run", "out.old", "out.run/../out"])
def test_a_run_directory_in_the_output_folder_is_refused(place, tmp_path):
    """The output folder is replaced as a whole: the run directory would go with it, or be in the way of resuming."""
    with pytest.raises(RunError, match="is in the output folder"):
        slimrank.compress("no/model", out=tmp_path / "out", run_dir=tmp_path / place, method="svd", keep_ratio=0.5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("work", [slimrank.compress, find_plan])
@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("~no-such-user/run", OutputError, "cannot be used"),
        ("x" * 300, OutputError, "cannot be used"),
        ("file", OutputError, "cannot be used"),
        (".", RunError, "is not a run directory"),
    ],
)
def test_a_run_directory_that_cannot_be_used_is_refused_before_the_model_is_read(
    work, place, error, message, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        work("no/model", run_dir=place, method="svd", keep_ratio=0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_run_directory_may_be_in_the_home_folder(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    slimrank.compress(tiny_folder, run_dir="~/run", method="svd", keep_ratio=0.5, evaluation=None)
    assert (tmp_path / "home" / "run" / "run.json").is_file()
    assert not (tmp_path / "~").exists()


# bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"keep_ratio": 0}, RecipeError, "keep_ratio: Input should be greater than 0, got 0"),
        ({"keep_ratio": 1.2}, RecipeError, "less than or equal to 1"),
        ({"keep_ratio": None}, RecipeError, "the recipe has no budget"),
        ({"keep_total": 0.5}, RecipeError, "give only one of keep_ratio and keep_total"),
        ({"keep_ratoi": 0.5}, RecipeError, "did you mean 'keep_ratio'"),
        ({"keep_ratio": 0.001}, BudgetError, "all layers at that fraction take"),
        ({"keep_ratio": None, "keep_total": 0.01}, BudgetError, "already take"),
        ({"method": "svdllm"}, RecipeError, "did you mean 'svd_llm'"),
        ({"calibration": "no-such.txt"}, DataError, "does not exist"),
        ({"seq_len": 2000}, RecipeError, "more than the model's context of 128"),
        ({"device": "quantum"}, RecipeError, "not a device"),
        ({"evaluation": "self"}, DataError, "wrote itself"),
        ({"ignore": ["q_porj"]}, RecipeError, "matches no linear"),
        ({"ignore": ["re:("]}, RecipeError, "not a regular expression"),
        ({"keep_ratio": None, "max_bytes": 20_000}, BudgetError, "already take"),
        ({"plan": "none.json", "keep_ratio": None}, PlanError, "cannot be read"),
        ({"plan": "none.json", "keep_ratio": None, "rank_multiple": 8}, RecipeError, "a plan fixes the ranks"),
        ({"plan": "none.json", "keep_ratio": None, "ranks": {"*": "dense"}}, RecipeError, "a plan fixes the ranks"),
    ],
)  # fmt: skip
def test_bad_options_fail_before_any_work(tiny_folder, tmp_path, text_file, change, error, message, monkeypatch):
    monkeypatch.setattr("slimrank.models.blocks.BlockRunner.step", None)
    with pytest.raises(error, match=message):
        slimrank.compress(tiny_folder, out=tmp_path / "out", **options(text_file, **change))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.run").exists()


def test_models_that_could_not_be_loaded_again_are_refused_first(text_file):
    from transformers import LlamaConfig, LlamaForCausalLM

    class OwnConfig(LlamaConfig):
        model_type = "own"

    config = OwnConfig(**tiny_model().config.to_dict())
    with pytest.raises(ModelError, match="could not be loaded again"):
        slimrank.compress(LlamaForCausalLM(config), byte_tokenizer(), **options(text_file))


@pytest.mark.parametrize("embeddings", [True, False])
def test_weights_tied_between_layers_stay_tied(text_file, tmp_path, embeddings):
    model = tiny_model(tie_word_embeddings=embeddings)
    if not embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    result = slimrank.compress(model, byte_tokenizer(), **options(text_file))
    assert any("shared with model.layers.2.mlp.up_proj" in note for note in result.report["notes"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    first, last = (loaded.model.layers[i].mlp.up_proj for i in (0, 2))
    assert first.A.weight is last.A.weight
    assert first.B.weight is last.B.weight
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert sum(p.numel() for p in loaded.parameters()) == result.report["size"]["parameters_after"]


def test_a_loaded_model_keeps_its_dtype(text_file):
    with pytest.raises(RecipeError, match="keeps its dtype"):
        slimrank.compress(tiny_model(), byte_tokenizer(), **options(text_file, dtype="bfloat16"))


def test_paths_and_plans_may_be_objects(text_file):
    first = slimrank.compress(tiny_model(), byte_tokenizer(), **{**options(text_file), "calibration": text_file})
    chosen = {**options(text_file), "plan": first.plan}
    del chosen["keep_ratio"]
    again = slimrank.compress(tiny_model(), byte_tokenizer(), **chosen)
    assert again.plan == first.plan
    for a, b in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(a, b)


class OneExpertIdle(torch.nn.Module):
    """An MLP with a second branch that never runs."""

    def __init__(self, mlp):
        super().__init__()
        self.used, self.idle = mlp, torch.nn.Linear(32, 32)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_no_token_reaches_is_cut_by_plain_svd_and_noted(text_file):
    model = tiny_model()
    model.model.layers[1].mlp = OneExpertIdle(model.model.layers[1].mlp)
    result = slimrank.compress(model, byte_tokenizer(), **options(text_file))
    (note,) = [note for note in result.report["notes"] if "no calibration token" in note]
    assert note.startswith("model.layers.1.mlp.idle")
    assert isinstance(model.model.layers[1].mlp.idle, LowRankLinear)


@pytest.mark.parametrize("method", ["svd_llm", "kfac_svd", "fwsvd", "gfwsvd"])
def test_a_layer_that_no_token_reaches_is_given_the_least(method, text_file):
    """The energy of a plain SVD is in no unit of the method's: it took what others need."""
    model = tiny_model()
    model.model.layers[1].mlp = OneExpertIdle(model.model.layers[1].mlp)
    model.model.layers[1].mlp.idle.weight.data.mul_(1e3)
    chosen = options(text_file, method=method, allocation="spectrum", allocation_options={"solver": "exact"})
    result = slimrank.compress(model, byte_tokenizer(), **chosen)
    assert result.plan.targets["model.layers.1.mlp.idle"].rank == 1


def test_a_model_in_training_mode_samples_like_one_that_is_not(text_file):
    runs = []
    for training in (True, False):
        model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train(training)
        runs.append(slimrank.compress(model, byte_tokenizer(), **options(text_file, calibration="self")))
        assert model.training == training
    assert runs[0].report["provenance"]["inputs"] == runs[1].report["provenance"]["inputs"]


def test_a_plan_samples_no_more_text_than_it_reads(text_file, tmp_path, monkeypatch):
    """Windows to refine on are left to `compress`, which goes on in the same run directory."""
    sampled, announced, progress = [], [], Progress()
    sample = slimrank.text.texts.sample_windows
    monkeypatch.setattr("slimrank.text.texts.sample_windows", lambda *a: sampled.append(a[2]) or sample(*a))
    progress.plan = announced.append
    refined = {"refine": "update", "refine_options": {"samples_factor": 4}, "allocation": "spectrum"}
    more = {"progress": progress, "search_samples": 1, **refined}
    chosen = options(text_file, calibration="self", run_dir=tmp_path / "run", **more)
    plan, _ = find_plan(tiny_model(), byte_tokenizer(), **chosen)
    assert sorted(sampled) == [1, 4]
    assert [list(costs) for costs in announced] == [["calibrate and decompose", "allocate"]]
    result = slimrank.compress(tiny_model(), byte_tokenizer(), **chosen)
    assert 16 in sampled
    assert [costs["calibrate and decompose"] > 0 for costs in announced] == [True, False]
    assert result.plan.factored() == plan.factored()


def test_an_error_while_cutting_leaves_a_model_that_says_it_is_compressed(text_file, tmp_path, monkeypatch):
    import slimrank.pipeline.stages.factorize as cutting

    real, calls = cutting.replace_linears, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(cutting, "replace_linears", failing)
    model = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        slimrank.compress(model, byte_tokenizer(), **options(text_file))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_others_put_into_the_run_directory_stays(tmp_path, text_file, tiny_folder):
    (tmp_path / "out.run").mkdir()
    with pytest.raises(RunError):
        (tmp_path / "out.run" / "mine.txt").touch()
        slimrank.compress(tiny_folder, out=tmp_path / "out", **options(text_file))
    (tmp_path / "out.run" / "mine.txt").unlink()
    slimrank.compress(tiny_folder, run_dir=tmp_path / "out.run", **options(text_file))
    (tmp_path / "out.run" / "mine.txt").touch()
    slimrank.compress(tiny_folder, out=tmp_path / "out", **options(text_file))
    assert [p.name for p in (tmp_path / "out.run").iterdir()] == ["mine.txt"]


def test_too_short_text(tiny_folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(DataError, match="the text has 9 tokens"):
        slimrank.compress(tiny_folder, **options(short))


def test_models_that_cannot_be_compressed(text_file):
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        slimrank.compress(torch.nn.Sequential(torch.nn.Linear(4, 4)), byte_tokenizer(), **options(text_file))
    with pytest.raises(RecipeError, match="a tokenizer is needed"):
        slimrank.compress(tiny_model(), **options(text_file))


def test_nan_weights_and_activations_name_the_layer(text_file):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.2\.mlp\.gate_proj"):
        slimrank.compress(model, byte_tokenizer(), **options(text_file))
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e38)
    with pytest.raises(NonFiniteError, match=r"layers\.1"):
        slimrank.compress(model, byte_tokenizer(), **options(text_file))


def test_disk_full_while_writing_can_be_resumed(tiny_folder, tmp_path, text_file, monkeypatch):
    from transformers import PreTrainedModel

    def full(self, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(OutputError, match="No space left"):
            slimrank.compress(tiny_folder, out=tmp_path / "out", **options(text_file))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    monkeypatch.setattr("slimrank.models.blocks.BlockRunner.step", None)  # calibration is not done again
    slimrank.compress(tiny_folder, out=tmp_path / "out", **options(text_file))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 1000


def test_disk_full_while_calibrating(tiny_folder, tmp_path, text_file, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slimrank.store.save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        slimrank.compress(tiny_folder, out=tmp_path / "out", **options(text_file))


def test_an_existing_output_is_refused_before_any_work(tiny_folder, tmp_path, text_file, monkeypatch):
    slimrank.compress(tiny_folder, out=tmp_path / "out", **options(text_file))
    before = files_of(tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        slimrank.compress("/no/model", out=tmp_path / "out", **options(text_file))
    assert files_of(tmp_path / "out") == before
    slimrank.compress(tiny_folder, out=tmp_path / "out", overwrite=True, **options(text_file, keep_ratio=0.3))
    assert files_of(tmp_path / "out") != before


def test_the_report_says_what_was_unusual(text_file):
    """Fewer tokens than channels: the Gram is singular, and the report says so."""
    result = slimrank.compress(tiny_model(), byte_tokenizer(), **options(text_file, samples=1, seq_len=8, batch_size=1))
    assert any("rank-deficient" in note for note in result.report["notes"])


def test_preview_agrees_with_what_is_done(tiny_folder, text_file):
    seen = slimrank.preview(tiny_folder, method="svd_llm", keep_ratio=0.6)
    done = slimrank.compress(tiny_folder, **options(text_file))
    assert seen["plan"] == done.plan
    assert seen["size"]["parameters_after"] == sum(p.numel() for p in done.model.parameters())
    assert seen["peak_memory"] > seen["size"]["bytes_before"]
    assert seen["coverage"]["total"] > VOCABULARY * 32
