"""`slimrank compare`: several recipes on one model. Most tests let a quick stand-in do a cell's work."""

import io
import json
import shutil
import subprocess
import sys
import textwrap

import lm_eval.tasks
import pytest
import torch

import slimrank
from helpers import save_tiny, text
from slimrank import comparison
from slimrank.cli import main
from slimrank.cli.compare import _show
from slimrank.comparison import Cell, processes, running, worker
from slimrank.comparison.files import sources_of
from slimrank.errors import BudgetError, DataError, OutputError, RecipeError, RunError, SlimrankError
from slimrank.evaluate.tasks import TaskRequest
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.report.comparison import headline, table
from task_folder import write_tasks

STAND_IN = """
import json, os, signal, sys
asked = json.loads(sys.stdin.readline())
options = asked["options"] or {}
with open(os.environ["SEEN"], "a") as seen:
    seen.write(json.dumps(options) + "\\n")
if options.get("method") == "asvd":
    print("noise", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGKILL)
size = options.get("keep_ratio", 1.0)
bits = int((options.get("quantize") or "int16")[3:].partition("-")[0])
perplexity = {"svd": 30, "svd_llm": 20}.get(options.get("method"), 10) / size
texts = {t: {"perplexity": perplexity} for t in asked["texts"]}
one = {"metrics": {"acc": {"value": 1.0, "stderr": None}}, "count": 1, "available": 8, "shots": 0, "version": 2.0,
    "questions": {"acc": [1.0]}}
tasks = {t: one for t in (asked["tasks"] or {"names": []})["names"]}
measured = {"texts": texts, "tasks": tasks, "parameters": size, "bytes": int(1000 * size * bits / 16),
    "sample": {"prompt": "p", "text": "t"},
    "environment": {"slimrank": "1", "python": "3", "versions": {}, "threads": 1, "device": "cpu", "dtype": "f",
        "texts": {}},
    "inputs": {"model": "m", "calibration": None}, "notes": []}
against = {"ratio": 1.5, "ratio_low": 1.25, "ratio_high": 1.75, "kl": 0.5, "top1": 90.0}
print(json.dumps(["stage", "pretending", 1]))
json.dump({"request": asked["key"], "error": None, **measured, "keep_ratio": size, "keep_total": size,
    "against": {t: against for t in asked["texts"]}, "speed_ratio": {"decode": 1.25, "prefill": 1.0}, "seconds": 2.0,
    "peak_memory": 1e9}, open(asked["result"], "w"))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    (folder / "text.txt").write_text(text(600))
    return folder


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Cells are not computed; gives the options of those that were asked for."""
    seen = tmp_path / "seen"
    seen.touch()
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setattr(processes, "WORKER", (sys.executable, "-c", textwrap.dedent(STAND_IN)))
    return lambda: [json.loads(line) for line in seen.read_text().splitlines()]


@pytest.fixture
def few_tasks(monkeypatch, tmp_path):
    """A folder of tasks; lm-evaluation-harness's own, which take it ten seconds to list, are not there."""
    manager = lm_eval.tasks.TaskManager
    own = {"include_defaults": False}
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path=None: manager(None, include_path, **own))
    return write_tasks(tmp_path / "tasks")


def cells(*methods, keeps=(0.8, 0.6)):
    return comparison.grid(methods, (), (), keeps, {"seq_len": 24})


def test_a_grid_has_every_method_with_every_allocation_at_every_size():
    made = comparison.grid(["svd_llm", "kfac_svd"], ["uniform", "spectrum"], ["fast"], [0.8, 0.6], {"samples": 4})
    assert [cell.name for cell in made] == [
        "svd_llm uniform 0.8", "svd_llm uniform 0.6", "svd_llm spectrum 0.8", "svd_llm spectrum 0.6",
        "kfac_svd uniform 0.8", "kfac_svd uniform 0.6", "kfac_svd spectrum 0.8", "kfac_svd spectrum 0.6",
        "fast 0.8", "fast 0.6",
    ]  # fmt: skip
    assert made[3].options == {"method": "svd_llm", "allocation": "spectrum", "samples": 4, "keep_ratio": 0.6}
    assert made[9].recipe() == Recipe.make(
        {**Recipe.preset("fast"), "samples": 4, "keep_ratio": 0.6, "evaluation": None}
    )


