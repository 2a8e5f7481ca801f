"""Reads remote data in a separate process, so that the training process can fork loader workers later.

A client of an object store runs threads, which hold locks. If the process forks, the child gets copies of held locks
but no threads that would release these locks, so the child's first request hangs. Therefore a process that will fork
sends its reads to a child process, the *reader*. Only processes that never fork (loader workers and the reader) have
clients.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from dist_t2i.errors import DataError
from dist_t2i.utils.processes import end_with, ignore_stop_signals, signals_blocked

T = TypeVar("T")
_pid_with_clients = -1
_reader: _Reader | None = None
_lock = threading.Lock()


def clients_allowed() -> bool:
    """Whether this process may have clients of object stores."""
    return os.getpid() == _pid_with_clients


def allow_clients() -> None:
    """Allows this process to have clients of object stores. After this call the process must not fork processes
    that need clients."""
    global _pid_with_clients
    _pid_with_clients = os.getpid()


def with_clients(function: Callable[..., T], *arguments: Any) -> T:
    """Returns `function(*arguments)`. The reader computes the result unless this process may have clients.

    `function` must be defined at the top level of a module, and its arguments, result and errors must be picklable.
    Raises the errors of `function`, and DataError if the reader was killed.
    """
    global _reader
    if clients_allowed():
        return function(*arguments)
    with _lock:
        if _reader is None or not _reader.usable():
            _reader = _Reader()
        return _reader.call(function, arguments)


class _Reader:
    """The reader process and the pipe to it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        # If obstore is already loaded, as in a notebook, a fork could copy the locks of a client, so the reader is
        # spawned.
        fork = sys.platform == "linux" and "obstore" not in sys.modules
        context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        self._pipe, child_end = context.Pipe()
        with signals_blocked():
            self._process = context.Process(target=_serve, args=(child_end, os.getpid()), daemon=True, name="reader")
            self._process.start()
        child_end.close()
        atexit.register(self.close)

    def usable(self) -> bool:
        """Whether the reader runs and is this process's own: a forked child cannot use its parent's reader."""
        return self._pid == os.getpid() and self._process.is_alive()

    def call(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        try:
            self._pipe.send((function, arguments))
            succeeded, result = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise DataError("the process that reads remote data was killed (out of memory?)") from error
        if not succeeded:
            raise result
        return result

    def close(self) -> None:
        if self._pid == os.getpid():
            self._pipe.close()
            self._process.kill()
            self._process.join(5)


def _serve(pipe: Any, parent: int) -> None:
    end_with(parent)
    ignore_stop_signals()
    allow_clients()
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, error
        pipe.send(answer)
