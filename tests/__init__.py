"""Tests of functional_adam; run `python -m pytest` in the repository root."""
