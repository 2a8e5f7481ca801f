"""Remote reads in a process of their own, so that the training process may fork loader workers later.

An object store's client runs threads. A process that has them and forks leaves its child with locks that nobody will
ever open: the child's first request hangs. So whoever will fork asks a child for the bytes, and only processes that
will not fork (loader workers, and that child) have clients.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.utils.processes import end_with, ignore_stop_signals, signals_blocked

_pid_with_clients = -1
_reader: _Reader | None = None
_lock = threading.Lock()


def may_have_clients() -> bool:
    """Whether this process may talk to object stores itself."""
    return os.getpid() == _pid_with_clients


def have_clients() -> None:
    """From now on this process has clients of its own; it must not fork processes that need some."""
    global _pid_with_clients
    _pid_with_clients = os.getpid()


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, in this process where it may have clients, else in the reader. Raises what it raises.

    The function is one of a module, and everything must pickle.
    """
    global _reader
    if may_have_clients():
        return function(*arguments)
    with _lock:
        if _reader is None or not _reader.mine():
            _reader = _Reader()
        return _reader.call(function, arguments)


class _Reader:
    """The child, and the pipe to it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        # Where somebody has used a client here before us (a notebook, say), a fork would take its locks along.
        fork = sys.platform == "linux" and "obstore" not in sys.modules
        context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        self._pipe, other = context.Pipe()
        with signals_blocked():
            self._process = context.Process(target=_serve, args=(other, os.getpid()), daemon=True, name="reader")
            self._process.start()
        other.close()
        atexit.register(self.close)

    def mine(self) -> bool:
        """Whether this process started it and it lives; a forked copy is of no use."""
        return self._pid == os.getpid() and self._process.is_alive()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        try:
            self._pipe.send((function, arguments))
            good, result = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise DataError("the process that reads remote data was killed (out of memory?)") from error
        if not good:
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
    have_clients()
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
