"""The engines that `slimrank benchmark` runs models in, one file each."""
