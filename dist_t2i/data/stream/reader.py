"""The first stage of the stream: raw samples in the order of a plan; unusable ones are replaced.

If editing is trained, each sample carries the sample whose image is its source (edit_pairs.py selects it).
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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
"""Positions whose shards and rows are computed at once."""
_READERS, _READ_AHEAD = 16, 48
"""Threads that read remote samples, and samples that may wait to be decoded."""
_MAX_TRIES = 1_000


class SampleReader:
    """The first stage: raw samples of every `step`-th micro-batch of a plan, from micro-batch `first` on.

    A sample has `__key__`, `__url__`, extension -> bytes, `__position__` in the stream, `__row__` (shard, row) and `__id__`,
    its number in the split; with a `choice` also `__source__`, the raw sample of its source (None without one); and, if it
    replaces an unusable sample, `__bad__`, the error of that sample.

    Threads read remote samples ahead, but the samples come in the order of the plan.
    """

    def __init__(
        self,
        shards: Shards,
        order: Order | Mixture,
        plan: Plan,
        first: int = 0,
        step: int = 1,
        *,
        strict: bool = False,
        choice: SourceChoice | None = None,
    ) -> None:
        """`strict` raises the first error of a sample instead of replacing the sample."""
        self.shards, self.order, self.plan = shards, order, plan
        self.first, self.step = first, step
        self.strict, self.choice = strict, choice
        self._starts = numpy.cumsum([0, *shards.sizes])

    def __call__(self) -> Iterator[dict[str, Any]]:
        if not self.shards.remote:
            for location in self._locations():
                yield self._result(location, functools.partial(self._read, *location))
            return
        with concurrent.futures.ThreadPoolExecutor(_READERS, "read") as pool:
            waiting: deque[tuple[Location, concurrent.futures.Future]] = deque()
            for location in self._locations():
                waiting.append((location, pool.submit(self._read, *location)))
                if len(waiting) > _READ_AHEAD:
                    location, future = waiting.popleft()
                    yield self._result(location, future.result)

    def _locations(self) -> Iterator[Location]:
        """The location of each sample of the plan, endlessly."""
        # Locations are computed for several micro-batches at once, since the order is vectorized.
        sequence = self.first
        steps = max(1, _LOOK_AHEAD // self.plan.rows)
        start = self.plan.positions(sequence)[0]
        prefetcher = Prefetcher(self.shards, self.order, int(start), offset=self.first % self.step / self.step)
        while True:
            positions = numpy.concatenate([self.plan.positions(sequence + i * self.step) for i in range(steps)])
            prefetcher.advance(int(positions[0]))
            for position, shard, row in zip(positions, *self.order.at(positions), strict=True):
                yield int(position), int(shard), int(row)
            sequence += steps * self.step

    def _result(self, location: Location, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `read`, or the replacement if the sample cannot be read."""
        try:
            return read()
        except BadSample as error:
            position, shard, row = location
            return self.replacement({"__position__": position, "__row__": (shard, row)}, error)

    def replacement(self, bad: dict[str, Any], error: BadSample) -> dict[str, Any]:
        """The next readable sample after `bad` in its shard, then in the following shards; `__bad__` is the first error.

        Raises DataError if `strict`, and if too many samples in a row are unusable.
        """
        if self.strict:
            raise DataError(f"sample {error.key} of {error.shard}: {error.reason} (data.on_bad is strict)")
        number = int(self._starts[bad["__row__"][0]]) + bad["__row__"][1]
        tries = bad.get("__tries__", 0)
        while tries < min(self.order.samples - 1, _MAX_TRIES):
            tries += 1
            number = (number + 1) % self.order.samples
            try:
                sample = self._read(bad["__position__"], *self._row_of(number))
            except BadSample:
                continue
            return sample | {"__tries__": tries, "__bad__": bad.get("__bad__", error)}
        raise DataError(f"{tries + 1} samples in a row cannot be used; {error.key} of {error.shard}: {error.reason}")

    def _row_of(self, number: int) -> tuple[int, int]:
        """Shard and row of a sample by its number in the split."""
        shard = int(numpy.searchsorted(self._starts, number, side="right")) - 1
        return shard, number - int(self._starts[shard])

    def _read(self, position: int, shard: int, row: int) -> dict[str, Any]:
        sample = self._located(self.shards.read(shard, row), position, shard, row)
        return sample if self.choice is None else sample | {"__source__": self._source(sample, self.choice)}

    def _located(self, sample: dict[str, Any], position: int, shard: int, row: int) -> dict[str, Any]:
        return sample | {"__position__": position, "__row__": (shard, row), "__id__": int(self._starts[shard]) + row}

    def _source(self, sample: dict[str, Any], choice: SourceChoice) -> dict[str, Any] | None:
        """The source of a sample: another sample, the sample itself (also if the other one is unreadable), or None."""
        number = choice(sample["__id__"], sample["__position__"])
        if number in (NONE, sample["__id__"]):
            return None if number == NONE else sample
        shard, row = self._row_of(number)
        try:
            return self._located(self.shards.read(shard, row), sample["__position__"], shard, row)
        except BadSample:  # the stream counts it when it visits it
            return sample
