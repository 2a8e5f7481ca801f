"""Opening a shard by its path or URL: the one place that knows where bytes come from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from dist_t2i.errors import DataError


class ShardFile(Protocol):
    """Random access to the bytes of one shard."""

    def read(self, offset: int, size: int) -> bytes:
        """The bytes there, fewer at the end of the file. Raises OSError."""
        ...

    def close(self) -> None: ...


class LocalFile:
    """A shard on disk, read with `pread`: safe to share between threads and after a fork."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def local_path(url: str) -> Path:
    """The path that a plain path or a `file://` URL names.

    Raises DataError for every other scheme, and for commands: webdataset runs `pipe:...` in a shell, this never does.
    """
    scheme, colon, rest = url.partition(":")
    if url.startswith("file://"):
        return Path(url[len("file://") :])
    if url.lstrip().startswith(("pipe:", "|")):
        raise DataError(f"{url}: commands are not run to read data; write their output to a file and name that")
    if colon and rest.startswith("//"):
        raise DataError(f"{url}: only local folders can be read, not {scheme}://; copy the set to a disk")
    return Path(url)


def open_shard(url: str) -> ShardFile:
    """The shard, open for reading. Raises DataError when it is not there or not local."""
    path = local_path(url)
    try:
        return LocalFile(str(path))
    except OSError as error:
        raise DataError(f"cannot open the shard {path}: {error.strerror}") from error
