"""What every metric keeps to, one from outside the package included."""

import json
import math

import pytest
import torch
from pydantic import ValidationError

import slimrank
from helpers import byte_tokenizer, save_tiny, text, tiny_model
from slimrank.cli import main
from slimrank.evaluate.agreement import agreement
from slimrank.evaluate.api import evaluate
from slimrank.evaluate.metric import METRICS, ModelMetric, Subject, Text, TextMetric, metric, metrics
from slimrank.evaluate.suite import Suite, compare, measure
from slimrank.evaluate.tasks import TaskRequest, Tasks
from slimrank.progress import Progress
from slimrank.report.record import RunRecord
from task_folder import write_tasks

WINDOWS = torch.randint(250, (8, 16), generator=torch.Generator().manual_seed(0))


class Hits(TextMetric):
    """Percent of tokens that the model puts first."""

    id, title, unit, better, in_report = "hits", "tokens put first", "%", "higher", True

    def value(self, model, on):
        with torch.no_grad():
            best = model(input_ids=on.windows).logits[:, :-1].argmax(-1)
        return 100 * float((best == on.windows[:, 1:]).double().mean())


class Layers(ModelMetric):
    id, title, better, in_report = "modules", "modules", "lower", True

    def value(self, model, on):
        return sum(1 for _ in model.modules())


@pytest.fixture
def outside(monkeypatch):
    METRICS.all()
    monkeypatch.setattr(METRICS, "entries", dict(METRICS.entries))
    assert metric(Hits) is Hits
    metric(Layers)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    pytest.importorskip("lm_eval")
    folder = write_tasks(tmp_path_factory.mktemp("questions") / "tasks")
    return Tasks(TaskRequest(("sums",), folder))


def numbers(record):
    if isinstance(record, dict):
        for value in record.values():
            yield from numbers(value)
    elif isinstance(record, (list, tuple)):
        for value in record:
            yield from numbers(value)
    elif isinstance(record, (int, float)):
        yield record


@pytest.mark.parametrize("id", ["hits", "kl", "modules", "perplexity", "tasks", "top1"])
def test_every_metric_keeps_the_contract(id, outside, tasks):
    assert sorted(METRICS.all()) == ["hits", "kl", "modules", "perplexity", "tasks", "top1"]
    found = METRICS.get(id)
    assert found.title
    assert found.better in ("lower", "higher")
    assert isinstance(found.unit, str)
    assert found in metrics(found.scope)
    tokenizer = byte_tokenizer()
    on = Text("t", WINDOWS, tokenizer) if found.scope == "text" else Subject(tokenizer, tasks=tasks)
    model, dense = tiny_model(seed=1), tiny_model()
    both = found.compare(model, dense, on)
    assert all(map(math.isfinite, numbers(both.own)))
    assert list(numbers(both.against))
    assert all(map(math.isfinite, numbers(both.against)))
    json.dumps([both.own, both.against])
    assert (both.own is None) == (not found.alone)
    if found.alone:
        assert json.dumps(found.measure(model, on)) == json.dumps(both.own)
    else:
        assert not found.in_report


def test_records_without_metrics_from_outside_are_as_they_were():
    own, against = compare(tiny_model(seed=1), tiny_model(), byte_tokenizer(), Suite({"t": WINDOWS}))
    assert list(own) == ["texts", "tasks"]
    assert list(own["texts"]["t"]) == ["perplexity", "windows", "seq_len", "tokens", "bos", "nll"]
    assert list(against) == ["texts", "tasks", "too_few"]
    assert list(against["texts"]["t"]) == [
        "perplexity", "nll", "difference", "low", "high", "significant", "ratio", "ratio_low", "ratio_high",
        "kl", "top1",
    ]  # fmt: skip
    both = agreement(tiny_model(seed=1), tiny_model(), WINDOWS)
    assert (against["texts"]["t"]["kl"], against["texts"]["t"]["top1"]) == (both.kl, both.top1)


def test_two_models_take_one_pass_each_however_many_metrics_ask():
    calls = []
    model, dense = tiny_model(seed=1), tiny_model()
    for some in (model, dense):
        some.register_forward_hook(lambda *_: calls.append(1))
    compare(model, dense, byte_tokenizer(), Suite({"t": WINDOWS}))
    assert len(calls) == 2


