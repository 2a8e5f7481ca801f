"""Sets at a path or URL are written, inspected, and verified byte by byte."""

import json

import fsspec
import pytest
from PIL import Image

from dist_t2i.data.shard_set import open_set
from dist_t2i.errors import DataError
from dist_t2i.sharding.sources.folder import find_items
from dist_t2i.sharding.write_set import write_set
from dist_t2i.sharding.writing.prepare import Options
from dist_t2i.storage.folders import open_folder
from pictures import make_folder, make_set
from shard_tool import contents, shard


def test_inspect(tmp_path):
    made = make_set(tmp_path, 60, holdout=0.2)
    done = shard("inspect", made.folder, "--sheet", tmp_path / "new" / "sheet.png")
    counts = {split: part["samples"] for split, part in made.manifest["splits"].items()}
    for text in (
        made.fingerprint,
        f"{counts['train']}",
        f"{counts['test']}",
        "left out or changed: nothing",
        "said in way",
    ):
        assert text in done.stdout
    assert Image.open(tmp_path / "new" / "sheet.png").size[0] == 12 * 96
    captions = make_folder(tmp_path / "bad", 5)
    (tmp_path / "bad" / "p0003.png").write_bytes(b"broken")
    shard("folder", "--images", tmp_path / "bad", "--captions", captions, "--out", tmp_path / "listed")
    done = shard("inspect", f"file://{tmp_path}/listed", "--sheet", tmp_path / "sheet.png")
    assert "picture does not decode" in done.stdout and "p0003" in done.stdout


def test_verify(tmp_path):
    made = make_set(tmp_path, 40)
    done = shard("verify", made.folder, "--processes", 2)
    assert "all 4 shards" in done.stdout
    folder = tmp_path / "set"
    tar = folder / "train-00001.tar"
    data = bytearray(tar.read_bytes())
    at = data.find(b"\x89PNG") + 40
    data[at] ^= 1
    tar.write_bytes(data)
    index = folder / "train-00002.index"
    index.write_bytes(index.read_bytes()[:-1])
    (folder / "train-00003.tar").unlink()
    done = shard("verify", made.folder, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert sum(row[:2] == ["train-00001.tar", "sha256"] for row in rows) == 1
    assert sum(row[0] == "train-00001.tar" and "crc32" in row for row in rows) == 1, "one member of one sample"
    assert any(row[:2] == ["train-00002.index", "sha256"] for row in rows)
    assert any(row[0] == "train-00003.tar" for row in rows)
    (folder / "tokenizer.json").write_text("{}")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = shard("verify", made.folder, check=False)
    assert "tokenizer.json" in done.stdout and "fingerprint" in done.stdout and "train-00000.tar" in done.stdout


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_set_is_reported(tmp_path, command):
    done = shard(command, tmp_path, check=False)
    assert done.returncode == 2 and "there is no set" in done.stderr
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    done = shard(command, tmp_path, check=False)
    assert done.returncode == 2 and "is not the manifest of a set" in done.stderr


@pytest.mark.slow
def test_a_set_written_through_fsspec_is_the_one_on_a_disk(tmp_path):
    captions = make_folder(tmp_path / "pictures", 30)
    base = ["folder", "--images", tmp_path / "pictures", "--captions", captions, "--shard-samples", 8]
    shard(*base, "--out", tmp_path / "disk", "--processes", 1)
    url = f"local://{tmp_path}/far/away"
    shard(*base, "--out", url, "--processes", 2, TMPDIR=str(tmp_path))
    assert contents(tmp_path / "far" / "away") == contents(tmp_path / "disk")
    assert not list(tmp_path.glob("dist_t2i-*")), "the staging folder is removed"
    hurt = tmp_path / "far" / "away" / "train-00002.tar"
    hurt.write_bytes(hurt.read_bytes()[:-1])
    (tmp_path / "far" / "away" / "manifest.json").unlink()
    done = shard(*base, "--out", url)
    total = len(list((tmp_path / "disk").glob("*.tar")))
    assert f"{total - 1} of {total} shards exist already" in done.stderr
    assert contents(tmp_path / "far" / "away") == contents(tmp_path / "disk")
    assert f"all {total} shards" in shard("verify", url).stdout
    assert "30" in shard("inspect", url, "--sheet", tmp_path / "s.png").stdout
    done = shard(*base, "--out", f"local://{tmp_path}/pictures", check=False)
    assert done.returncode == 2 and "is not empty" in done.stderr


def test_memory_and_the_manifest_comes_last(tmp_path):
    captions = make_folder(tmp_path / "pictures", 12)
    items, problems = find_items(tmp_path / "pictures", captions, 0.0)
    write_set("memory://some/set", items, problems, Options(shard_samples=5))
    system = fsspec.filesystem("memory")
    dates = {path.rpartition("/")[2]: system.created(path) for path in system.find("/some/set", maxdepth=1)}
    assert max(dates, key=lambda name: dates[name]) == "manifest.json"
    place = open_folder("memory://some/set")
    assert place.names() == sorted(
        [".shard", *contents(make_set(tmp_path / "other", 12, shard_samples=5) and tmp_path / "other" / "set")]
    )
    assert place.read_range("train-00000.tar", 257, 5) == b"ustar"
    with pytest.raises(FileNotFoundError):
        place.read("nothing")


@pytest.mark.parametrize("url", ["pipe:touch ran", "|touch ran", "simplecache::s3://bucket/set"])
def test_no_command_is_run_and_no_system_chained(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"not run|cannot be chained"):
        open_folder(url)
    assert not list(tmp_path.iterdir())


def test_gaps_are_closed_and_a_rerun_keeps_all_that_is_whole(tmp_path):
    import hashlib

    captions = make_folder(tmp_path / "pictures", 12)
    order = sorted(range(12), key=lambda n: hashlib.sha256(f"p{n:04d}".encode()).digest())
    for number in order[3:6]:
        (tmp_path / "pictures" / f"p{number:04d}.png").write_bytes(b"broken")
    base = ["folder", "--images", tmp_path / "pictures", "--captions", captions, "--shard-samples", 3, "--holdout", 0]
    shard(*base, "--out", tmp_path / "set")
    assert len(open_set(tmp_path / "set").samples("train")) == 9
    before = contents(tmp_path / "set")
    assert "4 of 4 shards exist already" in shard(*base, "--out", tmp_path / "set").stderr
    (tmp_path / "set" / "train-00001.tar").unlink()
    assert "3 of 4 shards exist already" in shard(*base, "--out", tmp_path / "set").stderr
    assert contents(tmp_path / "set") == before
