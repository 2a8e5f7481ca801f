"""Faults between object storage and training: every planned sample is delivered, or listed with its reason.

A real S3 server behind a proxy that injects faults, two loader workers in a process of their own, and one epoch
read under each fault. The rows are compared with those of the same set on the local disk, read without any fault.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
from PIL import Image

from dist_t2i.data.tar_reader import read_tar
from dist_t2i.sharding.sources.folder import find_items
from dist_t2i.sharding.write_set import write_set
from dist_t2i.sharding.writing.prepare import Options
from dist_t2i.storage.shard_file import LocalFile
from fault_proxy import FaultProxy
from faults import Close, FlippedBit, Replaced, Reset, Stall, Status, Trickle, WrongLength
from object_store import S3Server, without_aws
from pictures import encoded
from prefork import Program, Started
from ranks import ROOT

PROGRAM = Program(ROOT / "tests" / "support" / "programs" / "stream.py", "dist_t2i.data.stream.stream", "webdataset")
COUNT, SHARD = 96, 16
EPOCHS = 2
TABLE: list[tuple[str, int, int, int, int]] = []
"""Fault, planned, delivered, replaced, unaccounted: printed at the end of the test run (conftest.py)."""


@pytest.fixture(autouse=True)
def _told(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Adds rows to the table through the test's report, which reaches the process that prints the table."""
    before = len(TABLE)
    yield
    for row in TABLE[before:]:
        record_property("fault", row)


@dataclass
class Store:
    """The set on disk, the server, the proxy, and the samples of a stream without faults."""

    folder: Path
    server: S3Server
    proxy: FaultProxy
    clean: dict[int, tuple[str, int]]

    def read(self, work: Path, **config: Any) -> tuple[dict[str, Any], str]:
        """The output of tests/support/programs/stream.py, and its stderr."""
        with self.start(work, **config) as process:
            out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "Traceback" not in err, err
        return json.loads(out), err

    def start(self, work: Path, **config: Any) -> Started:
        config = {
            "data.train": "s3://data/set",
            "data.workers": 2,
            "data.max_bad_fraction": 0.5,
            "data.retry_seconds": 60.0,
            "data.stall_seconds": 2.0,
            "data.cache": str(work / "cache"),
            "images": EPOCHS * COUNT,
            "bad_file": str(work / "bad_samples.jsonl"),
        } | {name.replace("__", "."): value for name, value in config.items()}
        environment = {**without_aws(os.environ), **self.proxy.environment, "XDG_CACHE_HOME": str(work / "home")}
        return PROGRAM.start(json.dumps(config), environment=environment)

    def account(self, name: str, reported: dict[str, Any], work: Path, clean: dict[int, tuple[str, int]] = {}) -> int:  # noqa: B006
        """Checks every position of the run; returns the number of replaced samples."""
        clean = clean or self.clean
        rows = {position: (key, total) for position, key, total in reported["rows"]}
        assert not reported["error"], reported["error"]
        assert sorted(rows) == list(range(EPOCHS * COUNT)) and len(reported["rows"]) == len(rows)
        listed = work / "bad_samples.jsonl"
        lines = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
        bad = {line["position"]: line for line in lines if line["position"] < EPOCHS * COUNT}
        delivered = replaced = 0
        for position, (key, total) in rows.items():
            if position in bad:
                assert bad[position]["replaced_by"] == key and bad[position]["reason"] and bad[position]["shard"]
                replaced += 1
            elif (key, total) == clean[position]:
                delivered += 1
        unaccounted = EPOCHS * COUNT - delivered - replaced
        TABLE.append((name, EPOCHS * COUNT, delivered, replaced, unaccounted))
        assert unaccounted == 0
        return replaced


def noise(number: int) -> bytes:
    """A JPEG of some kilobytes."""
    values = numpy.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=numpy.uint8)
    return encoded(Image.fromarray(values), "JPEG", quality=90)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    base = tmp_path_factory.mktemp("faults")
    (base / "pictures").mkdir()
    for number in range(COUNT):
        (base / "pictures" / f"p{number:04d}.jpg").write_bytes(noise(number))
        (base / "pictures" / f"p{number:04d}.txt").write_text(f"noise number {number}")
    items, problems = find_items(base / "pictures", None, 0.0)
    write_set(base / "set", items, problems, Options(shard_samples=SHARD))
    with S3Server(base / "s3") as server, FaultProxy(server.endpoint) as proxy:
        found = Store(base / "set", server, proxy, {})
        server.put_folder(base / "set", "set/")
        reported, _ = found.read(base, data__train=str(base / "set"), bad_file=None)
        found.clean = {position: (key, total) for position, key, total in reported["rows"]}
        yield found


