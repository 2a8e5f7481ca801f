"""Object stores: how each is opened, one request for a range of bytes, and what may go wrong.

obstore (Rust) speaks to S3, Google Cloud Storage, Azure and plain HTTP; fsspec knows the other schemes. Credentials and
endpoints come from the variables that each store's own tools read (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME, ...); `StorageOptions` may name an endpoint and a region.

A client tries once. Whoever asks decides whether to try again: see `remote.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from dist_t2i.errors import DataError
from dist_t2i.storage.urls import checked, scheme_of

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "azure", "adl", "abfs", "abfss", "http", "https"})
BLOCK, LARGE_BLOCK = 2**16, 2**20
"""Bytes that a client hands on at a time, at least; what is lost when a connection breaks. Large ones cost less."""
CONNECT_SECONDS = 5


@dataclass(frozen=True)
class StorageOptions:
    """How bytes are reached. Picklable."""

    endpoint: str = ""
    """URL of an S3-compatible server; "" for the environment's, or AWS."""
    region: str = ""
    anonymous: bool = False
    """Whether requests go unsigned: for public buckets."""
    retry_seconds: float = 300.0
    """How long a read that fails is tried again."""
    stall_seconds: float = 10.0
    """A request that brings nothing for so long has failed; one that takes six times as long as well."""
    cache: str = ""
    """Folder in which what was read is kept for all processes of this machine; "" keeps nothing."""
    cache_bytes: int = 0


FROM_ENVIRONMENT = StorageOptions()
"""Everything as the environment says, and no cache."""


class StorageError(OSError):
    """A request that failed. `reason` is a phrase that many may share; the message names the object, if it is known."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason = reason


class Gone(StorageError):
    """Nothing is there, or it may not be read: trying for long is no use."""


class Missing(Gone, FileNotFoundError):
    """There is no such object."""


class Denied(Gone, PermissionError):
    """It may not be read or written with these credentials."""


class Changed(StorageError):
    """The object is another one than when reading began."""


class Short(StorageError):
    """The object ends before the range begins."""


class Blocks(NamedTuple):
    """An answer: the whole object's size in bytes (-1 when unknown), its tag ("" when it has none), the bytes."""

    size: int
    tag: str
    bytes: Iterator[Any]


class Client(Protocol):
    """One object, by its URL."""

    def fetch(self, start: int, stop: int | None, tag: str, block: int = BLOCK) -> Blocks:
        """The bytes [start, stop), to the end with None, of the object that still has `tag`, at least `block` of them at
        a time. Raises StorageError, also while the bytes are read."""
        ...


def client_of(url: str, options: StorageOptions) -> Client:
    """The client for an object. Raises DataError when no installed library knows the scheme.

    Not to be called before a fork: see `apart.py`.
    """
    return ObstoreClient(url, options) if scheme_of(checked(url)) in OBJECT_STORES else FsspecClient(url)


class ObstoreClient:
    """S3, Google Cloud Storage, Azure and HTTP through obstore."""

    def __init__(self, url: str, options: StorageOptions) -> None:
        parts = urlsplit(url)
        self._store = _store(f"{parts.scheme}://{parts.netloc}", options)
        self._path = parts.path.lstrip("/") + (f"?{parts.query}" if parts.query else "")

    def fetch(self, start: int, stop: int | None, tag: str, block: int = BLOCK) -> Blocks:
        import obstore

        options: dict[str, Any] = {"range": {"offset": start} if stop is None else (start, stop)}
        if tag:
            options["if_match"] = tag
        with storage_errors():
            result = obstore.get(self._store, self._path, options=options)  # type: ignore[arg-type]
        first = result.range[0]
        if first != start:
            raise StorageError("the server sent another range than the one asked for")
        return Blocks(result.meta["size"], result.meta.get("e_tag") or "", _blocks(result.stream(block)))


def _blocks(stream: Iterator[Any]) -> Iterator[Any]:
    with storage_errors():
        yield from stream


class FsspecClient:
    """Every other scheme, through fsspec."""

    def __init__(self, url: str) -> None:
        self._system, self._path = open_system(url)

    def fetch(self, start: int, stop: int | None, tag: str, block: int = BLOCK) -> Blocks:
        with storage_errors():
            about = self._system.info(self._path)
            now = str(about.get("ETag") or about.get("etag") or about.get("mtime") or about.get("created") or "")
            if tag and now != tag:
                raise Changed("the object was replaced")
            size = about.get("size")
            return Blocks(
                -1 if size is None else int(size), now, iter([self._system.cat_file(self._path, start, stop)])
            )


