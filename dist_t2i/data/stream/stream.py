"""The training stream: a webdataset pipeline whose source follows an order of ours, in DataLoader workers.

    source (order, shards) -> your stages -> decode -> choose a caption -> augment -> batch

The source yields webdataset samples (`__key__`, `__url__`, extension -> bytes) with `__position__`, the place in the
global stream. Everything drawn at random is a function of (seed, position), so the n-th batch of a run is the same
for any number of ranks, workers and restarts. Stopping is dropping the stream, resuming is opening one elsewhere.

A sample that cannot be read or decoded is replaced by the next good one of its shard (then of the following shards),
recorded, and counted: `data.on_bad`, `data.max_bad_fraction`.

Where `edit` is configured, each sample has a source picture beside it (neighbours.py), which your stages do not see.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from dist_t2i.config.sections import Config
from dist_t2i.data.open_data import open_data
from dist_t2i.data.shard_set import Shards, ShardSet
from dist_t2i.data.stream.batch import SMALL_BYTES, Batch, caption_id
from dist_t2i.data.stream.buffers import Buffers
from dist_t2i.data.stream.decode_stage import Decode
from dist_t2i.data.stream.edit_pairs import SourceChoice, source_choice
from dist_t2i.data.stream.mixture import Mixture
from dist_t2i.data.stream.order import Order, draw
from dist_t2i.data.stream.reader import BadRecord, Plan, Source, Stage
from dist_t2i.data.stream.workers import Failure, WorkerPool
from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.errors import DataError

_CAPTION, _FLIP = 100, 101
"""Purposes of `draw`; those of decoding.py follow them."""


class Choose:
    """Stage: one of the `captions` as `caption`, and the `image` mirrored on every other visit."""

    def __init__(self, config: Config) -> None:
        self.seed, self.flip = config.train.seed, config.data.flip

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            position, captions = sample["__position__"], sample["captions"]
            sample["caption"] = captions[draw(self.seed, position, _CAPTION) % len(captions)]
            if self.flip and draw(self.seed, position, _FLIP) & 1:
                for picture in (sample["image"], *([sample["source"]] if "source" in sample else [])):
                    picture.copy_(picture.flip(-1))
            yield sample


class Collate:
    """Last stage: micro-batches, checked to hold the positions that the plan asks for."""

    def __init__(self, source: Source, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.source, self.tokenizer, self.max_tokens = source, tokenizer, max_tokens

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[tuple[Batch, list[BadRecord]]]:
        sequence, rows = self.source.first, self.source.plan.rows
        expected = self.source.plan.positions(sequence)
        held: list[dict[str, Any]] = []
        for sample in samples:
            if sample["__position__"] != expected[len(held)]:
                raise DataError(
                    f"a stage of the data pipeline dropped or moved position {expected[len(held)]}: stages must yield "
                    "one sample for each they get, in order"
                )
            held.append(sample)
            if len(held) == rows:
                bad, self.source.bad[:] = list(self.source.bad), []
                yield self.batch(held), bad
                sequence += self.source.step
                expected, held = self.source.plan.positions(sequence), []

    def batch(self, samples: list[dict[str, Any]]) -> Batch:
        captions = [sample["caption"] for sample in samples]
        tokens, lengths = self.tokenizer.encode(captions, self.max_tokens)
        return Batch(
            images=samples[0]["images"],
            tokens=tokens,
            lengths=lengths,
            image_ids=torch.tensor([sample["__id__"] for sample in samples]),
            caption_ids=torch.tensor([caption_id(caption) for caption in captions]),
            positions=torch.tensor([sample["__position__"] for sample in samples]),
            captions=captions,
            keys=[sample["__key__"] for sample in samples],
            **self._sources(samples),
        )

    def _sources(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "sources" not in samples[0]:
            return {}
        ids = torch.tensor([sample["source_id"] for sample in samples])
        return {"sources": samples[0]["sources"], "source_ids": ids}


def order_of(shards: Shards, config: Config) -> Order | Mixture:
    """The order that a configuration asks for over these shards."""
    data, seed = config.data, config.train.seed
    if not data.weights:
        return Order(shards.sizes, seed, data.shuffle_window, data.shuffle_shards)
    parts = [Order(sizes, seed + i, data.shuffle_window, data.shuffle_shards) for i, sizes in enumerate(shards.parts())]
    return Mixture(parts, data.weights, seed)


class Pipeline(torch.utils.data.IterableDataset):
    """The pipeline of one worker; yields (Batch, records of replaced samples), or one Failure and nothing more."""

    def __init__(
        self,
        shards: Shards,
        plan: Plan,
        config: Config,
        tokenizer: Tokenizer,
        stages: Sequence[Stage],
        choice: SourceChoice | None = None,
    ) -> None:
        self.shards, self.plan, self.config, self.tokenizer, self.stages = shards, plan, config, tokenizer, list(stages)
        self.choice = choice
        self.first = 0
        self.lane = 0, 1
        """Which worker of how many this is; set before each is started."""
        self.buffers: Buffers | None = None
        """Memory that it shares with its parent; likewise."""

    def new_buffers(self, waiting: int) -> Buffers | None:
        """For a worker of which so many batches may wait for the parent; None where batches are small.

        Four more than wait: one in the making, one in the parent's hands, and two that it may hold meanwhile.
        """
        data = self.config.data
        size = self.plan.rows * data.image_size**2 * 3
        pictures = 2 if self.config.edit.width else 1
        return Buffers((waiting + 4) * pictures, size) if size > SMALL_BYTES else None

    def stream(self, worker: int, workers: int) -> Iterator[tuple[Batch, list[BadRecord]]]:
        import webdataset

        data = self.config.data
        order = order_of(self.shards, self.config)
        source = Source(self.shards, order, self.plan, self.first + worker, workers)
        source.strict, source.choice = data.on_bad == "strict", self.choice
        return iter(
            webdataset.DataPipeline(
                source,
                *self.stages,
                Decode(source, self.stages, self.config, order.samples, shared=data.workers > 0, buffers=self.buffers),
                Choose(self.config),
                Collate(source, self.tokenizer, data.max_tokens),
            )
        )

    def __iter__(self) -> Iterator[Any]:
        try:
            stream = self.stream(*self.lane)
            while True:
                with secured():
                    item = next(stream)
                yield item
        except DataError as error:
            yield Failure(str(error))


@contextlib.contextmanager
def secured() -> Iterator[None]:
    """WDS_SECURE=1 for a while: whatever stage a user inserts, webdataset opens no pickles and runs no commands."""
    from webdataset import utils

    before, utils.enforce_security = utils.enforce_security, True
    try:
        yield
    finally:
        utils.enforce_security = before


class Stream:
    """An endless iterator over Batch. `bad_counts` counts the replaced samples of this rank by reason."""

    def __init__(self, pipeline: Pipeline, config: Config, allowance: int, bad_file: str | None) -> None:
        self._pool = WorkerPool(pipeline, config.data.workers)
        self._limit, self._allowance, self._bad_file = config.data.max_bad_fraction, allowance, bad_file
        self._seen = 0
        self.bad_counts: Counter[str] = Counter()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        """Raises DataError when a sample is bad under `strict`, or too many were."""
        batch, bad = self._pool.next()
        self._seen += len(batch)
        if bad:
            self._record(bad)
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def close(self) -> None:
        """End the workers at once; the stream yields no more. Safe to call twice."""
        self._pool.close()

    def _record(self, bad: list[BadRecord]) -> None:
        import json

        self.bad_counts.update(record.reason for record in bad)
        if self._bad_file:
            lines = "".join(json.dumps(vars(record), ensure_ascii=False) + "\n" for record in bad)
            with open(self._bad_file, "a", encoding="utf-8") as file:
                file.write(lines)
        count = sum(self.bad_counts.values())
        if count > self._limit * max(self._seen, self._allowance):
            worst = bad[-1]
            raise DataError(
                f"{count} of the {self._seen} samples seen could not be used, more than data.max_bad_fraction "
                f"({self._limit:g}) allows; the last one: {worst.key} of {worst.shard}: {worst.reason}. "
                f"Mend or rewrite the set{f' (all are listed in {self._bad_file})' if self._bad_file else ''}"
            )


def open_stream(
    config: Config,
    tokenizer: Tokenizer,
    *,
    split: str = "train",
    rank: int = 0,
    world_size: int = 1,
    start_images: int = 0,
    bad_file: str | os.PathLike[str] | None = None,
    stages: Sequence[Stage] = (),
    data_set: ShardSet | None = None,
) -> Stream:
    """The micro-batches of one rank from position `start_images` on, endlessly, in the order of `rows_of_rank`.

    Args:
        bad_file: where replaced samples are listed, one JSON object a line, appended.
        stages: webdataset stages between the source and the decoder, such as `wds.map(f)`; one out for one in.
        data_set: the set, when it is open already; else that of `config.data.train`.

    Raises: DataError when the set cannot be read or the batch does not divide; later, see `Stream.__next__`.
    """
    import webdataset  # noqa: F401  before the workers are forked, so that each need not

    data_set = data_set or open_data(config.data)
    shards = data_set.shards(split)
    samples = sum(shards.sizes)
    if samples == 0:
        raise DataError(f"the split {split!r} of {data_set.folder} is empty")
    batch, parts = config.train.global_batch, world_size * config.engine.accumulation
    if batch % (2 * parts):
        raise DataError(
            f"train.global_batch {batch} must be an even number for each of the {world_size} ranks x "
            f"{config.engine.accumulation} micro-batches: a multiple of {2 * parts}"
        )
    plan = Plan(rank, world_size, batch, config.engine.accumulation, start_images)
    choice = source_choice(shards, config) if config.edit.width else None
    pipeline = Pipeline(shards, plan, config, tokenizer, stages, choice)
    return Stream(pipeline, config, -(-samples // world_size), os.fspath(bad_file) if bad_file else None)
