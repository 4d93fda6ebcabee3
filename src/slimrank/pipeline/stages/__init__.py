"""The stages of a compression, each in a file of its own, beside the helpers of a single stage."""

from __future__ import annotations

from collections.abc import Sequence

from slimrank.pipeline.stage import Stage


def built_in() -> list[Stage]:
    """Return slimrank's own stages, in order; each tells whether a recipe wants it."""
    from slimrank.pipeline.stages.allocate import Allocate
    from slimrank.pipeline.stages.calibrate import Calibrate
    from slimrank.pipeline.stages.correct import Correct
    from slimrank.pipeline.stages.factorize import Factorize
    from slimrank.pipeline.stages.measure import MeasureAfter, MeasureBefore
    from slimrank.pipeline.stages.refine import Refine

    return [MeasureBefore(), Calibrate(), Allocate(), Factorize(), Refine(), Correct(), MeasureAfter()]


def in_order(own: Sequence[Stage]) -> list[Stage]:
    """Return the built-in stages and `own`, each of the latter right after the stage that it follows.

    Raises:
        ValueError: it follows a stage that does not exist.
    """
    stages = built_in()
    for stage in own:
        places = [place for place, other in enumerate(stages, 1) if other.id == stage.after]
        if not places:
            raise ValueError(f"the stage '{stage.id}' follows '{stage.after}', which is not a stage")
        stages.insert(places[0], stage)
    return stages
