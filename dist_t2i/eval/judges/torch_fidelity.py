"""Modules of the package torch-fidelity, imported without torchvision."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dist_t2i.errors import UserError

if TYPE_CHECKING:
    pass


def torch_fidelity(module: str) -> Any:
    """A module of torch-fidelity. Raises UserError when it is not installed."""
    if "torch_fidelity" not in sys.modules:
        try:
            with _torchvision():
                importlib.import_module("torch_fidelity")
        except ImportError as problem:
            raise UserError(
                f"torch-fidelity cannot be imported ({problem}); run: pip install --no-deps torch-fidelity==0.4.0, or do "
                "without with --without inception"
            ) from None
    return importlib.import_module(f"torch_fidelity.{module}")


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    """torchvision, or names that stand for it, inside."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # of an import that failed halfway
        names = ["torchvision"] + [
            f"torchvision.{n}" for n in ("datasets", "transforms", "transforms.functional", "models")
        ]
        absent = {name: _Absent(name) for name in names}
        for name in names[1:]:
            parent, _, leaf = name.rpartition(".")
            setattr(absent[parent], leaf, absent[name])
        sys.modules.update(absent)
        try:
            yield
        finally:
            for name in names:
                sys.modules.pop(name, None)
    else:
        yield


class _Absent(types.ModuleType):
    """A module of which every name is an empty class: enough to derive from, nothing to use."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
