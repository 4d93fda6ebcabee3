"""The suites that papers report."""

import json
import math

import numpy as np
import pytest
import torch
from suite_folder import write_data

import slimrank
from helpers import save_tiny
from slimrank.cli import main
from slimrank.errors import DataError, RecipeError
from slimrank.evaluate.api import evaluate
from slimrank.evaluate.published import SEVEN, SUITES, SuiteRequest
from slimrank.evaluate.suite_data import read_text
from slimrank.evaluate.suite_means import mean_differences, suite_means
from slimrank.evaluate.tasks import TaskRequest

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("suite") / "data")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny(folder / str(seed), bos=True, max_position_embeddings=1024, seed=seed) for seed in (0, 1)]


def loss_by_hand(folder, text, length):
    """Mean loss over whole blocks of ids without special tokens, in float64."""
    model, tokenizer = slimrank.load(folder)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    blocks = ids[: len(ids) // length * length].reshape(-1, length)
    with torch.no_grad():
        scores = model(input_ids=blocks).logits[:, :-1].double().log_softmax(-1)
    return float(-scores.gather(-1, blocks[:, 1:, None]).mean()), len(blocks)


@pytest.fixture(scope="module")
def paper(models, data):
    return evaluate(models[0], suite=SuiteRequest("paper", data, seq_len=128), against=models[1])


def test_perplexity_is_that_of_blocks_without_special_tokens(paper, models, data):
    lines = (data / "wikitext2" / "wiki.test.raw.txt").read_text().split("\n")[:-1]
    texts = {
        "wikitext2": "\n\n".join(line + "\n" if line.strip() else "" for line in lines),
        "ptb": "\n\n".join(line.strip() for line in (data / "ptb" / "ptb.test.txt").read_text().splitlines()),
        "c4": "\n\n".join(json.loads(line)["text"] for line in (data / "c4" / "validation.jsonl").open()),
    }
    assert list(paper["texts"]) == list(texts)
    for name, text in texts.items():
        loss, blocks = loss_by_hand(models[0], text, 128)
        found = paper["texts"][name]
        assert found["windows"] == blocks
        assert not found["bos"]
        assert math.isclose(math.log(found["perplexity"]), loss, rel_tol=1e-5)
    assert any("without the BOS" in note for note in paper["notes"])


def test_tasks_are_those_of_lm_eval(paper, models, data, tmp_path):
    """The same rows through a task file as a user writes it."""
    (tmp_path / "rows.py").write_text(
        "import json, datasets\n"
        "def load(**_):\n"
        f"    rows = [json.loads(line) for line in open({str(data / 'arc_easy' / 'test.jsonl')!r})]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
    )
    (tmp_path / "own.yaml").write_text(
        "group: own\ntask:\n  - task: arc_easy\n    custom_dataset: !function rows.load\n"
        "    training_split: null\n    validation_split: null\n"
    )
    own = evaluate(models[0], tasks=TaskRequest(("own",), tmp_path))
    assert paper["tasks"]["arc_easy"] == own["tasks"]["arc_easy"]
    assert list(paper["tasks"]) == list(SEVEN)
    assert paper["task_settings"]["tasks_dir"] == str(data)


def test_the_means_and_their_difference(paper):
    tasks, suite = paper["tasks"], paper["suite"]
    assert math.isclose(suite["means"]["acc"], np.mean([tasks[t]["metrics"]["acc"]["value"] for t in SEVEN]))
    fallen = [tasks[t]["metrics"].get("acc_norm", tasks[t]["metrics"]["acc"])["value"] for t in SEVEN]
    assert math.isclose(suite["means"]["acc_norm"], np.mean(fallen))
    found = suite["against"]["acc"]
    assert math.isclose(found["difference"], suite["means"]["acc"] - found["value"], abs_tol=1e-12)
    assert found["low"] <= found["difference"] <= found["high"]


def test_the_interval_is_that_of_independent_tasks():
    generator = np.random.default_rng(0)
    values = {t: (generator.random(40 + 30 * i) < 0.6, generator.random(40 + 30 * i) < 0.2) for i, t in enumerate("ab")}
    tasks = {t: {"count": len(own), "metrics": {"acc": {"value": own.mean()}}} for t, (own, _) in values.items()}
    against = {
        t: {
            "acc": {
                "value": other.mean(), "difference": own.mean() - other.mean(),
                "lost": int((other & ~own).sum()), "gained": int((own & ~other).sum()),
            }
        }
        for t, (own, other) in values.items()
    }  # fmt: skip
    found = mean_differences(tasks, against, "ab")["acc"]
    differences = [own.astype(float) - other for own, other in values.values()]
    error = math.sqrt(sum(d.var(ddof=1) / len(d) for d in differences)) / 2
    assert math.isclose(found["high"] - found["low"], 2 * 1.96 * error, rel_tol=1e-9)
    assert math.isclose(found["difference"], np.mean([d.mean() for d in differences]))
    assert found["significant"]
    assert suite_means(tasks, "ab")["acc_norm"] == suite_means(tasks, "ab")["acc"]


def test_generation_as_in_table_1_of_svd_llm(models, data):
    record = evaluate(models[0], suite=SuiteRequest("svd_llm", data, limit=1, windows=1, seq_len=64))
    assert {"bleu_max", "bleu_acc"} <= set(record["tasks"]["truthfulqa_gen"]["metrics"])
    assert record["tasks"]["gsm8k"]["shots"] == 5
    assert set(record["suite"]["averaged"]) == set(SEVEN)


def test_the_screen_and_the_files_of_the_arena(models, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SUITES["arena"].most, "c4", 3)
    with pytest.raises(SystemExit) as stopped:
        main([
            "evaluate", str(models[0]), "--suite", "arena", "--data-dir", str(data), "--seq-len", "128",
            "--arena-dir", str(tmp_path / "arena"), "--limit", "2", "--against", str(models[1]),
        ])  # fmt: skip
    assert not stopped.value.code
    assert "mean of 7 tasks" in capsys.readouterr().out
    ppl, mcq = (json.loads((tmp_path / "arena" / f"{kind}__0.json").read_text()) for kind in ("ppl", "mcq"))
    keys = [
        "artifacts", "backend", "checkpoint", "config", "details", "generated_at", "kind", "metrics", "run", "runtime",
        "schema_version", "status", "suite", "validation",
    ]  # fmt: skip
    for content in (ppl, mcq):
        assert sorted(content) == keys
        assert (content["schema_version"], content["kind"], content["status"]) == ("1.1", "eval", "completed")
    tasks = {task["name"]: task for task in ppl["details"]["tasks"]}
    c4 = tasks["c4_stream"]
    assert (c4["block_count"], c4["token_count"], len(c4["tokens_sha256"])) == (3, 3 * 127, 64)
    assert math.isclose(math.exp(c4["negative_log_likelihood_sum"] / c4["token_count"]), c4["ppl"], rel_tol=1e-9)
    assert math.isclose(ppl["metrics"]["mean"], (c4["ppl"] + tasks["wikitext2"]["ppl"]) / 2)
    assert mcq["details"]["tasks"]["boolq"]["metric"] == "acc"
    assert mcq["details"]["tasks"]["piqa"]["metric"] == "acc_norm"
    values = [task["value"] for task in mcq["details"]["tasks"].values()]
    assert len(values) == mcq["metrics"]["task_count"] == 7
    assert math.isclose(mcq["metrics"]["mean"], sum(values) / 7)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite", "papre", "--data-dir", "{data}"], "did you mean 'paper'"),
        (["--suite", "paper"], "belong together"),
        (["--data-dir", "{data}"], "belong together"),
        (["--suite", "paper", "--data-dir", "/no/data"], "no folder '/no/data'"),
        (["--suite", "paper", "--data-dir", "{data}", "--text", "demo"], "texts and tasks of its own"),
        (["--suite", "paper", "--data-dir", "{data}", "--tasks", "piqa"], "texts and tasks of its own"),
        (["--suite", "paper", "--data-dir", "{data}", "--arena-dir", "x"], "about the suite 'arena'"),
    ],
)
def test_wrong_options(models, data, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(models[0]), *(a.format(data=data) for a in arguments)])
    assert stopped.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_is_missing_is_named(tmp_path, models, data):
    with pytest.raises(DataError, match=r"'ptb' is missing: there is no .*ptb\.test\.txt"):
        read_text("ptb", tmp_path)
    some = write_data(tmp_path / "some", 2)
    (some / "piqa" / "validation.jsonl").unlink()
    with pytest.raises(DataError, match="questions of 'piqa' are missing"):
        evaluate(models[0], suite=SuiteRequest("paper", some))
    with pytest.raises(RecipeError, match="--limit must be 1 or more"):
        evaluate(models[0], suite=SuiteRequest("paper", data, limit=0))
