"""Random access to the bytes of a shard: a local file, or a remote object with or without a chunk cache on disk."""

from __future__ import annotations

import contextlib
import os
import time
from functools import lru_cache
from typing import NamedTuple, Protocol

from dist_t2i.storage.chunk_cache import CHUNK, ChunkCache, key_of
from dist_t2i.storage.clients import StorageError, StorageOptions
from dist_t2i.storage.reader_process import clients_allowed, with_clients
from dist_t2i.storage.remote_file import RemoteFile
from dist_t2i.storage.urls import is_local, local_path

QUICK = 0.5
"""The limit in seconds for waiting for a chunk. If chunks arrive within this time, a reader fetches the whole chunk of
a sample, or waits while another process fetches the chunk. Later samples then need no request; one request per sample
takes six times the processor time per byte. If chunks arrive more slowly, the reader requests only the sample."""


class ShardFile(Protocol):
    """Random access to the bytes of one shard. Threads may share an instance."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes beginning at `offset`, fewer if the file ends earlier. Raises OSError if a read fails."""
        ...


class Identity(NamedTuple):
    """The version of an object, as a manifest states it."""

    size: int = -1
    """The size of the object in bytes; -1 if the size is unknown."""
    version: str = ""
    """A checksum or an ETag, which distinguishes the versions of an object in the cache; "" if both are unknown."""
    tag: str = ""
    """The ETag that the store gave this version."""


UNKNOWN = Identity()


def reason_of(error: OSError) -> str:
    """The reason for an error, without the path in the error's message."""
    return error.strerror or str(error)


class LocalFile:
    """A shard on disk. `pread` needs no file position, so threads and forked processes may share the file."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closes itself

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)


class CachedFile:
    """An object whose chunks are cached on disk. When a chunk is missing in the cache, the whole chunk is fetched if
    chunks arrive quickly; otherwise, only the requested bytes are fetched."""

    def __init__(self, remote: RemoteFile, cache: ChunkCache, version: str) -> None:
        self.remote, self.cache = remote, cache
        self.key = key_of(remote.url, version)

    def read(self, offset: int, size: int) -> bytes:
        if self.remote.size >= 0:
            size = max(0, min(size, self.remote.size - offset))
        parts = []
        for number in self.chunks(offset, size):
            begin, end = max(offset, number * CHUNK), min(offset + size, (number + 1) * CHUNK)
            part = self._part(number, begin - number * CHUNK, end - begin)
            if part is None or len(part) < end - begin:
                return self.remote.read(offset, size)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, number: int, offset: int, size: int) -> bytes | None:
        """`size` bytes of a chunk beginning at `offset`; None if a missing chunk does not arrive quickly."""
        part = self.cache.read(self.key, number, offset, size)
        if part is not None or self.cache.fill_seconds > QUICK:
            return part
        end = time.monotonic() + QUICK
        with contextlib.suppress(StorageError):  # the request for the sample will report the same error
            while not self.fill(number) and self.cache.works and time.monotonic() < end:
                self.cache.await_fill(self.key, number, end - time.monotonic())
        return self.cache.read(self.key, number, offset, size)

    @staticmethod
    def chunks(offset: int, size: int) -> range:
        """The numbers of the chunks that contain `size` bytes from `offset` on."""
        return range(offset // CHUNK, -(-(offset + size) // CHUNK))

    def fill(self, number: int) -> bool:
        """Caches a chunk. Returns False if another process is caching it or the disk fails. Raises StorageError."""
        offset = number * CHUNK
        size = CHUNK if self.remote.size < 0 else max(0, min(CHUNK, self.remote.size - offset))
        return self.cache.fill(self.key, number, size, lambda file: self.remote.read_into(file, offset, offset + size))

    def forget(self, offset: int, size: int) -> None:
        """Removes the cached chunks that contain `size` wrong bytes from `offset` on."""
        for number in self.chunks(offset, size):
            self.cache.forget(self.key, number)


class ReaderProcessFile:
    """An object that the reader process reads on behalf of this process, because this process may fork."""

    def __init__(self, url: str, options: StorageOptions, identity: Identity) -> None:
        self._arguments = url, options, identity

    def read(self, offset: int, size: int) -> bytes:
        return with_clients(_read_range, *self._arguments, offset, size)


def open_shard(url: str, options: StorageOptions, identity: Identity = UNKNOWN) -> ShardFile:
    """Opens a shard for reading, without sending a request. Raises OSError if a local file cannot be opened."""
    if is_local(url):
        return LocalFile(str(local_path(url)))
    return _open_remote(url, options, identity) if clients_allowed() else ReaderProcessFile(url, options, identity)


def _open_remote(url: str, options: StorageOptions, identity: Identity) -> ShardFile:
    remote = RemoteFile(url, options, identity.size, identity.tag)
    cache = cache_of(options)
    return CachedFile(remote, cache, identity.version) if cache is not None and identity.version else remote


@lru_cache(maxsize=8)
def cache_of(options: StorageOptions) -> ChunkCache | None:
    """The cache of this process; None if `options` names no cache or the cache cannot be written."""
    if not options.cache or options.cache_bytes <= 0:
        return None
    cache = ChunkCache(options.cache, options.cache_bytes)
    return cache if cache.prepare() else None


def read_file(url: str, options: StorageOptions) -> bytes:
    """All bytes of a small file, such as a manifest. Raises DataError, OSError (a missing file: FileNotFoundError)."""
    if is_local(url):
        return local_path(url).read_bytes()
    return with_clients(_read_all, url, options)


def _read_all(url: str, options: StorageOptions) -> bytes:
    return RemoteFile(url, options).read(0, None)


_opened = lru_cache(maxsize=64)(_open_remote)


def _read_range(url: str, options: StorageOptions, identity: Identity, offset: int, size: int) -> bytes:
    return _opened(url, options, identity).read(offset, size)
