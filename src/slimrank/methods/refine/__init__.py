"""Closed-form updates of factors on the compressed model's inputs, block by block, without training."""
