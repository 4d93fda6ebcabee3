"""`slimrank recover` and `compress --recover`: teachers, texts, folders and reports."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slimrank
from helpers import byte_tokenizer, save_tiny, text, tiny_model
from slimrank.cli.app import app
from slimrank.errors import DataError, ModelError, OutputError, RecipeError, RunError

FAST = {"learning_rate": 3e-3, "batch_size": 4, "checks": 2, "tokens": 480, "held_out": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a compressed one, and a text."""
    folder = tmp_path_factory.mktemp("recover")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text(text(400))
    options = {"keep_ratio": 0.6, "method": "svd", "evaluation": None}
    slimrank.compress(folder / "model", out=folder / "small", **options)
    return folder


def recover(place, out, **options):
    given = {"text": str(place / "text.txt"), "evaluation": (str(place / "text.txt"),), "windows": 4, "seq_len": 24}
    chosen = {**given, **options, "options": {**FAST, **options.get("options", {})}}
    return slimrank.recover(chosen.pop("model", place / "small"), chosen.pop("teacher", None), out=out, **chosen)


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


@pytest.mark.parametrize("method", ["distill", "lora_sequential", "block"])
def test_the_result_loads_is_better_and_as_large(method, place, tmp_path):
    result = recover(place, tmp_path / "better", method=method)
    record = json.loads((tmp_path / "better" / "recovery.json").read_text())
    assert record == json.loads(json.dumps(result.record.plain()))
    assert any(phase["kept"] for phase in record["phases"])
    name = str(place / "text.txt")
    assert record["bytes"][0] == record["bytes"][1]
    if method == "distill":
        assert record["after"][name]["kl"] < record["before"][name]["kl"]
    old, new = weights(place / "small"), weights(tmp_path / "better")
    assert {n: p.shape for n, p in old.items()} == {n: p.shape for n, p in new.items()}
    assert not all(torch.equal(old[n], new[n]) for n in old)
    assert (tmp_path / "better" / "plan.json").read_text() == (place / "small" / "plan.json").read_text()
    assert "tokens/s" in (tmp_path / "better" / "recovery.md").read_text()
    assert not (tmp_path / "better.run").exists()
    card = (tmp_path / "better" / "README.md").read_text()
    assert card.startswith((place / "small" / "README.md").read_text().rstrip())
    assert "## Recovery of" in card
    again = recover(
        place, tmp_path / "again", model=tmp_path / "better", method="distill"
    )  # its report names the original
    assert again.record.teacher == result.record.teacher


def test_a_model_in_bfloat16_stays_in_it(place, tmp_path):
    recover(place, tmp_path / "o", dtype="bfloat16", evaluation=())
    assert {p.dtype for p in weights(tmp_path / "o").values()} == {torch.bfloat16}


def test_another_teacher_is_refused(place, tmp_path):
    other = tmp_path / "other"
    tiny_model(num_hidden_layers=2).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    with pytest.raises(ModelError, match="its num_hidden_layers is 2, and that of the student 3"):
        recover(place, tmp_path / "o", teacher=other)
    with pytest.raises(ModelError, match="has no compressed layers"):
        slimrank.recover(place / "model", place / "model", out=tmp_path / "o")
    with pytest.raises(ModelError, match="there is no folder"):
        slimrank.recover(tmp_path / "nowhere", out=tmp_path / "o", text=str(place / "text.txt"))
    with pytest.raises(RecipeError, match=r"no report\.json that names its original"):
        slimrank.recover(place / "model", out=tmp_path / "o")


def test_bad_input_is_refused(place, tmp_path):
    with pytest.raises(RecipeError, match="recovery has no option 'txt'"):
        slimrank.recover(place / "small", out=tmp_path / "o", txt="demo")
    with pytest.raises(RecipeError, match=r"windows: .*greater than or equal to 2"):
        recover(place, tmp_path / "o", windows=1)
    (place / "short.txt").write_text("one window of 24 tokens, no more")
    with pytest.raises(DataError, match="one to train on and another to hold out are needed"):
        recover(place, tmp_path / "o", text=str(place / "short.txt"))
    with pytest.raises(DataError):
        recover(place, tmp_path / "o", text="/no/such.txt")
    with pytest.raises(OutputError, match="exists"):
        recover(place, place / "small")
    assert not (tmp_path / "o").exists()


def test_integers_are_not_trained(place, tmp_path):
    pytest.importorskip("compressed_tensors")
    slimrank.compress(
        place / "model", out=tmp_path / "q", keep_ratio=0.6, method="svd", quantize="int8", evaluation=None,
        calibration=str(place / "text.txt"), samples=2, seq_len=24,
    )  # fmt: skip
    with pytest.raises(ModelError, match="is quantised"):
        recover(place, tmp_path / "o", model=tmp_path / "q")


def test_a_run_directory_belongs_to_one_recovery(place, tmp_path):
    recover(place, tmp_path / "a", run_dir=tmp_path / "run", evaluation=())
    first = weights(tmp_path / "a")
    recover(place, tmp_path / "b", run_dir=tmp_path / "run", evaluation=())
    assert all(torch.equal(p, weights(tmp_path / "b")[n]) for n, p in first.items())
    with pytest.raises(RunError, match="belongs to a different run"):
        recover(place, tmp_path / "c", run_dir=tmp_path / "run", evaluation=(), seed=1)


