"""Metadata of a configuration's fields: the range of values, and whether a key may change when a run is resumed.

noise: int = setting(64, at_least(1))
report: ReportConfig = section(ReportConfig, Resume.FREE)
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """A range of numbers. `str` returns the words after "must be" in a message."""

    low: float = 0.0
    high: float = math.inf
    above: bool = False
    """Whether `low` itself is excluded."""
    below: bool = False
    """Whether `high` itself is excluded."""

    def __contains__(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


def at_least(low: float) -> Bounds:
    return Bounds(low)


NOT_NEGATIVE, POSITIVE, SHARE = Bounds(), Bounds(above=True), Bounds(0, 1)


class Resume(enum.Enum):
    """Whether a key may change when a run is resumed."""

    FREE = "free"
    """The key may change: the result stays the same within float round-off."""
    CHECKED = "checked"
    """The key may change only with --allow-changes, because the result changes."""
    FIXED = "fixed"
    """The key may never change, because the checkpoint would have other tensors or shapes."""


def setting(
    default: T,
    bounds: Bounds = NOT_NEGATIVE,
    resume: Resume | None = None,
    *,
    absent: T | None = None,
    earlier: T | None = None,
) -> T:
    """A field of a configuration, whose numbers must lie in `bounds`. If `resume` is None, the section's `resume`
    applies.

    `absent` is the value in files that an earlier version recorded without this key. A section that has a key with an
    active default that was added later needs `absent` for all keys that were added to it, so that old runs resume as
    they began (config/files.py). `earlier` is the default of earlier versions: a run that was started with it resumes
    with it, unless another value than the present default is given (config/resume.py).
    """
    metadata = {"bounds": bounds, "resume": resume, "absent": absent, "earlier": earlier}
    return dataclasses.field(default=default, metadata=metadata)


def section(factory: Callable[[], T], resume: Resume | None = None) -> T:
    """A field that holds a section of the configuration. `resume` applies to all keys of the section without a `resume`
    of their own."""
    return dataclasses.field(default_factory=factory, metadata={"resume": resume})
