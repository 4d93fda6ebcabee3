"""Texts and questions of the published suites in a folder of plain files.

    wikitext2/wiki.test.raw.txt    ptb/ptb.test.txt    c4/validation.jsonl    TASK/SPLIT.jsonl

Rows have the field names of the data sets that lm-evaluation-harness reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from slimrank.errors import DataError
from slimrank.text.mixtures import Part
from slimrank.text.reading import ReadPart
from slimrank.text.sources import joined, read_source
from slimrank.text.streams import text_of

_SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
_FOLDERS = {"truthfulqa_gen": "truthfulqa"}
_ROWS = '''
import json
from pathlib import Path

import datasets


def load(folder, **_):
    found = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found[path.stem] = datasets.Dataset.from_list([_generation(row) for row in rows])
    return found


def _generation(row):
    """Rows of TruthfulQA's choices have its right and wrong answers, too."""
    if "correct_answers" in row or "mc2_targets" not in row:
        return row
    marked = list(zip(row["mc2_targets"]["choices"], row["mc2_targets"]["labels"]))
    right, wrong = ([answer for answer, label in marked if label == wanted] for wanted in (1, 0))
    return {**row, "best_answer": right[0], "correct_answers": right, "incorrect_answers": wrong}
'''


def read_text(name: str, folder: Path) -> ReadPart:
    """Read a text as papers join it.

    Raises:
        DataError: its file is missing, or cannot be read.
    """
    file, read = _TEXTS[name]
    path = folder / file
    if not path.is_file():
        raise DataError(f"the text '{name}' is missing: there is no '{path}'.", "see 'Suites' in docs/evaluation.md")
    return ReadPart(Part(name), [read(path)])


def _wikitext(path: Path) -> str:
    """Return the rows of the data set of the hub, joined: blank lines of the file are empty rows there."""
    lines = text_of(path).removesuffix("\n").split("\n")
    return joined(line + "\n" if line.strip() else "" for line in lines)


def _penn_treebank(path: Path) -> str:
    """Return the sentences, joined as SVD-LLM does; others join them by spaces."""
    return joined(line.strip() for line in text_of(path).splitlines())


_TEXTS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "wikitext2": ("wikitext2/wiki.test.raw.txt", _wikitext),
    "ptb": ("ptb/ptb.test.txt", _penn_treebank),
    "c4": ("c4/validation.jsonl", lambda path: read_source(path, "evaluation")),
}


def write_tasks(names: Sequence[str], data: Path, folder: Path) -> None:
    """Write task files that are those of lm-evaluation-harness, except that rows come from a folder.

    Args:
        names: of tasks.
        data: where their rows are.
        folder: where to.

    Raises:
        DataError: the rows of a task are missing.
    """
    (folder / "rows.py").write_text(_ROWS, encoding="utf-8")
    for name in names:
        place = data / _FOLDERS.get(name, name)
        splits = {path.stem for path in place.glob("*.jsonl")}
        if not splits & {"test", "validation"}:
            raise DataError(
                f"the questions of '{name}' are missing: there is no test.jsonl or validation.jsonl in '{place}'.",
                "see 'Suites' in docs/evaluation.md",
            )
        (folder / f"local_{name}.yaml").write_text(_task(name, place.resolve(), splits), encoding="utf-8")


def _task(name: str, place: Path, splits: set[str]) -> str:
    """Return a task file: a group of the one task, since only in a group the installed task is changed."""
    chosen: dict[str, Any] = {key: split if split in splits else None for key, split in _SPLITS.items()}
    if "train" in splits:
        chosen["fewshot_split"] = "train"
    entry = {"task": name, "dataset_kwargs": {"folder": str(place)}, **chosen}
    content = yaml.safe_dump({"group": f"local_{name}", "task": [entry]}, sort_keys=False, allow_unicode=True)
    return content.replace(f"- task: {name}\n", f"- task: {name}\n  custom_dataset: !function rows.load\n")
