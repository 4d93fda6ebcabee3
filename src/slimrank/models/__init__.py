"""Models: load them, find what can be compressed, run them block by block."""
