"""Writes files atomically, computes hashes of files, and reads JSON files that may be missing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dist_t2i.utils.processes import is_alive


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path. At the end of the `with` block, the temporary file replaces `path`. If the block raises
    an error, the temporary file is deleted."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file (text as UTF-8). Readers see either the old or the complete new content. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_abandoned(folder: Path) -> None:
    """Deletes the temporary files that killed processes left in a folder and its subfolders. Files younger than a
    minute are kept, because a process on another machine may still write to such a file."""
    for part in (*folder.glob(".*.part"), *folder.glob("*/.*.part")):
        pid = part.name.split(".")[-2]
        with contextlib.suppress(OSError):
            if pid.isdigit() and time.time() - part.stat().st_mtime > 60 and not is_alive(int(pid)):
                part.unlink()


def write_synced(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a file, and waits until the content would survive a power cut. Raises OSError if writing fails."""
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def fsync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, would survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty dict if the file is missing, unreadable, or contains no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """The bytes of an open file from its current position on, in pieces of at most 1 MiB."""
    while chunk := file.read(2**20):
        yield chunk


def sha256_of(pieces: Iterable[bytes]) -> str:
    """SHA-256 of the concatenated pieces as 64 hex digits."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits. Raises OSError if the file cannot be read."""
    with open(path, "rb") as file:
        return sha256_of(chunks(file))
