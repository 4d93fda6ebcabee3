"""Training of a compressed model towards its original, at the same ranks and the same size."""
