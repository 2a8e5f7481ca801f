"""Tars of webdataset and img2dataset are sharded again: filtered, shrunk, and without running any content."""

import json

import pytest
import webdataset

from dist_t2i.data.shard_set import open_set
from pictures import encoded, make_set, picture
from shard_tool import captions_by_key, contents, problems, reasons, shard
from tars import harmful_pickle, write_tar


def old_tars(folder, count=3, each=6):
    """Tars in img2dataset's layout: key.jpg, key.txt, key.json with the caption and more; pictures of growing size."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(count):
        with webdataset.TarWriter(str(folder / f"{part:05d}.tar")) as writer:
            for number in range(part * each, part * each + each):
                said = f"{'red' if number % 2 else 'blue'} thing {number}"
                facts = {"caption": said, "url": f"http://x/{number}", "status": "success", "width": 3}
                data = encoded(picture(number, (40 + 4 * number, 40)), "JPEG")
                writer.write({"__key__": f"{part:05d}{number:04d}", "jpg": data, "txt": said, "json": facts})


def test_tars_are_sharded_anew_and_their_bytes_pass(tmp_path):
    old_tars(tmp_path / "old")
    shard("webdataset", str(tmp_path / "old") + "/{00000..00002}.tar", "--out", tmp_path / "set", "--shard-samples", 7)
    data_set = open_set(tmp_path / "set")
    assert [one["samples"] for one in data_set.manifest["splits"]["train"]["shards"]] == [7, 7, 4]
    for sample in data_set.samples("train"):
        number = int(sample.key[5:])
        assert sample.image_bytes == encoded(picture(number, (40 + 4 * number, 40)), "JPEG")
        assert sample.captions == (f"{'red' if number % 2 else 'blue'} thing {number}",)
        assert sample.attributes["url"] == f"http://x/{number}" and "caption" not in sample.attributes
    shard("webdataset", tmp_path / "old", "--out", tmp_path / "again", "--shard-samples", 7, "--processes", 2)
    first, second = contents(tmp_path / "set"), contents(tmp_path / "again")
    tars = {name for name in first if name.endswith((".tar", ".index"))}
    assert {name: first[name] for name in tars} == {name: second[name] for name in tars}


def test_filters_and_shrinking(tmp_path):
    old_tars(tmp_path / "old")
    arguments = ["--max-aspect", 2, "--caption-matches", "^RED", "--caption-excludes", r"\b3\b"]
    shard("webdataset", tmp_path / "old", "--out", tmp_path / "set", *arguments, "--size", 20, "--format", "webp")
    samples = list(open_set(tmp_path / "set").samples("train"))
    assert {int(one.key[5:]) for one in samples} == {1, 5, 7, 9}
    assert all(one.extension == "webp" and min(one.image.size) == 20 for one in samples)
    listed = reasons(tmp_path / "set")
    assert ("000000003", "no caption passes the filter") in listed
    assert ("000010011", "picture longer than --max-aspect 2") in listed
    done = shard("webdataset", tmp_path / "old", "--out", tmp_path / "x", "--min-side", 50, check=False)
    assert done.returncode == 2 and "18 x picture smaller than --min-side 50" in done.stderr
    done = shard("webdataset", tmp_path / "old", "--out", tmp_path / "x", "--caption-matches", "(", check=False)
    assert done.returncode == 2 and "not a regular expression: (" in done.stderr


def test_our_own_sets_keep_their_splits(tmp_path):
    old = make_set(tmp_path, 60, holdout=0.3)
    shard("webdataset", old.folder, "--out", tmp_path / "new", "--holdout", 0.5)
    for split in ("train", "test"):
        assert captions_by_key(tmp_path / "new", split) == captions_by_key(old.folder, split)


def test_damaged_tars_give_what_is_whole(tmp_path):
    old_tars(tmp_path / "old")
    first, second = (tmp_path / "old" / f"0000{number}.tar" for number in range(2))
    first.write_bytes(first.read_bytes()[:9000])
    data = bytearray(second.read_bytes())
    data[0:512] = b"\xff" * 512
    second.write_bytes(data)
    shard("webdataset", tmp_path / "old", "--out", tmp_path / "set")
    found = set(captions_by_key(tmp_path / "set"))
    assert found >= {f"00002{number:04d}" for number in range(12, 18)} and 6 < len(found) < 12
    listed = problems(tmp_path / "set")
    assert any(where == "00000.tar" and ("cut short" in reason or "damaged" in reason) for where, _, reason in listed)
    assert any(where == "00001.tar" and "damaged" in reason for where, _, reason in listed)


def test_odd_members_are_listed_and_nothing_is_run(tmp_path):
    ran = tmp_path / "ran"
    image = encoded(picture(1))
    members = [("a.png", image), ("a.txt", b"one\ntwo\n"), ("a.pyd", harmful_pickle(ran))]
    members += [("b.png", image), ("c.txt", b"alone"), ("d.png", image), ("d.json", b"{"), ("e.png", image)]
    members += [
        ("e.json", json.dumps({"captions": ["x", 3]}).encode()),
        ("f.jpeg", image),
        ("f.json", b'{"caption": ""}'),
    ]
    members += [("g.png", b"broken"), ("g.txt", b"said"), ("a.png", image)]
    write_tar(tmp_path / "odd.tar", members)
    shard("webdataset", tmp_path / "odd.tar", "--out", tmp_path / "set")
    assert captions_by_key(tmp_path / "set") == {"a": ("one", "two")} and not ran.exists()
    assert reasons(tmp_path / "set") == {
        ("odd.tar", "1 pickles were not read, because they can run code"),
        ("b", "no caption"),
        ("c", "captions without a picture"),
        ("d", "json cannot be read"),
        ("e", "captions are no text"),
        ("f", "no caption"),
        ("g", "picture does not decode"),
    }


@pytest.mark.parametrize(
    ("argument", "says"),
    [("none.tar", "neither a tar nor a"), ("pipe:touch ran", "commands are not run"), ("s3::x://a", "be chained")],
)
def test_mistakes_are_reported(tmp_path, argument, says):
    done = shard("webdataset", argument, "--out", tmp_path / "set", check=False, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "ran").exists()
