"""`export`: load a model, turn it into one of another engine, and write it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typing_extensions import Unpack

from slimrank.checkpoint.companions import save_companions
from slimrank.checkpoint.output_folder import OutputFolder, need_space, write_manifest
from slimrank.checkpoint.whole_folder import whole
from slimrank.errors import ModelError, RecipeError, nearest
from slimrank.exporting.cached_step import OTHER_ENGINE, cached_step
from slimrank.exporting.check import difference
from slimrank.exporting.record import RECORD, ExportRecord
from slimrank.exporting.runner import Runner
from slimrank.exporting.target import TARGETS, Target
from slimrank.layers.balancing import put_pairs
from slimrank.layers.base import compressed_layers
from slimrank.layers.transforms import transform_of
from slimrank.models.load import Loaded, load_model, skeleton
from slimrank.models.packing import pack, unpack
from slimrank.progress import Progress
from slimrank.store import write_text

WEIGHTS = ("float32", "float16", "int8", "int4")
TOLERANCE = 1e-3  # of the logits, before weights are rounded
LARGEST = 65504.0  # number of float16
_DROPPED = ("slimrank", "auto_map", "quantization_config")


class ExportOptions(TypedDict, total=False):
    """Keywords of `export`; see `Export`."""

    weights: str | None
    packed: bool
    overwrite: bool
    progress: Progress | None


@dataclass(frozen=True)
class Export:
    """How a model is exported.

    Attributes:
        weights: "float32", "float16", "int8" or "int4". By default float32 for a model of float32, else float16.
        packed: let pivot layers become pairs, and compute layers of the same inputs together.
        overwrite: replace what slimrank wrote to the folder before.
        progress: told what happens.
    """

    weights: str | None = None
    packed: bool = False
    overwrite: bool = False
    progress: Progress | None = None


def export(model: str | Path, out: str | Path, to: str = "openvino", **options: Unpack[ExportOptions]) -> ExportRecord:
    """Write a model, compressed or not, for another engine.

    The logits of the result are compared with those of transformers before it is written.

    Args:
        model: a hub id, local folder, GGUF file or "demo".
        out: folder to write to.
        to: the engine: "openvino", "onnx" or "gguf".
        options: see `Export`.

    Raises:
        TypeError: an unknown option.
        RecipeError: an unknown engine, or unknown weights.
        MissingExtraError: the engine is not installed.
        OutputError: the output folder is in use, or cannot be written.
        ModelError: the model cannot be loaded, or cannot be exported.
    """
    target, asked = TARGETS.get(to)(), Export(**options)
    weights = asked.weights
    if weights is not None and weights not in WEIGHTS:
        raise RecipeError(f"'{weights}' are not weights of an exported model.", nearest(weights, WEIGHTS))
    version = target.need(weights)
    output, progress = OutputFolder(Path(out), asked.overwrite), asked.progress or Progress()
    output.rehearse()
    weights = weights or _usual(skeleton(model).model)
    loaded = load_model(model, "float32", progress)
    record = ExportRecord(str(model), to, version, weights, notes=list(loaded.notes))
    record.notes += _packed(loaded.model) if asked.packed else _unpacked(loaded.model)
    need_space(output.path, 4 * loaded.model.num_parameters())
    graph = _graph(target, loaded.model, record, progress)
    progress.stage("write", 1)
    with whole(output) as partial:
        _write(target, graph, loaded, partial, record)
        record.difference["written"] = difference(target.runner(partial), loaded.model)
        write_text(partial / RECORD, json.dumps(record.plain(), indent=1) + "\n")
        write_manifest(partial, {"export": {"model": str(model), "to": to, "weights": weights}})
    progress.step()
    return record


def _packed(model: Any) -> list[str]:
    """Pack a model, with pairs where pivot layers were; return a note."""
    if not compressed_layers(model):
        return ["the model has no compressed layers: nothing is packed"]
    changed = put_pairs(model)
    groups = pack(model)
    return [f"packed: {changed} pivot layers became pairs, and {groups} groups of layers have one first product"]


def _unpacked(model: Any) -> list[str]:
    """Unpack a model that was saved packed: a graph of layers by themselves is what was asked for; return a note."""
    if transform_of("packed").entry(model) is None:
        return []
    unpack(model)
    return ["the model was saved packed; its layers are exported by themselves (--packed joins them)"]


def _usual(model: Any) -> str:
    """Return the weights that lose nothing, of a model without values."""
    return "float32" if next(model.parameters()).element_size() > 2 else "float16"


def _graph(target: Target, model: Any, record: ExportRecord, progress: Progress) -> Any:
    """Return the graph with weights as the record says, and what became of them in the record.

    Raises:
        ModelError: it cannot be made, or computes something else.
    """
    progress.stage("convert", 1)
    graph = target.convert(cached_step(model))
    progress.step()
    progress.stage("compare", 1)
    _compare(target.runner(graph), model, record)
    progress.step()
    if record.weights == "float16":
        _check_range(model)
    return target.with_weights(graph, model, record)


def _compare(runner: Runner, model: Any, record: ExportRecord) -> None:
    """Compare the logits of both, and keep the difference in the record.

    Raises:
        ModelError: the runner computes something else.
    """
    record.difference["graph"] = difference(runner, model)
    if not record.difference["graph"] < TOLERANCE:
        raise ModelError(
            f"{type(model).__name__} cannot be exported: the result computes something else (its logits differ by "
            f"{record.difference['graph']:.2g} of the largest one).",
            OTHER_ENGINE,
        )
    if not difference(runner, model, padded=True) < TOLERANCE:
        record.notes.append("texts of different lengths cannot be in one batch: padding changes what is computed")


def _check_range(model: Any) -> None:
    """Refuse weights that float16 cannot hold; those of bfloat16 may be larger.

    Raises:
        ModelError: there is one.
    """
    for name, weight in model.named_parameters():
        if float(weight.detach().abs().max()) > LARGEST:
            raise ModelError(f"the weight '{name}' is too large for float16.", "--weights float32")


def _write(target: Target, graph: Any, loaded: Loaded, folder: Path, record: ExportRecord) -> None:
    """Write model, configuration and tokenizer into an existing folder."""
    target.write(graph, loaded.tokenizer, folder, record)
    _native_config(loaded.model).to_json_file(folder / "config.json")
    record.notes += save_companions(loaded.model, loaded.tokenizer, folder)
    record.notes += target.write_tokenizer(loaded.tokenizer, folder)


def _native_config(model: Any) -> Any:
    """Return the configuration of the architecture itself: engines look for its name and its sizes."""
    content = {key: value for key, value in model.config.to_dict().items() if key not in _DROPPED}
    config = CONFIG_MAPPING[model.config.model_type].from_dict(content)
    config.architectures = [type(model).__name__]
    return config
