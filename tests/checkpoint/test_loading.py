"""A saved model loads with slimrank imported, with remote code, and with neither fails clearly."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming
from transformers.dynamic_module_utils import get_relative_imports

import slimrank
from helpers import CONFIGS, VOCABULARY, byte_tokenizer, tiny_model
from slimrank.checkpoint.save import mark_model
from slimrank.layers import LowRankLinear, PivotLinear
from slimrank.layers.experts import unfuse
from slimrank.layers.forms import PIVOT

IDS = torch.randint(VOCABULARY - 3, (2, 12), generator=torch.Generator().manual_seed(0))
NAMES = list(CONFIGS)
CHECKS_FIELDS = Version(transformers.__version__) >= Version("5.4")
REFUSED = "compressed by slimrank" if CHECKS_FIELDS else "'str' object has no attribute"  # never random weights

FORMS = ["pair", "pivot"]


def compressed(name="llama", form="pair", **changes):
    model = tiny_model(name, **changes)
    slimrank.compress(model, byte_tokenizer(), keep_ratio=0.6, method="svd", evaluation=None, seq_len=16, form=form)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each form, for those who start one process for all."""
    return {form: save(compressed(form=form), tmp_path_factory.mktemp(form) / "model") for form in FORMS}


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    torch.save(logits(model), folder / "expected.pt")
    return folder


@pytest.fixture(params=FORMS)
def saved(folders, request):
    return folders[request.param]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_exact_and_native(name, form, tmp_path):
    model = compressed(name, form)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(tiny_model(name))
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(model))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert loaded.config.model_type == model.config.model_type == CONFIGS[name]().model_type


@pytest.mark.parametrize("name", NAMES)
def test_no_original_weight_is_in_the_file(name, tmp_path):
    dense = tiny_model(name)
    unfuse(dense)
    original = {n for n, _ in dense.named_parameters()}
    model = compressed(name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    layers = {n for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert layers
    for path in layers:
        assert f"{path}.weight" in original
        assert f"{path}.weight" not in stored
        assert {f"{path}.A.weight", f"{path}.B.weight"} <= set(stored)
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(t.numel() for t in stored.values()) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_the_file_of_pivot_layers_holds_their_parts_and_orders(name, tmp_path):
    model = compressed(name, "pivot")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PivotLinear)}
    assert layers
    assert {layer.side for layer in layers.values()} == {"out", "in"}
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())
    for path, layer in layers.items():
        mine = {k.removeprefix(f"{path}."): v for k, v in stored.items() if k.startswith(f"{path}.")}
        names = {"skeleton.weight", "interpolation.weight", "order"}
        assert set(mine) == names | ({"bias"} if layer.bias is not None else set())
        assert mine["order"].dtype == torch.int32
        weights = mine["skeleton.weight"].numel() + mine["interpolation.weight"].numel()
        assert weights == PIVOT.parameters(layer.out_features, layer.in_features, layer.rank)
    floating = sum(t.numel() for t in stored.values() if t.is_floating_point())
    assert floating == sum(p.numel() for p in model.parameters())
    assert len(stored) == len({id(p) for p in model.parameters()}) + len(layers)


@pytest.mark.parametrize("form, number", [("pair", 1), ("pivot", 2)])
def test_models_of_pairs_stay_readable_for_older_versions(form, number):
    about = compressed(form=form).config.slimrank
    assert about["format"] == number
    assert all(("side" in layer) == (form == "pivot") for layer in about["layers"].values())


def test_resaving_generation_and_dtype(saved, tmp_path):
    first = AutoModelForCausalLM.from_pretrained(saved)
    first.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), torch.load(saved / "expected.pt"))
    a, b = (m.generate(IDS, max_new_tokens=5, do_sample=False) for m in (first, again))
    assert torch.equal(a, b)
    assert a.shape == (2, 17)
    half = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for n, b in half.named_buffers() if n.endswith("order")} <= {torch.int32}
    assert torch.isfinite(logits(half)).all()
    placed = AutoModelForCausalLM.from_pretrained(saved, device_map="auto")
    assert torch.equal(logits(placed).cpu(), logits(first))


def test_the_whole_model_compiles_without_a_break(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model))


