"""The sample grid that a run draws now and then: fixed captions and noise, so that only the training changes it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dist_t2i.config.sections import Config
from dist_t2i.data.images import PictureError, decode, square, to_uint8, to_unit
from dist_t2i.data.shard_set import BadSample, Samples, ShardSet
from dist_t2i.data.stream.edit_pairs import Neighbors, read_captions
from dist_t2i.errors import DataError
from dist_t2i.reporting.image_grid import GridRow
from dist_t2i.training.ema import Average
from dist_t2i.utils.seeds import Purpose, mix

ROWS = 8
PER_CAPTION = 4
_TRIES = 16
"""Samples that are tried for a row of the grid."""
_PREFERRED = ("test-combinations", "test", "train")


class SampleSheet:
    """Rows of captions with their pictures. Held-out pictures stand beside, where the captions come from the set.

    Where pictures are edited, and the captions come from the set, each row shows first the picture that its others are
    made from: one of the same split with a near caption, or the caption's own.
    """

    def __init__(self, config: Config, data: ShardSet, device: torch.device):
        self._config, self._device = config, device
        self._sources: list[np.ndarray] = []
        self._real: list = [None] * len(config.report.sample_prompts)
        captions = list(config.report.sample_prompts)
        if not captions:
            split = next(name for name in (*_PREFERRED, *data.splits) if name in data.splits)
            samples = data.samples(split)
            size, count = len(samples), min(ROWS, len(samples))
            shares = [range(row * size // count, (row + 1) * size // count) for row in range(count)]
            chosen = [one for share in shares if (one := self._first_usable(samples, share)) is not None]
            if not chosen:
                raise DataError(f"{data.folder}: no sample of split {split!r} that the grid would show can be used")
            captions = [caption for _, caption, _ in chosen]
            self._real = [picture for _, _, picture in chosen]
            if config.edit.width:
                near = Neighbors(read_captions(data.shards(split)), config.edit.words)
                numbers = [near.pick(number, mix(config.train.seed, number)) for number, _, _ in chosen]
                found = [self._first_usable(samples, range(number, number + 1)) for number in numbers]
                self._sources = [one[2] if one else own[2] for one, own in zip(found, chosen, strict=True)]
        self.captions = captions
        self._tokens, self._lengths = data.tokenizer.encode(captions, config.data.max_tokens)

    def _first_usable(self, samples: Samples, share: range) -> tuple[int, str, np.ndarray] | None:
        """Number, caption and picture of a grid's row: the first of its share of the samples that can be used. Bad ones are the
        stream's to count; the grid looks at a few, and then goes without the row."""
        for number in share[:_TRIES]:
            try:
                sample = samples[number]
                return number, sample.captions[0], self._as_trained(sample.image_bytes)
            except (BadSample, PictureError):
                continue
        return None

    def _as_trained(self, picture: bytes) -> np.ndarray:
        """A real picture at the training size, so that both are judged at the same sharpness: uint8 [S, S, 3]."""
        size = self._config.data.image_size
        return square(decode(picture, size), size).permute(1, 2, 0).numpy()

    def rows(self, average: Average) -> list[GridRow]:
        """One row a caption, `PER_CAPTION` pictures each, the same noise in every row."""
        widths = self._config.model.generator.noise, self._config.model.generator.condition
        columns: list[Tensor] = []
        sources = []
        if self._sources:
            shown = torch.from_numpy(np.stack(self._sources)).permute(0, 3, 1, 2)
            sources = [to_unit(shown)]
            columns += sources
        for column in range(len(columns), PER_CAPTION):
            generator = torch.Generator().manual_seed(
                mix(self._config.train.seed, column, Purpose.NEGATIVES_AND_INFERENCE_NOISE)
            )
            drawn = torch.randn(1, sum(widths), generator=generator) * self._config.model.generator.truncation
            noise, condition = drawn.split(widths, dim=1)
            count = len(self.captions)
            inputs = (self._tokens, self._lengths, noise.expand(count, -1), condition.expand(count, -1), *sources)
            columns.append(average.generate(*(x.to(self._device) for x in inputs)).images.cpu())
        pictures = to_uint8(torch.stack(columns, dim=1))
        grid = pictures.permute(0, 1, 3, 4, 2).cpu().numpy()
        return [
            GridRow(caption, list(row), real)
            for caption, row, real in zip(self.captions, grid, self._real, strict=True)
        ]
