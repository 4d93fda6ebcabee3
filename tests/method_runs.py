"""Runs of `slimrank.compress` on tiny models, plain, interrupted, and as they are compared."""

import functools

import pytest
import torch

import slimrank
from helpers import byte_tokenizer, text, tiny_model
from slimrank.cli import main
from slimrank.layers import LowRankLinear
from slimrank.methods.decomposer import DECOMPOSERS
from slimrank.models.structure import find_blocks
from slimrank.progress import Progress
from slimrank.text.tokens import tokenise
from slimrank.text.windows import draw_windows

TEXT = (text(),)
METHODS = list(DECOMPOSERS.all())
BACKWARD = [name for name, method in DECOMPOSERS.all().items() if method.takes == "backward"]
FREE = [n for n, d in DECOMPOSERS.all().items() if d.takes != "none" and not d.needs & {"rank", "projectors"}]
SHARED = {"layers": {"layers": 2}, "block": {"layers": 1, "within": True}, "both": {"layers": 3, "within": True}}
SAMPLES, SEQ_LEN, KEEP = 5, 24, 0.6
IDS = torch.arange(24).reshape(2, 12)
PLAIN = {"method": "svd_llm"}
ENTRY, EXIT = ("o_proj", "attn.c_proj"), ("down_proj", "mlp.c_proj")  # they add to the residual stream


def compress(model="llama", **changes):
    given = tiny_model(model) if isinstance(model, str) else model
    options = {"keep_ratio": KEEP, "calibration": TEXT, "evaluation": None, "samples": SAMPLES, "seq_len": SEQ_LEN}
    return slimrank.compress(given, byte_tokenizer(), **{**options, **PLAIN, "batch_size": 2, **changes})


@functools.cache
def result_of(method, model):
    """What others only look at."""
    return compress(model, method=method)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_same(first, second):
    """The same bits in every parameter, and the same report but for the time it took."""
    one, other = (dict(result.model.named_parameters()) for result in (first, second))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    for part in ("targets", "notes", "size"):
        assert first.report[part] == second.report[part]


def product(layer):
    return layer.B.weight.detach().double() @ layer.A.weight.detach().double()


def low_rank(model):
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LowRankLinear)}


def interrupting(stage, after, notes=None):
    """Progress that raises when so many steps of a stage are done."""
    progress, now = Progress(), {}

    def step(done=1):
        now["done"] += done
        if now["name"] == stage and now["done"] >= after:
            raise KeyboardInterrupt

    progress.stage = lambda name, steps: now.update(name=name, done=0)
    progress.step = step
    progress.note = (notes if notes is not None else []).append
    return progress


def noting(notes):
    progress = Progress()
    progress.note = notes.append
    return progress


def forbid_passes(monkeypatch):
    """Any pass over the calibration text fails from here on."""
    for name in ("embed", "step", "run"):
        monkeypatch.setattr(f"slimrank.models.blocks.BlockRunner.{name}", None)
    monkeypatch.setattr("slimrank.pipeline.stages.calibration_ways.whole_model_gradients", None)


def interrupted_then_resumed(folder, stage, after, model="llama", **options):
    notes = []
    make = (lambda: tiny_model(model)) if isinstance(model, str) else model
    with pytest.raises(KeyboardInterrupt):
        compress(make(), run_dir=folder, progress=interrupting(stage, after), **options)
    return compress(make(), run_dir=folder, progress=noting(notes), **options), notes


def calibration_windows():
    return draw_windows(tokenise("\n\n".join(TEXT), byte_tokenizer()), SAMPLES, SEQ_LEN, seed=0)


def heard(model, paths, windows):
    """Inputs of layers on a text, and the residual stream where they add to it; float64 tokens."""
    name, blocks = find_blocks(model)
    read, told, handles = {}, {}, []

    def observe(path):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            read[path], told[path] = args[0].flatten(0, -2).double(), output.flatten(0, -2).double()

        return hook

    modules = {path: model.get_submodule(path) for path in paths} | {f"{name}.{i}": b for i, b in enumerate(blocks)}
    handles = [module.register_forward_hook(observe(path)) for path, module in modules.items()]
    logits(model, windows)
    for handle in handles:
        handle.remove()
    stream = {}
    for path in paths:
        block = f"{name}.{path.removeprefix(name + '.').split('.')[0]}"
        if path.endswith(ENTRY):
            stream[path] = read[block]
        elif path.endswith(EXIT):
            stream[path] = told[block] - told[path]
    return read, stream


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def tied_between_layers():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Nothing here depends on memory given back, which takes longer than the tests."""
    monkeypatch.setattr("slimrank.models.page_out._weight_files", list)
