"""Every architecture through plan, compress (forwards only; with gradients, and refined), save, load, generate."""

import functools
import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import slimrank
from architectures import ARCHITECTURES, random_model
from helpers import byte_tokenizer, text
from slimrank.errors import ModelError, RecipeError
from slimrank.evaluate.api import evaluate
from slimrank.layers.base import compressed_layers
from slimrank.layers.experts import Experts, experts_of, fuse, unfuse
from slimrank.models.structure import experts_by_kind, find_blocks
from slimrank.models.targets import find_targets
from slimrank.pipeline import find_plan
from slimrank.pipeline.preview import preview
from slimrank.statistics.experts import UNREACHED

IDS = torch.arange(20).reshape(2, 10)
WAYS = {
    "forwards": {"method": "svd_llm"},
    "everything": {},  # the preset `balanced`
}
DRAWN = {"everything": pytest.mark.plots}
LEFT_OUT = {"mamba": 0.9}  # its state-space tables and convolutions, see docs/architectures.md
EXPERTS = {"mixtral": 2, "qwen3_moe": 2, "deepseek_v3": 1, "gpt_oss": 2, "llama4": 1}  # blocks that have some


@functools.cache
def compressed(name, way, folder):
    """The model in memory, its report, and where it was written."""
    (folder / "text.txt").write_text(text(200))
    result = slimrank.compress(
        random_model(name), byte_tokenizer(), keep_ratio=0.6, calibration=(text(400),), samples=4, seq_len=24,
        search_samples=2, evaluation=folder / "text.txt", windows=2, out=folder / f"{name}-{way}", **WAYS[way],
    )  # fmt: skip
    return result.model, result.report, result.out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("architectures")


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [pytest.param(way, marks=DRAWN.get(way, ())) for way in WAYS])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compresses_saves_and_loads(name, way, folder):
    model, report, out = compressed(name, way, folder)
    assert 0.5 < report["size"]["keep_ratio"] <= 0.6
    assert compressed_layers(model)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(random_model(name))
    close(logits(loaded), logits(model))
    again = loaded.generate(IDS[:, :5], max_new_tokens=4, do_sample=False)
    assert 0 < report["after"]["perplexity"]["perplexity"] < 1e6
    assert torch.equal(again, model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_leaves_all_else_alone(name, folder):
    """Embeddings, norms, routers, the head: bit by bit, also by the preset that refines."""
    model, report, _ = compressed(name, "everything", folder)
    dense = random_model(name)
    unfuse(dense)
    before, inside = dense.state_dict(), tuple(f"{row['path']}." for row in report["targets"])
    kept = {path for path in model.state_dict() if not path.startswith(inside)}
    assert kept <= before.keys()
    assert all(torch.equal(model.state_dict()[path], before[path]) for path in kept)
    assert any("norm" in path or "ln_" in path for path in kept)
    assert any(path.endswith((".gate.weight", ".router.weight")) for path in kept) == (name in EXPERTS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_evaluates_what_was_saved(name, folder):
    _, report, out = compressed(name, "forwards", folder)
    found = evaluate(out, texts=[str(folder / "text.txt")], windows=2, seq_len=24)
    assert found["perplexity"] == pytest.approx(report["after"]["perplexity"]["perplexity"], rel=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_covers_the_decoder(name, folder):
    _, report, _ = compressed(name, "forwards", folder)
    coverage = report["coverage"]
    assert coverage["of_matrices"] >= LEFT_OUT.get(name, 0.99)
    assert coverage["targets"] + sum(coverage["left_out"].values()) == coverage["total"]
    model = random_model(name)
    assert coverage["total"] == sum(p.numel() for p in model.parameters())
    inside, _ = find_blocks(model)
    assert all(target["path"].startswith(inside) for target in report["targets"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plans_without_weights(name, folder, tmp_path):
    """The plan of an empty model is that of the real one."""
    random_model(name).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    planned = preview(tmp_path, keep_ratio=0.6, method="svd_llm", seq_len=24)
    _, report, out = compressed(name, "forwards", folder)
    ranks = {path: target["rank"] for path, target in json.loads((out / "plan.json").read_text())["targets"].items()}
    assert {path: target.rank for path, target in planned["plan"].targets.items()} == ranks
    assert {key: planned["coverage"][key] for key in report["coverage"]} == report["coverage"]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_as_linear_layers_compute_the_same(name):
    model = random_model(name)
    parameters, expected = sum(p.numel() for p in model.parameters()), logits(model)
    assert len(unfuse(model)) == EXPERTS[name] == len(experts_of(model))
    assert sum(p.numel() for p in model.parameters()) == parameters
    close(logits(model), expected)
    assert unfuse(model) == []


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_saved_under_their_own_names(name, folder):
    _, report, out = compressed(name, "forwards", folder)
    stored = set()
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            stored |= set(opened.keys())
    experts = [t["path"] for t in report["targets"] if ".experts." in t["path"]]
    assert len(experts) == EXPERTS[name] * 4 * 2
    assert sum(".experts." in key and key.endswith(".A.weight") for key in stored) == len(experts)
    config = json.loads((out / "config.json").read_text())
    assert config["slimrank"]["format"] == 3
    assert len(config["slimrank"]["experts"]) == EXPERTS[name]
    assert (out / "experts.py").is_file()


def test_experts_without_a_router_choice_answer_nothing():
    """A number that is no expert's (padding of expert parallelism) adds nothing."""
    model = random_model("mixtral")
    path = unfuse(model)[0]
    experts = model.get_submodule(path)
    assert isinstance(experts, Experts)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    nobody = experts(x, torch.full((3, 2), 4), torch.ones(3, 2))
    assert torch.equal(nobody, torch.zeros(3, 32))


@pytest.mark.parametrize(
    "options",
    [{"method": "svd_llm", "refine": "regress", "refine_options": {"held_out": 0}}, {}],
    ids=["svd_llm", "balanced"],
)
def test_an_expert_that_no_token_reaches(options):
    """The inputs of the others stand in for its own, it weighs nothing in allocations, and it is not refined."""
    model = random_model("gpt_oss")
    for block in model.model.layers:
        block.mlp.router.bias.data[3] = -1e4
    result = slimrank.compress(
        model, byte_tokenizer(), keep_ratio=0.6, calibration=(text(400),), samples=4, seq_len=24, evaluation=None,
        search_samples=2, **options,
    )  # fmt: skip
    rows = {row["path"]: row for row in result.report["targets"]}
    notes = result.report["notes"]
    for path, row in rows.items():
        unreached = path.endswith((".up.3", ".down.3")) and ".experts." in path
        assert any(note == f"{path}: {UNREACHED}" for note in notes) == unreached
        if row["rank"] != "dense":
            assert ("refined" in row) != unreached
    ranks = [[row["rank"] for path, row in rows.items() if path.endswith(f".up.{e}")] for e in (3, 0)]
    assert options or max(ranks[0]) < min(ranks[1])
    routed = [note for note in notes if "refined towards the original weight on their own inputs" in note]
    assert len(routed) == 2 or any(note.startswith("refining was undone in 2 of 2 blocks") for note in notes)


def test_a_model_that_was_not_cut_is_as_it_was(tmp_path):
    """After a refusal in the middle, and after a plan, experts are fused again: saved natively, they load natively."""
    model = random_model("gpt_oss")
    expected, names = logits(model), [name for name, _ in model.named_parameters()]
    with pytest.raises(RecipeError):
        slimrank.compress(model, byte_tokenizer(), keep_ratio=0.5, targets=("nothing",), method="svd", evaluation=None)
    find_plan(model, byte_tokenizer(), keep_ratio=0.5, method="svd", evaluation=None)
    assert [name for name, _ in model.named_parameters()] == names
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model), expected)
    close(logits(again), expected)
    slimrank.compress(model, byte_tokenizer(), keep_ratio=0.5, method="svd", evaluation=None)
    assert compressed_layers(model)


@pytest.mark.parametrize("name", EXPERTS)
def test_fusing_undoes_unfusing(name):
    model, same = random_model(name), random_model(name)
    unfuse(model)
    fuse(model)
    state = model.state_dict()
    assert state.keys() == same.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in same.state_dict().items())


def test_parameters_of_the_activation_are_kept():
    model = random_model("mixtral", hidden_act="xielu")
    before = {name for name, _ in model.named_parameters() if "act_fn" in name}
    assert before
    unfuse(model)
    assert {name for name, _ in model.named_parameters() if "act_fn" in name} == before


def test_a_router_that_sends_everything_to_one_expert():
    model = random_model("gpt_oss", num_experts_per_tok=1)
    for block in model.model.layers:
        block.mlp.router.bias.data[3] = 1e4
    result = slimrank.compress(
        model, byte_tokenizer(), keep_ratio=0.6, calibration=(text(400),), samples=4, seq_len=24, evaluation=None,
        search_samples=2, method="svd_llm", refine="update",
    )  # fmt: skip
    assert sum("refined" in row for row in result.report["targets"]) > 0


def test_lists_without_a_router_are_no_experts():
    block = torch.nn.Module()
    block.mlps = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])
    block.other = torch.nn.Linear(8, 8)
    assert experts_by_kind(block, "b.0.", ["b.0.mlps.0", "b.0.mlps.1", "b.0.other"]) == []
    block.gate = torch.nn.Linear(8, 2)
    assert experts_by_kind(block, "b.0.", ["b.0.mlps.0", "b.0.mlps.1", "b.0.other"]) == [["b.0.mlps.0", "b.0.mlps.1"]]


