"""`convert`: write a compressed model of others as a folder of slimrank."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slimrank.checkpoint.companions import save_companions
from slimrank.checkpoint.configuration_slimrank import mark_compressed
from slimrank.checkpoint.modeling_slimrank import native_classes
from slimrank.checkpoint.output_folder import CARD, OutputFolder, need_space, write_manifest
from slimrank.checkpoint.register import register
from slimrank.checkpoint.whole_folder import whole
from slimrank.converting.layout import Described, Layout
from slimrank.converting.record import ConversionRecord, write_record
from slimrank.converting.source import local_folder, read_config
from slimrank.converting.tensors import Renaming, layer_entries, rewrite
from slimrank.errors import ModelError
from slimrank.layers.base import compressed_layers
from slimrank.layers.transforms import described, transform_of
from slimrank.models.explained import explained
from slimrank.models.files import check_files, total_bytes
from slimrank.models.load import Loaded, digest, load_model
from slimrank.progress import Progress

_TAKEN = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class ConversionResult:
    """What `convert` returns.

    Attributes:
        model: as it loads from the folder.
        tokenizer: its tokenizer.
        record: what was done.
        out: the folder that was written.
    """

    model: Any
    tokenizer: Any
    record: ConversionRecord
    out: Path


def convert(
    model: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> ConversionResult:
    """Write a compressed model that others published as an ordinary folder of slimrank, without running its code.

    Read are the folders of LEMS (`low_rank_compressed`, `rank_dict`) and of ASVD (`truncation_ranks`). The factors are
    stored as they are; every tensor must have a place, and the result is loaded before it is written.

    Args:
        model: a folder or hub id.
        out: folder to write to.
        overwrite: replace what slimrank wrote to `out` before.
        progress: told what happens.

    Raises:
        ModelError: another layout, a pickle, tensors that are missing, too many, or of other shapes.
        NonFiniteError: NaN or infinity in a weight.
        OutputError: the output folder is in use, or cannot be written.
    """
    progress, output = progress or Progress(), OutputFolder(Path(out), overwrite)
    output.rehearse()
    folder = local_folder(model)
    layout, about = read_config(folder, model)
    config = _native_config(about, model)
    files = check_files(folder)
    need_space(output.path, total_bytes(files))
    progress.stage("convert", 2)
    with whole(output) as partial:
        entries = layer_entries(rewrite(files, Renaming(layout, about.ranks), partial), about.ranks)
        progress.step()
        _write_config(config, entries, partial)
        for name in _TAKEN:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        loaded = _loaded(partial, model)
        fingerprint = digest(loaded.model)
        loaded.notes += save_companions(loaded.model, loaded.tokenizer, partial)
        record = _record(str(model), layout, about, loaded)
        write_record(record, _card(folder), partial)
        write_manifest(partial, {"convert": {"source": str(model), "layout": layout.id, "model": fingerprint}})
    progress.step()
    return ConversionResult(loaded.model, loaded.tokenizer, record, output.path)


def _native_config(about: Described, spec: str | Path) -> Any:
    """Return the native configuration.

    Raises:
        ModelError: this transformers does not know the architecture, or cannot read the configuration.
    """
    register()
    if about.model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"'{spec}' was made of a '{about.model_type}', which transformers does not know by itself.",
            "a newer transformers may: pip install --upgrade transformers",
        )
    content = {key: value for key, value in about.config.items() if key not in ("auto_map", "model_type")}
    with explained(spec):
        config = CONFIG_MAPPING[about.model_type].from_dict(content)
    native = native_classes(type(config))
    if not native:
        raise ModelError(f"'{spec}' ({about.model_type}) is not a language model.", "give a decoder language model")
    named = [each.__name__ for each in native if each.__name__ in (config.architectures or ())]
    config.architectures = named or [native[0].__name__]
    return config


def _write_config(config: Any, entries: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    factors = transform_of("factors")
    mark_compressed(config, described([(factors, {"layers": dict(entries)})]))
    config.save_pretrained(folder)


def _loaded(folder: Path, spec: str | Path) -> Loaded:
    """Load what was written, which checks that every tensor has a place.

    Raises:
        ModelError: it cannot be loaded; the message names the original.
    """
    try:
        return load_model(folder)
    except ModelError as error:
        error.message = error.message.replace(str(folder), str(spec))
        raise


def _record(source: str, layout: Layout, about: Described, loaded: Loaded) -> ConversionRecord:
    layers = compressed_layers(loaded.model).values()
    total = sum(p.numel() for p in loaded.model.parameters())
    saved = sum((m := layer.out_features) * (n := layer.in_features) - layer.rank * (m + n) for layer in layers)
    return ConversionRecord(
        source, layout.id, layout.title, about.base, about.facts, about.ranks, total, total + saved, loaded.notes
    )


def _card(folder: Path) -> dict[str, Any]:
    """Return the metadata of the card that came with the model, if it can be read."""
    try:
        data: dict[str, Any] = ModelCard.load(folder / CARD).data.to_dict()
    except Exception:  # no card, or metadata that is none: the libraries below raise many unrelated classes
        return {}
    return data
