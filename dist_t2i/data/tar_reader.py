"""Reading a WebDataset tar of any origin from end to end: where its members lie, what its captions say.

Damage costs what is damaged. After a header that cannot be read, the next one that can is looked for; a tar that ends
too soon keeps what came before. Both are told.
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


class _Reading(io.RawIOBase):
    """A shard as a file that is read in order."""

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

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@dataclass
class TarContents:
    """What was found in a tar."""

    keys: list[str] = field(default_factory=list)
    members: list[list[Member]] = field(default_factory=list)
    texts: list[dict[str, bytes]] = field(default_factory=list)
    """For each sample, extension -> bytes of its small json and txt members."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(member or place, reason)"""
    size: int = 0
    """Bytes from the beginning to the end of the last member."""

    def index(self, name: str) -> ShardIndex:
        """Raises DataError when members could run code."""
        index = ShardIndex(self.keys, self.members)
        refuse_unsafe(index.extensions, name)
        return index


def read_tar(file: ShardFile, *, checksums: bool = True, texts: bool = False) -> TarContents:
    """Everything that a tar holds. Without `checksums` the bytes of pictures are passed over.

    Raises OSError when it cannot be read, and ValueError when it is no tar at all.
    """
    found = TarContents()
    reader = io.BufferedReader(_Reading(file), _BUFFER)
    try:
        for info in _headers(reader, found):
            _add(info, reader, found, checksums, texts)
        if not found.members and found.problems:
            raise ValueError("not a tar")
    except tarfile.TarError as error:
        if not found.keys:
            raise ValueError(f"not a tar: {error}") from error
        found.problems.append((found.keys[-1], f"shard is cut short: {error}"))
        _drop_cut_member(found)
    return found


def _headers(reader: Any, found: TarContents) -> Iterator[tarfile.TarInfo]:
    """The members of the tar. Gaps between them that are not zeros are told, and so is a missing end."""
    end = start = 0
    while True:
        reader.seek(start)
        try:
            for info in _from(reader, start):
                if info.offset > end:
                    _tell_gap(reader, end, info.offset, found)
                yield info
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                found.size = end
            break
        except _Unreadable as error:  # a header of two blocks of which one is broken: look on behind it
            start = max(error.offset, end) + tarfile.BLOCKSIZE
            reader.seek(start)
            if not reader.read(1):
                raise tarfile.ReadError(str(error)) from error
    reader.seek(end)
    rest = reader.read(2 * tarfile.BLOCKSIZE)
    last = found.keys[-1] if found.keys else ""
    if rest.strip(b"\0"):
        found.problems.append((last, "garbage follows the last readable header"))
    elif not rest and found.keys:
        found.problems.append((last, "shard is cut short: the end of the tar is missing"))


class _Unreadable(Exception):
    def __init__(self, error: tarfile.TarError, offset: int) -> None:
        super().__init__(str(error))
        self.offset = offset


def _from(reader: Any, start: int) -> Iterator[tarfile.TarInfo]:
    """The members from a place on, whatever lies before the first of them. Raises _Unreadable."""
    tar = None
    try:
        tar = tarfile.open(fileobj=reader, mode="r:", ignore_zeros=True)  # noqa: SIM115  the reader stays open
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would remember every one
            yield info
    except tarfile.TarError as error:
        raise _Unreadable(error, tar.offset if tar is not None else start) from error


def _tell_gap(reader: Any, start: int, stop: int, found: TarContents) -> None:
    here = reader.tell()
    reader.seek(start)
    garbage = reader.read(min(stop - start, 2**20)).strip(b"\0")
    reader.seek(here)
    if garbage:
        after = found.keys[-1] if found.keys else "the beginning"
        found.problems.append((f"after {after}", f"a header cannot be read: {stop - start} bytes are lost"))


def _add(info: tarfile.TarInfo, reader: Any, found: TarContents, checksums: bool, texts: bool) -> None:
    """Take up one member: its place, its checksum if asked for, its bytes if they are a small text."""
    named = key_and_extension(info.name)
    if not info.isreg() or named is None:
        return
    key, extension = named
    wanted = texts and extension in TEXTS and info.size <= _LARGEST_TEXT
    data = b""
    if checksums or wanted:
        here = reader.tell()
        reader.seek(info.offset_data)
        data = reader.read(info.size)
        reader.seek(here)
        if len(data) < info.size:
            raise tarfile.ReadError(f"{info.name} ends too soon")
    if not found.keys or found.keys[-1] != key:
        found.keys.append(key)
        found.members.append([])
        found.texts.append({})
    crc32 = zlib.crc32(data) if data or not info.size else -1
    found.members[-1].append(Member(extension, info.offset_data, info.size, crc32))
    if wanted:
        found.texts[-1][extension] = data


def _drop_cut_member(found: TarContents) -> None:
    """Without checksums the last member was not read to its end, where the tar is cut."""
    if found.members and found.members[-1] and found.members[-1][-1].offset + found.members[-1][-1].size > found.size:
        found.members[-1].pop()
        if not found.members[-1]:
            found.keys.pop(), found.members.pop(), found.texts.pop()
