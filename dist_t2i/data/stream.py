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

import concurrent.futures
import contextlib
import functools
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from dist_t2i.config import Config
from dist_t2i.data.batch import SMALL_BYTES, Batch, caption_id
from dist_t2i.data.decode import PictureError, Scratch, decode, square
from dist_t2i.data.lists import open_data
from dist_t2i.data.mixture import Mixture
from dist_t2i.data.neighbours import NONE, SourceChoice, source_choice
from dist_t2i.data.order import Order, draw, rows_of_rank
from dist_t2i.data.readahead import ReadAhead
from dist_t2i.data.shards import BadSample, Shards, ShardSet, captions_of, picture_of
from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.data.workers import Failure, WorkerPool
from dist_t2i.errors import DataError

Place = tuple[int, int, int]
"""Position, shard, row."""
Stage = Callable[[Iterable[dict[str, Any]]], Iterator[dict[str, Any]]]
"""A webdataset stage: `wds.map(f)`, or any function from an iterable of samples to another."""

REMEMBERED_BYTES = 128 * 2**20
"""A split whose decoded pictures fit in this is decoded once per worker and kept."""
_LOOK_AHEAD = 512
_READERS, _READ_AHEAD = 16, 48
"""Threads that read remote samples, and samples that may wait to be decoded."""
_MAX_TRIES = 1_000
_CAPTION, _FLIP, _SHARE, _ACROSS, _DOWN = range(100, 105)


@dataclass(frozen=True)
class BadRecord:
    """A sample that was replaced, as a line of bad_samples.jsonl."""

    position: int
    shard: str
    key: str
    reason: str
    replaced_by: str


@dataclass(frozen=True)
class Plan:
    """Which micro-batches one rank needs, from the position `start` on."""

    rank: int
    world_size: int
    global_batch: int
    accumulation: int
    start: int

    @property
    def rows(self) -> int:
        """Samples per micro-batch."""
        return self.global_batch // (self.world_size * self.accumulation)

    def positions(self, sequence: int) -> numpy.ndarray:
        return rows_of_rank(
            self.start,
            sequence,
            rank=self.rank,
            world_size=self.world_size,
            global_batch=self.global_batch,
            accumulation=self.accumulation,
        )


