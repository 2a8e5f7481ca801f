"""Folders on a disk, in an object store, or in any fsspec file system. Files are written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from dist_t2i.storage.clients import FROM_ENVIRONMENT, OBJECT_STORES, open_store, open_system, storage_errors
from dist_t2i.storage.urls import scheme_of, unchained
from dist_t2i.utils.files import chunks, fsync, replacing, sha256_of, write_atomic, write_synced

WORK = ".shard"
"""The folder of intermediate files, which let a repeated run resume."""
_CHUNK = 2**20
_LONGEST_REQUEST = 3600.0
"""The seconds that the transfer of one file may take."""
_PART = 8 * 2**20
"""The minimal size of one part of a multipart upload, in bytes."""
_PARTS = 9000
"""The maximal number of parts of one file (S3 accepts 10,000)."""


def open_folder(url: str | Path, *, seconds: float | None = None) -> Folder:
    """The folder at a path or URL, which is neither read nor created. Raises DataError for commands and chained URLs.

    `seconds` limits the time of each request to an object store, including retries. None means one hour and the default
    retries of obstore.
    """
    text = str(url)
    scheme = scheme_of(unchained(text))
    if scheme in ("", "file"):
        return LocalFolder(text.removeprefix("file://"))
    if scheme in OBJECT_STORES:
        return ObjectFolder(text.rstrip("/"), seconds)
    return FsspecFolder(text.rstrip("/"))


def locate(folder: Folder, name: str) -> tuple[Folder, str]:
    """The folder and the last part of a name in a manifest of `folder`. Relative names are in `folder`; URLs and
    absolute paths include their folder."""
    if not scheme_of(unchained(name)) and not os.path.isabs(name):
        return folder, name
    parent, _, last = name.rpartition("/")
    return open_folder(parent or "/"), last


class Folder(ABC):
    """Access to the files of one folder by name. Methods raise FileNotFoundError if a file is missing, and OSError if
    an operation fails. Picklable."""

    path: Path | None = None
    """The path of the folder; None if the folder is not on a disk."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return self.url

    def file_url(self, name: str) -> str:
        """The path or URL of a file, for messages."""
        return f"{self.url}/{name}"

    @property
    def staging(self) -> Path:
        """A folder on this machine's disk for unfinished files. Creates the folder if necessary."""
        folder = Path(tempfile.gettempdir()) / f"dist_t2i-{hashlib.sha256(self.url.encode()).hexdigest()[:16]}"
        folder.mkdir(exist_ok=True)
        return folder

    def clear_staging(self) -> None:
        """Removes the unfinished files of earlier runs."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        return b"".join(self.chunks(name))

    @abstractmethod
    def read_range(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes beginning at `start`, fewer if the file ends earlier."""

    @abstractmethod
    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file in order, about a megabyte at a time."""

    def write(self, name: str, data: bytes) -> None:
        """Creates or replaces a file atomically."""
        self.put(io.BytesIO(data), name)

    def upload(self, path: Path, name: str) -> None:
        """Moves a file from `staging` to this folder."""
        with open(path, "rb") as file:
            self.put(file, name)
        path.unlink()

    @abstractmethod
    def put(self, file: BinaryIO, name: str) -> None:
        """Atomically copies an open file, from its current position to its end, to the file `name`. Creates the
        subfolder that `name` contains."""

    @abstractmethod
    def rename(self, old: str, new: str) -> None:
        """Renames a file. Replaces an existing file of the new name."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file. A missing file is no error."""

    @abstractmethod
    def remove_folder(self, name: str) -> None:
        """Removes everything below the subfolder `name`. A missing subfolder is no error."""

    @abstractmethod
    def names(self) -> list[str]:
        """The sorted names of files and subfolders; [] if the folder is missing."""

    def settle(self, names: list[str]) -> None:
        """Waits until these files would survive a power cut. The default does nothing, because an object store confirms
        a write only when the file is safe."""
        return

    def checksum(self, name: str) -> str:
        """SHA-256 of a file as 64 hex digits."""
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
        for part in (*self.staging.glob("*.part"), *self.path.glob(".*.part")):
            part.unlink(missing_ok=True)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        with open(self.path / name, "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, start)

    def chunks(self, name: str) -> Iterator[bytes]:
        with open(self.path / name, "rb", buffering=0) as file:
            yield from chunks(file)

    def write(self, name: str, data: bytes) -> None:
        write_atomic(self.path / name, data)

    def upload(self, path: Path, name: str) -> None:
        os.replace(path, self.path / name)

    def put(self, file: BinaryIO, name: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_synced(temporary, chunks(file))

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


class ObjectFolder(Folder):
    """A prefix in S3, Google Cloud Storage or Azure, or on a (read-only) web server. Credentials come from the store's
    environment variables."""

    def __init__(self, url: str, seconds: float | None = None) -> None:
        super().__init__(url)
        self._seconds = seconds

    def __reduce__(self) -> tuple:
        # The store is not pickled, because processes cannot share its connections.
        return ObjectFolder, (self.url, self._seconds)

    @cached_property
    def _store(self) -> Any:
        retry: dict[str, Any] | None = None
        if self._seconds:
            retry = {"max_retries": 2, "retry_timeout": timedelta(seconds=self._seconds)}
        return open_store(self.url, FROM_ENVIRONMENT, {"timeout": f"{self._seconds or _LONGEST_REQUEST}s"}, retry)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        with storage_errors(self.file_url(name)):
            return bytes(self._store.get_range(name, start=start, length=size))

    def chunks(self, name: str) -> Iterator[bytes]:
        with storage_errors(self.file_url(name)):
            for chunk in self._store.get(name).stream(min_chunk_size=_CHUNK):
                yield bytes(chunk)

    def put(self, file: BinaryIO, name: str) -> None:
        start = file.tell()
        size = file.seek(0, os.SEEK_END) - start
        file.seek(start)
        content = file if size > _PART else file.read()  # a small file is sent with one request
        with storage_errors(self.file_url(name)):
            self._store.put(name, content, chunk_size=max(_PART, size // _PARTS + 1), max_concurrency=4)

    def rename(self, old: str, new: str) -> None:
        with storage_errors(self.file_url(old)):
            self._store.copy(old, new)
            self._store.delete(old)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), storage_errors(self.file_url(name)):
            self._store.delete(name)

    def remove_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), storage_errors(self.file_url(name)):
            for page in self._store.list(f"{name.rstrip('/')}/"):
                self._store.delete([entry["path"] for entry in page])

    def names(self) -> list[str]:
        with storage_errors(self.url):
            listing = self._store.list_with_delimiter()
        paths = [*(entry["path"] for entry in listing["objects"]), *listing["common_prefixes"]]
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in paths)


class FsspecFolder(Folder):
    """A folder in a file system of fsspec, such as `sftp://` or `hdfs://`."""

    def __reduce__(self) -> tuple:
        return FsspecFolder, (self.url,)  # the file system is not pickled: processes cannot share connections

    @cached_property
    def _system(self) -> tuple[Any, str]:
        return open_system(self.url)

    @contextlib.contextmanager
    def _at(self, name: str) -> Iterator[tuple[Any, str]]:
        """Yields the file system and the file's path. If `name` is "", the path is that of the folder. Errors inside
        the `with` block become StorageErrors that name the file."""
        system, root = self._system
        with storage_errors(self.file_url(name) if name else self.url):
            yield system, f"{root.rstrip('/')}/{name}" if name else root

    def read_range(self, name: str, start: int, size: int) -> bytes:
        with self._at(name) as (system, path):
            return system.cat_file(path, start=start, end=start + size)

    def chunks(self, name: str) -> Iterator[bytes]:
        with self._at(name) as (system, path), system.open(path, "rb") as file:
            yield from chunks(file)

    def put(self, file: BinaryIO, name: str) -> None:
        with self._at(name) as (system, path):
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with system.open(f"{path}.part", "wb") as copy:
                shutil.copyfileobj(file, copy, _CHUNK)
            system.mv(f"{path}.part", path)

    def rename(self, old: str, new: str) -> None:
        with self._at(old) as (system, path), self._at(new) as (_, target):
            system.mv(path, target)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._at(name) as (system, path):
            system.rm_file(path)

    def remove_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._at(name) as (system, path):
            system.rm(path, recursive=True)

    def names(self) -> list[str]:
        try:
            with self._at("") as (system, root):
                paths = system.ls(root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)
