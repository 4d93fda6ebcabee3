"""Find tasks by name, and load their questions, before any model is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from slimrank.errors import DataError, MissingExtraError, RecipeError, nearest
from slimrank.progress import Progress

LOCAL = "local_"
_FETCH = "check the network, or take tasks whose questions are on this machine (--tasks-dir FOLDER)"


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks of lm-evaluation-harness by name, and the groups that they belong to.

    Attributes:
        names: what was asked for, as it was found.
        tasks: with their questions.
        groups: those that were asked for, and what they hold.
    """

    names: tuple[str, ...]
    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)

    def reseed(self) -> None:
        """Have every task draw the same examples as the command `lm_eval`."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        for task in self.tasks.values():
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def load_tasks(names: Sequence[str], folder: Path | None, shots: int | None, progress: Progress) -> LoadedTasks:
    """Return the tasks of these names, with their questions.

    Raises:
        RecipeError: an unknown task, one asked for twice, or too few examples for so many shots.
        DataError: no such folder, a broken file in it, or questions that cannot be loaded.
    """
    manager = task_manager(folder)
    own = {} if folder is None else _names_in(folder, manager)
    _check_known(names, own, manager.all_tasks)
    found = LoadedTasks(tuple(_resolved(name, own, progress) for name in names))
    for name in found.names:
        _add(found, name, _load(manager, name))
    for name, task in found.tasks.items():
        _set_shots(name, task, shots, progress)
        _check_shots(name, task)
    return found


def check_installed() -> None:
    """Make sure that lm-evaluation-harness can be imported.

    Raises:
        MissingExtraError: it cannot.
    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("lm_eval", "eval", "running tasks") from error


def task_manager(folder: Path | None) -> Any:
    """Return all tasks of lm-evaluation-harness, and those of a folder, which win.

    Raises:
        DataError: no such folder, or a broken file in it.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None:
        check_folder(folder)
    return TaskManager(include_path=folder)


def check_folder(folder: Path) -> None:
    """Make sure that all task files of a folder can be read; lm-evaluation-harness passes over those that cannot.

    Raises:
        DataError: no such folder, no task file in it, or one that is not a task file.
    """
    files = sorted(folder.glob("**/*.yaml"))
    if not files:
        what = "holds no task file (.yaml)" if folder.is_dir() else "does not exist"
        raise DataError(f"the task folder '{folder}' {what}.", "a folder of task files of lm-evaluation-harness")
    for path in files:
        try:
            content = yaml.load(path.read_bytes(), _TaskLoader)
        except (yaml.YAMLError, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"the task file '{path}' cannot be read: {reason}", "correct it, or move it away"
            ) from error
        if not isinstance(content, dict):
            raise DataError(
                f"the task file '{path}' is not a mapping of names to values.", "correct it, or move it away"
            )
        _check_includes(path, content.get("include", []))


class _TaskLoader(yaml.SafeLoader):
    """Reads task files without importing what they name."""


_TaskLoader.add_multi_constructor("!", lambda loader, tag, node: None)


def _check_includes(path: Path, included: str | list[str]) -> None:
    for name in [included] if isinstance(included, str) else included:
        if not (path.parent / name).is_file():
            raise DataError(f"the task file '{path}' includes '{name}', which does not exist.", "correct it")


def _names_in(folder: Path, manager: Any) -> dict[str, Path]:
    """Return tasks and groups whose files lie in a folder."""
    files = {name: entry.yaml_path for name, entry in manager.task_index.items() if entry.yaml_path is not None}
    return {name: path for name, path in files.items() if path.resolve().is_relative_to(folder.resolve())}


def _check_known(names: Sequence[str], own: dict[str, Path], known: Sequence[str]) -> None:
    unknown = [name for name in names if LOCAL + name not in own and name not in known]
    if unknown:
        listed = ", ".join(f"'{name}'" for name in unknown)
        hints = dict.fromkeys(nearest(name, known) for name in unknown)
        raise RecipeError(f"there is no task {listed}.", " ".join(hints))


def _resolved(name: str, own: dict[str, Path], progress: Progress) -> str:
    """Return the task that a name means; note it if that is not the obvious one."""
    if name in own:
        return name
    if LOCAL + name in own:
        progress.note(f"the task '{name}' is '{LOCAL + name}' of the task folder")
        return LOCAL + name
    if own:
        progress.note(f"the task folder has no '{name}': it is lm-evaluation-harness's own")
    return name


def _load(manager: Any, name: str) -> dict[str, dict[str, Any]]:
    try:
        loaded: dict[str, dict[str, Any]] = manager.load([name])
    except Exception as error:  # whatever the task's own code and the data library raise
        hint = _FETCH if isinstance(error, OSError) else "correct the task's file, or its rows"
        raise DataError(f"the task '{name}' cannot be loaded: {_reason(error)}", hint) from error
    return loaded


def _add(found: LoadedTasks, name: str, loaded: dict[str, dict[str, Any]]) -> None:
    for task in loaded["tasks"]:
        if task in found.tasks:
            raise RecipeError(f"the task '{task}' of '{name}' is asked for twice.", "name it, or its group, once")
    found.tasks.update(loaded["tasks"])
    found.groups.update(loaded["groups"])


def _set_shots(name: str, task: Any, shots: int | None, progress: Progress) -> None:
    """Set the examples as lm-evaluation-harness does: a task that is defined with no examples gets none."""
    defined = task.get_config("num_fewshot")
    if defined == 0 and shots:
        progress.note(f"the task '{name}' is defined with no examples: it gets none")
    elif shots is not None or defined is None:
        task.set_config("num_fewshot", shots or 0)


def _check_shots(name: str, task: Any) -> None:
    """Make sure that there are enough examples, by making the first question."""
    shots = task.get_config("num_fewshot")
    try:
        task.build_all_requests(limit=1, rank=0, world_size=1)
    except Exception as error:  # samplers raise many classes
        raise RecipeError(
            f"no question of '{name}' can be made with {shots} examples: {_reason(error)}", "fewer --shots"
        ) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
