"""A folder that a set is written to or looked at in: on a disk, in object storage, or wherever fsspec reaches.

Every file is there whole or not at all: on a disk it is written aside and renamed, an object store shows an upload
when it is complete, any other file system gets it under another name first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from dist_t2i.storage.clients import FROM_ENVIRONMENT, OBJECT_STORES, open_store, open_system, storage_errors
from dist_t2i.storage.urls import scheme_of, unchained
from dist_t2i.utils.files import chunks, fsync, replacing, sha256_of, write_atomic, write_synced

WORK = ".shard"
"""The folder of notes that a rerun goes by."""
_CHUNK = 2**20
_PATIENCE = 3600.0
"""Seconds that a file may take to come or go."""
_PART = 8 * 2**20
"""Bytes of a file's part that travels by itself, at least."""
_PARTS = 9000
"""Parts that a file may have, at most (S3 takes 10,000)."""


def open_folder(url: str | Path, *, seconds: float | None = None) -> Folder:
    """The place at a path or URL; nothing is read or made yet. Raises DataError when it cannot be reached that way.

    An object store is given `seconds` for each request and hardly tries again by itself; by default an hour, with many
    tries.
    """
    text = str(url)
    scheme = scheme_of(unchained(text))
    if scheme in ("", "file"):
        return LocalFolder(text.removeprefix("file://"))
    if scheme in OBJECT_STORES:
        return ObjectFolder(text.rstrip("/"), seconds)
    return FsspecFolder(text.rstrip("/"))


def locate(place: Folder, name: str) -> tuple[Folder, str]:
    """Where a file that a manifest names lies: in the place itself, or elsewhere when the name is a URL or a whole path."""
    if not scheme_of(unchained(name)) and not os.path.isabs(name):
        return place, name
    folder, _, last = name.rpartition("/")
    return open_folder(folder or "/"), last


class Folder(ABC):
    """Files by name in one folder. All methods raise OSError (FileNotFoundError) when they fail. Picklable."""

    path: Path | None = None
    """The folder, if it is on a disk."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return self.url

    def file_url(self, name: str) -> str:
        """The path or URL of a file, as messages name it."""
        return f"{self.url}/{name}"

    @property
    def staging(self) -> Path:
        """A folder on this machine's disk for files that are being written; made when it is not there."""
        folder = Path(tempfile.gettempdir()) / f"dist_t2i-{hashlib.sha256(self.url.encode()).hexdigest()[:16]}"
        folder.mkdir(exist_ok=True)
        return folder

    def clear_staging(self) -> None:
        """Remove what was being written and never arrived."""
        shutil.rmtree(self.staging, ignore_errors=True)

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file."""

    @abstractmethod
    def read_range(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer where the file ends."""

    @abstractmethod
    def chunks(self, name: str) -> Iterator[bytes]:
        """The file from start to end, about a megabyte at a time."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Make or replace a file; readers see the old one, or the whole new one."""

    @abstractmethod
    def upload(self, source: Path, name: str) -> None:
        """Put a file from `staging` here; it is gone from there afterwards."""

    @abstractmethod
    def put(self, file: BinaryIO, name: str) -> None:
        """Put an open file here, from where it stands to its end; the folder that `name` may have is made."""

    @abstractmethod
    def rename(self, old: str, new: str) -> None:
        """Give a file another name; one that has it already is replaced."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """No error when there is none."""

    @abstractmethod
    def remove_folder(self, name: str) -> None:
        """Everything below `name`; no error when there is nothing."""

    @abstractmethod
    def names(self) -> list[str]:
        """The files and folders that lie here, sorted; none when the folder is not there."""

    def settle(self, names: list[str]) -> None:
        """Return once these files would survive a power cut."""
        return  # an object store answers no sooner

    def exists(self, name: str) -> bool:
        """Whether there is such a file, which must hold a byte."""
        try:
            self.read_range(name, 0, 1)
        except FileNotFoundError:
            return False
        return True

    def checksum(self, name: str) -> str:
        """SHA-256 of a file's content."""
        return sha256_of(self.chunks(name))


