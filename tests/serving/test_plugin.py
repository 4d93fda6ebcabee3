"""What the plug-in says where an engine, a form or an architecture does not fit. No engine is needed."""

import copy
import sys
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig

from helpers import tiny_model
from serving.served_models import planned_model, save
from slimrank.checkpoint.save import mark_model
from slimrank.errors import MissingExtraError, ModelError
from slimrank.layers.experts import unfuse
from slimrank.serving import vllm as plugin
from slimrank.serving.plan import ServedPlan


@pytest.fixture
def engine(monkeypatch):
    """A vLLM of some version, and whether it sees the plug-in."""

    def make(version, names=("slimrank",)):
        fake = ModuleType("vllm")
        fake.__version__ = version
        monkeypatch.setitem(sys.modules, "vllm", fake)
        monkeypatch.setattr(plugin, "find_spec", lambda name: version)
        points = [type("Point", (), {"name": name}) for name in names]
        monkeypatch.setattr(plugin.metadata, "entry_points", lambda group: points)

    return make


def test_an_engine_that_is_not_installed(engine):
    engine(None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'vllm'.\n  try: pip install 'slimrank\[vllm\]'"):
        plugin.need_engine()


def test_an_engine_that_is_too_old(engine):
    engine("0.11.2+cpu")
    with pytest.raises(ModelError, match=r"vLLM 0.11.2\+cpu is too old; at least 0.32.0 is needed"):
        plugin.need_engine()
    with pytest.warns(UserWarning, match="cannot load folders of slimrank"):
        plugin.register()  # which other models do not mind


def test_an_engine_that_does_not_see_the_plugin(engine):
    engine("0.32.0", names=("other",))
    with pytest.raises(ModelError, match="does not see the plug-in of slimrank"):
        plugin.need_engine()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0rc1", "0.33.1+cu130", "1.0"])
def test_an_engine_that_is_new_enough(engine, version):
    engine(version)
    plugin.need_engine()


def test_the_configuration_is_the_native_one(tmp_path):
    folder = save("quantised pair", tmp_path)
    config = AutoConfig.from_pretrained(folder)
    before = copy.deepcopy(config.to_dict())
    served = plugin.served_config(config)
    assert type(served).__name__ == "LlamaConfig"
    assert served.architectures == ["LlamaForCausalLM"]
    assert served.quantization_config["quant_method"] == "slimrank"  # not compressed-tensors, which reads no factors
    assert not hasattr(served, "slimrank")
    assert not hasattr(served, "auto_map")
    assert config.to_dict() == before
    assert ServedPlan.read(served.quantization_config["slimrank"]).paths


def test_an_architecture_that_was_not_tried():
    model = tiny_model("gpt2")
    model.config.slimrank = {"format": 1, "layers": {}, "base_model_type": "gpt2"}
    with pytest.raises(ModelError, match=r"'gpt2' were not tried with vLLM.*\n.*make its layers dense"):
        plugin.served_config(model.config)


def test_experts_are_refused_by_name():
    model = tiny_model("qwen3_moe")
    unfuse(model)
    mark_model(model)
    with pytest.raises(ModelError, match="cannot take the form 'experts'"):
        ServedPlan.read(model.config.slimrank)


def about(**entry):
    layer = {"kind": "pair", "in": 4, "out": 4, "rank": 2, "bias": False, **entry}
    return {"format": 5, "layers": {"a.b": layer}, "transforms": [{"kind": "factors"}]}


def test_layers_of_another_kind_and_tied_ones_are_refused_by_name():
    with pytest.raises(ModelError, match=r"cannot take the form 'monarch' of 'a.b'"):
        ServedPlan.read(about(kind="monarch"))
    with pytest.raises(ModelError, match=r"cannot take tied layers: 'a.b' and 'a.c'"):
        ServedPlan.read(about(tie="a.c"))


def test_old_formats_are_read():
    layers = {"a": {"in": 4, "out": 4, "rank": 2, "bias": False}}
    assert ServedPlan.read({"format": 1, "layers": layers}).paths == {"a"}


def test_paths_follow_those_of_the_engine():
    plan = ServedPlan.read(planned_model("shared").config.slimrank)
    moved = plan.renamed(lambda paths: {f"language_{path}": value for path, value in paths.items()})
    assert moved.paths == {f"language_{path}" for path in plan.paths}
    assert moved.lenders == {f"language_{path}" for path in plan.lenders}


def test_a_layer_of_another_size_is_refused():
    plan = ServedPlan.read(about())
    with pytest.raises(ModelError, match=r"the layer 'a.b' is 4 x 4; the engine expects 8 x 4"):
        plan.stored("a.b", (8, 4), torch.float32)
