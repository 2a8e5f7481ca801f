"""Remote reads in a process of their own, so that the training process can fork loader workers later.

The client of an object store runs threads. A process with such threads that forks gives its child locks that nobody will
ever release: the child's first request hangs. So a process that will fork sends its reads to a child, the *reader*; only
processes that never fork (loader workers and the reader) have clients.
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
    """Lets this process have clients. It must not fork processes that need clients afterwards."""
    global _pid_with_clients
    _pid_with_clients = os.getpid()


def with_clients(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`, computed in this process if it may have clients, else in the reader.

    The function must be one of a module; its arguments, result and errors must be picklable. Raises what it raises.
    """
    global _reader
    if clients_allowed():
        return function(*arguments)
    with _lock:
        if _reader is None or not _reader.usable():
            _reader = _Reader()
        return _reader.call(function, arguments)


class _Reader:
    """The reader, and the pipe to it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        # If other code has used a client in this process (a notebook, say), a fork would copy the client's locks.
        fork = sys.platform == "linux" and "obstore" not in sys.modules
        context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        self._pipe, child_end = context.Pipe()
        with signals_blocked():
            self._process = context.Process(target=_serve, args=(child_end, os.getpid()), daemon=True, name="reader")
            self._process.start()
        child_end.close()
        atexit.register(self.close)

    def usable(self) -> bool:
        """Whether the reader runs and this process has started it; a fork of the parent cannot use it."""
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
