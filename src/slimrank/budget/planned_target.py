"""What a rank plan says of one target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, StrictInt, field_validator, model_serializer

from slimrank.errors import SlimrankError

if TYPE_CHECKING:  # it imports torch, and a recipe imports plans
    from slimrank.layers.layer_form import LayerForm

OPTIONAL = ("width", "form")  # not written where there is none: older versions know no such keys
KEEPS_WEIGHT = ("dense", "residual")  # forms in which no factors replace the weight


class PlannedTarget(BaseModel):
    """Rank and shape (m, n) of one target.

    Attributes:
        rank: or "dense".
        shape: (m, n).
        shares: the target whose factor A it shares, if any.
        width: bits of a number of the dense weight, where the plan's budget is in bits; else None, and not written.
        form: its own form, where it is not that of the plan: "dense:int4-g64", "residual:int3-g64/int8", ...
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: StrictInt | Literal["dense"]
    shape: tuple[StrictInt, StrictInt]
    shares: str | None = None
    width: StrictInt | None = None
    form: str | None = None

    @field_validator("form")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return name if name is None else known_form(name)

    @property
    def base(self) -> str | None:
        """Return the name of its own form without what its numbers are rounded to; None where it has none."""
        return self.form.partition(":")[0] if self.form else None

    @property
    def is_quantized(self) -> bool:
        """Tell whether its weights become integers."""
        return bool(self.form) and ":" in str(self.form)

    @property
    def keeps_weight(self) -> bool:
        """Tell whether no factors replace its weight, whatever its rank is."""
        return self.base in KEEPS_WEIGHT

    def cost(self, form: str) -> int:
        """Return the parameters that it stores at this rank; a shared A is counted where it belongs, once.

        Args:
            form: the name of its form, if it has none of its own.
        """
        return form_of(self.form or form).parameters(*self.shape, self.rank) - self._shared(form)

    def bits(self, form: str, width: int | None = None) -> int:
        """Return the bits that it stores at this rank; parameters where neither has a width.

        Args:
            form: the name of its form, if it has none of its own.
            width: bits of a number of the dense weight, instead of the planned ones.
        """
        each = width or self.width or 1
        return form_of(self.form or form).bits(*self.shape, self.rank, each) - self._shared(form) * each

    def _shared(self, form: str) -> int:
        if self.shares is None or self.rank == "dense":
            return 0
        return form_of(self.form or form).shared(*self.shape, self.rank)

    @model_serializer(mode="wrap")
    def _written(self, usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in usual(self).items() if key not in OPTIONAL or value is not None}


def form_of(name: str) -> LayerForm:
    """Return the form of a name.

    Raises:
        RecipeError: there is none.
    """
    from slimrank.layers.forms import layer_form

    return layer_form(name)


def known_form(name: str) -> str:
    """Return the name of a form, checked.

    Raises:
        ValueError: there is none.
    """
    try:
        return form_of(name).name
    except SlimrankError as error:
        raise ValueError(error.message) from error
