"""The stage that selects a caption and mirrors images at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dist_t2i.utils.seeds import StreamPurpose, random_bits


class ChooseCaption:
    """Stage: adds one of the `captions` as `caption`; with `flip` mirrors `image` and `source` on every other visit."""

    def __init__(self, seed: int, flip: bool) -> None:
        self._seed, self._flip = seed, flip

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            position, captions = sample["__position__"], sample["captions"]
            if self._flip and random_bits(self._seed, position, StreamPurpose.FLIP) & 1:
                for image in (sample[name] for name in ("image", "source") if name in sample):
                    image.copy_(image.flip(-1))
            yield sample | {
                "caption": captions[random_bits(self._seed, position, StreamPurpose.CAPTION) % len(captions)]
            }
