"""Blocks in bfloat16: what comes out of them, what is refused, and what a run directory holds apart."""

import pytest
import torch

import slimrank
from helpers import VOCABULARY, byte_tokenizer, tiny_model
from slimrank.errors import RecipeError
from slimrank.linalg.symmetric import mirror_upper
from slimrank.models import placement, precision
from slimrank.models.blocks import Batch, BlockRunner
from slimrank.models.gradients import loss_gradients, step_back
from slimrank.models.machine import Machine
from slimrank.models.targets import find_targets
from slimrank.pipeline.forecast import Cost
from slimrank.pipeline.prepare import Choices, Prepared
from slimrank.recipe import Recipe
from slimrank.statistics import collector, paired_inputs
from slimrank.statistics.catalogue import GatherOptions
from slimrank.statistics.collector import Collector
from slimrank.statistics.paired_inputs import StreamCollector

CPU = torch.device("cpu")
BOTH = GatherOptions(needs={"gram", "row", "slope", "weight_squares", "channels"})
CLOSE = 2e-2


def batch(rows=4, length=24):
    return Batch(torch.randint(VOCABULARY - 3, (rows, length), generator=torch.Generator().manual_seed(0)))


def targets(model, block):
    return {t.path: model.get_submodule(t.path) for t in find_targets(model).in_block(block)}


def gathered(name, bfloat16):
    """Return the statistics of the last block, forwards and backwards, and the hidden states around it."""
    model = tiny_model(name)
    runner = BlockRunner(model, CPU, True, False, bfloat16)
    last = len(runner) - 1
    with runner.session():
        runner.embed([batch()])
        before = runner.through(runner.states, 0, last)
        after = runner.through(before, last, last + 1)
        gradients = loss_gradients(runner, [state.hidden for state in after])
        with Collector(targets(model, last), BOTH, CPU) as sums:
            step_back(runner, last, before, gradients, lambda b: sums.begin(None, b.input_ids.shape))
    return sums.statistics, [before[0].hidden, after[0].hidden, gradients[0].hidden]


def sums_of(found):
    row = found.gradients or found.pulled
    return {"gram": found.inputs.gram, "row": mirror_upper(row.upper), "slope": found.slope,
            "squares": found.weight_squares, "channels": found.channels.squares}  # fmt: skip


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_statistics_are_close_and_their_sums_are_wide(name):
    exact, _ = gathered(name, False)
    fast, states = gathered(name, True)
    assert {state.dtype for state in states} == {torch.float32}
    assert exact.keys() == fast.keys()
    experts = "experts"  # a router sends some tokens elsewhere
    for path in (path for path in exact if experts not in path):
        for (kind, one), other in zip(sums_of(exact[path]).items(), sums_of(fast[path]).values(), strict=True):
            assert other.dtype == torch.float64
            assert error(other, one) < (CLOSE if kind in ("gram", "channels") else 2 * CLOSE), (path, kind)


def test_grams_are_those_of_the_inputs_that_layers_read_not_products_in_bfloat16():
    model, seen = tiny_model(), {}
    layers = targets(model, 0)
    for path, layer in layers.items():
        layer.register_forward_pre_hook(lambda m, a, path=path: seen.update({path: a[0].reshape(-1, a[0].shape[-1])}))
    runner = BlockRunner(model, CPU, True, False, True)
    single, both = Collector(layers, GatherOptions(needs={"gram"}), CPU), StreamCollector(layers, layers, 0.5, 1, CPU)
    with runner.session():
        runner.embed([batch()])
        with single, both:
            single.begin(None, batch().input_ids.shape)
            runner.step(0, lambda b: both.begin(None, b.input_ids.shape))
    for path in layers:
        x = seen[path].double()
        assert error(single.statistics[path].inputs.gram, x.T @ x) < 1e-6
        assert error(both.sums[path].cross, x.T @ x) < 1e-6
    assert {x.dtype for x in seen.values()} == {torch.float32, torch.bfloat16}


def test_nothing_but_autocast_is_turned_off_for_hooks(monkeypatch):
    expected, _ = gathered("llama", False)
    for user in (collector, paired_inputs):
        monkeypatch.setattr(user, "exact", lambda hook: hook)
    plain, _ = gathered("llama", False)
    for path in expected:
        assert all(map(torch.equal, sums_of(expected[path]).values(), sums_of(plain[path]).values()))


