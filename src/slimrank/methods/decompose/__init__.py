"""Decomposition methods: one file each, all through `linalg.lowrank`."""
