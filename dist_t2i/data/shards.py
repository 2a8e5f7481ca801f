"""A set on disk: WebDataset tars, an index beside each, one manifest.

    SET/manifest.json               splits, their shards (samples, bytes, sha256), caption statistics, fingerprint
        tokenizer.json              trained on the training captions
        train-00000.tar             key.jpg (png, webp) + key.json {"captions": [...]}: any WebDataset reader reads it
        train-00000.index           where each member of the tar lies, and its crc32
        test-00000.tar ...          further splits
        report.html, contact_sheet.png, bad_samples.jsonl

An index is a NumPy .npz of plain arrays: `keys` (UTF-8, joined by newlines), `first` (int64 [samples + 1]: sample i
has the members first[i]:first[i + 1]), and for each member `offset`, `size` (int64), `crc32` (uint32) and `extension`
(uint8, a line of `extensions`). The members of a sample share their name up to the first dot, as WebDataset has it.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from dist_t2i.data.sources import ShardFile, local_path, open_shard
from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "dist_t2i set"
VERSION = 1
PICTURES = ("jpg", "jpeg", "png", "webp")
UNSAFE = frozenset({"pyd", "pickle", "pkl", "pt", "pth", "joblib", "dill"})
"""Extensions whose usual decoders run code that the file contains."""
_OPEN_SHARDS = 64


class BadSample(Exception):
    """One sample that cannot be used; `reason` is a phrase that many samples may share."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple:
        return BadSample, (self.shard, self.key, self.reason)


class Member(NamedTuple):
    """One file of a sample inside a tar."""

    extension: str
    offset: int
    size: int
    crc32: int


class ShardIndex:
    """Where the samples of one shard lie."""

    def __init__(self, keys: Sequence[str], members: Sequence[Sequence[Member]]) -> None:
        self.keys = list(keys)
        flat = [member for sample in members for member in sample]
        self.extensions = sorted({member.extension for member in flat})
        code = {extension: number for number, extension in enumerate(self.extensions)}
        self._first = numpy.cumsum([0, *map(len, members)], dtype=numpy.int64)
        self._offset = numpy.array([member.offset for member in flat], dtype=numpy.int64)
        self._size = numpy.array([member.size for member in flat], dtype=numpy.int64)
        self._crc32 = numpy.array([member.crc32 for member in flat], dtype=numpy.uint32)
        self._extension = numpy.array([code[member.extension] for member in flat], dtype=numpy.uint8)

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, row: int) -> list[Member]:
        span = range(int(self._first[row]), int(self._first[row + 1]))
        return [
            Member(self.extensions[self._extension[i]], int(self._offset[i]), int(self._size[i]), int(self._crc32[i]))
            for i in span
        ]

    def to_bytes(self) -> bytes:
        """The index file; the same bytes for the same index."""
        out = io.BytesIO()
        numpy.savez(
            out,
            keys=_pack(self.keys),
            extensions=_pack(self.extensions),
            first=self._first,
            offset=self._offset,
            size=self._size,
            crc32=self._crc32,
            extension=self._extension,
        )
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> ShardIndex:
        """Raises DataError when `data` is no index, or names members that could run code."""
        index = cls.__new__(cls)
        try:
            with numpy.load(io.BytesIO(data), allow_pickle=False) as arrays:
                index.keys, index.extensions = _unpack(arrays["keys"]), _unpack(arrays["extensions"])
                index._first, index._offset, index._size = arrays["first"], arrays["offset"], arrays["size"]
                index._crc32, index._extension = arrays["crc32"], arrays["extension"]
        except Exception as error:  # zip, key and value errors, whatever was cut
            raise DataError(f"{name}: not an index of a shard ({error}); write the set again") from error
        if len(index._first) != len(index.keys) + 1:
            raise DataError(f"{name}: not an index of a shard (its arrays do not fit); write the set again")
        refuse_unsafe(index.extensions, name)
        return index

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        try:
            return cls.from_bytes(path.read_bytes(), str(path))
        except OSError as error:
            raise DataError(f"cannot read the index {path}: {error.strerror}; write the set again") from error


def _pack(lines: Sequence[str]) -> numpy.ndarray:
    return numpy.frombuffer("\n".join(lines).encode(), dtype=numpy.uint8)


def _unpack(packed: numpy.ndarray) -> list[str]:
    return packed.tobytes().decode().split("\n") if packed.size else []


def refuse_unsafe(extensions: Sequence[str], name: str) -> None:
    """Raises DataError when a member could run code once decoded, as webdataset decodes pickles by default."""
    unsafe = sorted(extension for extension in extensions if extension.rpartition(".")[2].lower() in UNSAFE)
    if unsafe:
        raise DataError(
            f"{name}: holds .{', .'.join(unsafe)} members: pickles can run code and are not read; write the set again "
            "with pictures, text and json only"
        )


