"""CUDA sources (`*.cu`, `*.cuh`) of the operators, shipped as data files of this package."""
