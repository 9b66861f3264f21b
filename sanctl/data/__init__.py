"""Datasets: their files, and the way from a file to a batch."""
