"""The order of the samples: a pure function (seed, position) -> (shard, row), without a list of samples.

A *position* counts samples from the start of training (0, 1, 2, ...) over all ranks; `position // samples` is its
epoch. In each epoch the shards are permuted and dealt into groups of about `spread`. A group is read in windows of
about `window` samples: each window takes the next run of rows of every shard of the group, and is shuffled in itself.
So every sample comes exactly once an epoch, whatever the world size; every shard is read from front to back, in long
runs; neighbours come from `spread` shards; and a reader that starts anywhere computes where it is at once.

What a reader holds at a time is one window (and the next, to be ahead): `window` times the mean bytes of a sample.

The permutations are Feistel networks (Luby & Rackoff 1988) over the next power of two, walked until the result lies
inside (Black & Rogaway 2002): no memory, and the same for every version of every library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_KEPT_GROUPS = 64


def _mix(value: numpy.ndarray) -> numpy.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014) on uint64 arrays: every bit depends on every other."""
    value = (value ^ (value >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return value ^ (value >> numpy.uint64(31))


def draw(seed: int, position: int, purpose: int) -> int:
    """64 random bits for one position: the same ones for the same arguments, on every rank and machine."""
    value = seed & _MASK
    for part in (purpose, position):
        value = (value * 31 + part + 1) * _GOLDEN & _MASK
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
        value ^= value >> 31
    return value


def permute(index: numpy.ndarray, size: int, key: int) -> numpy.ndarray:
    """Where the permutation of range(`size`) that `key` (64 bits) chooses sends `index` (int64, 0 <= index < size)."""
    bits = max(2, (size - 1).bit_length())
    result = _feistel(numpy.asarray(index, dtype=numpy.uint64), bits, key)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], bits, key)
    return result.astype(numpy.int64)


def _feistel(value: numpy.ndarray, bits: int, key: int) -> numpy.ndarray:
    """A permutation of range(2**bits), elementwise; the halves may differ by a bit, and change places every round."""
    low_bits, high_bits = bits // 2, bits - bits // 2
    for step in range(_ROUNDS):
        round_key = numpy.uint64((key + (step + 1) * _GOLDEN) & _MASK)
        low = value & numpy.uint64(2**low_bits - 1)
        high = (value >> numpy.uint64(low_bits)) ^ _mix(_mix(low + round_key))
        value = (low << numpy.uint64(high_bits)) | (high & numpy.uint64(2**high_bits - 1))
        low_bits, high_bits = high_bits, low_bits
    return value


class Run(NamedTuple):
    """Consecutive rows of one shard."""

    shard: int
    start: int
    stop: int


