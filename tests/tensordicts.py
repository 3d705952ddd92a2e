"""tensordict, for tests. Its import replaces functions of torch's vmap in the whole process; they are put back here."""

import importlib
from typing import Any

import pytest
import torch._functorch.vmap as vmap_module

_own = dict(vars(vmap_module))
tensordict: Any = importlib.import_module("tensordict")
_replaced = {name: x for name, x in vars(vmap_module).items() if x is not _own.get(name)}
for _name in _replaced:
    setattr(vmap_module, _name, _own[_name])


def replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do as the import does, until the end of the test."""
    for name, function in _replaced.items():
        monkeypatch.setattr(vmap_module, name, function)
