"""Saved models: their format, their loader, their files."""
