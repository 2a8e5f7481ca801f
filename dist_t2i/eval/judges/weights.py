"""Where a judge's weights come from: a path, a URL, or the place from which its library downloads them."""

from __future__ import annotations

import os
from pathlib import Path

from dist_t2i.errors import DataError, UserError
from dist_t2i.storage.clients import StorageOptions
from dist_t2i.storage.shard_file import read_file, reason_of
from dist_t2i.storage.urls import is_local, local_path
from dist_t2i.utils.files import write_atomic

_DOWNLOAD = StorageOptions(retry_seconds=5.0, stall_seconds=20.0)


def variable(network: str) -> str:
    """The environment variable that may name a network's weights: DIST_T2I_INCEPTION_WEIGHTS."""
    return f"DIST_T2I_{network.upper()}_WEIGHTS"


def remedy(network: str, what: str = "FILE") -> str:
    """How a user names the weights of `inception` or `clip`."""
    return f"name them with --weights {network}={what} or {variable(network)}={what}, or do without with --without {network}"


def source_of(network: str, given: str | None) -> str | None:
    """What the user named, on the command line or in the environment."""
    return given or os.environ.get(variable(network)) or None


def weights_file(network: str, given: str | None, url: str) -> Path:
    """The file of a network's weights: the one given, or from `url`, kept where torch.hub keeps its downloads.

    Raises UserError when it is not there, or cannot be downloaded.
    """
    import torch

    source = source_of(network, given) or url
    if is_local(source):
        path = local_path(source)
        if not path.is_file():
            raise UserError(f"{path}: no such file; {remedy(network)}")
        return path
    kept = Path(torch.hub.get_dir()) / "checkpoints" / source.rpartition("/")[2]
    if not kept.is_file():
        try:
            data = read_file(source, _DOWNLOAD)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, data)
        except (OSError, DataError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else error
            raise UserError(
                f"the weights of {network} cannot be had from {source} ({reason}); fetch the file elsewhere and "
                f"{remedy(network)}"
            ) from None
    return kept
