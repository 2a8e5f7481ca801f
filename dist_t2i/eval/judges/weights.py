"""Finds the weights of feature networks: at a path, at a URL, or at their library's default download location."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dist_t2i.errors import DataError, UserError
from dist_t2i.storage.clients import StorageOptions
from dist_t2i.storage.shard_file import read_file, reason_of
from dist_t2i.storage.urls import is_local, local_path
from dist_t2i.utils.files import write_atomic

_DOWNLOAD = StorageOptions(retry_seconds=5.0, stall_seconds=20.0)


def remedy(network: str, what: str = "FILE") -> str:
    """The part of an error message that says how to supply the weights of `inception` or `clip`."""
    ways = f"--weights {network}={what} or DIST_T2I_{network.upper()}_WEIGHTS={what}"
    return f"supply weights with {ways}, or skip these metrics with --without {network}"


def location_of(network: str, given: str | None) -> str | None:
    """The path or URL that the user gave, on the command line or in the environment."""
    return given or os.environ.get(f"DIST_T2I_{network.upper()}_WEIGHTS") or None


def weights_file(network: str, given: str | None, url: str) -> Path:
    """The weights file that the user gave, otherwise the download of `url` in torch.hub's cache. Raises UserError."""
    location = location_of(network, given) or url
    if is_local(location):
        path = local_path(location)
        if not path.is_file():
            raise UserError(f"{path}: no such file; {remedy(network)}")
        return path
    cached = Path(torch.hub.get_dir()) / "checkpoints" / location.rpartition("/")[2]
    if not cached.is_file():
        try:
            content = read_file(location, _DOWNLOAD)
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cached, content)
        except (OSError, DataError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else error
            problem = f"the weights of {network} cannot be downloaded from {location} ({reason})"
            raise UserError(f"{problem}; download the file on another machine and {remedy(network)}") from None
    return cached
