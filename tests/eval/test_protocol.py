"""Protocols as files: complete and frozen; errors for files that are not."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
import yaml

from dist_t2i.data.shard_set import open_set
from dist_t2i.errors import UserError
from dist_t2i.eval import protocol as rules
from dist_t2i.eval.protocol import Protocol, load_protocol
from dist_t2i.eval.selection import SAME_CAPTION, has_listed, select
from dist_t2i.sharding.sources.scenes import scene_items
from dist_t2i.sharding.write_set import write_set
from dist_t2i.sharding.writing.prepare import Options
from models_on_disk import write_tone_set


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The package's protocols, as a copy that a test may change."""
    copy = tmp_path / "protocols"
    shutil.copytree(rules.FOLDER, copy)
    monkeypatch.setattr(rules, "FOLDER", copy)
    monkeypatch.setattr(rules, "FROZEN", copy / "frozen.json")
    return copy


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_set(write_tone_set(tmp_path_factory.mktemp("sets") / "set"))


def change(path, **values):
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | values))


def test_every_protocol_of_the_package_is_frozen():
    names = rules.known_protocols()
    offline = ["held-out", "openmoji", "openmoji-ablation", "openmoji-styles", "quick", "scenes"]
    assert names == sorted([*offline, "coco30k", "cub", "flowers"])
    frozen = json.loads(rules.FROZEN.read_text())
    for name in names:
        protocol = load_protocol(name)
        assert protocol.name == name and frozen[f"{name} {protocol.version}"] == protocol.sha256


def test_rules_changed_without_a_version_are_refused(folder):
    change(folder / "quick.yaml", seeds=[0, 2])
    with pytest.raises(UserError, match="quick version 3 differs from the frozen protocol"):
        load_protocol("quick")
    with pytest.raises(UserError, match="differs from the frozen protocol"):
        load_protocol(folder / "quick.yaml")
    change(folder / "quick.yaml", version=4)
    with pytest.raises(UserError, match="quick version 4 was never frozen"):
        load_protocol("quick")
    assert load_protocol(folder / "quick.yaml").seeds == (0, 2), "a file of one's own needs no record"


def test_a_changed_list_of_captions_is_refused(folder):
    listed = load_protocol("openmoji").listed()
    assert {split: len(rows) for split, rows in listed.items()} == {"test-combinations": 240, "test-nouns": 109}
    file = folder / "openmoji.txt"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == load_protocol("openmoji").captions_sha256
    file.write_text(file.read_text().replace("supervillain", "villain"))
    with pytest.raises(UserError, match="not the captions of openmoji version 3"):
        load_protocol("openmoji").listed()


def test_the_list_is_what_the_package_of_pictures_holds_out():
    pytest.importorskip("emoji")
    openmoji = pytest.importorskip("dist_t2i.sharding.sources.openmoji")
    held_out = {(e.split, e.key, e.captions[0]) for e in openmoji.openmoji_entries() if e.split != "train"}
    listed = load_protocol("openmoji").listed()
    assert {(split, key, caption) for split, rows in listed.items() for key, caption in rows} == held_out


def test_mistakes_in_a_file_are_told_in_a_line(tmp_path):
    path = tmp_path / "mine.yaml"
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(Protocol("mine")).items()}
    for wrong, said in (
        ({"seeds": "none"}, "seeds: expected a list of whole numbers"),
        ({"seeds": []}, "seeds: empty"),
        ({"sedes": [1]}, "sedes: unknown"),
        ({"metrics": ["fid"]}, "fid needs efficientnet-lite0"),
        ({"metrics": ["ssim/clip"]}, "unknown metric 'ssim'"),
        ({"metrics": ["inception-score/clip"]}, "inception-score needs inception-clean"),
        ({"gallery": 1}, "gallery: must be at least 2"),
        ({"metrics": ["kid/scenes"]}, "kid needs efficientnet-lite0"),
        ({"metrics": ["attributes/clip"]}, "attributes needs scenes"),
        ({"metrics": ["diversity/clip"], "seeds": [3]}, "at least two seeds"),
    ):
        path.write_text(yaml.safe_dump(plain | wrong))
        with pytest.raises(UserError) as raised:
            load_protocol(path)
        assert said in str(raised.value) and "\n" not in str(raised.value)
    path.write_text("- no\n")
    with pytest.raises(UserError, match="key: value"):
        load_protocol(path)
    del plain["crop"]
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(UserError, match="crop: missing"):
        load_protocol(path)
    with pytest.raises(UserError, match=r"no protocol 'coco'; name one of coco30k"):
        load_protocol("coco")
    with pytest.raises(UserError, match="No such file"):
        load_protocol(tmp_path / "none.yaml")


