"""This project's shards are WebDataset tars, other WebDataset tars can be indexed, and no content of a tar runs as
code."""

import json
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from dist_t2i.data.indexing import indexed_set
from dist_t2i.data.open_data import open_entry
from dist_t2i.data.shard_index import ShardIndex
from dist_t2i.data.shard_set import BadSample, Sample, captions_of, open_set
from dist_t2i.data.tar_reader import read_tar
from dist_t2i.errors import DataError
from dist_t2i.storage.clients import FROM_ENVIRONMENT
from dist_t2i.storage.shard_file import LocalFile, open_shard
from dist_t2i.storage.urls import local_path
from pictures import color, encoded, make_set, picture
from tars import harmful_pickle, write_tar


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("small"), 25)


def index_of(path):
    return read_tar(LocalFile(str(path))).index()


def test_random_access(small):
    samples = small.samples("train")
    assert small.splits == ("train",) and len(samples) == 25 and len(small.manifest["splits"]["train"]["shards"]) == 3
    assert sorted(sample.key for sample in samples) == [f"p{number:04d}" for number in range(25)]
    for sample in (samples[0], samples[24], samples[-1], samples[13]):
        number = int(sample.key[1:])
        assert sample.image.getpixel((30, 20)) == color(number) and sample.image.mode == "RGB"
        assert sample.captions == tuple(f"picture number {number} said in way {way}" for way in range(2))
        assert sample.image_bytes == encoded(picture(number)) and sample.extension == "png"
    with pytest.raises(IndexError):
        samples[25]


def test_manifest_says_what_is_there(small):
    split = small.manifest["splits"]["train"]
    assert split["samples"] == 25 == sum(shard["samples"] for shard in split["shards"])
    assert split["captions"]["count"] == 50 and split["captions"]["per_picture"]["mean"] == 2
    assert split["short_side"] == [40, 40]
    assert len(small.fingerprint) == 64
    assert small.tokenizer.unknown_words("picture of a zebra") == ["of", "a", "zebra"]


def test_plain_webdataset_reads_our_shards(small):
    urls = [str(Path(small.folder) / shard["name"]) for shard in small.manifest["splits"]["train"]["shards"]]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    ours = list(small.samples("train"))
    assert [sample["__key__"] for sample in read] == [sample.key for sample in ours]
    for theirs, sample in zip(read, ours, strict=True):
        assert theirs["png"].tobytes() == sample.image.tobytes()
        assert tuple(theirs["json"]["captions"]) == sample.captions


def test_we_index_what_webdataset_writes(tmp_path):
    path = tmp_path / "train-00000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(5):
            text = {"txt": f"picture {number}"} if number % 2 else {"json": {"caption": f"picture {number}"}}
            writer.write({"__key__": f"some/dir.d/{number:03d}", "jpg": picture(number)} | text)
    found = indexed_set([str(path)], FROM_ENVIRONMENT, tmp_path / "home")
    shards = found.shards("train")
    assert found.manifest["splits"]["train"]["captions"]["count"] == 5 and not found.manifest["bad_samples"]
    for number, reference in enumerate(webdataset.WebDataset(str(path), shardshuffle=False)):
        raw = shards.read(0, number)
        for extension in set(reference) - {"__key__", "__url__", "__local_path__"}:
            assert raw[extension] == reference[extension]
        assert raw["__key__"] == reference["__key__"] == f"some/dir.d/{number:03d}"
        assert Sample(raw).captions == (f"picture {number}",)
        assert Sample(raw).image.size == (40, 40)


def test_index_round_trip(small):
    path = Path(small.folder) / "train-00000.tar"
    index = index_of(path)
    assert index.to_bytes() == path.with_suffix(".index").read_bytes()
    again = ShardIndex.from_bytes(index.to_bytes(), "x")
    assert list(again.keys) == list(index.keys)
    assert [again.members(row) for row in range(len(again))] == [index.members(row) for row in range(len(index))]


def test_captions_of_text_and_json():
    def captions(**raw):
        return captions_of({"__key__": "k", "__url__": "s.tar"} | raw)[0]

    assert captions(txt=b"one\n\n two \n") == ("one", "two")
    assert captions(json=b'{"captions": ["a", "", 3, "b"]}') == ("a", "b")
    assert captions(json=b'{"caption": "a"}', txt=b"b") == ("a",)
    assert captions(json=b'{"width": 3}', txt=b"b") == ("b",)
    for raw in ({"json": b"{"}, {"txt": b"\xff"}, {"json": b"[]"}, {"txt": b" \n"}, {}):
        with pytest.raises(BadSample):
            captions(**raw)


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "pth", "mask.pyd", "PYD"])
def test_pickles_are_refused(tmp_path, extension):
    ran = tmp_path / "ran"
    path = write_tar(tmp_path / "a.tar", [("k.png", encoded(picture(1))), (f"k.{extension}", harmful_pickle(ran))])
    with pytest.raises(DataError, match="pickles can run code"):
        indexed_set([str(path)], FROM_ENVIRONMENT, tmp_path / "home")
    index = ShardIndex.__new__(ShardIndex)
    index.__init__(["k"], [[]])
    index.extensions = [extension]
    with pytest.raises(DataError, match="pickles can run code"):
        ShardIndex.from_bytes(index.to_bytes(), "a.index")
    assert not ran.exists()


@pytest.mark.parametrize("url", ["pipe:touch ran", " pipe: touch ran", "|touch ran"])
def test_commands_are_refused(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    for opening in (local_path, open_shard, open_entry):
        with pytest.raises(DataError, match="commands are not run"):
            opening(*([url] if opening is local_path else [url, FROM_ENVIRONMENT]))
    assert not (tmp_path / "ran").exists()


def test_errors_are_for_people(tmp_path, small):
    with pytest.raises(DataError, match="there is no set"):
        open_set(tmp_path)
    with pytest.raises(DataError, match=r"set data\.train"):
        open_set("")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="cannot read the manifest"):
        open_set(tmp_path)
    (tmp_path / "manifest.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="is not the manifest of a set"):
        open_set(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(small.manifest | {"version": 99}))
    with pytest.raises(DataError, match="format version 99"):
        open_set(tmp_path)
    with pytest.raises(DataError, match="no split 'validation'; it has train"):
        small.samples("validation")
    with pytest.raises(DataError, match="cannot be indexed: not a tar"):
        indexed_set([str(tmp_path / "manifest.json")], FROM_ENVIRONMENT, tmp_path / "home")
    with pytest.raises(DataError, match="not an index"):
        ShardIndex.from_bytes((Path(small.folder) / "train-00000.tar").read_bytes(), "train-00000.tar")
    assert open_set(f"file://{small.folder}").fingerprint == small.fingerprint


def test_damage_is_noticed(tmp_path):
    damaged = make_set(tmp_path, 4)
    path = Path(damaged.folder) / "train-00000.tar"
    member = ShardIndex.from_bytes(path.with_suffix(".index").read_bytes(), "index").members(1)[0]
    data = bytearray(path.read_bytes())
    data[member.offset + 30] ^= 1
    path.write_bytes(data)
    samples = open_set(damaged.folder).samples("train")
    assert isinstance(samples[0].image, Image.Image)
    with pytest.raises(BadSample, match=r"checksum of \.png differs"):
        samples[1]
    path.write_bytes(data[: member.offset + 30])
    with pytest.raises(BadSample, match="cut short"):
        open_set(damaged.folder).samples("train")[1]
