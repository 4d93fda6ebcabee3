"""The latent cache gives what the ordinary one gives, in fewer bytes; what it cannot keep so, it names."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import logger

import slimrank
from architectures import random_model
from helpers import byte_tokenizer, factored, tiny_model
from slimrank.errors import ModelError
from slimrank.layers.base import compressed_layers
from slimrank.layers.latent_cache import cache_name
from slimrank.layers.latent_layer import LatentLayer
from slimrank.layers.latent_numbers import Int8
from slimrank.layers.latent_sides import Plain
from slimrank.models.cache import cache_bytes
from slimrank.models.packing import pack

RANK, NEW = 5, 14  # the rank is the default of `factored`
PROMPTS = torch.randint(250, (4, 9), generator=torch.Generator().manual_seed(0))
SERVED = ["llama", "mistral", "qwen2", "qwen3", "opt", "stablelm", "cohere", "olmo2", "glm", "mixtral", "llava"]


@pytest.fixture(scope="module", params=["pair", "pivot"])
def llama(request):
    return factored(random_model("llama"), request.param)


@pytest.fixture(scope="module")
def pairs():
    return factored(random_model("llama"))


def written(model, cache=None, ids=PROMPTS, **options):
    """Return tokens and logits of greedy decoding."""
    given = {} if cache is None else given_to(model, cache)
    out = model.generate(
        ids,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **given,
        **options,
    )
    return out.sequences, torch.stack(out.logits)


def same(model, cache, **options):
    """Assert that a cache changes nothing but rounding; return the cache."""
    tokens, logits = written(model, cache, **options)
    true_tokens, true_logits = written(model, **options)
    assert torch.equal(tokens, true_tokens)
    assert (logits - true_logits).abs().max() < 1e-5
    return cache


def given_to(model, cache):
    return {cache_name(model): cache}


def quiet(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return slimrank.latent_cache(model, **options)


@pytest.mark.parametrize("form", ["pair", "pivot"])
@pytest.mark.parametrize("name", SERVED)
def test_logits_are_those_of_the_ordinary_cache(name, form):
    model = factored(random_model(name, **({"sliding_window": None} if name == "mistral" else {})), form)
    cache = same(model, quiet(model))
    assert len(cache.latent) == 4
    assert not cache.ordinary
    assert set(cache.latent.values()) == {RANK}


def test_wide_pivot_layers_keep_the_inputs_that_they_add_to():
    model = factored(random_model("llama", head_dim=24), "pivot")  # 48 outputs of 32 inputs
    assert {layer.side for path, layer in compressed_layers(model).items() if path.endswith("k_proj")} == {"in"}
    assert len(same(model, quiet(model)).latent) == 4


def test_bytes_are_those_of_latents_and_angles(llama):
    cache = quiet(llama)
    output = llama(input_ids=PROMPTS, **{cache_name(llama): cache})
    texts, tokens, layers = 4, 9, 2
    latents = layers * 2 * RANK * texts * tokens * 4
    angles = 2 * 8 * tokens * 4  # the same for all layers and texts
    assert cache.nbytes == latents + angles == cache_bytes(output)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(llama, side):
    mask = torch.ones_like(PROMPTS)
    for text, pads in enumerate((0, 3, 5, 1)):
        mask[text, :pads] = 0
    mask = mask if side == "left" else mask.flip(1)
    ids = PROMPTS.masked_fill(mask == 0, 258)
    same(llama, quiet(llama), ids=ids, attention_mask=mask)


def test_beams(llama):
    mask = torch.ones_like(PROMPTS)
    mask[1, :4] = 0
    options = {"num_beams": 3, "max_new_tokens": NEW, "attention_mask": mask, "num_return_sequences": 2}
    found = llama.generate(PROMPTS, **given_to(llama, quiet(llama)), **options)
    assert torch.equal(found, llama.generate(PROMPTS, **options))


def test_assisted_decoding_crops(llama, monkeypatch):
    monkeypatch.setattr(logger, "warning_once", lambda text: None)  # transformers warns of how it calls itself
    ids, assistant = PROMPTS[:1], factored(random_model("llama", seed=1))
    cache, crops = quiet(llama), []
    crop, cache.crop = cache.crop, lambda *a, **k: crops.append(1) or crop(*a, **k)
    options = {"assistant_model": assistant, "max_new_tokens": NEW, "do_sample": False}
    found = llama.generate(ids, **given_to(llama, cache), **options)
    assert torch.equal(found, llama.generate(ids, max_new_tokens=NEW, do_sample=False))
    assert crops
    assert cache.rotations.all[0].tokens == cache.get_seq_length()


def test_sampling_several_texts_of_one_prompt(llama):
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": NEW}
    torch.manual_seed(0)
    found = llama.generate(PROMPTS, **given_to(llama, quiet(llama)), **options)
    torch.manual_seed(0)
    assert torch.equal(found, llama.generate(PROMPTS, **options))


def stepwise(model, cache, sizes, ids=PROMPTS):
    """Return the logits of a text that is read in pieces."""
    found, start, name = [], 0, cache_name(model)
    with torch.no_grad():
        for size in sizes:
            found.append(model(input_ids=ids[:, start : start + size], use_cache=True, **{name: cache}).logits)
            start += size
    return torch.cat(found, 1)


@pytest.mark.parametrize("sizes", [(9,), (1, 1, 1, 1, 1, 1, 1, 1, 1), (4, 1, 4), (1, 8)])
def test_text_in_pieces(llama, sizes):
    found = stepwise(llama, quiet(llama), sizes)
    with torch.no_grad():
        assert (found - llama(input_ids=PROMPTS).logits).abs().max() < 1e-5


def test_cutting_repeating_and_choosing_texts(llama):
    cache, name = quiet(llama), cache_name(llama)
    with torch.no_grad():
        llama(input_ids=PROMPTS, position_ids=torch.arange(9).repeat(4, 1), **{name: cache})
        assert cache.rotations.all[0].cos.shape[0] == 4
        cache.crop(-4)
        assert cache.get_seq_length() == cache.rotations.all[0].tokens == 5
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 7]))
        more = PROMPTS[[0, 1, 3], 5:]
        found = llama(input_ids=more, position_ids=torch.arange(5, 9).repeat(3, 1), **{name: cache}).logits
        true = llama(input_ids=PROMPTS[[0, 1, 3]]).logits[:, 5:]
    assert (found - true).abs().max() < 1e-5
    cache.reset()
    assert cache.nbytes == 0
    same(llama, cache)


def test_a_copy_goes_its_own_way(llama):
    cache = quiet(llama)
    stepwise(llama, cache, (5,))
    other = copy.deepcopy(cache)
    first = stepwise(llama, cache, (4,), PROMPTS[:, 5:])
    assert other.get_seq_length() == 5
    assert other.rotations.all[0].tokens == 5
    assert torch.equal(stepwise(llama, other, (4,), PROMPTS[:, 5:]), first)
    assert cache.layers[0].sides[0].layer is other.layers[0].sides[0].layer


def test_packed_layers(llama):
    model = copy.deepcopy(llama)
    pack(model)
    same(model, quiet(model))


def test_half_precision():
    model = factored(random_model("qwen3"), "pivot").to(torch.bfloat16)
    cache = quiet(model)
    logits, true = written(model, cache)[1], written(model)[1]
    assert not cache.ordinary
    assert (logits - true)[0].norm() < 0.02 * true[0].norm()  # one piece at once: nothing is built yet
    found = stepwise(model, quiet(model), (4, 5))
    with torch.no_grad():
        whole = model(input_ids=PROMPTS).logits
    assert (found - whole).float().norm() < 0.03 * whole.float().norm()


def test_angles_that_change_as_a_text_grows_are_kept_as_they_were_used():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 12}
    model = factored(random_model("llama", rope_parameters=rope, max_position_embeddings=12))
    other = copy.deepcopy(model)  # in older versions of transformers, the embedding remembers how far it has grown
    (tokens, logits), (true_tokens, true_logits) = written(model, quiet(model)), written(other)
    assert torch.equal(tokens, true_tokens)
    assert (logits - true_logits).abs().max() < 1e-5


# what it cannot keep ----------------------------------------------------------------------------------------


def fallen_back(model, **options):
    with pytest.warns(UserWarning, match="the latent cache keeps as they are"):
        return slimrank.latent_cache(model, **options)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("gpt2", "q, k and v are one layer"),
        ("phi3", "q, k and v are one layer"),
        ("falcon", "q, k and v are one layer"),
        ("deepseek_v3", "the model has latents of its own"),
        ("mistral", "it has a sliding window"),
        ("mamba", "it"),  # which cache it has depends on the version of transformers
    ],
)
def test_models_that_keep_all_as_it_is(name, reason):
    model = factored(random_model(name))
    cache = fallen_back(model)
    assert not cache.latent
    assert len(cache.ordinary) == 2
    assert all(found.startswith(reason) for found in cache.ordinary.values())
    if name != "mamba":  # whose cache has no bytes of keys
        same(model, cache)


def test_sliding_layers_stay_and_others_are_served():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = factored(random_model("gemma3", num_hidden_layers=4, layer_types=kinds), rank=4)
    cache = same(model, fallen_back(model))
    full = [f"model.layers.{block}.self_attn.{side}" for block in (1, 3) for side in ("k_proj", "v_proj")]
    assert list(cache.latent) == full
    sliding = [f"model.layers.{block}.self_attn" for block in (0, 2)]
    assert cache.ordinary == dict.fromkeys(sliding, "it has a sliding window")
    assert [type(layer).__name__ for layer in cache.layers][::2] == ["DynamicSlidingWindowLayer"] * 2


def test_layers_that_share_keys_stay():
    model = factored(random_model("gemma3n"), rank=4)
    cache = fallen_back(model)
    assert not cache.latent
    assert set(cache.ordinary.values()) == {"layers of the model share keys and values"}


def test_each_side_for_itself():
    model = factored(random_model("llama"), names=("k_proj",))
    cache = same(model, fallen_back(model))
    assert list(cache.latent) == [f"model.layers.{block}.self_attn.k_proj" for block in (0, 1)]
    assert set(cache.ordinary.values()) == {"it is not compressed"}
    assert cache.layers[0].values.shape[1:] == (2, 9 + NEW - 1, 8)


def test_ranks_that_save_nothing():
    model = factored(random_model("llama"), rank=16)
    cache = same(model, fallen_back(model))
    assert set(cache.ordinary.values()) == {"its rank of 16 saves nothing for 16 outputs"}
    assert all(type(layer) is DynamicLayer for layer in cache.layers)


def test_keys_whose_latents_save_less_than_the_angles_take():
    model = factored(random_model("llama"), rank=13)  # 2 x 3 numbers, against 2 x 8
    cache = same(model, fallen_back(model))
    assert [path for path in cache.latent if path.endswith("k_proj")] == []
    assert len(cache.latent) == 2


def test_kinds_without_latents(tmp_path):
    from slimrank.layers.residual import ResidualLinear

    model = factored(random_model("llama"))
    path = "model.layers.0.self_attn.v_proj"
    model.set_submodule(path, ResidualLinear(32, 16, 2))
    assert fallen_back(model).ordinary == {path: "layers of the kind 'residual' have no latent"}


def test_a_layer_whose_keys_differ_is_turned_off(pairs):
    model = copy.deepcopy(pairs)
    attention = model.model.layers[1].self_attn
    attention.k_proj.register_forward_hook(lambda layer, args, output: output * 1.01)
    cache = quiet(model)
    with pytest.warns(UserWarning, match=r"keeps 'model.layers.1.self_attn.k_proj' as it is: .* the keys that"):
        same(model, cache)
    assert list(cache.ordinary) == ["model.layers.1.self_attn.k_proj"]
    assert "model.layers.1.self_attn.k_proj" not in cache.latent
    assert isinstance(cache.layers[1].sides[0], Plain)
    assert isinstance(cache.layers[1], LatentLayer)


def test_a_difference_that_shows_late_loses_nothing(pairs):
    """A token at position 0 is turned by nothing, so whether keys are turned at all is seen at the next one."""
    model = copy.deepcopy(pairs)
    layer = model.model.layers[0].self_attn.k_proj
    layer.register_forward_hook(lambda layer, args, output: output if args[0].shape[1] == 1 else output * 1.01)
    cache, sizes = quiet(model), (1, 4, 4)
    with pytest.warns(UserWarning, match="as it is"):
        found = stepwise(model, cache, sizes)
    assert list(cache.ordinary) == ["model.layers.0.self_attn.k_proj"]
    true = stepwise(model, DynamicCache(config=model.config), sizes)
    assert (found - true).abs().max() < 1e-5


def test_another_model_is_refused(llama):
    cache = quiet(llama)
    other = random_model("llama")
    with pytest.raises(ValueError, match="made for another model"):
        other(input_ids=PROMPTS, **{cache_name(other): cache})


# int8 -------------------------------------------------------------------------------------------------------


def test_int8_numbers_are_within_half_a_step():
    z = torch.randn(2, 7, 33, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1e3])[:, None, None]
    kept = Int8().stored(z)
    assert kept.dtype == torch.int8
    assert kept.shape[-1] == 35
    steps = z.abs().amax(-1, keepdim=True) / 127
    assert ((Int8().read(kept, z.dtype) - z).abs() <= steps * (0.5 + 127 / 2048 + 1e-3)).all()  # and that of the scale
    assert torch.equal(Int8().read(Int8().stored(torch.zeros(1, 1, 4)), z.dtype), torch.zeros(1, 1, 4))


def test_int8_is_a_quarter_of_float32_and_near(llama):
    cache = quiet(llama, int8=True)
    found = stepwise(llama, cache, (3, 3, 3))
    with torch.no_grad():
        true = llama(input_ids=PROMPTS).logits
    assert 0 < (found - true).norm() < 0.01 * true.norm()
    assert cache.nbytes == 2 * 2 * 4 * 9 * (RANK + 2) + 2 * 8 * 9 * 4
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
    again = stepwise(llama, cache, (2,), PROMPTS[[1, 0, 3, 2], 7:])
    assert (again - true[[1, 0, 3, 2], 7:]).norm() < 0.01 * true[:, 7:].norm()


# as the default ---------------------------------------------------------------------------------------------


def test_the_default_is_saved_and_loaded(tmp_path):
    model = factored(tiny_model("llama"))
    before = model.generate(PROMPTS, max_new_tokens=NEW, do_sample=False)
    slimrank.use_latent_cache(model)
    model.save_pretrained(tmp_path / "out")
    byte_tokenizer().save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    out = loaded.generate(PROMPTS, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert type(out[cache_name(loaded)]).__name__ == "LatentCache"
    assert torch.equal(out.sequences, before)
    other = DynamicCache(config=loaded.config)
    out = loaded.generate(PROMPTS, **given_to(loaded, other), max_new_tokens=2, return_dict_in_generate=True)
    assert out[cache_name(loaded)] is other
    out = loaded.generate(PROMPTS, use_cache=False, max_new_tokens=2, return_dict_in_generate=True)
    assert cache_name(loaded) not in out
    slimrank.use_latent_cache(loaded, on=False)
    loaded.save_pretrained(tmp_path / "again")
    assert "latent_cache" not in (tmp_path / "again" / "config.json").read_text()
    assert "latent_cache" in (tmp_path / "out" / "config.json").read_text()


def test_a_copy_of_a_model_with_the_default_generates_by_itself(pairs):
    model = copy.deepcopy(pairs)
    slimrank.use_latent_cache(model, int8=True)
    other = copy.deepcopy(model)
    assert other.generate.args[0] is other
    assert torch.equal(
        other.generate(PROMPTS, max_new_tokens=3, do_sample=False),
        pairs.generate(PROMPTS, max_new_tokens=3, do_sample=False),
    )


def test_a_dense_model_has_no_latents():
    with pytest.raises(ModelError, match="no compressed layers"):
        slimrank.use_latent_cache(tiny_model())


def test_the_default_needs_no_slimrank(tmp_path):
    model = factored(tiny_model("llama"))
    slimrank.use_latent_cache(model, int8=True)
    model.save_pretrained(tmp_path)
    program = f"""
import sys
sys.modules["slimrank"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
out = model.generate(torch.arange(6)[None], max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
cache = next(value for value in out.values() if type(value).__name__ == "LatentCache")
assert len(cache.latent) == 6
print(out.sequences.tolist())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = model.generate(torch.arange(6)[None], max_new_tokens=3, do_sample=False)
    assert result.stdout.strip() == str(expected.tolist())
