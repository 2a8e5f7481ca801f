"""Reads remote objects, and repeats requests that fail.

After a failed request, a read pauses (retries.py) and then requests only the bytes that are still missing. An If-Match
header ensures that all bytes come from the same version of the object. A read fails when `retry_seconds` have passed
without a byte, or sooner if a retry cannot help.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from functools import cached_property
from typing import BinaryIO

from dist_t2i.storage.clients import Changed, Client, Gone, Short, StorageError, StorageOptions, client_of
from dist_t2i.storage.retries import pauses

BLOCK, LARGE_BLOCK = 2**16, 2**20
"""The minimal numbers of bytes that a client yields at a time. A broken connection loses up to one block, so small
blocks lose less; large blocks take less processor time."""
PAUSES = 0.1, 10.0
"""The first and the longest pause before a failed request is repeated, in seconds."""
GONE_SECONDS = 3.0
"""The seconds for which a missing or forbidden object is retried. During this time, a slow store may list a new object,
and renewed credentials may grant access."""
SLOWEST = 2**14
"""The minimal rate of a read in bytes per second, pauses included. A slower read fails in the end."""
_WARN_AFTER = 5.0
"""A read that is still being retried after this many seconds prints a warning."""


class Backoff:
    """The pauses between the requests of one read, and the deadline of this read."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name, self._seconds = name, seconds
        self._begun = time.monotonic()
        self._pauses = pauses(*PAUSES)
        self._extension = 0.0
        self._warned = False

    def progressed(self, size: int) -> None:
        """Records `size` bytes from a failed request. Extends the deadline and makes the pauses short again."""
        if size:
            self._pauses = pauses(*PAUSES)
            self._extension += size / SLOWEST

    def wait(self, error: StorageError) -> None:
        """Pauses before the next request. Raises `error` if the pause would end after the deadline."""
        limit = min(GONE_SECONDS, self._seconds) if isinstance(error, Gone) else self._seconds
        limit += self._extension
        spent, pause = time.monotonic() - self._begun, next(self._pauses)
        if spent + pause > limit:
            raise error
        if spent > _WARN_AFTER and not self._warned:
            self._warned = True
            print(f"warning: {self._name}: {error.reason}; retrying for {limit - spent:.0f} seconds", file=sys.stderr)
        time.sleep(pause)


class RemoteFile:
    """An object that is read in ranges of bytes. Threads may share an instance. `size` is -1 while unknown."""

    def __init__(self, url: str, options: StorageOptions, size: int = -1, tag: str = "") -> None:
        self.url, self.options, self.size = url, options, size
        self.tag, self._pinned = tag, bool(tag)
        """The ETag of the version that is read; "" before the first response, or if the store has no ETags."""
        self._retries = True
        self._lock = threading.Lock()

    def read(self, offset: int, size: int | None) -> bytes:
        """`size` bytes beginning at `offset`, fewer if the object ends earlier. If `size` is None, reads to the end of
        the object. Raises DataError if the object cannot be opened, and StorageError if the object cannot be read."""
        out = io.BytesIO()
        self.read_into(out, offset, None if size is None else offset + size)
        return out.getvalue()

    def read_into(self, out: BinaryIO, start: int, stop: int | None) -> None:
        """Writes the bytes [start, stop) to the empty file `out` as they arrive. Raises the errors of `read` and of
        writing to `out`."""
        if stop is not None and self.size >= 0:
            stop = min(stop, self.size)
            if start >= stop:
                return
        # After a read has failed despite its retries, the store is probably down. Each later read then sends a single
        # request, because retries would delay every sample for nothing.
        backoff = Backoff(self.url, self.options.retry_seconds if self._retries else 0.0)
        block = LARGE_BLOCK
        while True:
            before = out.tell()
            try:
                stop = self._request(out, start, stop, block)
                if stop is None or start + out.tell() >= stop:
                    self._retries = True
                    return
                raise StorageError("the connection closed early")
            except Short:
                with self._lock:
                    self.size = start + out.tell()  # the object ends here or earlier; the exact size does not matter
                return
            except Changed:
                self._restart(out)
            except StorageError as error:
                block = BLOCK  # small blocks lose less if the connection breaks again
                backoff.progressed(out.tell() - before)
                try:
                    backoff.wait(error)
                except StorageError:
                    self._retries = False
                    raise

    def _request(self, out: BinaryIO, start: int, stop: int | None, block: int) -> int | None:
        """Appends the missing bytes to `out` with one request. Returns the end of the range, or None if unknown."""
        answer = self._client.fetch(start + out.tell(), stop, self.tag, block)
        with self._lock:
            self.tag = self.tag or answer.tag
            self.size = answer.size if answer.size >= 0 else self.size
        if answer.size >= 0:
            stop = answer.size if stop is None else min(stop, answer.size)
        for data in answer.bytes:
            out.write(data)
        if stop is not None and start + out.tell() > stop:
            _truncate(out, stop - start)
        return stop

    def _restart(self, out: BinaryIO) -> None:
        """Restarts the read of a replaced object. The checksums in the index show whether the samples of the new
        version are usable. If the manifest states a version, raises Changed, because the index describes only the
        stated version."""
        with self._lock:
            if self._pinned:
                raise Changed("the object was replaced since it was indexed")
            self.tag, self.size = "", -1
        _truncate(out, 0)

    @cached_property
    def _client(self) -> Client:
        return client_of(self.url, self.options)


def _truncate(out: BinaryIO, size: int) -> None:
    out.seek(size)
    out.truncate()
