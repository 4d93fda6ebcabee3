"""Rank allocation: how a budget is spread over the targets."""
