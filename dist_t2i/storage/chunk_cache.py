"""A bounded cache on disk in which all processes of a machine share chunks of remote objects.

    CACHE/chunks/ab/abcdef.../0000012      bytes [12 * CHUNK, 13 * CHUNK) of one version of one object
                             /.0000013.part    a chunk that the process with the lock on this file is fetching
         /total                            an upper bound on the bytes of all chunks (changed under CACHE/lock)

Chunks appear by a rename, so they are always complete. Only one process fetches a chunk; a second one that wants it sees
the lock and does other work. The lock is the kernel's (flock) and ends with its process, so kill -9 leaves nothing that
blocks. Beyond the bound the least recently used chunks are removed; a process that has one open can still read it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK = 2**23
"""Bytes of a chunk; the last one of an object is shorter."""
_KEPT_OPEN = 256
_POLL, _POLLED_FOR = 0.005, 0.1
"""Seconds between checks whether another process has finished a chunk, and for how long `await_fill` checks."""
_ROOM = 0.9
"""Share of the bound to which an eviction reduces the cache."""
_NO_ROOM = {getattr(errno, name) for name in "ENOSPC EDQUOT EROFS EACCES EPERM EFBIG EIO ENOTDIR ELOOP".split()}


def key_of(url: str, version: str) -> str:
    """The key of one version of one object."""
    return hashlib.sha256(f"{url}\n{version}".encode()).hexdigest()[:40]


class ChunkCache:
    """The cache in `folder`, of at most `limit` bytes. Threads may share it; picklable.

    When the disk is full or not writable it warns once and stores no more chunks, but raises nothing.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._begin()

    def _begin(self) -> None:
        self._open: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._lock = threading.Lock()
        self._filling: dict[Path, threading.Event] = {}
        self.works = self.limit > 0
        """Whether new chunks can be stored."""
        self.fill_seconds = 0.0
        """Seconds that this process needed for its latest full-sized chunk. 0 before the first one: readers that assumed a
        slow network would request most samples of the first window twice."""
        self._pid = os.getpid()

    def __reduce__(self) -> tuple:
        return ChunkCache, (str(self.folder), self.limit)

    def prepare(self) -> bool:
        """Creates the folder. False, after a warning, if it cannot be written."""
        try:
            (self.folder / "chunks").mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "a+b"):
                pass
        except OSError as error:
            self._disable(error)
        return self.works

    def path(self, key: str, number: int) -> Path:
        """The file of a chunk, which need not exist."""
        return self.folder / "chunks" / key[:2] / key / f"{number:07d}"

    def read(self, key: str, number: int, offset: int, size: int) -> bytes | None:
        """`size` bytes from `offset` on within a chunk, fewer at its end; None if the chunk is not cached."""
        with self._lock:
            descriptor = self._descriptor(key, number)
            return None if descriptor is None else os.pread(descriptor, size, offset)

    def _descriptor(self, key: str, number: int) -> int | None:
        if self._pid != os.getpid():  # after a fork the descriptors are shared with the parent, but their table is not
            self._begin()
        descriptor = self._open.get((key, number))
        if descriptor is not None:
            self._open.move_to_end((key, number))
            return descriptor
        try:
            descriptor = os.open(self.path(key, number), os.O_RDONLY)
            os.utime(descriptor)  # marks the chunk as recently used
        except OSError:
            return None
        self._open[key, number] = descriptor
        if len(self._open) > _KEPT_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def forget(self, key: str, number: int) -> None:
        """Removes a chunk whose bytes turned out to be wrong."""
        with self._lock:
            descriptor = self._open.pop((key, number), None)
            if descriptor is not None:
                os.close(descriptor)
            with contextlib.suppress(OSError):
                self.path(key, number).unlink()

    def fill(self, key: str, number: int, size: int, fetch: Callable[[BinaryIO], None]) -> bool:
        """Stores what `fetch` writes to a file, at most `size` bytes, unless the chunk is cached already.

        False if another process is fetching the chunk or nothing can be stored. Raises what `fetch` raises.
        """
        if not self.works:
            return False
        path = self.path(key, number)
        if path.exists():
            return True
        try:
            with self._part(path) as part:
                if part is None:
                    return path.exists()
                if not path.exists():
                    self._fill(path, part, size, fetch)
                return True
        except OSError as error:  # a failed request is a StorageError, which has no errno
            self._disable(error)
            return False

    def await_fill(self, key: str, number: int, seconds: float) -> None:
        """Waits until another thread has stored a chunk or has failed, at most `seconds`; for another process briefly."""
        path = self.path(key, number)
        filled = self._filling.get(path)
        if filled is not None:
            filled.wait(seconds)
            return
        end = time.monotonic() + min(seconds, _POLLED_FOR)
        while not os.path.exists(path) and time.monotonic() < end:
            time.sleep(_POLL)

    def _fill(self, path: Path, part: Path, size: int, fetch: Callable[[BinaryIO], None]) -> None:
        begun = time.monotonic()
        self._make_room(size)
        done = self._filling[path] = threading.Event()
        try:
            with open(part, "r+b") as file:
                file.truncate()
                fetch(file)
                full = file.tell() == CHUNK
            os.rename(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        finally:
            del self._filling[path]
            done.set()
        if full:
            self.fill_seconds = time.monotonic() - begun

    @contextlib.contextmanager
    def _part(self, path: Path) -> Iterator[Path | None]:
        """The file that becomes `path`, locked; None if another process holds the lock."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with open(part, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield None
                return
            # The previous holder may have renamed the file: then the lock is on a finished chunk, not on the part.
            current = part.exists() and os.fstat(file.fileno()).st_ino == part.stat().st_ino
            yield part if current else None

    def _disable(self, error: OSError) -> None:
        """Warns once and stores no more chunks. Raises errors that do not come from a full or unwritable disk."""
        if error.errno not in _NO_ROOM:
            raise error
        if self.works:
            self.works = False
            message = f"{error.strerror}; cached chunks are used, nothing new is kept"
            print(f"warning: data.cache {self.folder}: {message}", file=sys.stderr)

    # ---- the bound ---------------------------------------------------------------------------------------------------

    def _make_room(self, size: int) -> None:
        """Adds `size` bytes to the total before they are written, so that the total is never too small."""
        with open(self.folder / "lock", "a+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            total = self._total() + size
            if total > self.limit:
                total = self._evict(int(self.limit * _ROOM) - size) + size
            (self.folder / "total").write_text(str(total))

    def _total(self) -> int:
        try:
            return int((self.folder / "total").read_text())
        except (OSError, ValueError):
            return sum(size for _, size, _ in self._chunks())

    def _chunks(self) -> Iterator[tuple[float, int, str]]:
        """Time of use, bytes and path of each chunk. Removes parts that no process holds."""
        for folder, _, names in os.walk(self.folder / "chunks"):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError, PermissionError, BlockingIOError):
                    about = os.stat(path)
                    if not name.endswith(".part"):
                        yield about.st_mtime, about.st_size, path
                    elif time.time() - about.st_mtime > 60:
                        with open(path, "r+b") as part:
                            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                            os.unlink(path)

    def _evict(self, target: int) -> int:
        """Removes the least recently used chunks until at most `target` bytes remain; returns the bytes that remain."""
        chunks = sorted(self._chunks())
        remaining = sum(size for _, size, _ in chunks)
        for _, size, path in chunks:
            if remaining <= target:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            remaining -= size
        return remaining
