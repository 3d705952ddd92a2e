"""One thread a process, and what a machine without a GPU skips."""

import os
from collections.abc import Iterator

import pytest

# Before torch is imported: tests run side by side, and so do the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The only skip of the suite: tests marked `cuda` where there is no device."""
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing that another test has compiled is used, nor kept."""
    import torch

    torch.compiler.reset()
    yield
    torch.compiler.reset()
