"""The captioned pictures that a set will contain, and the reasons why other pictures are left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.sharding.captions import clean
from dist_t2i.sharding.pictures import Picture
from dist_t2i.utils.seeds import unit_hash

MIN_HOLDOUT_PICTURES = 50
"""If a set has at least this many pictures, its held-out split gets at least one picture."""


@dataclass(slots=True)
class Item:
    """A picture to write. `attributes` are written to the json file of the picture together with the captions."""

    key: str
    picture: Picture
    captions: list[str]
    split: str = "train"
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A line of bad_samples.jsonl: the file or line, the picture, and the reason. Pictures are counted by reason."""

    where: str
    picture: str
    reason: str


Gathered = tuple[list[Item], list[Problem], dict[str, Any]]
"""The usable items, the problems of other pictures, and the manifest's entries on the set (name, licence, credit)."""


def hold_out(items: Iterable[Item], share: float) -> None:
    """Moves a share of the items to the split `test`. A hash of the keys selects them; at least one item remains."""
    ranked = sorted(((unit_hash(f"holdout {item.key}"), item) for item in items), key=lambda pair: pair[0])
    count = sum(number < share for number, _ in ranked) or int(share > 0 and len(ranked) >= MIN_HOLDOUT_PICTURES)
    for _, item in ranked[: min(count, len(ranked) - 1)]:
        item.split = "test"


def add_captions(captions: list[str], texts: Iterable[str]) -> list[str]:
    """Cleans `texts` and appends those that are not in `captions` yet. Returns the problems of the texts."""
    results = [clean(text) for text in texts]
    captions += dict.fromkeys(text for text, _ in results if text and text not in captions)
    return [problem for _, problem in results if problem]


def captioned(item: Item, where: str, problems: list[Problem]) -> list[Item]:
    """Cleans the captions of an item and removes repeated captions. Returns [item], or [] if no caption is left."""
    texts, item.captions = item.captions, []
    problems += [Problem(where, item.key, reason) for reason in add_captions(item.captions, texts)]
    if item.captions:
        return [item]
    problems.append(Problem(where, item.key, "picture is left without a caption"))
    return []


def filter_captions(items: Sequence[Item], problems: list[Problem], must: str, must_not: str) -> list[Item]:
    """Keeps the captions that match the regular expression `must` and do not match `must_not`. Returns the items that
    still have a caption. Raises DataError if `must` or `must_not` is not a regular expression."""
    try:
        # "(?!)" matches no text, so an empty `must_not` excludes no caption.
        wanted, unwanted = (re.compile(text, re.IGNORECASE) for text in (must, must_not or "(?!)"))
    except re.error as error:
        raise DataError(f"not a regular expression: {must if error.pattern == must else must_not}: {error}") from error
    for item in items:
        item.captions = [text for text in item.captions if wanted.search(text) and not unwanted.search(text)]
    problems += [Problem("", item.key, "no caption passes the filter") for item in items if not item.captions]
    return [item for item in items if item.captions]
