"""Which other pictures of a set have a caption near a picture's own: what editing is learned from.

Two captions are near when they agree but for one run of up to `longest` words, which either of them may lack: "woman
pilot dark skin tone" is near "woman pilot light skin tone", "man pilot dark skin tone" and "woman pilot". The samples
that agree in what is left of a caption when a certain run is taken out form a *group*. Small groups say more than large
ones ("pilot dark skin tone" more than "woman dark skin tone"), so those of more than `LARGEST` samples count only
where there are no others, and then the smallest. Our own.

The rule needs every caption of a split at once, so it is for sets that fit on a disk of this machine: reading the
captions of 100,000 pictures takes seconds, and finding their groups tens of bytes for every word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy

from dist_t2i.config.sections import Config
from dist_t2i.data.shard_set import BadSample, Shards, captions_of
from dist_t2i.data.stream.order import draw
from dist_t2i.data.tokenizer import words
from dist_t2i.errors import DataError

LARGEST = 16
"""Samples of a group that is used wherever there is one."""
MOST_SAMPLES = 200_000
"""Larger splits are refused."""
NONE = -1
"""In place of a sample's number: no source picture."""
_WHETHER, _WHICH = 110, 111


class Neighbors:
    """The groups of samples with near captions; `captions[i]` are those of sample i."""

    def __init__(self, captions: Sequence[Sequence[str]], longest: int) -> None:
        keys: list[int] = []
        counts: list[int] = []
        for texts in captions:
            found = dict.fromkeys(key for text in texts for key in _remainders(words(text), longest))
            keys.extend(found)
            counts.append(len(found))
        _, group, sizes = numpy.unique(numpy.array(keys, dtype=numpy.uint64), return_inverse=True, return_counts=True)
        self._group, self._sizes = group.reshape(-1), sizes
        self._starts = numpy.cumsum([0, *counts])
        """Where the groups of each sample begin in `_group`."""
        owners = numpy.repeat(numpy.arange(len(counts)), counts)
        self._members = owners[numpy.argsort(self._group, kind="stable")]
        self._ends = numpy.cumsum(sizes)

    def groups(self, number: int) -> list[numpy.ndarray]:
        """The groups that sample `number` is in and that count, each with its samples in order; [] where it is alone."""
        mine = self._group[self._starts[number] : self._starts[number + 1]]
        shared = mine[self._sizes[mine] > 1]
        small = shared[self._sizes[shared] <= LARGEST]
        if not len(small) and len(shared):
            small = shared[[int(numpy.argmin(self._sizes[shared]))]]
        return [self._members[self._ends[g] - self._sizes[g] : self._ends[g]] for g in small]

    def pick(self, number: int, random: int) -> int:
        """A neighbour of sample `number`, chosen by 64 random bits: a group, then one of its others. Without any, `number`."""
        groups = self.groups(number)
        if not groups:
            return number
        random, which = divmod(random, len(groups))
        others = groups[which][groups[which] != number]
        return int(others[random % len(others)])


class SourceChoice:
    """Which picture each visit of a sample is made from: its own, a neighbour's, or none. A function of (seed, position)."""

    def __init__(self, neighbours: Neighbors, config: Config) -> None:
        self._neighbours, self._seed = neighbours, config.train.seed
        self._none, self._own = config.edit.none, config.edit.own

    def __call__(self, number: int, position: int) -> int:
        """The number of the source for the sample `number` that is visited at `position`; `NONE` for none."""
        share = draw(self._seed, position, _WHETHER) / 2**64
        if share < self._none:
            return NONE
        if share < self._none + self._own:
            return number
        return self._neighbours.pick(number, draw(self._seed, position, _WHICH))


def source_choice(shards: Shards, config: Config) -> SourceChoice:
    """Reads all captions of a split. Raises DataError when it is remote or too large for that."""
    samples = sum(shards.sizes)
    if shards.remote or samples > MOST_SAMPLES:
        what = "lies behind a network" if shards.remote else f"has {samples:,} samples"
        raise DataError(
            f"the training split {what}, but learning to edit (edit.width) compares all captions of a set, which must lie "
            f"on this machine's disk and hold at most {MOST_SAMPLES:,} samples: copy a part of it, or set edit.width=0"
        )
    return SourceChoice(Neighbors(read_captions(shards), config.edit.words), config)


def read_captions(shards: Shards) -> list[tuple[str, ...]]:
    """The captions of every sample of a split, without its pictures; none for a sample that cannot be read."""
    captions: list[tuple[str, ...]] = []
    for shard, size in enumerate(shards.sizes):
        for row in range(size):
            try:
                captions.append(captions_of(shards.read(shard, row, only=("json", "txt")))[0])
            except BadSample:  # the stream counts it when its turn comes
                captions.append(())
    return captions


def _remainders(said: Sequence[str], longest: int) -> Iterator[int]:
    """64 bits for the words themselves, and for what is left of them without each run of up to `longest` words."""
    yield _key(said)
    for length in range(1, min(longest, len(said) - 1) + 1):
        for first in range(len(said) - length + 1):
            yield _key([*said[:first], *said[first + length :]])


def _key(said: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(said).encode("utf-8", "replace"), digest_size=8).digest(), "big")
