"""Clients of object stores: open a store, request a range of bytes, and translate the errors of requests.

obstore (Rust) reads S3, Google Cloud Storage, Azure and plain HTTP; fsspec reads all other URLs. Credentials and
endpoints come from the environment variables that each store's own tools read (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, ...). `StorageOptions` may override the endpoint and the region.

A client sends each request once; the caller decides about retries (remote_file.py).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dist_t2i.errors import DataError
from dist_t2i.storage.urls import checked, scheme_of

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "azure", "adl", "abfs", "abfss", "http", "https"})
CONNECT_SECONDS = 5


@dataclass(frozen=True)
class StorageOptions:
    """How remote data is read. Picklable."""

    endpoint: str = ""
    """The URL of an S3-compatible server. "" means the server in the environment, or AWS by default."""
    region: str = ""
    anonymous: bool = False
    """Whether requests are sent without a signature, as public buckets allow."""
    retry_seconds: float = 300.0
    """A read fails after this many seconds without progress."""
    stall_seconds: float = 10.0
    """A request fails after this many seconds without data. A whole request may take six times this long."""
    cache: str = ""
    """The folder in which all processes of this machine cache remote data; "" disables the cache."""
    cache_bytes: int = 0


FROM_ENVIRONMENT = StorageOptions()
"""Options without a cache. The endpoint and the credentials come from the environment."""


class StorageError(OSError):
    """A failed request. `reason` is a phrase; the message also contains the name of the object."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason = reason


class Gone(StorageError):
    """The object is missing or forbidden, so retries rarely help."""


class Missing(Gone, FileNotFoundError):
    """The object does not exist."""


class Denied(Gone, PermissionError):
    """The credentials do not permit this read or write."""


class Changed(StorageError):
    """The object was replaced after reading began."""


class Short(StorageError):
    """The object ends before the requested range begins."""


class Blocks(NamedTuple):
    """A response: the size of the object in bytes (-1 if unknown), the ETag ("" if unknown), and the bytes."""

    size: int
    tag: str
    bytes: Iterator[Any]


def client_of(url: str, options: StorageOptions) -> Client:
    """The client for an object. Raises DataError if no installed library knows the scheme of the URL.

    A process that will fork must not call this function, for the reason that reader_process.py gives.
    """
    return ObstoreClient(url, options) if scheme_of(checked(url)) in OBJECT_STORES else FsspecClient(url)


class ObstoreClient:
    """Reads from S3, Google Cloud Storage, Azure and HTTP servers through obstore."""

    def __init__(self, url: str, options: StorageOptions) -> None:
        parts = urlsplit(url)
        self._store = _store(f"{parts.scheme}://{parts.netloc}", options)
        self._path = parts.path.lstrip("/") + (f"?{parts.query}" if parts.query else "")

    def fetch(self, start: int, stop: int | None, tag: str, block: int) -> Blocks:
        """Requests the bytes [start, stop) of an object, in blocks of at least `block` bytes. If `stop` is None, the
        range extends to the end of the object. `tag` is the ETag of the version to read; "" accepts any version.

        Raises StorageError if the request fails. Iterating over the bytes can also raise StorageError.
        """
        options: dict[str, Any] = {"range": {"offset": start} if stop is None else (start, stop)}
        if tag:
            options["if_match"] = tag
        with storage_errors():
            result = self._store.get(self._path, options=options)
        if result.range[0] != start:
            raise StorageError("the server sent a range that was not requested")
        return Blocks(result.meta["size"], result.meta.get("e_tag") or "", _blocks(result.stream(block)))


def _blocks(stream: Iterator[Any]) -> Iterator[Any]:
    with storage_errors():
        yield from stream


class FsspecClient:
    """Reads objects through fsspec, for schemes that obstore does not know."""

    def __init__(self, url: str) -> None:
        self._system, self._path = open_system(url)

    def fetch(self, start: int, stop: int | None, tag: str, block: int) -> Blocks:
        """Like `ObstoreClient.fetch`, but yields all bytes of the range in one block."""
        with storage_errors():
            about = self._system.info(self._path)
            current = str(about.get("ETag") or about.get("etag") or about.get("mtime") or about.get("created") or "")
            if tag and current != tag:
                raise Changed("the object was replaced")
            size = -1 if about.get("size") is None else int(about["size"])
            return Blocks(size, current, iter([self._system.cat_file(self._path, start, stop)]))


Client = ObstoreClient | FsspecClient


