"""Engines other than transformers that load the folders of slimrank."""
