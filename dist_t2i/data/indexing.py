"""A set made of tars that others wrote: an index and a manifest beside nothing, the tars stay where and as they are.

HOME/manifest.json, tokenizer.json      as of a set that was written; shards are named by their URLs
    /index/00000000.index               of the first shard of the list
    /index/00000000.json                what was found in it; a rerun goes on from these
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_t2i.data.manifest import FORMAT, VERSION, caption_statistics, manifest_bytes, problem_lines, tokenizer_entry
from dist_t2i.data.shard_index import refuse_unsafe
from dist_t2i.data.shard_set import PICTURES, BadSample, ShardSet, captions_of, open_set
from dist_t2i.data.tar_reader import read_tar
from dist_t2i.data.tokenizer import train_tokenizer
from dist_t2i.errors import DataError
from dist_t2i.storage.clients import StorageOptions
from dist_t2i.storage.folders import LocalFolder
from dist_t2i.storage.reader_process import allow_clients
from dist_t2i.storage.remote_file import RemoteFile
from dist_t2i.storage.shard_file import LocalFile, reason_of
from dist_t2i.storage.urls import base_name, is_local, local_path
from dist_t2i.utils.processes import ignore_stop_signals, usable_cores
from dist_t2i.utils.progress import Progress

VOCABULARY = 4096
_CAPTIONS = 2_000_000
"""Captions that are kept for the tokenizer and the statistics, evenly from all shards."""
_MAX_PROBLEMS = 1_000


def home_of(urls: Sequence[str]) -> Path:
    """Where the index of a list of tars is kept if nothing else is said: in the user's folder for cached data."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "dist_t2i" / "sets" / hashlib.sha256("\n".join(urls).encode()).hexdigest()[:16]


