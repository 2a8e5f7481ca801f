"""What `data.train` names, as one set: a set that was written, a list of tars, or several of either."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_t2i.config.sections import DataConfig
from dist_t2i.data.indexing import indexed_set
from dist_t2i.data.shard_set import ShardSet, open_set
from dist_t2i.errors import DataError
from dist_t2i.storage.clients import StorageOptions
from dist_t2i.storage.urls import checked, expand, is_local, join, local_path, with_suffix


def storage_options(data: DataConfig) -> StorageOptions:
    """How the bytes of `data.train` are reached."""
    return StorageOptions(
        endpoint=data.endpoint,
        region=data.region,
        anonymous=data.anonymous,
        retry_seconds=data.retry_seconds,
        stall_seconds=data.stall_seconds,
        cache=_cache_folder(data.cache),
        cache_bytes=int(data.cache_gb * 1e9),
    )


def _cache_folder(name: str) -> str:
    if name in ("", "none"):
        return ""
    if name != "auto":
        return str(local_path(name).absolute())
    base = os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()
    return str(Path(base) / f"dist_t2i-cache-{os.getuid()}")


def open_data(data: DataConfig) -> ShardSet:
    """The set that `data.train` names. A list of tars without an index is indexed first, which is kept. Raises DataError."""
    entries = [data.train] if isinstance(data.train, str) else list(data.train)
    options = storage_options(data)
    sets = [open_entry(entry, options) for entry in entries]
    return sets[0] if len(sets) == 1 else joined(sets)


def open_entry(entry: str, options: StorageOptions) -> ShardSet:
    """One entry of `data.train`."""
    if is_list(entry):
        return indexed_set(expand(entry), options)
    if is_local(entry) and entry:
        folder = local_path(entry)
        if folder.is_dir() and not (folder / "manifest.json").exists():
            tars = sorted(str(path) for path in folder.glob("*.tar"))
            if tars:
                return indexed_set(tars, options)
    return open_set(entry, options)


def is_list(entry: str) -> bool:
    """Whether an entry names tars rather than a set."""
    name = checked(entry).partition("?")[0]
    return name.endswith((".tar", "}")) or (is_local(name) and any(sign in name for sign in "*["))


def joined(sets: Sequence[ShardSet]) -> ShardSet:
    """Several sets as one: their splits laid end to end. The tokenizer is that of the first."""
    if not sets:
        raise DataError("data.train is an empty list")
    splits: dict[str, Any] = {}
    for part, one in enumerate(sets):
        for name, split in one.manifest["splits"].items():
            held = splits.setdefault(name, {**split, "samples": 0, "bytes": 0, "shards": []})
            held["samples"] += split["samples"]
            held["bytes"] += split["bytes"]
            held["shards"] += [_absolute(one, shard) | {"part": part} for shard in split["shards"]]
    together = hashlib.sha256("\n".join(one.fingerprint for one in sets).encode()).hexdigest()
    name = " and ".join(str(one.manifest.get("name", one.folder)) for one in sets)
    manifest = {**sets[0].manifest, "name": name, "fingerprint": together, "splits": splits}
    return ShardSet(sets[0].folder, manifest, sets[0].options)


def _absolute(one: ShardSet, shard: dict[str, Any]) -> dict[str, Any]:
    url = join(one.folder, shard["name"])
    index = join(one.folder, shard["index"]) if "index" in shard else with_suffix(url, ".index")
    return {**shard, "name": _rooted(url), "index": _rooted(index)}


def _rooted(url: str) -> str:
    return os.path.abspath(url) if is_local(url) else url
