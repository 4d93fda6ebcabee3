"""`slimrank correct`: the adapter makes a quantised model nearer to its original, in PEFT as in memory."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from architectures import random_model
from helpers import byte_tokenizer, tiny_model
from slimrank import correct
from slimrank.cli.app import app
from slimrank.correcting.differences import Corrected, answers, with_differences
from slimrank.correcting.gguf_lora import row_order, write_gguf_lora
from slimrank.correcting.peft_folder import write_peft
from slimrank.errors import BudgetError, ModelError, OutputError, RecipeError, RunError
from slimrank.layers.dense import weight_of
from slimrank.models.targets import find_targets
from slimrank.progress import Progress

QUICK = {"samples": 8, "seq_len": 32, "windows": 4}
IDS = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def rounded(model, levels=3):
    """Return a copy whose linear layers hold few different numbers."""
    made = copy.deepcopy(model)
    for target in find_targets(model):
        weight = made.get_submodule(target.path).weight
        step = weight.abs().amax() / levels
        weight.copy_((weight / step).round() * step)
    return made


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folders of a quantised model and of its original."""
    folder = tmp_path_factory.mktemp("pair")
    model = tiny_model()
    return save(rounded(model), folder / "quantised"), save(model, folder / "original")


@torch.no_grad()
def logits(model):
    return model(IDS).logits.double()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_peft_computes_what_was_measured(name, tmp_path):
    peft = pytest.importorskip("peft")
    original = tiny_model() if name == "llama" else random_model(name)
    quantised = rounded(original)
    folders = [save(model, tmp_path / part) for part, model in (("q", quantised), ("o", original))]
    result = correct(*folders, tmp_path / "out", rank=8, evaluation=(), **QUICK)
    over = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[0]), tmp_path / "out")
    found, wanted, before = logits(over), logits(original), logits(quantised)
    assert torch.allclose(found, logits(result.model), atol=1e-5)
    assert (found - wanted).norm() < 0.8 * (before - wanted).norm()


def test_the_record_tells_size_and_gain(pair, tmp_path):
    record = correct(*pair, tmp_path / "out", rank=4, **QUICK).record
    assert record.after["demo"]["kl"] < 0.5 * record.before["demo"]["kl"]
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert record.size == sum(t.numel() * t.element_size() for t in stored.values())
    assert record.bits == 8 * record.size / record.weights
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == dict(record.ranks)
    written = json.loads((tmp_path / "out" / "correction.json").read_text())
    assert written["bytes"] == record.size
    assert record.summary() in (tmp_path / "out" / "README.md").read_text()


def test_the_size_is_kept(pair, tmp_path):
    targets = find_targets(tiny_model())
    most = 4 * 2 * sum(sum(target.shape) for target in targets)
    by_rank = correct(*pair, tmp_path / "a", rank=4, evaluation=(), **QUICK).record
    by_bytes = correct(*pair, tmp_path / "b", max_bytes=most, evaluation=(), **QUICK).record
    assert by_rank.size <= most
    assert by_rank.size > 0.97 * most
    assert dict(by_bytes.ranks) == dict(by_rank.ranks)


def test_numbers_of_float32_are_twice_as_large_and_nearer(pair, tmp_path):
    half, whole = (
        correct(*pair, tmp_path / dtype, rank=4, adapter_dtype=dtype, evaluation=(), **QUICK)
        for dtype in ("float16", "float32")
    )
    assert dict(whole.record.ranks) == dict(half.record.ranks)
    assert whole.record.size == 2 * half.record.size
    stored = load_file(tmp_path / "float32" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    most = 4 * 4 * sum(sum(target.shape) for target in find_targets(tiny_model()))
    by_bytes = correct(
        *pair, tmp_path / "bytes", max_bytes=most, adapter_dtype="float32", evaluation=(), **QUICK
    ).record  # fmt: skip
    assert dict(by_bytes.ranks) == dict(whole.record.ranks)


class Stops(Progress):
    """Interrupts its job at a step of a stage, and remembers notes."""

    def __init__(self, stage=None, step=None):
        self.at, self.notes, self.name, self.count = (stage, step), [], "", 0

    def stage(self, name, steps):
        self.name, self.count = name, 0
        self.step(0)

    def step(self, done=1):
        self.count += done
        if (self.name, self.count) == self.at:
            raise KeyboardInterrupt

    def note(self, message):
        self.notes.append(message)


@pytest.mark.parametrize(
    ("stage", "step", "resumes"),
    [
        ("calibrate and decompose", 5, ["resuming at block 2 of 3"]),
        ("cut and refine factors", 2, ["resuming at block 2 of 3"]),
    ],
)
def test_an_interrupted_run_goes_on_and_gives_the_same_numbers(pair, stage, step, resumes, tmp_path):
    settings = {"rank": 4, "evaluation": (), **QUICK}
    correct(*pair, tmp_path / "straight", **settings)
    with pytest.raises(KeyboardInterrupt):
        correct(*pair, tmp_path / "out", progress=Stops(stage, step), **settings)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.run").is_dir()
    again = Stops()
    correct(*pair, tmp_path / "out", progress=again, **settings)
    assert [note for note in again.notes if note.startswith("resuming")] == resumes
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"straight", "out"}


