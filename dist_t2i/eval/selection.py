"""Which pictures and captions of a set a protocol is about: by its committed list, or by its rule."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_t2i.data.images import PictureError, decode, square
from dist_t2i.data.shard_set import BadSample, Sample, Samples, ShardSet
from dist_t2i.errors import DataError, UserError
from dist_t2i.eval.protocol import Protocol
from dist_t2i.eval.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Chosen:
    """N pictures of a split and J captions of each."""

    split: str
    samples: Samples
    numbers: tuple[int, ...]
    """Where they are in the split."""
    keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    """[N][J]"""
    kept: Tensor | None = None
    """uint8 [N, 3, size, size], where all of them were read before."""

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self) -> list[tuple[str, str]]:
        """(key, caption) in order: the split's part of the list of captions."""
        return [(key, caption) for key, row in zip(self.keys, self.captions, strict=True) for caption in row]

    def picture(self, row: int, size: int) -> Tensor:
        """The picture as the protocol says: its middle square at the model's size, uint8 [3, size, size].

        Raises UserError when it cannot be used: a protocol with a picture less is another protocol.
        """
        if self.kept is not None:
            return self.kept[row]
        try:
            return square(decode(_read(self.samples, self.split, self.numbers[row]).image_bytes, at_least=size), size)
        except PictureError as error:
            raise UserError(f"{self.split}: the picture {self.keys[row]} {error}; make the set again") from None

    def loaded(self, size: int) -> Chosen:
        """The same with all pictures in memory."""
        return replace(self, kept=torch.stack([self.picture(row, size) for row in range(len(self))]))


def splits_of(data: ShardSet, protocol: Protocol) -> tuple[str, ...]:
    """The splits that a protocol is about. Raises UserError when the set lacks one, or has none to evaluate on."""
    splits = protocol.splits or tuple(name for name in data.splits if name.startswith("test"))
    missing = [name for name in splits if name not in data.splits]
    if missing or not splits:
        wanted = ", ".join(missing) or "whose name begins with test"
        raise UserError(f"{data.folder} has no split {wanted}; it has {', '.join(data.splits)}")
    return splits


def choose(data: ShardSet, split: str, protocol: Protocol, ranks: Ranks = ALONE) -> Chosen:
    """The pictures and captions of a split. Collective. Raises UserError when there are too few, or not those listed."""
    samples, numbers, wanted = ranks.all(lambda: _found(data, split, protocol))

    def read(chunk: range) -> list[tuple[str, tuple[str, ...]]]:
        found = [_read(samples, split, numbers[row]) for row in chunk]
        return [
            (sample.key, _captions(sample, split, protocol, wanted.get(numbers[row])))
            for row, sample in zip(chunk, found, strict=True)
        ]

    rows = [row for part in ranks.map(len(numbers), read) for row in part]
    return Chosen(split, samples, tuple(numbers), tuple(key for key, _ in rows), tuple(row for _, row in rows))


def _found(data: ShardSet, split: str, protocol: Protocol) -> tuple[Samples, list[int], dict[int, str]]:
    """The split, the numbers of the pictures in it, and number -> caption where these are listed."""
    samples = data.samples(split)
    if protocol.captions == "listed":
        listed = protocol.listed().get(split, [])
        numbers = _numbers_of(data, samples, split, [key for key, _ in listed], protocol)
        wanted = dict(zip(numbers, (caption for _, caption in listed), strict=True))
    else:
        numbers, wanted = _by_rule(samples, protocol), {}
    if len(numbers) < protocol.min_pictures:
        raise UserError(
            f"{data.folder}: {split} has {len(numbers):,} pictures, too few for protocol {protocol.name}, which needs "
            f"{protocol.min_pictures:,}; hold out more, or take another protocol"
        )
    return samples, numbers, wanted


def has_listed(data: ShardSet, protocol: Protocol) -> bool:
    """Whether a set holds all that a protocol lists, by the keys."""
    if not set(protocol.splits) <= set(data.splits):
        return False
    listed = protocol.listed()
    return all({key for key, _ in listed[split]} <= set(_keys(data.samples(split))) for split in protocol.splits)


def _keys(samples: Samples) -> list[str]:
    try:
        return [key for shard in range(len(samples.shards.sizes)) for key in samples.shards.open(shard)[1].keys]
    except (OSError, DataError) as error:
        raise UserError(f"the keys of the samples cannot be read: {error}") from None


def _numbers_of(data: ShardSet, samples: Samples, split: str, keys: list[str], protocol: Protocol) -> list[int]:
    place = {key: number for number, key in enumerate(_keys(samples))}
    missing = [key for key in keys if key not in place]
    if missing:
        raise UserError(
            f"{data.folder}: {split} lacks {len(missing)} of the {len(keys)} pictures that protocol {protocol.name} "
            f"version {protocol.version} lists ({', '.join(missing[:3])}, ...): make the set with the packages that "
            "constraints.txt pins, or evaluate with --protocol held-out"
        )
    return [place[key] for key in keys]


def _by_rule(samples: Samples, protocol: Protocol) -> list[int]:
    if protocol.captions == "first":
        return list(range(min(len(samples), protocol.max_pictures)))
    ordered = sorted((_hash(protocol, key), key, number) for number, key in enumerate(_keys(samples)))
    return [number for _, _, number in ordered[: protocol.max_pictures]]


def _captions(sample: Sample, split: str, protocol: Protocol, listed: str | None) -> tuple[str, ...]:
    said = sample.captions
    if listed is not None:
        match = next((caption for caption in said if " ".join(caption.split()) == listed), None)
        if match is None:
            raise UserError(
                f"{split}: {sample.key} is captioned {said[0]!r}, but protocol {protocol.name} lists {listed!r}: make the "
                "set with the packages that constraints.txt pins, or evaluate with --protocol held-out"
            )
        return (match,)
    if protocol.captions == "hash":
        return (said[_hash(protocol, f"{sample.key} caption") % len(said)],)
    return tuple(said[number % len(said)] for number in range(protocol.captions_per_picture))


def _hash(protocol: Protocol, key: str) -> int:
    """64 bits of the SHA-256 of the protocol's name and a key: nothing that a version changes, so that it stays."""
    return int.from_bytes(hashlib.sha256(f"{protocol.name} {key}".encode()).digest()[:8], "big")


def _read(samples: Samples, split: str, number: int) -> Sample:
    try:
        return samples[number]
    except (BadSample, DataError) as error:
        raise UserError(f"{split}: a sample of the protocol cannot be used: {error}; make the set again") from None
