"""The content of manifest.json and of other files of a set, which tools/shard.py and indexing.py write."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dist_t2i.data.tokenizer import Tokenizer, words
from dist_t2i.errors import DataError

FORMAT = "dist_t2i set"
VERSION = 1
SIDES = frozenset("left right leftmost rightmost leftward rightward leftwards rightwards lefthand righthand".split())
"""Words that can be wrong for a mirrored picture."""


def parse_manifest(data: bytes, file: str) -> dict[str, Any]:
    """Parses `data`, the bytes of the manifest `file`. Raises DataError if `data` is not a manifest of this version."""
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
    """The content of the bad_samples.jsonl of a set: one line per problem, with its `where`, `picture` and `reason`."""
    lines = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
    return lines.encode("utf-8", "backslashreplace")


def tokenizer_entry(tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest's entry about tokenizer.json."""
    return {
        "file": "tokenizer.json",
        "sha256": hashlib.sha256(tokenizer.text.encode()).hexdigest(),
        "vocabulary": tokenizer.vocab_size,
        "known_words": len(tokenizer.known_words),
    }


def caption_statistics(captions: Sequence[Sequence[str]], tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest's statistics of the captions of one split; `captions[i]` are the captions of image i.

    `left_or_right` counts the captions that contain a word of `SIDES`.
    """
    texts = Counter(text for own in captions for text in own)
    frequencies, tokens, lengths = Counter[str](), list[int](), list[int]()
    left_or_right = 0
    for text, times in texts.items():  # splits each distinct text once
        found = words(text)
        for word in found:
            frequencies[word] += times
        tokens += [len(tokenizer.ids(text))] * times
        lengths += [len(found)] * times
        left_or_right += times * (not SIDES.isdisjoint(found))
    count, tokens = len(lengths), sorted(tokens) or [0]
    return {
        "count": count,
        "distinct": len(texts),
        "per_picture": {
            "mean": round(count / max(1, len(captions)), 3),
            "max": max(map(len, captions), default=0),
        },
        "words": {"mean": round(sum(lengths) / max(1, count), 2), "max": max(lengths, default=0)},
        "tokens": {
            "mean": round(sum(tokens) / len(tokens), 2),
            "p99": tokens[int(len(tokens) * 0.99)],
            "max": tokens[-1],
        },
        "distinct_words": len(frequencies),
        "words_not_in_train": sum(word not in tokenizer.known_words for word in frequencies),
        "left_or_right": left_or_right,
        "frequent_words": [word for word, _ in sorted(frequencies.items(), key=lambda pair: (-pair[1], pair[0]))[:20]],
    }
