"""What a picture of a scene shows: the detector of `detector.py` as a feature network.

`python tools/shard.py scenes` writes sets of such scenes (see dist_t2i/data/scenes.py). The detector knows nothing of
captions and models, and no generator is trained with it.

It is trained when it is first needed, which takes about four minutes on two cores. The weights are kept in the user's
cache folder, under a hash of all that they depend on. The weights are identical on the same machine with the same
number of threads; otherwise they differ by round-off.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_t2i.data import scenes
from dist_t2i.eval.judges import detector
from dist_t2i.eval.judges.detector import LARGEST, OBJECTS, SIDE, WIDTH, Detector, trained
from dist_t2i.eval.judges.features import FeatureNetwork
from dist_t2i.utils.files import replacing


@dataclass(frozen=True)
class Shown:
    """What pictures show, by the detector: `OBJECTS` slots per picture, of which `present` says which hold an object."""

    present: Tensor
    """bool [..., OBJECTS]"""
    x: Tensor
    """float32 [..., OBJECTS], in units of the side, from the left; `y` from the top"""
    y: Tensor
    radius: Tensor
    """float32 [..., OBJECTS], in units of the side"""
    color: Tensor
    """int64 [..., OBJECTS], index into COLORS"""
    shape: Tensor
    """int64 [..., OBJECTS], index into SHAPES"""
    kind: Tensor
    """int64 [...], index into KINDS"""
    hue: Tensor
    """float32 [...], of the background, in [0, 1)"""

    @classmethod
    def of(cls, features: Tensor) -> Shown:
        """From the detector's features [..., WIDTH]."""
        slots = features[..., :-2].unflatten(-1, (OBJECTS, 6))
        score, x, y, radius, color, shape = slots.unbind(-1)
        return cls(score > 0.5, x, y, radius, color.long(), shape.long(), features[..., -2].long(), features[..., -1])


def digest(size: int) -> str:
    """SHA-256 of all that the weights for pictures of a size depend on: detector.py, the version of the scenes, the size.

    Comments and docstrings do not count.
    """
    about = f"{_code(detector)}\nscenes {scenes.VERSION}, {min(size, LARGEST)} px"
    return hashlib.sha256(about.encode()).hexdigest()


def _code(module: ModuleType) -> str:
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not _is_docstring(part)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_docstring(part: ast.stmt) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)


def scene_attributes(device: torch.device, size: int = SIDE) -> FeatureNetwork:
    """The detector for models with pictures of `size` pixels: from the cache, or newly trained. Sets torch's random
    state."""
    key = digest(size)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "dist_t2i" / f"scene-attributes-{key[:16]}.safetensors"
    network = _cached(path)
    if network is None:
        print(f"training the detector of scene attributes (once, about 4 minutes): {path}", file=sys.stderr, flush=True)
        network = trained(size)
        _keep(network, path)
    name = "detector of scene attributes"
    module = network.requires_grad_(False).to(device)
    return FeatureNetwork(name, SIDE, WIDTH, key, module, mean=127.5, std=127.5)


def _cached(path: Path) -> Detector | None:
    """The detector in a file; None if the file is missing or damaged."""
    network = Detector()
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):
        return None
    return network.eval()


def _keep(network: Detector, path: Path) -> None:
    """Writes the weights. A cache that cannot be written only costs the time of the next training."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file(network.state_dict(), part)
    except (OSError, SafetensorError) as error:
        print(f"warning: {path}: cannot be written ({error}); the next evaluation trains again", file=sys.stderr)
