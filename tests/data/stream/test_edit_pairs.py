"""Pairs of source and edit: captions that differ little, a choice by (seed, position), and the stream that delivers
both."""

import dataclasses
import json

import pytest
import torch

from dist_t2i.config.sections import EditConfig
from dist_t2i.data.shard_set import Shard, Shards, open_set
from dist_t2i.data.stream.edit_pairs import LARGEST, NONE, Neighbors, SourceChoice, source_choice
from dist_t2i.errors import DataError
from dist_t2i.sharding.sources.folder import find_items
from dist_t2i.sharding.write_set import write_set
from dist_t2i.sharding.writing.prepare import Options
from pictures import config_for, picture, stream_of

NAMES = [
    "woman pilot light skin tone",
    "woman pilot dark skin tone",
    "man pilot dark skin tone",
    "woman pilot",
    "man cook",
    "telephone",
    "Woman pilot: medium-light skin tone",
]


def near(number: int, names=NAMES, longest: int = 4) -> set[int]:
    return {int(other) for group in Neighbors([[n] for n in names], longest).groups(number) for other in group} - {
        number
    }


def test_captions_that_agree_but_for_one_run_of_words_are_near():
    assert near(0, longest=1) == {1, 6}
    assert near(1, longest=1) == {0, 2}
    assert near(3, longest=1) == set(), "three words more are too many"
    assert near(3) == {0, 1, 6}
    assert near(2, longest=3) == {0, 1}
    assert near(5) == set() and Neighbors([[n] for n in NAMES], 4).pick(5, 2**63) == 5


def test_any_of_the_captions_counts_and_a_sample_without_any_is_alone():
    neighbours = Neighbors([["a red car", "a taxi"], ["a blue car"], ["a taxi that waits"], []], 2)
    assert {int(n) for group in neighbours.groups(0) for n in group} == {0, 1, 2}
    assert neighbours.pick(3, 12345) == 3


def test_large_groups_are_passed_over_unless_there_are_no_others():
    many = [f"flag {i}" for i in range(LARGEST + 5)]
    assert len(near(0, many)) == LARGEST + 4
    assert near(0, [*many, "old flag 0"]) == {LARGEST + 5}


def test_every_neighbour_is_chosen_and_the_choice_is_a_function_of_its_number():
    neighbours = Neighbors([[n] for n in NAMES], 4)
    picks = [neighbours.pick(1, number * 0x9E3779B97F4A7C15 % 2**64) for number in range(200)]
    assert set(picks) == near(1)
    assert picks[:5] == [Neighbors([[n] for n in NAMES], 4).pick(1, n * 0x9E3779B97F4A7C15 % 2**64) for n in range(5)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 plain pictures in two shards, "thing 7 red" next to "thing 7 blue"; one file does not decode."""
    folder = tmp_path_factory.mktemp("set")
    lines = []
    for number in range(24):
        picture(number).save(folder / f"{number:02d}.png")
        caption = f"thing {number // 2} {'red' if number % 2 else 'blue'}"
        lines.append(json.dumps({"image": f"{number:02d}.png", "captions": [caption]}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    items, problems = find_items(folder, folder / "captions.jsonl", 0.0)
    write_set(folder / "set", items, problems, Options(shard_samples=12))
    return open_set(folder / "set")


def editing(data, own: float = 0.25, none: float = 0.25, **more):
    config = config_for(data, flip=True, **more)
    return dataclasses.replace(config, edit=EditConfig(width=4, own=own, none=none, words=1))


def rows(stream, batches: int) -> dict[int, tuple]:
    """Position -> id, source id, the bytes of picture and source."""
    found = {}
    for _ in range(batches):
        batch = next(stream)
        for i, position in enumerate(batch.positions.tolist()):
            pixels = batch.images[i].numpy().tobytes(), batch.sources[i].numpy().tobytes()
            found[position] = (int(batch.image_ids[i]), int(batch.source_ids[i]), *pixels)
    stream.close()
    return found


def test_the_stream_brings_sources_whatever_the_ranks_and_workers(data):
    config = editing(data)
    one = rows(stream_of(config, data.tokenizer, data_set=data), 12)
    parts = [rows(stream_of(config, data.tokenizer, rank=r, world_size=2, data_set=data), 12) for r in range(2)]
    assert parts[0] | parts[1] == one
    later = rows(stream_of(config, data.tokenizer, start_images=40, data_set=data), 7)
    assert later == {position: row for position, row in one.items() if position >= 40}
    workers = editing(data, workers=2)
    assert rows(stream_of(workers, data.tokenizer, data_set=data), 12) == one
    assert any(own == source for own, source, *_ in one.values()) and any(s == NONE for _, s, *_ in one.values())
    shown = {}
    for own, source, image, pixels in one.values():
        shown.setdefault(own, set()).add(image)
        if source == own:
            assert pixels == image
    for _, source, _, pixels in one.values():
        assert (
            not any(pixels)
            if source == NONE
            else source not in shown or pixels in shown[source] or len(shown[source]) == 1
        )


def test_without_editing_the_same_pictures_come_and_no_sources(data):
    config = editing(data)
    plain = dataclasses.replace(config, edit=EditConfig())
    with_sources = rows(stream_of(config, data.tokenizer, data_set=data), 4)
    stream = stream_of(plain, data.tokenizer, data_set=data)
    for _ in range(4):
        batch = next(stream)
        assert batch.sources is None and batch.source_ids is None
        for i, position in enumerate(batch.positions.tolist()):
            assert with_sources[position][2] == batch.images[i].numpy().tobytes()


def test_source_and_picture_are_mirrored_and_cut_alike(data):
    found = rows(stream_of(editing(data, own=1.0, none=0.0, crop=0.5), data.tokenizer, data_set=data), 6)
    assert all(source == own and pixels == image for own, source, image, pixels in found.values())
    assert len({image for *_, image, _ in found.values()}) > 24


def test_a_source_that_does_not_decode_is_replaced_by_the_picture_itself(data):
    broken = Shards([Shard(s.url, s.samples, s.index_url) for s in data.shards("train")._shards])
    config = editing(data, own=0.0, none=0.0)
    choice = SourceChoice(Neighbors([[f"thing {i // 2}"] for i in range(24)], 1), config.edit, config.train.seed)
    assert choice(4, 0) == 5 and choice(5, 17) == 4
    from dist_t2i.data.stream.decode_stage import Decode
    from dist_t2i.data.stream.order import Plan
    from dist_t2i.data.stream.reader import SampleReader
    from dist_t2i.data.stream.stream import order_of

    order = order_of(broken, config.data, config.train.seed)
    reader = SampleReader(broken, order, Plan(0, 1, 8, 1, 0), choice=choice)
    decode = Decode(reader, (), config.data, config.train.seed)
    sample = reader._read(3, 0, 4)
    assert sample["__source__"]["__id__"] == 5
    sample["__source__"]["png"] = sample["__source__"]["png"][:20]
    (decoded,) = decode([sample])
    assert decoded["source_id"] == 4 and torch.equal(decoded["source"], decoded["image"])


def test_sets_whose_captions_cannot_be_compared_are_refused(data):
    far = Shards([Shard("https://example.org/a.tar", 10, "https://example.org/a.index")])
    with pytest.raises(DataError, match="is remote"):
        source_choice(far, editing(data).edit, 3)
    with pytest.raises(DataError, match="300,000 samples"):
        source_choice(Shards([Shard("a.tar", 300_000, "a.index")]), editing(data).edit, 3)
