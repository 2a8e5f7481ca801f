"""The stage that turns bytes into pictures of the training's size, in the memory that their batch will have."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from dist_t2i.config.sections import Config
from dist_t2i.data.images import PictureError, Scratch, decode, square
from dist_t2i.data.shard_set import BadSample, captions_of, picture_of
from dist_t2i.data.stream.batch import SMALL_BYTES
from dist_t2i.data.stream.buffers import Buffers
from dist_t2i.data.stream.edit_pairs import NONE
from dist_t2i.data.stream.order import draw
from dist_t2i.data.stream.reader import BadRecord, Source, Stage

REMEMBERED_BYTES = 128 * 2**20
"""A split whose decoded pictures fit in this is decoded once per worker and kept."""
_SHARE, _ACROSS, _DOWN = 102, 103, 104
"""Purposes of `draw`; those of stream.py come before them."""


class Decode:
    """Stage: adds `image` (uint8 [3, S, S]) and `captions`, and draws the crop; replaces what does not decode."""

    def __init__(
        self,
        source: Source,
        before: Sequence[Stage],
        config: Config,
        samples: int,
        shared: bool = False,
        buffers: Buffers | None = None,
    ) -> None:
        self.source, self.before = source, before
        slots = functools.partial(Slots, source.plan.rows, config.data.image_size, shared, buffers)
        self._slots = slots()
        self._source_slots = slots() if config.edit.width else None
        self._scratch = Scratch()
        self.size, self.crop, self.seed = config.data.image_size, config.data.crop, config.train.seed
        fits = samples * 3 * self.size**2 <= REMEMBERED_BYTES
        self._remembered: dict[Any, Any] | None = {} if fits and self.crop >= 1 and not before else None

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            decoded = None
            while decoded is None:
                try:
                    decoded = self._decoded(sample)
                except BadSample as error:
                    sample = self._staged(self.source.replacement(sample, error))
            if "__bad__" in sample:
                first, position = sample["__bad__"], sample["__position__"]
                self.source.bad.append(
                    BadRecord(position, first.shard, first.key, first.reason, replaced_by=sample["__key__"])
                )
            yield decoded

    def _staged(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A replacement after the stages that the others went through."""
        import webdataset

        return next(iter(webdataset.DataPipeline(lambda: iter([sample]), *self.before)))

    def _decoded(self, sample: dict[str, Any]) -> dict[str, Any]:
        where, slot = sample["__row__"], self._slots.next()
        if self._remembered is not None and where in self._remembered:
            image, captions = self._remembered[where]
            slot.copy_(image)
        else:
            captions = captions_of(sample)[0]
            self._picture(sample, slot)
            if self._remembered is not None:
                self._remembered[where] = slot.clone(), captions
        self._slots.taken()
        decoded = sample | {"image": slot, "images": self._slots.images, "captions": captions}
        return decoded if self._source_slots is None else decoded | self._source(decoded, self._source_slots)

    def _source(self, sample: dict[str, Any], slots: Slots) -> dict[str, Any]:
        """The picture that this one is an edit of, cut out at the same place; its own where the other does not decode."""
        source, slot = sample["__source__"], slots.next()
        number = NONE if source is None else source["__id__"]
        if number == NONE:
            slot.zero_()
        elif number == sample["__id__"] or not self._other_picture(source, slot):
            number = sample["__id__"]
            slot.copy_(sample["image"])
        slots.taken()
        return {"source": slot, "sources": slots.images, "source_id": number}

    def _other_picture(self, source: dict[str, Any], slot: torch.Tensor) -> bool:
        """Whether a neighbour's picture could be put into the slot."""
        where, known = source["__row__"], self._remembered
        if known is not None and where in known:
            slot.copy_(known[where][0])
            return True
        try:
            self._picture(source, slot)
        except BadSample:
            return False
        return True

    def _picture(self, sample: dict[str, Any], slot: torch.Tensor) -> None:
        _, data = picture_of(sample)
        shard = os.path.basename(sample["__url__"])
        try:
            if self.crop >= 1:
                square(decode(data, self.size, self._scratch), self.size, out=slot)
                return
            share, across, down = (self._uniform(sample, purpose) for purpose in (_SHARE, _ACROSS, _DOWN))
            share = self.crop + (1 - self.crop) * share
            pixels = decode(data, int(self.size / self.crop) + 1, self._scratch)
            square(pixels, self.size, share=share, across=across, down=down, out=slot)
        except PictureError as error:
            raise BadSample(shard, sample["__key__"], f"picture {error}") from error

    def _uniform(self, sample: dict[str, Any], purpose: int) -> float:
        return draw(self.seed, sample["__position__"], purpose) / 2**64


class Slots:
    """The memory of one micro-batch after another: every picture is decoded to its final place, and nothing is copied.

    Channels are last in memory, as the networks want them. In a loader worker the memory is shared with the parent: one
    of the buffers between them where there are any and one is free.
    """

    def __init__(self, rows: int, size: int, shared: bool = False, buffers: Buffers | None = None) -> None:
        self._shape, self._shared = (rows, size, size, 3), shared and rows * size * size * 3 > SMALL_BYTES
        self._buffers = buffers
        self._taken = rows
        self.images = torch.empty(0)
        """uint8 [m, 3, H, W], the micro-batch that is being filled."""

    def next(self) -> torch.Tensor:
        """uint8 [3, H, W], where the next picture goes; the same one again until `taken`."""
        if self._taken == self._shape[0]:
            self._taken = 0
            self.images = self._memory().view(self._shape).permute(0, 3, 1, 2)
        return self.images[self._taken]

    def taken(self) -> None:
        """The slot is filled."""
        self._taken += 1

    def _memory(self) -> torch.Tensor:
        buffer = self._buffers.take() if self._buffers else None
        if buffer is not None:
            return buffer
        size = math.prod(self._shape)
        if not self._shared:
            return torch.empty(size, dtype=torch.uint8)
        return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
