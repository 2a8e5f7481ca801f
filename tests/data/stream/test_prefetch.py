"""Prefetching does not disturb the reader."""

import itertools
import sys

import numpy
import pytest

from dist_t2i.data.stream import prefetch
from dist_t2i.data.stream.order import Order
from dist_t2i.data.stream.prefetch import Prefetcher
from dist_t2i.errors import DataError
from dist_t2i.storage.clients import StorageOptions

SIZES = [7, 1, 30, 12, 25]


class Unreadable:
    """Remote shards that cannot be opened, so that the prefetcher runs through the windows without fetching."""

    remote = True

    def __init__(self, folder):
        self.options = StorageOptions(cache=str(folder), cache_bytes=2**30)
        self.opened = 0

    def open(self, shard):
        self.opened += 1
        raise DataError(f"shard {shard} cannot be opened")


@pytest.fixture
def eager_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_prefetcher_in_another_epoch_does_not_change_the_readers_order(tmp_path, monkeypatch, eager_threads):
    monkeypatch.setattr(prefetch, "clients_allowed", lambda: True)
    order, shards, samples = Order(SIZES, 3, 10, 2), Unreadable(tmp_path), sum(SIZES)
    expected = [
        numpy.stack(Order(SIZES, 3, 10, 2).at(numpy.arange(epoch * samples, (epoch + 1) * samples))) for epoch in (0, 1)
    ]
    prefetcher = Prefetcher(shards, order, 0)
    for turn in itertools.count():
        prefetcher.advance((100 + turn) * samples)  # the prefetcher runs through these epochs quickly
        epoch = turn % 2
        got = numpy.stack(order.at(numpy.arange(epoch * samples, (epoch + 1) * samples)))
        assert (got == expected[epoch]).all()
        if turn >= 200 and shards.opened > 200:
            break
