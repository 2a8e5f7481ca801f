"""Being ahead of the reader: the chunks of this and the next window are fetched into the disk cache by threads.

All loader workers of a machine read the same windows, each a part of the samples. They share the work: every chunk is
fetched by one of them, whoever comes first, and read by all.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterator
from itertools import zip_longest
from typing import Protocol

from dist_t2i.data.shard_set import Shards
from dist_t2i.data.stream.order import Run
from dist_t2i.errors import DataError
from dist_t2i.storage.chunk_cache import CHUNK, ChunkCache
from dist_t2i.storage.reader_process import clients_allowed
from dist_t2i.storage.shard_file import CachedFile, cache_of

_THREADS = 4
_SHARE = 0.4
"""Share of the cache that one window may take, so that the next one does not push it out."""


class Windows(Protocol):
    """An order that says what it reads next; see `Order.windows`."""

    def windows(self, position: int) -> Iterator[tuple[int, list[Run]]]: ...


class ReadAhead:
    """Fetches in the background, from `position` on; `reached` tells where the reader is. Does nothing without a cache."""

    def __init__(self, shards: Shards, order: Windows, position: int, turn: float = 0.0) -> None:
        """turn: 0 to 1, where in a window this worker begins, so that workers do not all want the same chunk."""
        self._shards, self._order, self._turn = shards, order, turn
        self._position = position
        self._moved = threading.Condition()
        cache = cache_of(shards.options) if shards.remote and clients_allowed() else None
        if cache is not None and cache.works:
            self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "fetch")
            threading.Thread(target=self._until_the_end, args=(cache,), name="read ahead", daemon=True).start()

    def reached(self, position: int) -> None:
        """The reader is at this position."""
        with self._moved:
            self._position = position
            self._moved.notify()

    def _until_the_end(self, cache: ChunkCache) -> None:
        with contextlib.suppress(RuntimeError):  # the process ends, and its pool takes no more work
            self._run(cache)

    def _run(self, cache: ChunkCache) -> None:
        previous = -1
        for begin, runs in self._order.windows(self._position):
            with self._moved:
                # A window is fetched while the reader is in the one before it.
                while self._position < previous:
                    self._moved.wait()
            if not cache.works:
                return
            self._fetch(runs, int(cache.limit * _SHARE) // CHUNK)
            previous = begin

    def _fetch(self, runs: list[Run], room: int) -> None:
        wanted = self._chunks(runs)[:room]
        first = int(self._turn * len(wanted))
        for _ in self._pool.map(self._fill, wanted[first:] + wanted[:first]):
            pass

    def _chunks(self, runs: list[Run]) -> list[tuple[CachedFile, int]]:
        """The chunks in which the runs lie, taking turns between the shards as the shuffled reader will."""
        columns = []
        for opened in self._pool.map(self._opened, runs):
            if opened is not None:
                file, span = opened
                columns.append([(file, number) for number in span])
        return [chunk for row in zip_longest(*columns) for chunk in row if chunk is not None]

    def _opened(self, run: Run) -> tuple[CachedFile, range] | None:
        with contextlib.suppress(OSError, DataError):  # whoever reads a sample there meets the same error and tells it
            file, index = self._shards.open(run.shard)
            if isinstance(file, CachedFile):
                first, last = index.members(run.start), index.members(run.stop - 1)
                start, stop = first[0].offset, last[-1].offset + last[-1].size
                return file, file.chunks(start, stop - start)
        return None

    @staticmethod
    def _fill(chunk: tuple[CachedFile, int]) -> None:
        file, number = chunk
        with contextlib.suppress(OSError, DataError):
            file.fill(number)
