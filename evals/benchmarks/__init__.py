"""Benchmarks of kernels, masks and transformers, and the CSV that all of them write."""
