"""Progress of a job as the library reports it; the command line draws it."""

from __future__ import annotations


class Progress:
    """Receives the progress of one job. This base class ignores everything.

    A job is a list of stages, each with a predicted cost in seconds; `step` advances the current stage.
    """

    def plan(self, costs: dict[str, float]) -> None:
        """Announce all stages and their predicted cost in seconds (only the proportions matter)."""

    def stage(self, name: str, steps: int) -> None:
        """Begin a stage of that many steps, and end the one before it.

        The name of the current stage again: what is left of it has that many steps.
        """

    def step(self, done: int = 1) -> None:
        """Advance by some steps of the current stage."""

    def note(self, message: str) -> None:
        """Show something that the user should read now."""


class Forecast:
    """Advances a stage whose number of steps is an estimate: its last step is done when it ends, not before.

    Args:
        progress: receives whole steps.
        expected: estimated number of steps.
    """

    def __init__(self, progress: Progress, expected: float) -> None:
        self.progress, self.steps = progress, 1 + round(expected)
        self._done, self._told = 0.0, 0

    def did(self, steps: float) -> None:
        """Advance by `steps`, which may be fractional."""
        self._done += steps
        self._tell(min(int(self._done), self.steps - 1))

    def end(self) -> None:
        """End, however many steps it took."""
        self._tell(self.steps)

    def _tell(self, done: int) -> None:
        if done > self._told:
            self.progress.step(done - self._told)
            self._told = done
