"""The sample grid of a run: fixed captions and noise, so that only training changes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_t2i.config.sections import EditConfig
from dist_t2i.data.images import PictureError, decode, square, to_uint8, to_unit
from dist_t2i.data.shard_set import BadSample, Samples, ShardSet
from dist_t2i.data.stream.edit_pairs import Neighbors, read_captions
from dist_t2i.errors import DataError
from dist_t2i.models.config import GeneratorConfig
from dist_t2i.reporting.image_grid import GridRow
from dist_t2i.training.ema import Average
from dist_t2i.utils.seeds import Purpose, mix

ROWS = 8
PER_CAPTION = 4
_TRIES = 16
"""Samples tried for one row of the grid."""
_PREFERRED = ("test-combinations", "test", "train")


class _Sample(NamedTuple):
    """A sample of the set: its number in its split, first caption, and picture, uint8 [S, S, 3] at the training size."""

    number: int
    caption: str
    picture: np.ndarray


class SampleSheet:
    """Renders rows of generated pictures, one row for each caption.

    The captions are `prompts`, or come from the set, whose held-out pictures are then shown next to them. Where pictures are
    edited, a row with a caption from the set starts with the source picture of its edits: one of the same split with a near
    caption, or the caption's own. Raises DataError when no sample of the set can be used.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        data: ShardSet,
        *,
        image_size: int,
        max_tokens: int,
        generator: GeneratorConfig,
        edit: EditConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self._image_size, self._generator, self._seed, self._device = image_size, generator, seed, device
        self._captions = list(prompts)
        self._real: list[np.ndarray | None] = [None] * len(prompts)
        self._sources: list[np.ndarray] = []
        if not prompts:
            self._take_captions(data, edit)
        self._tokens, self._lengths = data.tokenizer.encode(self._captions, max_tokens)

    def _take_captions(self, data: ShardSet, edit: EditConfig) -> None:
        # One usable sample from each of `ROWS` equal parts of the split.
        split = next(name for name in (*_PREFERRED, *data.splits) if name in data.splits)
        samples = data.samples(split)
        size, count = len(samples), min(ROWS, len(samples))
        parts = [range(row * size // count, (row + 1) * size // count) for row in range(count)]
        rows = [row for part in parts if (row := self._first_usable(samples, part)) is not None]
        if not rows:
            raise DataError(f"{data.folder}: the sample grid found no usable sample in split {split!r}")
        self._captions, self._real = [row.caption for row in rows], [row.picture for row in rows]

        if edit.width:
            near = Neighbors(read_captions(data.shards(split)), edit.words)
            for row in rows:
                number = near.pick(row.number, mix(self._seed, row.number))
                source = self._first_usable(samples, range(number, number + 1)) or row
                self._sources.append(source.picture)

    def _first_usable(self, samples: Samples, numbers: range) -> _Sample | None:
        """The first usable one of a few samples. The stream counts bad samples; the grid only skips them."""
        for number in numbers[:_TRIES]:
            try:
                sample = samples[number]
                picture = square(decode(sample.image_bytes, self._image_size), self._image_size)
                return _Sample(number, sample.captions[0], picture.permute(1, 2, 0).numpy())
            except (BadSample, PictureError):
                continue
        return None

    def rows(self, average: Average) -> list[GridRow]:
        """One row for each caption, with `PER_CAPTION` pictures each and the same noise in every row."""
        count, widths = len(self._captions), (self._generator.noise, self._generator.condition)
        sources = []
        if self._sources:
            sources = [to_unit(torch.from_numpy(np.stack(self._sources)).permute(0, 3, 1, 2))]
        columns: list[Tensor] = list(sources)  # [rows, 3, S, S] each
        for column in range(len(columns), PER_CAPTION):
            seed = mix(self._seed, column, Purpose.NEGATIVES_AND_INFERENCE_NOISE)
            normal = torch.randn(1, sum(widths), generator=torch.Generator().manual_seed(seed))
            noise, condition = (normal * self._generator.truncation).split(widths, dim=1)
            inputs = (self._tokens, self._lengths, noise.expand(count, -1), condition.expand(count, -1), *sources)
            columns.append(average.generate(*(x.to(self._device) for x in inputs)).images.cpu())
        grid = to_uint8(torch.stack(columns, dim=1)).permute(0, 1, 3, 4, 2).numpy()
        return [GridRow(*row) for row in zip(self._captions, map(list, grid), self._real, strict=True)]
