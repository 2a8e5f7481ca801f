"""A bounded cache on disk in which all processes of a machine share chunks of remote objects.

    CACHE/chunks/ab/abcdef.../0000012      bytes [12 * CHUNK, 13 * CHUNK) of one version of one object
                             /.0000013.part    a chunk that the process with the lock on this file is fetching
         /total                            an upper bound on the bytes of all chunks (changed under CACHE/lock)

A rename gives a finished chunk its name, so every chunk without the suffix `.part` is complete. A lock ensures that
only one process fetches a chunk; other processes do other work in the meantime. The kernel releases the lock (flock)
when its process ends, even by kill -9. When the cache exceeds its bound, the least recently used chunks are removed. A
process that has a removed chunk open can still read it.
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
"""The size of a chunk in bytes. The last chunk of an object is shorter."""
_KEPT_OPEN = 256
_POLL, _POLLED_FOR = 0.005, 0.1
"""How `await_fill` waits for another process: the seconds between checks, and the seconds of the whole wait."""
_ROOM = 0.9
"""An eviction reduces the cache to this share of the cache's limit."""
_NO_ROOM = {getattr(errno, name) for name in "ENOSPC EDQUOT EROFS EACCES EPERM EFBIG EIO ENOTDIR ELOOP".split()}


def key_of(url: str, version: str) -> str:
    """The name under which the cache keeps one version of one object."""
    return hashlib.sha256(f"{url}\n{version}".encode()).hexdigest()[:40]


class ChunkCache:
    """The cache in `folder`, of at most `limit` bytes. Threads may share an instance; picklable.

    When the disk is full or not writable, the cache prints one warning and stores no more chunks, but raises no error.
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
        """The seconds that this process needed to fetch its latest full-sized chunk. The initial value 0 makes readers
        assume a fast network and wait for chunks. An assumption of a slow network would make readers request most
        samples of the first window twice: alone, and in a chunk."""
        self._pid = os.getpid()

    def __reduce__(self) -> tuple:
        return ChunkCache, (str(self.folder), self.limit)

    def prepare(self) -> bool:
        """Creates the folder. If the folder cannot be written, prints a warning and returns False."""
        try:
            (self.folder / "chunks").mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "a+b"):
                pass
        except OSError as error:
            self._disable(error)
        return self.works

    def path(self, key: str, number: int) -> Path:
        """The path of a chunk's file, which need not exist."""
        return self.folder / "chunks" / key[:2] / key / f"{number:07d}"

    def read(self, key: str, number: int, offset: int, size: int) -> bytes | None:
        """`size` bytes of a chunk from `offset` on, fewer if the chunk ends earlier; None for a missing chunk."""
        with self._lock:
            descriptor = self._descriptor(key, number)
            return None if descriptor is None else os.pread(descriptor, size, offset)

    def _descriptor(self, key: str, number: int) -> int | None:
        if self._pid != os.getpid():  # after a fork, the child begins with an empty table
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
        """Removes a chunk whose bytes are wrong."""
        with self._lock:
            descriptor = self._open.pop((key, number), None)
            if descriptor is not None:
                os.close(descriptor)
            with contextlib.suppress(OSError):
                self.path(key, number).unlink()

    def fill(self, key: str, number: int, size: int, fetch: Callable[[BinaryIO], None]) -> bool:
        """Stores a chunk unless it is cached already. `fetch` writes at most `size` bytes to the given file.

        Returns False if another process is fetching the chunk or the disk fails. Raises the errors of `fetch`.
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
        except OSError as error:  # a disk error, or a failed request (StorageError), which `_disable` raises again
            self._disable(error)
            return False

    def await_fill(self, key: str, number: int, seconds: float) -> None:
        """Waits until the chunk is stored: at most `seconds` if a thread of this process is storing the chunk, and at
        most `_POLLED_FOR` seconds otherwise."""
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
        """Locks and yields the file that will be renamed to `path`; yields None if another process holds the lock."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with open(part, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield None
                return
            # If the lock's previous holder has renamed the file, this lock is on a finished chunk and protects nothing.
            current = part.exists() and os.fstat(file.fileno()).st_ino == part.stat().st_ino
            yield part if current else None

    def _disable(self, error: OSError) -> None:
        """Warns once and stores no more chunks. Raises `error` if its cause is not a full or unwritable disk."""
        if error.errno not in _NO_ROOM:
            raise error
        if self.works:
            self.works = False
            message = f"{error.strerror}; cached chunks are still used, but no more chunks are stored"
            print(f"warning: data.cache {self.folder}: {message}", file=sys.stderr)

    # ---- the bound ---------------------------------------------------------------------------------------------------

    def _make_room(self, size: int) -> None:
        """Removes old chunks if `size` more bytes would exceed the bound. Adds `size` to the total before the bytes are
        written, so that the total is never too small."""
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
        """Yields the time of last use, the size in bytes and the path of each chunk. Removes `.part` files that no
        process has locked."""
        for folder, _, names in os.walk(self.folder / "chunks"):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    about = os.stat(path)
                    if not name.endswith(".part"):
                        yield about.st_mtime, about.st_size, path
                    elif time.time() - about.st_mtime > 60:
                        with contextlib.suppress(OSError), open(path, "r+b") as part:
                            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                            os.unlink(path)

    def _evict(self, target: int) -> int:
        """Removes the least recently used chunks until at most `target` bytes remain. Returns the size of the rest."""
        chunks = sorted(self._chunks())
        remaining = sum(size for _, size, _ in chunks)
        for _, size, path in chunks:
            if remaining <= target:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            remaining -= size
        return remaining
