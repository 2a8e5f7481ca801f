"""A set on disk: WebDataset tars, an index beside each, one manifest.

SET/manifest.json               splits, their shards (samples, bytes, sha256), caption statistics, fingerprint
    tokenizer.json              trained on the training captions
    train-00000.tar             key.jpg (png, webp) + key.json {"captions": [...]}: any WebDataset reader reads it
    train-00000.index           where each member of the tar lies, and its crc32
    test-00000.tar ...          further splits
    report.html, contact_sheet.png, bad_samples.jsonl
"""

from __future__ import annotations

import json
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from dist_t2i.data.manifest import parse_manifest
from dist_t2i.data.shard_index import Member, ShardIndex
from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.errors import DataError
from dist_t2i.storage.clients import FROM_ENVIRONMENT, Gone, StorageOptions
from dist_t2i.storage.shard_file import UNKNOWN, CachedFile, Identity, ShardFile, open_shard, read_file, reason_of
from dist_t2i.storage.urls import base_name, checked, is_local, join, parent, with_suffix

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = ("jpg", "jpeg", "png", "webp")
_OPEN_SHARDS = 64


class BadSample(Exception):
    """One sample that cannot be used; `reason` is a phrase that many samples may share."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple:
        return BadSample, (self.shard, self.key, self.reason)


class Shard(NamedTuple):
    """A shard as a manifest lists it."""

    url: str
    samples: int
    index_url: str
    identity: Identity = UNKNOWN
    part: int = 0
    """Which of several lists it is from."""


class Shards:
    """The shards of one split: reads samples, with a bounded number of files and indexes open. Picklable; threads may
    share it."""

    def __init__(self, shards: Sequence[Shard], options: StorageOptions = FROM_ENVIRONMENT) -> None:
        self._shards, self.options = list(shards), options
        self.sizes = [shard.samples for shard in shards]
        self._begin()

    def _begin(self) -> None:
        self._opened: OrderedDict[int, tuple[ShardFile, ShardIndex]] = OrderedDict()
        self._broken: dict[int, str] = {}
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_shards": self._shards, "options": self.options, "sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def parts(self) -> list[list[int]]:
        """The sizes of the shards of each list, in the order of the lists."""
        found: dict[int, list[int]] = {}
        for shard in self._shards:
            found.setdefault(shard.part, []).append(shard.samples)
        return list(found.values())

    @cached_property
    def remote(self) -> bool:
        """Whether any lies behind a network."""
        return any(not is_local(shard.url) for shard in self._shards)

    def url(self, shard: int) -> str:
        return self._shards[shard].url

    def name(self, shard: int) -> str:
        return base_name(self.url(shard))

    def open(self, shard: int) -> tuple[ShardFile, ShardIndex]:
        """Raises DataError when its index does not fit, OSError when it cannot be read."""
        with self._lock:
            found = self._opened.get(shard)
            if found is not None:
                self._opened.move_to_end(shard)
                return found
            turn = self._opening.setdefault(shard, threading.Lock())
        with turn:
            found = self._opened.get(shard) or self._open(shard)
        with self._lock:
            self._opened[shard] = found
            self._opening.pop(shard, None)
            if len(self._opened) > _OPEN_SHARDS:
                self._opened.popitem(last=False)  # whoever reads from it may finish; then it closes itself
        return found

    def _open(self, shard: int) -> tuple[ShardFile, ShardIndex]:
        about = self._shards[shard]
        index = ShardIndex.from_bytes(read_file(about.index_url, self.options), about.index_url)
        if len(index) != about.samples:
            raise DataError(f"{about.url}: its index has {len(index)} samples, the manifest says {about.samples}")
        return open_shard(about.url, self.options, about.identity), index

    def read(self, shard: int, row: int, only: Sequence[str] = ()) -> dict[str, Any]:
        """A webdataset sample: `__key__`, `__url__`, extension -> bytes (`only` those extensions, where some are named).

        Raises BadSample, DataError.
        """
        if shard in self._broken:
            raise BadSample(self.name(shard), str(row), self._broken[shard])
        try:
            file, index = self.open(shard)
        except OSError as error:
            self._broken[shard] = f"shard is unreadable: {reason_of(error)}"
            raise BadSample(self.name(shard), str(row), self._broken[shard]) from error
        members = [member for member in index.members(row) if not only or member.extension in only]
        sample: dict[str, Any] = {"__key__": index.keys[row], "__url__": self.url(shard)}
        try:
            return sample | _contents(file, members)
        except _Wrong as wrong:
            if not isinstance(file, CachedFile):
                raise BadSample(self.name(shard), index.keys[row], wrong.reason) from wrong
            file.forget(*_span(members))  # perhaps it is the copy that is wrong
        except OSError as error:
            raise BadSample(self.name(shard), index.keys[row], f"unreadable: {reason_of(error)}") from error
        try:
            return sample | _contents(file.remote, members)
        except (_Wrong, OSError) as error:
            reason = error.reason if isinstance(error, _Wrong) else f"unreadable: {reason_of(error)}"
            raise BadSample(self.name(shard), index.keys[row], reason) from error


class _Wrong(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _span(members: Sequence[Member]) -> tuple[int, int]:
    """Offset and size of the bytes that hold all members: they are neighbours."""
    first = min(member.offset for member in members)
    return first, max(member.offset + member.size for member in members) - first


def _contents(file: ShardFile, members: Sequence[Member]) -> dict[str, bytes]:
    """Extension -> bytes of a sample, from one read. Raises _Wrong when a checksum differs, OSError."""
    if not members:
        return {}
    first, size = _span(members)
    data = memoryview(file.read(first, size))
    if len(data) < size:
        raise _Wrong("shard is cut short")
    found: dict[str, bytes] = {}
    for member in members:
        part = data[member.offset - first : member.offset - first + member.size]
        if member.crc32 >= 0 and zlib.crc32(part) != member.crc32:
            raise _Wrong(f"checksum of .{member.extension} differs")
        found[member.extension] = bytes(part)
    return found


class Sample:
    """One captioned picture, read and not yet decoded."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.key: str = raw["__key__"]
        self.captions, self.attributes = captions_of(raw)
        self.extension, self.image_bytes = picture_of(raw)

    @property
    def image(self) -> Image:
        """The picture: RGB, upright, on white, at its own size."""
        from dist_t2i.data.images import open_picture

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
        attributes = {"captions": attributes} if isinstance(attributes, list) else attributes
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
    """A sharded set. `folder` is a path or URL, `manifest` is manifest.json as it is, `splits` the names of the splits."""

    def __init__(
        self, folder: str | Path, manifest: dict[str, Any], options: StorageOptions = FROM_ENVIRONMENT
    ) -> None:
        self.folder, self.manifest, self.options = str(folder), manifest, options

    def at(self, folder: str | Path) -> ShardSet:
        """The same set with its files in another folder."""
        return ShardSet(folder, self.manifest, self.options)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest["splits"])

    @property
    def fingerprint(self) -> str:
        """sha256 over the checksums of all shards and the tokenizer: equal for equal sets, wherever they lie."""
        return self.manifest["fingerprint"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        name = join(self.folder, "tokenizer.json")
        try:
            return Tokenizer(read_file(name, self.options).decode("utf-8"))
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {name}: {reason_of(error)}") from error
        except (UnicodeError, DataError) as error:
            raise DataError(f"{name}: not a tokenizer.json: {error}") from error

    def shards(self, split: str) -> Shards:
        """Raises DataError when there is no such split."""
        if split not in self.manifest["splits"]:
            raise DataError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}")
        return Shards([self._shard(listed) for listed in self.manifest["splits"][split]["shards"]], self.options)

    def _shard(self, listed: Mapping[str, Any]) -> Shard:
        """A shard of the manifest: `name` (beside it, or a URL), and its `index`, beside it if nothing else is said."""
        url = join(self.folder, listed["name"])
        index = join(self.folder, listed["index"]) if "index" in listed else with_suffix(url, ".index")
        version = listed.get("sha256") or listed.get("tag") or ""
        identity = Identity(listed.get("bytes", -1), version, listed.get("tag", ""))
        return Shard(url, listed["samples"], index, identity, listed.get("part", 0))

    def samples(self, split: str) -> Samples:
        return Samples(self.shards(split))


def open_set(path: str | Path, options: StorageOptions = FROM_ENVIRONMENT) -> ShardSet:
    """The set in a folder or at a URL (or named by its manifest.json). Raises DataError when none can be read there."""
    if not str(path):
        raise DataError("no data set is named: set data.train to a folder that tools/shard.py wrote, or to shards")
    name = checked(str(path))
    file = name if base_name(name).endswith(".json") else join(name, "manifest.json")
    try:
        data = read_file(file, options)
    except (FileNotFoundError, NotADirectoryError, Gone) as error:
        reason = f" ({error.reason})" if isinstance(error, Gone) else ""
        raise DataError(f"{path}: there is no set (no {file}{reason}); write one with tools/shard.py") from error
    except OSError as error:
        raise DataError(f"cannot read the manifest {file}: {reason_of(error)}") from error
    return ShardSet(parent(file), parse_manifest(data, file), options)
