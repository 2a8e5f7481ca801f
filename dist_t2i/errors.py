"""Errors that a user can correct, and the exit statuses of the commands.

A command catches `UserError`, prints `error: <message>` to stderr and exits with its `status`, without a traceback. Any
other exception is a defect of this project and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit statuses of training and of the commands that run it."""

    FINISHED = 0  # `train.total_images` seen
    FAILED = 1  # a defect, or numbers that are not finite (`TrainingError`); the last good checkpoint is intact
    USER_ERROR = 2  # the user's configuration, data or environment (`UserError`)
    STOPPED = 75  # by a signal, checkpoint saved; the same command continues from it (EX_TEMPFAIL of sysexits.h)
    SUPERSEDED = 76  # another process has taken the run over (checkpoint/lease.py); nothing saved
    HUNG = 77  # a rank hung and the watchdog ended the run (distributed/watchdog.py); the last checkpoint is intact
    INTERRUPTED = 130  # Ctrl-C (in training: a second one) ended the command at once, as in a shell; nothing saved


class UserError(Exception):
    """An error that the user can correct."""

    status = ExitStatus.USER_ERROR
    reported_by_main = False
    """Whether rank 0 prints this error for all ranks, so that this rank exits silently."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message lists all problems below a heading. `problems` is the same
    list."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class DataError(UserError):
    """A set, shard or caption file that cannot be used, or more replaced samples than allowed."""


class CheckpointError(UserError):
    """A checkpoint or run folder that cannot be written, read, or resumed with this configuration."""


class LaunchError(UserError):
    """The environment does not say which rank this process is, or which other ranks there are."""


class TrainingError(UserError):
    """Training cannot continue because a number is not finite."""

    status = ExitStatus.FAILED


def run_command(main: Callable[[], int | None]) -> int:
    """The exit status of `main()`; prints a `UserError` as one `error: ...` on stderr."""
    try:
        return main() or ExitStatus.FINISHED
    except UserError as error:
        if not error.reported_by_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.status
