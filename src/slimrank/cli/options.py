"""Parameters that several commands share. Those of a recipe are generated: see `cli.recipe_flags`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

_TASKS = "Tasks"

Model = Annotated[str, typer.Argument(help="A hub id, a local folder, a .gguf file, or demo.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output, nothing else.")]

Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks of lm-evaluation-harness, separated by commas (extra: eval). See 'lm_eval ls tasks'.",
        rich_help_panel=_TASKS,
    ),
]
TasksDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder of task files. They win over tasks of the same name; local_NAME is found as NAME.",
        rich_help_panel=_TASKS,
    ),
]
Shots = Annotated[
    int | None,
    typer.Option(help="Examples before each question.  \\[default: the task's own]", rich_help_panel=_TASKS),
]
Limit = Annotated[
    int | None, typer.Option(help="First questions of each task.  \\[default: all]", rich_help_panel=_TASKS)
]

Command = Callable[..., None]


def takes_recipe(*fields: str) -> Callable[[Command], Command]:
    """Give a command the flags of a recipe; it gets them as one mapping, its parameter `chosen`.

    They are added when the command is looked up, so that `slimrank --help` does not import `Recipe`.

    Args:
        fields: the options of the recipe that it takes; without any, all of them, --preset, --recipe and --no-eval.
    """

    def mark(command: Command) -> Command:
        command.recipe_fields = fields  # type: ignore[attr-defined]
        return command

    return mark


def pairs(given: list[str] | None) -> dict[str, Any] | None:
    """Read NAME=VALUE options into a mapping; values are YAML, so that numbers are numbers.

    Raises:
        RecipeError: no equals sign.
    """
    import yaml

    from slimrank.errors import RecipeError

    found: dict[str, Any] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"'{text}' is not NAME=VALUE.", f"write {name}=VALUE")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(
                f"the value of '{text}' cannot be read: {error}", "give a number, a word or [a, list]"
            ) from error
    return found or None
