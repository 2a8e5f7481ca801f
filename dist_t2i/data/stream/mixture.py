"""Several lists of shards, drawn with given shares: an order made of orders.

Positions come in cycles of `CYCLE`. Each list has a fixed number of slots in a cycle, shuffled anew in each; the n-th
slot of a list takes the n-th sample of that list's own order. So shares are exact over a cycle, every list runs
through its own epochs without loss or repetition, and any position is computed at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy

from dist_t2i.data.stream.order import Order, Run, draw, permute

CYCLE = 4096
_MIX = 0x4D495854


def slots(weights: Sequence[float], cycle: int = CYCLE) -> list[int]:
    """Whole numbers with the sum `cycle`, at least 1 each, nearest to the weights (largest remainders)."""
    total = sum(weights)
    shares = [max(1.0, weight / total * cycle) for weight in weights]
    found = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: found[i] - shares[i])
    for i in range(cycle - sum(found)):
        found[by_remainder[i % len(found)]] += 1
    while sum(found) > cycle:
        found[max(range(len(found)), key=found.__getitem__)] -= 1
    return found


class Mixture:
    """`parts` with relative `weights`; the shards of part i count on after those of the parts before it."""

    def __init__(self, parts: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        self.parts, self.seed = list(parts), seed
        self.samples = sum(part.samples for part in parts)
        self._slots = numpy.array(slots(weights), dtype=numpy.int64)
        self._ends = numpy.cumsum(self._slots)
        self._first = numpy.cumsum([0, *(len(part.sizes) for part in parts)])

    def at(self, positions: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Shard and row of each position (int64 arrays of the same shape)."""
        positions = numpy.asarray(positions, dtype=numpy.int64)
        shards, rows = numpy.empty_like(positions), numpy.empty_like(positions)
        cycles = positions // CYCLE
        for cycle in numpy.unique(cycles):
            chosen = numpy.flatnonzero(cycles == cycle)
            part, count = self._cycle(int(cycle))
            place = positions[chosen] % CYCLE
            for number, order in enumerate(self.parts):
                of_part = part[place] == number
                here = chosen[of_part]
                if len(here):
                    shard, rows[here] = order.at(int(cycle) * self._slots[number] + count[place[of_part]])
                    shards[here] = shard + self._first[number]
        return shards, rows

    def windows(self, position: int) -> Iterator[tuple[int, list[Run]]]:
        """As `Order.windows`: all lists' windows that are open at `position`, then each when it begins."""
        return heapq.merge(*(self._windows(number, position) for number in range(len(self.parts))), key=lambda w: w[0])

    def _windows(self, number: int, position: int) -> Iterator[tuple[int, list[Run]]]:
        cycle, place = divmod(position, CYCLE)
        part, _ = self._cycle(cycle)
        taken = cycle * int(self._slots[number]) + int((part[:place] == number).sum())
        for begin, runs in self.parts[number].windows(taken):
            moved = [Run(run.shard + int(self._first[number]), run.start, run.stop) for run in runs]
            yield self._position(number, begin), moved

    def _position(self, number: int, count: int) -> int:
        """The position of a list's `count`-th sample."""
        cycle, place = divmod(count, int(self._slots[number]))
        part, _ = self._cycle(cycle)
        return cycle * CYCLE + int(numpy.flatnonzero(part == number)[place])

    def _cycle(self, cycle: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """For each slot of a cycle: its list, and how many slots of the same list come before it."""
        drawn = permute(numpy.arange(CYCLE), CYCLE, draw(self.seed, cycle, _MIX))
        part = numpy.searchsorted(self._ends, drawn, side="right")
        count = numpy.empty(CYCLE, dtype=numpy.int64)
        for number in range(len(self.parts)):
            mine = part == number
            count[mine] = numpy.arange(int(mine.sum()))
        return part, count
