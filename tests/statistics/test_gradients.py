"""Gradients taken block by block against plain autograd through the whole model, written out here."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers import CONFIGS, VOCABULARY, tiny_model
from slimrank.errors import ModelError, NonFiniteError
from slimrank.layers.dense import weight_of
from slimrank.models.blocks import Batch, BlockRunner
from slimrank.models.gradients import frozen, loss_gradients, next_token_loss, step_back, whole_model_gradients
from slimrank.models.states import HiddenState
from slimrank.models.structure import experts_by_kind, find_blocks
from slimrank.models.targets import find_targets
from slimrank.pipeline.stages.calibration_pass import alone
from slimrank.statistics.accumulators import SampleGradients, weight_gradient_squares
from slimrank.statistics.catalogue import GatherOptions
from slimrank.statistics.collector import Collector
from slimrank.statistics.routing import Routing
from slimrank.statistics.token_weights import token_scales
from slimrank.statistics.tokens import Tokens

CPU = torch.device("cpu")
NAMES = list(CONFIGS)
PLAIN = {"trim": 0.0, "clip": None}
ALL = GatherOptions(needs={"gram", "channels", "row", "weight_squares", "gradients"}, accumulate=1, **PLAIN)
HELD = GatherOptions(needs={"gram", "row"}, trim=0.2, clip=(0.7, 1.2))
LONG, SHORT = 24, 8  # tokens at which the weight gradients of the tiny layers are kept dense, and as pairs


def ids(rows, length, seed=0):
    return torch.randint(VOCABULARY - 3, (rows, length), generator=torch.Generator().manual_seed(seed))


def two_batches(length=LONG):
    return [Batch(ids(2, length)), Batch(ids(1, length, seed=1))]


def padded():
    """A batch of a long and a padded short window, and the same windows one by one."""
    long, short = ids(1, 16), ids(1, 10, seed=1)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 10:] = 0
    both = torch.cat([long, torch.cat([short, torch.full((1, 6), 258)], dim=1)])
    return [Batch(both, mask)], [Batch(long), Batch(short)]


def collector_of(model, block, gathering):
    targets = find_targets(model).in_block(block)
    layers = {t.path: model.get_submodule(t.path) for t in targets}
    path, blocks = find_blocks(model)
    routed = frozenset(p for kind in experts_by_kind(blocks[block], f"{path}.{block}.", layers) for p in kind)
    own, routing = alone(targets) - routed, Routing.among(model, routed)
    return Collector(layers, gathering, CPU, own, routed=routed, routing=routing)


def streamed(model, batches, gathering=ALL, before=None):
    """Statistics of all layers by the sweep of the pipeline: forwards, the loss, and back block by block."""
    runner = BlockRunner(model, CPU, upcast=True, resident=False)
    found = {}
    with runner.session():
        runner.embed(batches)
        inputs = []
        for index in range(len(runner)):
            inputs.append(list(runner.states))
            runner.step(index)
        gradients = loss_gradients(runner, runner.hidden)
        for index in reversed(range(len(runner))):
            with collector_of(model, index, gathering) as collector:
                begin = before or (lambda batch, c=collector: c.begin(batch.attention_mask, batch.input_ids.shape))
                step_back(runner, index, inputs[index], gradients, begin)
            found |= collector.statistics
    return found


def resident(model, batches, gathering=ALL):
    """The same from whole forward and backward passes."""
    runner = BlockRunner(model, CPU, upcast=True, resident=True)
    with runner.session(), ExitStack() as stack:
        runner.batches = list(batches)
        collectors = [stack.enter_context(collector_of(model, i, gathering)) for i in range(len(runner))]

        def begin(batch):
            for collector in collectors:
                collector.begin(batch.attention_mask, batch.input_ids.shape)

        for _ in whole_model_gradients(runner, begin):
            pass
    return {path: found for collector in collectors for path, found in collector.statistics.items()}


def autograd(name, batches):
    """Path -> windows of (inputs, output gradients) as float64 tokens, from one plain backward pass per batch."""
    model, seen = tiny_model(name), {}
    for target in find_targets(model):
        seen[target.path] = []

        def remember(module, args, output, calls=seen[target.path]):
            output.retain_grad()
            calls.append((args[0], output))

        model.get_submodule(target.path).register_forward_hook(remember)
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        labels = batch.input_ids[:, 1:].clone()
        if batch.attention_mask is not None:
            labels[batch.attention_mask[:, 1:] == 0] = -100
        cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum").backward()
    shapes = [batch.input_ids.shape for batch in batches]
    return {path: windows_of(calls, shapes) for path, calls in seen.items()}


def windows_of(calls, shapes):
    """Single windows out of what a layer saw in each batch; OPT flattens windows and tokens before its MLP."""
    return [
        (x_window, g_window)
        for (x, y), shape in zip(calls, shapes, strict=True)
        for x_window, g_window in zip(
            x.detach().double().reshape(*shape, -1), y.grad.double().reshape(*shape, -1), strict=True
        )
    ]


def close(ours, reference, tolerance=1e-4):
    """Close in norm: sums over tokens have entries much smaller than the sum is exact to."""
    ours, reference = (torch.as_tensor(t, dtype=torch.float64) for t in (ours, reference))
    assert ours.shape == reference.shape
    assert float((ours - reference).norm()) <= tolerance * float(reference.norm())
    assert float(reference.norm()) > 0


def row_gram(g, weight):
    """G, and W^T G W."""
    gram = g.T @ g
    return gram, weight.T @ gram @ weight


def check_row(found, g, weight):
    gram, pulled = row_gram(g, weight)
    if found.shape[0] > found.shape[1]:
        assert found.gradients is None
        close(found.pulled.gram, pulled)
        close(found.gradient_energies, gram.diagonal())
        close(found.row.data, pulled)
    else:
        assert found.pulled is None
        close(found.gradients.gram, gram)
        close(found.row.data, gram)
    assert found.row.average == pytest.approx(float(gram.trace()) / len(gram), rel=1e-4)


def check_samples(found, dense):
    m, n = found.shape
    generator = torch.Generator().manual_seed(0)
    row, column = (torch.randn(k, k, generator=generator, dtype=torch.float64) for k in (m, n))
    row, column = row @ row.T, column @ column.T
    assert len(found.samples) == len(dense)
    close(found.samples.row(column), sum(d @ column @ d.T for d in dense))
    close(found.samples.column(row), sum(d.T @ row @ d for d in dense))


@pytest.mark.parametrize("length", [LONG, SHORT])
@pytest.mark.parametrize("name", NAMES)
def test_streamed_equals_plain_autograd(name, length):
    batches = two_batches(length)
    model = tiny_model(name)
    found, reference = streamed(model, batches), autograd(name, batches)
    assert set(found) == set(reference)
    for path, windows in reference.items():
        xs, gs = (torch.cat(parts) for parts in zip(*windows, strict=True))
        assert found[path].tokens == len(xs) == 3 * length
        close(found[path].gram, xs.T @ xs)
        check_row(found[path], gs, weight_of(model.get_submodule(path)).detach().double())


@pytest.mark.parametrize("length", [LONG, SHORT])
@pytest.mark.parametrize("name", NAMES)
def test_weight_gradients_of_single_windows_equal_plain_autograd(name, length):
    batches = two_batches(length)
    found, reference = streamed(tiny_model(name), batches), autograd(name, batches)
    for path, windows in reference.items():
        dense = [g.T @ x for x, g in windows]
        close(found[path].weight_squares, sum(d.square().sum(dim=0) for d in dense))
        check_samples(found[path], dense)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("accumulate", [2, 8])
def test_samples_may_sum_over_windows(name, accumulate):
    batches = [*two_batches(), Batch(ids(2, LONG, seed=2))]
    gathering = GatherOptions(needs={"gradients"}, accumulate=accumulate)
    found, reference = streamed(tiny_model(name), batches, gathering), autograd(name, batches)
    for path, windows in reference.items():
        single = [g.T @ x for x, g in windows]
        check_samples(found[path], [sum(single[i : i + accumulate]) for i in range(0, len(single), accumulate)])


def test_both_forms_of_a_sample_occur_and_agree():
    g, x = (torch.randn(3, SHORT, n, generator=torch.Generator().manual_seed(n)) for n in (30, 20))
    paired, dense = SampleGradients(), SampleGradients(3)
    for window in range(3):
        paired.add(g[window], x[window])
        dense.add(g[window], x[window])
    assert (len(paired), len(paired.tokens)) == (3, 3)
    assert (len(dense), len(dense.dense)) == (1, 1)
    close(dense.dense[0], sum(g[i].T @ x[i] for i in range(3)))
    check = torch.eye(20, dtype=torch.float64)
    close(paired.row(check), sum((g[i].T @ x[i]).double() @ (g[i].T @ x[i]).double().T for i in range(3)))


@pytest.mark.parametrize("name", NAMES)
def test_whole_model_passes_give_the_same(name):
    batches = two_batches()
    one, other = streamed(tiny_model(name), batches), resident(tiny_model(name), batches)
    assert set(one) == set(other)
    for path, found in one.items():
        close(other[path].gram, found.gram)
        close(other[path].row.data, found.row.data)
        close(other[path].weight_squares, found.weight_squares)
        close(other[path].channels.absolute, found.channels.absolute)
        eye = torch.eye(found.shape[1], dtype=torch.float64)
        close(other[path].samples.row(eye), found.samples.row(eye))


# the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_the_models_own_and_labels_are_shifted_once(name):
    """Defect of others: ids[:, :-1] and labels ids[:, 1:] given to a model that shifts once more."""
    model, batch = tiny_model(name), Batch(ids(2, LONG))
    with torch.no_grad():
        ours = next_token_loss(model(input_ids=batch.input_ids).logits, batch)
        own = model(input_ids=batch.input_ids, labels=batch.input_ids).loss * 2 * (LONG - 1)
        twice = model(input_ids=batch.input_ids[:, :-1], labels=batch.input_ids[:, 1:]).loss * 2 * (LONG - 1)
    assert float(ours) == pytest.approx(float(own), rel=1e-5)
    assert abs(float(ours) - float(twice)) > 0.01


def test_the_last_token_predicts_nothing_and_the_first_is_not_predicted():
    logits = torch.randn(1, 6, VOCABULARY, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = Batch(ids(1, 6))
    loss = next_token_loss(logits, batch)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool((gradient[0, -1] == 0).all())
    assert bool((gradient[0, :-1].abs().sum(dim=-1) > 0.1).all())
    changed = batch.input_ids.clone()
    changed[0, 0] += 1
    assert torch.equal(next_token_loss(logits, Batch(changed)), loss)


@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_of_a_padded_window_is_that_of_its_tokens(side):
    """Padding before a window predicts nothing, as padding after it is not predicted."""
    logits = torch.randn(1, 9, VOCABULARY, generator=torch.Generator().manual_seed(0))
    tokens, mask = ids(1, 9), torch.ones(1, 9, dtype=torch.long)
    real = slice(0, 6) if side == "right" else slice(3, 9)
    mask[:, [i for i in range(9) if i not in range(9)[real]]] = 0
    alone_loss = next_token_loss(logits[:, real], Batch(tokens[:, real]))
    assert float(next_token_loss(logits, Batch(tokens, mask))) == pytest.approx(float(alone_loss), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_loss_equal_plain_autograd(name):
    model, batches = tiny_model(name), two_batches()
    runner = BlockRunner(model, CPU, upcast=True, resident=False)
    with runner.session():
        runner.embed(batches)
        for index in range(len(runner)):
            runner.step(index)
        ours = loss_gradients(runner, runner.hidden)
    plain, seen = tiny_model(name), []
    last = BlockRunner(plain, CPU, upcast=True, resident=False).blocks[-1]
    last.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    for batch, gradient in zip(batches, ours, strict=True):
        logits = plain(input_ids=batch.input_ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="sum")
        close(gradient.hidden, torch.autograd.grad(loss, seen.pop())[0])


def test_logits_may_be_computed_window_by_window(monkeypatch):
    at_once = streamed(tiny_model(), two_batches())
    monkeypatch.setattr("slimrank.models.gradients.LOGITS_AT_ONCE", 1)
    for path, found in streamed(tiny_model(), two_batches()).items():
        close(found.row.data, at_once[path].row.data)


# padding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gathering", [ALL, HELD], ids=["plain", "trimmed and clipped"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2"])
def test_padding_counts_for_nothing(name, gathering):
    together, apart = (streamed(tiny_model(name), batches, gathering) for batches in padded())
    for path, found in together.items():
        assert found.tokens == apart[path].tokens == 26
        close(found.gram, apart[path].gram)
        close(found.row.data, apart[path].row.data)
        assert found.row.average == pytest.approx(apart[path].row.average, rel=1e-4)
        if gathering is ALL:
            close(found.weight_squares, apart[path].weight_squares)
            close(found.channels.absolute, apart[path].channels.absolute)
            close(found.channels.largest, apart[path].channels.largest)
            assert found.channels.count == 26
            eye = torch.eye(found.shape[1], dtype=torch.float64)
            close(found.samples.row(eye), apart[path].samples.row(eye))


def test_padding_counts_for_nothing_in_the_reference_either():
    """The test above could pass with a loss on padding in both: here is the plain one."""
    (batch,), apart = padded()
    whole, single = autograd("llama", [batch]), autograd("llama", apart)
    for path, windows in whole.items():
        gs = [g for _, g in windows]
        assert float(gs[1][10:].abs().sum()) == 0
        close(torch.cat([gs[0], gs[1][:10]]), torch.cat([g for _, g in single[path]]))


# no gradient of a weight ---------------------------------------------------------------------------------------


def partly_frozen():
    model = tiny_model()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 > 0)
    return model, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("way", [streamed, resident])
def test_no_weight_gets_a_gradient_and_flags_stay(way):
    model, flags = partly_frozen()
    way(model, two_batches())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_weights_are_frozen_while_gradients_are_computed():
    model, flags = partly_frozen()
    during = []
    streamed(model, two_batches(), before=lambda batch: during.extend(p.requires_grad for p in model.parameters()))
    assert during
    assert not any(during)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("place", ["inside", "in a sweep"])
def test_an_error_leaves_flags_and_blocks_as_they_were(place):
    model, flags = partly_frozen()

    def fail(batch):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        if place == "inside":
            with frozen(model):
                assert not any(p.requires_grad for p in model.parameters())
                fail(None)
        else:
            streamed(model, two_batches(), before=fail)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(block) for block in model.model.layers)


# trimming and clipping -----------------------------------------------------------------------------------------


def scales_of(g, trim, clip):
    batch = Tokens(shape=g.shape[:2])
    return token_scales(g.norm(dim=-1).flatten(), batch.places(g, batch.numbers(g)), trim, clip).view(g.shape[:2])


def scales_by_a_loop(g, trim, clip):
    windows, tokens, _ = g.shape
    cut = int(tokens * trim)
    scales = torch.zeros(windows, tokens, dtype=torch.float64)
    for w in range(windows):
        kept = range(cut, tokens - cut)
        norms = {t: float(g[w, t].double().norm()) for t in kept}
        mean = sum(norms.values()) / len(norms)
        for t, norm in norms.items():
            scales[w, t] = 1 if clip is None else min(max(norm, clip[0] * mean), clip[1] * mean) / norm
    return scales


@pytest.mark.parametrize("clip", [None, (0.1, 10.0), (0.7, 1.2)])
@pytest.mark.parametrize("trim", [0.0, 0.125, 0.3, 0.45])
def test_trimming_and_clipping_against_a_loop(trim, clip):
    g = torch.randn(3, 21, 5, generator=torch.Generator().manual_seed(0))
    g[0] *= torch.logspace(-2, 2, 21)[:, None]
    expected = scales_by_a_loop(g, trim, clip)
    torch.testing.assert_close(scales_of(g, trim, clip).double(), expected, rtol=1e-5, atol=1e-6)
    if clip == (0.7, 1.2):
        assert bool(((expected > 0) & ((expected - 1).abs() > 0.01)).any())


def test_gradients_that_are_zero_are_left_as_they_are():
    g = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    g[0, 2] = 0
    scales = scales_of(g, 0.0, (0.5, 2.0))
    assert float(scales[0, 2]) == 1
    assert bool(torch.isfinite(scales).all())
    assert bool((scales_of(torch.zeros(2, 5, 3), 0.0, (0.5, 2.0)) == 1).all())


@pytest.mark.parametrize("name", NAMES)
def test_row_forms_of_trimmed_and_clipped_gradients(name):
    """W^T g is held down by the norm of g, and not by its own, so that it stays W^T G W."""
    batches = two_batches()
    model = tiny_model(name)
    found, reference = streamed(model, batches, HELD), autograd(name, batches)
    moved = []
    for path, windows in reference.items():
        g = torch.stack([g for _, g in windows])
        held = g * scales_by_a_loop(g, HELD.trim, HELD.clip)[..., None]
        check_row(found[path], held.flatten(0, 1), weight_of(model.get_submodule(path)).detach().double())
        moved.append(float((held - g).norm() / g.norm()))
    assert min(moved) > 0.05


@pytest.mark.parametrize("way", [streamed, resident])
def test_clipping_does_not_touch_weight_gradients(way):
    needs = {"row", "weight_squares", "gradients"}
    loose, held = (GatherOptions(needs=needs, accumulate=1, **s) for s in (PLAIN, {"trim": 0.2, "clip": (0.7, 1.2)}))
    free, clipped = (way(tiny_model(), two_batches(), g) for g in (loose, held))
    for path, found in clipped.items():
        assert torch.equal(found.weight_squares, free[path].weight_squares)
        assert not torch.allclose(found.row.data, free[path].row.data, rtol=1e-3, atol=0)


# sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [200, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_16_bit_gradients_do_not_underflow(tokens, dtype):
    """Squares of gradients of 1e-6 are zero in float16; dense and paired form."""
    generator = torch.Generator().manual_seed(0)
    g = (torch.randn(tokens, 12, generator=generator) * 1e-6).to(dtype)
    x = (torch.randn(tokens, 16, generator=generator) * 1e-2).to(dtype)
    expected = (g.double().T @ x.double()).square().sum(dim=0)
    ours = weight_gradient_squares(g, x)
    assert ours.dtype == torch.float64
    assert bool((ours > 0).all())
    close(ours, expected)


def test_a_16_bit_model_is_differentiated_in_float32():
    model = tiny_model().to(torch.bfloat16)
    wide = tiny_model().to(torch.bfloat16).float()
    found, expected = streamed(model, two_batches()), streamed(wide, two_batches())
    for path in expected:
        assert torch.equal(found[path].row.data, expected[path].row.data)
        assert torch.equal(found[path].weight_squares, expected[path].weight_squares)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3_moe"])
@pytest.mark.parametrize("way", [streamed, resident])
def test_layers_alone_with_their_input_are_seen_through_their_weight(name, way):
    model, batches = tiny_model(name), two_batches()
    found = way(model, batches, GatherOptions(needs={"column", "row"}, **PLAIN))
    reference = autograd(name, batches)
    seen_through = {path.rpartition(".")[2] for path, s in found.items() if s.outputs is not None}
    wide = {"llama": {"down_proj"}, "gpt2": {"c_proj"}, "opt": {"fc2"}, "qwen3_moe": set()}
    assert seen_through == wide[name]
    for path, statistics in found.items():
        x = torch.cat([x for x, _ in reference[path]])
        w = weight_of(model.get_submodule(path)).detach().double()
        gram = x.T @ x
        assert (statistics.inputs is None) == (statistics.outputs is not None)
        close(statistics.column.through(w), w @ gram @ w.T)
        assert statistics.column.average == pytest.approx(float(gram.trace()) / len(gram), rel=1e-4)
        if statistics.outputs is not None:
            close(statistics.outputs.gram, w @ gram @ w.T)  # bias excluded
            assert statistics.column.seen


def test_layers_that_read_one_tensor_share_one_gram():
    found = streamed(tiny_model(), two_batches())
    q, k, v, o, gate, up, down = (s for path, s in found.items() if path.startswith("model.layers.1."))
    assert q.inputs is k.inputs is v.inputs
    assert q.channels is k.channels is v.channels
    assert gate.inputs is up.inputs
    assert len({id(s.inputs) for s in (q, o, gate, down)}) == 4
    assert len({id(s.gradients or s.pulled) for s in (q, k, v, o, gate, up, down)}) == 7


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("order", ["reversed", "one batch", "single windows"])
def test_additive_over_batches_in_any_order(name, order):
    batches = two_batches()
    rows = torch.cat([b.input_ids for b in batches])
    other = {
        "reversed": list(reversed(batches)),
        "one batch": [Batch(rows)],
        "single windows": [Batch(row[None]) for row in rows],
    }[order]
    gathering = GatherOptions(needs=ALL.needs, accumulate=1, trim=0.125, clip=(0.5, 2.0))
    first, second = (streamed(tiny_model(name), b, gathering) for b in (batches, other))
    for path, found in first.items():
        close(second[path].gram, found.gram)
        close(second[path].row.data, found.row.data)
        close(second[path].weight_squares, found.weight_squares)
        close(second[path].channels.absolute, found.channels.absolute)
        eye = torch.eye(found.shape[1], dtype=torch.float64)
        close(second[path].samples.row(eye), found.samples.row(eye))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_channel_sums(name):
    batches = two_batches()
    found, reference = streamed(tiny_model(name), batches), autograd(name, batches)
    for path, windows in reference.items():
        x = torch.cat([x for x, _ in windows])
        channels = found[path].channels
        assert channels.count == len(x)
        close(channels.absolute / channels.count, x.abs().mean(dim=0), 1e-5)
        close(channels.largest, x.abs().amax(dim=0), 1e-5)
        close(channels.squares, x.square().sum(dim=0), 1e-5)
        merged = channels + channels
        close(merged.squares, 2 * channels.squares)
        close(merged.largest, channels.largest)
        assert merged.count == 2 * channels.count


# bad numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need", ["row", "weight_squares", "gradients"])
@pytest.mark.parametrize("shape", [(3, 4), (4, 3)], ids=["wide", "tall"])
def test_a_non_finite_gradient_names_layer_and_batch(need, shape):
    layer = nn.Linear(shape[1], shape[0])
    with Collector({"some.layer": layer}, GatherOptions(needs={need}), CPU) as collector:
        for value in (1.0, float("inf")):
            collector.begin(None)
            x = torch.ones(1, 9, shape[1], requires_grad=True)
            output = layer(x)
            gradient = torch.ones_like(output)
            gradient[0, 4, 1] = value
            if value == 1.0:
                torch.autograd.grad(output, x, gradient)
        with pytest.raises(NonFiniteError, match=r"gradients of layer 'some\.layer' \(batch 1\)"):
            torch.autograd.grad(output, x, gradient)


def test_a_non_finite_gradient_names_the_block():
    model = tiny_model()
    runner = BlockRunner(model, CPU, upcast=True, resident=False)
    with runner.session():
        runner.embed(two_batches())
        gradients = [HiddenState(torch.ones_like(h)) for h in runner.hidden]
        gradients[1].hidden[0, 3, 0] = float("nan")
        with pytest.raises(NonFiniteError, match=r"input of block 'model\.layers\.0' \(batch 1\)"):
            step_back(runner, 0, runner.states, gradients)


def test_a_non_finite_loss_names_the_batch():
    runner = BlockRunner(tiny_model(), CPU, upcast=True, resident=False)
    with runner.session():
        runner.embed(two_batches())
        final = [h.clone() for h in runner.hidden]
        final[1][0, 3, 0] = float("inf")
        with pytest.raises(NonFiniteError, match="loss of batch 1 is not finite"):
            loss_gradients(runner, final)
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.embed_tokens.weight[250] = float("nan")
    runner = BlockRunner(model, CPU, upcast=True, resident=True)
    with runner.session():
        runner.batches = [Batch(ids(1, 8) % 200), Batch(torch.full((1, 8), 250))]
        with pytest.raises(NonFiniteError, match="loss of batch 1 is not finite"):
            list(whole_model_gradients(runner, lambda batch: None))


def test_a_loss_that_does_not_depend_on_the_blocks_is_refused():
    model = tiny_model()
    model.model.norm.register_forward_hook(lambda m, a, out: out.detach())
    with pytest.raises(ModelError, match="no gradients pass through the logits"):
        streamed(model, two_batches())