class Source:
    """The first stage: raw samples in the order of the plan, from micro-batch `first` on, every `step`-th one.

    Remote samples are read ahead by threads; they come in the order of the plan all the same.
    """

    def __init__(self, shards: Shards, order: Order | Mixture, plan: Plan, first: int = 0, step: int = 1) -> None:
        self.shards, self.order, self.plan = shards, order, plan
        self.first, self.step = first, step
        self.strict = False
        self.choice: SourceChoice | None = None
        """Which picture each sample is an edit of."""
        self.bad: list[BadRecord] = []
        self._starts = numpy.cumsum([0, *shards.sizes])

    def __call__(self) -> Iterator[dict[str, Any]]:
        if not self.shards.remote:
            for place in self._places():
                yield self._got(place, functools.partial(self._read, *place))
            return
        with concurrent.futures.ThreadPoolExecutor(_READERS, "read") as pool:
            waiting: deque[tuple[Place, concurrent.futures.Future]] = deque()
            for place in self._places():
                waiting.append((place, pool.submit(self._read, *place)))
                if len(waiting) > _READ_AHEAD:
                    place, future = waiting.popleft()
                    yield self._got(place, future.result)

    def _places(self) -> Iterator[Place]:
        """Position, shard and row of each sample of the plan, endlessly."""
        sequence = self.first
        steps = max(1, _LOOK_AHEAD // self.plan.rows)
        start = self.plan.positions(sequence)[0]
        ahead = ReadAhead(self.shards, self.order, int(start), turn=self.first % self.step / self.step)
        while True:
            positions = numpy.concatenate([self.plan.positions(sequence + i * self.step) for i in range(steps)])
            ahead.reached(int(positions[0]))
            for position, shard, row in zip(positions, *self.order.at(positions), strict=True):
                yield int(position), int(shard), int(row)
            sequence += steps * self.step

    def _got(self, place: Place, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The sample there, or the one that replaces it."""
        try:
            return read()
        except BadSample as error:
            position, shard, row = place
            return self.replacement({"__position__": position, "__row__": (shard, row)}, error)

    def replacement(self, bad: dict[str, Any], error: BadSample) -> dict[str, Any]:
        """The next sample after `bad` that can be read, with the first cause as `__bad__`.

        Raises DataError under `strict`, and when too many in a row are bad.
        """
        if self.strict:
            raise DataError(f"sample {error.key} of {error.shard}: {error.reason} (data.on_bad is strict)")
        shard, row = bad["__row__"]
        tries = bad.get("__tries__", 0)
        while tries < min(self.order.samples - 1, _MAX_TRIES):
            tries += 1
            number = (int(self._starts[shard]) + row + 1) % self.order.samples
            shard = int(numpy.searchsorted(self._starts, number, side="right")) - 1
            row = number - int(self._starts[shard])
            try:
                sample = self._read(bad["__position__"], shard, row)
            except BadSample:
                continue
            return sample | {"__tries__": tries, "__bad__": bad.get("__bad__", error)}
        raise DataError(f"{tries + 1} samples in a row cannot be used; {error.key} of {error.shard}: {error.reason}")

    def _read(self, position: int, shard: int, row: int) -> dict[str, Any]:
        place = {"__position__": position, "__row__": (shard, row), "__id__": int(self._starts[shard]) + row}
        sample = self.shards.read(shard, row) | place
        return sample if self.choice is None else sample | {"__source__": self._source(sample, self.choice)}

    def _source(self, sample: dict[str, Any], choice: SourceChoice) -> dict[str, Any] | None:
        """The sample whose picture this one is an edit of: perhaps itself (also where another cannot be read), or None."""
        number = choice(sample["__id__"], sample["__position__"])
        if number in (NONE, sample["__id__"]):
            return None if number == NONE else sample
        shard = int(numpy.searchsorted(self._starts, number, side="right")) - 1
        row = number - int(self._starts[shard])
        try:
            other = self.shards.read(shard, row)
        except BadSample:  # counted where it is a sample of its own
            return sample
        return other | {"__position__": sample["__position__"], "__row__": (shard, row), "__id__": number}


class Decode:
    """Stage: adds `image` (uint8 [3, S, S]) and `captions`, and draws the crop; replaces what does not decode."""

    def __init__(
        self, source: Source, before: Sequence[Stage], config: Config, samples: int, shared: bool = False
    ) -> None:
        self.source, self.before = source, before
        self._slots = Slots(source.plan.rows, config.data.image_size, shared)
        self._source_slots = Slots(source.plan.rows, config.data.image_size, shared) if config.edit.width else None
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

    Channels are last in memory, as the networks want them. In a loader worker the memory is shared with the parent.
    """

    def __init__(self, rows: int, size: int, shared: bool) -> None:
        self._shape, self._shared = (rows, size, size, 3), shared and rows * size * size * 3 > SMALL_BYTES
        self._taken = rows
        self.images = torch.empty(0)
        """uint8 [m, 3, H, W], the micro-batch that is being filled."""

    def next(self) -> torch.Tensor:
        """uint8 [3, H, W], where the next picture goes; the same one again until `taken`."""
        if self._taken == self._shape[0]:
            self._taken = 0
            memory = torch.empty(self._shape, dtype=torch.uint8) if not self._shared else self._new_shared()
            self.images = memory.permute(0, 3, 1, 2)
        return self.images[self._taken]

    def taken(self) -> None:
        """The slot is filled."""
        self._taken += 1

    def _new_shared(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_shared(math.prod(self._shape))
        return torch.empty(0, dtype=torch.uint8).set_(storage).view(self._shape)


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
                Decode(source, self.stages, self.config, order.samples, shared=data.workers > 0),
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
