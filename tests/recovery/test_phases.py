"""Recovery by training: its loss, what is trained, resuming, and weights that do not get better."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy

import slimrank
from helpers import tiny_model
from slimrank.errors import ModelError, NonFiniteError, OutputError, RecipeError
from slimrank.layers.base import compressed_layers
from slimrank.layers.trainable import parts
from slimrank.methods.recoverer import RECOVERERS
from slimrank.models.contexts import evaluating
from slimrank.progress import Progress
from slimrank.recovery import loss, trainer
from slimrank.recovery.loss import Terms
from slimrank.recovery.optimizer import optimizer_of
from slimrank.recovery.recovering import Machine, run_phases
from slimrank.recovery.student import Student
from slimrank.recovery.trainer import Windows, last_state

DRAW = torch.Generator().manual_seed(0)
STARTS, STRIDES = (torch.randint(1, high, (36, 1), generator=DRAW) for high in (40, 4))
IDS = (STARTS + STRIDES * torch.arange(16)) % 40 + 30  # text with something to learn
TEXT = Windows(IDS[:28], torch.ones(28, 16, dtype=torch.bool)), Windows(IDS[28:], torch.ones(8, 16, dtype=torch.bool))
FAST = {"learning_rate": 3e-3, "batch_size": 4, "checks": 3}
METHODS = tuple(RECOVERERS.all())


def compressed(form="pair", **options):
    return slimrank.compress(
        tiny_model(), keep_ratio=0.6, method="svd", form=form, evaluation=None, **options
    ).model.requires_grad_(True)


@cache
def teacher():
    return tiny_model().eval().requires_grad_(False)


def recovered(model, folder, id="distill", text=TEXT, progress=None, **options):
    method = RECOVERERS.get(id).configured({**FAST, **options})
    return run_phases(model, teacher(), text, method, Machine(Path(folder), torch.device("cpu")), progress)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# the loss -------------------------------------------------------------------------------------------------------------


def naive(model, ids, counted, terms, hidden):
    """Return the loss from whole logits; of models in float64, whose norms compute in float32."""
    mine = model(input_ids=ids, output_hidden_states=hidden > 0)
    with torch.no_grad():
        aim = copy.deepcopy(teacher()).double()(input_ids=ids)
    log_p, log_q, weights = aim.logits.log_softmax(-1), mine.logits.log_softmax(-1), counted.double()
    total = terms.kl * ((log_p.exp() * (log_p - log_q)).sum(-1) * weights).sum()
    each = cross_entropy(mine.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (total + terms.label * (each * weights[:, :-1].flatten()).sum()) / weights.sum()


@pytest.mark.parametrize("terms", [Terms(), Terms(0.5, 0.25), Terms(0.0, 1.0)])
@pytest.mark.parametrize("form", ["pair", "pivot"])
@pytest.mark.parametrize("at_once", [5, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(terms, form, at_once, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once * teacher().config.vocab_size)
    monkeypatch.setattr(loss, "IN_CACHE", 3 * teacher().config.vocab_size)
    model, original = compressed(form).double(), copy.deepcopy(teacher()).double()
    ids, counted = IDS[:3], torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) > 0.3
    student = Student(model, original if terms.kl else None, terms)
    found = student(ids, counted)["loss"]
    found.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted = naive(model, ids, counted, terms, 0)
    wanted.backward()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    names = {name for name, p in model.named_parameters() if name not in ("model.embed_tokens.weight",)}
    assert gradients.keys() >= names - {"lm_head.weight"}
    for name in names - {"lm_head.weight"}:
        largest = float(dict(model.named_parameters())[name].grad.abs().max())
        assert torch.allclose(
            gradients[name], dict(model.named_parameters())[name].grad, rtol=1e-5, atol=1e-6 * largest
        )


def test_the_loss_of_hidden_states_is_a_mean_of_relative_errors():
    model = compressed()
    ids, counted = IDS[:2], torch.ones(2, 16, dtype=torch.bool)
    with torch.no_grad():
        plain, more = (float(Student(model, teacher(), Terms(), h)(ids, counted)["loss"]) for h in (0.0, 2.0))
        mine, aims = (m.model(input_ids=ids, output_hidden_states=True).hidden_states for m in (model, teacher()))
        norm = teacher().model.norm
        last = []
        for m in (model, teacher()):
            m.model.layers[-1].register_forward_hook(lambda _, __, out: last.append(out))
            m(input_ids=ids)
        errors = [(a - b).square().sum() / b.square().sum() for a, b in zip(mine[1:-1], aims[1:-1], strict=True)]
        errors.append((last[0] - last[1]).square().sum() / last[1].square().sum())
    assert norm is not None
    assert more - plain == pytest.approx(2.0 * float(torch.stack(errors).mean()), rel=1e-4)


def test_the_divergence_of_a_model_from_itself_is_zero():
    found = Student(tiny_model(), teacher(), Terms())(IDS[:2], torch.ones(2, 16, dtype=torch.bool))["loss"]
    assert abs(float(found.detach())) < 1e-7


def test_only_adapters_drop_inputs():
    """A model with dropout everywhere gives its own divergence, zero, in training, too."""
    dropping = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = tiny_model("gpt2", **dropping)
    student = Student(model, copy.deepcopy(model).eval(), Terms()).train()
    counted = torch.ones(2, 16, dtype=torch.bool)
    assert abs(float(student(IDS[:2], counted)["loss"].detach())) < 1e-6
    assert not model.transformer.h[0].attn.attn_dropout.training
    model = compressed()
    phases = RECOVERERS.get("lora").configured({"dropout": 0.5}).phases(model, [])
    next(phases)  # the adapters are there until it goes on
    student = Student(model, None, Terms(0.0, 1.0)).train()
    losses = [float(student(IDS[:2], counted)["loss"].detach()) for _ in range(2)]
    for p in model.parameters():
        p.data.add_(0.01) if p.requires_grad else None
    torch.manual_seed(0)
    one, other = (float(student(IDS[:2], counted)["loss"].detach()) for _ in range(2))
    assert losses[0] == losses[1]
    assert one != other


# phases ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", METHODS)
@pytest.mark.parametrize("form", ["pair", "pivot"])
def test_what_is_kept_is_better_and_shapes_stay(id, form, tmp_path):
    model = compressed(form)
    before, shapes = state(model), {name: p.shape for name, p in model.named_parameters()}
    if id == "custom_lora" and form == "pivot":
        with pytest.raises(ModelError, match="only pairs grow"):
            recovered(model, tmp_path, id)
        return
    phases = recovered(model, tmp_path, id)
    assert len(phases) == {"lora_sequential": 2, "block": 3}.get(id, 1)
    assert any(phase.kept for phase in phases)
    for phase in phases:
        assert (phase.after < phase.before) == phase.kept
        assert phase.parameters > 0
        assert phase.tokens == 28 * 16
        assert [row for row in phase.curve if row[2] is not None]
    after = state(model)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    grown = {name for name, p in model.named_parameters() if p.shape != shapes[name]}
    assert bool(grown) == RECOVERERS.get(id).changes_size
    assert set(shapes) == {name for name, _ in model.named_parameters()}
    assert all(p.requires_grad for p in model.parameters())
    assert all(layer.rank == layer.factors()[0].shape[0] for layer in compressed_layers(model).values())


def test_sequential_lora_leaves_the_other_factor_alone(tmp_path):
    """Byte by byte, in each of its phases; and the merged layer computes what the adapted one did."""
    model = compressed().double()
    a, b = ({f"{path}.weight" for path in parts(model, (part,))} for part in "AB")
    before = state(model)
    seen = []
    method = RECOVERERS.get("lora_sequential").configured({"dropout": 0.0})
    for name in method.phases(model, []):
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.data.normal_(generator=torch.Generator().manual_seed(1))
        assert all(("lora_" in key) == p.requires_grad for key, p in model.named_parameters())
        with torch.no_grad(), evaluating(model):
            adapted = model(input_ids=IDS[:1]).logits
        seen.append(name)
        if len(seen) == 2:  # the first phase is merged
            middle = {key.replace(".base_layer", ""): tensor for key, tensor in state(model).items()}
            assert all(torch.equal(middle[key], before[key]) for key in a)
            assert not any(torch.equal(middle[key], before[key]) for key in b)
    with torch.no_grad(), evaluating(model):
        merged = model(input_ids=IDS[:1]).logits
    assert seen == ["adapters on B", "adapters on A"]
    assert torch.allclose(merged, adapted, rtol=0, atol=1e-9 * float(adapted.abs().max()))
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], middle[key]) for key in b)
    assert not any(torch.equal(after[key], before[key]) for key in a)


@pytest.mark.parametrize("id", ["distill", "custom_lora", "lora_sequential"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_do_not_get_better_stay_as_they_were(id, dtype, tmp_path):
    model, told, progress = compressed().to(dtype), [], Progress()
    before = state(model)
    progress.note = told.append
    other = TEXT[0], Windows(TEXT[1].ids + 60, TEXT[1].counted)  # becomes less likely, the more is learnt
    phases = recovered(model, tmp_path, id, other, progress, learning_rate=0.3)
    assert not any(phase.kept for phase in phases)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any("the weights stay as they were" in note for note in told)


@pytest.mark.parametrize(
    "id, stop, optimizer",
    [
        ("distill", 2, "adamw"),
        ("distill", 5, "adamw"),
        ("distill", 5, "muon"),
        ("lora_sequential", 5, "adamw"),
        ("lora_sequential", 11, "adamw"),
        ("block", 10, "adamw"),
        ("block", 10, "muon"),
    ],
)
def test_an_interrupted_run_ends_as_one_that_was_not(id, stop, optimizer, tmp_path):
    whole, options = compressed(), {"optimizer": optimizer}
    recovered(whole, tmp_path / "whole", id, **options)

    class Stops(Progress):
        steps = 0

        def step(self, done=1):
            self.steps += 1
            if self.steps == stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recovered(compressed(), tmp_path / "parts", id, progress=Stops(), **options)
    again = compressed()
    recovered(again, tmp_path / "parts", id, **options)
    one, other = state(whole), state(again)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_in_16_bits_is_trained_in_32_and_stays_in_16(tmp_path):
    model = compressed().bfloat16()
    (phase,) = recovered(model, tmp_path)
    assert phase.kept
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_recomputing_changes_nothing(tmp_path):
    plain, recomputing = compressed(), compressed()
    recovered(plain, tmp_path / "a")
    recovered(recomputing, tmp_path / "b", checkpointing=True)
    for name, tensor in state(plain).items():
        assert torch.allclose(tensor, state(recomputing)[name], rtol=1e-4, atol=1e-6)


def test_a_step_in_parts_is_the_same(tmp_path):
    whole, parted = compressed(), compressed()
    recovered(whole, tmp_path / "a")
    recovered(parted, tmp_path / "b", micro_batch=2)
    for name, tensor in state(whole).items():
        assert torch.allclose(tensor, state(parted)[name], rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_names_step_and_block(tmp_path, monkeypatch):
    model = compressed()
    step = trainer.Told.on_step_end

    def broken(self, args, state, *others, **more):
        if state.global_step == 4:
            model.model.layers[1].mlp.down_proj.B.weight.data.fill_(float("nan"))
        step(self, args, state, *others, **more)

    monkeypatch.setattr(trainer.Told, "on_step_end", broken)
    with pytest.raises(
        NonFiniteError, match=r"loss of step 5 is not finite; the output of 'model\.layers\.1' is not"
    ) as e:
        recovered(model, tmp_path)
    assert "the best state so far is in" in e.value.hint
    assert last_state(tmp_path / "phase-0") is not None


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_is_told(failure, tmp_path, monkeypatch):
    def full(*_):
        raise failure

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        recovered(compressed(), tmp_path)


def test_a_disk_that_fills_up_while_the_optimiser_is_stored_is_told(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 582781632 vs 582781520")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="the state of the optimiser was not written whole"):
        recovered(compressed(), tmp_path)


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="a step of 4 windows cannot be divided into parts of 3 in 1 processes"):
        recovered(compressed(), tmp_path, micro_batch=3)
    with pytest.raises(RecipeError, match="'block' has no option 'kl'"):
        RECOVERERS.get("block").configured({"kl": 1.0})
    with pytest.raises(RecipeError, match="no recovery method 'distil'"):
        RECOVERERS.get("distil")
    with pytest.raises(RecipeError, match="has no option 'rank'"):
        RECOVERERS.get("distill").configured({"rank": 3})
    with pytest.raises(RecipeError, match="option learning_rate"):
        RECOVERERS.get("distill").configured({"learning_rate": -1.0})


@pytest.mark.parametrize("id", ["distill", "block"])
def test_pivot_layers_are_trained_as_pairs_and_stay_pivots(id, tmp_path):
    """A rate that suits pairs gains; biases, sizes and forms stay what they are."""
    model = compressed("pivot")
    entries = {path: layer.entry() for path, layer in compressed_layers(model).items()}
    shapes = {name: tensor.shape for name, tensor in state(model).items()}
    records = recovered(model, tmp_path, id)
    assert any(record.kept and record.after < record.before for record in records)
    assert {path: layer.entry() for path, layer in compressed_layers(model).items()} == entries
    assert {name: tensor.shape for name, tensor in state(model).items()} == shapes


def test_pivot_layers_that_learn_nothing_stay_bit_by_bit(tmp_path):
    model = compressed("pivot")
    before = state(model)
    (record,) = recovered(model, tmp_path, learning_rate=0.3)
    assert not record.kept
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


# optimisers -----------------------------------------------------------------------------------------------------------


def test_a_first_step_of_muon_is_orthogonal_and_that_of_others_is_adamw():
    model = torch.nn.Linear(12, 5)
    before = state(model)
    optimizer = optimizer_of("muon", model, rate=0.01)
    model(torch.randn(30, 12, generator=torch.Generator().manual_seed(0))).square().mul(
        torch.arange(1, 6)
    ).sum().backward()
    optimizer.step()
    moved = (state(model)["weight"] - before["weight"]) / (0.01 * 0.2 * 12**0.5)
    values = torch.linalg.svdvals(moved)
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.5  # the iteration of Muon promises no more
    assert torch.allclose((state(model)["bias"] - before["bias"]).abs(), torch.full((5,), 0.01), atol=1e-4)


def test_what_is_not_trained_is_not_moved():
    model = torch.nn.Sequential(torch.nn.Linear(12, 5), torch.nn.Linear(5, 3))
    model[0].requires_grad_(False)
    optimizer = optimizer_of("muon", model, rate=0.01)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 5 * 3 + 3


def test_both_optimisers_follow_one_schedule_and_their_states_come_back():
    torch.manual_seed(0)
    models = [torch.nn.Linear(12, 5) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [optimizer_of("muon", model, rate=0.01) for model in models]

    def steps(number, count):
        for _ in range(count):
            optimizers[number].zero_grad()
            models[number](torch.ones(3, 12)).square().sum().backward()
            optimizers[number].step()

    steps(0, 2)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.5
    assert [group["lr"] for part in optimizers[1].parts for group in part.param_groups] == [0.5, 0.5]
    steps(0, 2)
    steps(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_muon_trains_and_old_torch_is_told(tmp_path, monkeypatch):
    model = compressed()
    (phase,) = recovered(model, tmp_path, optimizer="muon")
    assert phase.kept
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RecipeError, match=r"muon needs torch 2\.9 or newer, and .* is installed: take adamw"):
        RECOVERERS.get("distill").configured({"optimizer": "muon"})
