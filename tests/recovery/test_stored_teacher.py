"""Stored predictions of the original: the divergence of k + 1 events, files, resuming, and what is refused."""

import copy
import os
import subprocess
import sys
from functools import cache
from itertools import pairwise
from math import inf
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import slimrank
from helpers import save_tiny, text, tiny_model
from slimrank import store
from slimrank.errors import OutputError, RecipeError, RunError
from slimrank.methods.recoverer import RECOVERERS
from slimrank.models.contexts import evaluating
from slimrank.progress import Progress
from slimrank.recovery import loss, stored_teacher
from slimrank.recovery.cost import Sizes, expected_tokens, training_cost
from slimrank.recovery.head import Head
from slimrank.recovery.loss import Positions, Terms, head_loss
from slimrank.recovery.machine import Machine
from slimrank.recovery.processes import check_sharding
from slimrank.recovery.recovering import run_phases
from slimrank.recovery.request import Recovery
from slimrank.recovery.stored_teacher import StoredTeacher, seen
from slimrank.recovery.student import Student
from slimrank.recovery.top_k import TopK, bytes_of
from slimrank.recovery.trainer import Windows, held_out_loss

DRAW = torch.Generator().manual_seed(0)
STARTS, STRIDES = (torch.randint(1, high, (36, 1), generator=DRAW) for high in (40, 4))
IDS = (STARTS + STRIDES * torch.arange(16)) % 40 + 30
TEXT = Windows(IDS[:28], torch.ones(28, 16, dtype=torch.bool)), Windows(IDS[28:], torch.ones(8, 16, dtype=torch.bool))
FAST = {"learning_rate": 3e-3, "batch_size": 4, "checks": 3}
EPOCHS = 2 * 28 * 16


@cache
def teacher():
    return tiny_model().eval().requires_grad_(False)


def compressed():
    options = {"keep_ratio": 0.6, "method": "svd", "evaluation": None}
    return slimrank.compress(tiny_model(), **options).model.requires_grad_(True)


def machine(folder, **options):
    return Machine(Path(folder), torch.device("cpu"), **options)


def recovered(model, folder, progress=None, id="distill", original=None, **options):
    method = RECOVERERS.get(id).configured({**FAST, **options})
    return run_phases(model, original or teacher(), TEXT, method, machine(folder), progress)


class Counts(Progress):
    """Counts windows that the original predicts; stops in a step of training, if it is to."""

    def __init__(self, stop=None):
        self.stop, self.steps, self.windows, self.notes, self.stages = stop, 0, 0, [], []

    def note(self, message):
        self.notes.append(message)

    def stage(self, name, steps):
        self.stages.append((name, steps))

    def step(self, done=1):
        if self.stages[-1][0].startswith("store"):
            self.windows += 1
            return
        self.steps += 1
        if self.steps == self.stop:
            raise KeyboardInterrupt


# the divergence -------------------------------------------------------------------------------------------------------


def random_logits(seed, positions=11, scale=3.0):
    vocabulary = teacher().config.vocab_size
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(positions, vocabulary, generator=draw, dtype=torch.float64)


def events(log_r, tokens):
    """Log-probabilities of the tokens, and of all others together, by plain sums of probabilities."""
    inside = torch.zeros_like(log_r, dtype=torch.bool).scatter(-1, tokens.long(), True)
    tail = (log_r.exp() * ~inside).sum(-1, keepdim=True)
    return torch.cat([log_r.gather(-1, tokens.long()), tail.log()], -1)


