"""Loads named tensors from safetensors files into modules, and explains mismatches. Never reads pickles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from dist_t2i.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    Module = TypeVar("Module", bound=nn.Module)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises UserError if the file is missing or incomplete."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path}: missing; copy the folder again, or export the model again with tools/export.py")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises undocumented exception types
        raise UserError(
            f"{path}: not a complete safetensors file ({error}); copy or export the model again (tools/export.py). "
            "Pickled weights (.pt, .pth, .bin) are not read, because pickles could run code."
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata (names and texts) in the header of a safetensors file, which must be intact."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def fill(module: Module, tensors: Mapping[str, Tensor], prefix: str, where: Path) -> Module:
    """Replaces each tensor NAME of a module by the tensor `prefix` + NAME, converted to fp32. The module may be on the
    meta device. Returns the module.

    Raises UserError with the first problems if tensors are missing, are unknown, are not finite, or have wrong shapes.
    """
    expected = module.state_dict()
    given = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    problems = [f"{prefix}{name}: missing" for name in expected if name not in given]
    problems += [f"{prefix}{name}: unknown" for name in given if name not in expected]
    for name in sorted(set(expected) & set(given)):
        shape, wanted = tuple(given[name].shape), tuple(expected[name].shape)
        if shape != wanted:
            problems.append(f"{prefix}{name}: has shape {shape}, the configuration says {wanted}")
        elif given[name].is_floating_point() and not torch.isfinite(given[name]).all():
            problems.append(f"{prefix}{name}: has values that are not finite")
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"{where}: the weights do not fit the configuration next to them:\n  "
            + "\n  ".join(problems[:5])
            + f"{more}\nFiles of different models were mixed, or a file was edited; copy or export the folder again."
        )
    # Copy the tensors: the arbitrary alignment of tensors in a mapped file would affect the last bits of products.
    for name, value in given.items():
        given[name] = value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
    module.load_state_dict(given, assign=True)
    return module
