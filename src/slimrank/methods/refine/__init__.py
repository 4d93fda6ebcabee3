"""Closed-form updates of factors after a cut, block after block, without training."""