class LocalFolder(Folder):
    """A folder on a disk."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path: Path = Path(path)

    def file_url(self, name: str) -> str:
        return str(self.path / name)

    @property
    def staging(self) -> Path:
        return self.path / WORK

    def clear_staging(self) -> None:
        for part in self.staging.glob("*.part"):
            part.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read_range(self, name: str, start: int, size: int) -> bytes:
        with open(self.path / name, "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, start)

    def chunks(self, name: str) -> Iterator[bytes]:
        with open(self.path / name, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def write(self, name: str, data: bytes) -> None:
        write_atomic(self.path / name, data)

    def upload(self, source: Path, name: str) -> None:
        os.replace(source, self.path / name)

    def put(self, file: BinaryIO, name: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            write_synced(part, chunks(file))

    def rename(self, old: str, new: str) -> None:
        os.replace(self.path / old, self.path / new)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        if (self.path / name).exists():
            shutil.rmtree(self.path / name)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir()) if self.path.exists() else []

    def settle(self, names: list[str]) -> None:
        for name in names:
            fsync(self.path / name)


def _left(file: BinaryIO) -> int:
    """Bytes from where a file stands to its end."""
    start = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(start)
    return end - start


class ObjectFolder(Folder):
    """A prefix in S3, Google Cloud Storage or Azure (credentials from the usual environment variables), or on a web
    server, which can only be read."""

    def __init__(self, url: str, seconds: float | None = None) -> None:
        super().__init__(url)
        self._seconds = seconds
        self._store: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_seconds": self._seconds, "_store": None}  # a connection belongs to its process

    @property
    def store(self) -> Any:
        if self._store is None:
            retry: Any = None
            if self._seconds:
                retry = {"max_retries": 2, "retry_timeout": timedelta(seconds=self._seconds)}
            limits = {"timeout": f"{self._seconds or _PATIENCE}s"}
            self._store = open_store(self.url, FROM_ENVIRONMENT, limits, retry)
        return self._store

    def read(self, name: str) -> bytes:
        import obstore

        with storage_errors(self.file_url(name)):
            return bytes(obstore.get(self.store, name).bytes())

    def read_range(self, name: str, start: int, size: int) -> bytes:
        import obstore

        with storage_errors(self.file_url(name)):
            return bytes(obstore.get_range(self.store, name, start=start, length=size))

    def chunks(self, name: str) -> Iterator[bytes]:
        import obstore

        with storage_errors(self.file_url(name)):
            for chunk in obstore.get(self.store, name).stream(min_chunk_size=_CHUNK):
                yield bytes(chunk)

    def write(self, name: str, data: bytes) -> None:
        import obstore

        with storage_errors(self.file_url(name)):
            obstore.put(self.store, name, data)

    def upload(self, source: Path, name: str) -> None:
        import obstore

        with storage_errors(self.file_url(name)):
            obstore.put(self.store, name, source, max_concurrency=4)
        source.unlink()

    def put(self, file: BinaryIO, name: str) -> None:
        import obstore

        size = _left(file)
        content = file if size > _PART else file.read()  # in one request
        with storage_errors(self.file_url(name)):
            obstore.put(self.store, name, content, chunk_size=max(_PART, size // _PARTS + 1), max_concurrency=4)

    def rename(self, old: str, new: str) -> None:
        import obstore

        with storage_errors(self.file_url(old)):
            obstore.copy(self.store, old, new)
            obstore.delete(self.store, old)

    def remove(self, name: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError), storage_errors(self.file_url(name)):
            obstore.delete(self.store, name)

    def remove_folder(self, name: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError), storage_errors(self.file_url(name)):
            for listed in obstore.list(self.store, f"{name.rstrip('/')}/"):
                obstore.delete(self.store, [entry["path"] for entry in listed])

    def names(self) -> list[str]:
        import obstore

        with storage_errors(self.url):
            listed = obstore.list_with_delimiter(self.store)
        found = [str(entry["path"]) for entry in listed["objects"]] + [str(path) for path in listed["common_prefixes"]]
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)


class FsspecFolder(Folder):
    """A folder in any other file system that fsspec knows, such as `sftp://` or `hdfs://`."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._opened: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_opened": None}

    @property
    def _system(self) -> tuple[Any, str]:
        if self._opened is None:
            self._opened = open_system(self.url)
        return self._opened

    def _at(self, name: str) -> tuple[Any, str]:
        system, root = self._system
        return system, f"{root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        system, path = self._at(name)
        with storage_errors(self.file_url(name)):
            return system.cat_file(path)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        system, path = self._at(name)
        with storage_errors(self.file_url(name)):
            return system.cat_file(path, start=start, end=start + size)

    def chunks(self, name: str) -> Iterator[bytes]:
        system, path = self._at(name)
        with storage_errors(self.file_url(name)), system.open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def write(self, name: str, data: bytes) -> None:
        system, path = self._at(name)
        with storage_errors(self.file_url(name)):
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.pipe_file(f"{path}.part", data)
            system.mv(f"{path}.part", path)

    def upload(self, source: Path, name: str) -> None:
        system, path = self._at(name)
        with storage_errors(self.file_url(name)):
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.put_file(str(source), f"{path}.part")
            system.mv(f"{path}.part", path)
        source.unlink()

    def put(self, file: BinaryIO, name: str) -> None:
        system, path = self._at(name)
        with storage_errors(self.file_url(name)):
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with system.open(f"{path}.part", "wb") as copy:
                shutil.copyfileobj(file, copy, _CHUNK)
            system.mv(f"{path}.part", path)

    def rename(self, old: str, new: str) -> None:
        system, path = self._at(old)
        with storage_errors(self.file_url(old)):
            system.mv(path, self._at(new)[1])

    def remove(self, name: str) -> None:
        system, path = self._at(name)
        with contextlib.suppress(FileNotFoundError), storage_errors(self.file_url(name)):
            system.rm_file(path)

    def remove_folder(self, name: str) -> None:
        system, path = self._at(name)
        with contextlib.suppress(FileNotFoundError), storage_errors(self.file_url(name)):
            system.rm(path, recursive=True)

    def names(self) -> list[str]:
        system, root = self._system
        try:
            with storage_errors(self.url):
                found = system.ls(root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)
