"""Errors that a user can correct, and the exit statuses of the commands.

A command catches `UserError`, prints `error: <message>` to stderr and exits with the error's `status`, without a
traceback. Any other exception is a defect of this project and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit statuses of training and of the commands that run it."""

    FINISHED = 0  # the run has seen `train.total_images` pictures
    FAILED = 1  # a defect, or numbers that are not finite (`TrainingError`); the last good checkpoint is intact
    USER_ERROR = 2  # the user must correct the configuration, the data or the environment (`UserError`)
    STOPPED = 75  # a signal stopped the run, which saved a checkpoint; the same command resumes (EX_TEMPFAIL)
    SUPERSEDED = 76  # another process has taken over the run (checkpoint/lease.py); nothing is saved
    HUNG = 77  # a rank hung and the watchdog ended the run (distributed/watchdog.py); the last checkpoint is intact
    DIVERGED = 78  # losses, gradients or pictures left the healthy range (training/health.py); a person has to decide
    INTERRUPTED = 130  # Ctrl-C (in training: the second Ctrl-C) ended the command at once; nothing is saved


class UserError(Exception):
    """An error that the user can correct."""

    status = ExitStatus.USER_ERROR
    reported_by_main = False
    """Whether rank 0 prints this error for all ranks, so that this rank exits silently."""


class ConfigError(UserError):
    """A configuration cannot be used. The message is a heading and the list `problems`."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class DataError(UserError):
    """A set, shard or caption file cannot be used, or more samples were replaced than the configuration allows."""


class CheckpointError(UserError):
    """A checkpoint or run folder cannot be written, read, or resumed with this configuration."""


class LaunchError(UserError):
    """The environment does not define the rank of this process or the set of ranks."""


class TrainingError(UserError):
    """Training cannot continue because a number is not finite."""

    status = ExitStatus.FAILED


class DivergedError(TrainingError):
    """Training has diverged; the same command would diverge again."""

    status = ExitStatus.DIVERGED


def run_command(main: Callable[[], int | None]) -> int:
    """Returns the exit status of `main()`. Prints a `UserError` as `error: ...` on stderr."""
    try:
        return main() or ExitStatus.FINISHED
    except UserError as error:
        if not error.reported_by_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.status
