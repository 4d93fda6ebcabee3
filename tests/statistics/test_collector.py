import pytest
import torch
from torch import nn

from helpers import VOCABULARY, tiny_model
from slimrank.errors import ModelError, NonFiniteError
from slimrank.models.blocks import Batch, BlockRunner
from slimrank.models.targets import find_targets
from slimrank.statistics.accumulators import CHUNK_TOKENS, GramSum
from slimrank.statistics.catalogue import GatherOptions
from slimrank.statistics.collector import Collector

CPU = torch.device("cpu")
GRAM = GatherOptions(needs={"gram"})


def collect(model, batches, block=1):
    layers = {t.path: model.get_submodule(t.path) for t in find_targets(model).in_block(block)}
    runner = BlockRunner(model, CPU, upcast=True, resident=False)
    with runner.session():
        runner.embed(batches)
        with Collector(layers, GRAM, CPU) as collector:
            for index in range(block + 1):
                runner.step(index, lambda batch: collector.begin(batch.attention_mask))
    return collector


def ids(rows, length, seed=0):
    return torch.randint(VOCABULARY - 3, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_gram_sum_and_count():
    x = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stats = GramSum.empty(7)
    stats.add(x.reshape(-1, 7))
    rows = x.reshape(-1, 7)
    torch.testing.assert_close(stats.gram, rows.T @ rows)
    torch.testing.assert_close(stats.total, rows.sum(0))
    assert stats.count == 15
    assert stats.gram.dtype == torch.float64


def test_additive_over_chunks_shards_and_order():
    x = torch.randn(2 * CHUNK_TOKENS + 100, 3, generator=torch.Generator().manual_seed(0))
    whole, a, b = (GramSum.empty(3) for _ in range(3))
    whole.add(x)
    a.add(x[:1000])
    b.add(x[1000:])
    for merged in (a + b, b + a):
        torch.testing.assert_close(merged.gram, whole.gram, rtol=1e-6, atol=1e-2)
        torch.testing.assert_close(merged.total, whole.total, rtol=1e-5, atol=1e-2)
        assert merged.count == whole.count
    reference = x.double().T @ x.double()
    torch.testing.assert_close(whole.gram, reference, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_lose_nothing(dtype):
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    stats = GramSum.empty(6)
    stats.add(x)
    torch.testing.assert_close(stats.gram, x.double().T @ x.double(), rtol=1e-6, atol=1e-5)


def test_shared_inputs_are_one_group():
    leaders = collect(tiny_model(), [Batch(ids(2, 16))]).leaders
    names = [[p.split(".")[-1] for p in leaders if leaders[p] == leader] for leader in dict.fromkeys(leaders.values())]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt", "gemma", "qwen3_moe"])
def test_streamed_equals_whole_model_hooks(name):
    model = tiny_model(name)
    batches = [Batch(ids(2, 16)), Batch(ids(2, 16, seed=1))]
    collector = collect(model, batches)
    seen = {}
    for path in collector.layers:
        model.get_submodule(path).register_forward_pre_hook(
            lambda m, a, path=path: seen.setdefault(path, []).append(a[0].reshape(-1, a[0].shape[-1]))
        )
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch.input_ids)
    assert set(seen) == set(collector.layers)
    for path, inputs in seen.items():
        x = torch.cat(inputs).double()
        torch.testing.assert_close(collector.statistics[path].gram, x.T @ x, rtol=1e-5, atol=1e-5)
        assert collector.statistics[path].inputs.count == len(x)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_padding_counts_for_nothing(name):
    """The mask gives the same sums as the unpadded tokens alone."""
    model = tiny_model(name)
    long, short = ids(1, 16), ids(1, 10, seed=1)
    padded = torch.cat([short, torch.full((1, 6), 258)], dim=1)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 10:] = 0
    masked = collect(model, [Batch(torch.cat([long, padded]), mask)])
    alone = collect(model, [Batch(long), Batch(short)])
    for path in masked.layers:
        assert masked.statistics[path].inputs.count == alone.statistics[path].inputs.count == 26
        torch.testing.assert_close(masked.statistics[path].gram, alone.statistics[path].gram, rtol=1e-4, atol=1e-4)


def test_nan_names_the_layer():
    layer = nn.Linear(3, 3)
    with Collector({"some.layer": layer}, GRAM, CPU) as collector:
        collector.begin(None)
        layer(torch.ones(2, 3))
        collector.begin(None)
        with pytest.raises(NonFiniteError, match=r"inputs of layer 'some\.layer' \(batch 1\)"):
            layer(torch.tensor([[1.0, float("nan"), 0.0]]))


def test_layers_that_no_token_reached():
    used, unused = nn.Linear(3, 3), nn.Linear(3, 3)
    with Collector({"used": used, "unused": unused}, GRAM, CPU) as collector:
        collector.begin(None)
        used(torch.ones(2, 3))
    assert set(collector.leaders) == {"used"}
    assert not used._forward_pre_hooks


def test_a_tensor_changed_in_place_is_another_tensor():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.ones(2, 3)
    with torch.no_grad(), Collector({"first": first, "second": second}, GRAM, CPU) as collector:
        collector.begin(None)
        first(x)
        second(x.add_(1.0))
    assert float(collector.statistics["first"].gram[0, 0]) == 2.0
    assert float(collector.statistics["second"].gram[0, 0]) == 8.0


def test_groups_that_change_between_batches_are_refused():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.ones(2, 3)
    with Collector({"first": first, "second": second}, GRAM, CPU) as collector:
        collector.begin(None)
        first(x), second(x)
        collector.begin(None)
        with pytest.raises(ModelError, match="in some batches only"):
            first(x), second(x.clone())
