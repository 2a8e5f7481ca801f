"""The order of the samples: a pure function (seed, position) -> (shard, row), without a list of samples.

A *position* is the number of a sample in the order of training (0, 1, 2, ...), over all ranks. The epoch of a position
is `position // samples`. Each epoch permutes the shards and divides them into groups of about `spread` shards. A group
is read in windows of about `window` samples: a window contains the next run of rows of every shard of the group, in
random order. This order has four properties. Every sample occurs once per epoch for any number of ranks. Each shard is
read from front to back in long runs. The samples of a batch come from about `spread` shards. Reading can start at any
position without reading earlier samples.

A reader needs the data of one window at a time. A prefetching reader needs the data of two windows.

The permutations are Feistel networks (Luby & Rackoff 1988) with cycle walking (Black & Rogaway 2002). Such permutations
need no memory, and an update of a library cannot change the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy

from dist_t2i.utils.seeds import StreamPurpose, random_bits

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_CACHED_GROUPS = 64


def _mix(value: numpy.ndarray) -> numpy.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014) on uint64 arrays: each output bit depends on each input bit."""
    value = (value ^ (value >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return value ^ (value >> numpy.uint64(31))


def permute(index: numpy.ndarray, size: int, key: int) -> numpy.ndarray:
    """Maps each element of `index` (int64, 0 <= index < size) by a permutation of range(`size`), which the 64-bit `key`
    selects. Returns an int64 array with the shape of `index`."""
    # Cycle walking (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"): the Feistel network E permutes the
    # larger range [0, 2^b), 2^b >= size. Map i to the first of E(i), E(E(i)), ... that is below `size`. The walk ends
    # at the latest when E's cycle returns to i itself. Distinct i have distinct results because E is invertible, so the
    # map permutes [0, size). On average a walk takes fewer than 2 steps.
    bits = max(2, (size - 1).bit_length())
    result = _feistel(numpy.asarray(index, dtype=numpy.uint64), bits, key)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], bits, key)
    return result.astype(numpy.int64)


