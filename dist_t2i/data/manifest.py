"""The manifest of a set, manifest.json, and what lies beside it: what both ways to make a set write, and all readers check."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.errors import DataError

FORMAT = "dist_t2i set"
VERSION = 1


def parse_manifest(data: bytes, file: str) -> dict[str, Any]:
    """The manifest in the bytes of `file`. Raises DataError when they are none, or of another version."""
    try:
        manifest = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise DataError(f"cannot read the manifest {file}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{file} is not the manifest of a set that tools/shard.py wrote")
    if manifest.get("version") != VERSION:
        raise DataError(f"{file}: format version {manifest.get('version')} is not {VERSION}; write the set again")
    return manifest


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The content of manifest.json."""
    return json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n"


def problem_lines(problems: Iterable[Mapping[str, Any]]) -> bytes:
    """The content of bad_samples.jsonl: `where`, `picture` and `reason` of each."""
    lines = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
    return lines.encode("utf-8", "backslashreplace")


def tokenizer_entry(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a manifest says of the tokenizer.json beside it."""
    return {
        "file": "tokenizer.json",
        "sha256": hashlib.sha256(tokenizer.text.encode()).hexdigest(),
        "vocabulary": tokenizer.vocab_size,
        "known_words": len(tokenizer.known_words),
    }