def test_a_kept_run_directory_serves_another_size_and_no_other_model(pair, tmp_path, monkeypatch):
    settings = {"run_dir": tmp_path / "run", "sequential": False, "evaluation": (), **QUICK}
    correct(*pair, tmp_path / "a", rank=4, **settings)
    monkeypatch.setattr("slimrank.models.blocks.BlockRunner.step", None)  # would fail if it calibrated again
    small = correct(*pair, tmp_path / "b", rank=2, **settings)
    monkeypatch.undo()
    assert dict(small.record.ranks) == dict(
        correct(*pair, tmp_path / "c", rank=2, sequential=False, evaluation=(), **QUICK).record.ranks
    )
    other = save(rounded(tiny_model(), levels=2), tmp_path / "other")
    with pytest.raises(RunError, match="belongs to a different run"):
        correct(other, pair[1], tmp_path / "d", rank=2, **settings)


def test_the_model_with_differences_is_the_original():
    original = tiny_model()
    made = with_differences(rounded(original), original, find_targets(original))
    assert torch.allclose(logits(made), logits(original), atol=1e-6)
    assert all(isinstance(made.get_submodule(t.path), Corrected) for t in find_targets(original))


def test_embeddings_and_norms_are_those_of_the_quantised_model():
    original = tiny_model()
    quantised = rounded(original)
    quantised.model.embed_tokens.weight.data.mul_(1.1)
    quantised.model.norm.weight.data.mul_(0.9)
    made = with_differences(quantised, original, find_targets(original))
    assert torch.equal(made.model.embed_tokens.weight, quantised.model.embed_tokens.weight)
    assert torch.equal(made.model.norm.weight, quantised.model.norm.weight)


def test_the_head_is_that_of_the_quantised_model():
    original = tiny_model(tie_word_embeddings=False)
    quantised = rounded(original)
    quantised.lm_head.weight.data.mul_(1.1)
    made = with_differences(quantised, original, find_targets(original))
    assert torch.equal(made.lm_head.weight, quantised.lm_head.weight)
    tied = tiny_model(tie_word_embeddings=True)
    apart = rounded(tied)
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight * 1.1)
    with pytest.raises(ModelError, match="'lm_head' shares its weight with the embedding in the original"):
        with_differences(apart, tied, find_targets(tied))