@pytest.fixture
def mended(store: Store) -> Iterator[Store]:
    """The store, which is restored after the test."""
    yield store
    store.proxy.clear()
    store.server.put_folder(store.folder, "set/")


def keys_of(store: Store, shard: str) -> set[str]:
    with tarfile.open(store.folder / shard) as tar:
        return {name.partition(".")[0] for name in tar.getnames()}


PASSING: dict[str, Callable[[FaultProxy], object]] = {
    "404 three times": lambda proxy: proxy.add(Status(404), path="*.tar", first=3),
    "403 three times": lambda proxy: proxy.add(Status(403), path="*.tar", first=3),
    "500 six times": lambda proxy: proxy.add(Status(500), path="*", first=6),
    "503 for six seconds": lambda proxy: proxy.add(Status(503), path="*", seconds=6.0),
    "reset in mid-body": lambda proxy: proxy.add(Reset(after=3000), path="*.tar", first=8),
    "clean close in mid-body": lambda proxy: proxy.add(Close(after=3000), path="*.tar", first=8),
    "stall before the response": lambda proxy: proxy.add(Stall(6.0), path="*.tar", first=2),
    "stall in mid-body": lambda proxy: proxy.add(Stall(6.0, after=2000), path="*.tar", first=2),
    "slow trickle": lambda proxy: proxy.add(Trickle(20_000), path="*.tar", first=3),
    "length too long": lambda proxy: proxy.add(WrongLength(500), path="*.tar", first=4),
    "length too short": lambda proxy: proxy.add(WrongLength(-500), path="*.tar", first=4),
}


