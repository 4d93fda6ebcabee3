import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
import torch
from lm_eval.api import task as lm_eval_task

import slimrank
from helpers import byte_tokenizer, save_tiny, tiny_model
from slimrank.errors import DataError, MissingExtraError, NonFiniteError, RecipeError
from slimrank.evaluate.tasks import TaskRequest, Tasks
from slimrank.models.load import load
from slimrank.progress import Progress
from task_folder import write_tasks

ARC = Path(lm_eval.tasks.__file__).parent / "arc"
FullTaskManager = lm_eval.tasks.TaskManager


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    """Of lm-evaluation-harness's own tasks, which take it ten seconds to list, only ARC."""

    def manager(include_path=None):
        paths = [ARC] if include_path is None else [ARC, include_path]
        return FullTaskManager(include_path=paths, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


@pytest.fixture
def folder(tmp_path):
    return write_tasks(tmp_path / "tasks")


def asked(folder, *names, progress=None, model=None, **options):
    tasks = Tasks(TaskRequest(names, folder, **options), progress)
    return tasks.run(model or tiny_model(), byte_tokenizer())


@pytest.mark.parametrize("shots", [None, 3])
def test_figures_are_those_of_lm_eval(folder, tmp_path, shots):
    model = str(save_tiny(tmp_path / "tiny"))
    names = ["sums", "words", "prose", "local_arc_easy"]
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": model}, device="cpu", batch_size=8, tasks=names, num_fewshot=shots,
        limit=5, task_manager=FullTaskManager(include_path=[ARC, folder], include_defaults=False),
    )  # fmt: skip
    ours = asked(folder, *names, shots=shots, limit=5)
    assert set(ours) == set(theirs["samples"]) == {"sums", "words", "prose", "arc_easy"}
    for task, result in ours.items():
        figures = theirs["results"][task]
        for name, metric in result.metrics.items():
            stderr = figures[f"{name}_stderr,none"]
            assert metric.value == figures[f"{name},none"]
            assert metric.stderr == (None if stderr == "N/A" else stderr)
        assert result.shots == theirs["n-shot"][task]
    assert ours["arc_easy"].metrics.keys() == {"acc", "acc_norm"}
    assert ours["sums"].count == 5
    assert ours["sums"].available == 8


def test_the_command_of_lm_eval_measures_a_compressed_model(folder, tmp_path):
    """In a process that knows nothing of slimrank; its figures are ours of the same folder."""
    out = tmp_path / "out"
    tiny, small = save_tiny(tmp_path / "tiny"), {"samples": 4, "seq_len": 32, "evaluation": None}
    slimrank.compress(tiny, out=out, keep_ratio=0.6, method="svd_llm", form="pivot", **small)
    start = "import sys; sys.modules['slimrank'] = None; from lm_eval.__main__ import *; cli_evaluate()"
    command = [
        sys.executable, "-c", start, "--model", "hf", "--model_args", f"pretrained={out},trust_remote_code=True",
        "--device", "cpu", "--batch_size", "8", "--tasks", "sums,prose", "--include_path", str(folder), "--limit", "5",
        "--output_path", str(tmp_path / "theirs"),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=300)
    (written,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]
    ours = asked(folder, "sums", "prose", limit=5, model=load(out)[0])
    for task, result in ours.items():
        for name, metric in result.metrics.items():
            assert metric.value == theirs[task][f"{name},none"]


