"""Metrics, benchmarks and reports, and the results they left in `results`."""
