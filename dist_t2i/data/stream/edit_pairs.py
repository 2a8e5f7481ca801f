"""Pairs of samples with near captions, which serve as training examples for editing.

Two captions are near if replacing, adding or removing a single run of at most `longest` words makes them equal: "woman
pilot dark skin tone" is near "woman pilot light skin tone", "man pilot dark skin tone" and "woman pilot". Samples form
a *group* if removing at most one such run from a caption of each makes these captions equal. Small groups are more
specific than large groups: the rest "pilot dark skin tone" says more than "woman dark skin tone". A sample therefore
uses its groups of at most `LARGEST` samples, or only its smallest group if all its groups are larger.

All captions of a split are compared, so the set must be on a disk of this machine. Reading 100,000 captions takes
seconds, and the groups of the captions take tens of bytes of memory per word.
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
"""A group of at most this many samples is always used."""
MOST_SAMPLES = 200_000
"""The largest number of samples that a split may have."""
NONE = -1
"""Stands for "no source" in place of a sample's number."""


class Neighbors:
    """The groups of samples with near captions; `captions[i]` are the captions of sample i."""

    def __init__(self, captions: Sequence[Sequence[str]], longest: int) -> None:
        keys: list[int] = []
        counts: list[int] = []
        for texts in captions:
            own = dict.fromkeys(key for text in texts for key in _remainders(words(text), longest))
            keys.extend(own)
            counts.append(len(own))
        _, group, sizes = numpy.unique(numpy.array(keys, dtype=numpy.uint64), return_inverse=True, return_counts=True)
        # _group lists the groups of sample 0, of sample 1, ...; _members lists the samples of group 0, of group 1, ...
        self._group, self._sizes = group.reshape(-1), sizes
        self._starts = numpy.cumsum([0, *counts])
        owners = numpy.repeat(numpy.arange(len(counts)), counts)
        self._members = owners[numpy.argsort(self._group, kind="stable")]
        self._ends = numpy.cumsum(sizes)

    def groups(self, number: int) -> list[numpy.ndarray]:
        """The groups that sample `number` uses, each as its sorted samples; [] if no other caption is near."""
        own = self._group[self._starts[number] : self._starts[number + 1]]
        shared = own[self._sizes[own] > 1]
        small = shared[self._sizes[shared] <= LARGEST]
        if not len(small) and len(shared):
            small = shared[[int(numpy.argmin(self._sizes[shared]))]]
        return [self._members[self._ends[g] - self._sizes[g] : self._ends[g]] for g in small]

    def pick(self, number: int, random: int) -> int:
        """A neighbor of sample `number`, or `number` itself without neighbors. 64 random bits select a group and its
        sample."""
        if not (groups := self.groups(number)):
            return number
        random, which = divmod(random, len(groups))
        others = groups[which][groups[which] != number]
        return int(others[random % len(others)])


class SourceChoice:
    """A function of (seed, position) that selects a sample's source: the sample itself, a neighbor, or nothing."""

    def __init__(self, neighbors: Neighbors, edit: EditConfig, seed: int) -> None:
        self._neighbors, self._seed = neighbors, seed
        self._none, self._own = edit.none, edit.own

    def __call__(self, number: int, position: int) -> int:
        """The number of the source when sample `number` is visited at `position`; `NONE` for no source."""
        share = random_bits(self._seed, position, StreamPurpose.EDIT_KIND) / 2**64
        if share < self._none:
            return NONE
        if share < self._none + self._own:
            return number
        return self._neighbors.pick(number, random_bits(self._seed, position, StreamPurpose.EDIT_SOURCE))


def source_choice(shards: Shards, edit: EditConfig, seed: int) -> SourceChoice:
    """The choice of sources, from all captions of a split. Raises DataError if the split is remote or too large."""
    samples = sum(shards.sizes)
    if shards.remote or samples > MOST_SAMPLES:
        problem = "is remote" if shards.remote else f"has {samples:,} samples"
        raise DataError(
            f"the training split {problem}. Training for edits (edit.width) compares all captions, so the split must "
            f"be on this machine's disk with at most {MOST_SAMPLES:,} samples: copy a part there, or set edit.width=0"
        )
    return SourceChoice(Neighbors(read_captions(shards), edit.words), edit, seed)


def read_captions(shards: Shards) -> list[tuple[str, ...]]:
    """The captions of every sample of a split; () for samples that cannot be read."""
    captions: list[tuple[str, ...]] = []
    for shard, size in enumerate(shards.sizes):
        for row in range(size):
            try:
                captions.append(captions_of(shards.read(shard, row, only=("json", "txt")))[0])
            except BadSample:  # not reported here, because the stream counts bad samples
                captions.append(())
    return captions


def _remainders(tokens: Sequence[str], longest: int) -> Iterator[int]:
    """64-bit keys of the list of words, and of each list that remains without one run of up to `longest` words."""
    yield _key(tokens)
    for length in range(1, min(longest, len(tokens) - 1) + 1):
        for first in range(len(tokens) - length + 1):
            yield _key([*tokens[:first], *tokens[first + length :]])


def _key(tokens: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(tokens).encode("utf-8", "replace"), digest_size=8).digest(), "big")
