"""Load a model and its tokenizer: a hub id, a local folder, a GGUF file, or the word "demo"."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slimrank.checkpoint.modeling_slimrank import SlimRankForCausalLM
from slimrank.checkpoint.processor import find_file
from slimrank.checkpoint.register import register
from slimrank.errors import ModelError, NonFiniteError
from slimrank.models.demo import demo_folder
from slimrank.models.explained import WHAT_MODEL_MAY_BE, explained, reason_of
from slimrank.models.files import ADAPTER, check_files, refuse_pointers, stored_tensors, total_bytes, weight_files
from slimrank.models.generation import check_generation
from slimrank.models.gguf import gguf_place, load_gguf
from slimrank.models.kind import Kind, kind_of
from slimrank.models.leftovers import check_taken, correct_ties, telling_class
from slimrank.models.quantised import check_stored, forget_quantisation, widened_config
from slimrank.models.storage import cast_as_loaded, torch_dtype, written_dtype
from slimrank.models.tokenizers import load_tokenizer, tokenizer_notes
from slimrank.progress import Progress


@dataclass
class Loaded:
    """A model as it was loaded.

    Attributes:
        model: with dense weights, on the CPU; without weights (meta device) where only the configuration was read.
        tokenizer: the model's own; None without weights.
        notes: what was left out, and deviations from the files.
        file_bytes: size of the weight files, where they hold less than the model does (quantised ones, widened).
    """

    model: Any
    tokenizer: Any = None
    notes: list[str] = field(default_factory=list)
    file_bytes: int | None = None


def load(spec: str | Path, dtype: str = "auto", progress: Progress | None = None) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model on the CPU, and its tokenizer; arguments as for `load_model`."""
    loaded = load_model(spec, dtype, progress)
    return loaded.model, loaded.tokenizer


def load_model(spec: str | Path, dtype: str = "auto", progress: Progress | None = None) -> Loaded:
    """Load a causal language model on the CPU, its tokenizer, and notes on both.

    Args:
        spec: hub id, local folder, .gguf file, or "demo".
        dtype: "auto" (as in the checkpoint), "float32", "bfloat16" or "float16".
        progress: receives the notes, and when the demo model is fetched.

    Raises:
        ModelError: unknown model, not a dense decoder language model, missing or damaged files, weights that the
            checkpoint lacks or that the model has no place for.
        MissingExtraError: a GGUF file without the package `gguf`.
    """
    source = _read(spec, progress)
    loaded = _load_gguf(source, dtype) if source.gguf else _load_folder(source, dtype)
    loaded.notes += tokenizer_notes(loaded.model, loaded.tokenizer)
    if progress is not None:
        for note in loaded.notes:
            progress.note(note)
    return loaded


def skeleton(spec: str | Path, dtype: str = "auto", progress: Progress | None = None) -> Loaded:
    """Build the model with no weights (meta device) in the dtypes that loading gives: only its configuration is read.

    Raises:
        ModelError: whatever `load_model` refuses by the configuration, and by weight files that are here.
        MissingExtraError: a GGUF file without the package `gguf`.
    """
    source = _read(spec, progress)
    source.check_stored()
    with explained(spec):
        model = _empty(source.kind, source.dtype(dtype))
    return Loaded(model, None, source.notes(), source.file_bytes())


@dataclass(frozen=True)
class _Source:
    """A model of which only the configuration was read.

    Attributes:
        spec: as the user named it.
        place: where transformers finds it.
        kind: what its configuration says.
        folder: where its files are, if that is a folder here.
    """

    spec: str | Path
    place: dict[str, Any]
    kind: Kind
    folder: Path | None

    @property
    def gguf(self) -> bool:
        return "gguf_file" in self.place

    @functools.cached_property
    def files(self) -> list[Path]:
        """List the weight files that are here; none if some are missing."""
        if self.gguf:
            return [self.place["pretrained_model_name_or_path"] / self.place["gguf_file"]]
        config = find_file(str(self.place["pretrained_model_name_or_path"]), "config.json")
        files = weight_files(config.parent, self._named) if config is not None else []
        return files if all(path.is_file() for path in files) else []

    @property
    def _named(self) -> str | None:
        return getattr(self.kind.config, "transformers_weights", None)

    def check_files(self) -> None:
        if self.folder is not None:
            check_files(self.folder, self._named)

    def check_stored(self) -> None:
        if self.kind.widened is None and self.kind.model_class is not SlimRankForCausalLM:
            check_stored(self.spec, stored_tensors(self.files))

    def dtype(self, asked: str) -> torch.dtype:
        """Return the dtype that weights are loaded in."""
        if asked != "auto":
            return getattr(torch, asked)
        stated = None if self.gguf else getattr(self.kind.config, "dtype", None)
        return stated or written_dtype(stored_tensors(self.files).values()) or torch.float32

    def file_bytes(self) -> int | None:
        """Return the size of the files, if loading widens their tensors."""
        return (total_bytes(self.files) or None) if self.kind.widened else None

    def notes(self) -> list[str]:
        if not self.kind.widened:
            return list(self.kind.notes)
        size = f"; its files take {self.file_bytes():,} bytes" if self.files else ""
        return [*self.kind.notes, f"the model is quantised ({self.kind.widened}), and widened to dense weights{size}"]


