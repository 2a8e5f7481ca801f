"""Reading an object through whatever happens on the way: again and again, from the last good byte on.

A read that fails is tried again after a growing, jittered pause (exponential backoff with full jitter: Brooker 2015,
"Exponential Backoff And Jitter"), asks only for what is still missing, and names the version of the object it began
with (If-Match). It gives up when `retry_seconds` have passed with nothing gained, or at once where trying is no use.
"""

from __future__ import annotations

import io
import random
import sys
import threading
import time
from typing import BinaryIO

from dist_t2i.storage.clients import (
    BLOCK,
    LARGE_BLOCK,
    Changed,
    Client,
    Gone,
    Short,
    StorageError,
    StorageOptions,
    client_of,
)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
GONE_SECONDS = 3.0
"""How long something that is not there, or denied, is tried again: a listing may lag behind, a token be renewed."""
SLOWEST = 2**14
"""Bytes a second. A read that is slower than this, all pauses included, counts as failed in the end."""
_TELL_AFTER = 5.0


class Patience:
    """The pauses of one read."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name, self._seconds = name, seconds
        self._begun = time.monotonic()
        self._pause = FIRST_PAUSE
        self._earned = 0.0
        self._told = False

    def gained(self, size: int) -> None:
        """Bytes came: the next pause is short again, and there is more time."""
        if size:
            self._pause = FIRST_PAUSE
            self._earned += size / SLOWEST

    def wait(self, error: StorageError) -> None:
        """Pause before the next attempt. Raises `error` when there is no more time."""
        limit = GONE_SECONDS if isinstance(error, Gone) else self._seconds
        limit = min(limit, self._seconds) + self._earned
        spent = time.monotonic() - self._begun
        pause = self._pause * random.uniform(0.5, 1.0)
        if spent + pause > limit:
            raise error
        if spent > _TELL_AFTER and not self._told:
            self._told = True
            print(
                f"warning: {self._name}: {error.reason}; trying again for {limit - spent:.0f} seconds", file=sys.stderr
            )
        time.sleep(pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


class RemoteFile:
    """An object, read by ranges; safe to share between threads. `size` is -1 while it is not known."""

    def __init__(self, url: str, options: StorageOptions, size: int = -1, tag: str = "") -> None:
        self.url, self.options, self.size = url, options, size
        self._tag, self._given = tag, bool(tag)
        self._client: Client | None = None
        self._patient = True
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """The bytes there, fewer at the end of the object. Raises StorageError, DataError."""
        held = io.BytesIO()
        self._read(held, offset, offset + size)
        return held.getvalue()

    def read_into(self, file: BinaryIO, offset: int, size: int) -> None:
        """As `read`, into an empty file, as the bytes come. Raises what the file raises as well."""
        self._read(file, offset, offset + size)

    def read_all(self) -> bytes:
        """The whole object. Raises StorageError, DataError."""
        held = io.BytesIO()
        self._read(held, 0, None)
        return held.getvalue()

    @property
    def tag(self) -> str:
        """The store's name of the version that is read; "" before the first answer, or when there is none."""
        return self._tag

    def close(self) -> None:
        """Connections belong to the process, not to the file."""

    def _read(self, held: BinaryIO, start: int, stop: int | None) -> None:
        if stop is not None and self.size >= 0:
            stop = min(stop, self.size)
            if start >= stop:
                return
        # After a read that failed for good, others try once: they would all wait for nothing.
        patience = Patience(self.url, self.options.retry_seconds if self._patient else 0.0)
        block = LARGE_BLOCK
        while True:
            before = held.tell()
            try:
                stop = self._once(held, start, stop, block)
                if stop is None or start + held.tell() >= stop:
                    self._patient = True
                    return
                raise StorageError("the connection closed early")
            except Short:
                with self._lock:
                    self.size = start + held.tell()  # no byte is there, or beyond; where it ends does not matter
                return
            except Changed:
                self._forget(held)
            except StorageError as error:
                block = BLOCK  # where connections break, every byte that came counts
                patience.gained(held.tell() - before)
                try:
                    patience.wait(error)
                except StorageError:
                    self._patient = False
                    raise

    def _once(self, held: BinaryIO, start: int, stop: int | None, block: int) -> int | None:
        """One request for what is missing, added to `held`. Returns where the bytes end, once that is known."""
        answer = self._get().fetch(start + held.tell(), stop, self._tag, block)
        with self._lock:
            self._tag = self._tag or answer.tag
            self.size = answer.size if answer.size >= 0 else self.size
        if answer.size >= 0:
            stop = answer.size if stop is None else min(stop, answer.size)
        for data in answer.bytes:
            held.write(data)
        if stop is not None and start + held.tell() > stop:
            _cut(held, stop - start)
        return stop

    def _forget(self, held: BinaryIO) -> None:
        """The object was replaced: begin anew with the one that is there now, whose checksums will tell if it is fit.

        Raises Changed when the version was given, by a manifest: the index beside it is of that one.
        """
        with self._lock:
            if self._given:
                raise Changed("the object was replaced since it was indexed")
            self._tag, self.size = "", -1
        _cut(held, 0)

    def _get(self) -> Client:
        with self._lock:
            if self._client is None:
                self._client = client_of(self.url, self.options)
            return self._client


def _cut(held: BinaryIO, size: int) -> None:
    held.seek(size)
    held.truncate()
