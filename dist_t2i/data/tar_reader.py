"""Reads a WebDataset tar of any origin from end to end, and returns the offsets of its members and its captions.

A broken part of the tar is lost and listed as a problem, but the other parts are kept. After an unreadable header,
reading continues at the next readable header. If the tar is truncated, the samples before the cut are kept.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dist_t2i.data.shard_index import Member, ShardIndex, key_and_extension
from dist_t2i.storage.shard_file import ShardFile

_BUFFER = 2**22
_LARGEST_TEXT = 2**20


class _Reader:
    """A shard for sequential reading as a file object and for random access (`at`), with one buffer for both."""

    def __init__(self, file: ShardFile) -> None:
        self._file, self._position, self._buffer, self._start = file, 0, b"", 0

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int) -> None:
        self._position = offset

    def read(self, size: int) -> bytes:
        data = self.at(self._position, size)
        self._position += len(data)
        return data

    def at(self, offset: int, size: int) -> bytes:
        first = offset - self._start
        if first < 0 or first + size > len(self._buffer):
            first, self._start, self._buffer = 0, offset, self._file.read(offset, max(size, _BUFFER))
        return self._buffer[first : first + size]


@dataclass
class TarSample:
    """A sample of a tar."""

    key: str
    members: list[Member] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)
    """The bytes of the small json and txt members, by extension."""


@dataclass
class TarContents:
    """The samples of a tar."""

    samples: list[TarSample] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Pairs (where, reason); `where` is the name of a member or a position in the tar."""
    size: int = 0
    """The number of bytes up to the end of the last member."""

    def index(self) -> ShardIndex:
        """The index of the samples."""
        return ShardIndex([sample.key for sample in self.samples], [sample.members for sample in self.samples])


def read_tar(file: ShardFile, *, checksums: bool = True, texts: bool = False) -> TarContents:
    """Reads the samples of a tar. `checksums` requests checksums, for which the bytes of images are read. `texts` keeps
    the bytes of captions. Raises OSError if the file cannot be read, and ValueError if the file is not a tar."""
    contents = TarContents()
    reader = _Reader(file)
    try:
        for info in _headers(reader, contents):
            _add(info, reader, contents, checksums, texts)
        if not contents.samples and contents.problems:
            raise ValueError("not a tar")
    except tarfile.TarError as error:
        if not contents.samples:
            raise ValueError(f"not a tar: {error}") from error
        last = contents.samples[-1]
        contents.problems.append((last.key, f"shard is cut short: {error}"))
        # Without checksums, the bytes of the last member were not read, so nothing has noticed yet if the tar ends
        # before the member does.
        if last.members and last.members[-1].offset + last.members[-1].size > contents.size:
            last.members.pop()
            if not last.members:
                contents.samples.pop()
    return contents


def _headers(reader: Any, contents: TarContents) -> Iterator[tarfile.TarInfo]:
    """Yields the members of the tar. Adds a problem for each gap with bytes other than zero, and for a missing end."""
    start = 0
    while True:
        reader.seek(start)
        tar = None
        try:
            tar = tarfile.TarFile(fileobj=reader, ignore_zeros=True)
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # otherwise the list would keep all members in memory
                gap = info.offset - contents.size
                if gap > 0 and reader.at(contents.size, min(gap, 2**20)).strip(b"\0"):
                    after = contents.samples[-1].key if contents.samples else "the beginning"
                    contents.problems.append((f"after {after}", f"a header cannot be read: {gap} bytes are lost"))
                yield info
                contents.size = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            break
        except tarfile.TarError:  # one block of a header with several blocks is broken: continue at the next block
            start = max(tar.offset if tar else start, contents.size) + tarfile.BLOCKSIZE
            if not reader.at(start, 1):
                raise
    rest = reader.at(contents.size, 2 * tarfile.BLOCKSIZE)
    last = contents.samples[-1].key if contents.samples else ""
    if rest.strip(b"\0"):
        contents.problems.append((last, "garbage follows the last readable header"))
    elif not rest and contents.samples:
        contents.problems.append((last, "shard is cut short: the end of the tar is missing"))


def _add(info: tarfile.TarInfo, reader: _Reader, contents: TarContents, checksums: bool, texts: bool) -> None:
    """Adds a member with its offset. `checksums` adds the checksum, and `texts` adds the bytes of a small text."""
    named = key_and_extension(info.name)
    if not info.isreg() or named is None:
        return
    key, extension = named
    is_text = texts and extension in ("json", "txt") and info.size <= _LARGEST_TEXT
    data = reader.at(info.offset_data, info.size) if checksums or is_text else b""
    if (checksums or is_text) and len(data) < info.size:
        raise tarfile.ReadError(f"{info.name} ends too soon")
    if not contents.samples or contents.samples[-1].key != key:
        contents.samples.append(TarSample(key))
    crc32 = zlib.crc32(data) if data or not info.size else -1
    contents.samples[-1].members.append(Member(extension, info.offset_data, info.size, crc32))
    if is_text:
        contents.samples[-1].texts[extension] = data