CASES = [(name, "") for name in PASSING] + [
    (name, "none") for name in ("503 for six seconds", "reset in mid-body", "stall in mid-body", "length too long")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cache"), CASES)
def test_faults_that_pass_cost_nothing(mended: Store, tmp_path: Path, name: str, cache: str):
    rule = PASSING[name](mended.proxy)
    reported, _ = mended.read(tmp_path, **({"data__cache": cache} if cache else {}))
    assert rule.hits > 0
    assert mended.account(f"{name}{', no cache' if cache else ''}", reported, tmp_path) == 0


@pytest.mark.slow
def test_without_faults_each_chunk_is_asked_for_once_and_most_samples_come_from_them(mended: Store, tmp_path: Path):
    reported, _ = mended.read(tmp_path)
    assert mended.account("no fault", reported, tmp_path) == 0
    sizes = {path.name: path.stat().st_size for path in mended.folder.glob("*.tar")}
    asked = [request for request in mended.proxy.seen("*.tar", "GET") if request.status == 206]
    whole = [request for request in asked if request.sent == sizes[request.path.rpartition("/")[2]]]
    assert len(whole) == len(sizes), "each shard is one chunk"
    assert len(asked) - len(whole) < COUNT / 4


def test_the_server_gone_and_back(mended: Store, tmp_path: Path):
    with mended.start(tmp_path, pause=0.2) as process:
        time.sleep(2)
        mended.server.stop()
        time.sleep(3)
        mended.server.start()
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert mended.account("the server stops and restarts", json.loads(out), tmp_path) == 0


@pytest.mark.slow
def test_connection_refused(mended: Store, tmp_path: Path):
    with mended.start(tmp_path, data__cache="none", pause=0.1) as process:
        time.sleep(1.5)
        with mended.proxy.down():
            time.sleep(4)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert mended.account("connection refused", json.loads(out), tmp_path) == 0


def damaged(
    store: Store, name: str, change: Callable[[bytearray, dict[str, tarfile.TarInfo]], bytes | bytearray]
) -> None:
    """Puts a changed shard into the bucket."""
    path = store.folder / name
    with tarfile.open(path) as tar:
        members = {info.name: info for info in tar}
    store.server.put(f"set/{name}", bytes(change(bytearray(path.read_bytes()), members)))


def flip(data: bytearray, members: dict[str, tarfile.TarInfo]) -> bytearray:
    pictures = [info for name, info in members.items() if name.endswith(".jpg")]
    data[pictures[2].offset_data + pictures[2].size // 2] ^= 4
    return data


def spoil(data: bytearray, members: dict[str, tarfile.TarInfo]) -> bytearray:
    pictures = [info for name, info in members.items() if name.endswith(".jpg")]
    for info in pictures[:3]:
        data[info.offset_data : info.offset_data + 200] = bytes(200)
    return data


def cut(data: bytearray, members: dict[str, tarfile.TarInfo]) -> bytearray:
    return data[: len(data) // 2]


def garble(data: bytearray, members: dict[str, tarfile.TarInfo]) -> bytearray:
    info = next(info for name, info in list(members.items())[10:] if name.endswith(".jpg"))
    data[info.offset : info.offset + 512] = b"\xa5" * 512
    return data


def reindex(store: Store, name: str, work: Path) -> None:
    """Writes a new index of a changed shard, as if the shard had always been like this."""
    (work / name).write_bytes(store.server.get(f"set/{name}"))
    index = read_tar(LocalFile(str(work / name))).index()
    store.server.put(f"set/{name.replace('.tar', '.index')}", index.to_bytes())


LASTING = {
    "a flipped bit inside a JPEG": (flip, 1, "checksum of .jpg differs"),
    "a corrupt JPEG": (spoil, 3, "does not decode"),
    "a truncated tar": (cut, None, "cut short"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LASTING)
def test_damage_that_lasts_is_replaced_and_listed(mended: Store, tmp_path: Path, name: str):
    change, count, reason = LASTING[name]
    damaged(mended, "train-00002.tar", change)
    if change is spoil:
        reindex(mended, "train-00002.tar", tmp_path)
    reported, _ = mended.read(tmp_path)
    replaced = mended.account(name, reported, tmp_path)
    assert replaced == EPOCHS * count if count else 0 < replaced < EPOCHS * SHARD
    assert all(reason in line for line in reported["bad"]), reported["bad"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("permanent 404", 404), ("permanent 403", 403), ("permanent 500", 500)])
def test_a_shard_that_cannot_be_had_is_replaced_and_listed(mended: Store, tmp_path: Path, name: str, status: int):
    mended.proxy.add(Status(status), path="*/train-00003.tar")
    reported, _ = mended.read(tmp_path, data__retry_seconds=2.0, data__cache="none")
    assert mended.account(name, reported, tmp_path) == EPOCHS * SHARD
    assert sum(reported["bad"].values()) >= EPOCHS * SHARD


@pytest.mark.slow
def test_strict_and_too_much_stop_and_name_the_shard(mended: Store, tmp_path: Path):
    mended.server.delete("set/train-00003.tar")
    strict, _ = mended.read(tmp_path / "strict", data__retry_seconds=1.0, data__on_bad="strict", bad_file=None)
    assert "train-00003.tar" in strict["error"] and "data.on_bad is strict" in strict["error"]
    few, _ = mended.read(tmp_path / "few", data__retry_seconds=1.0, data__max_bad_fraction=0.02, bad_file=None)
    assert "more than data.max_bad_fraction" in few["error"]


@pytest.mark.slow
def test_a_bit_flipped_on_the_way_is_read_again(mended: Store, tmp_path: Path):
    offset = (mended.folder / "train-00001.tar").stat().st_size // 3
    rule = mended.proxy.add(FlippedBit(offset), path="*/train-00001.tar", first=1)
    reported, _ = mended.read(tmp_path)
    assert rule.hits == 1
    # The cached part with the flipped bit is fetched again; without a cache, the sample would be listed.
    assert mended.account("a bit flipped during the transfer", reported, tmp_path) in (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["", "none"], ids=["cache", "no cache"])
def test_an_object_replaced_while_being_read(mended: Store, tmp_path: Path, cache: str):
    """An object with the same layout, but three other pictures, replaces the object. These three are listed."""

    def replace() -> None:
        damaged(mended, "train-00004.tar", spoil)

    rule = mended.proxy.add(Replaced(replace, after=30_000), path="*/train-00004.tar", first=1)
    reported, _ = mended.read(tmp_path, **({"data__cache": cache} if cache else {}))
    replaced = mended.account(f"replaced while being read{', no cache' if cache else ''}", reported, tmp_path)
    # The old bytes of the three may have been delivered before; then they were the planned samples.
    assert rule.hits == 1 and replaced <= 3 * EPOCHS


@pytest.mark.slow
def test_foreign_tars_with_damage(mended: Store, tmp_path: Path):
    """The tars are indexed on first use. Damaged samples are left out and listed then; the others form the epoch."""
    damaged(mended, "train-00001.tar", garble)
    damaged(mended, "train-00005.tar", cut)
    reported, err = mended.read(tmp_path, data__train="s3://data/set/train-{00000..00005}.tar")
    assert "6 of 6 shards indexed" in err
    home = next((tmp_path / "home" / "dist_t2i" / "sets").iterdir())
    manifest = json.loads((home / "manifest.json").read_text())
    listed = [json.loads(line) for line in (home / "bad_samples.jsonl").read_text().splitlines()]
    samples = manifest["splits"]["train"]["samples"]
    lost = keys_of(mended, "train-00005.tar")
    seen = {key for _, key, _ in reported["rows"][:samples]}
    assert len(seen) == samples and not reported["bad"] and not reported["error"]
    missing = {f"p{number:04d}" for number in range(COUNT)} - seen
    assert len(missing & keys_of(mended, "train-00001.tar")) == 1 and missing < lost | keys_of(
        mended, "train-00001.tar"
    )
    assert {line["where"] for line in listed} == {"train-00001.tar", "train-00005.tar"}
    TABLE.append(("damaged tars, indexed on first use", COUNT, samples, COUNT - samples, 0))


@pytest.mark.slow
def test_a_name_that_cannot_be_resolved(mended: Store, tmp_path: Path):
    reported, _ = mended.read(tmp_path, data__endpoint="http://no-such-host.invalid:1", data__retry_seconds=1.0)
    assert (
        "cannot read the manifest s3://data/set/manifest.json" in reported["error"] and "resolved" in reported["error"]
    )


@pytest.mark.slow
def test_a_worker_killed_with_kill_9(mended: Store, tmp_path: Path):
    with mended.start(tmp_path, pause=0.15) as process:
        end = time.monotonic() + 60
        while len(workers := psutil.Process(process.pid).children()) < 3:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        time.sleep(1.0)
        workers[-1].kill()
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "a data loader worker was killed" in err
    assert mended.account("a worker killed with -9", json.loads(out), tmp_path) == 0


@pytest.mark.slow
def test_a_full_disk_means_no_cache(mended: Store, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs root, to mount a disk that is small enough to fill")
    try:
        reported, err = mended.read(tmp_path, data__cache=str(disk))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert "No space left on device" in err and "no more chunks are stored" in err
    assert mended.account("the cache's disk is full", reported, tmp_path) == 0


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(mended: Store, tmp_path: Path):
    (tmp_path / "file").write_text("")
    reported, err = mended.read(tmp_path, data__cache=str(tmp_path / "file" / "cache"))
    assert "no more chunks are stored" in err
    assert mended.account("a cache that cannot be written", reported, tmp_path) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "workers", "start", "cache"),
    [(1, 1, 40, ""), (2, 2, 104, ""), (4, 1, 8, "none"), (1, 3, 184, "none")],
)
def test_any_world_and_worker_count_goes_on_anywhere(
    store: Store, tmp_path: Path, world_size: int, workers: int, start: int, cache: str
):
    """Without faults, object storage gives the same rows as the disk, from any start, for any number of ranks and
    workers."""
    rows: dict[int, tuple[str, int]] = {}
    count = (EPOCHS * COUNT - start) // 8 * 8
    cache = cache or str(tmp_path / "cache")
    places = {"start": start, "images": count, "world_size": world_size, "data__workers": workers}
    ranks = [store.start(tmp_path, **places, rank=rank, data__cache=cache) for rank in range(world_size)]
    for process in ranks:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        reported = json.loads(out)
        assert reported["bad"] == {} and reported["error"] == "", "a machine so slow that reads were given up on"
        for position, key, total in reported["rows"]:
            assert position not in rows
            rows[position] = key, total
    assert rows == {position: store.clean[position] for position in range(start, start + count)}
