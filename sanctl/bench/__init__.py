"""Benchmarks: the attention operators against their memory traffic, networks against each other."""
