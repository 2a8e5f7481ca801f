"""A proxy in front of an HTTP server that applies faults to responses and records requests.

    with FaultProxy(server.endpoint) as proxy:  # S3Server of object_store.py; the faults are in faults.py
        rule = proxy.add(Reset(after=10_000), path="*/train-00001.tar", first=2)
        ...a client of proxy.endpoint...
        assert rule.hits == 2 and len(proxy.seen(path="*/train-00001.tar")) == 3

Requests are forwarded unchanged, including their Host, so that signatures (which cover it) stay valid for clients that use
the proxy's endpoint. A fault changes one response; its rule determines which responses, and how many.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import re
import socket
import struct
import termios
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dist_t2i.distributed.launch import free_ports
from faults import Fault, HangUp
from object_store import environment

PIECE = 2**18
"""Bytes forwarded at a time."""
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
_CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}


@dataclass
class Rule:
    """A fault and the requests that it applies to, see `FaultProxy.add`."""

    fault: Fault
    path: str
    method: str
    first: int | None
    until: float | None
    skip: int
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Whether the fault applies to this request; counts the request if so."""
        if self.until is not None and time.monotonic() > self.until:
            return False
        if not (fnmatchcase(path, self.path) and fnmatchcase(method, self.method)):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.first is not None and self.hits >= self.first:
            return False
        self.hits += 1
        return True


@dataclass
class Request:
    """A request and its response; `range` is the Range header, "" without one."""

    method: str
    path: str
    query: str
    range: str
    status: int = 0
    sent: int = 0
    """Bytes of the body."""
    fault: str = ""


class FaultProxy:
    """A reverse proxy of `target` ("http://127.0.0.1:PORT") on a free port, from `open` to `close`."""

    def __init__(self, target: str) -> None:
        self.target = target.removeprefix("http://").rstrip("/")
        self.port = free_ports(1)[0]
        self.requests: list[Request] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._closing = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables of `S3Server.environment`, with the proxy's endpoint."""
        return environment(self.endpoint)

    def __enter__(self) -> FaultProxy:
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self) -> None:
        """Listen (again)."""
        self._closing.clear()
        self._server = _Server(self)

    def close(self) -> None:
        """Stop listening, and end all connections: clients are refused until it is opened again."""
        self._closing.set()
        if self._server is not None:
            self._server.end()
            self._server = None

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Closes the port inside the block."""
        self.close()
        try:
            yield
        finally:
            self.open()

    def down_for(self, seconds: float) -> threading.Thread:
        """Closes the port for some seconds, without waiting; the returned thread can be joined."""
        self.close()
        timer = threading.Timer(seconds, self.open)
        timer.daemon = True
        timer.start()
        return timer

    def add(
        self,
        fault: Fault,
        *,
        path: str = "*",
        method: str = "GET",
        first: int | None = None,
        seconds: float | None = None,
        skip: int = 0,
    ) -> Rule:
        """Applies a fault to requests from now on. If several rules match, the first added rule applies.

        Args:
            path: a glob over "/bucket/key"; its `*` also matches slashes.
            method: a glob: "GET", "HEAD", "*".
            first: number of requests that are affected; by default all.
            seconds: duration of the rule.
            skip: number of matching requests before that are not affected.
        """
        until = None if seconds is None else time.monotonic() + seconds
        rule = Rule(fault, path, method, first, until, skip)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Removes all rules and recorded requests."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()

    def seen(self, path: str = "*", method: str = "*") -> list[Request]:
        """The matching requests in order."""
        with self._lock:
            return [r for r in self.requests if fnmatchcase(r.path, path) and fnmatchcase(r.method, method)]

    def note(self, request: Request) -> Fault:
        """Records a request and returns the fault that applies to it."""
        with self._lock:
            self.requests.append(request)
            for rule in self._rules:
                if rule.strikes(request.method, request.path):
                    request.fault = type(rule.fault).__name__
                    return rule.fault
        return Fault()

    def wait(self, seconds: float) -> None:
        """Sleeps, at most until `close`."""
        if self._closing.wait(seconds):
            raise HangUp(reset=False)


class _Server(ThreadingHTTPServer):
    """Listens from its creation to `end`, with a thread per connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.open_sockets: set[socket.socket] = set()
        super().__init__(("127.0.0.1", proxy.port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()
        for connection in list(self.open_sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing when a client disconnects."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client: requests in turn."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.open_sockets.add(self.connection)

    def finish(self) -> None:
        self.server.open_sockets.discard(self.connection)
        super().finish()

    def handle_request(self) -> None:
        path, _, query = self.path.partition("?")
        request = Request(self.command, urllib.parse.unquote(path), query, self.headers.get("Range", ""))
        fault = self.server.proxy.note(request)
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if fault.status is not None:
                self._refuse(request, fault.status)
                return
            fault.before(self.server.proxy.wait)
            self._pass_on(request, fault, sent)
        except HangUp as end:
            self._hang_up(end.reset)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

    def _refuse(self, request: Request, status: int) -> None:
        code = _CODES.get(status, "InternalError")
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>broken on purpose</Message></Error>".encode()
        self._answer(request, status, [("Content-Type", "application/xml")], len(text))
        if self.command != "HEAD":
            self._send(request, text)

    def _pass_on(self, request: Request, fault: Fault, sent: bytes) -> None:
        upstream = http.client.HTTPConnection(self.server.proxy.target, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in _kept(self.headers.items()):
                upstream.putheader(name, value)
            upstream.endheaders(sent or None)
            answer = upstream.getresponse()
        except OSError:
            upstream.close()
            self._refuse(request, 502)
            return
        with contextlib.closing(upstream), answer:
            headers = _kept(answer.getheaders())
            whole = None if answer.length is not None else answer.read()  # chunked: length unknown
            if self.command == "HEAD":
                self._answer(request, answer.status, headers, int(answer.getheader("Content-Length") or 0))
                return
            length = answer.length if whole is None else len(whole)
            self._answer(request, answer.status, headers, (length or 0) + fault.longer)
            pieces = iter(lambda: answer.read(PIECE), b"") if whole is None else iter([whole])
            for piece in fault.body(pieces, _start(answer), self.server.proxy.wait):
                self._send(request, piece)
            if whole is None and answer.length:  # the server broke off, and so does the proxy
                raise HangUp(reset=True)

    def _answer(self, request: Request, status: int, headers: list[tuple[str, str]], length: int) -> None:
        request.status = status
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, request: Request, data: bytes) -> None:
        request.sent += len(data)  # before the write: a client may check as soon as it has all bytes
        self.wfile.write(data)

    def _hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if not reset:
            return
        for _ in range(500):  # a RST discards unsent bytes, but they shall arrive
            if not struct.unpack("i", fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4)))[0]:
                break
            time.sleep(0.002)
        self.server.open_sockets.discard(self.connection)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())  # before the server's own shutdown, which would send a FIN

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""


def _kept(headers: Any) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP]


def _start(answer: http.client.HTTPResponse) -> int:
    """The offset of the body in the object."""
    match = re.match(r"bytes (\d+)-", answer.getheader("Content-Range") or "")
    return int(match[1]) if match else 0
