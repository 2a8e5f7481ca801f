"""Weighted lists: exact shares, complete epochs of every list, and windows that name the coming samples."""

import itertools
from collections import Counter

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_t2i.data.open_data import open_data
from dist_t2i.data.stream.mixture import CYCLE, Mixture, slots
from dist_t2i.data.stream.order import Order
from dist_t2i.errors import ConfigError
from pictures import config_for, make_set, stream_of


def mixture(seed=5, weights=(3, 1)):
    return Mixture([Order([40, 30], seed, 16, 2), Order([100, 7, 5], seed + 1, 16, 2)], weights, seed)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_slots_add_up_and_are_near_the_weights(weights):
    found = slots(weights)
    assert sum(found) == CYCLE and min(found) >= 1
    for share, weight in zip(found, weights, strict=True):
        assert abs(share - weight / sum(weights) * CYCLE) < len(weights) + 1


def test_shares_are_exact_and_each_list_goes_through_its_own_epochs():
    shards, rows = mixture().at(numpy.arange(2 * CYCLE))
    first = shards < 2
    assert first[:CYCLE].sum() == first[CYCLE:].sum() == CYCLE * 3 // 4
    assert 30 < first[:64].sum() < 62, "mixed finely"
    for mine, size in ((first, 70), (~first, 112)):
        seen = list(zip(shards[mine].tolist(), rows[mine].tolist(), strict=True))
        for epoch in range(len(seen) // size):
            assert max(Counter(seen[epoch * size : (epoch + 1) * size]).values()) == 1


def test_any_position_is_computed_alone():
    whole = mixture().at(numpy.arange(3 * CYCLE))
    for position in (0, CYCLE - 1, CYCLE, 3 * CYCLE - 1, 5000):
        shard, row = mixture().at(numpy.array([position]))
        assert (int(shard[0]), int(row[0])) == (int(whole[0][position]), int(whole[1][position]))


def test_windows_hold_what_is_read_until_the_next_ones():
    order = mixture()
    windows = list(itertools.islice(order.windows(5000), 40))
    begins = [begin for begin, _ in windows]
    assert begins == sorted(begins) and begins[1] <= 5000
    shards, rows = order.at(numpy.arange(5000, begins[-1]))
    announced = {(run.shard, row) for _, runs in windows for run in runs for row in range(run.start, run.stop)}
    assert set(zip(shards.tolist(), rows.tolist(), strict=True)) <= announced


def test_a_weighted_stream(tmp_path):
    one, two = make_set(tmp_path / "one", 24), make_set(tmp_path / "two", 40)
    config = config_for(one)
    both = config.data.__class__(**{**vars(config.data), "train": (one.folder, two.folder), "weights": (1.0, 3.0)})
    config = config.__class__(**{**vars(config), "data": both})
    data = open_data(both)
    assert data.manifest["splits"]["train"]["samples"] == 64
    stream = stream_of(config, data.tokenizer, data_set=data)
    ids = [number for _ in range(128) for number in next(stream).image_ids.tolist()]
    assert abs(sum(number < 24 for number in ids) / 1024 - 0.25) < 0.05
    assert set(ids) == set(range(64))


def test_weights_without_lists_are_a_mistake_in_the_configuration():
    from dist_t2i.config.files import loads

    with pytest.raises(ConfigError, match=r"data\.weights: has 2 numbers for 1 entries of data\.train"):
        loads("data: {train: a, weights: [1, 2]}")