def naive(log_p, log_q, weights):
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * weights).sum()


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("in_cache", [2, 1000])
def test_loss_and_gradient_are_those_of_k_plus_one_events(k, in_cache, monkeypatch):
    monkeypatch.setattr(loss, "IN_CACHE", in_cache * teacher().config.vocab_size)
    p, q = random_logits(0), random_logits(1).requires_grad_()
    weights = torch.rand(11, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    known = TopK.of(p, k)
    assert known.tokens.shape == (11, k)
    wanted = 0.7 * naive(events(p.log_softmax(-1), known.tokens), events(q.log_softmax(-1), known.tokens), weights)
    wanted.backward()
    aims = Positions(None, torch.full((11,), -100), weights, known)
    total, gradient = Terms(kl=0.7).total_and_gradient(q.detach(), aims, None)
    assert float(total) == pytest.approx(float(wanted.detach()), rel=1e-9)
    assert torch.allclose(gradient, q.grad, rtol=0, atol=1e-9 * float(q.grad.abs().max()))


def test_the_whole_vocabulary_gives_the_whole_divergence():
    p, q, weights = random_logits(0), random_logits(1), torch.rand(11, dtype=torch.float64)
    known = TopK.of(p, p.shape[1])
    assert torch.equal(known.tail, torch.full((11,), -inf, dtype=torch.float64))
    labels = torch.full((11,), -100)
    whole = Terms().total_and_gradient(q, Positions(None, labels, weights), p)
    found = Terms().total_and_gradient(q, Positions(None, labels, weights, known), None)
    assert float(found[0]) == pytest.approx(float(whole[0]), rel=1e-12)
    assert torch.allclose(found[1], whole[1], rtol=0, atol=1e-12)


def test_it_is_a_lower_bound_that_rises_with_k():
    p, q = random_logits(0, 200), random_logits(1, 200)
    ones, labels = torch.ones(200, dtype=torch.float64), torch.full((200,), -100)
    found = []
    for k in (1, 2, 8, 32, p.shape[1]):
        each = [
            Terms().total_and_gradient(
                q[i : i + 1], Positions(None, labels[:1], ones[:1], TopK.of(p[i : i + 1], k)), None
            )
            for i in range(200)
        ]
        found.append(torch.stack([total for total, _ in each]))
    assert all(bool((low <= high + 1e-12).all()) for low, high in pairwise(found))
    assert float(found[0].min()) >= 0
    assert float(found[0].mean()) < 0.9 * float(found[-1].mean())


@pytest.mark.parametrize("at_once", [5, 1000])
def test_gradients_through_the_head_are_those_of_whole_logits(at_once, monkeypatch):
    """Of final states and of the last norm, to 1e-6; the naive ones are of autograd in float64."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once * teacher().config.vocab_size)
    model, original = compressed().double(), copy.deepcopy(teacher()).double()
    ids = IDS[:3]
    with torch.no_grad():
        logits = original(input_ids=ids).logits.flatten(0, 1)
    known, weights = TopK.of(logits, 6), torch.rand(48, generator=torch.Generator().manual_seed(1)).double()
    head = Head(model)
    final = head.states(ids)[0].detach().flatten(0, 1).requires_grad_()
    inputs = [final, *head.trained]
    found = head_loss(head, None, Terms(), final, Positions(None, torch.full((48,), -100), weights, known))
    gradients = torch.autograd.grad(found, inputs, allow_unused=True)
    log_q = events(head.logits(final).log_softmax(-1), known.tokens)
    wanted = naive(events(logits.log_softmax(-1), known.tokens), log_q, weights)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    for one, other in zip(gradients, torch.autograd.grad(wanted, inputs, allow_unused=True), strict=True):
        if other is not None:
            assert torch.allclose(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


def test_rounded_distributions_add_up_to_one_again():
    p = random_logits(0, 40)
    known = TopK.of(p, 8)
    rounded = TopK(known.top.half(), known.tokens, known.tail.float())
    slope = torch.zeros_like(p)
    own = rounded.divergence(p.log_softmax(-1), torch.ones(40, dtype=torch.float64), slope)
    assert 0 <= float(own) / 40 < 1e-5
    assert float(slope.sum(-1).abs().max()) < 1e-12


# files ----------------------------------------------------------------------------------------------------------------


def stored(folder, original=None, ids=TEXT, k=5):
    found = StoredTeacher(original or teacher(), ids, k, machine(folder))
    progress = Counts()
    found.write(progress)
    return found, progress.windows


def test_stored_predictions_are_those_of_the_original(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_teacher, "FILE_BYTES", 5 * bytes_of(16, 5))
    found, windows = stored(tmp_path)
    assert windows == 36
    assert len(list(found.store.folder.glob("windows-*.safetensors"))) == 6
    train, held = found.windows()
    with torch.no_grad(), evaluating(teacher()):
        for index in (0, 4, 5, 27):
            wanted = TopK.of(teacher()(input_ids=IDS[index : index + 1]).logits[0], 5)
            item = train[index]
            assert item["top"].dtype == torch.float16
            assert item["tokens"].dtype == torch.int32
            assert torch.equal(item["input_ids"], IDS[index])
            assert torch.equal(item["tokens"], wanted.tokens)
            assert torch.allclose(item["top"].float(), wanted.top, rtol=1e-3, atol=1e-3)
            assert torch.allclose(item["tail"], wanted.tail, rtol=1e-5, atol=1e-5)
    student = Student(compressed(), teacher(), Terms())
    assert held_out_loss(student, held, False) == held_out_loss(student, TEXT[1], False)
    assert found.bytes >= bytes_of(28 * 16, 5)


def test_files_are_used_again_for_the_same_content_only(tmp_path):
    stored(tmp_path)
    assert stored(tmp_path)[1] == 0
    other = copy.deepcopy(teacher())
    other.lm_head.weight.data[0] += 1
    assert stored(tmp_path, original=other)[1] == 36
    assert stored(tmp_path, ids=(TEXT[1], TEXT[0]))[1] == 36
    assert stored(tmp_path, k=6)[1] == 36
    assert stored(tmp_path)[1] == 0


def test_interrupted_storing_goes_on_at_the_next_file(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_teacher, "FILE_BYTES", 5 * bytes_of(16, 5))
    found, _ = stored(tmp_path)
    (found.store.folder / "windows-2.safetensors").unlink()
    assert stored(tmp_path)[1] == 5


def test_a_damaged_file_is_told(tmp_path):
    found, _ = stored(tmp_path)
    (found.store.folder / "windows-0.safetensors").write_bytes(b"no file")
    with pytest.raises(RunError, match=r"windows-0\.safetensors' cannot be read"):
        found.windows()[0][3]


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), SafetensorError("No space left on device (os error 28)")]
)
def test_a_full_disk_is_told(failure, tmp_path, monkeypatch):
    def full(*_, **__):
        raise failure

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device") as told:
        recovered(compressed(), tmp_path, teacher_top_k=5)
    assert "running the same command again resumes" in told.value.hint
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.partial"))


# training -------------------------------------------------------------------------------------------------------------


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_two_epochs_run_the_original_once(tmp_path, monkeypatch):
    calls, forward = [], type(teacher()).forward

    def counted(self, *args, **given):
        if self is teacher() and given["input_ids"].shape[-1] == 16 and bool(given["input_ids"].any()):
            calls.append(len(given["input_ids"]))
        return forward(self, *args, **given)

    monkeypatch.setattr(type(teacher()), "forward", counted)
    progress, model = Counts(), compressed()
    (phase,) = recovered(model, tmp_path, progress, tokens=EPOCHS, teacher_top_k=5)
    assert sum(calls) == 36
    assert progress.steps == 14
    assert progress.stages[0] == ("store predictions of the original", 36)
    assert phase.kept
    assert phase.stored[0] == sum(path.stat().st_size for path in tmp_path.glob("teacher-*/*.safetensors"))
    assert any("predictions of the original" in note for note in progress.notes)
    whole = compressed()
    (other,) = recovered(whole, tmp_path / "whole", tokens=EPOCHS)
    assert other.stored is None
    assert phase.before == other.before  # held out in full, in both


def test_all_tokens_train_what_the_original_trains(tmp_path):
    """Up to the rounding of what is stored."""
    start, one, two = compressed(), compressed(), compressed()
    recovered(one, tmp_path / "one", tokens=EPOCHS)
    recovered(two, tmp_path / "two", tokens=EPOCHS, teacher_top_k=teacher().config.vocab_size)
    begin, a, b = state(start), state(one), state(two)
    moved = max(float((a[name] - begin[name]).abs().max()) for name in a)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 0.1 * moved


@pytest.mark.parametrize("id, stop", [("distill", 2), ("distill", 9), ("lora_sequential", 16)])
def test_an_interrupted_run_ends_as_one_that_was_not(id, stop, tmp_path):
    options = {"id": id, "tokens": EPOCHS, "teacher_top_k": 5, "kl": 1.0}
    whole, again, resumed = compressed(), compressed(), Counts()
    recovered(whole, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        recovered(compressed(), tmp_path / "parts", Counts(stop), **options)
    recovered(again, tmp_path / "parts", resumed, **options)
    assert resumed.windows == 0
    one, other = state(whole), state(again)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("again", [True, False])
def test_blocks_of_the_original_are_released(again, tmp_path):
    original, seen_ = copy.deepcopy(teacher()), []
    before = state(original)

    class Looks(Counts):
        def step(self, done=1):
            super().step(done)
            if self.steps:
                seen_.append(sum(p.numel() for p in original.model.layers.parameters()))

    method = RECOVERERS.get("distill").configured({**FAST, "teacher_top_k": 5})
    run_phases(compressed(), original, TEXT, method, machine(tmp_path, teacher_again=again), Looks())
    assert all((count > 0) == again for count in seen_)
    assert seen_
    after = state(original)
    assert all(torch.equal(after[name], before[name]) == (again or "layers" not in name) for name in before)


def test_fewer_tokens_than_the_text_has_are_drawn():
    some = seen(TEXT[0], 8, seed=3)
    assert len(some) == 8
    assert torch.equal(some.ids, seen(TEXT[0], 8, seed=3).ids)
    assert not torch.equal(some.ids, seen(TEXT[0], 8, seed=4).ids)
    assert seen(TEXT[0], 28, seed=3) is TEXT[0]


@pytest.mark.parametrize(
    "id, options, message",
    [
        ("distill", {"teacher_top_k": 0}, "option teacher_top_k"),
        ("distill", {"teacher_top_k": "many"}, "option teacher_top_k"),
        ("distill", {"teacher_top_k": 5, "hidden": 1.0}, "teacher_top_k stores no states of blocks"),
        ("distill", {"teacher_top_k": 5, "kl": 0.0, "label": 1.0}, "the loss has no divergence"),
        ("lora", {"teacher_top_k": 5}, "the loss has no divergence"),
        ("block", {"teacher_top_k": 5}, "has no option 'teacher_top_k'"),
    ],
)
def test_bad_options_are_refused(id, options, message):
    with pytest.raises(RecipeError, match=message):
        RECOVERERS.get(id).configured(options)


def test_more_tokens_than_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"teacher_top_k is 100000, and the vocabulary has \d+ tokens"):
        recovered(compressed(), tmp_path, teacher_top_k=100000)


# cost, folders and processes ------------------------------------------------------------------------------------------


def test_cost_counts_one_pass_of_the_original_and_its_bytes(tmp_path):
    sizes = Sizes(original=1000, student=600, sides=10, whole=900, head=200, vocabulary=20)

    def cost(tokens, distinct, **options):
        return training_cost(sizes, RECOVERERS.get("distill").configured(options), tokens, 10, distinct)

    saved = cost(300, 100).operations - cost(300, 100, teacher_top_k=4).operations
    assert saved == 2 * 2.0 * 200 * (1000 + 200)
    with_, without = cost(300, 100, teacher_top_k=4, held_out=3), cost(300, 100)
    assert with_.stored - without.stored == with_.predictions == bytes_of(100, 4) + 3 * 10 * 10 * 4
    assert without.predictions == without.before == 0
    (tmp_path / "t.txt").write_text("x" * 4200)
    for source, tokens, wanted in (("t.txt", None, 1000), ("t.txt", 5000, 1000), ("t.txt", 50, 50)):
        options = RECOVERERS.get("distill").configured({"tokens": tokens}).training
        found = expected_tokens(Recovery.make({"text": str(tmp_path / source)}), options)
        assert found == (tokens or 1000, wanted)
    options = RECOVERERS.get("distill").configured({"tokens": 5000}).training
    assert expected_tokens(Recovery.make({"text": "self"}), options) == (5000, 5000)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text(text(400))
    slimrank.compress(folder / "model", out=folder / "small", keep_ratio=0.6, method="svd", evaluation=None)
    return folder


OPTIONS = {**FAST, "checks": 2, "tokens": 480, "held_out": 4, "teacher_top_k": 8}


def recover(place, out, **given):
    chosen = {"text": str(place / "text.txt"), "evaluation": (), "seq_len": 24, "options": OPTIONS, **given}
    return slimrank.recover(place / "small", chosen.pop("teacher", None), out=out, **chosen)


def test_recover_tells_bytes_before_and_after(place, tmp_path):
    progress = Counts()
    name = str(place / "text.txt")
    result = recover(place, tmp_path / "o", progress=progress, evaluation=(name,), windows=4)
    assert any("of disk until it ends, of which the original's predictions take" in note for note in progress.notes)
    assert result.record.after[name]["kl"] < result.record.before[name]["kl"]  # the original was used again
    assert result.record.plain()["phases"][0]["stored"][0] > bytes_of(480, 8)
    assert "Predictions of the original took" in (tmp_path / "o" / "recovery.md").read_text()
    assert not (tmp_path / "o.run").exists()


def test_a_run_directory_belongs_to_one_teacher(place, tmp_path):
    recover(place, tmp_path / "a", run_dir=tmp_path / "run")
    other = tmp_path / "other"
    save_tiny(other, initializer_range=0.3)
    with pytest.raises(RunError, match="belongs to a different run"):
        recover(place, tmp_path / "b", run_dir=tmp_path / "run", teacher=other)


def test_too_small_a_disk_is_told_before_training(place, tmp_path, monkeypatch):
    usage = os.statvfs(tmp_path)
    assert usage.f_bavail > 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match="are needed"):
        recover(place, tmp_path / "o")


def test_compress_stores_and_forecasts_them(place):
    options = {
        "keep_ratio": 0.6, "method": "svd", "allocation": "uniform", "seq_len": 24, "samples": 4,
        "calibration": str(place / "text.txt"), "evaluation": None, "recover": "distill",
    }  # fmt: skip
    result = slimrank.compress(place / "model", recover_options=OPTIONS, **options)
    (section,) = [s for s in result.report["sections"] if s["stage"] == "recover"]
    assert "Predictions of the original: " in section["note"]
    assert section["rows"][0][-1] == "yes"
    plain = {**OPTIONS, "tokens": 4800}
    with_, without = (
        slimrank.preview(place / "model", recover_options={**plain, "teacher_top_k": k}, **options) for k in (8, None)
    )
    assert with_["seconds"]["recover"] < without["seconds"]["recover"]
    assert with_["run_bytes"] > without["run_bytes"] + bytes_of(400, 8)


def test_two_processes_share_the_files(place, tmp_path):
    given = ["recover", place / "small", "--text", place / "text.txt", "--no-eval", "--seq-len", 24, "--run-dir"]
    options = [part for name, value in OPTIONS.items() for part in ("--option", f"{name}={value}")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "slimrank"]
    command = [str(part) for part in (*launch, *given, tmp_path / "run", *options, "--out", tmp_path / "two")]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr[-2000:]
    recover(place, tmp_path / "one", run_dir=tmp_path / "other")
    one, two = (sorted((tmp_path / name).rglob("teacher-*/*")) for name in ("other", "run"))
    assert [path.name for path in one] == [path.name for path in two]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_sharding_on_a_cpu_is_refused(place, tmp_path, monkeypatch):
    check_sharding(torch.device("cpu"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="FSDP is asked for"):
        recover(place, tmp_path / "o", device="cpu")
    assert not (tmp_path / "o").exists()
