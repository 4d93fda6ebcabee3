"""Statistics of the layers of a block, gathered by hooks while it runs forwards or backwards; additive over tokens."""
