"""What of a folder goes up: the files that slimrank wrote, and none else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from slimrank.checkpoint.output_folder import CARD, MANIFEST, read_manifest, sha256_of
from slimrank.errors import ModelError, OutputError

WEIGHTS = (".safetensors", ".bin", ".gguf", ".onnx", ".onnx_data", ".pt", ".pth")
PLACEHOLDER = "this-folder-or-its-hub-id"  # in model cards


@dataclass(frozen=True)
class Contents:
    """The files of a folder that go up.

    Attributes:
        folder: where they are.
        names: their names, sorted; with the manifest.
        card: text of the model card; empty without one.
        left: how many other files lie in the folder and stay there.
    """

    folder: Path
    names: tuple[str, ...]
    card: str
    left: int

    @classmethod
    def of(cls, folder: str | Path) -> Contents:
        """Look into a folder that slimrank wrote.

        A model card may have been changed since, as may all other text; weights may not.

        Raises:
            ModelError: slimrank did not write the folder.
            OutputError: its manifest is damaged, files are missing, or weights are not those that were written.
        """
        place = Path(folder).expanduser()
        if not (place / MANIFEST).is_file():
            raise ModelError(
                f"'{folder}' was not written by slimrank: it has no {MANIFEST}.", "the folder that --out named"
            )
        manifest = read_manifest(place)
        _check_files(place, manifest["files"])
        reports = [name for name in manifest["reports"] if (place / name).is_file()]
        names = {MANIFEST, *manifest["files"], *reports}
        if (place / CARD).is_file():
            names.add(CARD)
        present = sum(path.is_file() for path in place.rglob("*"))
        card = (place / CARD).read_text(encoding="utf-8") if CARD in names else ""
        return cls(place, tuple(sorted(names)), card, present - len(names))

    @property
    def about(self) -> dict[str, Any]:
        """Return the metadata of the card; empty where it has none.

        Raises:
            ModelError: it has some that cannot be read.
        """
        try:
            data: dict[str, Any] = ModelCard(self.card).data.to_dict()
        except Exception as error:  # YAML errors, and what the card's classes say of wrong fields
            raise ModelError(
                f"the metadata of '{self.folder / CARD}' cannot be read: {error}", "mend the lines between the ---"
            ) from error
        return data

    def content(self, name: str, repo: str) -> str | bytes:
        """Return a file for the upload: its path, or the text of the card, which names the repository."""
        if name == CARD:
            return self.card.replace(PLACEHOLDER, repo).encode()
        return str(self.folder / name)


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    missing = [name for name in files if name != CARD and not (folder / name).is_file()]
    if missing:
        raise OutputError(
            f"'{folder}' lacks {len(missing)} files that slimrank wrote, the first '{missing[0]}'.",
            "copy the folder again, or compress the model again",
        )
    for name, stated in files.items():
        if name.endswith(WEIGHTS) and sha256_of(folder / name) != stated["sha256"]:
            raise OutputError(
                f"'{folder / name}' holds other weights than slimrank wrote there: the card and the reports do not "
                "describe them.",
                "copy the folder again, or compress the model again",
            )
