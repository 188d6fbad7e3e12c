"""Measurements beside peers, in one process: `python -m benchmarks --help`."""
