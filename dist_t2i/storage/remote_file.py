"""Reads of a remote object that survive failed requests.

After a failed request a read pauses (retries.py), then asks only for the bytes that are still missing, of the version of
the object that it began with (If-Match). It fails when `retry_seconds` have passed without a byte, or sooner where a
retry cannot help.
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
"""Minimal bytes that a client yields at a time. A broken connection loses less than one block; large blocks cost less."""
PAUSES = 0.1, 10.0
"""Seconds of the first and of the longest pause before a failed request is repeated."""
GONE_SECONDS = 3.0
"""Seconds for which a missing or forbidden object is retried: a store may lag behind, credentials may be renewed."""
SLOWEST = 2**14
"""Bytes per second. A read that stays slower than this, pauses included, fails in the end."""
_WARN_AFTER = 5.0
"""Seconds after which a retried read is reported."""


class Backoff:
    """The pauses between the requests of one read, and its deadline."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name, self._seconds = name, seconds
        self._begun = time.monotonic()
        self._pauses = pauses(*PAUSES)
        self._extension = 0.0
        self._warned = False

    def progressed(self, size: int) -> None:
        """A request that failed has brought `size` bytes: the deadline moves back and the pauses are short again."""
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
    """An object that is read by ranges. Threads may share it. `size` is -1 until it is known."""

    def __init__(self, url: str, options: StorageOptions, size: int = -1, tag: str = "") -> None:
        self.url, self.options, self.size = url, options, size
        self.tag, self._pinned = tag, bool(tag)
        """The ETag of the version that is read; "" before the first answer, and from stores without ETags."""
        self._retries = True
        self._lock = threading.Lock()

    def read(self, offset: int, size: int | None) -> bytes:
        """`size` bytes from `offset` on, fewer at the end of the object; None reads to it. Raises StorageError, DataError."""
        out = io.BytesIO()
        self.read_into(out, offset, None if size is None else offset + size)
        return out.getvalue()

    def read_into(self, out: BinaryIO, start: int, stop: int | None) -> None:
        """As `read`, but writes the bytes [start, stop) to an empty file as they arrive. Also raises that file's errors."""
        if stop is not None and self.size >= 0:
            stop = min(stop, self.size)
            if start >= stop:
                return
        # After a read has failed for good, later reads send one request each: retries would delay every sample for nothing.
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
                    self.size = start + out.tell()  # no byte lies there or beyond; the exact end does not matter
                return
            except Changed:
                self._restart(out)
            except StorageError as error:
                block = BLOCK  # a broken connection loses less than one block, so small blocks lose less
                backoff.progressed(out.tell() - before)
                try:
                    backoff.wait(error)
                except StorageError:
                    self._retries = False
                    raise

    def _request(self, out: BinaryIO, start: int, stop: int | None, block: int) -> int | None:
        """Appends the missing bytes to `out` with one request. Returns where the range ends, None if that is unknown."""
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
        """Begins again with the new version of an object that was replaced; the checksums of its samples decide whether it
        is usable. Raises Changed if a manifest fixes the version, since the index describes that version."""
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
