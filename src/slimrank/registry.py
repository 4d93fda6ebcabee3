"""Methods by id. Each registers itself in a file of its own; lookups import the files of a package.

Other packages name a module that registers theirs in an entry point of the group `slimrank`. So the command line and
the processes of a comparison know them, too.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Generic, Protocol, TypeVar

from slimrank.errors import RecipeError, SlimrankError, nearest


@cache
def load_plugins() -> None:
    """Import the modules that other packages name in entry points of the group `slimrank`, once.

    Raises:
        SlimrankError: one cannot be imported.
    """
    for point in entry_points(group="slimrank"):
        try:
            point.load()
        except Exception as error:  # code of others may raise anything
            raise SlimrankError(
                f"the plug-in '{point.name}' ({point.value}) cannot be imported: {error}",
                f"update or uninstall the package '{point.dist.name if point.dist else point.name}'",
            ) from error


class HasId(Protocol):
    """Anything with an id."""

    @property
    def id(self) -> str:
        """Return its name in recipes."""


T = TypeVar("T", bound=HasId)


class Registry(Generic[T]):
    """The methods of one kind.

    Args:
        package: dotted name of the package whose modules register methods.
        kind: the word for its methods in an error.
    """

    def __init__(self, package: str, kind: str) -> None:
        self.package, self.kind = package, kind
        self.entries: dict[str, T] = {}

    def add(self, entry: T) -> T:
        """Register a method and return it, so that this works as a decorator; one of the same id is replaced."""
        self.entries[entry.id] = entry
        return entry

    def all(self) -> dict[str, T]:
        """Return all methods by id: those of the package, and those registered from outside."""
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        load_plugins()
        return dict(sorted(self.entries.items()))

    def get(self, id: str) -> T:
        """Return the method of that id.

        Raises:
            RecipeError: it does not exist; the nearest names are in the hint.
        """
        known = self.all()
        if id not in known:
            raise RecipeError(f"there is no {self.kind} '{id}'.", nearest(id, known))
        return known[id]
