"""Prefetches the chunks of the current and the next window into the disk cache.

All loader workers of a machine read the same windows, each worker a part of the samples. The workers share the
downloads: the first worker that needs a chunk fetches the chunk into the cache, from which all workers read.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import threading
from itertools import zip_longest

from dist_t2i.data.shard_set import Shards
from dist_t2i.data.stream.mixture import Mixture
from dist_t2i.data.stream.order import Order, Run
from dist_t2i.errors import DataError
from dist_t2i.storage.chunk_cache import CHUNK, ChunkCache
from dist_t2i.storage.reader_process import clients_allowed
from dist_t2i.storage.shard_file import CachedFile, cache_of

_THREADS = 4
_SHARE = 0.4
"""The largest share of the cache that one window may fill. Two windows must fit into the cache together."""


class Prefetcher:
    """Prefetches in background threads; does nothing without a cache. The reader reports its progress to `advance`."""

    def __init__(self, shards: Shards, order: Order | Mixture, position: int, offset: float = 0.0) -> None:
        """`offset` (0 to 1): this worker's starting point in a window's list of chunks. Different starts make workers
        fetch different chunks."""
        self._shards, self._order, self._position, self._offset = shards, order, position, offset
        self._moved = threading.Condition()
        cache = cache_of(shards.options) if shards.remote and clients_allowed() else None
        if cache is not None and cache.works:
            # Copy the order, because an order caches the layout of one epoch, and the reader may be in another epoch.
            self._order = copy.deepcopy(order)
            self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "fetch")
            threading.Thread(target=self._run, args=(cache,), name="prefetch", daemon=True).start()

    def advance(self, position: int) -> None:
        """Reports that the reader has reached `position`."""
        with self._moved:
            self._position = position
            self._moved.notify()

    def _run(self, cache: ChunkCache) -> None:
        previous = -1
        with contextlib.suppress(RuntimeError):  # when the process ends, the thread pool refuses more work
            for begin, runs in self._order.windows(self._position):
                # Step 1: wait until the reader has entered the preceding window.
                with self._moved:
                    while self._position < previous:
                        self._moved.wait()
                if not cache.works:
                    return
                # Step 2: list the window's chunks: the first chunk of every shard, then the second chunk of every
                # shard, ... A shuffled window needs its chunks in about this order.
                rows = zip_longest(*self._pool.map(self._chunks, runs))
                chunks = [chunk for row in rows for chunk in row if chunk][: int(cache.limit * _SHARE) // CHUNK]
                # Step 3: fetch the chunks, beginning at this worker's offset.
                first = int(self._offset * len(chunks))
                list(self._pool.map(_fill, chunks[first:] + chunks[:first]))
                previous = begin

    def _chunks(self, run: Run) -> list[tuple[CachedFile, int]]:
        with contextlib.suppress(OSError, DataError):  # the sample reader will report the same error
            file, index = self._shards.open(run.shard)
            if isinstance(file, CachedFile):
                first, last = index.members(run.start), index.members(run.stop - 1)
                start, stop = first[0].offset, last[-1].offset + last[-1].size
                return [(file, number) for number in file.chunks(start, stop - start)]
        return []


def _fill(chunk: tuple[CachedFile, int]) -> None:
    with contextlib.suppress(OSError, DataError):
        chunk[0].fill(chunk[1])
