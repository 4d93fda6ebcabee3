"""Pure tensor functions: no model, no file, no configuration."""
