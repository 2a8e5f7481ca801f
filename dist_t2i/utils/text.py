"""Helpers for the texts of messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The entry of `known` that is most similar to `name`, for "did you mean"; "" without a similar entry."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), "")
