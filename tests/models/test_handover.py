"""Blocks that hand more than hidden states to later blocks."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from architectures import UNUSUAL, hands_on, random_model
from helpers import tiny_model
from method_runs import compress
from slimrank.errors import ModelError
from slimrank.models.blocks import Batch, BlockRunner
from slimrank.models.gradients import loss_gradients, step_back
from slimrank.models.states import HiddenState, named, states_named
from slimrank.models.structure import find_blocks

CPU = torch.device("cpu")
AXES = {"gemma3n": 1, "gemma4": 0, "glm_moe_dsa": 0, "zaya": 0, "deepseek_v4": 0}  # where hidden states count windows
HANDING = [name for name in AXES if hands_on(name) and name != "deepseek_v4"]
WINDOWS, TOKENS = 3, 9


def batches():
    ids = torch.randint(250, (WINDOWS + 1, TOKENS), generator=torch.Generator().manual_seed(0))
    return [Batch(ids[:WINDOWS]), Batch(ids[WINDOWS:])]


def runner_of(model, resident=False):
    return BlockRunner(model, CPU, upcast=True, resident=resident)


def block_outputs(model, batch):
    """What each block gives in one plain pass of the model."""
    seen = []

    def remember(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(remember) for block in find_blocks(model)[1]]
    loss = model(input_ids=batch.input_ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen, cross_entropy(loss[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("name", HANDING)
def test_from_any_block_on_it_is_the_model(name, resident):
    """Twice from every block: what a stream hands on is its own, and stays as it is."""
    model = random_model(name)
    with torch.no_grad():
        expected = [block_outputs(model, batch)[0][-1] for batch in batches()]
    runner = runner_of(model, resident)
    with runner.session():
        runner.embed(batches())
        for index in range(len(runner)):
            for _ in range(2):
                for found, final in zip(runner.finals(runner.states, index), expected, strict=True):
                    torch.testing.assert_close(found, final)
            runner.step(index)
    assert [state.handed for state in runner.states] == [{}, {}]


@pytest.mark.parametrize("name", HANDING)
def test_two_streams_do_not_mix(name):
    """A changed model run beside the original, block by block in turns."""
    original, changed = random_model(name), random_model(name)
    with torch.no_grad():
        for p in find_blocks(changed)[1].parameters():
            p.mul_(0.9)
        expected = [[block_outputs(m, batch)[0][-1] for batch in batches()] for m in (original, changed)]
    runner = runner_of(original)
    own = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    with runner.session():
        runner.embed(batches())
        streams = [list(runner.states), list(runner.states)]
        for index in range(len(runner)):
            for place, weights in enumerate((own, changed.state_dict())):
                original.load_state_dict({k: t for k, t in weights.items() if k.startswith(runner.path)}, strict=False)
                streams[place] = runner.through(streams[place], index, index + 1)
    for stream, finals in zip(streams, expected, strict=True):
        for state, final in zip(stream, finals, strict=True):
            torch.testing.assert_close(state.hidden, final)


@pytest.mark.parametrize("name", HANDING)
def test_gradients_go_back_through_what_is_handed_on(name):
    model = random_model(name)
    runner, inputs = runner_of(model), []
    with runner.session():
        runner.embed(batches())
        for index in range(len(runner)):
            inputs.append(list(runner.states))
            runner.step(index)
        gradients = loss_gradients(runner, runner.hidden)
        found = []
        for index in reversed(range(len(runner))):
            step_back(runner, index, inputs[index], gradients)
            found.insert(0, [gradient.hidden for gradient in gradients])
    assert any(state.handed for states in inputs for state in states)
    for b, batch in enumerate(batches()):
        outputs, loss = block_outputs(model, batch)
        expected = torch.autograd.grad(loss, outputs[:-1])
        for index, gradient in enumerate(expected, 1):
            torch.testing.assert_close(found[index][b], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", HANDING)
def test_states_are_stored_with_what_they_hand_on(name):
    runner = runner_of(random_model(name))
    with runner.session():
        runner.embed(batches())
        runner.step(0)
        runner.step(1)
        stored = states_named({key: t.clone() for key, t in named("x.", runner.states).items()}, "x.", range(2))
        for again, state in zip(stored, runner.states, strict=True):
            assert again.handed.keys() == state.handed.keys() != set()
        finals = [runner.finals(states, 2) for states in (stored, runner.states)]
    assert all(torch.equal(one, other) for one, other in zip(*finals, strict=True))


@pytest.mark.parametrize("name", [name for name in AXES if name in UNUSUAL])
def test_windows_of_hidden_states(name):
    runner = runner_of(random_model(name))
    with runner.session():
        runner.embed(batches())
        hidden, axis = runner.hidden[0], AXES[name]
        parts = [runner.windows(hidden, slice(0, 2)), runner.windows(hidden, slice(2, 3))]
        assert hidden.shape[axis : axis + 2] == (WINDOWS, TOKENS)
        assert [part.shape[axis] for part in parts] == [2, 1]
        assert torch.equal(runner.joined(parts), hidden)
        assert runner.windows(hidden, slice(None), 4).shape[axis + 1] == TOKENS - 4


def test_hidden_states_in_which_windows_are_not_found():
    model = tiny_model()
    runner = runner_of(model)
    with runner.session():
        runner.embed([Batch(torch.arange(8)[None])])
        runner._handover.axis = None
        assert runner.windows(runner.hidden[0], slice(None)) is runner.hidden[0]
        with pytest.raises(ModelError, match="do not have separate dimensions for windows and tokens"):
            runner.windows(runner.hidden[0], slice(None), 4)


@pytest.mark.parametrize(
    "asked", [{"allocation": "lems"}, {"refine": "update"}, {"corrections": 1, "correction_windows": 2}]
)
def test_what_measures_a_divergence_is_refused_before_any_work(asked, monkeypatch):
    from slimrank.models import handover
    from slimrank.pipeline.stages.measure import MeasureBefore

    monkeypatch.setattr(handover, "_axis", lambda hidden, ids: None)
    monkeypatch.setattr(MeasureBefore, "run", None)
    options = {"method": "kfac_svd", "samples": 4, "search_samples": 2, **asked}
    with pytest.raises(ModelError, match="do not have separate dimensions for windows and tokens"):
        compress(tiny_model(), **options)


class Keeps:
    """An object that blocks are handed, and change."""

    def __init__(self):
        self.last = None


def hands(monkeypatch, model, change):
    """Every block is also called with an object and a mapping, which `change` may write to."""
    keeps, mapping = Keeps(), {}
    for index, block in enumerate(model.model.layers):
        own = block.forward

        def forward(hidden, *args, keeps=keeps, mapping=mapping, own=own, index=index, **kwargs):
            return change(index, own(hidden, *args, **kwargs), keeps, mapping)

        monkeypatch.setattr(block, "forward", forward)
        block.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "keeps": keeps, "mapping": mapping}), with_kwargs=True
        )
    return model


def remembers(index, hidden, keeps, mapping):
    keeps.last = hidden
    return hidden


def counts(index, hidden, keeps, mapping):
    mapping["count"] = hidden, index
    return hidden


@pytest.mark.parametrize(
    "change, reason", [(remembers, "changes one of its arguments"), (counts, "passes 'count' to later blocks")]
)
def test_what_cannot_be_handed_on_is_refused(monkeypatch, change, reason):
    runner = runner_of(hands(monkeypatch, tiny_model(), change))
    with runner.session(), pytest.raises(ModelError, match=reason):
        runner.embed(batches())


def test_mappings_of_a_block_alone_are_not_mixed_up(monkeypatch):
    """Every block gets a new one, at the place in memory where that of another block was."""
    model, seen = tiny_model(), []
    for index, block in enumerate(model.model.layers):
        own = block.forward

        def forward(hidden, *args, own=own, number=None, **kwargs):
            seen.append(number["index"])
            return own(hidden, *args, **kwargs)

        monkeypatch.setattr(block, "forward", forward)
        block.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: (args, {**kwargs, "number": {"index": index}}), with_kwargs=True
        )
    runner = runner_of(model)
    with runner.session():
        runner.embed(batches())
        seen.clear()
        for index in range(len(runner)):
            with_hooks_off(runner, index)
    assert seen == [0, 0, 1, 1, 2, 2]


def with_hooks_off(runner, index):
    """Run a block with nothing but what was recorded."""
    runner.blocks[index]._forward_pre_hooks.clear()
    runner.step(index)


def test_blocks_that_remember_by_themselves_are_refused(monkeypatch):
    model, kept = tiny_model(), []
    for block in model.model.layers:
        own = block.forward

        def forward(hidden, *args, own=own, **kwargs):
            kept.append(hidden)
            return own(hidden, *args, **kwargs) + len(kept)

        monkeypatch.setattr(block, "forward", forward)
    runner = runner_of(model)
    with runner.session(), pytest.raises(ModelError, match="computes something else when it is run alone"):
        runner.embed(batches())


def test_leaves_are_copies():
    state = HiddenState(torch.ones(2, 3), {"a": torch.ones(2), "chosen": torch.ones(2, dtype=torch.long)})
    leaves = state.leaves(CPU)
    assert leaves.hidden.requires_grad
    assert leaves.handed["a"].requires_grad
    assert not leaves.handed["chosen"].requires_grad
    assert not state.hidden.requires_grad
    assert not state.handed["a"].requires_grad