def test_a_metric_from_outside_stands_in_every_record(outside):
    model, dense = tiny_model(seed=1), tiny_model()
    own, against = compare(model, dense, byte_tokenizer(), Suite({"t": WINDOWS}))
    hits, other = own["texts"]["t"]["hits"], against["texts"]["t"]["hits"]
    assert (hits["unit"], hits["better"], hits["title"]) == ("%", "higher", "tokens put first")
    assert other["difference"] == hits["value"] - other["value"]
    assert measure(model, byte_tokenizer(), Suite({"t": WINDOWS}))["texts"]["t"]["hits"] == hits
    assert own["modules"]["value"] == sum(1 for _ in model.modules())
    assert against["modules"]["difference"] == 0


def test_a_metric_from_outside_is_told_before_and_after_and_in_files(outside, tmp_path):
    (tmp_path / "text.txt").write_text(text())
    folder, source = save_tiny(tmp_path / "tiny"), str(tmp_path / "text.txt")
    slimrank.compress(
        folder, out=tmp_path / "out", keep_ratio=0.6, method="svd", evaluation=source, windows=2, seq_len=24
    )
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(written["before"]["hits"]) == list(written["after"]["hits"]) == ["value", "title", "unit", "better"]
    typed = RunRecord.model_validate(written)
    assert typed.content() == written
    assert typed.after.hits.value == written["after"]["hits"]["value"]
    for name in ("report.md", "report.html", "README.md"):
        assert "tokens put first (higher is better)" in (tmp_path / "out" / name).read_text()
    found = evaluate(tmp_path / "out", [source], windows=2, seq_len=24, against=str(folder))
    assert found["texts"][source]["hits"]["value"] == written["after"]["hits"]["value"]
    assert found["against"]["texts"][source]["hits"]["value"] == written["before"]["hits"]["value"]
    assert found["modules"]["title"] == "modules"


def test_a_run_that_was_measured_before_a_metric_was_registered_is_measured_again(tmp_path, request):
    (tmp_path / "text.txt").write_text(text())
    folder, source = save_tiny(tmp_path / "tiny"), str(tmp_path / "text.txt")
    options = {"keep_ratio": 0.6, "method": "svd", "evaluation": source, "windows": 2, "seq_len": 24}
    first = slimrank.compress(folder, run_dir=tmp_path / "run", **options).report
    request.getfixturevalue("outside")
    again = slimrank.compress(folder, run_dir=tmp_path / "run", **options).report
    assert "hits" not in first["before"]
    for side in ("before", "after"):
        assert again[side]["hits"]["title"] == "tokens put first"
        assert again[side]["perplexity"] == first[side]["perplexity"]


def test_a_record_that_no_report_can_show_is_refused_before_the_work(outside, tmp_path, text_file, monkeypatch):
    monkeypatch.setattr("slimrank.pipeline.stages.calibrate.Calibrate.run", lambda *_: pytest.fail("work was done"))
    metric(type("Bare", (Hits,), {"id": "bare", "measure": lambda self, model, on: {"value": 1.0}}))
    options = {"method": "svd_llm", "keep_ratio": 0.6, "windows": 2, "seq_len": 24, "samples": 2}
    with pytest.raises(ValidationError, match=r"bare\.title"):
        slimrank.compress(
            save_tiny(tmp_path / "tiny"), calibration=str(text_file), evaluation=str(text_file), **options
        )


@pytest.mark.parametrize("beside", [False, True])
def test_a_metric_from_outside_is_shown_in_the_terminal(outside, beside, tiny_folder, text_file, capsys):
    asked = ["evaluate", str(tiny_folder), "--text", str(text_file), "--windows", "2", "--seq-len", "24"]
    with pytest.raises(SystemExit):
        main([*asked, *(["--against", str(tiny_folder)] if beside else [])])
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("tokens put first", "modules", "higher"))
    assert ("its value" in shown and "+0" in shown) == beside


def test_mistakes_of_metrics_are_named(outside, monkeypatch):
    with pytest.raises(ValueError, match="cannot be called 'speed'"):
        metric(type("Speed", (Hits,), {"id": "speed"}))
    metric(type("Twice", (Hits,), {"id": "twice", "fields": lambda self, found: {"nll": found}}))
    with pytest.raises(ValueError, match=r"repeats the fields \['nll'\]"):
        measure(tiny_model(), byte_tokenizer(), Suite({"t": WINDOWS}))
    metric(type("Twice", (Hits,), {"id": "twice", "value": lambda self, model, on: math.nan}))
    with pytest.raises(slimrank.SlimrankError, match="tokens put first is nan"):
        measure(tiny_model(), byte_tokenizer(), Suite({"t": WINDOWS}), Progress())