@lru_cache(maxsize=64)
def _store(address: str, options: StorageOptions) -> Any:
    """The store of a bucket or host. Stores are cached, because a store keeps its connections open."""
    limits = {
        "connect_timeout": f"{CONNECT_SECONDS}s",
        "read_timeout": f"{int(1000 * options.stall_seconds)}ms",
        "timeout": f"{int(6000 * options.stall_seconds)}ms",
    }
    return open_store(address, options, limits, retry={"max_retries": 0})


def open_store(url: str, options: StorageOptions, limits: dict[str, Any], retry: dict[str, Any] | None = None) -> Any:
    """obstore's object for a bucket, prefix or host. Sends no request. Raises DataError if obstore rejects an argument.

    `limits` are options of obstore's `ClientConfig` that limit the time of each request. `retry` is obstore's
    `RetryConfig`; None means obstore's defaults.
    """
    from obstore.store import from_url

    scheme = scheme_of(url)
    config = _s3_config(options) if scheme in ("s3", "s3a") else {}
    plain = scheme == "http" or config.get("endpoint", "").startswith("http://")
    client: Any = {"allow_http": plain, **limits}
    address = f"gs{url[3:]}" if scheme == "gcs" else url  # obstore does not know `gcs://`
    try:
        return from_url(address, config=config or None, client_options=client, retry_config=retry)  # type: ignore
    except Exception as error:
        raise DataError(f"{url}: cannot be opened: {str(error).splitlines()[0]}") from error


def _s3_config(options: StorageOptions) -> dict[str, Any]:
    variable = os.environ.get
    region = options.region or variable("AWS_REGION") or variable("AWS_DEFAULT_REGION") or "us-east-1"
    endpoint = options.endpoint or variable("AWS_ENDPOINT_URL_S3") or variable("AWS_ENDPOINT_URL")
    config = {"region": region, "endpoint": endpoint, "skip_signature": options.anonymous}
    return {name: value for name, value in config.items() if value}


def open_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises DataError if no library knows the scheme."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot be opened: {error}") from error


@contextlib.contextmanager
def storage_errors(name: str = "") -> Iterator[None]:
    """Turns errors of obstore, fsspec and its file systems in the block into StorageErrors about the object `name`."""
    try:
        yield
    except Exception as error:
        raise _translated(error, name) from error


def _translated(error: Exception, name: str) -> StorageError:
    import obstore.exceptions as known

    if isinstance(error, StorageError):
        return error
    if isinstance(error, DataError):
        return StorageError(str(error))
    if isinstance(error, (known.NotFoundError, FileNotFoundError)):
        return Missing("the object does not exist", name)
    if isinstance(error, (known.PermissionDeniedError, known.UnauthenticatedError, PermissionError)):
        return Denied("access is denied: check the credentials in the environment", name)
    if isinstance(error, known.PreconditionError):
        return Changed("the object was replaced", name)
    if isinstance(error, (known.InvalidPathError, known.NotSupportedError)):
        return Gone("the object's name cannot be read", name)
    text = str(error)  # for errors of obstore, this text shows nested Rust structures
    status = _status(error, text)
    plain = re.sub(r"\w+://\S+", "", text)  # without URLs, whose words could match the patterns of `_REASONS`
    if status == 416 or re.search("range not satisfiable", plain, re.IGNORECASE):
        return Short("the object is shorter than expected", name)
    reason = _STATUSES.get(status) or ("the server failed (5xx)" if 500 <= status < 600 else "")
    reason = reason or next((reason for pattern, reason in _REASONS if re.search(pattern, plain, re.IGNORECASE)), "")
    if not isinstance(error, known.BaseError):  # file systems of fsspec raise errors of any type
        text = getattr(error, "strerror", None) or f"{type(error).__name__}: {text}"
    return StorageError(reason or " ".join(text.split())[:200], name)


def _status(error: Exception, text: str) -> int:
    """The HTTP status of a failed request; 0 if the server sent no response or the status is unknown.

    Only a number after certain words is a status, since `text` also contains names, ports and durations.
    """
    status = getattr(error, "status", None)  # fsspec passes on errors of aiohttp, which have this attribute
    match = re.search(r"(?:status code: |error occurred \()(\d{3})\b", text)  # the words of obstore and of botocore
    return status if isinstance(status, int) else int(match[1]) if match else 0


_STATUSES = {429: "the server is busy (429)", 503: "the server is busy (503)"}
_REASONS = (
    (r"dns error|failed to lookup|name resolution", "the host's name cannot be resolved"),
    (r"connection refused", "the connection was refused"),
    (r"timed ?out|deadline", "the server did not answer in time"),
    (r"slow ?down|service unavailable", "the server is busy (503)"),
    (r"reset|broken pipe|closed|incomplete|end of file|eof", "the connection broke"),
)
