"""Reads a WebDataset tar of any origin from end to end: the offsets of its members and its captions.

Damage costs only the damaged part, and is listed as a problem: after an unreadable header, reading continues at the next
readable one; of a truncated tar the samples before the cut are kept.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dist_t2i.data.shard_index import Member, ShardIndex, key_and_extension, refuse_unsafe
from dist_t2i.storage.shard_file import ShardFile

TEXTS = ("json", "txt")
_BUFFER = 2**22
_LARGEST_TEXT = 2**20


class _ShardReader(io.RawIOBase):
    """A shard as a file object for sequential reading."""

    def __init__(self, file: ShardFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end is not known")
        self._position = offset if whence == io.SEEK_SET else self._position + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@dataclass
class TarContents:
    """The samples of a tar."""

    keys: list[str] = field(default_factory=list)
    members: list[list[Member]] = field(default_factory=list)
    texts: list[dict[str, bytes]] = field(default_factory=list)
    """For each sample, extension -> bytes of its small json and txt members."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(member or position, reason)"""
    size: int = 0
    """Bytes up to the end of the last member."""

    def index(self, name: str) -> ShardIndex:
        """Raises DataError if members could run code."""
        index = ShardIndex(self.keys, self.members)
        refuse_unsafe(index.extensions, name)
        return index


def read_tar(file: ShardFile, *, checksums: bool = True, texts: bool = False) -> TarContents:
    """The samples of a tar. Without `checksums` it does not read the bytes of images.

    Raises OSError if the file cannot be read, and ValueError if it is not a tar.
    """
    contents = TarContents()
    reader = io.BufferedReader(_ShardReader(file), _BUFFER)
    try:
        for info in _headers(reader, contents):
            _add(info, reader, contents, checksums, texts)
        if not contents.members and contents.problems:
            raise ValueError("not a tar")
    except tarfile.TarError as error:
        if not contents.keys:
            raise ValueError(f"not a tar: {error}") from error
        contents.problems.append((contents.keys[-1], f"shard is cut short: {error}"))
        _drop_cut_member(contents)
    return contents


def _headers(reader: Any, contents: TarContents) -> Iterator[tarfile.TarInfo]:
    """The members of the tar. Adds a problem for each gap that is not zeros, and for a missing end."""
    end = start = 0
    while True:
        reader.seek(start)
        try:
            for info in _headers_from(reader, start):
                if info.offset > end:
                    _check_gap(reader, end, info.offset, contents)
                yield info
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                contents.size = end
            break
        except _Unreadable as error:  # a header of several blocks, one of them broken: continue at the next block
            start = max(error.offset, end) + tarfile.BLOCKSIZE
            reader.seek(start)
            if not reader.read(1):
                raise tarfile.ReadError(str(error)) from error
    reader.seek(end)
    rest = reader.read(2 * tarfile.BLOCKSIZE)
    last = contents.keys[-1] if contents.keys else ""
    if rest.strip(b"\0"):
        contents.problems.append((last, "garbage follows the last readable header"))
    elif not rest and contents.keys:
        contents.problems.append((last, "shard is cut short: the end of the tar is missing"))


class _Unreadable(Exception):
    def __init__(self, error: tarfile.TarError, offset: int) -> None:
        super().__init__(str(error))
        self.offset = offset


def _headers_from(reader: Any, start: int) -> Iterator[tarfile.TarInfo]:
    """The members after the offset `start`, after skipping unreadable blocks. Raises _Unreadable."""
    tar = None
    try:
        tar = tarfile.open(fileobj=reader, mode="r:", ignore_zeros=True)  # noqa: SIM115  the reader stays open
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps all members in memory
            yield info
    except tarfile.TarError as error:
        raise _Unreadable(error, tar.offset if tar is not None else start) from error


def _peek(reader: Any, offset: int, size: int) -> bytes:
    """Bytes at an offset; the reader's position does not change."""
    position = reader.tell()
    reader.seek(offset)
    data = reader.read(size)
    reader.seek(position)
    return data


def _check_gap(reader: Any, start: int, stop: int, contents: TarContents) -> None:
    if _peek(reader, start, min(stop - start, 2**20)).strip(b"\0"):
        after = contents.keys[-1] if contents.keys else "the beginning"
        contents.problems.append((f"after {after}", f"a header cannot be read: {stop - start} bytes are lost"))


def _add(info: tarfile.TarInfo, reader: Any, contents: TarContents, checksums: bool, texts: bool) -> None:
    """Adds a member: its offset, its checksum if `checksums`, its bytes if it is a small text and `texts`."""
    named = key_and_extension(info.name)
    if not info.isreg() or named is None:
        return
    key, extension = named
    is_text = texts and extension in TEXTS and info.size <= _LARGEST_TEXT
    data = b""
    if checksums or is_text:
        data = _peek(reader, info.offset_data, info.size)
        if len(data) < info.size:
            raise tarfile.ReadError(f"{info.name} ends too soon")
    if not contents.keys or contents.keys[-1] != key:
        contents.keys.append(key)
        contents.members.append([])
        contents.texts.append({})
    crc32 = zlib.crc32(data) if data or not info.size else -1
    contents.members[-1].append(Member(extension, info.offset_data, info.size, crc32))
    if is_text:
        contents.texts[-1][extension] = data


def _drop_cut_member(contents: TarContents) -> None:
    """Drops the last member if the tar ends before it does, which goes unnoticed without checksums."""
    last = contents.members[-1]
    if last and last[-1].offset + last[-1].size > contents.size:
        last.pop()
        if not last:
            contents.keys.pop(), contents.members.pop(), contents.texts.pop()
