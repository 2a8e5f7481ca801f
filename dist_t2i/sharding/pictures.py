"""The inputs from which a picture can be read: a file, an SVG, a URL, or a member of a tar."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

from dist_t2i.storage.folders import Folder, open_folder
from dist_t2i.storage.retries import pauses, retry
from dist_t2i.storage.urls import scheme_of

MAX_DOWNLOAD = 2**28
"""A download of more than this many bytes fails."""
TIMEOUT, RETRIES = 30.0, 2
"""A download fails after `TIMEOUT` seconds without a byte, and is repeated up to `RETRIES` times if that may help."""
_FIRST_READ = 2**18
_OPEN_FILES, _OPEN_FOLDERS = 64, 16


class Picture(ABC):
    """A picture that has not been read yet. All methods raise OSError if the picture cannot be read."""

    __slots__ = ()
    remote = False
    """Whether each read needs a round trip over a network. Such reads should run in parallel."""

    @abstractmethod
    def stat(self) -> tuple[int, str]:
        """The size in bytes (0 if unknown), and a text that changes with the picture. Does not read the picture."""

    @abstractmethod
    def read(self) -> bytes:
        """The stored bytes: a JPEG, a PNG, ..."""


@dataclass(frozen=True, slots=True)
class PictureFile(Picture):
    """A file on a disk."""

    path: str

    def stat(self) -> tuple[int, str]:
        status = os.stat(self.path)
        return status.st_size, f"{status.st_size} {status.st_mtime_ns}"

    def read(self) -> bytes:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            data = os.read(descriptor, _FIRST_READ)
            if len(data) < _FIRST_READ:  # true for most pictures; a Python file object would be slower
                return data
            with open(descriptor, "rb", buffering=0, closefd=False) as rest:
                return data + rest.read()
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class SvgPicture(Picture):
    """An SVG file, rendered at `size` x `size` pixels without the groups in `hidden` (see `render`)."""

    path: str
    size: int
    hidden: frozenset[str] = frozenset()

    def stat(self) -> tuple[int, str]:
        return 0, PictureFile(self.path).stat()[1]

    def read(self) -> bytes:
        return render(Path(self.path), self.size, self.hidden)


@dataclass(frozen=True, slots=True)
class PictureUrl(Picture):
    """A picture at a URL: http(s), S3, Google Cloud Storage, Azure, or any other file system that fsspec knows."""

    url: str
    remote = True

    def stat(self) -> tuple[int, str]:
        return 0, self.url

    def read(self) -> bytes:
        def temporary(error: OSError, _: float) -> bool:
            return getattr(error, "temporary", not isinstance(error, FileNotFoundError | PermissionError))

        return retry(self._read_once, islice(pauses(0.5, 8.0, factor=4.0), RETRIES), temporary)

    def _read_once(self) -> bytes:
        if scheme_of(self.url) in ("http", "https"):
            return _download(self.url)
        folder, _, name = self.url.rpartition("/")
        return _open_folder(os.getpid(), folder).read(name)


@dataclass(frozen=True, slots=True)
class TarMember(Picture):
    """A picture that is stored in a tar, as `size` bytes beginning at `offset`."""

    url: str
    offset: int
    size: int
    version: str
    """A text that changes when the tar changes."""
    remote: bool

    def stat(self) -> tuple[int, str]:
        return self.size, f"{self.url.rpartition('/')[2]} {self.offset} {self.size} {self.version}"

    def read(self) -> bytes:
        if self.remote:
            folder, _, name = self.url.rpartition("/")
            data = _open_folder(os.getpid(), folder).read_range(name, self.offset, self.size)
        else:
            data = os.pread(_open_file(os.getpid(), self.url).fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise OSError("its tar is cut short")
        return data


class DownloadError(OSError):
    """A failed download and its reason. `temporary` is True if another attempt may succeed."""

    def __init__(self, reason: str, temporary: bool = False) -> None:
        super().__init__(reason)
        self.temporary = temporary


def _download(url: str) -> bytes:
    import http.client
    import urllib.error
    import urllib.request

    parts = urlsplit(url)
    path, query = quote(parts.path, safe="/%:@!$&'()*+,;=~"), quote(parts.query, safe="%/?&=+:,;@~")
    address = parts._replace(path=path, query=query).geturl()
    request = urllib.request.Request(address, headers={"User-Agent": "dist_t2i"})
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


# `process` gives each process its own entries: connections and file positions must not be shared across a fork.
@lru_cache(_OPEN_FOLDERS)
def _open_folder(process: int, url: str) -> Folder:
    return open_folder(url)


@lru_cache(_OPEN_FILES)
def _open_file(process: int, path: str) -> BinaryIO:
    return open(path, "rb", buffering=0)


def render(svg: Path, size: int, hidden: frozenset[str] = frozenset()) -> bytes:
    """Renders an SVG on white to an RGB PNG of `size` x `size` pixels. Takes about 2 ms at 64 pixels.

    Leaves out the top-level elements whose id is in `hidden`.
    """
    import resvg_py
    from PIL import Image

    text = None
    if hidden:
        root = ElementTree.parse(svg).getroot()
        for element in [element for element in root if element.get("id") in hidden]:
            root.remove(element)
        text = ElementTree.tostring(root, encoding="unicode")
    path = None if hidden else str(svg)
    png = resvg_py.svg_to_bytes(
        svg_string=text, svg_path=path, width=size, height=size, background="white", skip_system_fonts=True
    )
    out = io.BytesIO()
    Image.open(io.BytesIO(bytes(png))).convert("RGB").save(out, "PNG")
    return out.getvalue()
