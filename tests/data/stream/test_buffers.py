"""Buffers between a worker and its parent: reused when no process reads them any more, and not before."""

import copy
import dataclasses
import gc
import itertools
import sys

import pytest
import torch

from dist_t2i.config.sections import EditConfig
from dist_t2i.data.stream.batch import SMALL_BYTES
from pictures import config_for, make_set, stream_of

BATCH, SIZE = 32, 160
IN_THE_MAP = 4 + 4
"""Batches that wait, and those that `Pipeline.of_worker` adds."""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    assert BATCH * SIZE * SIZE * 3 > SMALL_BYTES
    return make_set(tmp_path_factory.mktemp("buffers"), 90)


def opened(data, workers, **changes):
    config = config_for(data, batch=BATCH, size=SIZE, workers=workers)
    return stream_of(dataclasses.replace(config, **changes), data.tokenizer, data_set=data)


@pytest.fixture(scope="module")
def expected(data):
    """The first batches, from a stream without workers; each has its own memory."""
    return list(itertools.islice(opened(data, 0), 40))


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_is_used_again_and_what_is_held_stays(data, expected, workers):
    held, places = [], set()
    stream = opened(data, workers)
    for number, batch in zip(range(40), stream, strict=False):
        assert batch.keys == expected[number].keys and torch.equal(batch.images, expected[number].images), number
        places.add(batch.images.data_ptr())
        if number in (0, 30):  # 2 workers: 4 batches wait or are being filled, and the parent keeps 2
            held.append((number, batch.images[3], batch.images[5:7].numpy()))  # views also keep the memory
    assert len(places) <= workers * IN_THE_MAP
    for number, picture, pair in held:
        assert torch.equal(picture, expected[number].images[3])
        assert torch.equal(torch.from_numpy(pair), expected[number].images[5:7])
    stream.close()
    assert torch.equal(held[-1][1], expected[30].images[3])  # also after the workers have ended


def test_whoever_holds_more_than_there_are_gets_fresh_memory(data, expected):
    stream = opened(data, 1)
    held = list(itertools.islice(stream, 2 * IN_THE_MAP))
    assert len({batch.images.data_ptr() for batch in held}) == len(held)
    assert all(torch.equal(batch.images, wanted.images) for batch, wanted in zip(held, expected, strict=False))
    del held
    gc.collect()
    later = [next(stream) for _ in range(2)]
    assert torch.equal(later[1].images, expected[2 * IN_THE_MAP + 1].images)


def test_a_copy_of_a_batch_is_a_copy(data, expected):
    stream = opened(data, 1)
    kept = copy.deepcopy(next(stream))
    for _ in range(2 * IN_THE_MAP):
        next(stream)
    assert torch.equal(kept.images, expected[0].images)


def test_sources_of_edits_have_buffers_of_their_own(data):
    change = {"edit": EditConfig(width=8)}
    plain, forked = opened(data, 0, **change), opened(data, 1, **change)
    before = None
    for _ in range(20):
        wanted, batch = next(plain), next(forked)
        assert torch.equal(batch.images, wanted.images) and torch.equal(batch.sources, wanted.sources)
        assert before is None or torch.equal(before[0].sources, before[1].sources)
        before = batch, wanted
