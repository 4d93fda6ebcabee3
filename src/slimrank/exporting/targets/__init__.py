"""The engines that `slimrank export` writes for, one file each."""