def test_files_at_their_own_budget_or_at_every_size(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: svd\nkeep_total: 0.9\n")
    (own,) = comparison.from_files([file], [], {})
    assert (own.name, own.options) == ("mine", {"method": "svd", "keep_total": 0.9})
    sized = comparison.from_files([file], [0.8, 0.7], {"seed": 3})
    assert [(cell.name, cell.recipe().keep_ratio, cell.recipe().keep_total) for cell in sized] == [
        ("mine 0.8", 0.8, None), ("mine 0.7", 0.7, None),
    ]  # fmt: skip


def test_parts_of_a_mixture_are_files_that_a_cell_depends_on(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("words")
    mixture, chat = f"{tmp_path}/a.txt:2,{tmp_path}/b.txt:1", {"calibration": "a.jsonl", "chat": True}
    asked = {"model": "m", "texts": ["demo"], "options": {"calibration": mixture}}
    assert sources_of(asked) == ["m", "demo", f"{tmp_path}/a.txt", f"{tmp_path}/b.txt", "None"]
    (few,) = comparison.in_few_bits(["6"], chat)
    assert chat.items() <= few.options.items()


def test_sizes_in_bytes_and_the_original_in_few_bits():
    made = comparison.grid(["svd_llm"], [], ["small"], [], {"seed": 3}, [120_000_000, 90_500_000])
    assert [cell.name for cell in made] == [
        "svd_llm uniform 120 MB", "svd_llm uniform 90.5 MB", "small 120 MB", "small 90.5 MB",
    ]  # fmt: skip
    assert made[3].recipe().max_bytes == 90_500_000
    shared = {"samples": 4, "form": "pivot", "allocation": "spectrum", "ignore": ("q_proj",)}
    few = comparison.in_few_bits(["6", "int4-g128-sym"], shared)
    assert [cell.name for cell in few] == ["dense int6-g64", "dense int4-g128-sym"]
    assert all(cell.baseline for cell in few)
    assert few[0].options == {
        "method": "svd", "keep_ratio": 1.0, "quantize": "int6-g64", "samples": 4, "ignore": ("q_proj",),
    }  # fmt: skip
    assert few[0].recipe().quantizes
    with pytest.raises(RecipeError, match=r"baseline '9'.*2 to 8 bits"):
        comparison.in_few_bits(["9"], {})


def test_each_cell_is_shown_beside_the_original_of_no_more_bytes(model, tmp_path, stand_in):
    made = [*cells("svd_llm", keeps=(0.8, 0.3, 0.1)), *comparison.in_few_bits(["int8", "int4"], {"seq_len": 24})]
    record = comparison.compare(model, made, tmp_path)
    assert record["baselines"] == ["dense int8", "dense int4"]
    rows = {row[0].removesuffix(" *"): row for row in table(record)}
    column = rows[""].index("dense at its size")
    assert [rows[f"svd_llm uniform {keep}"][column] for keep in (0.8, 0.3, 0.1)] == [
        "int8: 1.500", "int4: 1.500", "none as small",
    ]  # fmt: skip
    assert rows["dense int8"][column] == rows["original"][column] == ""
    shown = {row[0].removesuffix(" *"): row for row in headline(record)}
    assert shown["svd_llm uniform 0.3"][shown[""].index("dense at its size")] == "int4: 1.500"
    assert len({len(row) for row in headline(record)}) == len({len(row) for row in table(record)}) == 1
    assert "dense at its size" in (tmp_path / "comparison.md").read_text()
    plain = comparison.compare(model, cells("svd_llm", keeps=(0.8,)), tmp_path)
    assert "dense at its size" not in table(plain)[0] + list(headline(plain)[0])


def test_a_file_with_a_typo_is_named(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("methd: svd\n")
    with pytest.raises(RecipeError, match=r"bad\.yaml': there is no option 'methd'"):
        comparison.from_files([file], [0.8], {})


@pytest.mark.parametrize(
    "made, error, message",
    [
        ([], RecipeError, "nothing to compare"),
        ([Cell("a", {"method": "svdllm", "keep_ratio": 0.8})], RecipeError, "did you mean 'svd_llm'"),
        ([Cell("a", {"methd": "svd", "keep_ratio": 0.8})], RecipeError, "'a': "),
        ([Cell("a", {"method": "svd"})], RecipeError, "'a': "),
        ([Cell("a", {"method": "svd", "keep_ratio": 0.001})], BudgetError, "'a': "),
        ([Cell("a", {"allocation": "spektrum", "keep_ratio": 0.8})], RecipeError, "'a': there is no rank allocation"),
        ([Cell("a b", {"method": "svd", "keep_ratio": 0.8}), Cell("a-b", {"method": "svd", "keep_ratio": 0.7})],
         RecipeError, "two cells are called 'a-b'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_computed(made, error, message, model, tmp_path, stand_in):
    with pytest.raises(error) as refused:
        comparison.compare(model, made, tmp_path / "out")
    assert message in str(refused.value)
    assert stand_in() == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, measured, message",
    [
        ({}, {"tasks": TaskRequest(("smus", "wrods"))}, "no task 'smus', 'wrods'"),
        ({}, {"tasks": TaskRequest(("sums",), "/no/tasks")}, "'/no/tasks' does not exist"),
        ({}, {"texts": ["demo", "/no/text.txt"]}, "'/no/text.txt' does not exist"),
        ({}, {"texts": ["self"]}, "wrote itself"),
        ({"method": "svd_llm", "calibration": "/no/words.txt"}, {}, "'/no/words.txt' does not exist"),
        ({"allocation": "ada_cr", "calibration": "/no/words.txt"}, {}, "'/no/words.txt' does not exist"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_computed(
    options, measured, message, model, tmp_path, stand_in, few_tasks
):
    plain = {"method": "svd", "keep_ratio": 0.8}
    with pytest.raises(SlimrankError, match=message):
        comparison.compare(model, [Cell("a", plain), Cell("b", plain | options)], tmp_path / "out", **measured)
    assert stand_in() == []
    assert not (tmp_path / "out").exists()


def test_calibration_text_that_no_cell_reads_may_be_missing(model, tmp_path, stand_in):
    made = [Cell("a", {"method": "svd", "keep_ratio": 0.8, "calibration": "/no/words.txt"})]
    assert comparison.compare(model, made, tmp_path)["cells"]["a"]["error"] is None


@pytest.mark.parametrize(
    "name, instead",
    [
        ("method", "--methods"),
        ("allocation", "--allocations"),
        ("keep_ratio", "--keep"),
        ("device", "--device"),
        ("dtype", "--dtype"),
        ("evaluation", "--text"),
        ("windows", "--windows"),
    ],
)
def test_what_would_replace_or_be_replaced_is_refused(name, instead, tmp_path):
    with pytest.raises(RecipeError, match=f"'{name}' cannot be set.*\n.*{instead}"):
        comparison.grid(["svd"], [], [], [0.8], {name: "x"})
    file = tmp_path / "mine.yaml"
    file.write_text("method: svd\n")
    if name in ("method", "allocation"):
        assert comparison.from_files([file], [0.8], {name: "x"})[0].options[name] == "x"
    else:
        with pytest.raises(RecipeError, match=f"'{name}' cannot be set"):
            comparison.from_files([file], [0.8], {name: "x"})


def test_allocations_without_methods():
    with pytest.raises(RecipeError, match="none is named"):
        comparison.grid([], ["spectrum"], ["fast"], [0.8], {})


def test_methods_without_a_size():
    with pytest.raises(RecipeError, match="at some size"):
        comparison.grid(["svd"], [], [], [], {})


def test_a_cell_that_is_killed_does_not_stop_the_others(model, tmp_path, stand_in):
    record = comparison.compare(model, cells("svd", "asvd", "svd_llm"), tmp_path, texts=["demo"])
    failed = {name for name, cell in record["cells"].items() if cell["error"] is not None}
    assert failed == {"asvd uniform 0.8", "asvd uniform 0.6"}
    error = record["cells"]["asvd uniform 0.8"]["error"]
    assert "signal 9" in error["message"]
    assert "noise" in error["message"]
    assert record["pareto"] == ["svd_llm uniform 0.6", "svd_llm uniform 0.8"]
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(record))
    markdown = (tmp_path / "comparison.md").read_text()
    assert "| svd_llm uniform 0.6 * | 60.0 % |" in markdown
    assert "**asvd uniform 0.8 failed**" in markdown
    page = (tmp_path / "comparison.html").read_text()
    assert "<svg" in page
    assert page.count("<h1") == 1
    assert "asvd uniform 0.8 failed." in page


def test_a_task_of_one_question_is_left_out_of_the_differences(model, tmp_path, stand_in, few_tasks):
    told, progress = [], Progress()
    progress.note = told.append
    request = TaskRequest(("sums",), few_tasks, limit=1)
    record = comparison.compare(model, cells("svd", keeps=(0.8,)), tmp_path, tasks=request, progress=progress)
    assert record["cells"]["svd uniform 0.8"]["task_differences"] == {"sums": {}}
    assert record["too_few"] == {"sums": ["acc"]}
    assert "sums has fewer than two questions: no interval of a difference of acc" in told


def test_one_window_is_refused(model, tmp_path, stand_in):
    with pytest.raises(DataError, match="at least two windows"):
        comparison.compare(model, cells("svd"), tmp_path / "out", windows=1)
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_not_done_again_and_what_failed_is(model, tmp_path, stand_in):
    comparison.compare(model, cells("svd", "asvd", keeps=(0.8,)), tmp_path)
    assert len(stand_in()) == 3
    again = comparison.compare(model, cells("svd", "asvd", "svd_llm", keeps=(0.8,)), tmp_path)
    assert [options["method"] for options in stand_in()[3:]] == ["asvd", "svd_llm"]
    assert again["cells"]["svd uniform 0.8"]["error"] is None
    comparison.compare(model, cells("svd", keeps=(0.8,)), tmp_path, windows=3)
    assert len(stand_in()) == 7  # measured on something else: the original and the cell


@pytest.mark.parametrize("changed", ["text", "calibration", "model"])
def test_a_file_that_changed_is_seen(changed, model, tmp_path, stand_in):
    """Cells of what it was before are not taken for those of what it is now."""
    folder, text, calibration = tmp_path / "model", tmp_path / "text.txt", tmp_path / "calibration.txt"
    shutil.copytree(model, folder)
    for file in (text, calibration):
        file.write_text("one")
    made = comparison.grid(["svd"], (), (), [0.8], {"seq_len": 24, "calibration": str(calibration)})
    comparison.compare(folder, made, tmp_path / "out", texts=[str(text)])
    comparison.compare(folder, made, tmp_path / "out", texts=[str(text)])
    assert len(stand_in()) == 2
    {"text": text, "calibration": calibration, "model": folder / "tokenizer.json"}[changed].write_text("other words")
    comparison.compare(folder, made, tmp_path / "out", texts=[str(text)])
    assert len(stand_in()) == (3 if changed == "calibration" else 4)


def test_an_interruption_loses_no_cell(model, tmp_path, stand_in):
    progress = Progress()

    def note(message):
        if "3 of 4" in message:
            raise KeyboardInterrupt

    progress.note = note
    with pytest.raises(KeyboardInterrupt):
        comparison.compare(model, cells("svd", "svd_llm"), tmp_path, progress=progress)
    before = len(stand_in())
    assert before == 3
    comparison.compare(model, cells("svd", "svd_llm"), tmp_path)
    assert [(o["method"], o["keep_ratio"]) for o in stand_in()[before:]] == [("svd_llm", 0.8), ("svd_llm", 0.6)]


def test_one_comparison_at_a_time_in_a_folder(model, tmp_path, stand_in):
    (tmp_path / "out" / "cells").mkdir(parents=True)
    code = "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): print(1, flush=True); input()"
    holding = [sys.executable, "-c", code, str(tmp_path / "out" / "cells" / "lock")]
    with subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(RunError, match="another slimrank is at work"):
            comparison.compare(model, cells("svd"), tmp_path / "out")
        other.communicate("\n")
    assert not stand_in()
    comparison.compare(model, cells("svd"), tmp_path / "out")


def test_progress_of_cells_is_passed_on(model, tmp_path, stand_in):
    told, progress = [], Progress()
    progress.stage = lambda name, steps: told.append((name, steps))
    comparison.compare(model, cells("svd", keeps=(0.8,)), tmp_path, progress=progress)
    assert told.count(("pretending", 1)) == 2


def test_the_frontier():
    def cell(size, perplexity):
        return {"error": None, "bytes": size, "texts": {"t": {"perplexity": perplexity}}}

    points = {"a": cell(10, 5.0), "b": cell(8, 6.0), "c": cell(9, 7.0), "d": cell(12, 5.0), "e": {"error": {}}}
    assert running.pareto(points, "t") == ["b", "a"]


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("no room"),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_a_cell_that_runs_out_of_memory_says_so(failure, monkeypatch, tmp_path):
    def fail(asked, progress):
        raise failure

    monkeypatch.setattr(worker, "cell_record", fail)
    asked = {"key": "k", "options": {}, "result": str(tmp_path / "r.json")}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asked) + "\n"))
    monkeypatch.setattr(worker, "_watch_stdin", lambda: None)
    worker.main()
    made = json.loads((tmp_path / "r.json").read_text())
    assert made["error"]["type"] == "MemoryError"
    assert "batch_size" in made["error"]["hint"]


@pytest.mark.parametrize("failure", [IndexError("1"), RuntimeError("CUDA error: an illegal memory access")])
def test_other_failures_are_not_hidden(failure, monkeypatch, tmp_path):
    def fail(asked, progress):
        raise failure

    monkeypatch.setattr(worker, "cell_record", fail)
    asked = {"key": "k", "options": {}, "result": str(tmp_path / "r.json")}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asked) + "\n"))
    monkeypatch.setattr(worker, "_watch_stdin", lambda: None)
    with pytest.raises(type(failure)):
        worker.main()


def test_a_cell_ends_with_whoever_asked_for_it(model, tmp_path):
    """Else it would hold the run directory against the same command given again."""
    source = str(model / "text.txt")
    asked = {
        "key": "k", "model": str(model), "dtype": "auto", "device": "cpu", "texts": [source], "windows": 400,
        "seq_len": 24, "tasks": None, "options": None, "result": str(tmp_path / "result.json"),
    }  # fmt: skip
    with subprocess.Popen(processes.WORKER, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.close()
        assert process.wait(120) == 1
    assert not (tmp_path / "result.json").exists()


def test_the_real_thing(model, tmp_path, capsys):
    """Figures are those of compressing and measuring by hand; each method calibrates once for all its cells."""
    source = str(model / "text.txt")
    arguments = ["compare", str(model), "--methods", "svd_llm", "--allocations", "uniform,spectrum", "--keep", "0.6"]
    arguments += ["--calibration", source, "--samples", "4", "--seq-len", "24", "--text", source, "--windows", "4"]
    arguments += ["--set", "seed=3", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "svd_llm spectrum 0.6" in shown
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    for allocation in ("uniform", "spectrum"):
        cell = record["cells"][f"svd_llm {allocation} 0.6"]
        by_hand = slimrank.compress(
            str(model), method="svd_llm", allocation=allocation, keep_ratio=0.6, calibration=source, samples=4,
            seq_len=24, seed=3, evaluation=source, windows=4,
        )  # fmt: skip
        found = by_hand.report["after"]["perplexity"]["perplexity"]
        assert cell["texts"][source]["perplexity"] == pytest.approx(found, rel=1e-5)
        before = by_hand.report["before"]["perplexity"]["perplexity"]
        assert record["dense"]["texts"][source]["perplexity"] == pytest.approx(before, rel=1e-5)
        assert cell["against"][source]["ratio"] == pytest.approx(found / before, rel=1e-5)
        assert cell["peak_memory"] > 0
        assert cell["sample"] == by_hand.report["after"]["sample"]
        assert cell["inputs"] == by_hand.report["provenance"]["inputs"]
    page, markdown = ((tmp_path / "out" / f"comparison.{form}").read_text() for form in ("html", "md"))
    for told in (torch.__version__, cell["inputs"]["model"], cell["inputs"]["calibration"], "spectrum 0.6", "seed"):
        assert told in page
        assert told in markdown
    stages = [cell["stages"]["calibrate and decompose"] for cell in record["cells"].values()]
    assert len({path.parent for path in (tmp_path / "out" / "run").rglob("block-*")}) == 1
    assert stages[1] < stages[0]


def test_cells_of_other_methods_and_other_windows(model, tmp_path, in_this_process):
    """Methods that need the same statistics read the text once; cells of other windows have a run of their own."""
    source = str(model / "text.txt")
    common = {"keep_ratio": 0.6, "calibration": source, "seq_len": 24, "samples": 4}
    made = [Cell(method, {**common, "method": method}) for method in ("svd_llm", "coala")]
    made += [Cell("other windows", {**common, "method": "svd_llm", "samples": 3})]
    made += [Cell("other layers", {**common, "method": "svd_llm", "ignore": ["q_proj"]})]
    made += [Cell("no text", {**common, "method": "svd"})]
    record = comparison.compare(model, made, tmp_path / "out", texts=[source], windows=2, seq_len=24)
    assert [cell["error"] for cell in record["cells"].values()] == [None] * 5
    gathered = [{p.parent for p in run.rglob("column-*")} for run in (tmp_path / "out" / "run").iterdir()]
    assert sorted(len(places) for places in gathered) == [0, 1, 1, 1]
    perplexities = {cell["texts"][source]["perplexity"] for cell in record["cells"].values()}
    assert len(perplexities) == 5


def test_wrong_lists_on_the_command_line(model, tmp_path, capsys):
    for arguments, message in (
        (["--methods", "svd", "--keep", "a,b"], "not a list of numbers"),
        (["--methods", "svd"], "at some size"),
        (["--presets", "blanced", "--keep", "0.8"], "did you mean 'balanced'"),
        (["--methods", "svd", "--keep", "0.8", "--set", "sampels=3"], "did you mean 'samples'"),
        (["--methods", "svd", "--keep", "0.8", "--limit", "3"], "none is named"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["compare", str(model), *arguments, "--out", str(tmp_path / "out")])
        assert ended.value.code == 1
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_failed_cell_shows_and_ends_with_1(model, tmp_path, capsys, stand_in):
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(model), "--methods", "asvd,svd", "--keep", "0.8", "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "asvd uniform 0.8 failed" in shown
    assert "svd uniform 0.8 *" in shown


def a_record(perplexity):
    against = {"ratio": perplexity / 10, "ratio_low": perplexity / 11, "ratio_high": perplexity / 9, "kl": 12.5}
    cell = {
        "error": None,
        "bytes": 10**8,
        "keep_ratio": 0.8,
        "texts": {"t": {"perplexity": perplexity}},
        "against": {"t": against},
    }
    cell |= {"speed_ratio": {"decode": 1.25}, "seconds": 12345}
    names = ["svd_llm_v2 svd_llm_v2 0.8", "kfac_svd constrained_exact 0.8"]
    dense = {"bytes": 10**8, "texts": {"t": {"perplexity": 10.0}}}
    return {"texts": ["t"], "dense": dense, "cells": dict.fromkeys(names, cell), "baselines": [], "pareto": names[:1]}


@pytest.mark.parametrize("perplexity", [12.34, 283456789.12])
def test_numbers_are_whole_at_80_columns(perplexity, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _show(a_record(perplexity), tmp_path)
    table, *_ = capsys.readouterr().out.partition("columns left out, for lack of room: seconds")
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= 80
    for word in (f"{perplexity:.2f}", f"{perplexity / 10:.3f}", "12.5000", "constrained_exact", "0.8 *"):
        assert word in table
    assert "12,345" not in table


def test_notes_on_texts_are_those_of_the_cell(model, tmp_path, in_this_process):
    """Rows without text, and windows that are found in the calibration text, even in a copy of it."""
    copy = tmp_path / "copy.jsonl"
    copy.write_text(json.dumps({"text": (model / "text.txt").read_text()}) + '\n{"text": null}\n')
    options = {
        "keep_ratio": 0.6,
        "method": "svd_llm",
        "samples": 2,
        "seq_len": 64,
        "calibration": str(model / "text.txt"),
    }
    record = comparison.compare(
        model, [Cell("one", options)], tmp_path / "cmp", texts=["demo", str(copy)], windows=2, seq_len=64
    )
    skipped, found = record["cells"]["one"]["notes"]
    assert "1 rows without text" in skipped
    assert found.startswith(f"{copy}: the calibration text contains")


def test_a_folder_that_cannot_be_made(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Not a directory"):
        comparison.compare(model, [Cell("one", {"keep_ratio": 0.6, "method": "svd"})], tmp_path / "file" / "cmp")


def test_a_folder_in_the_home_folder(model, tmp_path, monkeypatch, in_this_process, text_file):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cell = Cell("one", {"keep_ratio": 0.6, "method": "svd"})
    comparison.compare(model, [cell], "~/cmp", texts=[str(text_file)], windows=2, seq_len=16)
    assert {"cells", "run", "comparison.json"} <= {p.name for p in (tmp_path / "home" / "cmp").iterdir()}
    assert not (tmp_path / "~").exists()
    with pytest.raises(OutputError, match="home directory"):
        comparison.compare(model, [cell], "~no-such-user/cmp", texts=[str(text_file)], windows=2, seq_len=16)


def test_former_names_of_options_do_for_all_cells():
    (cell,) = comparison.grid([], [], ["fast"], [0.8], {"factor_form": "pair"})
    assert cell.recipe().form == "pair"