def test_compress_recovers_before_it_rounds(place, tmp_path):
    options = {
        "keep_ratio": 0.6, "method": "svd", "allocation": "uniform", "seq_len": 24, "samples": 4, "windows": 4,
        "calibration": str(place / "text.txt"), "evaluation": str(place / "text.txt"),
    }  # fmt: skip
    plain = slimrank.compress(place / "model", **options)
    better = slimrank.compress(place / "model", recover="distill", recover_options=FAST, **options)
    assert better.plan == plain.plan
    assert better.report["size"] == plain.report["size"]
    sides = [result.report["after"]["perplexity"]["perplexity"] for result in (plain, better)]
    assert sides[0] != sides[1]
    (section,) = [s for s in better.report["sections"] if s["stage"] == "recover"]
    assert section["rows"][0][-1] == "yes"
    again = slimrank.compress(tiny_model(), byte_tokenizer(), recover="distill", recover_options=FAST, **options)
    for one, other in zip(better.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    told = slimrank.preview(place / "model", recover="distill", **options)
    assert told["seconds"]["recover"] > 0
    with pytest.raises(RecipeError, match="nothing is recovered"):
        slimrank.compress(place / "model", recover_options=FAST, **options)
    with pytest.raises(RecipeError, match="no recovery method 'x'"):
        slimrank.compress(place / "model", recover="x", **options)


def test_from_the_command_line(place, tmp_path):
    def run(*arguments):
        found = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return " ".join(found.output.split())

    options = [part for name, value in FAST.items() if name != "tokens" for part in ("--option", f"{name}={value}")]
    page = place / "text.txt"
    measured = ["--eval-text", page, "--windows", 4, "--seq-len", 24, "--tokens", 480]
    told = run("recover", place / "small", "--text", page, *measured, *options, "--out", tmp_path / "o")
    assert "everything but embeddings and output head: 480 tokens" in told
    assert "recovery.md" in told
    shown = run(
        "recover",
        place / "small",
        "--text",
        page,
        "--no-eval",
        "--seq-len",
        24,
        *options,
        "--out",
        tmp_path / "p",
        "--json",
    )
    assert '"evaluation": []' in shown
    assert "lora_sequential" in run("methods")
    assert "learning_rate" in run("methods", "distill")


def test_further_epochs_hold_no_held_out_window(place):
    from slimrank.methods.recoverer import RECOVERERS
    from slimrank.recovery.request import Recovery
    from slimrank.recovery.text import training_text
    from slimrank.text.overlap import windows_found

    reader = tiny_model(), byte_tokenizer()
    for source, tokens in ((str(place / "text.txt"), 10**6), (f"{place / 'text.txt'}:1,{place / 'short.txt'}:1", 400)):
        (place / "short.txt").write_text(text(30, seed=5))
        options = RECOVERERS.get("distill").configured({"held_out": 3, "tokens": tokens}).training
        train, held = training_text(Recovery.make({"text": source}), options, reader, 24)
        if ":" in source:
            assert not bool(windows_found(held.ids, train.ids.flatten()).any())
        else:
            once = len(reader[1]((place / "text.txt").read_text()).input_ids) + 1  # it ends with an EOS
            assert len(train) + len(held) == once // 24
        assert len(train) * 24 < 10**6
    with pytest.raises(RecipeError, match="how many tokens of"):
        training_text(Recovery.make({"text": "self"}), RECOVERERS.get("distill").configured({}).training, reader, 24)


def test_text_of_the_models_own_and_mixtures(place, tmp_path):
    page = place / "text.txt"
    for source in ("self", f"{page}:0.5,self:0.5"):
        result = recover(
            place, tmp_path / source.partition(":")[0].strip("/").replace("/", "-"), text=source, evaluation=()
        )
        assert result.record.phases[0].tokens >= 480 - 24


def test_chats_train_on_their_answers(place, tmp_path):
    from transformers import AutoTokenizer

    from slimrank.methods.recoverer import RECOVERERS
    from slimrank.recovery.request import Recovery
    from slimrank.recovery.text import training_text

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    rows = [
        {"messages": [{"role": "user", "content": "ab" * i}, {"role": "assistant", "content": "z" * i}]}
        for i in range(1, 40)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = Recovery.make({"text": str(tmp_path / "chats.jsonl"), "chat": True})
    options = RECOVERERS.get("distill").configured({"held_out": 2}).training
    train, held = training_text(asked, options, (tiny_model(), tokenizer), 24)
    letter = tokenizer("z", add_special_tokens=False).input_ids[0]
    counted = torch.cat([train.counted, held.counted])
    answers = torch.cat([train.ids, held.ids])[:, 1:] == letter
    assert bool(counted[:, :-1][answers].all())
    assert 0 < float(counted.float().mean()) < 0.6


def test_two_processes_train_what_one_trains(place, tmp_path):
    """Each takes its part of a step; the gradients are averaged."""
    options = [part for name, value in FAST.items() if name != "tokens" for part in ("--option", f"{name}={value}")]
    given = ["recover", place / "small", "--text", place / "text.txt", "--no-eval", "--seq-len", 24, "--tokens", 480]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "slimrank"]
    command = [str(part) for part in (*launch, *given, *options, "--out", tmp_path / "two")]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("written to") == 1
    recover(place, tmp_path / "one", evaluation=())
    start, one, two = (weights(folder) for folder in (place / "small", tmp_path / "one", tmp_path / "two"))
    moved = max(float((one[name] - start[name]).abs().max()) for name in start)
    assert max(float((one[name] - two[name]).abs().max()) for name in start) < 0.02 * moved
    assert not (tmp_path / "two.run").exists()
