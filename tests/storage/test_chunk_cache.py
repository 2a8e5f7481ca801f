"""The disk cache: limited in size, shared by processes, with atomic parts, and without locks after kill -9."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from dist_t2i.storage.chunk_cache import ChunkCache, key_of

SIZE = 1000


def cache_in(folder, chunks=10):
    cache = ChunkCache(str(folder / "cache"), chunks * SIZE)
    assert cache.prepare()
    return cache


def chunk(number: int) -> bytes:
    return bytes([number % 256]) * SIZE


def writes(data: bytes):
    """A function that fetches `data`."""
    return lambda file: file.write(data)


def fails(why: str):
    return lambda file: pytest.fail(why)


def kept(cache, key, numbers) -> list[int]:
    return [number for number in numbers if cache.path(key, number).exists()]


def test_what_is_kept_is_read_back(tmp_path):
    cache, key = cache_in(tmp_path), key_of("s3://b/a.tar", "v1")
    assert cache.read(key, 0, 0, 10) is None and not cache.path(key, 0).exists()
    assert cache.fill(key, 0, SIZE, writes(chunk(7))) and cache.path(key, 0).exists()
    assert cache.read(key, 0, 990, 100) == chunk(7)[990:]
    assert cache.fill(key, 0, SIZE, fails("it is there"))
    assert key_of("s3://b/a.tar", "v2") != key, "another version is another object"
    cache.forget(key, 0)
    assert cache.read(key, 0, 0, 10) is None


def test_the_least_recently_used_go_first(tmp_path):
    cache, key = cache_in(tmp_path), key_of("a", "")
    for number in range(10):
        cache.fill(key, number, SIZE, writes(chunk(number)))
        os.utime(cache.path(key, number), (number, number))
    other = ChunkCache(str(cache.folder), cache.limit)  # in another process, which has no files open
    assert other.read(key, 0, 0, 1) == b"\0", "used just now"
    other.fill(key, 10, SIZE, writes(chunk(10)))
    assert kept(other, key, range(11)) == [0, 3, 4, 5, 6, 7, 8, 9, 10]
    assert cache.read(key, 1, 0, 1) is None


def test_the_bound_holds_whatever_comes(tmp_path):
    cache, key = cache_in(tmp_path), key_of("a", "")
    for number in range(40):
        cache.fill(key, number, SIZE, writes(chunk(number)))
        assert len(kept(cache, key, range(40))) <= 10
    (cache.folder / "total").write_text("nonsense")
    for number in range(40, 60):
        cache.fill(key, number, SIZE, writes(chunk(number)))
    assert len(kept(cache, key, range(60))) <= 10


def test_errors_of_a_fetch_are_the_callers_and_leave_nothing(tmp_path):
    cache, key = cache_in(tmp_path), key_of("a", "")

    def broken(file) -> None:
        file.write(chunk(2)[:300])
        raise ConnectionResetError("reset")

    with pytest.raises(ConnectionResetError):
        cache.fill(key, 0, SIZE, broken)
    assert cache.works and not cache.path(key, 0).exists()
    assert not [path for path in cache.folder.rglob("*.part") if path.stat().st_size]
    assert cache.fill(key, 0, SIZE, writes(chunk(1)))


def test_two_at_once_the_second_goes_on(tmp_path):
    cache, key = cache_in(tmp_path), key_of("a", "")
    other = ChunkCache(str(cache.folder), cache.limit)
    begun, go = threading.Event(), threading.Event()

    def slow(file) -> None:
        file.write(chunk(3)[:500])
        begun.set()
        go.wait()
        file.write(chunk(3)[500:])

    first = threading.Thread(target=cache.fill, args=(key, 0, SIZE, slow))
    first.start()
    begun.wait()
    assert other.fill(key, 0, SIZE, fails("somebody is at it")) is False
    assert other.read(key, 0, 0, 10) is None, "not there before it is whole"
    for waiting in (cache, other):  # in the process that fetches, and in another
        waiting.await_fill(key, 0, 0.02)
        assert not waiting.path(key, 0).exists(), "it waits at most the given seconds"
    threading.Timer(0.2, go.set).start()
    cache.await_fill(key, 0, 60)
    assert cache.path(key, 0).exists()
    other.await_fill(key, 0, 60)
    first.join()
    assert other.read(key, 0, 0, 10) == chunk(3)[:10]


def _fill_for_ever(folder, key, limit):
    cache, number = ChunkCache(folder, limit), 0
    while True:
        number += 1
        cache.fill(key, number % 50, SIZE, writes(os.urandom(1) * SIZE))


def test_kill_9_leaves_nothing_partial_and_nothing_that_blocks(tmp_path):
    cache, key = cache_in(tmp_path, 20), key_of("a", "")
    for _ in range(15):
        context = multiprocessing.get_context("fork")
        writers = [context.Process(target=_fill_for_ever, args=(str(cache.folder), key, cache.limit)) for _ in range(2)]
        for writer in writers:
            writer.start()
        time.sleep(0.1)
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        for number in kept(cache, key, range(50)):
            data = cache.path(key, number).read_bytes()
            assert len(data) == SIZE and len(set(data)) == 1
    fresh = ChunkCache(str(cache.folder), cache.limit)
    assert all(fresh.fill(key, number, SIZE, writes(chunk(1))) for number in range(50))
    assert len(kept(fresh, key, range(50))) <= 20


def test_a_read_only_folder_is_told_once(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    cache = ChunkCache(str(tmp_path / "file"), 10 * SIZE)
    assert not cache.prepare() and not cache.works
    assert cache.fill("ab", 0, SIZE, fails("nothing is kept")) is False
    assert capfd.readouterr().err.count("no more chunks are stored") == 1
