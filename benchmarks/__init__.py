"""Benchmarks: ours, the peers and the physical limit in one run, on verified data."""
