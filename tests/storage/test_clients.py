"""The meaning of object stores' errors: a number in a name or in a time is no status of the server."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dist_t2i.distributed.launch import free_ports
from dist_t2i.storage.clients import StorageError, StorageOptions, storage_errors
from dist_t2i.storage.shard_file import read_file

ONCE = StorageOptions(retry_seconds=0.0)


@pytest.mark.parametrize("name", ["train-416.tar", "503/a.tar", "reset/a.tar", "a.tar"])
def test_an_objects_name_does_not_say_what_went_wrong(name):
    (port,) = free_ports(1)
    with pytest.raises(StorageError, match="the connection was refused"):
        read_file(f"http://127.0.0.1:{port}/{name}", ONCE)


@pytest.mark.parametrize("time", ["416.3ms", "503.25\u00b5s"])
def test_nor_does_the_time_it_took(time):
    """An error with obstore's wording."""
    from obstore.exceptions import GenericError

    said = f"Error performing GET http://127.0.0.1:9/a.tar in {time} - HTTP error: error sending request"
    with pytest.raises(StorageError) as reported, storage_errors():
        raise GenericError(
            f"Generic HTTP error: {said}\n\nDebug source:\n elapsed: {time},\n 'tcp connect error', Connection refused"
        )
    assert type(reported.value) is StorageError and "the connection was refused" in str(reported.value)


@pytest.mark.parametrize(
    "status, said",
    [(503, r"busy \(503\)"), (429, r"busy \(429\)"), (500, "failed"), (599, "failed"), (403, "access is denied")],
)
def test_its_status_does(status, said):
    with answering(status) as url, pytest.raises(StorageError, match=said):
        read_file(url, ONCE)


def test_nothing_is_there_beyond_the_end_of_an_object():
    with answering(416) as url:
        assert read_file(url, ONCE) == b""


class answering:
    """The URL of an object on a server that answers every request with the same status."""

    def __init__(self, status: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}/a.tar"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
