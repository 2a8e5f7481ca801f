"""Selects the pictures and captions of a set that a protocol evaluates, by the protocol's list or by its rule."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_t2i.data import scenes
from dist_t2i.data.images import PictureError, decode, square
from dist_t2i.data.shard_set import BadSample, Sample, Samples, ShardSet
from dist_t2i.errors import DataError, UserError
from dist_t2i.eval.protocol import Protocol
from dist_t2i.eval.ranks import ALONE, Ranks
from dist_t2i.utils.seeds import Purpose, mix

_REMEDY = "write the set again with the packages that constraints.txt pins, or evaluate with --protocol held-out"


SAME_CAPTION = 4
"""The number of further real pictures of each caption, where the project can render them."""


@dataclass(frozen=True)
class Selection:
    """N pictures of a split and J captions of each."""

    split: str
    samples: Samples
    numbers: tuple[int, ...]
    """Position of each picture in the split."""
    keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    """[N][J]"""
    attributes: tuple[Mapping[str, Any], ...]
    """What the set says about each picture in addition to its captions."""
    pictures: Tensor | None = None
    """uint8 [N, 3, size, size] after `loaded`, else None."""

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self) -> list[tuple[str, str]]:
        """All pairs (key, caption), in the order of the selection."""
        return [(key, caption) for key, row in zip(self.keys, self.captions, strict=True) for caption in row]

    def picture(self, row: int, size: int) -> Tensor:
        """The central square of a picture at the model's size, uint8 [3, size, size]. Raises UserError."""
        if self.pictures is not None:
            return self.pictures[row]
        try:
            return square(decode(_read(self.samples, self.split, self.numbers[row]).image_bytes, at_least=size), size)
        except PictureError as error:  # an error, because a skipped picture would change the scores
            raise UserError(f"{self.split}: the picture {self.keys[row]} {error}; write the set again") from None

    @property
    def rendered(self) -> bool:
        """Whether all pictures are scenes, so that further real pictures of a caption can be rendered."""
        return all(is_scene(about) for about in self.attributes)

    def same_caption(self, row: int, size: int) -> Tensor:
        """`SAME_CAPTION` further real pictures of a caption, rendered anew: uint8 [SAME_CAPTION, 3, size, size]."""
        seed, numbers = mix(row, Purpose.SAME_CAPTION), range(SAME_CAPTION)
        found = [scenes.render(scenes.same_caption(self.attributes[row], seed, i), size) for i in numbers]
        return torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in found])

    def loaded(self, size: int) -> Selection:
        """The same selection with all pictures in memory."""
        return replace(self, pictures=torch.stack([self.picture(row, size) for row in range(len(self))]))


def splits_of(data: ShardSet, protocol: Protocol) -> tuple[str, ...]:
    """The splits that a protocol evaluates. Raises UserError if the set has no held-out split or lacks a split."""
    splits = protocol.splits or tuple(name for name in data.splits if name.startswith("test"))
    missing = [name for name in splits if name not in data.splits]
    if missing or not splits:
        wanted = ", ".join(missing) or "whose name begins with test"
        raise UserError(f"{data.folder} has no split {wanted}; it has {', '.join(data.splits)}")
    return splits


def select(data: ShardSet, split: str, protocol: Protocol, ranks: Ranks = ALONE) -> Selection:
    """Selects the pictures and captions of a split. Collective. Raises UserError."""
    samples, numbers, listed = ranks.all(lambda: _pictures(data, split, protocol))

    def read(chunk: range) -> list[tuple[str, tuple[str, ...], dict[str, Any]]]:
        found = [(number, _read(samples, split, number)) for number in numbers[chunk.start : chunk.stop]]
        for _, sample in found:
            check_attributes(sample, split, data, protocol)
        return [(s.key, _captions(s, split, protocol, listed.get(number)), s.attributes) for number, s in found]

    keys, captions, attributes = zip(*(row for part in ranks.map(len(numbers), read) for row in part), strict=True)
    return Selection(split, samples, tuple(numbers), keys, captions, attributes)


def is_scene(about: Mapping[str, Any]) -> bool:
    """Whether attributes are those of a rendered scene."""
    return "objects" in about and "relation" in about


def has_styles(about: Mapping[str, Any]) -> bool:
    """Whether attributes are those of a picture in a set with several styles."""
    return "style" in about


_ATTRIBUTES = {
    "scenes": (is_scene, "`objects` and `relation`", "scenes"),
    "styles": (has_styles, "`style`", "openmoji --styles color black"),
}
"""Network -> whether a picture has the attributes that metrics with this network need, which these are, and the command
of tools/shard.py that writes such sets."""


