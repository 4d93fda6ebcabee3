"""How far the predictions of a model are from those of the one that it was made of."""

from __future__ import annotations

from typing import Any

from slimrank.evaluate.metric import Compared, Text, TextMetric, metric


class _Agreement(TextMetric):
    """A figure of `Agreement`, by its id."""

    alone = False

    def compare(self, model: Any, dense: Any, on: Text) -> Compared:
        """Return the figure under its id."""
        return Compared(None, {self.id: getattr(on.agreement(model, dense), self.id)})


@metric
class Divergence(_Agreement):
    """Mean of KL(dense || model) of the next-token distributions."""

    id, title, unit, better = "kl", "divergence from the original", "nats a token", "lower"


@metric
class SameTopToken(_Agreement):
    """Percent of predictions in which both models put the same token first."""

    id, title, unit, better = "top1", "same top token as the original", "%", "higher"
