"""Pairs of samples with near captions, from which editing is learned.

Two captions are near if they differ in a single run of at most `longest` words, which may be empty in one of them:
"woman pilot dark skin tone" is near "woman pilot light skin tone", "man pilot dark skin tone" and "woman pilot". The
samples whose captions agree once a certain run is removed form a *group*. Small groups are more specific than large
ones ("pilot dark skin tone" than "woman dark skin tone"), so groups of more than `LARGEST` samples count only for
samples without a smaller one, and then only the smallest. Our own. All captions of a split are compared, so the set
must be on a disk of this machine: reading 100,000 captions takes seconds, and their groups take tens of bytes per word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy

from dist_t2i.config.sections import EditConfig
from dist_t2i.data.shard_set import BadSample, Shards, captions_of
from dist_t2i.data.tokenizer import words
from dist_t2i.errors import DataError
from dist_t2i.utils.seeds import StreamPurpose, random_bits

LARGEST = 16
"""Samples in the largest group that always counts."""
MOST_SAMPLES = 200_000
"""Larger splits are refused."""
NONE = -1
"""In place of a sample's number: no source."""


class Neighbors:
    """The groups of samples with near captions; `captions[i]` are those of sample i."""

    def __init__(self, captions: Sequence[Sequence[str]], longest: int) -> None:
        keys: list[int] = []
        counts: list[int] = []
        for texts in captions:
            own = dict.fromkeys(key for text in texts for key in _remainders(words(text), longest))
            keys.extend(own)
            counts.append(len(own))
        _, group, sizes = numpy.unique(numpy.array(keys, dtype=numpy.uint64), return_inverse=True, return_counts=True)
        # _group: the groups of sample 0, of sample 1, ...; _members: the samples of group 0, of group 1, ...
        self._group, self._sizes = group.reshape(-1), sizes
        self._starts = numpy.cumsum([0, *counts])
        owners = numpy.repeat(numpy.arange(len(counts)), counts)
        self._members = owners[numpy.argsort(self._group, kind="stable")]
        self._ends = numpy.cumsum(sizes)

    def groups(self, number: int) -> list[numpy.ndarray]:
        """The groups of sample `number` that count, each with its sorted samples; [] if no other caption is near."""
        own = self._group[self._starts[number] : self._starts[number + 1]]
        shared = own[self._sizes[own] > 1]
        small = shared[self._sizes[shared] <= LARGEST]
        if not len(small) and len(shared):
            small = shared[[int(numpy.argmin(self._sizes[shared]))]]
        return [self._members[self._ends[g] - self._sizes[g] : self._ends[g]] for g in small]

    def pick(self, number: int, random: int) -> int:
        """A neighbor of sample `number`, selected by 64 random bits: first a group, then a sample. Without any, `number`."""
        if not (groups := self.groups(number)):
            return number
        random, which = divmod(random, len(groups))
        others = groups[which][groups[which] != number]
        return int(others[random % len(others)])


class SourceChoice:
    """The source of each visit of a sample: the sample itself, a neighbor, or none. A function of (seed, position)."""

    def __init__(self, neighbors: Neighbors, edit: EditConfig, seed: int) -> None:
        self._neighbors, self._seed = neighbors, seed
        self._none, self._own = edit.none, edit.own

    def __call__(self, number: int, position: int) -> int:
        """The number of the source when sample `number` is visited at `position`; `NONE` without one."""
        share = random_bits(self._seed, position, StreamPurpose.EDIT_KIND) / 2**64
        if share < self._none:
            return NONE
        if share < self._none + self._own:
            return number
        return self._neighbors.pick(number, random_bits(self._seed, position, StreamPurpose.EDIT_SOURCE))


def source_choice(shards: Shards, edit: EditConfig, seed: int) -> SourceChoice:
    """Reads all captions of a split. Raises DataError if it is remote or too large."""
    samples = sum(shards.sizes)
    if shards.remote or samples > MOST_SAMPLES:
        problem = "is remote" if shards.remote else f"has {samples:,} samples"
        raise DataError(
            f"the training split {problem}, but training for edits (edit.width) compares all captions of a set, which must "
            f"be on this machine's disk and have at most {MOST_SAMPLES:,} samples: copy a part of it, or set edit.width=0"
        )
    return SourceChoice(Neighbors(read_captions(shards), edit.words), edit, seed)


def read_captions(shards: Shards) -> list[tuple[str, ...]]:
    """The captions of every sample of a split; () for samples that cannot be read."""
    captions: list[tuple[str, ...]] = []
    for shard, size in enumerate(shards.sizes):
        for row in range(size):
            try:
                captions.append(captions_of(shards.read(shard, row, only=("json", "txt")))[0])
            except BadSample:  # the stream counts it when it reads it
                captions.append(())
    return captions


def _remainders(tokens: Sequence[str], longest: int) -> Iterator[int]:
    """64-bit keys of the words, and of the words without each run of up to `longest` words."""
    yield _key(tokens)
    for length in range(1, min(longest, len(tokens) - 1) + 1):
        for first in range(len(tokens) - length + 1):
            yield _key([*tokens[:first], *tokens[first + length :]])


def _key(tokens: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(tokens).encode("utf-8", "replace"), digest_size=8).digest(), "big")