def test_ties_survive(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_lora_on_the_factors(saved, tmp_path):
    """In float64, so that merging an adapter is exact but for the last digits."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    exact = {"rtol": 1e-8, "atol": 1e-8}
    names = ["A", "B", "skeleton", "interpolation"]
    plain = logits(load(saved))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(load(saved), LoraConfig(target_modules=names, r=2, init_lora_weights=False))
    adapted = logits(model)
    assert float((adapted - plain).abs().max()) > 1e-3
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.save_pretrained(tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(load(saved), tmp_path / "adapter").to(torch.float64)
    torch.testing.assert_close(logits(fresh), adapted, **exact)
    merged = fresh.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(fresh), **exact)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(merged), **exact)


def test_configurations_copy_and_pickle(saved):
    config = AutoConfig.from_pretrained(saved)
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(copied) is type(config)
        assert copied.slimrank == config.slimrank
        assert copied.hidden_size == 32
    empty = AutoModelForCausalLM.from_config(config)
    assert isinstance(empty.model.layers[0].mlp.up_proj, (LowRankLinear, PivotLinear))


def test_damaged_and_foreign_checkpoints(saved, tmp_path):
    content = json.loads((saved / "config.json").read_text())
    for change, message in [
        (lambda c: c.pop("base_config"), "lacks 'slimrank' or 'base_config'"),
        (lambda c: c["slimrank"].update(format=99), "upgrade slimrank"),
        (lambda c: c["slimrank"].update(base_model_type="unheard_of"), "upgrade transformers"),
        (lambda c: c["slimrank"]["layers"].update({"model.nowhere": {}}), "not in LlamaForCausalLM"),
    ]:
        changed = copy.deepcopy(content)
        change(changed)
        (tmp_path / "config.json").write_text(json.dumps(changed))
        (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_factors_are_never_random(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "damaged")
    tensors = load_file(saved / "model.safetensors")
    name = min(name for name in tensors if name.endswith((".A.weight", ".skeleton.weight")))
    del tensors[name]
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights of compressed layers, the first '{name}'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "damaged")


def test_weights_are_written_under_their_names_in_the_model(saved, tmp_path):
    """Rules by which transformers renames weights of native layers are not for those of factors."""
    model, names = AutoModelForCausalLM.from_pretrained(saved), load_file(saved / "model.safetensors").keys()
    model._weight_conversions = [WeightRenaming(source_patterns=r"q_projection", target_patterns=r"q_proj")]
    model.save_pretrained(tmp_path / "renamed")
    assert load_file(tmp_path / "renamed" / "model.safetensors").keys() != names
    mark_model(model)
    model.save_pretrained(tmp_path / "kept")
    assert load_file(tmp_path / "kept" / "model.safetensors").keys() == names


def python(code, *arguments):
    """Run code in a process where slimrank cannot be imported."""
    block = """
        import importlib.abc, os, sys
        os.environ["HF_HUB_OFFLINE"] = "1"
        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.partition(".")[0] == "slimrank":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Block())
    """
    program = textwrap.dedent(block) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_remote_code_without_slimrank(folders):
    result = python(
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        def check(folder, expected):
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            with torch.no_grad():
                assert torch.equal(model(input_ids=ids).logits, expected)
            return model

        ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
        for folder in sys.argv[1:]:
            expected = torch.load(folder + "/expected.pt")
            model = check(folder, expected)
            AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers.models.llama")
            model.generate(ids, max_new_tokens=2)
            model.save_pretrained(folder + "-again")
            check(folder + "-again", expected)
        assert not [name for name in sys.modules if name.partition(".")[0] == "slimrank"]
        """,
        *folders.values(),
    )
    assert result.returncode == 0, result.stderr
    for folder in folders.values():
        again = AutoModelForCausalLM.from_pretrained(f"{folder}-again")
        assert torch.equal(logits(again), torch.load(folder / "expected.pt"))


def test_a_file_of_the_code_names_all_others(folders):
    """Some versions of transformers take along only what the first file that they read names itself."""
    for folder in folders.values():
        code = {path.stem for path in folder.glob("*.py")}
        first = "configuration_slimrank"
        assert {*get_relative_imports(folder / f"{first}.py"), first} == code


def test_without_slimrank_and_without_trust_it_fails_clearly_but_for_the_tokenizer(folders):
    result = python(
        """
        import json, transformers
        for folder in sys.argv[1:]:
            said = {}
            for name in ("AutoModelForCausalLM", "LlamaForCausalLM", "GPT2LMHeadModel"):
                try:
                    getattr(transformers, name).from_pretrained(folder)
                except Exception as error:
                    said[name] = str(error)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            print("\\n" + json.dumps([said, len(tokenizer)]))  # after the question whether to run the folder's code
        """,
        *folders.values(),
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[{")]
    assert len(found) == len(FORMS)
    for said, vocabulary in found:
        assert "trust_remote_code=True" in said["AutoModelForCausalLM"]
        assert REFUSED in said["LlamaForCausalLM"]
        assert REFUSED in said["GPT2LMHeadModel"]
        assert vocabulary == len(byte_tokenizer())


@pytest.mark.parametrize("order", ["import slimrank; import transformers", "import transformers; import slimrank"])
def test_importing_slimrank_registers_the_loader(folders, order):
    code = f"{order}; import sys; [transformers.AutoModelForCausalLM.from_pretrained(path) for path in sys.argv[1:]]"
    result = subprocess.run([sys.executable, "-c", code, *folders.values()], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
