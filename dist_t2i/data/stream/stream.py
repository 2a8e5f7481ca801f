"""The training stream: a webdataset pipeline over samples in our own order, in DataLoader workers.

    read (order, shards) -> your stages -> decode -> choose a caption -> batch

The reader yields webdataset samples (`__key__`, `__url__`, extension -> bytes) with `__position__`, their position in the
global stream. All randomness is a function of (seed, position), so the n-th batch of a run does not depend on the number of
ranks, workers and restarts. To stop, close the stream; to resume, open one at another position.

A sample that cannot be read or decoded is replaced by the next good one of its shard (then of the following shards),
recorded, and counted: `data.on_bad`, `data.max_bad_fraction`.

If `edit` is configured, each sample has a source (edit_pairs.py), which your stages do not process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dist_t2i.config.sections import DataConfig, EditConfig
from dist_t2i.data.open_data import open_data
from dist_t2i.data.shard_set import Shards, ShardSet
from dist_t2i.data.stream.batch import SMALL_BYTES, Batch, caption_id
from dist_t2i.data.stream.buffers import Buffers
from dist_t2i.data.stream.caption_stage import ChooseCaption
from dist_t2i.data.stream.decode_stage import Decode
from dist_t2i.data.stream.edit_pairs import SourceChoice, source_choice
from dist_t2i.data.stream.mixture import Mixture
from dist_t2i.data.stream.order import Order, Plan
from dist_t2i.data.stream.reader import SampleReader, Stage
from dist_t2i.data.stream.workers import Failure, WorkerPool
from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.errors import DataError


@dataclass(frozen=True)
class BadRecord:
    """A replaced sample: a line of bad_samples.jsonl."""

    position: int
    shard: str
    key: str
    reason: str
    replaced_by: str


class Collate:
    """Last stage: micro-batches and the records of their replaced samples.

    Raises DataError if the positions are not those of the plan.
    """

    def __init__(self, reader: SampleReader, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._reader, self._tokenizer, self._max_tokens = reader, tokenizer, max_tokens

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[tuple[Batch, list[BadRecord]]]:
        sequences = itertools.count(self._reader.first, self._reader.step)
        expected = itertools.chain.from_iterable(map(self._reader.plan.positions, sequences))
        collected: list[dict[str, Any]] = []
        for sample, position in zip(samples, expected, strict=False):
            if sample["__position__"] != position:
                raise DataError(
                    f"a stage of the data pipeline dropped or moved position {position}: stages must yield one sample for "
                    "each they get, in order"
                )
            collected.append(sample)
            if len(collected) == self._reader.plan.rows:
                yield self._batch(collected), [_record(sample) for sample in collected if "__bad__" in sample]
                collected = []

    def _batch(self, samples: list[dict[str, Any]]) -> Batch:
        captions = [sample["caption"] for sample in samples]
        tokens, lengths = self._tokenizer.encode(captions, self._max_tokens)
        edited = "sources" in samples[0]
        return Batch(
            images=samples[0]["images"],
            tokens=tokens,
            lengths=lengths,
            image_ids=torch.tensor([sample["__id__"] for sample in samples]),
            caption_ids=torch.tensor([caption_id(caption) for caption in captions]),
            positions=torch.tensor([sample["__position__"] for sample in samples]),
            captions=captions,
            keys=[sample["__key__"] for sample in samples],
            sources=samples[0]["sources"] if edited else None,
            source_ids=torch.tensor([sample["source_id"] for sample in samples]) if edited else None,
        )


def _record(sample: dict[str, Any]) -> BadRecord:
    bad = sample["__bad__"]
    return BadRecord(sample["__position__"], bad.shard, bad.key, bad.reason, replaced_by=sample["__key__"])


def order_of(shards: Shards, data: DataConfig, seed: int) -> Order | Mixture:
    """The order over these shards that the configuration requests."""
    if not data.weights:
        return Order(shards.sizes, seed, data.shuffle_window, data.shuffle_shards)
    parts = [Order(sizes, seed + i, data.shuffle_window, data.shuffle_shards) for i, sizes in enumerate(shards.parts())]
    return Mixture(parts, data.weights, seed)


@dataclass(frozen=True, eq=False)
class Pipeline(torch.utils.data.IterableDataset):
    """The stages of one worker, which computes every `step`-th micro-batch from `first` on.

    Iterates over pairs of a Batch and the records of its replaced samples. A DataError becomes a Failure, the last item.
    """

    shards: Shards
    plan: Plan
    data: DataConfig
    seed: int
    tokenizer: Tokenizer
    stages: Sequence[Stage] = ()
    choice: SourceChoice | None = None
    first: int = 0
    step: int = 1
    buffers: Buffers | None = None
    """Memory that the worker shares with its parent."""

    def of_worker(self, first: int, step: int, waiting: int = 0) -> Pipeline:
        """The pipeline of a worker of which `waiting` batches may wait for the parent; 0 without shared buffers.

        It gets buffers for four more batches: one being filled, one in the parent's hands, and two that the parent may keep.
        """
        size = self.plan.rows * self.data.image_size**2 * 3
        pictures = 1 if self.choice is None else 2
        buffers = Buffers((waiting + 4) * pictures, size) if waiting and size > SMALL_BYTES else None
        return replace(self, first=first, step=step, buffers=buffers)

    def __iter__(self) -> Iterator[Any]:
        import webdataset

        try:
            order = order_of(self.shards, self.data, self.seed)
            strict = self.data.on_bad == "strict"
            reader = SampleReader(self.shards, order, self.plan, self.first, self.step, strict, self.choice)
            decode = Decode(reader, self.stages, self.data, self.seed, self.buffers)
            choose = ChooseCaption(self.seed, self.data.flip)
            collate = Collate(reader, self.tokenizer, self.data.max_tokens)
            stream = iter(webdataset.DataPipeline(reader, *self.stages, decode, choose, collate))
            while True:
                with secured():
                    item = next(stream)
                yield item
        except DataError as error:
            yield Failure(str(error))


@contextlib.contextmanager
def secured() -> Iterator[None]:
    """Sets WDS_SECURE=1 inside: no stage of a user makes webdataset open pickles or run commands."""
    from webdataset import utils

    before, utils.enforce_security = utils.enforce_security, True
    try:
        yield
    finally:
        utils.enforce_security = before


class Stream:
    """An endless iterator over Batch. `bad_counts` counts the replaced samples of this rank by reason."""

    def __init__(self, pipeline: Pipeline, allowance: int, bad_file: str | None) -> None:
        self._pool = WorkerPool(pipeline.of_worker, pipeline.data.workers)
        self._limit, self._allowance, self._bad_file = pipeline.data.max_bad_fraction, allowance, bad_file
        self._seen = 0
        self.bad_counts: Counter[str] = Counter()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        """Raises DataError for a bad sample if `data.on_bad` is strict, and if too many samples were bad."""
        batch, bad = self._pool.next()
        self._seen += len(batch)
        if bad:
            self._record(bad)
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def close(self) -> None:
        """Ends the workers at once, and the stream with them. May be called twice."""
        self._pool.close()

    def _record(self, bad: list[BadRecord]) -> None:
        self.bad_counts.update(record.reason for record in bad)
        if self._bad_file:
            lines = "".join(json.dumps(vars(record), ensure_ascii=False) + "\n" for record in bad)
            with open(self._bad_file, "a", encoding="utf-8") as file:
                file.write(lines)
        count = sum(self.bad_counts.values())
        if count > self._limit * max(self._seen, self._allowance):
            last = bad[-1]
            raise DataError(
                f"{count} of the {self._seen} samples seen could not be used, more than data.max_bad_fraction "
                f"({self._limit:g}) allows; the last one: {last.key} of {last.shard}: {last.reason}. "
                f"Mend or rewrite the set{f' (all are listed in {self._bad_file})' if self._bad_file else ''}"
            )


def open_stream(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    global_batch: int,
    accumulation: int = 1,
    edit: EditConfig | None = None,
    split: str = "train",
    rank: int = 0,
    world_size: int = 1,
    start_images: int = 0,
    bad_file: str | os.PathLike[str] | None = None,
    stages: Sequence[Stage] = (),
    data_set: ShardSet | None = None,
) -> Stream:
    """The micro-batches of one rank from position `start_images` on, endlessly, in the order of `Plan`.

    Args:
        accumulation: micro-batches of each rank per step.
        edit: adds sources to the batches if its `width` is not 0.
        bad_file: a file to which replaced samples are appended, one JSON object per line.
        stages: webdataset stages between the reader and the decoder, such as `wds.map(f)`; they yield one sample for each.
        data_set: the set of `data.train`, if it is open already.

    Raises: DataError if the set cannot be read or the batch is not divisible; later, see `Stream.__next__`.
    """
    import webdataset  # noqa: F401  before the fork of the workers, so that they need not import it

    data_set = data_set or open_data(data)
    shards = data_set.shards(split)
    samples = sum(shards.sizes)
    if samples == 0:
        raise DataError(f"the split {split!r} of {data_set.folder} is empty")
    parts = world_size * accumulation
    if global_batch % (2 * parts):
        raise DataError(
            f"train.global_batch {global_batch} must be an even number for each of the {world_size} ranks x "
            f"{accumulation} micro-batches: a multiple of {2 * parts}"
        )
    plan = Plan(rank, world_size, global_batch, accumulation, start_images)
    choice = source_choice(shards, edit, seed) if edit and edit.width else None
    pipeline = Pipeline(shards, plan, data, seed, tokenizer, list(stages), choice)
    return Stream(pipeline, -(-samples // world_size), os.fspath(bad_file) if bad_file else None)
