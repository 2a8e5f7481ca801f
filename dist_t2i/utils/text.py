"""Texts in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The entry of `known` that is most like `name`, or "" when no entry is similar: what `did you mean` suggests."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), "")
