"""Tars of other tools become a set without being changed."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import webdataset

from dist_t2i.data.indexing import indexed_set
from dist_t2i.data.open_data import open_data, open_entry
from dist_t2i.data.tar_reader import read_tar
from dist_t2i.errors import DataError
from dist_t2i.storage.clients import FROM_ENVIRONMENT
from dist_t2i.storage.shard_file import LocalFile
from pictures import config_for, encoded, make_set, picture, stream_of
from ranks import ROOT
from tars import write_tar


def write(path: Path, numbers: range, layout: str = "webdataset") -> Path:
    """Tars in the layout of webdataset's writer or img2dataset."""
    with webdataset.TarWriter(str(path)) as writer:
        for number in numbers:
            sample = {"__key__": f"{number:09d}", "jpg": encoded(picture(number), "JPEG", quality=95)}
            if layout == "img2dataset":
                about = {"url": "https://x", "caption": f"picture number {number}", "key": f"{number:09d}", "width": 40}
                sample |= {"json": json.dumps(about).encode(), "txt": f"picture number {number}".encode()}
            else:
                sample |= {"txt": f"picture number {number}\nanother caption {number}".encode()}
            writer.write(sample)
    return path


@pytest.fixture
def tars(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    layouts = ("webdataset", "img2dataset", "webdataset")
    return [write(tmp_path / f"f-{i:03d}.tar", range(i * 20, i * 20 + 20), name) for i, name in enumerate(layouts)]


def keys_read(data, config, count):
    stream = stream_of(config, data.tokenizer, data_set=data)
    found = []
    while len(found) < count:
        found += next(stream).keys
    stream.close()
    return found


def test_training_on_foreign_tars_indexes_them_once_and_reads_each_once_an_epoch(tars, capfd):
    before = [path.read_bytes() for path in tars]
    data = open_entry(f"{tars[0].parent}/f-*.tar", FROM_ENVIRONMENT)
    assert "3 of 3 shards indexed" in capfd.readouterr().err
    config = config_for(data, batch=4, workers=1)
    seen = keys_read(data, config, 60)
    assert sorted(seen) == [f"{number:09d}" for number in range(60)]
    again = open_data(config.data.__class__(**{**vars(config.data), "train": str(tars[0].parent / "f-{000..002}.tar")}))
    assert "indexed" not in capfd.readouterr().err and again.fingerprint == data.fingerprint
    folder = open_entry(str(tars[0].parent), FROM_ENVIRONMENT)
    assert folder.fingerprint == data.fingerprint
    assert [path.read_bytes() for path in tars] == before
    assert sorted(os.listdir(tars[0].parent)) == ["f-000.tar", "f-001.tar", "f-002.tar", "home"]


def test_a_rerun_reads_only_what_is_new_or_changed(tars, tmp_path, capfd):
    home = tmp_path / "index"
    first = indexed_set([str(path) for path in tars], FROM_ENVIRONMENT, home)
    (home / "index" / "00000001.json").unlink()
    (home / "manifest.json").unlink()
    capfd.readouterr()
    second = indexed_set([str(path) for path in tars], FROM_ENVIRONMENT, home)
    assert "1 of 1 shards indexed" in capfd.readouterr().err and second.manifest == first.manifest
    write(tars[2], range(100, 130))
    third = indexed_set([str(path) for path in tars], FROM_ENVIRONMENT, home)
    assert "1 of 1 shards indexed" in capfd.readouterr().err and third.fingerprint != first.fingerprint
    assert third.manifest["splits"]["train"]["samples"] == 70


def test_processes_that_come_at_once_index_once(tars, tmp_path):
    context = multiprocessing.get_context("fork")
    names = [str(path) for path in tars]
    several = [context.Process(target=indexed_set, args=(names, FROM_ENVIRONMENT, tmp_path / "i")) for _ in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    assert [process.exitcode for process in several] == [0] * 4
    assert indexed_set(names, FROM_ENVIRONMENT, tmp_path / "i").manifest["splits"]["train"]["samples"] == 60


def test_our_own_shards_without_their_manifest_give_the_same_samples(tmp_path):
    ours = make_set(tmp_path, 30)
    names = sorted(str(path) for path in Path(ours.folder).glob("*.tar"))
    theirs = indexed_set(names, FROM_ENVIRONMENT, tmp_path / "home")
    assert [s.key for s in theirs.samples("train")] == [s.key for s in ours.samples("train")]
    for row in range(10):
        assert theirs.shards("train").read(0, row) == ours.shards("train").read(0, row)


def test_quick_indexing_passes_over_pictures(tars):
    whole, quick = (read_tar(LocalFile(str(tars[0])), checksums=checks, texts=True) for checks in (True, False))
    assert [(s.key, s.texts) for s in quick.samples] == [(s.key, s.texts) for s in whole.samples]
    for sample, other in zip(quick.samples, whole.samples, strict=True):
        for mine, theirs in zip(sample.members, other.members, strict=True):
            assert mine[:3] == theirs[:3] and mine.crc32 == (theirs.crc32 if mine.extension == "txt" else -1)


def test_what_cannot_be_used_is_listed_and_the_rest_goes_on(tmp_path):
    jpg = encoded(picture(1), "JPEG")
    members = [("a.jpg", jpg), ("a.txt", b"one"), ("b.jpg", jpg), ("c.txt", b"three"), ("d.jpg", jpg), ("d.json", b"{")]
    members += [("e.jpg", jpg), ("e.json", b'["x", "y"]'), ("e.mask.npy", b"1"), ("README", b"no sample")]
    found = indexed_set([str(write_tar(tmp_path / "a.tar", members))], FROM_ENVIRONMENT, tmp_path / "home")
    assert [(sample.key, sample.captions) for sample in found.samples("train")] == [("a", ("one",)), ("e", ("x", "y"))]
    lines = [json.loads(line) for line in (tmp_path / "home" / "bad_samples.jsonl").read_text().splitlines()]
    assert [(line["picture"], line["reason"]) for line in lines] == [
        ("b", "no caption"),
        ("c", "no picture"),
        ("d", "captions cannot be read"),
    ]


@pytest.mark.parametrize("at", [0.3, 0.6, 0.999])
def test_a_cut_tar_keeps_what_is_whole(tmp_path, at):
    path = write(tmp_path / "a.tar", range(20))
    whole = read_tar(LocalFile(str(path)))
    data = path.read_bytes()[: int(whole.size * at)]
    path.write_bytes(data)
    for checksums in (True, False):
        cut = read_tar(LocalFile(str(path)), checksums=checksums)
        assert cut.samples and "cut short" in cut.problems[-1][1]
        flat = [member for sample in cut.samples for member in sample.members]
        assert all(member.offset + member.size <= len(data) for member in flat)
        assert [m[:3] for m in flat] == [m[:3] for sample in whole.samples for m in sample.members][: len(flat)]


def test_garbage_between_members_costs_what_it_hit(tmp_path):
    path = write(tmp_path / "a.tar", range(20))
    whole = read_tar(LocalFile(str(path)))
    data = bytearray(path.read_bytes())
    hit = whole.samples[7].members[0]
    data[hit.offset - 512 : hit.offset] = numpy.random.default_rng(0).integers(0, 255, 512, dtype=numpy.uint8).tobytes()
    path.write_bytes(data)
    found = indexed_set([str(path)], FROM_ENVIRONMENT, tmp_path / "home")
    assert [s.key for s in found.samples("train")] == [
        sample.key for row, sample in enumerate(whole.samples) if row != 7
    ]
    assert any("header cannot be read" in reason for reason in found.manifest["bad_samples"])


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x"), ("b.txt", b"y")])
    with pytest.raises(DataError, match=r"hold no picture with a caption\n  2 x no picture"):
        indexed_set([str(path)], FROM_ENVIRONMENT, tmp_path / "home")
    (tmp_path / "b.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DataError, match=r"b\.tar: cannot be indexed: not a tar"):
        indexed_set([str(tmp_path / "b.tar")], FROM_ENVIRONMENT, tmp_path / "home2")
    with pytest.raises(DataError, match=r"c\.tar: cannot be indexed: No such file"):
        indexed_set([str(tmp_path / "c.tar")], FROM_ENVIRONMENT, tmp_path / "home3")


def test_the_command(tars, tmp_path):
    out = tmp_path / "set"
    command = [
        sys.executable,
        str(ROOT / "tools" / "shard.py"),
        "index",
        f"{tars[0].parent}/f-*.tar",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train: 60 pictures in 3 tars" in done.stdout and f"set: {out}" in done.stdout
    shown = subprocess.run([*command[:2], "inspect", str(out)], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0 and "60" in shown.stdout, shown.stderr
    assert (tmp_path / "contact_sheet.png").stat().st_size > 1000
    whole = subprocess.run([*command[:2], "verify", str(out)], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    data = bytearray(tars[1].read_bytes())
    data[2000] ^= 1
    tars[1].write_bytes(data)
    hurt = subprocess.run([*command[:2], "verify", str(out)], capture_output=True, text=True)
    assert hurt.returncode == 1 and "crc32 of" in hurt.stdout and "f-001.tar" in hurt.stdout
    wrong = subprocess.run([*command[:3], "pipe:cat x"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "commands are not run" in wrong.stderr and "Traceback" not in wrong.stderr
