"""The stream delivers the samples in the planned order, from any start; bad samples are replaced and reported."""

import json
import zlib
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
import webdataset

from dist_t2i.data.shard_index import ShardIndex
from dist_t2i.data.shard_set import open_set
from dist_t2i.data.stream.batch import caption_id
from dist_t2i.data.stream.order import Order
from dist_t2i.errors import DataError
from pictures import color, config_for, make_set, stream_of
from tars import harmful_pickle

COUNT = 37


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("small"), COUNT, shard_samples=10)


def read(data_set, config, batches, **where):
    stream = stream_of(config, data_set.tokenizer, **where)
    try:
        return [next(stream) for _ in range(batches)], stream
    finally:
        stream.close()


def rows(batches):
    """Position -> row, of some micro-batches."""
    found = {}
    for batch in batches:
        for row, position in enumerate(batch.positions.tolist()):
            assert position not in found
            found[position] = (
                batch.keys[row],
                batch.captions[row],
                batch.images[row].numpy().tobytes(),
                batch.tokens[row, : batch.lengths[row]].tolist(),
                int(batch.image_ids[row]),
                int(batch.caption_ids[row]),
            )
    return found


@pytest.fixture(scope="module")
def reference(small):
    """96 positions (more than two epochs), read in one process."""
    return rows(read(small, config_for(small, crop=0.8), 12)[0])