def test_accuracy_by_hand(folder):
    """The answer whose tokens are likeliest after the prompt, each prompt by itself and in float64."""
    model, tokenizer = tiny_model().double(), byte_tokenizer()
    right = []
    for a, b in [(a, b) for a in range(6) for b in (1, 2)][4:]:
        scores = []
        for answer in (f" {a + b}", f" {a + b + 1}", f" {a}"):
            prompt, ids = tokenizer(f"{a} + {b} =")["input_ids"], tokenizer(f"{a} + {b} ={answer}")["input_ids"]
            with torch.no_grad():
                logs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
            scores.append(sum(float(logs[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
        right.append(float(scores[0] == max(scores)))
    result = asked(folder, "sums")["sums"]
    assert result.questions["acc"] == tuple(right)
    assert 0 < sum(right) < len(right)
    assert result.metrics["acc"].value == sum(right) / len(right)
    assert result.metrics["acc"].stderr == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)


def test_figures_of_groups(folder):
    results = asked(folder, "both")
    assert list(results) == ["sums", "words", "both"]
    assert results["both"].metrics["acc"].value == results["sums"].metrics["acc"].value
    assert (results["both"].count, results["both"].questions) == (12, {})


def test_questions_that_are_no_numbers_are_left_out(folder):
    results = asked(folder, "prose", "words")
    assert results["prose"].questions == {}
    assert results["prose"].metrics["word_perplexity"].value > 1
    assert len(results["words"].questions["exact_match"]) == 4


def test_the_same_tasks_put_to_several_models(folder):
    tasks = Tasks(TaskRequest(("sums", "words"), folder, shots=2))
    first, other, again = (tasks.run(tiny_model(seed=s), byte_tokenizer()) for s in (0, 1, 0))
    assert first == again == asked(folder, "sums", "words", shots=2)
    assert first != other


def test_nothing_of_the_caller_changes(folder):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    logger, bar = logging.getLogger("lm_eval").level, lm_eval_task.tqdm
    model, tokenizer = tiny_model().train(), byte_tokenizer()
    tokenizer.pad_token = None
    try:
        Tasks(TaskRequest(("sums",), folder, shots=1)).run(model, tokenizer)
        assert tokenizer.pad_token is None
    finally:
        tokenizer.pad_token = "<pad>"
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert (logging.getLogger("lm_eval").level, lm_eval_task.tqdm) == (logger, bar)
    assert model.training


def test_nothing_is_printed(folder, capfd):
    asked(folder, "sums", "words", "prose", "arc_easy", shots=1)
    assert capfd.readouterr() == ("", "")


def test_names(folder):
    progress = Notes()
    tasks = Tasks(TaskRequest(("arc_easy", "arc_challenge"), folder), progress)
    assert tasks.loaded.names == ("local_arc_easy", "arc_challenge")
    assert progress.notes == ["the task 'arc_easy' is 'local_arc_easy' of the task folder"]
    results = tasks.run(tiny_model(), byte_tokenizer())
    assert results["arc_easy"].available == 9
    assert results["arc_challenge"].available == 8, "the folder's wins over lm-evaluation-harness's own"
    settings = tasks.described()
    assert settings["names"] == ["local_arc_easy", "arc_challenge"]
    assert settings["tasks_dir"] == str(folder)
    assert settings["lm_eval"]


def test_a_name_that_the_folder_has_is_not_turned_into_another(tmp_path):
    folder = write_tasks(tmp_path / "tasks", local_sums="include: sums.yaml\ntask: local_sums\n")
    assert Tasks(TaskRequest(("sums",), folder)).loaded.names == ("sums",)


def test_prompts_that_the_context_does_not_hold(folder):
    progress = Notes()
    asked(folder, "sums", model=tiny_model(max_position_embeddings=20), shots=3, progress=progress)
    assert progress.notes == [
        "24 prompts are too long for the model's context of 20 tokens: their beginnings were left out"
    ]
    progress = Notes()
    asked(folder, "words", model=tiny_model(max_position_embeddings=9), progress=progress)
    assert progress.notes[0].startswith("4 prompts")


def test_an_answer_that_the_context_does_not_hold(tmp_path):
    long = "include: sums.yaml\ntask: long\ndoc_to_choice: \"{{['a', 'b' * 29, 'c']}}\"\n"
    folder = write_tasks(tmp_path / "tasks", long=long)
    asked(folder, "long", model=tiny_model(max_position_embeddings=30))
    with pytest.raises(DataError, match="an answer of 30 tokens is longer than the model's context of 29") as raised:
        asked(folder, "long", model=tiny_model(max_position_embeddings=29))
    assert "longer context" in raised.value.hint


def test_shots_of_a_task_that_is_defined_with_none(folder):
    progress = Notes()
    assert asked(folder, "words", shots=2, progress=progress)["words"].shots == 0
    assert progress.notes == ["the task 'words' is defined with no examples: it gets none"]


def test_nan(folder):
    model = tiny_model()
    model.model.norm.register_forward_hook(lambda m, a, out: out * float("nan"))
    with pytest.raises(NonFiniteError, match="NaN"):
        asked(folder, "sums", model=model)


@pytest.mark.parametrize(
    "names, options, error, message",
    [
        (["smus"], {}, RecipeError, "no task 'smus'.\n  try: did you mean 'sums'"),
        (
            ["smus", "sums", "wrods"],
            {},
            RecipeError,
            "no task 'smus', 'wrods'.\n  try: did you mean 'sums'? did",
        ),
        (["local_arc_eazy"], {}, RecipeError, "'local_arc_easy'"),
        (["sums", "both"], {}, RecipeError, "'sums' of 'both' is asked for twice"),
        (["sums", "sums"], {}, RecipeError, "twice"),
        (["sums"], {"shots": 5}, RecipeError, "'sums' can be made with 5 examples"),
        (["broken_rows"], {}, DataError, "'broken_rows' cannot be loaded: no rows are here\n  try: check the network"),
        (
            ["broken_prompt"],
            {},
            DataError,
            "'broken_prompt' cannot be loaded: 'int object' has no attribute 'no'\n  try: correct",
        ),
    ],
)
def test_tasks_that_cannot_be_run(folder, names, options, error, message):
    with pytest.raises(error) as raised:
        Tasks(TaskRequest(tuple(names), folder, **options))
    assert message in str(raised.value)
    assert raised.value.hint


def test_no_network(folder):
    """tests/conftest.py switches the hub off."""
    with pytest.raises(DataError, match="'arc_easy' cannot be loaded") as raised:
        Tasks(TaskRequest(("arc_easy",)))
    assert "network" in raised.value.hint
    progress = Notes()
    (folder / "local_arc_easy.yaml").unlink()
    with pytest.raises(DataError):
        Tasks(TaskRequest(("arc_easy",), folder), progress)
    assert progress.notes == ["the task folder has no 'arc_easy': it is lm-evaluation-harness's own"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"torn": "task: [sums\n"}, r"torn\.yaml' cannot be read.*line 2"),
        ({"torn": "just words"}, r"torn\.yaml' is not a mapping"),
        ({"torn": "include: nowhere.yaml\ntask: torn\n"}, r"torn\.yaml' includes 'nowhere\.yaml'"),
    ],
)
def test_broken_folders(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as raised:
        Tasks(TaskRequest(("sums",), write_tasks(tmp_path / "tasks", **changes)))
    assert raised.value.hint


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Tasks(TaskRequest(("sums",), tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no task file"):
        Tasks(TaskRequest(("sums",), tmp_path))


def test_lm_eval_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingExtraError, match=r"slimrank\[eval\]"):
        Tasks(TaskRequest(("sums",)))


@pytest.mark.parametrize(
    "request_options, message",
    [
        ({"names": ()}, "no task is named"),
        ({"names": ("sums", "")}, "has no name"),
        ({"names": ("sums",), "shots": -1}, "--shots must be 0 or more, got -1"),
        ({"names": ("sums",), "limit": 0}, "--limit must be 1 or more, got 0"),
    ],
)
def test_requests_out_of_range(request_options, message):
    with pytest.raises(RecipeError, match=message) as raised:
        TaskRequest(**request_options)
    assert raised.value.hint.startswith("--")
