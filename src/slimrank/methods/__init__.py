"""What papers offer: decomposers, allocators and refiners, each in a file of its own."""
