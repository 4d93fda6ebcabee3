"""Narrow MLPs: fewer hidden units in every block, as a dense model of the same architecture."""
