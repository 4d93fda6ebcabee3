"""Changes of a model's modules that compute the same, in order. Copied into saved models; imports nothing but torch.

A kind of change is one subclass of `Transform`, in a file of its own that imports nothing but torch and files of this
folder which do the same. It is registered by defining it, also from outside the package. A saved model lists those that
it was changed by, and loading makes them again before the weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from slimrank.layers.base import NEW_FORMAT, import_neighbours, look_up

TRANSFORMS: dict[str, Transform] = {}


class Transform:
    """A kind of change. A subclass sets `kind`, and has `apply`, `undo` and `entry`.

    Attributes:
        kind: the name under which it is saved, and found again.
        order: changes of a smaller order are made first; compressed layers have 30.
        key: the key beside "transforms" under which older versions find its entry; None for kinds they do not know.
    """

    kind: ClassVar[str]
    order: ClassVar[int] = 100
    key: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        TRANSFORMS[cls.kind] = cls()

    def apply(self, model: nn.Module, entry: Mapping[str, Any]) -> None:
        """Change a model in place.

        Args:
            model: its weights may be on the meta device; those of modules that are put in need not have values.
            entry: as `entry` returned it for such a model.

        Raises:
            ValueError: the entry names modules that the model lacks.
        """
        raise NotImplementedError

    def loaded(self, model: nn.Module, entry: Mapping[str, Any]) -> None:
        """Finish the change when the weights have been read; by default nothing is left to do."""

    def undo(self, model: nn.Module) -> None:
        """Take the change back in place, as far as nothing was changed on top of it."""
        raise NotImplementedError

    def entry(self, model: nn.Module) -> dict[str, Any] | None:
        """Return what config.json is to say of the change; None for a model that is not changed so."""
        raise NotImplementedError

    def format(self, entry: Mapping[str, Any]) -> int:
        """Return the least format of saved models that knows the change."""
        return NEW_FORMAT

    def needed(self, entry: Mapping[str, Any]) -> list[str]:
        """Return how names of tensors begin that a saved model must hold; transformers would make up others."""
        return []

    def modules(self, entry: Mapping[str, Any]) -> set[str]:
        """Return the names of the Python modules that `apply` needs."""
        return {type(self).__module__}


def transform_of(kind: str) -> Transform:
    """Return the transform of a kind.

    Raises:
        ValueError: there is none.
    """
    found = look_up(TRANSFORMS, kind)
    if found is None:
        raise ValueError(
            f"the model was changed by '{kind}', which is not known: import the package that defines it, or upgrade "
            "slimrank"
        )
    return found


def found_transforms(model: nn.Module) -> list[tuple[Transform, dict[str, Any]]]:
    """Return the changes that a model has now, in order, each with its entry."""
    import_neighbours()
    ordered = sorted(TRANSFORMS.values(), key=lambda transform: (transform.order, transform.kind))
    return [(transform, entry) for transform in ordered if (entry := transform.entry(model)) is not None]


def described(found: list[tuple[Transform, dict[str, Any]]]) -> dict[str, Any]:
    """Return what config.json says of changes: its "format", and "transforms" beside the keys of older versions."""
    about: dict[str, Any] = {"format": max([1, *(transform.format(entry) for transform, entry in found)])}
    about["layers"] = {}
    listed = [{"kind": transform.kind, **({} if transform.key else entry)} for transform, entry in found]
    for transform, entry in found:
        about |= entry if transform.key else {}
    return {**about, "transforms": listed}


def saved_transforms(about: Mapping[str, Any]) -> Iterator[tuple[Transform, Mapping[str, Any]]]:
    """Yield the changes that a configuration tells of, in order, each with its entry.

    Raises:
        ValueError: an unknown kind.
    """
    if "transforms" in about:
        for entry in about["transforms"]:
            transform = transform_of(entry["kind"])
            yield transform, about if transform.key else entry
        return
    import_neighbours()
    for transform in sorted(TRANSFORMS.values(), key=lambda transform: transform.order):
        if transform.key and about.get(transform.key):
            yield transform, about
