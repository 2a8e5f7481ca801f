"""Opens, as one set, the data that `data.train` names: a written set, tars, or a list of sets and tars."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_t2i.config.sections import DataConfig
from dist_t2i.data.indexing import indexed_set
from dist_t2i.data.shard_set import ShardSet, open_set
from dist_t2i.errors import DataError
from dist_t2i.storage.clients import StorageOptions
from dist_t2i.storage.urls import absolute, checked, expand, is_local, local_path


def storage_options(data: DataConfig) -> StorageOptions:
    """The options for reading remote data, as set by the keys of `data`."""
    shared = {name: getattr(data, name) for name in "endpoint region anonymous retry_seconds stall_seconds".split()}
    if data.cache == "auto":
        base = os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()
        cache = str(Path(base) / f"dist_t2i-cache-{os.getuid()}")
    else:
        cache = "" if data.cache in ("", "none") else str(local_path(data.cache).absolute())
    return StorageOptions(**shared, cache=cache, cache_bytes=int(data.cache_gb * 1e9))


def open_data(data: DataConfig) -> ShardSet:
    """Opens the set that `data.train` names. Tars that have no index yet are indexed, and the index is kept for later
    runs. Raises DataError if the data cannot be read or indexed."""
    entries = [data.train] if isinstance(data.train, str) else list(data.train)
    options = storage_options(data)
    sets = [open_entry(entry, options) for entry in entries]
    return sets[0] if len(sets) == 1 else joined(sets)


def index_tars(
    patterns: Sequence[str], home: Path | None, *, processes: int, checksums: bool, vocabulary: int
) -> ShardSet:
    """Indexes tars in place, as the first training run on these tars would. See `indexed_set` for the arguments."""
    options = storage_options(DataConfig())
    return indexed_set(expand(patterns), options, home, processes=processes, checksums=checksums, vocabulary=vocabulary)


def open_entry(entry: str, options: StorageOptions) -> ShardSet:
    """Opens the set that one entry of `data.train` names. Raises DataError if the set cannot be read or indexed."""
    if is_list(entry):
        return indexed_set(expand(entry), options)
    if is_local(entry) and entry:
        folder = local_path(entry)
        if not (folder / "manifest.json").exists() and (tars := sorted(map(str, folder.glob("*.tar")))):
            return indexed_set(tars, options)
    return open_set(entry, options)


def is_list(entry: str) -> bool:
    """Whether an entry names tars rather than a set. Raises DataError if the entry is a command."""
    name = checked(entry).partition("?")[0]
    return name.endswith((".tar", "}")) or (is_local(name) and any(sign in name for sign in "*["))


def joined(sets: Sequence[ShardSet]) -> ShardSet:
    """One set with the splits of all `sets` and the tokenizer of the first set. Of the caption statistics, the joined
    set keeps only `count` and `left_or_right`. Raises DataError if `sets` is empty."""
    if not sets:
        raise DataError("data.train is an empty list")
    splits: dict[str, Any] = {}
    for part, data in enumerate(sets):
        for name, split in data.manifest["splits"].items():
            total = splits.setdefault(name, {**split, "samples": 0, "bytes": 0, "shards": [], "captions": {}})
            total["samples"] += split["samples"]
            total["bytes"] += split["bytes"]
            for key in ("count", "left_or_right"):
                total["captions"][key] = total["captions"].get(key, 0) + split.get("captions", {}).get(key, 0)
            for shard in split["shards"]:
                url, index = map(absolute, data.urls(shard))
                total["shards"].append({**shard, "name": url, "index": index, "part": part})
    fingerprint = hashlib.sha256("\n".join(data.fingerprint for data in sets).encode()).hexdigest()
    name = " and ".join(str(data.manifest.get("name", data.folder)) for data in sets)
    return replace(sets[0], manifest=sets[0].manifest | {"name": name, "fingerprint": fingerprint, "splits": splits})
