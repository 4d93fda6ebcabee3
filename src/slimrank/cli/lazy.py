"""Commands that are built when they are looked up: the help of `slimrank` itself needs only their first lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

Function = Callable[..., None]


class _Commands(Mapping[str, Any]):
    """Commands by name, each built at its first use.

    Args:
        functions: what they run.
        settings: of every command.
    """

    def __init__(self, functions: list[Function], settings: dict[str, Any]) -> None:
        self.functions = {function.__name__: function for function in functions}
        self.settings = settings
        self.built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.built:
            self.built[name] = self._build(self.functions[name])
        return self.built[name]

    def __contains__(self, name: object) -> bool:
        return name in self.functions

    def __iter__(self) -> Iterator[str]:
        return iter(self.functions)

    def __len__(self) -> int:
        return len(self.functions)

    def _build(self, function: Function) -> Any:
        if hasattr(function, "recipe_fields"):
            from slimrank.cli.recipe_flags import with_recipe_flags

            function = with_recipe_flags(function)
        alone = typer.Typer(
            add_completion=False,
            rich_markup_mode="rich",
            pretty_exceptions_enable=False,
            context_settings=self.settings,
        )
        alone.command()(function)
        return typer.main.get_command(alone)


class LazyGroup(TyperGroup):
    """The group of all commands. A subclass names them in `functions`."""

    functions: ClassVar[list[Any]]

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands: Any = _Commands(self.functions, dict(self.context_settings))

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, without building any."""
        return list(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command as the help lists it."""
        if cmd_name not in self.commands:
            return None
        doc = self.commands.functions[cmd_name].__doc__
        return TyperCommand(cmd_name, help=doc, rich_markup_mode="rich")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that arguments name, with all its flags."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, self.commands[name] if found is not None and name is not None else None, rest