def test_experts_of_neighbouring_blocks_share_by_name():
    result = slimrank.compress(
        random_model("mixtral"), byte_tokenizer(), keep_ratio=0.6, calibration=(text(400),), samples=4, seq_len=24,
        evaluation=None, method="basis_sharing", method_options={"share": ["up", "q_proj"], "layers": 2},
    )  # fmt: skip
    experts = [m for path, m in compressed_layers(result.model).items() if ".experts.up.1" in path]
    assert experts[0].A.weight is experts[1].A.weight


def test_a_class_of_experts_of_its_own_is_counted_as_left_out():
    """JetMoE keeps banks of another layout; nothing is compressed wrongly, and the report says what is missing."""
    import transformers

    config = transformers.JetMoeConfig(
        vocab_size=259, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, kv_channels=8, num_local_experts=4, max_position_embeddings=128, pad_token_id=258,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert unfuse(model) == []
    left_out = find_targets(model).coverage.left_out
    assert left_out["expert banks (3-D, of a class of their own)"] > 0


def test_a_model_that_transformers_does_not_build_is_refused():
    with pytest.raises(ModelError):
        slimrank.compress(torch.nn.Linear(2, 2), byte_tokenizer(), keep_ratio=0.5)


def test_the_processor_of_a_model_that_reads_images_goes_along(tmp_path):
    from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    random_model("llava").save_pretrained(tmp_path / "llava")
    LlavaProcessor(images, byte_tokenizer(), patch_size=8).save_pretrained(tmp_path / "llava")
    options = {"keep_ratio": 0.6, "method": "svd", "evaluation": None}
    result = slimrank.compress(tmp_path / "llava", out=tmp_path / "out", **options)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert (type(processor), processor.patch_size) == (LlavaProcessor, 8)
    assert not any("processor" in note for note in result.report["notes"])
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.pipeline_tag == "image-text-to-text"
    for block in re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL):
        space = {}
        exec(block.replace("this-folder-or-its-hub-id", str(tmp_path / "out")), space)
        assert type(space["model"]).__name__ == "LlavaForConditionalGeneration"
        assert type(space["processor"]) is LlavaProcessor
    assert "AutoModelForImageTextToText" in card.text
    without = slimrank.compress(random_model("llava"), byte_tokenizer(), out=tmp_path / "other", **options)
    assert any("no processor of images" in note for note in without.report["notes"])
    text_only = slimrank.compress(random_model("llama"), byte_tokenizer(), out=tmp_path / "text", **options)
    assert not any("processor" in note for note in text_only.report["notes"])
