"""A folder in which all processes of a machine keep parts of remote objects, within a bound.

    CACHE/chunks/ab/abcdef.../0000012      bytes [12 * CHUNK, 13 * CHUNK) of one version of one object
                             /.0000013.part    being fetched: whoever holds its lock
         /total                            bytes of all chunks, at least (counted under CACHE/lock)

A chunk appears by a rename, so it is whole or not there. Two processes that want the same one: the second finds the
part locked and goes on to other work. The lock is the kernel's (flock) and ends with its process, so kill -9 leaves
nothing that blocks. When the bound is passed, the chunks used least recently go; whoever has one open may read on.
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
"""Bytes."""
_KEPT_OPEN = 256
_LOOK, _LOOK_AGAIN = 0.005, 0.1
"""Seconds between looks at whether another process has finished a chunk, and until it is asked if it still lives."""
_ROOM = 0.9
"""Share of the bound that is left full when old chunks go."""
_NO_ROOM = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.EIO,
    errno.ENOTDIR,
    errno.ELOOP,
}


def key_of(url: str, version: str) -> str:
    """Names one version of one object."""
    return hashlib.sha256(f"{url}\n{version}".encode()).hexdigest()[:40]


class ChunkCache:
    """The cache in `folder`, of at most `limit` bytes. Threads may share it; picklable. Never raises for a full disk:
    it warns once, and from then on keeps nothing new."""

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._begin()

    def _begin(self) -> None:
        self._open: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._lock = threading.Lock()
        self._filling: dict[Path, threading.Event] = {}
        self._works = self.limit > 0
        self.fill_seconds = 0.0
        """How long this process last took to fetch a whole chunk; 0 before it is known: readers that took it for slow would
        ask for most samples of the first window twice."""
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "limit": self.limit}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._begin()

    def prepare(self) -> bool:
        """Make the folder. False, with a warning, when it cannot be written."""
        try:
            (self.folder / "chunks").mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "a+b"):
                pass
        except OSError as error:
            self._fail(error)
        return self._works

    @property
    def works(self) -> bool:
        """Whether chunks can be kept."""
        return self._works

    def path(self, key: str, number: int) -> Path:
        return self.folder / "chunks" / key[:2] / key / f"{number:07d}"

    def read(self, key: str, number: int, offset: int, size: int) -> bytes | None:
        """Bytes from `offset` on within a chunk, fewer at its end; None when the chunk is not kept."""
        with self._lock:
            descriptor = self._descriptor(key, number)
            return None if descriptor is None else os.pread(descriptor, size, offset)

    def _descriptor(self, key: str, number: int) -> int | None:
        if self._pid != os.getpid():  # descriptors are shared with the parent after a fork, the table is not
            self._begin()
        found = self._open.get((key, number))
        if found is not None:
            self._open.move_to_end((key, number))
            return found
        path = self.path(key, number)
        try:
            found = os.open(path, os.O_RDONLY)
            os.utime(found)  # used just now
        except OSError:
            return None
        self._open[key, number] = found
        if len(self._open) > _KEPT_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return found

    def has(self, key: str, number: int) -> bool:
        return (key, number) in self._open or self.path(key, number).exists()

    def forget(self, key: str, number: int) -> None:
        """A chunk whose bytes turned out wrong."""
        with self._lock:
            descriptor = self._open.pop((key, number), None)
            if descriptor is not None:
                os.close(descriptor)
            with contextlib.suppress(OSError):
                self.path(key, number).unlink()

    def fill(self, key: str, number: int, size: int, fetch: Callable[[BinaryIO], None]) -> bool:
        """Keep what `fetch` writes into a file, at most `size` bytes, unless it is there.

        False when another process is at it, or nothing can be kept. Raises what `fetch` raises.
        """
        if not self._works:
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
        except OSError as error:  # those of connections are StorageErrors, which have no number
            self._fail(error)
            return False

    def await_fill(self, key: str, number: int, seconds: float) -> None:
        """Wait until another thread or process has filled a chunk, or given it up, at most so long."""
        path = self.path(key, number)
        here = self._filling.get(path)
        if here is not None:
            here.wait(seconds)
            return
        end = time.monotonic() + min(seconds, _LOOK_AGAIN)
        while not os.path.exists(path) and time.monotonic() < end:
            time.sleep(_LOOK)

    def _fill(self, path: Path, part: Path, size: int, fetch: Callable[[BinaryIO], None]) -> None:
        begun = time.monotonic()
        self._make_room(size)
        done = self._filling[path] = threading.Event()
        try:
            with open(part, "r+b") as file:
                file.truncate()
                fetch(file)
                whole = file.tell() == CHUNK
            os.rename(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        finally:
            del self._filling[path]
            done.set()
        if whole:
            self.fill_seconds = time.monotonic() - begun

    @contextlib.contextmanager
    def _part(self, path: Path) -> Iterator[Path | None]:
        """The locked file that becomes `path`; None when another holds it."""
        part = path.with_name(f".{path.name}.part")
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield None
                return
            # Whoever held it before may have renamed it: then this lock is on a finished chunk, not on a part.
            mine = part.exists() and os.fstat(descriptor).st_ino == part.stat().st_ino
            yield part if mine else None
        finally:
            os.close(descriptor)

    def _fail(self, error: OSError) -> None:
        if error.errno not in _NO_ROOM:
            raise error
        if self._works:
            self._works = False
            print(
                f"warning: data.cache {self.folder}: {error.strerror}; what is there is used, nothing new is kept",
                file=sys.stderr,
            )

    # ---- the bound ---------------------------------------------------------------------------------------------------

    def _make_room(self, size: int) -> None:
        """Count `size` bytes more before they are written, so that the total is never too small."""
        with open(self.folder / "lock", "a+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            total = self._counted() + size
            if total > self.limit:
                total = self._evict(int(self.limit * _ROOM) - size) + size
            (self.folder / "total").write_text(str(total))

    def _counted(self) -> int:
        try:
            return int((self.folder / "total").read_text())
        except (OSError, ValueError):
            return sum(size for _, size, _ in self._chunks())

    def _chunks(self) -> Iterator[tuple[float, int, str]]:
        """Time of use, bytes and path of each chunk; parts that nobody is at are removed."""
        for folder, _, names in os.walk(self.folder / "chunks"):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    about = os.stat(path)
                    if not name.endswith(".part"):
                        yield about.st_mtime, about.st_size, path
                    elif time.time() - about.st_mtime > 60:
                        _remove_if_left(path)

    def _evict(self, target: int) -> int:
        """Remove the chunks used least recently until at most `target` bytes are left; returns what is left."""
        chunks = sorted(self._chunks())
        left = sum(size for _, size, _ in chunks)
        for _, size, path in chunks:
            if left <= target:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            left -= size
        return left


def _remove_if_left(part: str) -> None:
    with contextlib.suppress(OSError), open(part, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(part)
