"""Rank allocation: spread a budget over the targets."""