def check_attributes(sample: Sample, split: str, data: ShardSet, protocol: Protocol) -> None:
    """Raises UserError if a metric of the protocol needs attributes that the sample lacks."""
    for metric, network in protocol.wanted:
        has, names, command = _ATTRIBUTES.get(network, (None, "", ""))
        if has and not has(sample.attributes):
            raise UserError(
                f"{data.folder}: protocol {protocol.name} measures {metric}, which needs the attributes {names} of each "
                f"picture, but the json of {sample.key} in {split} lacks them. Evaluate on a set that tools/shard.py "
                f"{command} wrote, or with another protocol, such as --protocol held-out"
            )


def _pictures(data: ShardSet, split: str, protocol: Protocol) -> tuple[Samples, list[int], dict[int, str]]:
    """The split's samples, the selected samples' numbers, and number -> caption if the protocol lists captions."""
    samples = data.samples(split)
    listed: dict[int, str] = {}
    if protocol.captions == "listed":
        numbers = list(listed := _listed(data, samples, split, protocol))
    elif protocol.captions == "first":
        numbers = list(range(min(len(samples), protocol.max_pictures)))
    elif protocol.captions == "distinct":
        numbers = list(listed := _distinct(samples, split, protocol))
    else:
        ordered = sorted((_hash(protocol, key), key, number) for number, key in enumerate(_keys(samples)))
        numbers = [number for _, _, number in ordered[: protocol.max_pictures]]
    if (count := len(numbers)) < protocol.min_pictures:
        wanted = f"protocol {protocol.name} needs at least {protocol.min_pictures:,}"
        remedy = "hold out more pictures, or use another protocol"
        raise UserError(f"{data.folder}: {split} has {count:,} pictures, but {wanted}; {remedy}")
    return samples, numbers, listed


def _distinct(samples: Samples, split: str, protocol: Protocol) -> dict[int, str]:
    """Number of a picture -> the caption that it is selected with."""
    selected: dict[int, str] = {}
    used: set[str] = set()
    for number in range(len(samples)):
        if len(selected) == protocol.max_pictures:
            break
        sample = _read(samples, split, number)
        if fresh := [caption for caption in sample.captions if caption not in used]:
            selected[number] = " ".join(fresh[_hash(protocol, f"{sample.key} caption") % len(fresh)].split())
            used.add(selected[number])
    return selected


def has_listed(data: ShardSet, protocol: Protocol) -> bool:
    """Whether a set has the keys of all pictures that a protocol lists."""
    if not set(protocol.splits) <= set(data.splits):
        return False
    listed = protocol.listed()
    return all({key for key, _ in listed[split]} <= set(_keys(data.samples(split))) for split in protocol.splits)


def _keys(samples: Samples) -> list[str]:
    try:
        return [key for shard in range(len(samples.shards.sizes)) for key in samples.shards.open(shard)[1].keys]
    except (OSError, DataError) as error:
        raise UserError(f"the keys of the samples cannot be read: {error}") from None


def _listed(data: ShardSet, samples: Samples, split: str, protocol: Protocol) -> dict[int, str]:
    number_of = {key: number for number, key in enumerate(_keys(samples))}
    listed = protocol.listed().get(split, [])
    missing = [key for key, _ in listed if key not in number_of]
    if missing:
        by = f"protocol {protocol.name} version {protocol.version} lists ({', '.join(missing[:3])}, ...): {_REMEDY}"
        raise UserError(f"{data.folder}: {split} lacks {len(missing)} of the {len(listed)} pictures that {by}")
    return {number_of[key]: caption for key, caption in listed}


def _captions(sample: Sample, split: str, protocol: Protocol, listed: str | None) -> tuple[str, ...]:
    captions = sample.captions
    if listed is not None:
        for caption in captions:
            if " ".join(caption.split()) == listed:
                return (caption,)
        given = f"{split}: {sample.key} has the caption {captions[0]!r}"
        raise UserError(f"{given}, but protocol {protocol.name} lists {listed!r}: {_REMEDY}")
    if protocol.captions == "hash":
        return (captions[_hash(protocol, f"{sample.key} caption") % len(captions)],)
    return tuple(captions[number % len(captions)] for number in range(protocol.captions_per_picture))


def _hash(protocol: Protocol, key: str) -> int:
    """64 bits of the SHA-256 of the protocol's name and a key. New versions of a protocol select the same pictures."""
    return int.from_bytes(hashlib.sha256(f"{protocol.name} {key}".encode()).digest()[:8], "big")


def _read(samples: Samples, split: str, number: int) -> Sample:
    try:
        return samples[number]
    except (BadSample, DataError) as error:
        raise UserError(f"{split}: a sample of the protocol cannot be used: {error}; write the set again") from None
