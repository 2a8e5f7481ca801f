"""Reads existing WebDataset tars, local or at URLs, that webdataset, img2dataset or this tool wrote.

A first pass locates the pictures and reads the captions: it seeks from member to member in a local tar, and reads a
remote tar from start to end. Each picture is read later, when the picture's new shard is written. Nothing in a tar is
executed: members whose usual decoders run code are skipped and listed as problems.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, cast

from dist_t2i.data.shard_index import UNSAFE, key_and_extension
from dist_t2i.data.shard_set import PICTURES
from dist_t2i.errors import DataError
from dist_t2i.sharding.captions import decode_text, text_list
from dist_t2i.sharding.items import Gathered, Item, Problem, captioned, hold_out
from dist_t2i.sharding.pictures import TarMember
from dist_t2i.sharding.writing.processes import in_processes
from dist_t2i.storage.folders import open_folder
from dist_t2i.storage.urls import expand, is_local, unchained

_SPLIT = re.compile(r"(train|val|test[A-Za-z0-9_-]*?)-\d+\.tar")
_MAX_TEXT = 2**24
"""The maximal size of a caption file in bytes. Larger JSON or text members are not read."""


@dataclass
class TarContents:
    """The pictures of a tar by key, and the texts of the tar by key and extension."""

    name: str
    pictures: dict[str, TarMember] = field(default_factory=dict)
    texts: dict[str, dict[str, bytes]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def tar_urls(patterns: Sequence[str]) -> list[str]:
    """The paths and URLs of the tars that `patterns` name. A pattern may contain braces (`{000000..000591}`), be a glob
    of local files, or name a folder of tars. Raises DataError if a pattern names no tar."""
    urls: list[str] = []
    for name in [name for pattern in patterns for name in expand(unchained(pattern))]:
        if not is_local(name):
            urls.append(name)
            continue
        tars = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar"))) if os.path.isdir(name) else [name]
        if not tars or not os.path.exists(name):
            raise DataError(f"{name}: neither a tar nor a folder with tars has this name")
        urls += tars
    return list(dict.fromkeys(urls))


def scan(url: str) -> TarContents:
    """Finds the pictures in a tar and reads the captions. A truncated tar yields the samples before the cut. Raises
    DataError if the tar cannot be read."""
    folder, _, name = url.rpartition("/")
    contents = TarContents(name)
    try:
        if is_local(url):
            status = os.stat(url)
            with open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                _scan_members(tar, contents, url, f"{status.st_size} {status.st_mtime_ns}", status.st_size)
        else:
            stream = cast(IO[bytes], _Stream(open_folder(folder).chunks(name)))
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                _scan_members(tar, contents, url, "", None)
    except tarfile.TarError as error:
        contents.problems.append(Problem(name, "", f"tar is truncated or damaged: {error}"))
    except OSError as error:
        raise DataError(f"cannot read {url}: {error.strerror or error}") from error
    return contents


class _Stream:
    """A file of `chunks` of bytes that `tarfile` reads from start to end. A read returns at most `size` bytes."""

    def __init__(self, chunks: Iterator[bytes], size: int = tarfile.RECORDSIZE) -> None:
        self._pieces = (chunk[start : start + size] for chunk in chunks for start in range(0, len(chunk), size))

    def read(self, size: int) -> bytes:
        return next(self._pieces, b"")


def _scan_members(tar: tarfile.TarFile, into: TarContents, url: str, version: str, end: int | None) -> None:
    """Adds the members of a tar to `into`. `end` is the size of a local tar in bytes, and None for a remote tar."""
    unsafe = 0
    for info in tar:
        named = key_and_extension(info.name)
        if not info.isfile() or named is None:
            continue
        key, extension = named
        if extension.rpartition(".")[2] in UNSAFE:
            unsafe += 1
        elif end is not None and info.offset_data + info.size > end:
            into.problems.append(Problem(into.name, key, "tar is cut short"))
        elif extension in PICTURES:
            into.pictures.setdefault(key, TarMember(url, info.offset_data, info.size, version, end is None))
        elif extension in ("json", "txt", "caption", "captions", "text") and info.size <= _MAX_TEXT:
            file = tar.extractfile(info)
            into.texts.setdefault(key, {})[extension] = file.read() if file else b""
    if unsafe:
        into.problems.append(Problem(into.name, "", f"{unsafe} pickles were not read, because they can run code"))


def webdataset_items(patterns: Sequence[str], name: str, holdout: float, processes: int) -> Gathered:
    """The captioned pictures in tars, sorted by key. If `name` is "", the set is named after its first tar.

    The name of a tar, such as `test-00000.tar`, determines the split of its pictures; pictures in tars with other names
    are in `train`. If all pictures are in `train`, the share `holdout` of the pictures moves to `test`.
    """
    urls = tar_urls(patterns)
    items: dict[str, Item] = {}
    problems: list[Problem] = []
    for tar in in_processes(scan, [(url,) for url in urls], processes):
        problems.extend(tar.problems)
        split = _SPLIT.fullmatch(tar.name)
        for key, picture in tar.pictures.items():
            texts, attributes, problem = _captions(tar.texts.get(key, {}))
            if problem:
                problems.append(Problem(tar.name, key, problem))
                continue
            found = Item(key, picture, texts, split[1] if split else "train", attributes)
            for item in captioned(found, tar.name, problems):
                while item.key in items:
                    item.key += f"_{hashlib.sha256(f'{tar.name} {key}'.encode()).hexdigest()[:8]}"
                items[item.key] = item
        for key in sorted(tar.texts.keys() - tar.pictures.keys()):
            problems.append(Problem(tar.name, key, "captions without a picture"))
    ordered = [items[key] for key in sorted(items)]
    if all(item.split == "train" for item in ordered):
        hold_out(ordered, holdout)
    return ordered, problems, {"name": name or urls[0].rpartition("/")[2]}


def _captions(members: dict[str, bytes]) -> tuple[list[str], dict[str, Any], str]:
    """The captions of a sample, its other attributes, and "" or the reason why the sample has no captions."""
    attributes: dict[str, Any] = {}
    value: Any = None
    if "json" in members:
        try:
            attributes = json.loads(members["json"])
        except (ValueError, RecursionError):
            return [], {}, "json cannot be read"
        if not isinstance(attributes, dict):
            return [], {}, "json contains no captions"
        single = attributes.pop("caption", None)
        value = attributes.pop("captions", None) or single
    if not value:
        text = next((members[kind] for kind in ("txt", "text", "captions", "caption") if kind in members), b"")
        value = decode_text(text).splitlines()
    if not value:
        return [], {}, "no caption"
    captions = text_list(value)
    if captions is None:
        return [], {}, "captions are no text"
    return [caption for caption in captions if caption.strip()] or [""], attributes, ""
