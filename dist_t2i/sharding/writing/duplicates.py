"""Pictures that are there twice, found before shards are planned, so that the same ones go whoever works.

**exact**: the same bytes (sha256). Only files of equal size are read.

**perceptual**: nearly the same pixels. Each picture is decoded and shrunk to 9 x 8; the signs of the 64 differences
between neighbours in a row are its hash, and its colours in four quarters go along, for plain pictures differ in
nothing else. Two pictures are duplicates when at most `MAX_BITS` signs and `MAX_COLOUR` levels of any colour differ: what
re-encoding, shrinking and slight retouching leave; crops, mirror images and rotations are not found.

Of duplicates the first by (held-out splits first, then key) stays, so that no held-out picture is trained on; the
others are listed with what they repeat. A picture that repeats one of its own split to the byte leaves it its captions.

The difference hash is the one that photo tools call dHash (N. Krawetz, "Kind of like that", 2013).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from dist_t2i.sharding.items import Item, Problem
from dist_t2i.sharding.pictures import Origin
from dist_t2i.sharding.writing.processes import Spread, advance

MAX_BITS, MAX_COLOUR = 3, 10
_BAND = 16
"""Bits to a band: of four bands, one at least is equal when three bits or fewer differ."""
_PART = 64


def without_duplicates(items: Sequence[Item], kind: str, problems: list[Problem], spread: Spread) -> list[Item]:
    """The items whose pictures repeat no other; the rest is added to `problems`. Items keep their order."""
    ranked = sorted(items, key=lambda item: (item.split == "train", item.key))
    first = _exact(ranked, spread) if kind == "exact" else _perceptual(ranked, spread)
    dropped: set[str] = set()
    for item, original in first:
        dropped.add(item.key)
        problems.append(Problem(f"repeats {original.key}", item.key, "picture repeats another"))
        if kind == "exact" and item.split == original.split:
            original.captions.extend(text for text in item.captions if text not in original.captions)
    return [item for item in items if item.key not in dropped]


def _exact(items: Sequence[Item], spread: Spread) -> list[tuple[Item, Item]]:
    sizes: dict[int, list[Item]] = {}
    for item in items:
        try:
            sizes.setdefault(item.picture.known()[0], []).append(item)
        except OSError:  # whoever writes it will say so
            continue
    several = [item for size, alike in sizes.items() if len(alike) > 1 or not size for item in alike]
    digests = _of_all(several, _digests, spread)
    pairs, seen = [], dict[bytes, Item]()
    for item in items:
        digest = digests.get(item.key)
        if digest is not None and seen.setdefault(digest, item) is not item:
            pairs.append((item, seen[digest]))
    return pairs


def _perceptual(items: Sequence[Item], spread: Spread) -> list[tuple[Item, Item]]:
    looks = _of_all(items, _looks, spread)
    bands: dict[tuple[int, int], list[int]] = {}
    pairs = []
    for number, item in enumerate(items):
        look = looks.get(item.key)
        if look is None:
            continue
        keys = [(band, look[0] >> band * _BAND & 2**_BAND - 1) for band in range(4)]
        alike = {other for key in keys for other in bands.get(key, ())}
        original = min((other for other in alike if _near(look, looks[items[other].key])), default=None)
        if original is not None:
            pairs.append((item, items[original]))
            continue
        for key in keys:
            bands.setdefault(key, []).append(number)
    return pairs


def _near(a: tuple[int, bytes], b: tuple[int, bytes]) -> bool:
    if (a[0] ^ b[0]).bit_count() > MAX_BITS:
        return False
    return all(abs(x - y) <= MAX_COLOUR for x, y in zip(a[1], b[1], strict=True))


def _of_all(items: Sequence[Item], work: Callable, spread: Spread) -> dict[str, Any]:
    """Key -> what `work` finds of each picture that can be read."""
    parts = [items[start : start + _PART] for start in range(0, len(items), _PART)]
    found = spread(work, [([item.picture for item in part],) for part in parts])
    return {
        item.key: one
        for part, ones in zip(parts, found, strict=True)
        for item, one in zip(part, ones, strict=True)
        if one is not None
    }


def _digests(pictures: Sequence[Origin]) -> list[bytes | None]:
    return [None if data is None else hashlib.sha256(data).digest() for data in map(_bytes, pictures)]


def _looks(pictures: Sequence[Origin]) -> list[tuple[int, bytes] | None]:
    return [None if data is None else look_of(data) for data in map(_bytes, pictures)]


def _bytes(picture: Origin) -> bytes | None:
    advance()
    try:
        return picture.read()
    except OSError:
        return None


def look_of(data: bytes) -> tuple[int, bytes] | None:
    """The difference hash (64 bits) and the mean colours of four quarters (12 bytes); None when it does not decode."""
    from PIL import Image

    from dist_t2i.data.images import PictureError, decode

    try:
        picture = Image.fromarray(decode(data, at_least=64))
    except PictureError:
        return None
    grey = picture.convert("L").resize((9, 8), Image.Resampling.BOX).tobytes()
    bits = 0
    for row in range(8):
        for column in range(8):
            bits = bits << 1 | (grey[9 * row + column] < grey[9 * row + column + 1])
    return bits, picture.resize((2, 2), Image.Resampling.BOX).tobytes()
