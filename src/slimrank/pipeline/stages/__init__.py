"""The stages of a compression, each in a file of its own, beside the helpers of a single stage."""
