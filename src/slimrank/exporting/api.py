"""`export`: load a model, turn it into one of another engine, and write it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slimrank.checkpoint.companions import save_companions
from slimrank.checkpoint.output_folder import OutputFolder, need_space, write_manifest
from slimrank.errors import ModelError, RecipeError, first_line, nearest
from slimrank.exporting import few_bits
from slimrank.exporting.cached_step import OTHER_ENGINE, cached_step
from slimrank.exporting.check import difference
from slimrank.exporting.engine import need
from slimrank.exporting.graph import PURPOSE, graph_of
from slimrank.exporting.runner import MODEL_FILE
from slimrank.models.load import Loaded, load_model, skeleton
from slimrank.progress import Progress
from slimrank.store import write_text

ENGINES = ("openvino",)
WEIGHTS = ("float32", "float16", "int8", "int4")
RECORD = "export.json"
TOLERANCE = 1e-3  # of the logits, before weights are rounded
LARGEST = 65504.0  # number of float16
_DROPPED = ("slimrank", "auto_map", "quantization_config")


@dataclass
class ExportRecord:
    """What was exported; the content of export.json.

    Attributes:
        model: as the user named it.
        engine: "openvino".
        engine_version: its version.
        weights: what was asked for: float32, float16, int8 or int4.
        numbers: numbers of the weights by the type that they are stored in, e.g. {"u8": 134515008}.
        bytes: of the model's files.
        difference: largest difference of logits from those of transformers, relative to the largest logit, in float32:
            "graph" with the weights of the model, "written" with those in the file.
        own_integers: layers whose integers slimrank had chosen, which are written as they are.
        wide: linear layers in 8 bits though 4 were asked for, by reason.
        notes: deviations that the user should know of.
    """

    model: str
    engine: str
    engine_version: str
    weights: str
    numbers: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    difference: dict[str, float] = field(default_factory=dict)
    own_integers: int = 0
    wide: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Return the record as JSON holds it."""
        return asdict(self)


