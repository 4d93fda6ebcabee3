"""Compressed models that others published, as folders of slimrank."""
