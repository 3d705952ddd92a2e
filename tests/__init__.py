"""Tests of functional_adam; run `python -m pytest` in the repository root."""

import os

import pytest

# Tests run side by side, and so do the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Or their assertions would vanish under `python -O`.
pytest.register_assert_rewrite("tests.oracles", "tests.processes", "tests.strategies", "tests.tolerances")