def test_captions_by_hash_do_not_depend_on_the_order_of_the_set(data):
    protocol = Protocol("mine", captions="hash", max_pictures=10)
    selection = select(data, "test", protocol)
    expected = sorted(
        (sample.key for sample in data.samples("test")),
        key=lambda key: hashlib.sha256(f"mine {key}".encode()).digest()[:8],
    )[:10]
    assert list(selection.keys) == expected
    again = dataclasses.replace(protocol, version=2, max_pictures=12)
    assert select(data, "test", again).keys[:10] == selection.keys, "another version draws alike"


def test_distinct_captions_are_taken_in_the_order_of_the_set(tmp_path):
    write_set(tmp_path / "set", scene_items(400, 16, seed=0), [], Options(size=16))
    data = open_set(tmp_path / "set")
    samples = data.samples("test-combinations")
    everything = select(data, "test-combinations", Protocol("mine", captions="distinct"))
    captions = [row[0] for row in everything.captions]
    assert len(set(captions)) == len(captions) and list(everything.numbers) == sorted(everything.numbers)
    for number, caption in zip(everything.numbers, captions, strict=True):
        assert caption in samples[number].captions
    skipped = set(range(len(samples))) - set(everything.numbers)
    assert all(set(samples[number].captions) <= set(captions) for number in skipped)
    first = select(data, "test-combinations", Protocol("mine", captions="distinct", max_pictures=20))
    assert first.rows() == everything.rows()[:20]
    again = first.same_caption(3, 16)
    assert first.rendered and again.shape == (SAME_CAPTION, 3, 16, 16) and not torch.equal(again[0], again[1])
    assert torch.equal(
        again, select(data, "test-combinations", Protocol("mine", captions="distinct")).same_caption(3, 16)
    )


@pytest.mark.parametrize(
    ("name", "command"), [("scenes", "scenes"), ("openmoji-styles", "openmoji --styles color black")]
)
def test_attributes_that_a_set_lacks(data, name, command):
    protocol = dataclasses.replace(load_protocol(name), splits=("test",), min_pictures=4)
    with pytest.raises(UserError, match=f"needs the attributes .* tools/shard.py {command} wrote"):
        select(data, "test", protocol)


def test_listed_captions_are_looked_for(folder, data):
    keys = [(s.key, s.captions[0]) for s in data.samples("test")][4:0:-1]
    text = rules.captions_text({"test": keys})
    (folder / "mine.txt").write_text(text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    protocol = Protocol("mine", splits=("test",), captions="listed", captions_sha256=sha256)
    assert select(data, "test", protocol).rows() == keys and has_listed(data, protocol)
    for change, said in (
        (("nowhere", "a caption"), "lacks 1 of the 4"),
        ((keys[0][0], "no"), "but protocol mine lists"),
    ):
        listed = {"test": [change, *keys[1:]]}
        (folder / "mine.txt").write_text(rules.captions_text(listed))
        other = dataclasses.replace(protocol, captions_sha256=rules.captions_sha256(listed))
        assert has_listed(data, other) == (change[0] != "nowhere")
        with pytest.raises(UserError, match=said):
            select(data, "test", other)
