"""Captioned pictures on their way into a set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dist_t2i.sharding.captions import clean
from dist_t2i.sharding.pictures import Origin


@dataclass(slots=True)
class Item:
    """A picture to be written; `attributes` go into its json beside the captions."""

    key: str
    picture: Origin
    captions: list[str]
    split: str = "train"
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A line of the writer's bad_samples.jsonl: where (file or line), which picture, and a reason many may share."""

    where: str
    picture: str
    reason: str


def _hash(key: str) -> float:
    return int.from_bytes(hashlib.sha256(f"holdout {key}".encode()).digest()[:8], "big") / 2**64


MIN_HOLDOUT_PICTURES = 50
"""From this many pictures on, the held-out split has at least one."""


def hold_out(items: Iterable[Item], share: float) -> None:
    """Give a share of the items, by a hash of their keys, to the split `test`; never all of them."""
    ranked = sorted(((_hash(item.key), item) for item in items), key=lambda pair: pair[0])
    chosen = [item for number, item in ranked if number < share]
    if not chosen and share > 0 and len(ranked) >= MIN_HOLDOUT_PICTURES:
        chosen = [ranked[0][1]]
    for item in chosen if len(chosen) < len(ranked) else chosen[:-1]:
        item.split = "test"


def _add_captions(held: list[str], texts: Iterable[str]) -> list[str]:
    """Add the captions, cleaned, to those that a picture has, each once; returns what was wrong with them."""
    problems = []
    for text in texts:
        cleaned, problem = clean(text)
        if problem:
            problems.append(problem)
        if cleaned and cleaned not in held:
            held.append(cleaned)
    return problems


def captioned(
    key: str, picture: Origin, texts: Iterable[str], where: str, problems: list[Problem], **attributes: Any
) -> Item | None:
    """An item with its captions cleaned, each once; None, and a problem listed, when no caption is left."""
    held: list[str] = []
    problems.extend(Problem(where, key, reason) for reason in _add_captions(held, texts))
    if not held:
        problems.append(Problem(where, key, "picture is left without a caption"))
        return None
    return Item(key, picture, held, attributes=attributes)
