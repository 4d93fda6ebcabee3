"""Find and read a compressed model of others: its configuration and its tensors, without running its code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from slimrank.checkpoint.configuration_slimrank import MODEL_TYPE
from slimrank.converting.layout import LAYOUTS, Described, Layout
from slimrank.errors import ModelError, nearest
from slimrank.models.explained import explained

_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_CODE = ["*.py", "*.pt", "*.pth", "*.pkl"]


def local_folder(spec: str | Path) -> Path:
    """Return the folder of a model; one of the hub is downloaded, except its code.

    Raises:
        ModelError: there is none, or it is a pickle of whole objects.
    """
    path = Path(spec).expanduser()
    if path.suffix in _PICKLES and (path.is_file() or not path.exists()):
        raise _pickled(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            _refuse_folder(path)
        return path
    if path.exists() or str(spec).startswith((".", "/", "~")):
        raise ModelError(f"'{spec}' is not a folder.", "give the folder of a compressed model, or its hub id")
    with explained(spec):
        return Path(snapshot_download(str(spec), ignore_patterns=_CODE))


def _refuse_folder(path: Path) -> None:
    pickles = sorted(file for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise _pickled(pickles[0])
    raise ModelError(f"the folder '{path}' is not a model: it has no config.json.", "the folder of a compressed model")


def _pickled(path: Path) -> ModelError:
    return ModelError(
        f"'{path}' is a pickle of whole Python objects, as SVD-LLM and Dobi-SVD save them. To read it is to run code "
        "that is in it, which slimrank never does.",
        "compress the original by slimrank (--method svd_llm), or save the model by save_pretrained where its code is",
    )


def read_config(folder: Path, spec: str | Path) -> tuple[Layout, Described]:
    """Recognise the layout of a folder, and read its configuration.

    Raises:
        ModelError: no layout fits, or the configuration is damaged.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the config.json of '{spec}' cannot be read: {error}", "download the model again") from error
    content = content if isinstance(content, dict) else {}
    if content.get("model_type") == MODEL_TYPE:
        raise ModelError(f"'{spec}' was written by slimrank; it needs no conversion.", "use it as it is")
    layout = next((layout for layout in LAYOUTS.all().values() if layout.fits(content)), None)
    if layout is None:
        raise ModelError(
            f"'{spec}' (model_type '{content.get('model_type')}') has no layout of compressed models that slimrank "
            "reads.",
            f"{nearest('', LAYOUTS.all())}; an ordinary model needs no conversion",
        )
    return layout, _described(layout, content, spec)


def _described(layout: Layout, content: Mapping[str, Any], spec: str | Path) -> Described:
    try:
        return layout.describe(content)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(
            f"the config.json of '{spec}' is not one of {layout.title}: {reason}", "download the model again"
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[Mapping[str, Tensor]]:
    """Open a weight file; tensors are read when they are looked up.

    Raises:
        ModelError: it is damaged, or holds something other than tensors.
    """
    with explained(path, "file"):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                yield _Lazy(file)
        else:
            yield torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class _Lazy(Mapping[str, Tensor]):
    def __init__(self, file: Any) -> None:
        self.file, self.names = file, list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
