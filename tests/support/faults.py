"""Faults of a server's response; fault_proxy.py applies them to the responses that a test selects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Wait = Callable[[float], Any]
"""Sleeps for a number of seconds."""


class HangUp(Exception):
    """Raised by a fault to end the connection, with a RST or, cleanly, with a FIN."""

    def __init__(self, reset: bool) -> None:
        super().__init__("reset" if reset else "close")
        self.reset = reset


class Fault:
    """A change of one response. The base class changes nothing."""

    status: int | None = None
    """Respond with this status instead of forwarding the request."""
    longer: int = 0
    """Bytes by which Content-Length exceeds the body."""

    def before(self, wait: Wait) -> None:
        """Called before the request is forwarded."""

    def body(self, pieces: Iterator[bytes], start: int, wait: Wait) -> Iterator[bytes]:
        """The bytes to send for `pieces`, which begin at byte `start` of the object. `wait` sleeps. Raises HangUp."""
        return pieces


class Status(Fault):
    """An error of S3: 403, 404, 500, 503, or any other status."""

    def __init__(self, status: int) -> None:
        self.status = status


class Reset(Fault):
    """A RST after `after` bytes of the body."""

    reset = True

    def __init__(self, after: int = 0) -> None:
        self.after = after

    def body(self, pieces: Iterator[bytes], start: int, wait: Wait) -> Iterator[bytes]:
        first, _ = split(pieces, self.after)
        yield from first
        raise HangUp(self.reset)


class Close(Reset):
    """A clean end of the connection after `after` bytes of the body."""

    reset = False


class Stall(Fault):
    """No bytes for `seconds`, after `after` bytes of the body (None: before the answer begins); then the rest."""

    def __init__(self, seconds: float, after: int | None = None) -> None:
        self.seconds, self.after = seconds, after

    def before(self, wait: Wait) -> None:
        if self.after is None:
            wait(self.seconds)

    def body(self, pieces: Iterator[bytes], start: int, wait: Wait) -> Iterator[bytes]:
        if self.after is None:
            yield from pieces
            return
        first, rest = split(pieces, self.after)
        yield from first
        wait(self.seconds)
        yield from rest()


class Trickle(Fault):
    """`rate` bytes a second."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def body(self, pieces: Iterator[bytes], start: int, wait: Wait) -> Iterator[bytes]:
        size = max(1, int(self.rate / 20))
        for piece in pieces:
            for at in range(0, len(piece), size):
                wait(size / self.rate)
                yield piece[at : at + size]


class WrongLength(Fault):
    """Content-Length exceeds the body by `longer` bytes (negative: falls short); then the connection ends cleanly."""

    def __init__(self, longer: int) -> None:
        self.longer = longer

    def body(self, pieces: Iterator[bytes], start: int, wait: Wait) -> Iterator[bytes]:
        yield from pieces
        raise HangUp(reset=False)


class Cut(Fault):
    """Drops the last `less` bytes and adapts Content-Length: only the object's size shows it."""

    def __init__(self, less: int) -> None:
        self.less = less
        self.longer = -less

    def body(self, pieces: Iterator[bytes], start: int, wait: Wait) -> Iterator[bytes]:
        whole = b"".join(pieces)
        yield whole[: len(whole) - self.less]


class FlippedBit(Fault):
    """One bit of byte `offset` of the object, in every range that holds it."""

    def __init__(self, offset: int, bit: int = 0) -> None:
        self.offset, self.mask = offset, 1 << bit

    def body(self, pieces: Iterator[bytes], start: int, wait: Wait) -> Iterator[bytes]:
        for piece in pieces:
            at = self.offset - start
            if 0 <= at < len(piece):
                piece = piece[:at] + bytes([piece[at] ^ self.mask]) + piece[at + 1 :]
            yield piece
            start += len(piece)


class Replaced(Fault):
    """Calls `replace()`, which replaces the object: before the request, or after `after` bytes, followed by a RST."""

    def __init__(self, replace: Callable[[], Any], after: int = 0) -> None:
        self.replace, self.after = replace, after

    def before(self, wait: Wait) -> None:
        if not self.after:
            self.replace()

    def body(self, pieces: Iterator[bytes], start: int, wait: Wait) -> Iterator[bytes]:
        if not self.after:
            yield from pieces
            return
        first, _ = split(pieces, self.after)
        yield from first
        self.replace()
        raise HangUp(reset=True)


def split(pieces: Iterator[bytes], after: int) -> tuple[Iterator[bytes], Callable[[], Iterator[bytes]]]:
    """An iterator over the first `after` bytes, and a function that returns the rest once those are consumed."""
    held = b""

    def first() -> Iterator[bytes]:
        nonlocal held
        left = after
        while left:
            piece = next(pieces, b"")
            if not piece:
                return
            yield piece[:left]
            held, left = piece[left:], left - len(piece[:left])

    def rest() -> Iterator[bytes]:
        if held:
            yield held
        yield from pieces

    return first(), rest
