"""Benchmarks: model families and programs that write figures to `benchmarks/results/`."""
