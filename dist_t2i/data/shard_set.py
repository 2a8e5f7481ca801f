"""A set of captioned images: WebDataset tars, an index for each tar, and one manifest.

SET/manifest.json               splits, their shards (samples, bytes, sha256), caption statistics, fingerprint
    tokenizer.json              trained on the training captions
    train-00000.tar             key.jpg (png, webp) + key.json {"captions": [...]}, for any WebDataset reader
    train-00000.index           offset and crc32 of each member of the tar
    test-00000.tar ...          further splits
    report.html, contact_sheet.png, bad_samples.jsonl
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from PIL import Image

from dist_t2i.data.images import open_picture
from dist_t2i.data.manifest import parse_manifest
from dist_t2i.data.shard_index import Member, ShardIndex
from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.errors import DataError
from dist_t2i.storage.clients import FROM_ENVIRONMENT, Gone, StorageOptions
from dist_t2i.storage.shard_file import UNKNOWN, CachedFile, Identity, ShardFile, open_shard, read_file, reason_of
from dist_t2i.storage.urls import base_name, checked, is_local, join, parent, with_suffix

PICTURES = ("jpg", "jpeg", "png", "webp")
_OPEN_SHARDS = 64


class BadSample(Exception):
    """An unusable sample. `reason` is a phrase that does not contain the name of the sample."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    @classmethod
    def of(cls, raw: Mapping[str, Any], reason: str) -> BadSample:
        """The error for a raw webdataset sample that is unusable for `reason`."""
        return cls(Path(raw["__url__"]).name, raw["__key__"], reason)

    def __reduce__(self) -> tuple:
        return BadSample, (self.shard, self.key, self.reason)


class Shard(NamedTuple):
    """A shard as a manifest lists it."""

    url: str
    samples: int
    index_url: str
    identity: Identity = UNKNOWN
    part: int = 0
    """The number of the entry of `data.train` that contains the shard."""


class Shards:
    """The shards of one split. Keeps a bounded number of files and indexes open. Picklable and thread-safe."""

    def __init__(self, shards: Sequence[Shard], options: StorageOptions = FROM_ENVIRONMENT) -> None:
        self._shards, self.options = list(shards), options
        self.sizes = [shard.samples for shard in shards]
        self.starts = numpy.cumsum([0, *self.sizes])
        """The index of the first sample of each shard in the split, followed by the total number of samples."""
        self._broken: dict[int, str] = {}
        self._opened = lru_cache(_OPEN_SHARDS)(self._open)
        self._locks = [threading.Lock() for _ in range(_OPEN_SHARDS)]

    def __reduce__(self) -> tuple:
        return Shards, (self._shards, self.options)

    def parts(self) -> list[list[int]]:
        """For each entry of `data.train`, the sample counts of its shards."""
        return [[shard.samples for shard in part] for _, part in groupby(self._shards, attrgetter("part"))]

    @cached_property
    def remote(self) -> bool:
        """Whether any shard is read over the network."""
        return any(not is_local(shard.url) for shard in self._shards)

    def url(self, shard: int) -> str:
        return self._shards[shard].url

    def locate(self, number: int) -> tuple[int, int]:
        """The shard and the row of sample `number` of the split."""
        shard = int(numpy.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])

    def open(self, shard: int) -> tuple[ShardFile, ShardIndex]:
        """The file and the index of a shard. Raises OSError if reading fails, DataError if index and manifest differ."""
        with self._locks[shard % len(self._locks)]:  # of several threads, only the first opens the shard
            return self._opened(shard)

    def _open(self, shard: int) -> tuple[ShardFile, ShardIndex]:
        about = self._shards[shard]
        index = ShardIndex.from_bytes(read_file(about.index_url, self.options), about.index_url)
        if len(index) != about.samples:
            raise DataError(f"{about.url}: its index has {len(index)} samples, but the manifest lists {about.samples}")
        return open_shard(about.url, self.options, about.identity), index

    def read(self, shard: int, row: int, only: Sequence[str] = ()) -> dict[str, Any]:
        """A webdataset sample: `__key__`, `__url__`, and the bytes of each file by extension. `only` limits the
        extensions.

        Raises BadSample if the sample cannot be read, and DataError if the index of its shard is unusable."""
        key, name = str(row), base_name(self.url(shard))
        if shard in self._broken:
            raise BadSample(name, key, self._broken[shard])
        try:
            file, index = self.open(shard)
        except OSError as error:
            self._broken[shard] = f"shard is unreadable: {reason_of(error)}"
            raise BadSample(name, key, self._broken[shard]) from error
        key = index.keys[row]
        members = [member for member in index.members(row) if not only or member.extension in only]
        try:
            try:
                contents = _contents(file, members, name, key)
            except BadSample:
                if not isinstance(file, CachedFile):
                    raise
                file.forget(*_span(members))  # the cached copy may be wrong: remove the copy and read the original
                contents = _contents(file.remote, members, name, key)
        except OSError as error:
            raise BadSample(name, key, f"unreadable: {reason_of(error)}") from error
        return {"__key__": key, "__url__": self.url(shard), **contents}


def _span(members: Sequence[Member]) -> tuple[int, int]:
    """Offset and size of the range that contains the members of a sample. Members are adjacent."""
    first = min(member.offset for member in members)
    return first, max(member.offset + member.size for member in members) - first


