"""Progress of a job as the library reports it; the command line draws it."""

from __future__ import annotations


class Progress:
    """Receives the progress of one job. This base class ignores everything.

    A job is a list of stages, each with a predicted cost in seconds; `step` moves the current stage on.
    """

    def plan(self, costs: dict[str, float]) -> None:
        """Announce all stages and their predicted cost in seconds (only the proportions matter)."""

    def stage(self, name: str, steps: int) -> None:
        """Begin a stage of so many steps; the one before it is over."""

    def step(self, done: int = 1) -> None:
        """Some steps of the current stage are done."""

    def note(self, message: str) -> None:
        """Something the user should read now."""
