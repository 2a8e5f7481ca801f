"""The first stage of the stream: raw samples in the order of a plan, and what takes the place of those that are bad.

Where editing is trained, each sample carries the one whose picture it is an edit of (neighbours.py chooses which).
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy

from dist_t2i.data.shard_set import BadSample, Shards
from dist_t2i.data.stream.edit_pairs import NONE, SourceChoice
from dist_t2i.data.stream.mixture import Mixture
from dist_t2i.data.stream.order import Order, rows_of_rank
from dist_t2i.data.stream.prefetch import ReadAhead
from dist_t2i.errors import DataError

Stage = Callable[[Iterable[dict[str, Any]]], Iterator[dict[str, Any]]]
"""A webdataset stage: `wds.map(f)`, or any function from an iterable of samples to another."""
Place = tuple[int, int, int]
"""Position, shard, row."""
_LOOK_AHEAD = 512
_READERS, _READ_AHEAD = 16, 48
"""Threads that read remote samples, and samples that may wait to be decoded."""
_MAX_TRIES = 1_000


@dataclass(frozen=True)
class BadRecord:
    """A sample that was replaced, as a line of bad_samples.jsonl."""

    position: int
    shard: str
    key: str
    reason: str
    replaced_by: str


@dataclass(frozen=True)
class Plan:
    """Which micro-batches one rank needs, from the position `start` on."""

    rank: int
    world_size: int
    global_batch: int
    accumulation: int
    start: int

    @property
    def rows(self) -> int:
        """Samples per micro-batch."""
        return self.global_batch // (self.world_size * self.accumulation)

    def positions(self, sequence: int) -> numpy.ndarray:
        return rows_of_rank(
            self.start,
            sequence,
            rank=self.rank,
            world_size=self.world_size,
            global_batch=self.global_batch,
            accumulation=self.accumulation,
        )


class Source:
    """The first stage: raw samples in the order of the plan, from micro-batch `first` on, every `step`-th one.

    Remote samples are read ahead by threads; they come in the order of the plan all the same.
    """

    def __init__(self, shards: Shards, order: Order | Mixture, plan: Plan, first: int = 0, step: int = 1) -> None:
        self.shards, self.order, self.plan = shards, order, plan
        self.first, self.step = first, step
        self.strict = False
        self.choice: SourceChoice | None = None
        """Which picture each sample is an edit of."""
        self.bad: list[BadRecord] = []
        self._starts = numpy.cumsum([0, *shards.sizes])

    def __call__(self) -> Iterator[dict[str, Any]]:
        if not self.shards.remote:
            for place in self._places():
                yield self._got(place, functools.partial(self._read, *place))
            return
        with concurrent.futures.ThreadPoolExecutor(_READERS, "read") as pool:
            waiting: deque[tuple[Place, concurrent.futures.Future]] = deque()
            for place in self._places():
                waiting.append((place, pool.submit(self._read, *place)))
                if len(waiting) > _READ_AHEAD:
                    place, future = waiting.popleft()
                    yield self._got(place, future.result)

    def _places(self) -> Iterator[Place]:
        """Position, shard and row of each sample of the plan, endlessly."""
        sequence = self.first
        steps = max(1, _LOOK_AHEAD // self.plan.rows)
        start = self.plan.positions(sequence)[0]
        ahead = ReadAhead(self.shards, self.order, int(start), turn=self.first % self.step / self.step)
        while True:
            positions = numpy.concatenate([self.plan.positions(sequence + i * self.step) for i in range(steps)])
            ahead.reached(int(positions[0]))
            for position, shard, row in zip(positions, *self.order.at(positions), strict=True):
                yield int(position), int(shard), int(row)
            sequence += steps * self.step

    def _got(self, place: Place, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The sample there, or the one that replaces it."""
        try:
            return read()
        except BadSample as error:
            position, shard, row = place
            return self.replacement({"__position__": position, "__row__": (shard, row)}, error)

    def replacement(self, bad: dict[str, Any], error: BadSample) -> dict[str, Any]:
        """The next sample after `bad` that can be read, with the first cause as `__bad__`.

        Raises DataError under `strict`, and when too many in a row are bad.
        """
        if self.strict:
            raise DataError(f"sample {error.key} of {error.shard}: {error.reason} (data.on_bad is strict)")
        shard, row = bad["__row__"]
        tries = bad.get("__tries__", 0)
        while tries < min(self.order.samples - 1, _MAX_TRIES):
            tries += 1
            number = (int(self._starts[shard]) + row + 1) % self.order.samples
            shard = int(numpy.searchsorted(self._starts, number, side="right")) - 1
            row = number - int(self._starts[shard])
            try:
                sample = self._read(bad["__position__"], shard, row)
            except BadSample:
                continue
            return sample | {"__tries__": tries, "__bad__": bad.get("__bad__", error)}
        raise DataError(f"{tries + 1} samples in a row cannot be used; {error.key} of {error.shard}: {error.reason}")

    def _read(self, position: int, shard: int, row: int) -> dict[str, Any]:
        place = {"__position__": position, "__row__": (shard, row), "__id__": int(self._starts[shard]) + row}
        sample = self.shards.read(shard, row) | place
        return sample if self.choice is None else sample | {"__source__": self._source(sample, self.choice)}

    def _source(self, sample: dict[str, Any], choice: SourceChoice) -> dict[str, Any] | None:
        """The sample whose picture this one is an edit of: perhaps itself (also where another cannot be read), or None."""
        number = choice(sample["__id__"], sample["__position__"])
        if number in (NONE, sample["__id__"]):
            return None if number == NONE else sample
        shard = int(numpy.searchsorted(self._starts, number, side="right")) - 1
        row = number - int(self._starts[shard])
        try:
            other = self.shards.read(shard, row)
        except BadSample:  # counted where it is a sample of its own
            return sample
        return other | {"__position__": sample["__position__"], "__row__": (shard, row), "__id__": number}