def test_a_batch(small):
    (batch,), _ = read(small, config_for(small, flip=False), 1)
    assert batch.images.shape == (8, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert batch.tokens.shape == (8, 32) and batch.tokens.dtype == torch.int64
    assert batch.lengths.min() >= 1 and len(batch) == 8
    for row, key in enumerate(batch.keys):
        number = int(key[1:])
        assert tuple(batch.images[row, :, 16, 28].tolist()) == color(number)
        assert batch.images[row, :, 16, 2].tolist() == [0, 0, 0], "not mirrored"
        assert batch.captions[row].startswith(f"picture number {number} said")
        assert batch.caption_ids[row] == caption_id(batch.captions[row].upper())
    assert batch.to("cpu").keys == batch.keys


def test_the_order_is_that_of_order_py(small, reference):
    shards = small.shards("train")
    order = Order(shards.sizes, 3, 16)
    for position, (shard, row) in enumerate(zip(*order.at(numpy.arange(96)), strict=True)):
        assert reference[position][0] == shards.open(int(shard))[1].keys[int(row)]


def test_every_picture_once_an_epoch_across_its_end(small, reference):
    assert sorted(reference) == list(range(96))
    for epoch in range(2):
        keys = [reference[position][0] for position in range(epoch * COUNT, (epoch + 1) * COUNT)]
        assert sorted(keys) == [f"p{number:04d}" for number in range(COUNT)]


def test_captions_and_flips_vary(small):
    stream = stream_of(config_for(small), small.tokenizer)
    seen = Counter()
    mirrored = 0
    for _ in range(40):
        batch = next(stream)
        mirrored += sum(batch.images[row, :, 16, 2].sum() > 0 for row in range(8))
        seen.update(caption.rpartition(" ")[2] for caption in batch.captions)
    assert 110 < mirrored < 210 and 110 < seen["0"] < 210 and seen["0"] + seen["1"] == 320


@pytest.mark.parametrize(
    ("world_size", "accumulation", "workers", "start"),
    [(1, 2, 0, 0), (2, 1, 0, 0), (2, 2, 0, 8), (4, 1, 0, 24), (1, 1, 1, 16), (1, 1, 2, 40), (2, 1, 2, 8), (1, 4, 2, 0)],
)
def test_any_world_size_workers_and_start_give_the_same_rows(
    small, reference, world_size, accumulation, workers, start
):
    config = config_for(small, accumulation=accumulation, workers=workers, crop=0.8)
    steps = (96 - start) // 8
    batches = []
    for rank in range(world_size):
        batches += read(small, config, steps * accumulation, rank=rank, world_size=world_size, start_images=start)[0]
    assert rows(batches) == {position: reference[position] for position in range(start, start + 8 * steps)}


def test_a_start_between_steps_and_far_away(small):
    config = config_for(small)
    far = 10**9
    whole = rows(read(small, config, 3, start_images=far)[0])
    part = rows(read(small, config, 1, start_images=far + 11)[0])
    assert part == {position: whole[position] for position in range(far + 11, far + 19)}


def test_seeds_and_windows_matter(small, reference):
    for other in (config_for(small, seed=4, crop=0.8), config_for(small, shuffle_window=1000, crop=0.8)):
        read_rows = rows(read(small, other, 4)[0])
        assert sum(read_rows[position] == reference[position] for position in read_rows) < 16


def test_remembered_pictures_are_the_decoded_ones(small, monkeypatch):
    config = config_for(small)
    first = rows(read(small, config, 12)[0])
    monkeypatch.setattr("dist_t2i.data.stream.decode_stage.REMEMBERED_BYTES", 0)
    assert rows(read(small, config, 12)[0]) == first


def shout(sample):
    captions = [text.upper() for text in json.loads(sample["json"])["captions"]]
    return sample | {"json": json.dumps({"captions": captions}).encode()}


def test_users_insert_webdataset_stages(small):
    plain, _ = read(small, config_for(small), 2)
    loud, _ = read(small, config_for(small, workers=1), 2, stages=[webdataset.map(shout)])
    assert [batch.captions for batch in loud] == [[text.upper() for text in batch.captions] for batch in plain]
    with pytest.raises(DataError, match="dropped or moved position"):
        read(small, config_for(small), 6, stages=[webdataset.select(lambda sample: sample["__key__"] != "p0001")])


@pytest.mark.parametrize("workers", [0, 1])
def test_inserted_stages_run_no_commands_and_unpickle_nothing(small, tmp_path, workers):
    def command(sample):
        webdataset.gopen(f"pipe:touch {tmp_path / 'ran'}")
        return sample

    def planted(sample):
        return sample | {"pyd": harmful_pickle(tmp_path / "ran")}

    config = config_for(small, workers=workers)
    for stages in ([webdataset.map(command)], [webdataset.map(planted), webdataset.decode()]):
        with pytest.raises((ValueError, RuntimeError, webdataset.autodecode.DecodingError)):
            read(small, config, 1, stages=stages)
    assert not (tmp_path / "ran").exists()
    assert next(iter(webdataset.WebDataset(f"{small.folder}/train-00000.tar", shardshuffle=False))), "as before"


@pytest.mark.parametrize(("batch", "world_size", "accumulation"), [(8, 3, 1), (6, 2, 2), (3, 1, 1)])
def test_batches_that_do_not_divide(small, batch, world_size, accumulation):
    with pytest.raises(DataError, match=r"train\.global_batch must be a multiple of"):
        stream_of(config_for(small, batch=batch, accumulation=accumulation), small.tokenizer, world_size=world_size)


# Bad samples


def damage(data_set, numbers, kind="bytes"):
    """Damages pictures: `bytes` flips a byte (the checksum notices it), `picture` rewrites index and tar with a broken
    picture."""
    shards = data_set.shards("train")
    for shard in range(len(shards.sizes)):
        path = Path(shards.url(shard))
        index_path, data = path.with_suffix(".index"), bytearray(path.read_bytes())
        index = ShardIndex.from_bytes(index_path.read_bytes(), "index")
        spoiled = [row for row, key in enumerate(index.keys) if int(key[1:]) in numbers]
        members = [index.members(row) for row in range(shards.sizes[shard])]
        for row in spoiled:
            picture = next(member for member in members[row] if member.extension == "png")
            data[picture.offset + 40 : picture.offset + 60] = bytes(20)
            if kind == "picture":
                crc32 = zlib.crc32(data[picture.offset : picture.offset + picture.size])
                members[row][members[row].index(picture)] = picture._replace(crc32=crc32)
        path.write_bytes(data)
        index_path.write_bytes(ShardIndex(index.keys, members).to_bytes())


@pytest.mark.parametrize(("kind", "reason"), [("bytes", "checksum of .png differs"), ("picture", "does not decode")])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_by_rule_and_listed(tmp_path, kind, reason, workers):
    clean = make_set(tmp_path, COUNT, shard_samples=10)
    config = config_for(clean, workers=workers, max_bad_fraction=0.5)
    before = rows(read(clean, config, 10)[0])
    damage(clean, {3, 4, 30}, kind)
    hurt = open_set(clean.folder)
    listed = tmp_path / "bad_samples.jsonl"
    batches, stream = read(hurt, config, 10, bad_file=listed)
    after = rows(batches)
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    spoiled = {position for position, row in before.items() if row[0] in ("p0003", "p0004", "p0030")}
    assert {line["position"] for line in lines} == spoiled == {p for p in before if before[p] != after[p]}
    assert len(lines) == len(spoiled) == sum(stream.bad_counts.values())
    for line in lines:
        assert before[line["position"]][0] == line["key"] and after[line["position"]][0] == line["replaced_by"]
        assert reason in line["reason"] and line["shard"].startswith("train-0000")
    again = rows(read(hurt, config, 4, start_images=40)[0])
    assert all(again[position] == after[position] for position in again)
    staged = rows(read(hurt, config, 10, stages=[webdataset.map(shout)])[0])
    assert {p: (row[0], row[1]) for p, row in staged.items()} == {p: (r[0], r[1].upper()) for p, r in after.items()}


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_stops_and_names_the_sample(tmp_path, workers):
    data_set = make_set(tmp_path, COUNT)
    damage(data_set, {5})
    with pytest.raises(
        DataError, match=r"sample p0005 of train-0000\d\.tar: checksum of \.png differs.*strict"
    ) as info:
        read(open_set(data_set.folder), config_for(data_set, workers=workers, on_bad="strict"), 5)
    assert "Traceback" not in str(info.value)


def test_too_many_bad_samples_stop_the_run(tmp_path):
    data_set = make_set(tmp_path, COUNT)
    damage(data_set, {5, 6})
    read(data_set, config_for(data_set, max_bad_fraction=0.1), 5)
    with pytest.raises(
        DataError, match=r"2 of the \d+ samples seen could not be used, more than data.max_bad_fraction"
    ):
        read(data_set, config_for(data_set, max_bad_fraction=0.04), 5)


def test_nothing_but_bad_samples(tmp_path):
    data_set = make_set(tmp_path, 12)
    damage(data_set, set(range(12)), "picture")
    with pytest.raises(DataError, match="12 samples in a row cannot be used"):
        read(data_set, config_for(data_set, max_bad_fraction=1.0), 1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["train-00001.index", "train-00001.tar"])
def test_a_missing_shard_or_index_costs_its_samples(tmp_path, name, workers):
    data_set = make_set(tmp_path, 32)
    (Path(data_set.folder) / name).unlink()
    batches, stream = read(data_set, config_for(data_set, max_bad_fraction=0.5, workers=workers), 4)
    assert stream.bad_counts == {"shard is unreadable: No such file or directory": 10}
    assert len({key for key, *_ in rows(batches).values()}) == 22
    with pytest.raises(DataError, match=r"data.max_bad_fraction .* of train-00001\.tar: shard is unreadable"):
        read(data_set, config_for(data_set, workers=workers), 4)
