"""The commands as a user types them, in this process (fast) and once as a real one."""

import io
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from helpers import save_tiny
from slimrank.cli import main
from slimrank.errors import RecipeError
from task_folder import write_tasks

SMALL = ["--samples", "4", "--seq-len", "24", "--batch-size", "2", "--windows", "2"]


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_compress_evaluate_benchmark(capsys, tiny_folder, text_file, tmp_path):
    out = tmp_path / "out"
    code, shown, progress = run(
        capsys, "compress", tiny_folder, "--keep", 0.6, "--calibration", text_file, "--eval-text", text_file,
        "--out", out, *SMALL,
    )  # fmt: skip
    assert code == 0
    for words in ("perplexity", "kept", "parameters of the model", "before", "written to"):
        assert words in shown
    assert "calibrate and decompose" in progress
    assert "this will take about" in progress

    code, shown, _ = run(capsys, "evaluate", out, "--text", text_file, "--windows", 3, "--seq-len", 24, "--json")
    record = json.loads(shown)
    assert code == 0
    assert record["perplexity"] == record["texts"][str(text_file)]["perplexity"] > 1
    assert record["texts"][str(text_file)]["tokens"] == 3 * 23

    _, shown, _ = run(capsys, "evaluate", out, "--text", text_file, "--text", "demo", "--windows", 2, "--seq-len", 24)
    assert "predictions" in shown
    assert "tokens/s" in shown

    code, shown, _ = run(
        capsys, "benchmark", out, "--against", tiny_folder, "--prompt", 8, "--new-tokens", 2, "--repeats", 1, "--json"
    )
    record = json.loads(shown)
    assert record["ratios"]["parameters"] < 1
    assert record["rows"][0]["ratios"]["decode"][0] > 0
    _, shown, _ = run(
        capsys, "benchmark", out, "--against", tiny_folder, "--prompt", 8, "--new-tokens", 2, "--repeats", 1
    )
    assert "decode" in shown
    assert "medians of 1 rounds in turns" in shown


def test_compress_json_is_the_report(capsys, tiny_folder, text_file, tmp_path):
    code, shown, _ = run(
        capsys, "compress", tiny_folder, "--keep", 0.6, "--calibration", text_file, "--no-eval", "--out",
        tmp_path / "out", "--json", *SMALL,
    )  # fmt: skip
    assert code == 0
    assert json.loads(shown) == json.loads((tmp_path / "out" / "report.json").read_text())


