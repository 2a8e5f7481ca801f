"""The sample grid of a run: pictures for fixed captions and fixed noise, so that only training changes the grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_t2i.config.sections import DataConfig, EditConfig
from dist_t2i.data.images import PictureError, decode, square, to_uint8, to_unit
from dist_t2i.data.shard_set import BadSample, Samples, ShardSet
from dist_t2i.data.stream.edit_pairs import Neighbors, read_captions
from dist_t2i.errors import DataError
from dist_t2i.models.config import ModelConfig
from dist_t2i.reporting.image_grid import GridRow
from dist_t2i.training.ema import Average
from dist_t2i.utils.seeds import Purpose, mix

ROWS = 8
PER_CAPTION = 4
_TRIES = 16
"""The number of samples that are tried for one row of the grid."""
_PREFERRED = ("test-combinations", "test", "train")


class _Sample(NamedTuple):
    number: int  # in its split
    caption: str
    picture: np.ndarray  # uint8 [S, S, 3] at the training size


class SampleGrid:
    """Renders rows of generated pictures, one row for each caption.

    The captions are `texts`. If `texts` is empty, the captions come from the set, from a held-out split if possible,
    and each row also shows the real picture of its caption. If the run trains edits, a row with a caption from the set
    starts with the source picture of its edits: a picture of the same split with a similar caption, or, if this picture
    is unusable, the caption's own picture. Raises DataError if no sample of the set can be used.
    """

    def __init__(
        self, texts: Sequence[str], shards: ShardSet, data: DataConfig, model: ModelConfig, edit: EditConfig, seed: int
    ) -> None:
        self._generator, self._seed, self._captions = model.generator, seed, list(texts)
        self._real: list[np.ndarray | None] = [None] * len(texts)
        self._sources: list[np.ndarray] = []
        if not texts:
            self._take_captions(shards, data.image_size, edit)
        self._tokens, self._lengths = shards.tokenizer.encode(self._captions, data.max_tokens)

    def _take_captions(self, shards: ShardSet, side: int, edit: EditConfig) -> None:
        # One usable sample from each of `ROWS` equal parts of the split.
        split = next(name for name in (*_PREFERRED, *shards.splits) if name in shards.splits)
        samples = shards.samples(split)
        size, count = len(samples), min(ROWS, len(samples))
        parts = [range(row * size // count, (row + 1) * size // count) for row in range(count)]
        rows = [row for part in parts if (row := _first_usable(samples, part, side)) is not None]
        if not rows:
            raise DataError(f"{shards.folder}: the sample grid found no usable sample in split {split!r}")
        self._captions, self._real = [row.caption for row in rows], [row.picture for row in rows]

        if edit.width:
            near = Neighbors(read_captions(shards.shards(split)), edit.words)
            for row in rows:
                number = near.pick(row.number, mix(self._seed, row.number))
                source = _first_usable(samples, range(number, number + 1), side) or row
                self._sources.append(source.picture)

    def rows(self, average: Average) -> list[GridRow]:
        """One row of `PER_CAPTION` pictures for each caption. All rows use the same noise."""
        count, widths = len(self._captions), (self._generator.noise, self._generator.condition)
        sources = []
        if self._sources:
            sources = [to_unit(torch.from_numpy(np.stack(self._sources)).permute(0, 3, 1, 2))]
        columns: list[Tensor] = list(sources)  # [rows, 3, S, S] each
        for column in range(len(columns), PER_CAPTION):
            seed = mix(self._seed, column, Purpose.NEGATIVES_AND_INFERENCE_NOISE)
            normal = torch.randn(1, sum(widths), generator=torch.Generator().manual_seed(seed))
            noise, condition = (normal * self._generator.truncation).split(widths, dim=1)
            normals = noise.expand(count, -1), condition.expand(count, -1)
            columns.append(average.generate(*normals, self._tokens, self._lengths, *sources))
        grid = to_uint8(torch.stack(columns, dim=1)).permute(0, 1, 3, 4, 2).numpy()
        return [GridRow(*row) for row in zip(self._captions, map(list, grid), self._real, strict=True)]


def _first_usable(samples: Samples, numbers: range, side: int) -> _Sample | None:
    """The first usable sample among the first few of `numbers`, or None. Bad samples are skipped but not counted,
    because only the training stream counts bad samples."""
    for number in numbers[:_TRIES]:
        try:
            sample = samples[number]
            picture = square(decode(sample.image_bytes, side), side)
        except (BadSample, PictureError):
            continue
        return _Sample(number, sample.captions[0], picture.permute(1, 2, 0).numpy())
    return None
