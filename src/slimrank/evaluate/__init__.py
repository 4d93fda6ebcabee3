"""Measure a model: perplexity, speed, memory, a sample of its text."""
