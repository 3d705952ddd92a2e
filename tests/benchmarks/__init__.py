"""Timings of the package against other ways to the same result: `python -m tests.benchmarks`, not run by pytest."""
