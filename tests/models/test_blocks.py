import pytest
import torch

from helpers import CONFIGS, VOCABULARY, tiny_model
from slimrank.errors import ModelError, NonFiniteError
from slimrank.models.blocks import Batch, BlockRunner, parts_outside
from slimrank.models.placement import placed, resolve_device

CPU = torch.device("cpu")


def batches(masked=False):
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(VOCABULARY - 3, (2, 24), generator=g) for _ in range(3)]
    if not masked:
        return [Batch(i) for i in ids]
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 17:] = 0
    return [Batch(ids[0]), Batch(ids[1], mask), Batch(ids[2])]


def last_block_output(model, batch):
    """What the model itself computes: the output of its last block, seen by a hook in one plain forward pass."""
    from slimrank.models.structure import find_blocks

    seen = []
    handle = find_blocks(model)[1][-1].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def streamed(model, data, resident):
    runner = BlockRunner(model, CPU, upcast=True, resident=resident)
    with runner.session():
        runner.embed(data)
        for index in range(len(runner)):
            runner.step(index)
    return runner.hidden


def test_everything_around_blocks_and_head_is_placed_weights_of_no_module_of_their_own_included():
    model = tiny_model(tie_word_embeddings=False)
    model.model.register_parameter("shift", torch.nn.Parameter(torch.ones(32)))
    model.model.register_buffer("scale", torch.ones(32))
    tensors = {**dict(model.bfloat16().named_parameters()), **dict(model.named_buffers())}
    around = {name for name in tensors if not name.startswith(("model.layers.", "lm_head."))}
    with placed(parts_outside(model, model.model.layers), CPU, upcast=True):
        assert {name for name, tensor in tensors.items() if tensor.dtype == torch.float32} == around
    assert {"model.shift", "model.scale", "model.embed_tokens.weight"} <= around
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_block_by_block_equals_the_model_itself(name, masked):
    model = tiny_model(name)
    for batch, hidden in zip(batches(masked), streamed(model, batches(masked), False), strict=True):
        assert torch.equal(hidden, last_block_output(model, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_streaming_equals_resident(name, dtype):
    model = tiny_model(name).to(dtype)
    for a, b in zip(streamed(model, batches(), False), streamed(model, batches(), True), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_the_model_is_left_as_it_was():
    model = tiny_model().to(torch.bfloat16).train()
    before = {n: (p.data_ptr(), p.dtype, p.clone()) for n, p in model.named_parameters()}
    streamed(model, batches(), True)
    streamed(model, batches(), False)
    assert model.training
    for name, p in model.named_parameters():
        pointer, dtype, value = before[name]
        assert (p.data_ptr(), p.dtype) == (pointer, dtype)
        assert torch.equal(p, value)
    assert "forward" not in vars(model.model.layers[0])


def test_an_error_inside_leaves_the_model_as_it_was():
    model = tiny_model().to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="boom"), placed([model], CPU, upcast=True):
        raise RuntimeError("boom")
    assert model.dtype == torch.bfloat16
    with pytest.raises(IndexError):
        streamed(model, [Batch(torch.full((1, 4), VOCABULARY + 9))], False)
    assert "forward" not in vars(model.model.layers[0])


def test_arguments_are_stored_once():
    runner = BlockRunner(tiny_model(), CPU, upcast=True, resident=False)
    with runner.session():
        runner.embed(batches())
    stored = {t.data_ptr() for calls in runner._calls for call in calls for t in call.kwargs["position_embeddings"]}
    assert len(stored) == 2


def test_nan_in_activations_names_the_block():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1"):
        streamed(model, batches(), False)


def test_a_block_that_is_never_reached():
    model = tiny_model()
    model.model.config.num_hidden_layers = 2  # the model's own loop stops early
    with pytest.raises(ModelError, match="once each, in order"):
        streamed(model, batches(), False)


@pytest.mark.parametrize("between", ["again", "scaled"])
def test_models_that_do_more_than_run_their_blocks_in_order(between):
    model = tiny_model()
    layers = model.model.layers
    if between == "again":
        model.model.layers = torch.nn.ModuleList([*layers, layers[0]])
        model.model.config.num_hidden_layers = 4
    else:
        model.model.layers[1].register_forward_pre_hook(lambda m, a: (a[0] * 2, *a[1:]))
    with pytest.raises(ModelError, match="nothing in between"):
        streamed(model, batches(), False)


def test_the_order_of_blocks_is_looked_into_once():
    model, calls = tiny_model(), []
    model.model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    for resident in (False, True):
        runner = BlockRunner(model, CPU, upcast=True, resident=resident)
        with runner.session():
            runner.embed(batches())
    assert len(calls) == 1


def test_devices():
    assert resolve_device("cpu") == CPU
    from slimrank.errors import RecipeError

    with pytest.raises(RecipeError, match="not a device"):
        resolve_device("gpuu")
    if not torch.accelerator.is_available():
        with pytest.raises(RecipeError, match="no 'cuda'"):
            resolve_device("cuda")
        assert resolve_device("auto") == CPU