def export(
    model: str | Path,
    out: str | Path,
    to: str = "openvino",
    weights: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportRecord:
    """Write a model, compressed or not, for another engine.

    The logits of the result are compared with those of transformers before it is written.

    Args:
        model: a hub id, local folder, GGUF file or "demo".
        out: folder to write to.
        to: the engine: "openvino".
        weights: "float32", "float16", "int8" or "int4". By default float32 for a model of float32, else float16.
        overwrite: replace what slimrank wrote to `out` before.
        progress: told what happens.

    Raises:
        RecipeError: an unknown engine, or unknown weights.
        MissingExtraError: the engine is not installed.
        OutputError: the output folder is in use, or cannot be written.
        ModelError: the model cannot be loaded, or cannot be exported.
    """
    _check(to, weights)
    ov = need("openvino", PURPOSE)
    if weights in ("int8", "int4"):
        need("nncf", few_bits.PURPOSE)
    output, progress = OutputFolder(Path(out), overwrite), progress or Progress()
    output.rehearse()
    weights = weights or _usual(skeleton(model).model)
    loaded = load_model(model, "float32", progress)
    record = ExportRecord(str(model), to, ov.__version__.split("-")[0], weights, notes=list(loaded.notes))
    need_space(output.path, 4 * loaded.model.num_parameters())
    graph = _graph(ov, loaded.model, record, progress)
    progress.stage("write", 1)
    with _whole(output) as partial:
        _write(ov, graph, loaded, partial, record)
        record.difference["written"] = difference(partial, loaded.model)
        write_text(partial / RECORD, json.dumps(record.plain(), indent=1) + "\n")
        write_manifest(partial, {"export": {"model": str(model), "to": to, "weights": weights}})
    progress.step()
    return record


def _check(to: str, weights: str | None) -> None:
    if to not in ENGINES:
        raise RecipeError(f"'{to}' is not an engine that slimrank exports to.", nearest(to, ENGINES))
    if weights is not None and weights not in WEIGHTS:
        raise RecipeError(f"'{weights}' are not weights of an exported model.", nearest(weights, WEIGHTS))


def _usual(model: Any) -> str:
    """Return the weights that lose nothing, of a model without values."""
    return "float32" if next(model.parameters()).element_size() > 2 else "float16"


def _graph(ov: Any, model: Any, record: ExportRecord, progress: Progress) -> Any:
    """Return the OpenVINO model, with weights as the record says, and what became of them in the record.

    Raises:
        ModelError: it cannot be made, or computes something else.
    """
    progress.stage("convert", 1)
    graph = graph_of(cached_step(model))
    progress.step()
    progress.stage("compare", 1)
    record.difference["graph"] = difference(graph, model)
    if not record.difference["graph"] < TOLERANCE:
        raise ModelError(
            f"{type(model).__name__} cannot be exported: the result computes something else (its logits differ by "
            f"{record.difference['graph']:.2g} of the largest one).",
            OTHER_ENGINE,
        )
    if not difference(graph, model, padded=True) < TOLERANCE:
        record.notes.append("texts of different lengths cannot be in one batch: padding changes what is computed")
    progress.step()
    return _with_weights(ov, graph, model, record)


def _with_weights(ov: Any, graph: Any, model: Any, record: ExportRecord) -> Any:
    record.own_integers = few_bits.put_own_integers(ov, graph, model)
    if record.weights in ("int8", "int4"):
        graph, wide = few_bits.round_weights(graph, model, int(record.weights[3:]))
        record.wide = {reason: len(paths) for reason, paths in wide.items()}
        record.notes += [f"{len(paths)} linear layers have 8 bits: {reason}" for reason, paths in wide.items()]
    elif record.weights == "float16":
        _check_range(model)
    return graph


def _check_range(model: Any) -> None:
    """Refuse weights that float16 cannot hold; those of bfloat16 may be larger.

    Raises:
        ModelError: there is one.
    """
    for name, weight in model.named_parameters():
        if float(weight.detach().abs().max()) > LARGEST:
            raise ModelError(f"the weight '{name}' is too large for float16.", "--weights float32")


def _write(ov: Any, graph: Any, loaded: Loaded, folder: Path, record: ExportRecord) -> None:
    """Write model, configuration and tokenizer into an existing folder."""
    ov.save_model(graph, folder / MODEL_FILE, compress_to_fp16=record.weights != "float32")
    record.numbers = dict(few_bits.numbers_by_type(ov.Core().read_model(folder / MODEL_FILE)))
    record.bytes = sum(path.stat().st_size for path in folder.glob("openvino_model.*"))
    _native_config(loaded.model).to_json_file(folder / "config.json")
    record.notes += save_companions(loaded.model, loaded.tokenizer, folder)
    record.notes += _write_tokenizer(ov, loaded.tokenizer, folder)


def _native_config(model: Any) -> Any:
    """Return the configuration of the architecture itself: engines look for its name and its sizes."""
    content = {key: value for key, value in model.config.to_dict().items() if key not in _DROPPED}
    config = CONFIG_MAPPING[model.config.model_type].from_dict(content)
    config.architectures = [type(model).__name__]
    return config


def _write_tokenizer(ov: Any, tokenizer: Any, folder: Path) -> list[str]:
    """Write the tokenizer as OpenVINO models, which OpenVINO GenAI reads; return a note where that is not possible."""
    try:
        converter = need("openvino_tokenizers", "a tokenizer of OpenVINO")
        made = converter.convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # some tokenizers have no form there, and say so in many ways
        return [f"OpenVINO GenAI has no tokenizer for this model, so give it tokens: {first_line(error)}"]
    for graph, name in zip(made, ("tokenizer", "detokenizer"), strict=True):
        ov.save_model(graph, folder / f"openvino_{name}.xml")
    return []


@contextmanager
def _whole(output: OutputFolder) -> Iterator[Path]:
    """Yield the folder to write into; whatever ends the work before its end leaves nothing, an interrupt as well."""
    with output.writing() as partial:
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
