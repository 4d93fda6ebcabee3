"""Recovery methods, one file each."""
