"""Indexes existing WebDataset tars in place: writes indexes and a manifest without copying or changing the tars.

HOME/manifest.json, tokenizer.json      as in a set of tools/shard.py, except that the manifest lists URLs of tars
    /index/00000000.index               the index of the first tar of the list
    /index/00000000.json                the manifest's facts about this tar, which a repeated run reuses
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
from collections.abc import Sequence
from pathlib import Path

from dist_t2i.data.manifest import FORMAT, VERSION, caption_statistics, manifest_bytes, problem_lines, tokenizer_entry
from dist_t2i.data.shard_index import refuse_unsafe
from dist_t2i.data.shard_set import PICTURES, BadSample, ShardSet, captions_of, open_set
from dist_t2i.data.tar_reader import TarContents, read_tar
from dist_t2i.data.tokenizer import train_tokenizer
from dist_t2i.errors import DataError
from dist_t2i.storage.clients import StorageOptions
from dist_t2i.storage.reader_process import allow_clients
from dist_t2i.storage.remote_file import RemoteFile
from dist_t2i.storage.shard_file import LocalFile, reason_of
from dist_t2i.storage.urls import absolute, base_name, is_local
from dist_t2i.utils.files import read_json, write_atomic
from dist_t2i.utils.processes import ignore_stop_signals, usable_cores
from dist_t2i.utils.progress import Progress

VOCABULARY = 4096
_CAPTIONS = 2_000_000
"""The number of captions kept for the tokenizer and the statistics. Every tar contributes an equal share."""
_MAX_PROBLEMS = 1_000


def indexed_set(
    urls: Sequence[str],
    options: StorageOptions,
    home: Path | None = None,
    *,
    processes: int = 0,
    checksums: bool = True,
    vocabulary: int = VOCABULARY,
) -> ShardSet:
    """The set that consists of the tars `urls`, in this order. Tars without an index are read from end to end, with a
    progress display.

    Args:
        home: the folder for the indexes and the manifest; by default a folder in the user's cache folder.
        processes: how many processes index tars; 0 for one process per usable core.
        checksums: whether to record the checksums of images, which requires reading all bytes of the tars.
        vocabulary: the maximal number of tokens of the tokenizer.

    Raises: DataError if a tar is unreadable, a tar has members that could run code, no tar has a usable sample, or
    `home` cannot be written.
    """
    urls = [absolute(url) for url in urls]
    if home is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        home = base / "dist_t2i" / "sets" / hashlib.sha256("\n".join(urls).encode()).hexdigest()[:16]
    try:
        (home / "index").mkdir(parents=True, exist_ok=True)
        with open(home / "lock", "a+b") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # another process is indexing: wait for this process and use its indexes
                print(f"waiting for another process that indexes into {home}", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            missing = [number for number, url in enumerate(urls) if not _is_indexed(home, number, url)]
            if missing or not (home / "manifest.json").exists():
                _index_all(home, urls, missing, options, processes, checksums)
                _write_manifest(home, urls, vocabulary)
    except OSError as error:
        raise DataError(f"cannot write the index of {urls[0]} to {home}: {reason_of(error)}") from error
    return open_set(home, options)


def _files(home: Path, number: int) -> tuple[Path, Path]:
    return home / "index" / f"{number:08d}.index", home / "index" / f"{number:08d}.json"


def _state_of(url: str) -> list[int]:
    """The size and the time of modification of a local tar, which change when the tar is rewritten. Returns [] for a
    remote tar, because its ETag reveals changes."""
    if not is_local(url) or not os.path.exists(url):
        return []
    about = os.stat(url)
    return [about.st_size, about.st_mtime_ns]


def _is_indexed(home: Path, number: int, url: str) -> bool:
    index, result = _files(home, number)
    known = read_json(result)
    return index.exists() and known.get("url") == url and known.get("state") == _state_of(url)


def _index_all(
    home: Path, urls: Sequence[str], missing: Sequence[int], options: StorageOptions, processes: int, checksums: bool
) -> None:
    progress = Progress(len(missing), "shards indexed")
    limit = max(1, _CAPTIONS // len(urls))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = max(1, min(processes or usable_cores(), len(missing)))
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start_process)
    try:
        futures = [pool.submit(_index_one, home, number, urls[number], options, checksums, limit) for number in missing]
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            future.result()
            progress.show(done, last=done == len(missing))
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    ignore_stop_signals()
    allow_clients()


def _index_one(home: Path, number: int, url: str, options: StorageOptions, checksums: bool, limit: int) -> None:
    """Indexes one tar and keeps at most about `limit` of its captions. Raises DataError if the tar is unreadable or
    unsafe, and OSError if the index cannot be written."""
    index_file, result_file = _files(home, number)
    state = _state_of(url)
    try:
        file = LocalFile(url) if is_local(url) else RemoteFile(url, options)
        contents = read_tar(file, checksums=checksums, texts=True)
    except (OSError, ValueError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        raise DataError(f"{url}: cannot be indexed: {reason}") from error
    refuse_unsafe({member.extension for sample in contents.samples for member in sample.members}, url)
    captions = _keep_usable(contents, url, limit)
    index = contents.index().to_bytes()
    result = {
        "url": url,
        "state": state,
        "samples": len(contents.samples),
        "bytes": file.size if isinstance(file, RemoteFile) else os.path.getsize(url),
        "tag": file.tag if isinstance(file, RemoteFile) else "",
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "problems": contents.problems[:_MAX_PROBLEMS],
        "problem_count": len(contents.problems),
        "captions": captions,
    }
    write_atomic(index_file, index)
    write_atomic(result_file, json.dumps(result))


def _keep_usable(contents: TarContents, url: str, limit: int) -> list[tuple[str, ...]]:
    """Removes samples without an image or a caption. Returns the captions of about `limit` of the kept samples,
    selected at equal distances."""
    kept, captions = [], []
    for sample in contents.samples:
        try:
            if {member.extension for member in sample.members}.isdisjoint(PICTURES):
                raise BadSample(url, sample.key, "no picture")
            captions.append(captions_of({"__key__": sample.key, "__url__": url, **sample.texts})[0])
            kept.append(sample)
        except BadSample as error:
            contents.problems.append((sample.key, error.reason))
    contents.samples = kept
    return captions[:: max(1, len(captions) // limit)]


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
        reasons = "".join(f"\n  {count} x {reason}" for reason, count in counts.most_common(10))
        raise DataError(f"{urls[0]} and the rest of the list hold no picture with a caption{reasons}")
    tokenizer = train_tokenizer(Counter(text for own in captions for text in own), vocabulary)
    write_atomic(home / "tokenizer.json", tokenizer.text)
    write_atomic(home / "bad_samples.jsonl", problem_lines(problems))
    train = {name: sum(shard[name] for shard in shards) for name in ("samples", "bytes")}
    train |= {"captions": caption_statistics(captions, tokenizer), "shards": shards}
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
    write_atomic(home / "manifest.json", manifest_bytes(manifest))