def _feistel(value: numpy.ndarray, bits: int, key: int) -> numpy.ndarray:
    """A keyed permutation of range(2**bits), elementwise."""
    # Feistel network (Luby & Rackoff 1988): a round maps the halves (L, R) to (R, L xor F_k(R)), which is invertible
    # for any F. Here F_k is splitmix64's finalizer, applied twice to R + k. If `bits` is odd, the halves differ by one
    # bit in width. The halves change places in every round, so the code also swaps their widths.
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
    """The shards of a group and their division into windows."""

    def __init__(self, shards: numpy.ndarray, sizes: numpy.ndarray, window: int) -> None:
        self.shards = shards
        windows = max(1, round(int(sizes.sum()) / window))
        # cuts[j, k] = floor(sizes[k] * j / windows): the first row of shard k in window j, int64 [windows + 1, shards].
        # The products could overflow int64, so Python's integers compute them.
        cuts = [[size * j // windows for size in sizes.tolist()] for j in range(windows + 1)]
        self.cuts = numpy.array(cuts, dtype=numpy.int64)
        self.starts = self.cuts.sum(axis=1)
        """The offset of each window in the group, then the size of the group: int64 [windows + 1]."""


class Order:
    """The order over shards that have `sizes` samples. An order holds only the sizes, one permutation of the shards,
    and the windows of recently used groups. Memory therefore does not grow with the number of samples."""

    def __init__(self, sizes: Sequence[int], seed: int, window: int, spread: int = 16) -> None:
        self.sizes = numpy.asarray(sizes, dtype=numpy.int64)
        self.samples = int(self.sizes.sum())
        self.seed, self.window = seed, max(1, window)
        if self.samples <= 0:
            raise ValueError("an order needs at least one sample")
        count = len(self.sizes)
        groups = max(1, round(count / max(1, spread)))
        # Group g consists of the shards bounds[g] to bounds[g + 1] - 1 of the permuted list.
        self._bounds = numpy.array([group * count // groups for group in range(groups + 1)], dtype=numpy.int64)
        self._epoch = -1
        self._shards = self._ends = numpy.zeros(0, dtype=numpy.int64)
        self._groups: dict[int, _Group] = {}

    def at(self, positions: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The shard and the row of each position: int64 arrays with the shape of `positions`."""
        positions = numpy.asarray(positions, dtype=numpy.int64)
        shards, rows = numpy.empty_like(positions), numpy.empty_like(positions)
        pending = numpy.ones(positions.shape, dtype=bool)
        while pending.any():
            # Step 1: find the window that contains the first pending position, and all positions in that window.
            begin, group, window = self._window_at(int(positions[pending][0]))
            size = int(group.starts[window + 1] - group.starts[window])
            inside = (positions >= begin) & (positions < begin + size)
            # Step 2: shuffle these positions within the window.
            epoch, offset = divmod(begin, self.samples)
            shuffled = permute(
                positions[inside] - begin, size, random_bits(self.seed, epoch, StreamPurpose.WINDOWS + offset)
            )
            # Step 3: convert the shuffled offsets to shards and rows. The window is the concatenation of one run per
            # shard: run k has the offsets [ends[k - 1], ends[k]), and its last row is cuts[window + 1, k] - 1.
            ends = numpy.cumsum(group.cuts[window + 1] - group.cuts[window])
            column = numpy.searchsorted(ends, shuffled, side="right")
            shards[inside] = group.shards[column]
            rows[inside] = group.cuts[window + 1][column] - (ends[column] - shuffled)
            pending &= ~inside
        return shards, rows

    def windows(self, position: int) -> Iterator[tuple[int, list[Run]]]:
        """Endlessly yields windows, beginning with the window that contains `position`. A window is a pair: the
        position of its first sample, and its runs."""
        while True:
            begin, group, window = self._window_at(position)
            cuts = zip(group.shards, group.cuts[window], group.cuts[window + 1], strict=True)
            yield begin, [Run(int(shard), int(start), int(stop)) for shard, start, stop in cuts if stop > start]
            position = begin + int(group.starts[window + 1] - group.starts[window])

    def _window_at(self, position: int) -> tuple[int, _Group, int]:
        """For the window that contains `position`: its first position, its group, and its number in the group."""
        epoch, offset = divmod(position, self.samples)
        self._lay_out(epoch)
        number = int(numpy.searchsorted(self._ends, offset, side="right"))
        group, first = self._group(number), int(self._ends[number - 1]) if number else 0
        window = int(numpy.searchsorted(group.starts, offset - first, side="right")) - 1
        return epoch * self.samples + first + int(group.starts[window]), group, window

    def _lay_out(self, epoch: int) -> None:
        """Permutes the shards for an epoch and computes the offset at which each group ends."""
        if epoch != self._epoch:
            count = len(self.sizes)
            self._shards = permute(numpy.arange(count), count, random_bits(self.seed, epoch, StreamPurpose.SHARDS))
            totals = numpy.cumsum(self.sizes[self._shards])
            self._ends = totals[self._bounds[1:] - 1]
            self._epoch, self._groups = epoch, {}

    def _group(self, number: int) -> _Group:
        if number not in self._groups:
            if len(self._groups) >= _CACHED_GROUPS:
                self._groups.clear()
            shards = self._shards[self._bounds[number] : self._bounds[number + 1]]
            self._groups[number] = _Group(shards, self.sizes[shards], self.window)
        return self._groups[number]


@dataclass(frozen=True)
class Plan:
    """The micro-batches of one rank. Micro-batch 0 begins at position `start`, where a training step must begin.

    A step has the rows 0 to `global_batch` - 1. Micro-batch a of rank r takes the rows [(a*W + r)*m, (a*W + r + 1)*m),
    with the world size W and m = global_batch / (W * accumulation). So the rows of a step do not depend on W or
    accumulation.
    """

    rank: int
    world_size: int
    global_batch: int
    accumulation: int
    start: int

    @property
    def rows(self) -> int:
        """Samples per micro-batch, m."""
        return self.global_batch // (self.world_size * self.accumulation)

    def positions(self, sequence: int) -> numpy.ndarray:
        """The positions of the samples of micro-batch `sequence` (0, 1, ...): int64 [m]."""
        step, micro = divmod(sequence, self.accumulation)
        first = self.start + step * self.global_batch + (micro * self.world_size + self.rank) * self.rows
        return numpy.arange(first, first + self.rows, dtype=numpy.int64)