def test_a_session_leaves_the_blocks_as_they_were():
    model, ids = tiny_model(), batch().input_ids
    expected = model(ids).logits
    runner = BlockRunner(model, CPU, True, False, True)
    with runner.session():
        assert not torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    assert all("forward" not in vars(block) for block in runner.blocks)


@pytest.mark.parametrize("form", [tuple, list])
def test_outputs_of_a_block_beside_hidden_states_stay(form):
    hidden, extra = torch.ones(2, dtype=torch.bfloat16), object()
    found = precision._with_hidden(form((hidden, extra)), hidden.float())
    assert type(found) is form
    assert found[0].dtype == torch.float32
    assert found[1] is extra


def test_bfloat16_is_refused_where_the_device_has_none(monkeypatch):
    for user in (placement, precision):
        monkeypatch.setattr(user, "has_bfloat16", lambda device: False)
    with pytest.raises(RecipeError, match=r"'cpu' has no products in bfloat16") as error:
        Choices.of(Recipe(keep_ratio=0.8, compute_dtype="bfloat16", device="cpu"))
    assert "--compute-dtype" in str(error.value)
    assert not precision.autocasts("auto", CPU)
    assert not precision.autocasts("float32", CPU)


@pytest.fixture
def native(monkeypatch):
    """Let any CPU pass for one that has bfloat16; autocast works on all of them."""
    for user in (placement, precision):
        monkeypatch.setattr(user, "has_bfloat16", lambda device: True)


def prepared(**options):
    return Prepared.of(Choices.of(Recipe(keep_ratio=0.8, device="cpu", **options)), tiny_model())


def test_what_each_dtype_means_on_a_cpu(native):
    found = {asked: prepared(compute_dtype=asked) for asked in ("auto", "float32", "bfloat16")}
    assert {asked: one.compute for asked, one in found.items()} == {
        "auto": "float32", "float32": "float32", "bfloat16": "autocast",
    }  # fmt: skip
    assert all(one.upcast for one in found.values())


def test_estimates_count_products_at_their_own_rate():
    cost = Cost(float32=4.0, float64=2.0, products=8.0)
    assert cost.seconds(Machine(1.0, 1.0, 1.0, 1.0)) - cost.seconds(Machine(1.0, 1.0, 4.0, 1.0)) == 6.0


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"The fox number {i} jumps over the lazy dog {i * i % 97}. " for i in range(300)))
    return str(file)


def compressed(text, dtype, **options):
    options = {"keep_ratio": 0.8, "samples": 2, "search_samples": 1, "seq_len": 16, "batch_size": 2, **options}
    model = tiny_model(num_hidden_layers=2)
    slimrank.compress(
        model, byte_tokenizer(), calibration=text, evaluation=None, device="cpu", compute_dtype=dtype, **options
    )
    return model.state_dict()


def differing(one, other):
    return [name for name in one if not torch.equal(one[name], other[name])]


REFINED = {"refine": "ada_comp"}
CORRECTED = {"method": "kfac_svd", "corrections": 1, "correction_windows": 1}


@pytest.mark.parametrize("options", [REFINED, CORRECTED, {"method": "kfac_svd", "resident": True}])
def test_results_of_one_dtype_are_not_taken_for_those_of_another(native, text, tmp_path, options):
    run = {**options, "run_dir": tmp_path / "run"}
    first = compressed(text, "float32", **run)
    fast = compressed(text, "bfloat16", **run)
    assert differing(fast, compressed(text, "bfloat16", **options)) == []
    assert differing(first, fast)
    assert differing(first, compressed(text, "float32", **run)) == []
    assert differing(first, compressed(text, "auto", **options)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dobi_svd", "allocation": "dobi"},
        {"form": "pivot", "refine": "update"},
        {"quantize": "int8"},
        {"method": "gfwsvd", "allocation": "lems"},
    ],
)
def test_every_stage_runs_in_bfloat16(native, text, options):
    assert all(bool(t.isfinite().all()) for t in compressed(text, "bfloat16", **options).values())