def _contents(file: ShardFile, members: Sequence[Member], shard: str, key: str) -> dict[str, bytes]:
    """The bytes of each member of a sample by extension, from one read. Raises OSError if reading fails, and BadSample
    if bytes are missing or fail their checksum."""
    if not members:
        return {}
    first, size = _span(members)
    data = memoryview(file.read(first, size))
    if len(data) < size:
        raise BadSample(shard, key, "shard is cut short")
    contents: dict[str, bytes] = {}
    for member in members:
        part = data[member.offset - first : member.offset - first + member.size]
        if member.crc32 >= 0 and zlib.crc32(part) != member.crc32:
            raise BadSample(shard, key, f"checksum of .{member.extension} differs")
        contents[member.extension] = bytes(part)
    return contents


class Sample:
    """A captioned image that is not decoded yet."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.key: str = raw["__key__"]
        self.captions, self.attributes = captions_of(raw)
        self.extension, self.image_bytes = picture_of(raw)

    @property
    def image(self) -> Image.Image:
        """The decoded image in full size: RGB, upright, on white. Raises PictureError if the image does not decode."""
        return open_picture(self.image_bytes)


def picture_of(raw: dict[str, Any]) -> tuple[str, bytes]:
    """The extension and the bytes of the image of a raw sample. Raises BadSample if the sample has no image."""
    for extension in PICTURES:
        if extension in raw:
            return extension, raw[extension]
    raise BadSample.of(raw, "no picture")


def captions_of(raw: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The captions of a raw sample, and the content of its `json`. If the `json` has no captions, the lines of the
    `txt` are the captions. Raises BadSample if the sample has no caption or its captions cannot be read."""
    try:
        attributes = json.loads(raw["json"]) if "json" in raw else {}
        attributes = {"captions": attributes} if isinstance(attributes, list) else attributes
        texts = attributes.get("captions") or attributes.get("caption") or raw.get("txt", b"").decode().splitlines()
    except (ValueError, AttributeError) as error:
        raise BadSample.of(raw, "captions cannot be read") from error
    texts = [texts] if isinstance(texts, str) else texts
    captions = tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
    if not captions:
        raise BadSample.of(raw, "no caption")
    return captions, attributes


class Samples(Sequence[Sample]):
    """Random access to the samples of one split, in the order of its shards."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return int(self.shards.starts[-1])

    def __getitem__(self, number: int) -> Sample:  # type: ignore[override]  # slices are not supported
        return Sample(self.shards.read(*self.shards.locate(range(len(self))[number])))


@dataclass(frozen=True, eq=False)
class ShardSet:
    """An open set. `folder` is the path or URL of the set, and `manifest` is the parsed manifest.json."""

    folder: str
    manifest: dict[str, Any]
    options: StorageOptions
    run_tokenizer: Tokenizer | None = None
    """The tokenizer of a run on this set; None if the run uses the set's own tokenizer."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.manifest["splits"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of all shards and the tokenizer. Equal sets have equal fingerprints."""
        return self.manifest["fingerprint"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run if given, otherwise of the set. Raises DataError if the tokenizer cannot be read."""
        return self.run_tokenizer or Tokenizer.load(join(self.folder, "tokenizer.json"), self.options)

    def shards(self, split: str) -> Shards:
        """The shards of a split. Raises DataError if the set has no such split."""
        if split not in self.manifest["splits"]:
            raise DataError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}")
        shards = []
        for entry in self.manifest["splits"][split]["shards"]:
            url, index = self.urls(entry)
            tag = entry.get("tag", "")
            identity = Identity(entry.get("bytes", -1), entry.get("sha256") or tag or "", tag)
            shards.append(Shard(url, entry["samples"], index, identity, entry.get("part", 0)))
        return Shards(shards, self.options)

    def urls(self, entry: Mapping[str, Any]) -> tuple[str, str]:
        """The names of a shard and of its index, from the shard's entry in the manifest. If the entry names no index,
        the index has the name of the shard with the suffix .index."""
        url = join(self.folder, entry["name"])
        return url, join(self.folder, entry["index"]) if "index" in entry else with_suffix(url, ".index")

    def samples(self, split: str) -> Samples:
        """The samples of a split. Raises DataError if the set has no such split."""
        return Samples(self.shards(split))


def open_set(path: str | Path, options: StorageOptions = FROM_ENVIRONMENT) -> ShardSet:
    """Opens a set, given the path or URL of its folder or of its manifest.json. Raises DataError on failure."""
    if not str(path):
        raise DataError("no data set is named: set data.train to a folder that tools/shard.py wrote, or to shards")
    name = checked(str(path))
    file = name if base_name(name).endswith(".json") else join(name, "manifest.json")
    try:
        data = read_file(file, options)
    except (FileNotFoundError, NotADirectoryError, Gone) as error:
        reason = f" ({error.reason})" if isinstance(error, Gone) else ""
        raise DataError(f"{path}: there is no set ({file} is missing{reason}); see tools/shard.py") from error
    except OSError as error:
        raise DataError(f"cannot read the manifest {file}: {reason_of(error)}") from error
    return ShardSet(parent(file), parse_manifest(data, file), options)
