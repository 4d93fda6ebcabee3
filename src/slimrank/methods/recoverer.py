"""The registry of recovery methods. One is a generator of phases with this decorator, in its own file."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from typing_extensions import Unpack

from slimrank.errors import RecipeError
from slimrank.options import options_of, validated
from slimrank.registry import Registry

Phase = Generator[str, bool, None]
Phases = Callable[..., Phase]


def _available(optimizer: str) -> str:
    """Make sure that torch has the optimiser."""
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"muon needs torch 2.9 or newer, and {torch.__version__} is installed: take adamw")
    return optimizer


class RecoverOptions(BaseModel):
    """Options of training, which every method has. A method may have other defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: Annotated[int | None, Field(ge=1, description="Tokens to train on; by default one pass over the text.")] = (
        None
    )
    optimizer: Annotated[
        Annotated[Literal["adamw", "muon"], AfterValidator(_available)],
        Field(description="Optimiser; muon (torch 2.9 or newer) makes the steps of matrices orthogonal."),
    ] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False, description="Largest learning rate.")] = 1e-4
    warmup: Annotated[
        float,
        Field(ge=0, le=1, description="Part of the steps in which the rate rises; 10 steps at least, or half of them."),
    ] = 0.03
    final_rate: Annotated[float, Field(ge=0, le=1, description="Last learning rate, over the largest.")] = 0.1
    batch_size: Annotated[int, Field(ge=1, description="Windows of a step.")] = 4
    micro_batch: Annotated[int | None, Field(ge=1, description="Windows at once; by default those of a step.")] = None
    kl: Annotated[float, Field(ge=0, allow_inf_nan=False, description="Weight of KL(original || student).")] = 1.0
    label: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Weight of the likelihood of the next token.")
    ] = 0.0
    hidden: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Weight of the error of the states after each block.")
    ] = 0.0
    teacher_top_k: Annotated[
        int | None,
        Field(
            ge=1,
            description="Store so many most probable tokens of the original at each position before training, and the "
            "mass of the others, instead of running it in every step; null: run it.",
        ),
    ] = None
    held_out: Annotated[int, Field(ge=1, description="Windows that decide which state is kept; not trained on.")] = 16
    checks: Annotated[int, Field(ge=1, description="How often these are looked at.")] = 10
    patience: Annotated[int, Field(ge=1, description="Checks without a gain before training stops.")] = 3
    clip: Annotated[float, Field(ge=0, allow_inf_nan=False, description="Largest norm of a gradient; 0: any.")] = 1.0
    checkpointing: Annotated[
        bool, Field(description="Compute blocks again in the backward pass, which takes less memory and more time.")
    ] = False
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="Dtype of products; auto: bfloat16 where the device has it."),
    ] = "auto"


@dataclass(frozen=True)
class Recoverer:
    """A way to train a compressed model.

    Attributes:
        id: its name in recipes.
        title: one line for people.
        paper: its source.
        changes_size: whether the result is larger than the model.
        by_block: each phase trains the next block by itself, towards the outputs of that of the original.
        rounds: how many times it trains on the text.
        phases: (model, paths of its blocks, **own options) -> generator. It sets `requires_grad` of what is trained
            next and yields a word for it; when it goes on, that is trained. It is sent whether the trained weights are
            kept.
        options: names, types, ranges and defaults, those of `RecoverOptions` that it takes included.
    """

    id: str
    title: str
    paper: str
    changes_size: bool
    by_block: bool
    rounds: int
    phases: Phases
    options: type[BaseModel]

    def configured(self, given: Mapping[str, Any]) -> ConfiguredRecoverer:
        """Return the method with these options.

        Raises:
            RecipeError: an unknown option, or a value out of range.
        """
        chosen = validated(self.options, given, f"the recovery method '{self.id}'").model_dump()
        training = RecoverOptions(**{name: chosen.pop(name) for name in RecoverOptions.model_fields if name in chosen})
        _check_stored(training)
        return ConfiguredRecoverer(self, chosen, training)


def _check_stored(training: RecoverOptions) -> None:
    """Make sure that stored predictions are what the loss needs.

    Raises:
        RecipeError: the loss needs states of the original, or none of its predictions.
    """
    if training.teacher_top_k is None:
        return
    if training.hidden:
        raise RecipeError("teacher_top_k stores no states of blocks, and 'hidden' needs them.", "hidden=0")
    if not training.kl:
        raise RecipeError("teacher_top_k is given, and the loss has no divergence.", "kl=1, or no teacher_top_k")


@dataclass(frozen=True)
class ConfiguredRecoverer:
    """A recovery method with its options.

    Attributes:
        method: the method.
        options: those of its own.
        training: those of training.
    """

    method: Recoverer
    options: Mapping[str, Any]
    training: RecoverOptions

    def phases(self, model: Any, blocks: Sequence[str]) -> Phase:
        """Make each phase ready in turn; see `Recoverer.phases`."""
        return self.method.phases(model, blocks, **self.options)


class Traits(TypedDict, total=False):
    """What a recovery method may say of itself.

    Attributes:
        settings: names of the `RecoverOptions` that it takes; by default all.
        defaults: of these, where they are others.
        changes_size: see `Recoverer`.
        by_block: see `Recoverer`.
        rounds: see `Recoverer`; 1 by default.
    """

    settings: Sequence[str]
    defaults: Mapping[str, Any]
    changes_size: bool
    by_block: bool
    rounds: int


RECOVERERS: Registry[Recoverer] = Registry("slimrank.methods.recover", "recovery method")


def recoverer(*, id: str, title: str, paper: str, **traits: Unpack[Traits]) -> Callable[[Phases], Phases]:
    """Register the decorated generator as a recovery method.

    Args:
        id: its name in recipes.
        title: one line for people.
        paper: its source.
        traits: see `Traits`.
    """
    grows, by_block = traits.get("changes_size", False), traits.get("by_block", False)

    def register(phases: Phases) -> Phases:
        names = traits.get("settings", tuple(RecoverOptions.model_fields))
        options = options_of(phases, _settings(names, traits.get("defaults", {})))
        RECOVERERS.add(Recoverer(id, title, paper, grows, by_block, traits.get("rounds", 1), phases, options))
        return phases

    return register


def _settings(names: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, FieldInfo]:
    """Return options of training with other defaults."""
    found = {name: copy(RecoverOptions.model_fields[name]) for name in names}
    for name, value in defaults.items():
        found[name].default = value
    return found