class _Group:
    """The shards of a group, and how its windows cut them."""

    def __init__(self, shards: numpy.ndarray, sizes: numpy.ndarray, window: int) -> None:
        self.shards = shards
        windows = max(1, round(int(sizes.sum()) / window))
        # cuts[j, k]: the first row of the k-th shard in window j. Divisions in Python's whole numbers cannot overflow.
        cuts = [[size * j // windows for size in sizes.tolist()] for j in range(windows + 1)]
        self.cuts = numpy.array(cuts, dtype=numpy.int64)
        self.starts = self.cuts.sum(axis=1)
        """Offset of each window in the group, and at last the group's samples."""


class Order:
    """The order over shards of `sizes` samples each. Holds one number a shard, one permutation of the shards, and the
    cuts of the groups used last."""

    def __init__(self, sizes: Sequence[int], seed: int, window: int, spread: int = 16) -> None:
        self.sizes = numpy.asarray(sizes, dtype=numpy.int64)
        self.samples = int(self.sizes.sum())
        self.seed = seed
        self.window = max(1, window)
        if self.samples <= 0:
            raise ValueError("an order over no samples")
        count = len(self.sizes)
        groups = max(1, round(count / max(1, spread)))
        self._bounds = numpy.array([group * count // groups for group in range(groups + 1)], dtype=numpy.int64)
        self._epoch = -1
        self._shards = self._ends = numpy.zeros(0, dtype=numpy.int64)
        self._groups: dict[int, _Group] = {}

    def at(self, positions: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Shard and row of each position (int64 arrays of the same shape)."""
        positions = numpy.asarray(positions, dtype=numpy.int64)
        shards, rows = numpy.empty_like(positions), numpy.empty_like(positions)
        epochs = positions // self.samples
        for epoch in numpy.unique(epochs):
            chosen = epochs == epoch
            shards[chosen], rows[chosen] = self._in_epoch(int(epoch), positions[chosen] % self.samples)
        return shards, rows

    def windows(self, position: int) -> Iterator[tuple[int, list[Run]]]:
        """The windows from the one that holds `position` on, endlessly: the position of its first sample, its runs."""
        epoch, offset = divmod(position, self.samples)
        while True:
            self._lay(epoch)
            number = int(numpy.searchsorted(self._ends, offset, side="right"))
            first = int(self._ends[number - 1]) if number else 0
            group = self._group(number)
            window = int(numpy.searchsorted(group.starts, offset - first, side="right")) - 1
            cuts = zip(group.shards, group.cuts[window], group.cuts[window + 1], strict=True)
            begin = epoch * self.samples + first + int(group.starts[window])
            yield begin, [Run(int(shard), int(start), int(stop)) for shard, start, stop in cuts if stop > start]
            epoch, offset = divmod(epoch * self.samples + first + int(group.starts[window + 1]), self.samples)

    def _in_epoch(self, epoch: int, offset: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Shard and row of each offset within the epoch."""
        self._lay(epoch)
        shards, rows = numpy.empty_like(offset), numpy.empty_like(offset)
        numbers = numpy.searchsorted(self._ends, offset, side="right")
        for number in numpy.unique(numbers):
            chosen = numbers == number
            group, first = self._group(int(number)), int(self._ends[number - 1]) if number else 0
            inside = offset[chosen] - first
            windows = numpy.searchsorted(group.starts, inside, side="right") - 1
            place, row = numpy.empty_like(inside), numpy.empty_like(inside)
            for window in numpy.unique(windows):
                here = windows == window
                key = draw(self.seed, epoch, 2 + first + int(group.starts[window]))
                place[here], row[here] = self._in_window(group, int(window), inside[here], key)
            shards[chosen], rows[chosen] = group.shards[place], row
        return shards, rows

    @staticmethod
    def _in_window(group: _Group, window: int, inside: numpy.ndarray, key: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Place in the group's list of shards, and row, of offsets that lie in one window of the group."""
        first, size = int(group.starts[window]), int(group.starts[window + 1] - group.starts[window])
        drawn = permute(inside - first, size, key)
        ends = numpy.cumsum(group.cuts[window + 1] - group.cuts[window])
        place = numpy.searchsorted(ends, drawn, side="right")
        return place, group.cuts[window + 1][place] - (ends[place] - drawn)

    def _lay(self, epoch: int) -> None:
        """Permute the shards of an epoch and measure its groups."""
        if epoch != self._epoch:
            count = len(self.sizes)
            self._shards = permute(numpy.arange(count), count, draw(self.seed, epoch, 1))
            totals = numpy.cumsum(self.sizes[self._shards])
            self._ends = totals[self._bounds[1:] - 1]
            self._epoch, self._groups = epoch, {}

    def _group(self, number: int) -> _Group:
        found = self._groups.get(number)
        if found is None:
            shards = self._shards[self._bounds[number] : self._bounds[number + 1]]
            if len(self._groups) >= _KEPT_GROUPS:
                self._groups.clear()
            found = self._groups[number] = _Group(shards, self.sizes[shards], self.window)
        return found


def rows_of_rank(
    first: int, sequence: int, *, rank: int, world_size: int, global_batch: int, accumulation: int
) -> numpy.ndarray:
    """The positions of a rank's `sequence`-th micro-batch, counted from the step that starts at position `first`.

    Micro-batch a of rank r takes the rows [(a*W + r)*m, (a*W + r + 1)*m) of the step's `global_batch`, with
    m = global_batch / (W * accumulation): which rows make a step does not depend on W or on the accumulation.
    """
    rows = global_batch // (world_size * accumulation)
    step, micro = divmod(sequence, accumulation)
    start = first + step * global_batch + (micro * world_size + rank) * rows
    return numpy.arange(start, start + rows, dtype=numpy.int64)
