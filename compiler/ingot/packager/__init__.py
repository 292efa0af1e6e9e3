"""From a lowered program to one file: generated C, the kernels' object, weights and metadata, linked."""