def test_layers_of_any_class_are_read_by_their_answers():
    class Packed(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.register_buffer("packed", (weight * 100).round().to(torch.int8))
            self.bias = torch.nn.Parameter(torch.ones(len(weight)))

        def forward(self, x):
            return torch.nn.functional.linear(x, self.packed.to(x.dtype) / 100, self.bias)

    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    found = answers(Packed(weight), 9, "layer")
    assert torch.allclose(found, (weight * 100).round() / 100, atol=1e-6)
    with pytest.raises(ModelError, match="the quantised layer 'layer' cannot be read as numbers"):
        answers(torch.nn.Linear(4, 4), 9, "layer")


def test_a_folder_that_slimrank_quantised_is_corrected(tmp_path):
    pytest.importorskip("compressed_tensors")
    import slimrank

    folder = save(tiny_model(), tmp_path / "original")
    slimrank.compress(folder, out=tmp_path / "q", method="svd", keep_ratio=1.0, quantize="int3-g8", evaluation=None)
    record = correct(tmp_path / "q", folder, tmp_path / "out", rank=4, **QUICK).record
    assert record.after["demo"]["kl"] < record.before["demo"]["kl"]


# GGUF -----------------------------------------------------------------------------------------------------------------


def gguf_file(gguf, model, path):
    """Write the linear layers of a Llama as llama.cpp stores them: rows of q and k sorted for its rotary positions."""
    writer = gguf.GGUFWriter(path, "llama")
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(model.model.layers))
    orders = {}
    for target in find_targets(model):
        weight = weight_of(model.get_submodule(target.path)).detach()
        count = heads.get(target.path.rpartition(".")[2])
        orders[target.path] = torch.arange(len(weight))
        if count:
            orders[target.path] = orders[target.path].view(count, 2, -1).transpose(1, 2).flatten()
        writer.add_tensor(f"{names.get_name(target.path)}.weight", weight[orders[target.path]].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return orders


def test_a_gguf_adapter_has_the_names_and_the_order_of_its_base(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = tiny_model()
    orders = gguf_file(gguf, model, tmp_path / "base.gguf")
    draw = torch.Generator().manual_seed(0)
    factors, weights = {}, {}
    for number, target in enumerate(find_targets(model)):
        (m, n), rank = target.shape, 1 + number % 5
        factors[target.path] = torch.randn(rank, n, generator=draw).half(), torch.randn(m, rank, generator=draw).half()
        weights[target.path] = weight_of(model.get_submodule(target.path)).detach()
    write_gguf_lora(factors, weights, tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    fields = {name: reader.fields[name].contents() for name in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert fields == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 1.0}
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(model.model.layers))
    for path, (a, b) in factors.items():
        there = [stored[f"{names.get_name(path)}.weight.lora_{part}"].double() for part in "ab"]
        product = there[1] @ there[0] / len(a)  # as llama.cpp scales it
        assert torch.allclose(product, (b.double() @ a.double())[orders[path]], rtol=2e-3, atol=2e-3)


def test_rows_that_the_file_does_not_hold_are_refused():
    weight = torch.randn(4, 3)
    assert row_order(weight.flip(0).numpy(), weight, "layer").tolist() == [3, 2, 1, 0]
    twice = weight[[0, 1, 0, 1]]
    assert torch.equal(twice[row_order(twice.flip(0).numpy(), twice, "layer")], twice.flip(0))
    with pytest.raises(ModelError, match="the rows of 'layer' in the GGUF file are not those"):
        row_order((weight + 1).numpy(), weight, "layer")


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, RecipeError, "give one of rank and max_bytes"),
        ({"rank": 1, "max_bytes": 1}, RecipeError, "give one of rank and max_bytes"),
        ({"rank": 0}, RecipeError, "rank: "),
        ({"ranks": 3}, RecipeError, "a correction has no option 'ranks'"),
        ({"max_bytes": 100}, BudgetError, "rank 1 in every layer takes 2,784 bytes"),
        ({"max_bytes": 100, "adapter_dtype": "float32"}, BudgetError, "rank 1 in every layer takes 5,568 bytes"),
        ({"rank": 1, "adapter_dtype": "int8"}, RecipeError, "adapter_dtype: .*'float16' or 'float32'"),
        ({"rank": 4, "method": "kfac"}, RecipeError, "there is no decomposition method 'kfac'"),
        ({"rank": 4, "gguf": True}, RecipeError, "a GGUF adapter belongs to a GGUF file"),
    ],
)
def test_bad_options_are_refused(pair, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        correct(*pair, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_belong_together_are_refused(pair, tmp_path):
    _, original = pair
    others = {
        "is a qwen2, and the original a llama": random_model("qwen2"),
        "knows 300 tokens": tiny_model(vocab_size=300),
        "in the quantised model": tiny_model(intermediate_size=64),
        "there is nothing to correct": tiny_model(),
    }
    for number, (message, model) in enumerate(others.items()):
        with pytest.raises(ModelError, match=message):
            correct(save(model, tmp_path / str(number)), original, tmp_path / "out", rank=2, evaluation=(), **QUICK)
    with pytest.raises(ModelError, match="is quantised"):
        config = json.loads((original / "config.json").read_text())
        folder = save(tiny_model(), tmp_path / "q")
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
        correct(original, folder, tmp_path / "out", rank=2)


def test_a_folder_of_someone_else_is_not_overwritten(pair, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(OutputError):
        correct(*pair, tmp_path, rank=2)


def test_from_the_command_line(pair, tmp_path):
    quantised, original = map(str, pair)
    arguments = ["correct", quantised, "--original", original, "--rank", "3", "--out", str(tmp_path / "out")]
    arguments += ["--samples", "4", "--seq-len", "32", "--windows", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "bits for each corrected weight" in result.output.replace("\n", " ")
    again = CliRunner().invoke(app, [*arguments, "--overwrite", "--json", "--no-eval", "--no-sequential"])
    assert json.loads(again.stdout)["before"] == {}


def test_ranks_of_the_adapter_may_differ(tmp_path):
    factors = {"a": (torch.ones(2, 5), torch.ones(3, 2)), "b": (torch.ones(4, 5), torch.ones(3, 4))}
    write_peft(factors, "base", False, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {"a": 2, "b": 4})
