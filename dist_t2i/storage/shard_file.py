"""Opening a shard by its path or URL: a local file, an object, or an object of which parts are kept on disk."""

from __future__ import annotations

import contextlib
import os
import time
from functools import lru_cache
from typing import NamedTuple, Protocol

from dist_t2i.storage.chunk_cache import CHUNK, ChunkCache, key_of
from dist_t2i.storage.clients import StorageError, StorageOptions
from dist_t2i.storage.reader_process import apart, may_have_clients
from dist_t2i.storage.remote_file import RemoteFile
from dist_t2i.storage.urls import is_local, local_path


class ShardFile(Protocol):
    """Random access to the bytes of one shard, from several threads."""

    def read(self, offset: int, size: int) -> bytes:
        """The bytes there, fewer at the end of the file. Raises OSError."""
        ...

    def close(self) -> None: ...


class Identity(NamedTuple):
    """What a manifest knows of an object: its bytes (-1: unknown), its version (a checksum or tag), and the tag that
    the store itself gives it."""

    size: int = -1
    version: str = ""
    tag: str = ""


UNKNOWN = Identity()


def reason_of(error: OSError) -> str:
    """A phrase for people."""
    return error.strerror or str(error)


class LocalFile:
    """A shard on disk, read with `pread`: safe to share between threads and after a fork."""

    def __init__(self, path: str) -> None:
        self._descriptor = -1  # for `close`, when the next line raises
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


QUICK = 0.5
"""Seconds. Where a whole chunk comes in less, a reader gets it, or waits for whoever is getting it: its other samples will
be wanted, too, and a request for each costs the processor six times as much a byte. Else it asks for its sample alone."""


class CachedFile:
    """An object, parts of which are kept. What is not there is read over the network, by the chunk where that is quick."""

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
        """Bytes of a chunk; None when it is not kept and does not come quickly."""
        part = self.cache.read(self.key, number, offset, size)
        if part is not None or self.cache.fill_seconds > QUICK:
            return part
        end = time.monotonic() + QUICK
        with contextlib.suppress(StorageError):  # reading the sample alone meets it again, and tells it
            while not self.fill(number) and self.cache.works and time.monotonic() < end:
                self.cache.await_fill(self.key, number, end - time.monotonic())
        return self.cache.read(self.key, number, offset, size)

    @staticmethod
    def chunks(offset: int, size: int) -> range:
        """The chunks in which these bytes lie."""
        return range(offset // CHUNK, -(-(offset + size) // CHUNK))

    def fill(self, number: int) -> bool:
        """Keep a chunk; False when another process is at it or nothing can be kept. Raises StorageError."""
        offset = number * CHUNK
        size = CHUNK if self.remote.size < 0 else max(0, min(CHUNK, self.remote.size - offset))
        return self.cache.fill(self.key, number, size, lambda file: self.remote.read_into(file, offset, size))

    def doubt(self, offset: int, size: int) -> None:
        """Bytes read from here were wrong: keep them no longer."""
        for number in self.chunks(offset, size):
            self.cache.forget(self.key, number)

    def close(self) -> None:
        self.remote.close()


class ApartFile:
    """An object, read by another process: this one may fork."""

    def __init__(self, url: str, options: StorageOptions, identity: Identity) -> None:
        self._where = url, options, identity

    def read(self, offset: int, size: int) -> bytes:
        return apart(_read_range, *self._where, offset, size)

    def close(self) -> None: ...


def open_shard(url: str, options: StorageOptions, identity: Identity = UNKNOWN) -> ShardFile:
    """The shard, open for reading; of a remote one nothing is asked yet. Raises OSError when no local file is there."""
    if is_local(url):
        return LocalFile(str(local_path(url)))
    return _open_remote(url, options, identity) if may_have_clients() else ApartFile(url, options, identity)


def _open_remote(url: str, options: StorageOptions, identity: Identity) -> ShardFile:
    remote = RemoteFile(url, options, identity.size, identity.tag)
    cache = cache_of(options)
    return CachedFile(remote, cache, identity.version) if cache is not None and identity.version else remote


@lru_cache(maxsize=8)
def cache_of(options: StorageOptions) -> ChunkCache | None:
    """The cache of this process; None when there is none."""
    if not options.cache or options.cache_bytes <= 0:
        return None
    cache = ChunkCache(options.cache, options.cache_bytes)
    return cache if cache.prepare() else None


def read_file(url: str, options: StorageOptions) -> bytes:
    """A whole small file, such as a manifest. Raises OSError (FileNotFoundError when it is not there), DataError."""
    if is_local(url):
        return local_path(url).read_bytes()
    return apart(_read_whole, url, options)


def _read_whole(url: str, options: StorageOptions) -> bytes:
    return RemoteFile(url, options).read_all()


def _read_range(url: str, options: StorageOptions, identity: Identity, offset: int, size: int) -> bytes:
    return _kept_open(url, options, identity).read(offset, size)


@lru_cache(maxsize=64)
def _kept_open(url: str, options: StorageOptions, identity: Identity) -> ShardFile:
    return _open_remote(url, options, identity)
