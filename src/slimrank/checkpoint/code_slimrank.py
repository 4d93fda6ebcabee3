"""The code that a saved model takes along. Copied into it, too: a model that was loaded by it can be saved again.

Taken are the loader, the files of the transforms and of the kinds of layers that the model has, and whatever these
import of theirs. In the copy they all lie in one folder.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

_OWN = re.compile(r"^( *)from (slimrank\.\w+\.|\.)(\w+) import", re.MULTILINE)
_FOREIGN = re.compile(r"^ *(from|import) slimrank\b", re.MULTILINE)
_NAMES = "\n\n# All files of this folder: older versions of transformers take along only those that are named here.\n"
_FIRST = "configuration_slimrank"


def code_of(about: Mapping[str, Any]) -> set[str]:
    """Return the names of the Python modules that the transforms of a model need, and of the loader.

    Args:
        about: what its configuration says of them.
    """
    from slimrank.layers.transforms import saved_transforms

    needed = {name for transform, entry in saved_transforms(about) for name in transform.modules(entry)}
    return {f"{__package__}.{_FIRST}", *needed}


def copy_code(folder: Path, names: Iterable[str]) -> None:
    """Copy Python modules, and what they import of their own, into a folder that holds only such copies.

    What cannot stand there, e.g. a script that imports more of slimrank, is left out with a warning: the model then
    loads only where that was imported before.
    """
    files: dict[str, ModuleType] = {}
    for name in sorted(names, key=lambda name: (not name.endswith(_FIRST), name)):  # the loader's file names are taken
        more = _with_imports(name)
        reason = _reason_against(more, files)
        if reason:
            warnings.warn(f"'{name}' is not saved with the model, which needs it to load: {reason}", stacklevel=4)
        else:
            files |= more
    for stem, module in files.items():
        source = Path(str(module.__file__))
        if source.parent.resolve() != folder.resolve():
            text = _OWN.sub(r"\1from .\3 import", _text(module))
            (folder / f"{stem}.py").write_text(text + (_named(files) if stem == _FIRST else ""), encoding="utf-8")


def _with_imports(name: str) -> dict[str, ModuleType]:
    """Return the module, and all that it and they import of their own, by the names of their files."""
    found: dict[str, ModuleType] = {}
    left = [importlib.import_module(name)]
    while left:
        module = left.pop()
        if found.setdefault(_stem(module), module) is not module or not _has_file(module):
            continue
        for _, start, last in _OWN.findall(_text(module)):
            package = module.__package__ if start == "." else None
            other = importlib.import_module(f"{start}{last}", package)
            if other not in found.values():
                left.append(other)
    return found


def _reason_against(files: Mapping[str, ModuleType], known: Mapping[str, ModuleType]) -> str:
    """Say why modules cannot be copied; empty if they can."""
    for stem, module in files.items():
        if not _has_file(module):
            return f"'{module.__name__}' is not a file that others can import"
        if known.get(stem, module) is not module:
            return f"there are two files '{stem}.py'"
        if _FOREIGN.search(_OWN.sub("", _text(module))) or not _copied(module):
            return f"'{module.__name__}' imports other parts of slimrank than copied ones"
    return ""


def _copied(module: ModuleType) -> bool:
    """Tell whether a module of slimrank is made to be copied, which its first lines say."""
    return not module.__name__.startswith("slimrank.") or "Copied into" in str(module.__doc__)


def _has_file(module: ModuleType) -> bool:
    return module.__name__ != "__main__" and str(getattr(module, "__file__", None)).endswith(".py")


def _stem(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _text(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text(encoding="utf-8").partition(_NAMES)[0]


def _named(files: Mapping[str, ModuleType]) -> str:
    """Return code that names all other files; it never runs."""
    lines = [f"    from .{stem} import __name__ as _{stem}\n" for stem in sorted(files) if stem != _FIRST]
    return f'{_NAMES}def _files() -> None:\n    """Name them."""\n{"".join(lines)}'
