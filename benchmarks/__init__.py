"""Benchmarks, run from the repository root: ``make bench-kernels``, ``make bench-decode``."""
