"""Low-rank corrections of models that are quantised already."""
