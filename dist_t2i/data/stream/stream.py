"""The training stream: a webdataset pipeline that runs in DataLoader workers and reads in the order of order.py.

    read (order, shards) -> your stages -> decode -> choose a caption -> batch

The reader yields webdataset samples. `__position__` is the position of the sample in the global stream. If `edit` is
configured, a sample also has a source image (edit_pairs.py), which your stages do not process. All randomness is a
function of (seed, position), so the n-th batch of a run does not depend on the number of ranks, workers or restarts. To
stop, close the stream; to resume, open a new stream at the position reached. A sample that cannot be read or decoded is
replaced by the next good sample, in its shard or in the following shards. Every replacement is recorded and counted
(`data.on_bad`, `data.max_bad_fraction`).
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import webdataset

from dist_t2i.config.sections import DataConfig, EditConfig
from dist_t2i.data.manifest import problem_lines
from dist_t2i.data.open_data import open_data
from dist_t2i.data.shard_set import Shards, ShardSet
from dist_t2i.data.stream.batch import SMALL_BYTES, Batch, caption_id
from dist_t2i.data.stream.buffers import Buffers
from dist_t2i.data.stream.decode_stage import Decode
from dist_t2i.data.stream.edit_pairs import SourceChoice, source_choice
from dist_t2i.data.stream.mixture import Mixture
from dist_t2i.data.stream.order import Order, Plan
from dist_t2i.data.stream.reader import SampleReader, Stage
from dist_t2i.data.stream.workers import WorkerPool
from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.errors import DataError
from dist_t2i.utils.seeds import StreamPurpose, random_bits

BadRecord = dict[str, Any]
"""A replaced sample, as a line of bad_samples.jsonl: position, shard, key, reason, replaced_by (a key)."""


def choose_captions(samples: Iterable[dict[str, Any]], seed: int, flip: bool) -> Iterator[dict[str, Any]]:
    """Stage: adds a randomly selected caption as `caption`. With `flip`, mirrors the image and its source on a randomly
    selected half of the visits."""
    for sample in samples:
        position, captions = sample["__position__"], sample["captions"]
        if flip and random_bits(seed, position, StreamPurpose.FLIP) & 1:
            for image in (sample[name] for name in ("image", "source") if name in sample):
                image.copy_(image.flip(-1))
        which = random_bits(seed, position, StreamPurpose.CAPTION) % len(captions)
        yield sample | {"caption": captions[which]}


def collate(
    samples: Iterable[dict[str, Any]], reader: SampleReader, tokenizer: Tokenizer, max_tokens: int
) -> Iterator[tuple[Batch, list[BadRecord]]]:
    """Last stage: pairs of a micro-batch and the records of its replaced samples. Raises DataError if a sample does not
    have the planned position."""
    sequences = itertools.count(reader.first, reader.step)
    expected = itertools.chain.from_iterable(map(reader.plan.positions, sequences))
    collected: list[dict[str, Any]] = []
    for sample, position in zip(samples, expected, strict=False):
        if sample["__position__"] != position:
            raise DataError(
                f"a stage of the data pipeline dropped or moved position {position}: a stage must yield one sample for "
                "each sample that it receives, in the same order"
            )
        collected.append(sample)
        if len(collected) == reader.plan.rows:
            bad = [
                {"position": sample["__position__"], **vars(sample["__bad__"]), "replaced_by": sample["__key__"]}
                for sample in collected
                if "__bad__" in sample
            ]
            yield _batch(collected, tokenizer, max_tokens), bad
            collected = []


def _batch(samples: list[dict[str, Any]], tokenizer: Tokenizer, max_tokens: int) -> Batch:
    captions = [sample["caption"] for sample in samples]
    tokens, lengths = tokenizer.encode(captions, max_tokens)
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


def order_of(shards: Shards, data: DataConfig, seed: int) -> Order | Mixture:
    """The order of the samples of `shards` that the options in `data` define."""
    if not data.weights:
        return Order(shards.sizes, seed, data.shuffle_window, data.shuffle_shards)
    parts = [Order(sizes, seed + i, data.shuffle_window, data.shuffle_shards) for i, sizes in enumerate(shards.parts())]
    return Mixture(parts, data.weights, seed)


@dataclass(frozen=True, eq=False)
class Pipeline(torch.utils.data.IterableDataset):
    """The stages of one worker, which computes every `step`-th micro-batch, beginning with micro-batch `first`.
    Iterates over pairs of a Batch and the records of its replaced samples. A DataError becomes the last item."""

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
        """The pipeline of one worker. `waiting` is the number of finished batches that may wait for the parent; 0
        disables shared buffers. The worker gets `waiting` + 4 buffers: one to fill, one for the parent to use, and two
        that the parent may keep."""
        size = self.plan.rows * self.data.image_size**2 * 3
        pictures = 1 if self.choice is None else 2
        buffers = Buffers((waiting + 4) * pictures, size) if waiting and size > SMALL_BYTES else None
        return replace(self, first=first, step=step, buffers=buffers)

    def __iter__(self) -> Iterator[Any]:
        try:
            order = order_of(self.shards, self.data, self.seed)
            strict = self.data.on_bad == "strict"
            reader = SampleReader(self.shards, order, self.plan, self.first, self.step, strict, self.choice)
            decode = Decode(reader, self.stages, self.data, self.seed, self.buffers)
            choose = functools.partial(choose_captions, seed=self.seed, flip=self.data.flip)
            last = functools.partial(collate, reader=reader, tokenizer=self.tokenizer, max_tokens=self.data.max_tokens)
            stream = iter(webdataset.DataPipeline(reader, *self.stages, decode, choose, last))
            while True:
                # As if WDS_SECURE=1 were set: webdataset opens no pickles and runs no commands.
                before, webdataset.utils.enforce_security = webdataset.utils.enforce_security, True
                try:
                    item = next(stream)
                finally:
                    webdataset.utils.enforce_security = before
                yield item
        except DataError as error:
            yield DataError(str(error))  # a new error, so that the traceback is not sent to the parent


class Stream(Iterator[Batch]):
    """An endless iterator over batches. `bad_counts` maps each reason to the number of samples that were replaced for
    this reason."""

    def __init__(self, pipeline: Pipeline, allowance: int, bad_file: str | None) -> None:
        self._pool = WorkerPool(pipeline.of_worker, pipeline.data.workers)
        self._limit, self._allowance, self._bad_file = pipeline.data.max_bad_fraction, allowance, bad_file
        self._seen = 0
        self.bad_counts: Counter[str] = Counter()

    def __next__(self) -> Batch:
        """The next batch. Raises DataError if `data.on_bad` or `data.max_bad_fraction` allows no further bad sample."""
        batch, bad = self._pool.next()
        self._seen += len(batch)
        if bad:
            self._record(bad)
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def close(self) -> None:
        """Ends the workers and the stream at once. May be called twice."""
        self._pool.close()

    def _record(self, bad: list[BadRecord]) -> None:
        self.bad_counts.update(record["reason"] for record in bad)
        if self._bad_file:
            with open(self._bad_file, "ab") as file:
                file.write(problem_lines(bad))
        count = sum(self.bad_counts.values())
        if count > self._limit * max(self._seen, self._allowance):
            last = bad[-1]
            raise DataError(
                f"{count} of the {self._seen} samples seen could not be used, more than data.max_bad_fraction "
                f"({self._limit:g}) allows; the last bad sample is {last['key']} of {last['shard']}: {last['reason']}. "
                f"Repair or rewrite the set{f' ({self._bad_file} lists all bad samples)' if self._bad_file else ''}"
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
    """An endless stream of the micro-batches of one rank, beginning at position `start_images`, in the order of `Plan`.

    Args:
        accumulation: micro-batches of each rank per step.
        edit: adds sources to the batches if its `width` is not 0.
        bad_file: a file to which replaced samples are appended, one JSON object per line.
        stages: webdataset stages between the reader and the decoder, such as `wds.map(f)`. A stage must yield exactly
        one sample for each sample that it receives.
        data_set: the set of `data.train`, if it is open already.

    Raises: DataError if the set cannot be read, or if ranks and micro-batches cannot share `global_batch` evenly. For
    later errors, see `Stream.__next__`.
    """
    data_set = data_set or open_data(data)
    shards = data_set.shards(split)
    samples = sum(shards.sizes)
    if samples == 0:
        raise DataError(f"the split {split!r} of {data_set.folder} is empty")
    parts = world_size * accumulation
    if global_batch % (2 * parts):
        raise DataError(
            f"train.global_batch must be a multiple of {2 * parts}, is {global_batch}: each of {world_size} ranks x "
            f"{accumulation} micro-batches needs an even number of samples"
        )
    plan = Plan(rank, world_size, global_batch, accumulation, start_images)
    choice = source_choice(shards, edit, seed) if edit and edit.width else None
    pipeline = Pipeline(shards, plan, data, seed, tokenizer, list(stages), choice)
    return Stream(pipeline, -(-samples // world_size), os.fspath(bad_file) if bad_file else None)
