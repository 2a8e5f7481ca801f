"""The first stage of the stream: reads raw samples in the order of a plan and replaces unusable samples."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy

from dist_t2i.data.shard_set import BadSample, Shards
from dist_t2i.data.stream.edit_pairs import NONE, SourceChoice
from dist_t2i.data.stream.mixture import Mixture
from dist_t2i.data.stream.order import Order, Plan
from dist_t2i.data.stream.prefetch import Prefetcher
from dist_t2i.errors import DataError

Stage = Callable[[Iterable[dict[str, Any]]], Iterator[dict[str, Any]]]
"""A webdataset stage: `wds.map(f)`, or any function from an iterable of samples to an iterator over samples."""
Location = tuple[int, int, int]
"""Position, shard, row."""
_LOOK_AHEAD = 512
"""The number of positions for which shards and rows are computed in one call."""
_READERS, _READ_AHEAD = 16, 48
"""The number of threads that read remote samples, and the number of read samples that may wait to be decoded."""
_MAX_TRIES = 1_000


@dataclass(frozen=True, eq=False)
class SampleReader:
    """The first stage: the raw samples of every `step`-th micro-batch of a plan, beginning with micro-batch `first`.

    A sample is a dict with `__key__`, `__url__`, the bytes of each file under its extension, `__position__` in the
    stream, `__row__` (shard, row) and `__id__` (its number in the split). With a `choice`, `__source__` is the source
    as a raw sample, or None. In a replacement, `__bad__` is the error of the unusable sample.

    Threads read remote samples ahead of time, but samples are yielded in the order of the plan.
    """

    shards: Shards
    order: Order | Mixture
    plan: Plan
    first: int = 0
    step: int = 1
    strict: bool = False
    """If True, the first unusable sample raises DataError instead of being replaced."""
    choice: SourceChoice | None = None

    def __call__(self) -> Iterator[dict[str, Any]]:
        waiting: deque[tuple[Location, Callable[[], dict[str, Any]]]] = deque()
        ahead = _READ_AHEAD if self.shards.remote else 0
        with concurrent.futures.ThreadPoolExecutor(
            _READERS, "read"
        ) as pool:  # has no threads before the first `submit`
            for location in self._locations():
                read = functools.partial(self._read, *location)
                waiting.append((location, pool.submit(read).result if self.shards.remote else read))
                if len(waiting) > ahead:
                    (position, shard, row), result = waiting.popleft()
                    try:
                        sample = result()
                    except BadSample as error:
                        sample = self.replacement({"__position__": position, "__row__": (shard, row)}, error)
                    yield sample

    def _locations(self) -> Iterator[Location]:
        """Endlessly yields the location of each sample of the plan."""
        # One call computes the locations of several micro-batches: the order is vectorized, so large calls are faster.
        span = max(1, _LOOK_AHEAD // self.plan.rows) * self.step
        start = int(self.plan.positions(self.first)[0])
        prefetcher = Prefetcher(self.shards, self.order, start, offset=self.first % self.step / self.step)
        for first in itertools.count(self.first, span):
            positions = numpy.concatenate([self.plan.positions(i) for i in range(first, first + span, self.step)])
            prefetcher.advance(int(positions[0]))
            yield from zip(*(numbers.tolist() for numbers in (positions, *self.order.at(positions))), strict=True)

    def replacement(self, bad: dict[str, Any], error: BadSample) -> dict[str, Any]:
        """The next readable sample after `bad`, in the same or a following shard. The replacement's `__bad__` is the
        error of the first unusable sample. Raises DataError if `strict` is set, or after too many tries."""
        if self.strict:
            raise DataError(f"sample {error.key} of {error.shard}: {error.reason} (data.on_bad is strict)")
        shard, row = bad["__row__"]
        number, tries = int(self.shards.starts[shard]) + row, bad.get("__tries__", 0)
        while tries < min(self.order.samples - 1, _MAX_TRIES):
            tries += 1
            number = (number + 1) % self.order.samples
            with contextlib.suppress(BadSample):
                sample = self._read(bad["__position__"], *self.shards.locate(number))
                return sample | {"__tries__": tries, "__bad__": bad.get("__bad__", error)}
        raise DataError(f"{tries + 1} samples in a row cannot be used; {error.key} of {error.shard}: {error.reason}")

    def _read(self, position: int, shard: int, row: int) -> dict[str, Any]:
        sample = self._located(position, shard, row)
        return sample if self.choice is None else sample | {"__source__": self._source(sample, self.choice)}

    def _located(self, position: int, shard: int, row: int) -> dict[str, Any]:
        places = {"__position__": position, "__row__": (shard, row), "__id__": int(self.shards.starts[shard]) + row}
        return self.shards.read(shard, row) | places

    def _source(self, sample: dict[str, Any], choice: SourceChoice) -> dict[str, Any] | None:
        """The source of a sample, or None. The sample itself replaces an unreadable source."""
        number = choice(sample["__id__"], sample["__position__"])
        if number == NONE:
            return None
        with contextlib.suppress(BadSample):  # not reported here, because the stream counts bad samples
            if number != sample["__id__"]:
                return self._located(sample["__position__"], *self.shards.locate(number))
        return sample
