"""Sums over two streams at once against the raw tokens that went in."""

import pytest
import torch
from torch import nn

from helpers import CONFIGS, VOCABULARY, tiny_model
from slimrank.errors import NonFiniteError
from slimrank.layers.dense import weight_of
from slimrank.models.blocks import Batch, BlockRunner
from slimrank.models.targets import find_targets
from slimrank.statistics.paired_inputs import StreamCollector, StreamSums

CPU = torch.device("cpu")
M, N, TOKENS = 5, 7, 11
ANCHORS = [0.0, 0.5, 1.0]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def streams(batches=(4, 4), shift=0.3):
    """Inputs in the original and in the compressed model (windows x tokens x n), a list of batches of both."""
    original = [random(size, TOKENS, N, seed=i) + shift for i, size in enumerate(batches)]
    return original, [x + 0.3 * random(*x.shape, seed=9) for x in original]


def gathered(original, compressed, anchor, stack=1, masks=None, largest=0.0):
    first, second = nn.Linear(N, M), nn.Linear(N, M)
    originals = {"layer": first} if anchor else {}
    collector = StreamCollector(originals, {"layer": second}, anchor, stack, CPU, largest=largest)
    with torch.no_grad(), collector:
        for b, (x, y) in enumerate(zip(original, compressed, strict=True)):
            collector.begin(masks[b] if masks else None)
            first(x)
            second(y)
    assert not first._forward_pre_hooks
    assert not second._forward_pre_hooks
    return collector.sums["layer"]


def tokens(batches, stack=1):
    """All tokens as float64 rows; means over `stack` windows, position by position."""
    rows = []
    for batch in batches:
        for start in range(0, len(batch), stack):
            window = sum(batch[i].double() for i in range(start, min(start + stack, len(batch))))
            rows.append(window / min(stack, len(batch) - start))
    return torch.cat(rows)


def raw(original, compressed, anchor, weight, stack=1):
    """X' and T = W X_target as rows, by the definition."""
    x, y = tokens(original, stack), tokens(compressed, stack)
    return y, (anchor * x + (1 - anchor) * y) @ weight.T