def _read(spec: str | Path, progress: Progress | None) -> _Source:
    register()
    source = resolve(spec, progress)
    gguf = source.endswith(".gguf")
    place = gguf_place(Path(source)) if gguf else {"pretrained_model_name_or_path": source}
    folder = Path(source) if not gguf and Path(source).is_dir() else None
    if folder is not None:
        with explained(spec):
            refuse_pointers(folder)
    return _Source(spec, place, kind_of(spec, place), folder)


def _load_folder(source: _Source, dtype: str) -> Loaded:
    source.check_files()
    source.check_stored()
    tokenizer = load_tokenizer(source.spec, source.place)
    check_generation(source.spec, str(source.place["pretrained_model_name_or_path"]))
    kind = source.kind
    if kind.widened:
        widened_config(kind.config)
    with explained(source.spec):
        native = issubclass(kind.model_class, PreTrainedModel)
        builder = telling_class(kind.model_class) if native else kind.model_class
        model, info = builder.from_pretrained(
            source.place["pretrained_model_name_or_path"],
            config=kind.config,
            dtype=torch_dtype(dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_taken` says which; transformers only points to its own report
            trust_remote_code=False,
        )
    if native:
        model.__class__ = kind.model_class
    left_out = check_taken(source.spec, model, info, vars(model).pop("untaken", ())) + correct_ties(model)
    if kind.widened:
        forget_quantisation(model)
        source = replace(source)  # files of the hub are here by now
    return Loaded(model, tokenizer, source.notes() + left_out, source.file_bytes())


def _load_gguf(source: _Source, dtype: str) -> Loaded:
    model, tokenizer, notes = load_gguf(source.place, dtype)
    return Loaded(model, tokenizer, source.notes() + notes, source.file_bytes())


def _empty(kind: Kind, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        model = kind.model_class._from_config(kind.config, dtype=dtype)
    cast_as_loaded(model, dtype)
    model.tie_weights()
    return model


def resolve(spec: str | Path, progress: Progress | None = None) -> str:
    """Return a local path or hub id that transformers understands.

    Raises:
        ModelError: a path that does not exist or holds no model.
    """
    if str(spec) == "demo":
        return str(demo_folder(progress))
    try:
        path = Path(spec).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a name that no disk allows, or an unknown user (~name)
        raise ModelError(f"the model '{spec}' cannot be loaded: {reason_of(error)}", WHAT_MODEL_MAY_BE) from error
    if path.is_file() and path.suffix == ".gguf":
        return str(path)
    if path.is_dir() and str(spec):
        if not any((path / name).is_file() for name in ("config.json", ADAPTER)):
            raise ModelError(f"the folder '{path}' is not a model: it has no config.json.", WHAT_MODEL_MAY_BE)
        return str(path)
    if exists or str(spec).startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise ModelError(f"'{spec}' is not a model folder or GGUF file.", WHAT_MODEL_MAY_BE)
    return str(spec)


def digest(model: Any) -> str:
    """Return sha256 over the configuration and the names, dtypes, shapes and bytes of all weights, and check them.

    Raises:
        NonFiniteError: NaN or infinity in a parameter.
        ModelError: a parameter that is not in memory.
    """
    total = hashlib.sha256(_configuration(model).encode())
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.is_meta:
            raise ModelError(f"the weight '{name}' is not in memory.", "load the model without disk offload")
        if isinstance(p, nn.Parameter) and not bool(torch.isfinite(p).all()):
            raise NonFiniteError(f"NaN or infinity in the weight '{name}'.", "check the checkpoint; load it in float32")
        total.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        total.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _configuration(model: Any) -> str:
    """Return the part of the configuration that affects the computation, wherever it was saved."""
    config = getattr(model, "config", None)
    if config is None:
        return ""
    aside = ("transformers_version", "_name_or_path", "architectures", "dtype")
    fields = {k: v for k, v in config.to_dict().items() if k not in aside}
    return json.dumps([fields, getattr(config, "_attn_implementation", None)], sort_keys=True, default=str)
