"""The stage that decodes images at the training size, directly into the memory of their micro-batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import webdataset

from dist_t2i.config.sections import DataConfig
from dist_t2i.data.images import PictureError, Scratch, decode, square
from dist_t2i.data.shard_set import BadSample, captions_of, picture_of
from dist_t2i.data.stream.batch import SMALL_BYTES
from dist_t2i.data.stream.buffers import Buffers
from dist_t2i.data.stream.edit_pairs import NONE
from dist_t2i.data.stream.reader import SampleReader, Stage
from dist_t2i.utils.seeds import StreamPurpose, random_bits

REMEMBERED_BYTES = 128 * 2**20
"""If all decoded images of a split fit in this many bytes, each worker decodes every image once and keeps the
pixels."""


class Decode:
    """Stage: adds the randomly cropped `image` (uint8 [3, S, S]) and `captions`; replaces samples that do not decode.

    `image` is a row of `images` (uint8 [m, 3, S, S]), the memory of the micro-batch. `images` is complete once the last
    sample of the micro-batch is decoded. If the reader selects sources, the stage also adds `source_id`, `source` (like
    `image`) and `sources` (like `images`)."""

    def __init__(
        self, reader: SampleReader, before: Sequence[Stage], data: DataConfig, seed: int, buffers: Buffers | None = None
    ) -> None:
        """`before`: the stages between the reader and this stage, which also process each replacement."""
        self._reader, self._before = reader, before
        self._size, self._crop, self._seed = data.image_size, data.crop, seed
        self._least = self._size if self._crop >= 1 else int(self._size / self._crop) + 1
        rows, shared = reader.plan.rows, data.workers > 0
        self._memory = BatchMemory(rows, self._size, shared, buffers)
        self._source_memory = None if reader.choice is None else BatchMemory(rows, self._size, shared, buffers)
        self._scratch = Scratch()
        fits = reader.order.samples * 3 * self._size**2 <= REMEMBERED_BYTES
        self._remembers = fits and self._crop >= 1 and not before
        self._remembered: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            decoded = None
            while decoded is None:
                try:
                    decoded = self._decoded(sample)
                except BadSample as error:
                    replacement = functools.partial(iter, [self._reader.replacement(sample, error)])
                    sample = next(iter(webdataset.DataPipeline(replacement, *self._before)))
            yield decoded

    def _decoded(self, sample: dict[str, Any]) -> dict[str, Any]:
        image, captions = self._memory.row(), captions_of(sample)[0]
        self._decode_into(image, sample)
        self._memory.advance()
        decoded = sample | {"image": image, "images": self._memory.images, "captions": captions}
        return decoded if self._source_memory is None else decoded | self._source(decoded, self._source_memory)

    def _source(self, sample: dict[str, Any], memory: BatchMemory) -> dict[str, Any]:
        """The source, cropped like the sample. The sample's own image replaces a source that does not decode."""
        source, image, own = sample["__source__"], memory.row(), sample["__id__"]
        number = NONE if source is None else source["__id__"]
        if number == NONE:
            image.zero_()
        elif number != own:
            try:
                self._decode_into(image, source)
            except BadSample:
                number = own
        if number == own:
            image.copy_(sample["image"])
        memory.advance()
        return {"source": image, "sources": memory.images, "source_id": number}

    def _decode_into(self, image: torch.Tensor, sample: dict[str, Any]) -> None:
        """Decodes and crops an image, or copies its remembered pixels. Raises BadSample if decoding fails."""
        row = sample["__row__"]
        if row in self._remembered:
            image.copy_(self._remembered[row])
            return
        try:
            pixels = decode(picture_of(sample)[1], self._least, self._scratch)
        except PictureError as error:
            raise BadSample.of(sample, f"picture {error}") from error
        square(pixels, self._size, self._random_crop(sample["__position__"]), image)
        if self._remembers:
            self._remembered[row] = image.clone()

    def _random_crop(self, position: int) -> tuple[float, float, float]:
        if self._crop >= 1:
            return 1.0, 0.5, 0.5
        purposes = (StreamPurpose.CROP_SHARE, StreamPurpose.CROP_ACROSS, StreamPurpose.CROP_DOWN)
        share, across, down = (random_bits(self._seed, position, purpose) / 2**64 for purpose in purposes)
        return self._crop + (1 - self._crop) * share, across, down


class BatchMemory:
    """The memory of successive micro-batches, channels last, as the networks need it. Each image is decoded into its
    own row. Loader workers use a free shared buffer if possible, otherwise new shared memory."""

    def __init__(self, rows: int, size: int, shared: bool = False, buffers: Buffers | None = None) -> None:
        self._shape, self._buffers, self._filled = (rows, size, size, 3), buffers, rows
        self._shared = shared and math.prod(self._shape) > SMALL_BYTES
        self.images = torch.empty(0)
        """uint8 [m, 3, S, S], the micro-batch that is being filled."""

    def row(self) -> torch.Tensor:
        """The memory of the next image, uint8 [3, S, S]. Returns the same row until `advance` is called."""
        if self._filled == self._shape[0]:
            self._filled, memory = 0, self._buffers.take() if self._buffers else None
            if memory is None:
                size = math.prod(self._shape)
                storage = torch.UntypedStorage._new_shared(size) if self._shared else torch.UntypedStorage(size)
                memory = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.images = memory.view(self._shape).permute(0, 3, 1, 2)
        return self.images[self._filled]

    def advance(self) -> None:
        """Marks the current row as filled."""
        self._filled += 1
