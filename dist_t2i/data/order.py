"""The order of the samples: a pure function (seed, position) -> (shard, row), without a list of samples.

A *position* counts samples from the start of training (0, 1, 2, ...) over all ranks; `position // samples` is its
epoch. In each epoch the shards are permuted and laid end to end; the line is cut into windows of `window` samples, and
each window is shuffled in itself. So every sample comes exactly once an epoch, whatever the world size; a reader
that follows the order has the shards of one window open; and one that starts anywhere computes where it is at once.

Both permutations are Feistel networks (Luby & Rackoff 1988) over the next power of two, walked until the result lies
inside (Black & Rogaway 2002): no memory, and the same for every version of every library.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


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


class Order:
    """The order over shards of `sizes` samples each. Holds one number a shard, and one permutation of the shards."""

    def __init__(self, sizes: Sequence[int], seed: int, window: int) -> None:
        self.sizes = numpy.asarray(sizes, dtype=numpy.int64)
        self.samples = int(self.sizes.sum())
        self.seed = seed
        self.window = max(1, window)
        if self.samples <= 0:
            raise ValueError("an order over no samples")
        self._epoch = -1
        self._shards = self._ends = numpy.zeros(0, dtype=numpy.int64)

    def at(self, positions: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Shard and row of each position (int64 arrays of the same shape)."""
        positions = numpy.asarray(positions, dtype=numpy.int64)
        shards, rows = numpy.empty_like(positions), numpy.empty_like(positions)
        epochs = positions // self.samples
        for epoch in numpy.unique(epochs):
            chosen = epochs == epoch
            shards[chosen], rows[chosen] = self._in_epoch(int(epoch), positions[chosen] % self.samples)
        return shards, rows

    def _in_epoch(self, epoch: int, offset: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Shard and row of each offset within the epoch."""
        self._lay(epoch)
        line = numpy.empty_like(offset)
        windows = offset // self.window
        for number in numpy.unique(windows):
            chosen = windows == number
            first = int(number) * self.window
            size = min(self.window, self.samples - first)
            line[chosen] = first + permute(offset[chosen] - first, size, draw(self.seed, epoch, 2 + int(number)))
        place = numpy.searchsorted(self._ends, line, side="right")
        shard = self._shards[place]
        return shard, line - (self._ends[place] - self.sizes[shard])

    def _lay(self, epoch: int) -> None:
        """Lay the shards of an epoch end to end."""
        if epoch != self._epoch:
            count = len(self.sizes)
            self._shards = permute(numpy.arange(count), count, draw(self.seed, epoch, 1))
            self._ends = numpy.cumsum(self.sizes[self._shards])
            self._epoch = epoch


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
