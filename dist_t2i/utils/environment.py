"""A description of this machine and code, which rank 0 writes to RUN/environment.json."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from dist_t2i.utils.processes import usable_cores

_PACKAGES = (
    "dist-t2i", "torch", "deepspeed", "numpy", "webdataset", "tokenizers", "safetensors", "pillow", "simplejpeg",
    "fsspec", "wandb", "submitit",
)  # fmt: skip
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "asimd", "bf16")
"""The processor features on which the speed and the precision of training depend."""


def describe() -> dict[str, Any]:
    """All facts on which a result may depend: versions, code, processor and GPUs. The values have JSON types."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "host": socket.gethostname(),
        "command": sys.argv,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "code": git_state(Path(__file__).resolve().parent),
        "processor": processor(),
        "gpus": gpus(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def git_state(folder: Path) -> dict[str, Any]:
    """`revision` is the current commit, and `dirty` is True if tracked files differ from this commit. The result is
    empty if `folder` is not in a git checkout or git is missing."""
    try:
        revision, status = (
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
        return {"revision": revision.stdout.strip(), "dirty": bool(status.stdout.strip())}
    except (OSError, subprocess.SubprocessError):
        return {}


def processor() -> dict[str, Any]:
    """The processor's model name, usable cores and features (a subset of `_FLAGS`), and the memory in bytes."""
    lines = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    fields = {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flags": [flag for flag in _FLAGS if flag in present],
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes and compute capability of the CUDA devices that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": d.name, "memory_bytes": d.total_memory, "capability": f"{d.major}.{d.minor}"} for d in devices]
