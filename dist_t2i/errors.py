"""Errors for people: what happened, where, and what to do about it.

A command line catches `UserError`, prints `error: <message>` to stderr and exits with `status`, without a traceback.
Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Something the user can mend. `status` is the exit status of the command (documented in `preempt`)."""

    status = 2
    told_by_main = False
    """Rank 0 meets the same error and tells it; this rank only ends."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message lists every problem, one a line.

    `problems` holds the same lines without their heading.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class DataError(UserError):
    """A set, shard or caption file that cannot be used, or too many samples that had to be replaced."""


class CheckpointError(UserError):
    """A checkpoint or run folder that cannot be written, read, or continued with this configuration."""


class LaunchError(UserError):
    """The environment of this process does not say which rank it is, or which others there are."""


class TrainingError(UserError):
    """Training cannot go on: a number that is not finite. Status 1: the command line was not at fault."""

    status = 1


def run_command(main: Callable[[], int | None]) -> int:
    """Exit status of `main()`, with a `UserError` shown as one `error: ...` on stderr."""
    try:
        return main() or 0
    except UserError as error:
        if not error.told_by_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.status