def test_plan_without_a_place_for_it_computes_nothing(capsys, tiny_folder, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("slimrank.pipeline.find_plan", never)
    code, shown, _ = run(capsys, "plan", tiny_folder, "--keep", 0.5)
    assert code == 0
    assert "'spectrum' computes its own" in shown
    record = json.loads(run(capsys, "plan", tiny_folder, "--keep", 0.5, "--json")[1])
    assert record["allocation"] == {"id": "spectrum", "provisional": True}
    assert record["size"]["keep_ratio"] <= 0.5
    record = json.loads(run(capsys, "plan", tiny_folder, "--keep", 0.5, "--method", "svd", "--json")[1])
    assert record["allocation"] == {"id": "uniform", "provisional": False}


def test_plan_shows_and_saves(capsys, tiny_folder, tmp_path):
    code, shown, _ = run(capsys, "plan", tiny_folder, "--keep", 0.5, "--save", tmp_path / "p.json", *SMALL)
    assert code == 0
    for words in ("q_proj", "embeddings and lm_head", "memory: about", "time: about", "100.0 %"):
        assert words in shown
    code, shown, _ = run(capsys, "plan", tiny_folder, "--plan", tmp_path / "p.json", "--json")
    record = json.loads(shown)
    assert record["plan"] == json.loads((tmp_path / "p.json").read_text())
    assert record["size"]["keep_ratio"] <= 0.5


@pytest.mark.parametrize(
    "place, reason",
    [
        ("none/p.json", "No such file or directory"),
        ("", "Is a directory"),
        ("file/p.json", "Not a directory"),
        ("locked.json", "Permission denied"),
    ],
)
def test_plan_finds_out_before_any_work_that_it_cannot_save(capsys, tiny_folder, tmp_path, monkeypatch, place, reason):
    (tmp_path / "file").touch()
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr("slimrank.pipeline.find_plan", None)
    asked = "plan", tiny_folder, "--keep", 0.5, "--allocation", "lems", "--save", tmp_path / place
    code, _, error = run(capsys, *asked)
    assert code == 1
    assert f"cannot be written: {reason}" in " ".join(error.split())


def test_flags_win_over_the_recipe_file_and_that_over_the_preset(capsys, tiny_folder, text_file, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"keep_ratio: 0.4\nsamples: 4\nseed: 7\nseq_len: 24\nmethod: svd\ncalibration: {text_file}\n")
    _, shown, _ = run(
        capsys, "compress", tiny_folder, "--preset", "fast", "--recipe", recipe, "--keep-total", 0.9, "--seed", 0,
        "--no-eval", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    used = json.loads(shown)["provenance"]["recipe"]
    assert (used["keep_ratio"], used["keep_total"]) == (None, 0.9)
    assert (used["seed"], used["samples"], used["method"]) == (0, 4, "svd")


def test_a_recipe_file_with_a_method_of_its_own_drops_the_options_of_the_preset(capsys, tiny_folder, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("keep_ratio: 0.6\nmethod: svd\nrefine: none\n")
    code, shown, _ = run(
        capsys, "compress", tiny_folder, "--preset", "balanced", "--recipe", recipe, "--no-eval", "--out",
        tmp_path / "out", "--json",
    )  # fmt: skip
    used = json.loads(shown)["provenance"]["recipe"]
    assert (code, used["method"], used["method_options"], used["refine_options"]) == (0, "svd", {}, {})


def test_methods(capsys):
    _, shown, _ = run(capsys, "methods", "--json")
    listed = json.loads(shown)
    assert {"svd", "svd_llm"} <= {m["id"] for m in listed["decompose"]}
    assert {"uniform"} <= {m["id"] for m in listed["allocate"]}
    assert all(m["paper"] and m["title"] for kind in listed.values() for m in kind)
    assert "svd_llm" in run(capsys, "methods")[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["compress", "{model}", "--out", "{out}"], "the recipe has no budget"),
        (["compress", "{model}", "--keep", "0", "--out", "{out}"], "keep_ratio"),
        (["compress", "{model}", "--keep", "1.5", "--out", "{out}"], "less than or equal to 1"),
        (["compress", "{model}", "--keep", "0.8", "--method", "svdllm", "--out", "{out}"], "did you mean"),
        (["compress", "{model}", "--keep", "0.8", "--preset", "fats", "--out", "{out}"], "did you mean 'fast'"),
        (["compress", "{model}", "--recipe", "{recipe}", "--out", "{out}"], "did you mean 'keep_ratio'"),
        (["compress", "/no/model", "--keep", "0.8", "--out", "{out}"], "not a model folder"),
        (["compress", "{model}", "--keep", "0.8", "--out", "{model}"], "exists"),
        (["evaluate", "{model}", "--text", "/no/text.txt"], "does not exist"),
        (["evaluate", "{model}", "--windows", "1000000", "--seq-len", "24"], "need 24,000,000"),
        (["evaluate", "{model}", "--dtype", "int3"], "dtype"),
        (["evaluate", "{model}", "--text", "self"], "wrote itself"),
        (["evaluate", "{model}", "--tasks", "sums", "--limit", "0"], "--limit must be 1 or more, got 0"),
        (["evaluate", "{model}", "--tasks", "sums", "--shots", "-1"], "--shots must be 0 or more, got -1"),
        (["evaluate", "{model}", "--tasks", ""], "no name"),
        (["evaluate", "{model}", "--tasks", "sums", "--tasks-dir", "/no/tasks"], "does not exist"),
        (["evaluate", "{model}", "--tasks-dir", "/no/tasks"], "about tasks, and none is named"),
        (["evaluate", "{model}", "--shots", "1"], "--shots is about tasks"),
        (["evaluate", "{model}", "--tasks", "sums", "--windows", "2"], "--windows is about text"),
        (["evaluate", "{model}", "--tasks", "sums", "--seq-len", "24"], "--seq-len is about text"),
        (["evaluate", "{model}", "--windows", "1", "--seq-len", "24", "--against", "{model}"], "at least two windows"),
        (["evaluate", "{model}", "--against", "/no/model"], "not a model folder"),
        (["plan", "{model}", "--keep", "0.0001"], "keep_ratio of at least"),
        (["plan", "{model}", "--keep", "0.5", "--save", "/no/folder/p.json"], "cannot be written"),
        (["plan", "{model}", "--keep", "0.5", "--out", "{model}", "--overwrite"], "not written by slimrank"),
    ],
)
def test_errors_say_what_and_what_to_try(capsys, tiny_folder, tmp_path, arguments, message):
    (tmp_path / "r.yaml").write_text("keep_ratoi: 0.8\n")
    filled = [a.format(model=tiny_folder, out=tmp_path / "out", recipe=tmp_path / "r.yaml") for a in arguments]
    code, shown, error = run(capsys, *filled)
    assert (code, shown) == (1, "")
    assert message in error
    assert "try:" in error
    assert not (tmp_path / "out").exists()
    code, shown, _ = run(capsys, *filled, "--json")
    record = json.loads(shown)["error"]
    assert code == 1
    assert message in record["message"] + record["hint"]


@pytest.mark.parametrize("windows, message", [([], "2 window(s) of 24"), (["--windows", "1"], "at least two windows")])
def test_one_window_to_compare_on_is_refused_before_a_model_is_run(
    capsys, tiny_folder, tmp_path, monkeypatch, windows, message
):
    monkeypatch.setattr("slimrank.evaluate.api.compare", lambda *_: pytest.fail("a model was run"))
    short = tmp_path / "short.txt"
    short.write_text("a" * 30)
    options = ["--text", short, "--seq-len", 24, *windows]
    code, _, error = run(capsys, "evaluate", tiny_folder, "--against", tiny_folder, *options)
    assert code == 1
    assert message in error


def test_wrong_usage_ends_with_2(capsys):
    assert run(capsys, "compress")[0] == 2
    code, _, error = run(capsys, "compres")
    assert code == 2
    assert "compress" in error


def test_help_is_quick_and_teaches():
    subprocess.run([sys.executable, "-m", "slimrank", "--help"], check=True, capture_output=True)  # warm files
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    shown = subprocess.run(
        [sys.executable, "-m", "slimrank", "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.0  # of its own, whoever else computes
    assert "slimrank demo" in shown
    assert subprocess.run([sys.executable, "-m", "slimrank", "--version"], check=True, capture_output=True).stdout


def test_an_interrupt_ends_with_130(capsys, tiny_folder, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("slimrank.pipeline.compress", interrupted)
    code, _, error = run(capsys, "compress", tiny_folder, "--keep", 0.8, "--out", tmp_path / "o")
    assert code == 130
    assert "to resume" in error


def test_progress_tells_the_time_left(monkeypatch):
    from slimrank.cli import console

    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = console.ConsoleProgress()
    progress.plan({"one": 10.0, "two": 30.0})
    progress.stage("one", 2)
    now[0] = 5.0
    progress.step(1)
    assert progress.fraction() == pytest.approx(0.125)
    assert progress._left() == "about 35 s left"
    progress.stage("two", 3)
    assert progress.fraction() == pytest.approx(0.25)
    progress.step(3)
    assert progress.fraction() == 1.0
    progress.plan({"one": 10.0, "two": 30.0})  # another job, as in a comparison
    progress.stage("one", 2)
    assert progress.fraction() == 0.0


def test_steps_that_are_declared_again_lose_and_skip_nothing():
    from slimrank.cli.console import ConsoleProgress

    progress = ConsoleProgress()
    progress.plan({"one": 10.0, "two": 30.0})
    fractions = []
    progress.stage("one", 2)
    for stage, steps in (("one", 4), ("one", 2), ("two", 1)):
        progress.step(1)
        fractions.append(progress.fraction())
        progress.stage(stage, steps)
        fractions.append(progress.fraction())
    assert fractions == pytest.approx([0.125, 0.125, 0.15625, 0.15625, 0.203125, 0.25])


def test_a_plan_replaces_an_allocation(tmp_path):
    from slimrank.cli.recipe_flags import recipe_options

    file = tmp_path / "recipe.yaml"
    file.write_text("keep_ratio: 0.8\nrank_multiple: 8\nranks: {q_proj: dense}\nallocation: lems\n")
    options = recipe_options(None, file, {"plan": "plan.json"})
    assert options == {"plan": "plan.json", "allocation": "lems"}
    with pytest.raises(RecipeError, match="a plan fixes the ranks"):
        recipe_options(None, None, {"plan": "plan.json", "allocation": "lems"})


def test_a_second_plan_is_that_of_another_job():
    from slimrank.cli.console import ConsoleProgress

    written, progress = sys.stdout, ConsoleProgress()
    progress.console = Console(file=io.StringIO(), force_terminal=True)
    with progress:
        progress.plan({"one": 10.0, "two": 30.0})
        first = progress._bar
        progress.stage("two", 2)
        progress.step(2)
        progress.plan({"one": 10.0, "two": 30.0})
        assert not first.live.is_started
        assert progress._bar.live.is_started
        progress.stage("one", 2)
        assert progress.fraction() == 0.0
    assert sys.stdout is written


def test_a_model_with_bos_is_evaluated_with_bos(capsys, tmp_path, text_file):
    folder = save_tiny(tmp_path / "bos", bos=True)
    _, shown, _ = run(capsys, "evaluate", folder, "--text", text_file, "--windows", 2, "--seq-len", 24, "--json")
    assert json.loads(shown)["texts"][str(text_file)]["bos"] is True


def test_evaluate_tasks_against_the_original(capsys, tiny_folder, text_file, tmp_path, monkeypatch):
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path=None: manager(None, include_path, include_defaults=False)
    )
    tasks = write_tasks(tmp_path / "tasks")
    other = save_tiny(tmp_path / "other", attention_bias=False, seed=1)
    arguments = ["evaluate", other, "--text", text_file, "--windows", 3, "--seq-len", 24, "--against", tiny_folder,
                 "--tasks", "sums, words", "--tasks-dir", tasks, "--shots", 1, "--limit", 6]  # fmt: skip
    code, shown, progress = run(capsys, *arguments)
    assert code == 0
    for words in ("its perplexity", "ratio (95 %)", "std. error", "lost", "gained", f"against {tiny_folder}"[:20]):
        assert words in shown
    assert "it gets none" in progress
    record = json.loads(run(capsys, *arguments, "--json")[1])
    differences = record["against"]["texts"][str(text_file)]
    assert differences["ratio"] == pytest.approx(record["perplexity"] / differences["perplexity"])
    assert differences["kl"] > 0
    assert record["tasks"]["sums"]["metrics"]["acc"]["stderr"] > 0
    assert record["tasks"]["sums"]["count"] == len(record["tasks"]["sums"]["questions"]["acc"]) == 6
    assert record["against"]["tasks"]["sums"]["acc"]["lost"] >= 0
    assert record["task_settings"]["shots"] == 1
    alone = json.loads(run(capsys, *arguments[:8], "--json")[1])
    assert (alone["perplexity"], alone["texts"]) == (record["perplexity"], record["texts"])
    assert (alone["tasks"], alone["task_settings"], alone["against"]) == ({}, None, None)
    shown = run(capsys, *arguments[:-1], 1)[1]
    assert "sums (acc) is not compared" in shown
    without_text = ["evaluate", other, *arguments[8:]]
    shown = run(capsys, *without_text)[1]
    assert "perplexity" not in shown
    assert "tokens/s" in shown
    tasks_only = json.loads(run(capsys, *without_text, "--json")[1])
    assert (tasks_only["perplexity"], tasks_only["texts"], tasks_only["against"]["texts"]) == (None, {}, {})
    assert tasks_only["tasks"] == record["tasks"]
    assert tasks_only["sample"]["prompt"]
    other_tokens = save_tiny(tmp_path / "bos", bos=True)
    for same in (arguments[:8], without_text):
        code, _, error = run(capsys, *same, "--against", other_tokens)
        assert code == 1
        assert "as other tokens" in error


@pytest.mark.parametrize("name", ["data[train]", "runs[/x]", ":smile:", "[red]a[/red]"])
def test_names_are_no_markup(capsys, name, text_file, tiny_folder, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    folder = text_file.parent / name
    folder.mkdir(parents=True)
    text_file.rename(folder / "a.txt")
    code, shown, progress = run(capsys, "evaluate", tiny_folder, "--text", name, "--windows", 2, "--seq-len", 24)
    assert code == 0
    assert name in shown
    assert f"perplexity of {name}" in progress


def test_a_name_that_is_no_unicode_ends_no_command(capsys, text_file, tiny_folder, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    name = os.fsdecode(b"caf\xe9.txt")
    text_file.rename(name)
    asked = "--keep", 0.6, "--method", "svd", "--eval-text", name, "--out", "out"
    code, _, _ = run(capsys, "compress", tiny_folder, *asked, *SMALL)
    assert code == 0
    assert "caf\\udce9.txt" in (text_file.parent / "out" / "report.md").read_text()
    code, shown, _ = run(capsys, "evaluate", "out", "--text", name, "--windows", 2, "--seq-len", 24)
    assert code == 0
    assert "caf\\udce9.txt" in shown


def test_tables_and_bars_show_brackets(capsys):
    from slimrank.cli import console

    console.print_numbers("[/title]", ("[a]", "[/b]"), [("[red]x", "[1]")], [])
    console.print_table("[/title]", ("[a]", "[/b]"), [("[red]x", "[1]")])
    shown = capsys.readouterr().out
    for words in ("[/title]", "[a]", "[/b]", "[red]x", "[1]"):
        assert shown.count(words) == 2
    progress = console.ConsoleProgress()
    progress.console = console.plain_console(file=io.StringIO(), force_terminal=True, width=80, highlight=False)
    with progress:
        progress.plan({"perplexity of [/x]": 1.0})
        progress.stage("perplexity of [/x]", 2)
        progress.note("read [/y] :smile:")
        progress._bar.refresh()
    assert "perplexity of [/x]" in progress.console.file.getvalue()
    assert "read [/y] :smile:" in progress.console.file.getvalue()


def test_what_loading_leaves_out_is_in_the_records(capsys, tiny_folder, text_file):
    path = tiny_folder / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**load_file(path), **buffer}, path, {"format": "pt"})
    options = ("--text", text_file, "--windows", 2, "--seq-len", 16, "--against", tiny_folder, "--json")
    notes = json.loads(run(capsys, "evaluate", tiny_folder, *options)[1])["notes"]
    assert len(notes) == 2
    assert all("inv_freq" in note for note in notes)
    short = ("--prompt", 4, "--new-tokens", 2, "--repeats", 1, "--json")
    notes = json.loads(run(capsys, "benchmark", tiny_folder, "--against", tiny_folder, *short)[1])["notes"]
    assert len(notes) == 2
