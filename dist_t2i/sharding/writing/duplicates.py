"""Finds duplicate pictures before shards are planned, so that the result does not depend on the number of processes.

**exact**: duplicates have the same bytes (SHA-256). Only files of equal size are read.

**perceptual**: duplicates have nearly the same pixels. Each picture is decoded and shrunk to 9 x 8 pixels. The signs of
the 64 differences between horizontal neighbors are the hash of the picture (dHash: N. Krawetz, "Kind of like that",
2013). Two pictures are duplicates if at most `MAX_BITS` signs differ, and the mean color of each quarter differs by at
most `MAX_COLOR` levels. Without the colors, all plain pictures would be duplicates, because plain pictures have similar
hashes. Re-encoded, shrunk and slightly retouched pictures are found; cropped, mirrored and rotated pictures are not.

One picture of each group of duplicates is kept, and all others are listed as problems. Of a held-out and a training
picture, the held-out picture is kept, so that no held-out picture is trained on. Within a split, the picture with the
first key is kept. The kept picture gets the captions of its exact duplicates in the same split.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dist_t2i.sharding.items import Item, Problem
from dist_t2i.sharding.pictures import Picture
from dist_t2i.sharding.writing.processes import advance, in_processes
from dist_t2i.utils.progress import Progress

MAX_BITS, MAX_COLOR = 3, 10
_BAND = 16
"""The number of bits in each of the four bands of a hash. Two hashes that differ in at most three bits have at least
one equal band, so only pictures with an equal band are compared."""
_PART = 64


def without_duplicates(items: Sequence[Item], kind: str, problems: list[Problem], processes: int) -> list[Item]:
    """The items without duplicates of one `kind` (exact or perceptual). Adds the duplicates to `problems`."""
    print(f"looking for duplicates among {len(items):,} pictures", file=sys.stderr)
    ranked = sorted(items, key=lambda item: (item.split == "train", item.key))
    pairs = _exact(ranked, processes) if kind == "exact" else _perceptual(ranked, processes)
    for item, original in pairs:
        problems.append(Problem(f"repeats {original.key}", item.key, "picture repeats another"))
        if kind == "exact" and item.split == original.split:
            original.captions.extend(text for text in item.captions if text not in original.captions)
    print(f"{len(pairs):,} pictures repeat another picture", file=sys.stderr)
    dropped = {item.key for item, _ in pairs}
    return [item for item in items if item.key not in dropped]


def _exact(items: Sequence[Item], processes: int) -> list[tuple[Item, Item]]:
    """Pairs (duplicate, original) of items whose pictures have the same bytes."""
    sizes: dict[int, list[Item]] = {}
    for item in items:
        with contextlib.suppress(OSError):  # the picture will be listed as a problem when its shard is written
            sizes.setdefault(item.picture.stat()[0], []).append(item)
    candidates = [item for size, alike in sizes.items() if len(alike) > 1 or not size for item in alike]
    digests = _of_all(candidates, _sha256, processes)
    originals: dict[bytes, Item] = {}
    known = [item for item in items if item.key in digests]
    pairs = [(item, originals.setdefault(digests[item.key], item)) for item in known]
    return [(item, original) for item, original in pairs if original is not item]


def _perceptual(items: Sequence[Item], processes: int) -> list[tuple[Item, Item]]:
    """Pairs (duplicate, original) of items whose pictures have nearly the same pixels."""
    looks = _of_all(items, look_of, processes)
    bands: dict[tuple[int, int], list[int]] = {}
    pairs = []
    for number, item in enumerate(items):
        if (look := looks.get(item.key)) is None:
            continue
        keys = [(band, look[0] >> band * _BAND & 2**_BAND - 1) for band in range(4)]
        candidates = {other for key in keys for other in bands.get(key, ())}
        original = min((other for other in candidates if _near(look, looks[items[other].key])), default=None)
        if original is not None:
            pairs.append((item, items[original]))
            continue
        for key in keys:
            bands.setdefault(key, []).append(number)
    return pairs


def _near(a: tuple[int, bytes], b: tuple[int, bytes]) -> bool:
    if (a[0] ^ b[0]).bit_count() > MAX_BITS:
        return False
    return all(abs(x - y) <= MAX_COLOR for x, y in zip(a[1], b[1], strict=True))


def _of_all(items: Sequence[Item], work: Callable[[bytes], Any], processes: int) -> dict[str, Any]:
    """Key -> the result of `work` on the bytes of the picture. Leaves out unreadable pictures and results of None."""
    parts = [items[start : start + _PART] for start in range(0, len(items), _PART)]
    calls = [([item.picture for item in part], work) for part in parts]
    results = in_processes(_of_part, calls, processes, Progress(len(items)))
    return {
        item.key: result
        for part, part_results in zip(parts, results, strict=True)
        for item, result in zip(part, part_results, strict=True)
        if result is not None
    }


def _of_part(pictures: Sequence[Picture], work: Callable[[bytes], Any]) -> list[Any]:
    results = []
    for picture in pictures:
        advance()
        try:
            results.append(work(picture.read()))
        except OSError:
            results.append(None)
    return results


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def look_of(data: bytes) -> tuple[int, bytes] | None:
    """The difference hash (64 bits) and the mean RGB of each quarter (12 bytes); None if `data` does not decode."""
    import numpy as np
    from PIL import Image

    from dist_t2i.data.images import PictureError, decode

    try:
        picture = Image.fromarray(decode(data, at_least=64))
    except PictureError:
        return None
    gray = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX))
    bits = int.from_bytes(np.packbits(gray[:, :-1] < gray[:, 1:]).tobytes(), "big")
    return bits, picture.resize((2, 2), Image.Resampling.BOX).tobytes()