def indexed_set(
    urls: Sequence[str],
    options: StorageOptions,
    home: Path | None = None,
    *,
    processes: int = 0,
    checksums: bool = True,
    vocabulary: int = VOCABULARY,
) -> ShardSet:
    """The set of these tars, in this order. What is not indexed yet is read from end to end, once, with progress.

    Args:
        home: where indexes and manifest go; see `home_of`.
        processes: 0 for one a core.
        checksums: whether the bytes of pictures are read for their checksums; without, they are passed over.

    Raises: DataError when nothing usable is found, members could run code, or `home` cannot be written.
    """
    urls = [_absolute(url) for url in urls]
    home = home or home_of(urls)
    try:
        (home / "index").mkdir(parents=True, exist_ok=True)
        with _alone(home):
            missing = [number for number, url in enumerate(urls) if not _finished(home, number, url)]
            if missing or not (home / "manifest.json").exists():
                _index_all(home, urls, missing, options, processes, checksums)
                _write_manifest(home, urls, vocabulary)
    except OSError as error:
        raise DataError(f"cannot write the index of {urls[0]} to {home}: {reason_of(error)}") from error
    return open_set(home, options)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One process indexes; others wait and find it done."""
    with open(home / "lock", "a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting for another process that indexes into {home}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _absolute(url: str) -> str:
    return os.path.abspath(local_path(url)) if is_local(url) else url


def _files(home: Path, number: int) -> tuple[Path, Path]:
    return home / "index" / f"{number:08d}.index", home / "index" / f"{number:08d}.json"


def _state_of(url: str) -> list[int]:
    """What changes when a local tar is written anew; nothing for a remote one, whose tag the store checks."""
    if not is_local(url):
        return []
    about = os.stat(url)
    return [about.st_size, about.st_mtime_ns]


def _finished(home: Path, number: int, url: str) -> bool:
    index, result = _files(home, number)
    try:
        known = json.loads(result.read_bytes())
        return index.exists() and known["url"] == url and known["state"] == _state_of(url)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _index_all(
    home: Path, urls: Sequence[str], missing: Sequence[int], options: StorageOptions, processes: int, checksums: bool
) -> None:
    progress = Progress(len(missing), "shards indexed")
    share = max(1, _CAPTIONS // len(urls))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = max(1, min(processes or usable_cores(), len(missing) or 1))
    with concurrent.futures.ProcessPoolExecutor(processes, context, _start_process) as pool:
        waiting = {
            pool.submit(_index_one, home, number, urls[number], options, checksums, share): urls[number]
            for number in missing
        }
        try:
            for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
                future.result()
                progress.show(done, last=done == len(missing))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_process() -> None:
    ignore_stop_signals()
    allow_clients()


def _index_one(home: Path, number: int, url: str, options: StorageOptions, checksums: bool, share: int) -> None:
    """Index one tar. A tar that cannot be read is a problem of its own: it has no samples. Raises DataError, OSError."""
    index_file, result_file = _files(home, number)
    state = _state_of(url) if not is_local(url) or os.path.exists(url) else []
    try:
        file: Any = LocalFile(url) if is_local(url) else RemoteFile(url, options)
        found = read_tar(file, checksums=checksums, texts=True)
    except (OSError, ValueError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        raise DataError(f"{url}: cannot be indexed: {reason}") from error
    refuse_unsafe(sorted({member.extension for members in found.members for member in members}), url)
    problems = list(found.problems)
    captions = _keep_usable(found, url, problems, share)
    index = found.index(url)
    remote = isinstance(file, RemoteFile)
    result = {
        "url": url,
        "state": state,
        "samples": len(index),
        "bytes": file.size if remote else os.path.getsize(url),
        "tag": file.tag if remote else "",
        "index_sha256": hashlib.sha256(index.to_bytes()).hexdigest(),
        "problems": problems[:_MAX_PROBLEMS],
        "problem_count": len(problems),
        "captions": captions,
    }
    place = LocalFolder(str(home / "index"))
    place.write(index_file.name, index.to_bytes())
    place.write(result_file.name, json.dumps(result).encode())


def _keep_usable(found: Any, url: str, problems: list[tuple[str, str]], share: int) -> list[list[str]]:
    """Drop samples without picture or caption, and return some captions of those that stay."""
    kept, captions = [], []
    for place, (key, members, texts) in enumerate(zip(found.keys, found.members, found.texts, strict=True)):
        extensions = {member.extension for member in members}
        if not extensions & set(PICTURES):
            problems.append((key, "no picture"))
            continue
        try:
            captions.append(list(captions_of({"__key__": key, "__url__": url, **texts})[0]))
        except BadSample as error:
            problems.append((key, error.reason))
            continue
        kept.append(place)
    found.keys = [found.keys[place] for place in kept]
    found.members = [found.members[place] for place in kept]
    every = max(1, len(captions) // max(1, share))
    return captions[::every]


def _write_manifest(home: Path, urls: Sequence[str], vocabulary: int) -> None:
    shards, captions, problems, counts = [], [], [], Counter[str]()
    digest = hashlib.sha256()
    for number, url in enumerate(urls):
        result = json.loads(_files(home, number)[1].read_bytes())
        counts.update(reason for _, reason in result["problems"])
        problems += [{"where": base_name(url), "picture": key, "reason": reason} for key, reason in result["problems"]]
        digest.update(f"{result['samples']} {result['index_sha256']}\n".encode())
        captions += result["captions"]
        if result["samples"]:
            entry = {"name": url, "index": f"index/{number:08d}.index"}
            shards.append(entry | {name: result[name] for name in ("samples", "bytes", "tag", "index_sha256")})
    if not shards:
        listed = "".join(f"\n  {count} x {reason}" for reason, count in counts.most_common(10))
        raise DataError(f"{urls[0]} and the rest of the list hold no picture with a caption{listed}")
    tokenizer = train_tokenizer(Counter(text for one in captions for text in one), vocabulary)
    place = LocalFolder(str(home))
    place.write("tokenizer.json", tokenizer.text.encode())
    place.write("bad_samples.jsonl", problem_lines(problems))
    train = {
        "samples": sum(shard["samples"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "captions": caption_statistics(captions, tokenizer),
        "shards": shards,
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": digest.hexdigest(),
        "name": base_name(urls[0]) + (f" and {len(urls) - 1} more" if len(urls) > 1 else ""),
        "image_size": None,
        "splits": {"train": train},
        "tokenizer": tokenizer_entry(tokenizer),
        "bad_samples": dict(sorted(counts.items())),
    }
    place.write("manifest.json", manifest_bytes(manifest))
