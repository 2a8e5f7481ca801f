"""Where the bytes of a picture come from: a file, a drawing, a URL, a part of a tar."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import quote, urlsplit

from dist_t2i.storage.clients import OBJECT_STORES
from dist_t2i.storage.folders import Folder, open_folder
from dist_t2i.storage.retries import pauses, retry
from dist_t2i.storage.urls import scheme_of, unchained

WEB = ("http", "https")
MAX_DOWNLOAD = 2**28
"""A picture of more bytes is not downloaded to its end."""
TIMEOUT, RETRIES = 30.0, 2
"""Seconds without a byte from a server, and how often a download that may still succeed is repeated."""
_FIRST_READ = 2**18
_OPEN_FILES, _OPEN_PLACES = 64, 16


class Origin(ABC):
    """One picture, unread. All methods raise OSError."""

    __slots__ = ()

    @property
    def remote(self) -> bool:
        """Whether it is far away, so that several should be read at once."""
        return False

    @abstractmethod
    def known(self) -> tuple[int, str]:
        """What is known before it is read: its bytes (0 when they are not), and a text that changes when it does."""

    @abstractmethod
    def read(self) -> bytes:
        """Its bytes as they are stored: a JPEG, a PNG, ..."""


@dataclass(frozen=True, slots=True)
class PictureFile(Origin):
    """A file on a disk."""

    path: str

    def known(self) -> tuple[int, str]:
        status = os.stat(self.path)
        return status.st_size, f"{status.st_size} {status.st_mtime_ns}"

    def read(self) -> bytes:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            data = os.read(descriptor, _FIRST_READ)
            if len(data) == _FIRST_READ:  # asking each file for its size first costs more than it saves
                rest = os.fstat(descriptor).st_size - len(data)
                while more := os.read(descriptor, max(rest, 0) + 1):
                    data += more
                    rest -= len(more)
            return data
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Drawing(Origin):
    """An SVG, drawn at `size` pixels."""

    path: str
    size: int

    def known(self) -> tuple[int, str]:
        return 0, PictureFile(self.path).known()[1]

    def read(self) -> bytes:
        from dist_t2i.sharding.pictures import render

        return render(Path(self.path), self.size)


@dataclass(frozen=True, slots=True)
class Download(Origin):
    """A URL: http(s), or an object in S3, Google Cloud Storage or Azure, or whatever fsspec reaches."""

    url: str

    @property
    def remote(self) -> bool:
        return True

    def known(self) -> tuple[int, str]:
        return 0, self.url

    def read(self) -> bytes:
        return retry(self._read_once, islice(pauses(0.5, 8.0, factor=4.0), RETRIES), lambda error, _: _may_pass(error))

    def _read_once(self) -> bytes:
        if scheme_of(self.url) in WEB:
            return _from_the_web(self.url)
        folder, _, name = self.url.rpartition("/")
        return _place(folder).read(name)


@dataclass(frozen=True, slots=True)
class TarPart(Origin):
    """`size` bytes from `offset` on of a tar, local or not."""

    url: str
    offset: int
    size: int
    remote_tar: bool
    version: str
    """Changes when the tar does."""

    @property
    def remote(self) -> bool:
        return self.remote_tar

    def known(self) -> tuple[int, str]:
        return self.size, f"{self.url.rpartition('/')[2]} {self.offset} {self.size} {self.version}"

    def read(self) -> bytes:
        if not self.remote_tar:
            data = os.pread(_descriptor(self.url), self.size, self.offset)
        else:
            folder, _, name = self.url.rpartition("/")
            data = _place(folder).read_range(name, self.offset, self.size)
        if len(data) != self.size:
            raise OSError("its tar is cut short")
        return data


class DownloadError(OSError):
    """Why nothing came from a web server; `passing` when it may work later."""

    def __init__(self, reason: str, passing: bool) -> None:
        super().__init__(reason)
        self.passing = passing

    def __reduce__(self) -> tuple:
        return DownloadError, (str(self), self.passing)


def _may_pass(error: OSError) -> bool:
    return getattr(error, "passing", not isinstance(error, FileNotFoundError | PermissionError))


def _from_the_web(url: str) -> bytes:
    import http.client
    import urllib.error
    import urllib.request

    parts = urlsplit(url)
    plain = parts._replace(
        path=quote(parts.path, safe="/%:@!$&'()*+,;=~"), query=quote(parts.query, safe="%/?&=+:,;@~")
    )
    request = urllib.request.Request(plain.geturl(), headers={"User-Agent": "dist_t2i"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            data = answer.read(MAX_DOWNLOAD + 1)
            promised = answer.headers.get("Content-Length", "")
    except urllib.error.HTTPError as error:
        raise DownloadError(f"HTTP {error.code}", error.code in (408, 425, 429) or error.code >= 500) from error
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            raise DownloadError("the server does not answer", True) from error
        raise DownloadError(getattr(reason, "strerror", None) or type(reason).__name__, True) from error
    if len(data) > MAX_DOWNLOAD:
        raise DownloadError(f"more than {MAX_DOWNLOAD >> 20} MB", False)
    if promised.isdigit() and len(data) < int(promised):
        raise DownloadError("the server stopped before the end", True)
    return data


_places: OrderedDict[tuple[int, str], Folder] = OrderedDict()
_descriptors: OrderedDict[tuple[int, str], int] = OrderedDict()


def _place(url: str) -> Folder:
    """Connections are kept per process: they must not be shared over a fork."""
    key = os.getpid(), url
    if key not in _places:
        _places[key] = open_folder(url)
        if len(_places) > _OPEN_PLACES:
            _places.popitem(last=False)
    return _places[key]


def _descriptor(path: str) -> int:
    key = os.getpid(), path
    if key not in _descriptors:
        _descriptors[key] = os.open(path, os.O_RDONLY)
        if len(_descriptors) > _OPEN_FILES:
            os.close(_descriptors.popitem(last=False)[1])
    return _descriptors[key]


def reachable(url: str) -> bool:
    """Whether pictures are read from URLs of this scheme. Raises DataError for commands and chained file systems."""
    return scheme_of(unchained(url)) in (*OBJECT_STORES, "memory", "local", "sftp", "hdfs")


def render(svg: Path, size: int) -> bytes:
    """The drawing on white as a PNG of `size` x `size` pixels, RGB. Takes about 2 ms at 64 pixels."""
    import io

    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=size, height=size, background="white", skip_system_fonts=True)
    out = io.BytesIO()
    Image.open(io.BytesIO(bytes(png))).convert("RGB").save(out, "PNG")
    return out.getvalue()