def close(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def weights():
    return random(M, N, seed=20).double(), random(M, N, seed=21).double()


@pytest.mark.parametrize("anchor", ANCHORS)
def test_the_problem_is_that_of_the_raw_tokens(anchor):
    w, other = weights()
    original, compressed = streams()
    problem = gathered(original, compressed, anchor).problem(w, centred=False)
    y, t = raw(original, compressed, anchor, w)
    close(problem.gram, y.T @ y)
    close(problem.cross, t.T @ y)
    assert problem.energy == pytest.approx(float(t.square().sum()), rel=1e-5)
    for candidate in (w, other, torch.zeros_like(w)):
        expected = float((t - y @ candidate.T).square().sum())
        assert problem.loss(candidate) == pytest.approx(expected, rel=1e-4, abs=1e-4 * problem.energy)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_anchors_differ(anchor):
    w, _ = weights()
    original, compressed = streams()
    self_target = gathered(original, compressed, 0.0).problem(w, centred=False)
    problem = gathered(original, compressed, anchor).problem(w, centred=False)
    assert problem.loss(w) == pytest.approx(
        anchor**2 * gathered(original, compressed, 1.0).problem(w, centred=False).loss(w),
        rel=1e-3,
        abs=1e-5 * problem.energy,
    )
    assert torch.equal(problem.gram, self_target.gram)
    assert torch.allclose(problem.cross, self_target.cross, rtol=1e-3) == (anchor == 0)


def test_the_target_self_keeps_one_gram_only():
    sums = gathered(*streams(), 0.0)
    assert sums.wanted is sums.inputs
    assert sums.cross is None
    assert gathered(*streams(), 0.5).wanted is not gathered(*streams(), 0.5).inputs


@pytest.mark.parametrize("anchor", ANCHORS)
def test_without_any_compression_the_cross_gram_is_w_c(anchor):
    w, _ = weights()
    original, _ = streams()
    problem = gathered(original, original, anchor).problem(w, centred=False)
    x = tokens(original)
    close(problem.cross, w @ x.T @ x)
    assert problem.loss(w) == pytest.approx(0, abs=1e-5 * problem.energy)
    close(problem.solution(), w, 1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_any_compression_in_a_model(name):
    """The original and the compressed block are one: D = W C for every layer."""
    model = tiny_model(name)
    ids = torch.randint(VOCABULARY - 3, (3, 24), generator=torch.Generator().manual_seed(0))
    layers = {t.path: model.get_submodule(t.path) for t in find_targets(model).in_block(0)}
    collector, seen = StreamCollector(layers, layers, 1.0, 1, CPU), {}
    for path, layer in layers.items():
        layer.register_forward_pre_hook(lambda m, a, path=path: seen.update({path: a[0].reshape(-1, a[0].shape[-1])}))
    runner = BlockRunner(model, CPU, upcast=True, resident=False)
    with runner.session():
        runner.embed([Batch(ids)])
        with collector:
            runner.step(0, lambda batch: collector.begin(batch.attention_mask, batch.input_ids.shape))
    assert set(collector.sums) == set(layers)
    for path, layer in layers.items():
        w, x = weight_of(layer).detach().double(), seen[path].double()
        assert collector.sums[path].inputs.count == 3 * 24
        close(collector.sums[path].problem(w, centred=False).cross, w @ x.T @ x, 1e-4)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_windows_of_every_layer_are_stacked(name):
    model = tiny_model(name)
    layers = {t.path: model.get_submodule(t.path) for t in find_targets(model).in_block(0)}
    collector = StreamCollector({}, layers, 0.0, 2, CPU)
    runner = BlockRunner(model, CPU, upcast=True, resident=False)
    with runner.session():
        runner.embed([Batch(torch.arange(60).reshape(5, 12))])
        with collector:
            runner.step(0, lambda batch: collector.begin(batch.attention_mask, batch.input_ids.shape))
    assert {path: s.inputs.count for path, s in collector.sums.items()} == dict.fromkeys(layers, 3 * 12)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_the_centred_problem_is_that_with_a_free_bias(anchor):
    w, other = weights()
    original, compressed = streams(shift=2.0)
    sums = gathered(original, compressed, anchor)
    problem, plain = sums.problem(w, centred=True), sums.problem(w, centred=False)
    y, t = raw(original, compressed, anchor, w)
    centred_y, centred_t = y - y.mean(dim=0), t - t.mean(dim=0)
    close(problem.gram, centred_y.T @ centred_y, 1e-4)
    close(problem.cross, centred_t.T @ centred_y, 1e-4)
    assert problem.energy == pytest.approx(float(centred_t.square().sum()), rel=1e-4)
    bias = sums.bias_change(w, other)
    close(bias, t.mean(dim=0) - other @ y.mean(dim=0), 1e-4)
    with_bias = float((t - y @ other.T - bias).square().sum())
    assert problem.loss(other) == pytest.approx(with_bias, rel=1e-3)
    assert with_bias < 0.9 * plain.loss(other)
    ones = torch.ones(len(y), 1, dtype=torch.float64)
    least = torch.linalg.lstsq(torch.cat([y, ones], dim=1), t).solution
    if anchor:
        close(problem.solution(), least[:-1].T, 1e-3)
        close(sums.bias_change(w, problem.solution()), least[-1], 1e-2)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_around_its_own_mean_one_token_would_leave_nothing_but_rounding(anchor):
    w, _ = weights()
    original, compressed = ([batch[:1, :1] for batch in batches[:1]] for batches in streams())
    sums = gathered(original, compressed, anchor)
    for of_gram in ("gram", "cross"):
        assert torch.equal(*(getattr(sums.problem(w, centred), of_gram) for centred in (True, False)))
    fitted = sums.problem(w, centred=True).towards(w, 1e-3).solution()
    y, t = raw(original, compressed, anchor, w)
    close(fitted @ y[0] + sums.bias_change(w, fitted), t[0])


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("stack", [1, 2, 3, 4, 9])
def test_stacks_are_means_over_windows(stack, anchor):
    """Batches of 4 and 3 windows: the last stack of a batch may hold fewer."""
    w, other = weights()
    original, compressed = streams(batches=(4, 3))
    sums = gathered(original, compressed, anchor, stack)
    y, t = raw(original, compressed, anchor, w, stack)
    assert sums.inputs.count == len(y) == TOKENS * (-(-4 // stack) + -(-3 // stack))
    problem = sums.problem(w, centred=False)
    close(problem.gram, y.T @ y)
    close(problem.cross, t.T @ y)
    assert problem.loss(other) == pytest.approx(float((t - y @ other.T).square().sum()), rel=1e-4)


def test_a_stack_of_one_is_plain_and_others_are_not():
    first, second = (gathered(*streams(), 1.0, stack) for stack in (1, 2))
    x = tokens(streams()[1])
    close(first.inputs.gram, x.T @ x)
    assert float((second.inputs.gram - first.inputs.gram).norm()) > 0.1 * float(first.inputs.gram.norm())


@pytest.mark.parametrize("anchor", ANCHORS)
def test_padding_counts_for_nothing(anchor):
    w, other = weights()
    original, compressed = streams()
    masks = [torch.ones(4, TOKENS, dtype=torch.long) for _ in original]
    masks[1][2, 6:] = 0
    masks[0][3, 9:] = 0
    sums = gathered(original, compressed, anchor, masks=masks)
    keep = torch.cat(masks).bool().reshape(-1)
    y, t = (rows[keep] for rows in raw(original, compressed, anchor, w))
    problem = sums.problem(w, centred=False)
    assert sums.inputs.count == len(y) == 8 * TOKENS - 7
    close(problem.gram, y.T @ y)
    close(problem.cross, t.T @ y)
    assert problem.loss(other) == pytest.approx(float((t - y @ other.T).square().sum()), rel=1e-4)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_a_token_that_is_too_large_counts_as_one_that_is_not(anchor):
    """By the definition: both of its rows are divided by how much too large it is in the target."""
    w, _ = weights()
    original, compressed = streams()
    for batch in (original, compressed):
        for x in batch:
            x[:, 0] *= 300
    problem = gathered(original, compressed, anchor, largest=2.0).problem(w, centred=False)
    parts = []
    for x, y in zip(original, compressed, strict=True):
        rows, targets = tokens([y]), anchor * tokens([x]) + (1 - anchor) * tokens([y])
        norms = targets.norm(dim=1)
        scale = (2 * norms.sort().values[(len(norms) - 1) // 2] / norms).clamp(max=1)[:, None]
        assert int((scale < 0.1).sum()) == len(x)
        parts.append((scale * rows, scale * targets @ w.T))
    y, t = (torch.cat(each) for each in zip(*parts, strict=True))
    close(problem.gram, y.T @ y)
    close(problem.cross, t.T @ y)
    assert problem.energy == pytest.approx(float(t.square().sum()), rel=1e-5)


def test_a_few_huge_tokens_do_not_spoil_the_others():
    """Their errors differ from token to token, so no weight undoes them; trying to would cost all others."""
    w, _ = weights()
    original, compressed = streams((32, 32), shift=0.0)
    for x, y in zip(original, compressed, strict=True):
        huge = torch.zeros(len(x), N).index_fill(1, torch.tensor([0]), 1000.0)
        x[:, 0], y[:, 0] = huge, huge + 30 * random(*huge.shape, seed=3)
    y, t = raw([x[:, 1:] for x in original], [x[:, 1:] for x in compressed], 1.0, w)
    losses = []
    for largest in (0.0, 4.0):
        found = gathered(original, compressed, 1.0, largest=largest).problem(w, centred=False).solution()
        losses.append(float((t - y @ found.T).square().sum()))
    best = float((t - y @ torch.linalg.lstsq(y, t).solution).square().sum())
    assert losses[1] < 1.1 * best
    assert losses[1] < 0.8 * losses[0]


def test_tokens_of_nothing_have_no_largest():
    problem = gathered(*([torch.zeros(2, TOKENS, N)] for _ in "xy"), 1.0, largest=4.0).problem(weights()[0], False)
    assert float(problem.gram.abs().max()) == 0


def test_additive_over_chunks_and_order():
    from slimrank.statistics.accumulators import CHUNK_TOKENS

    x, y = random(CHUNK_TOKENS + 50, 3), random(CHUNK_TOKENS + 50, 3, seed=1)
    whole, parts = StreamSums.empty(3, CPU, own=False), StreamSums.empty(3, CPU, own=False)
    assert whole.add(y, x)
    for part in (slice(700, None), slice(0, 700)):
        assert parts.add(y[part], x[part])
    close(whole.cross, x.double().T @ y.double(), 1e-6)
    close(parts.cross, whole.cross, 1e-6)
    assert parts.inputs.count == whole.wanted.count == CHUNK_TOKENS + 50


@pytest.mark.parametrize("anchor", ANCHORS)
def test_layers_that_read_one_tensor_share_their_sums(anchor):
    names = ("q", "k", "o")
    first, second = ({name: nn.Linear(N, M) for name in names} for _ in range(2))
    x, y = random(2, TOKENS, N), random(2, TOKENS, N, seed=1)
    collector = StreamCollector(first if anchor else {}, second, anchor, 1, CPU)
    with torch.no_grad(), collector:
        for _ in range(3):
            collector.begin(None)
            for layers, inputs in ((first, x), (second, y)):
                layers["q"](inputs), layers["k"](inputs), layers["o"](inputs * 2)
    sums = collector.sums
    assert sums["q"] is sums["k"]
    assert sums["q"].inputs.count == sums["o"].inputs.count == 3 * 2 * TOKENS
    close(sums["o"].inputs.gram, 4 * sums["q"].inputs.gram)


def test_no_tokens_is_no_problem():
    sums = StreamSums.empty(N, CPU, own=False)
    w, _ = weights()
    for centred in (False, True):
        assert sums.problem(w, centred).loss(w) == 0
    assert bool((sums.bias_change(w, w) == 0).all())


@pytest.mark.parametrize("stream", ["original", "compressed"])
def test_numbers_that_are_not_finite_name_the_layer(stream):
    original, compressed = streams()
    {"original": original, "compressed": compressed}[stream][1][2, 3, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="inputs of layer 'layer'"):
        gathered(original, compressed, 0.5)


def test_calls_of_one_layer_in_the_same_batch_are_paired_in_order():
    """A layer that a block calls twice reads other tokens each time, in either model."""
    w, _ = weights()
    original, compressed = streams((4, 4))
    first, second = nn.Linear(N, M), nn.Linear(N, M)
    with torch.no_grad(), StreamCollector({"layer": first}, {"layer": second}, 1.0, 1, CPU) as collector:
        collector.begin(None, (4, TOKENS))
        for layer, xs in ((first, original), (second, compressed)):
            for x in xs:
                layer(x)
    y, t = raw(original, compressed, 1.0, w)
    problem = collector.sums["layer"].problem(w, centred=False)
    close(problem.gram, y.T @ y)
    close(problem.cross, t.T @ y)


def test_windows_that_a_layer_reads_in_another_shape_are_stacked():
    """windows x 1 x tokens x n, and flattened; experts' tokens are no windows, however many they are."""
    x = streams((4,))[0][0]
    grams = []
    for shape in ((4, TOKENS, N), (4, 1, TOKENS, N), (4 * TOKENS, N)):
        layer = nn.Linear(N, M)
        with torch.no_grad(), StreamCollector({}, {"layer": layer}, 0.0, 2, CPU) as collector:
            collector.begin(None, (4, TOKENS))
            layer(x.reshape(shape))
        grams.append(collector.sums["layer"].inputs.gram)
    rows = tokens([x], stack=2)
    for gram in grams:
        close(gram, rows.T @ rows)
    layer = nn.Linear(N, M)
    with torch.no_grad(), StreamCollector({}, {"layer": layer}, 0.0, 2, CPU, routed=frozenset({"layer"})) as collector:
        collector.begin(None, (4, TOKENS))
        layer(x.flatten(0, 1))
    close(collector.sums["layer"].inputs.gram, x.flatten(0, 1).double().T @ x.flatten(0, 1).double())


def test_a_strong_common_direction_leaves_the_centred_gram_exact():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 16, generator=draw) + 300 * torch.randn(16, generator=draw)
    sums = StreamSums.empty(16, torch.device("cpu"), own=True)
    sums.add(x, x)
    around = x.double() - x.double().mean(dim=0)
    found = sums.problem(torch.eye(16), centred=True).gram
    torch.testing.assert_close(found, around.t() @ around, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("value, change", [(3.0, 0.0), (3.0, 3e-4), (300.0, 3e-2)])
def test_a_channel_that_hardly_changes_keeps_its_weight(value, change):
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(500, 12, generator=draw), torch.randn(5, 12, generator=draw).double()
    wanted = x + 0.1 * torch.randn(500, 12, generator=draw)
    x[:, 4] = wanted[:, 4] = value + change * torch.randn(500, generator=draw)
    sums = StreamSums.empty(12, torch.device("cpu"), own=False)
    for part in range(0, 500, 100):
        sums.add(x[part : part + 100], wanted[part : part + 100])
    found = sums.problem(weight, centred=True).towards(weight, 1e-3).solution()
    torch.testing.assert_close(found[:, 4], weight[:, 4], rtol=1e-6, atol=1e-6)
