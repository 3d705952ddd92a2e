"""Tests of functional_adam; run `python -m pytest` in the repository root."""

import pytest

# Or their assertions would vanish under `python -O`.
pytest.register_assert_rewrite("tests.oracles", "tests.processes", "tests.strategies", "tests.tolerances")
