"""The metrics of slimrank, each in a file of its own; see `slimrank.evaluate.metric`."""