@lru_cache(maxsize=64)
def _store(address: str, options: StorageOptions) -> Any:
    """The store of a bucket or host to read from: it keeps connections open, so there is one a process."""
    limits = {
        "connect_timeout": f"{CONNECT_SECONDS}s",
        "read_timeout": f"{int(1000 * options.stall_seconds)}ms",
        "timeout": f"{int(6000 * options.stall_seconds)}ms",
    }
    return open_store(address, options, limits, retry={"max_retries": 0})


def open_store(url: str, options: StorageOptions, limits: dict[str, Any], retry: dict[str, Any] | None = None) -> Any:
    """obstore's store at a bucket, a prefix in one, or a host; nothing is asked of it yet.

    Args:
        limits: what a request may take, as obstore's `ClientConfig` has it: `timeout`, `read_timeout`, ...
        retry: when the store itself tries again, as its `RetryConfig` has it; its own rule by default.

    Raises: DataError when it knows no such store, or lacks what it needs to know of it.
    """
    from obstore.store import from_url

    scheme = scheme_of(url)
    config = _s3_config(options) if scheme in ("s3", "s3a") else {}
    plain = scheme == "http" or config.get("endpoint", "").startswith("http://")
    client: Any = {"allow_http": plain, **limits}
    address = f"gs{url[3:]}" if scheme == "gcs" else url  # the one scheme of ours that it does not know
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
    """fsspec's file system of a URL, and the path in it. Raises DataError when no installed library knows the scheme."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot be opened: {error}") from error


@contextlib.contextmanager
def storage_errors(name: str = "") -> Iterator[None]:
    """Here the errors of obstore, of fsspec and of its file systems become StorageErrors, about the object `name`."""
    try:
        yield
    except Exception as error:
        raise _told(error, name) from error


def _told(error: Exception, name: str) -> StorageError:
    import obstore.exceptions as known

    if isinstance(error, StorageError):
        return error
    if isinstance(error, DataError):
        return StorageError(str(error))
    if isinstance(error, (known.NotFoundError, FileNotFoundError)):
        return Missing("there is no such object", name)
    if isinstance(error, (known.PermissionDeniedError, known.UnauthenticatedError, PermissionError)):
        return Denied("access is denied: look at the credentials in the environment", name)
    if isinstance(error, known.PreconditionError):
        return Changed("the object was replaced", name)
    if isinstance(error, (known.InvalidPathError, known.NotSupportedError)):
        return Gone("the object's name cannot be read", name)
    text = str(error)  # of obstore's errors, a nest of Rust structures
    status = _status(error, text)
    plain = re.sub(r"\w+://\S+", "", text)  # the object's name may say anything
    if status == 416 or re.search("range not satisfiable", plain, re.IGNORECASE):
        return Short("the object is shorter than it ought to be", name)
    reason = _STATUSES.get(status) or ("the server failed (5xx)" if 500 <= status < 600 else "")
    reason = reason or next((reason for pattern, reason in _REASONS if re.search(pattern, plain, re.IGNORECASE)), "")
    if not isinstance(error, known.BaseError):  # each file system has errors of its own
        text = getattr(error, "strerror", None) or f"{type(error).__name__}: {text}"
    return StorageError(reason or " ".join(text.split())[:200], name)


def _status(error: Exception, text: str) -> int:
    """The HTTP status that the server has answered with; 0 when it has not, or nobody says.

    No other number will do: names, ports and the milliseconds that a request took are in the text, too.
    """
    given = getattr(error, "status", None)  # of aiohttp's errors, which fsspec passes on
    found = re.search(r"(?:status code: |error occurred \()(\d{3})\b", text)  # obstore's, botocore's
    return given if isinstance(given, int) else int(found[1]) if found else 0


_STATUSES = {429: "the server is busy (429)", 503: "the server is busy (503)"}
_REASONS = (
    (r"dns error|failed to lookup|name resolution", "the host's name cannot be resolved"),
    (r"connection refused", "the connection was refused"),
    (r"timed ?out|deadline", "the server did not answer in time"),
    (r"slow ?down|service unavailable", "the server is busy (503)"),
    (r"reset|broken pipe|closed|incomplete|end of file|eof", "the connection broke"),
)
