"""The index of a shard: offset, size and checksum of each member of each sample in the tar.

An index is a NumPy .npz file of plain arrays. `keys` holds the keys of all samples and `extensions` the distinct
extensions, both as UTF-8 bytes joined by newlines. `first` (int64 [samples + 1]) maps sample i to the members
first[i]:first[i + 1]. Four arrays have one element per member: `offset` and `size` (int64), `crc32` (int64, -1 if
unknown), and `extension` (uint8, a line number in `extensions`).

As in WebDataset, the members of a sample share their name up to the first dot.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy

from dist_t2i.errors import DataError

UNSAFE = frozenset({"pyd", "pickle", "pkl", "pt", "pth", "joblib", "dill"})
"""Extensions whose usual decoders run code from the file."""


class Member(NamedTuple):
    """One file of a sample in a tar."""

    extension: str
    offset: int
    size: int
    crc32: int
    """The CRC-32 checksum of the file; -1 if it is unknown."""


def key_and_extension(path: str) -> tuple[str, str] | None:
    """The key and the extension of a member, as WebDataset defines them: the name is split at its first dot, and the
    extension is converted to lower case. None if the member belongs to no sample."""
    folder, slash, name = path.rpartition("/")
    base, dot, extension = name.partition(".")
    return (folder + slash + base, extension.lower()) if base and dot else None


class Keys(Sequence[str]):
    """The keys of a shard in one block of memory. The block takes a fifth of the memory of a list of strings."""

    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        ends = numpy.flatnonzero(numpy.frombuffer(packed, dtype=numpy.uint8) == ord("\n"))
        self._starts = numpy.concatenate([[0], ends + 1, [len(packed) + 1]]) if packed else numpy.zeros(1, numpy.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # slices are not supported
        row = range(len(self))[row]
        return self.packed[self._starts[row] : self._starts[row + 1] - 1].decode()


class ShardIndex:
    """Maps each sample of one shard to the locations of its members in the tar."""

    def __init__(self, keys: Sequence[str], members: Sequence[Sequence[Member]]) -> None:
        self.keys = Keys("\n".join(keys).encode())
        flat = [member for sample in members for member in sample]
        self.extensions = sorted({member.extension for member in flat})
        self._arrays = {"first": numpy.cumsum([0, *map(len, members)], dtype=numpy.int64)}
        for name in ("offset", "size", "crc32"):
            self._arrays[name] = numpy.array([getattr(member, name) for member in flat], dtype=numpy.int64)
        codes = {extension: number for number, extension in enumerate(self.extensions)}
        self._arrays["extension"] = numpy.array([codes[member.extension] for member in flat], dtype=numpy.uint8)

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, row: int) -> list[Member]:
        """The members of one sample."""
        first, stop = self._arrays["first"][row : row + 2]
        columns = (self._arrays[name][first:stop].tolist() for name in Member._fields)
        return [Member(self.extensions[code], *numbers) for code, *numbers in zip(*columns, strict=True)]

    def to_bytes(self) -> bytes:
        """The content of the index file. Equal indexes give equal bytes."""
        out = io.BytesIO()
        texts = {"keys": self.keys.packed, "extensions": "\n".join(self.extensions).encode()}
        lines = {name: numpy.frombuffer(text, dtype=numpy.uint8) for name, text in texts.items()}
        numpy.savez(out, **lines, **self._arrays)  # type: ignore[arg-type]
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> ShardIndex:
        """Parses an index file. Raises DataError if the file is not an index or lists members that could run code."""
        index = cls.__new__(cls)
        try:
            with numpy.load(io.BytesIO(data), allow_pickle=False) as arrays:
                packed = arrays["extensions"].tobytes().decode()
                index.keys, index.extensions = Keys(arrays["keys"].tobytes()), packed.split("\n") if packed else []
                index._arrays = {name: arrays[name] for name in ("first", "offset", "size", "crc32", "extension")}
        except Exception as error:  # a broken file can raise zip, key and value errors
            raise DataError(f"{name}: not an index of a shard ({error}); write the set again") from error
        if len(index._arrays["first"]) != len(index.keys) + 1:
            raise DataError(f"{name}: not an index of a shard (its arrays have different lengths); write the set again")
        refuse_unsafe(index.extensions, name)
        return index


def refuse_unsafe(extensions: Iterable[str], name: str) -> None:
    """Raises DataError if decoding a member could run code, because webdataset decodes pickles by default."""
    if unsafe := sorted(extension for extension in extensions if extension.rpartition(".")[2].lower() in UNSAFE):
        raise DataError(
            f"{name}: .{', .'.join(unsafe)} members are not read, because pickles can run code; write the set again "
            "with pictures, text and json only"
        )