def index_tar(path: str | Path) -> ShardIndex:
    """The index of any WebDataset tar, read from end to end. Raises DataError."""
    keys: list[str] = []
    members: list[list[Member]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, slash, name = info.name.rpartition("/")
                base, dot, extension = name.partition(".")
                if not info.isfile() or not dot or not base:
                    continue
                data = tar.extractfile(info).read()  # type: ignore[union-attr]
                key = folder + slash + base
                if not keys or keys[-1] != key:
                    keys.append(key)
                    members.append([])
                members[-1].append(Member(extension.lower(), info.offset_data, info.size, zlib.crc32(data)))
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read as a tar: {error}") from error
    index = ShardIndex(keys, members)
    refuse_unsafe(index.extensions, str(path))
    return index


class Shards:
    """The shards of one split: reads samples, with a bounded number of files and indexes open. Picklable."""

    def __init__(self, folder: Path, names: Sequence[str], sizes: Sequence[int]) -> None:
        self.folder, self.names, self.sizes = folder, list(names), list(sizes)
        self._opened: OrderedDict[int, tuple[ShardFile, ShardIndex]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": OrderedDict()}

    def url(self, shard: int) -> str:
        return str(self.folder / self.names[shard])

    def open(self, shard: int) -> tuple[ShardFile, ShardIndex]:
        found = self._opened.get(shard)
        if found is None:
            path = local_path(self.url(shard))
            index = ShardIndex.load(path.with_suffix(".index"))
            if len(index) != self.sizes[shard]:
                raise DataError(f"{path}: its index has {len(index)} samples, the manifest says {self.sizes[shard]}")
            found = self._opened[shard] = (open_shard(str(path)), index)
            if len(self._opened) > _OPEN_SHARDS:
                self._opened.popitem(last=False)[1][0].close()
        else:
            self._opened.move_to_end(shard)
        return found

    def read(self, shard: int, row: int) -> dict[str, Any]:
        """A webdataset sample: `__key__`, `__url__`, extension -> bytes. Raises BadSample, DataError."""
        file, index = self.open(shard)
        sample: dict[str, Any] = {"__key__": index.keys[row], "__url__": self.url(shard)}
        for member in index.members(row):
            try:
                data = file.read(member.offset, member.size)
            except OSError as error:
                raise BadSample(self.names[shard], index.keys[row], f"unreadable: {error.strerror}") from error
            if len(data) != member.size:
                raise BadSample(self.names[shard], index.keys[row], "shard is cut short")
            if zlib.crc32(data) != member.crc32:
                raise BadSample(self.names[shard], index.keys[row], f"checksum of .{member.extension} differs")
            sample[member.extension] = data
        return sample


class Sample:
    """One captioned picture, read and not yet decoded."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.key: str = raw["__key__"]
        self.captions, self.attributes = captions_of(raw)
        self.extension, self.image_bytes = picture_of(raw)

    @property
    def image(self) -> Image:
        """The picture: RGB, upright, on white, at its own size."""
        from dist_t2i.data.decode import open_picture

        return open_picture(self.image_bytes)


def picture_of(raw: dict[str, Any]) -> tuple[str, bytes]:
    """Extension and bytes of a raw sample's picture. Raises BadSample when it has none."""
    for extension in PICTURES:
        if extension in raw:
            return extension, raw[extension]
    raise BadSample(Path(raw["__url__"]).name, raw["__key__"], "no picture")


def captions_of(raw: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions and further attributes of a raw sample, from `json` or, one a line, from `txt`. Raises BadSample."""
    try:
        attributes = json.loads(raw["json"]) if "json" in raw else {}
        found = attributes.get("captions") or attributes.get("caption") or raw.get("txt", b"").decode().splitlines()
    except (ValueError, AttributeError) as error:
        raise BadSample(Path(raw["__url__"]).name, raw["__key__"], "captions cannot be read") from error
    found = [found] if isinstance(found, str) else found
    captions = tuple(text.strip() for text in found if isinstance(text, str) and text.strip())
    if not captions:
        raise BadSample(Path(raw["__url__"]).name, raw["__key__"], "no caption")
    return captions, attributes


class Samples(Sequence[Sample]):
    """Random access to one split, in the order of its shards."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self._ends = numpy.cumsum(shards.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Sample:  # type: ignore[override]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        shard = int(numpy.searchsorted(self._ends, number, side="right"))
        return Sample(self.shards.read(shard, number - int(self._ends[shard]) + self.shards.sizes[shard]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))


class ShardSet:
    """A sharded set. `manifest` is manifest.json as it is; `splits` the names of the splits."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest

    def at(self, folder: Path) -> ShardSet:
        """The same set with its files in another folder."""
        return ShardSet(folder, self.manifest)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest["splits"])

    @property
    def fingerprint(self) -> str:
        """sha256 over the checksums of all shards and the tokenizer: equal for equal sets, wherever they lie."""
        return self.manifest["fingerprint"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder)

    def shards(self, split: str) -> Shards:
        """Raises DataError when there is no such split."""
        if split not in self.manifest["splits"]:
            raise DataError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}")
        listed = self.manifest["splits"][split]["shards"]
        return Shards(self.folder, [shard["name"] for shard in listed], [shard["samples"] for shard in listed])

    def samples(self, split: str) -> Samples:
        return Samples(self.shards(split))


def open_set(path: str | Path) -> ShardSet:
    """The set in a folder (or named by its manifest.json). Raises DataError when there is none that can be read."""
    if not str(path):
        raise DataError("no data set is named: set data.train to a folder that tools/shard.py wrote")
    file = local_path(str(path))
    file = file / "manifest.json" if file.is_dir() else file
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no set (no {file}); write one with tools/shard.py") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the manifest {file}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{file} is not the manifest of a set that tools/shard.py wrote")
    if manifest.get("version") != VERSION:
        raise DataError(f"{file}: format version {manifest.get('version')} is not {VERSION}; write the set again")
    return ShardSet(file.parent, manifest)
