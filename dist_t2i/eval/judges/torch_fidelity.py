"""Modules of the package torch-fidelity, imported without torchvision."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

from dist_t2i.errors import UserError

_NAMES = ("", ".datasets", ".transforms", ".transforms.functional", ".models")


def torch_fidelity(module: str) -> Any:
    """Imports a module of torch-fidelity. Raises UserError if the package cannot be imported."""
    if "torch_fidelity" not in sys.modules:
        try:
            with _torchvision():
                importlib.import_module("torch_fidelity")
        except ImportError as problem:
            ways = "run: pip install --no-deps torch-fidelity==0.4.0, or skip these metrics with --without inception"
            raise UserError(f"torch-fidelity cannot be imported ({problem}); {ways}") from None
    return importlib.import_module(f"torch_fidelity.{module}")


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    """A context in which `import torchvision` works: placeholders replace the package if it cannot be imported."""
    try:
        importlib.import_module("torchvision")
        placeholders: dict[str, types.ModuleType] = {}
    except (ImportError, RuntimeError, OSError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # an import that failed halfway has left this module
        placeholders = {f"torchvision{name}": _Placeholder(f"torchvision{name}") for name in _NAMES}
    for name, module in list(placeholders.items())[1:]:
        parent, _, leaf = name.rpartition(".")
        setattr(placeholders[parent], leaf, module)
    sys.modules.update(placeholders)
    try:
        yield
    finally:
        for name in placeholders:
            sys.modules.pop(name, None)


class _Placeholder(types.ModuleType):
    """A module in which every name is an empty class, from which torch-fidelity's classes can derive."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
