"""One order that combines the orders of several lists of shards in fixed shares.

Positions are divided into cycles of `CYCLE` slots. Each list owns a fixed number of slots per cycle, and every cycle is
shuffled anew. Over all cycles, the n-th slot of a list takes the n-th sample in that list's own order. The shares are
therefore exact in every cycle, and each list has epochs without loss or repetition. Reading can start at any position
without reading earlier samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy

from dist_t2i.data.stream.order import Order, Run, permute
from dist_t2i.utils.seeds import StreamPurpose, random_bits

CYCLE = 4096


def slots(weights: Sequence[float], cycle: int = CYCLE) -> list[int]:
    """The number of slots of each list in a cycle of `cycle` slots: at least 1, and in proportion to the weights. The
    numbers are rounded by the largest remainder method."""
    total = sum(weights)
    shares = [max(1.0, weight / total * cycle) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in range(cycle - sum(counts)):
        counts[by_remainder[i % len(counts)]] += 1
    while sum(counts) > cycle:
        counts[max(range(len(counts)), key=counts.__getitem__)] -= 1
    return counts


class Mixture:
    """Combines the orders `parts` with relative `weights`. The numbering of shards begins with all shards of part 0 and
    continues with all shards of part 1, and so on."""

    def __init__(self, parts: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        self.parts, self.seed = list(parts), seed
        self.samples = sum(part.samples for part in parts)
        self._slots = numpy.array(slots(weights), dtype=numpy.int64)
        self._ends = numpy.cumsum(self._slots)
        self._first = numpy.cumsum([0, *(len(part.sizes) for part in parts)])

    def at(self, positions: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The shard and the row of each position: int64 arrays with the shape of `positions`."""
        positions = numpy.asarray(positions, dtype=numpy.int64)
        shards, rows = numpy.empty_like(positions), numpy.empty_like(positions)
        cycles = positions // CYCLE
        for cycle in numpy.unique(cycles):
            in_cycle = numpy.flatnonzero(cycles == cycle)
            part, count = self._cycle(int(cycle))
            slot = positions[in_cycle] % CYCLE
            for number, order in enumerate(self.parts):
                of_part = part[slot] == number
                index = in_cycle[of_part]
                if len(index):
                    shard, rows[index] = order.at(int(cycle) * self._slots[number] + count[slot[of_part]])
                    shards[index] = shard + self._first[number]
        return shards, rows

    def windows(self, position: int) -> Iterator[tuple[int, list[Run]]]:
        """Endlessly yields windows (position, runs) of all parts like `Order.windows`, ordered by position. Each part
        begins with the window that contains `position`."""
        return heapq.merge(*(self._windows(number, position) for number in range(len(self.parts))), key=lambda w: w[0])

    def _windows(self, number: int, position: int) -> Iterator[tuple[int, list[Run]]]:
        cycle, slot = divmod(position, CYCLE)
        part, _ = self._cycle(cycle)
        taken = cycle * int(self._slots[number]) + int((part[:slot] == number).sum())
        first = int(self._first[number])
        for begin, runs in self.parts[number].windows(taken):
            cycle, row = divmod(begin, int(self._slots[number]))
            slot = int(numpy.flatnonzero(self._cycle(cycle)[0] == number)[row])
            yield cycle * CYCLE + slot, [run._replace(shard=run.shard + first) for run in runs]

    def _cycle(self, cycle: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Two arrays over the slots of a cycle, int64 [CYCLE]: the part that owns the slot, and the number of earlier
        slots of the same part."""
        shuffled = permute(numpy.arange(CYCLE), CYCLE, random_bits(self.seed, cycle, StreamPurpose.MIXTURE))
        part = numpy.searchsorted(self._ends, shuffled, side="right")
        count = numpy.empty(CYCLE, dtype=numpy.int64)
        for number in range(len(self.parts)):
            of_part = part == number
            count[of_part] = numpy.arange(int(of_part.sum()))
        return part, count
