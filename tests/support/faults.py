"""What may go wrong with an answer of a server; `faultproxy.py` does it to the answers that a test picks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Wait = Callable[[float], Any]
"""Sleeps for so many seconds."""


class HangUp(Exception):
    """Raised by a fault: end the connection here, with a RST or, cleanly, with a FIN."""

    def __init__(self, reset: bool) -> None:
        super().__init__("reset" if reset else "close")
        self.reset = reset


class Fault:
    """What may go wrong with an answer. The base class changes nothing."""

    status: int | None = None
    """Answer this instead of passing the request on."""
    longer: int = 0
    """How much more Content-Length promises than comes."""

    def before(self, wait: Wait) -> None:
        """Called before the request is passed on."""

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
    """Content-Length is `longer` bytes more (less, when negative) than what comes; then the connection ends cleanly."""

    def __init__(self, longer: int) -> None:
        self.longer = longer

    def body(self, pieces: Iterator[bytes], start: int, wait: Wait) -> Iterator[bytes]:
        yield from pieces
        raise HangUp(reset=False)


class Cut(Fault):
    """The last `less` bytes do not come, and Content-Length agrees: nothing but the object's size tells."""

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
    """`replace()`, which writes another object there: before the request, or after `after` bytes and then a RST."""

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
    """The first `after` bytes, and a function that gives the rest once those are taken."""
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
