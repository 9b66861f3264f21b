"""The operators on CUDA: sources (`*.cu`, `*.cuh`), and beside each what launches it."""
