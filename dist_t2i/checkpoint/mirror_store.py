"""The files of a mirror of a run's checkpoints, and the order in which they are written and deleted.

    MIRROR/                         has the layout of a run folder, so a copy of the mirror is a run folder
      config.yaml, environment.json, tokenizer.json      identify the run to which the mirror belongs
      owner.json                    the process that uploads; another process takes over by replacing this file
      checkpoints/images-000001280/
        *.safetensors               as in the run folder
        run/metrics.jsonl, ...      the run's records up to this checkpoint
        state.json                  as in the run folder, with the size and SHA-256 of the files under run/ added

state.json is written last and deleted first, so a mirrored checkpoint with a state.json is complete. Only the processes
of mirror_worker.py open a mirror. The training process must not have clients of object stores, because this process
forks later (storage/reader_process.py explains the danger).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dist_t2i.checkpoint import run_folder, store
from dist_t2i.checkpoint.store import STATE, Retention, folder_name, images_in
from dist_t2i.config.files import loads
from dist_t2i.config.resume import differences
from dist_t2i.errors import CheckpointError, ConfigError
from dist_t2i.reporting import metrics_log
from dist_t2i.reporting.wandb_logger import ID_FILE
from dist_t2i.storage.folders import open_folder
from dist_t2i.storage.retries import pauses, retry
from dist_t2i.utils.files import chunks, sha256_of, write_synced

T = TypeVar("T")

RECORDS = "run/"
"""Prefix of the run's records in a mirrored checkpoint; a run folder keeps these files outside of its checkpoints."""
RECORD_FILES = ("metrics.jsonl", "bad_samples.jsonl", ID_FILE, "tokenizer.json")
"""The names of the records. A restore replaces only these files, because another person may have written a mirror."""
_IDENTITY = ("environment.json", "tokenizer.json", "config.yaml")
"""Files that identify the run, in the order of writing, so that a mirror with the last file has all three."""
_OWNER = "owner.json"
_REQUEST_SECONDS = 120.0  # time limit of a request for a part of a file
LOOK_SECONDS = 20.0
"""Time limit of a request for a few lines, in seconds."""
PAUSES = 0.25, 60.0
"""Shortest and longest pause before a failed request is repeated, in seconds."""
_RANGE = 32 * 2**20  # bytes per request
_INSPECTED = 20  # number of newest checkpoints that are checked for completeness


class Unreachable(Exception):
    """The mirror does not answer. The message contains the cause, such as the error of the last request."""


class Refused(Exception):
    """The mirror belongs to another run, or another process has taken over the mirror."""


class Damaged(Exception):
    """A checkpoint of the mirror or of the run folder differs from the saved checkpoint."""


@dataclass(frozen=True)
class Identity:
    """The text of a run's config.yaml and the fingerprint of its data set ("" if unreadable) identify the run."""

    config: str
    fingerprint: str

    def mismatches(self, run: Identity) -> list[str]:
        """The reasons why a mirror with this identity does not belong to `run`, or an empty list."""
        try:
            mirrored = loads(self.config, origin="config.yaml")
        except ConfigError as error:
            return [f"the mirror's config.yaml cannot be read ({'; '.join(error.problems) or error})"]
        changed = differences(mirrored, loads(run.config)).items()
        lines = [f"{key}: {there!r} in the mirror, {here!r} in this run" for key, (there, here) in changed]
        if self.fingerprint and self.fingerprint != run.fingerprint:
            lines.append("the data set differs (by its fingerprint)")
        return lines


class MirrorStore:
    """The mirror at a URL or folder. Methods raise Unreachable if the mirror does not answer for `patience` seconds."""

    def __init__(self, url: str, patience: float = 0.0, request_seconds: float = _REQUEST_SECONDS) -> None:
        self._top = open_folder(url, seconds=request_seconds)
        self._root = open_folder(f"{self._top.url}/checkpoints", seconds=request_seconds)
        self._deadline = time.monotonic() + patience
        self._token = uuid.uuid4().hex
        self._complete: set[int] = set()
        self._removed: set[int] = set()

    def identity(self) -> Identity | None:
        """The run to which the mirror belongs, or None while the mirror has no config.yaml."""
        if (config := self._read(_IDENTITY[-1])) is None:
            return None
        try:
            fingerprint = str(json.loads(self._read("environment.json") or b"")["data"]["fingerprint"])
        except (ValueError, KeyError, TypeError):
            fingerprint = ""
        return Identity(config.decode(errors="replace"), fingerprint)

    def newest(self) -> list[int]:
        """The images seen at each of the newest complete checkpoints, newest first."""
        return [images for images in self._folders()[:_INSPECTED] if self._state(images) is not None]

    def unidentified(self) -> list[str]:
        """The reasons why a mirror without config.yaml cannot be used; empty for a mirror without checkpoints."""
        return ["the mirror has checkpoints, but no config.yaml that identifies their run"] if self.newest() else []

    def _folders(self) -> list[int]:
        try:
            names = self._patiently(self._root.names)
        except FileNotFoundError as error:  # the bucket is missing; an empty prefix gives no error
            raise Unreachable(str(error)) from error
        return sorted((images for name in names if (images := images_in(name)) is not None), reverse=True)

    def _state(self, images: int) -> bytes | None:
        return self._read(f"checkpoints/{folder_name(images)}/{STATE}")

    def _read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return self._patiently(lambda: self._top.read(name))
        return None

    def _patiently(self, action: Callable[[], T]) -> T:
        """The result of `action`, which is retried until the deadline. Raises Unreachable and FileNotFoundError."""

        def again(error: OSError, pause: float) -> bool:
            return not isinstance(error, FileNotFoundError) and time.monotonic() + pause <= self._deadline

        try:
            return retry(action, pauses(*PAUSES), again)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Unreachable(str(error)) from error

    def fetch(self, images: int, folder: Path) -> None:
        """Download a checkpoint into a folder, state.json last, and sync every file, without comparing checksums.

        Raises CheckpointError when a file is missing or unreadable although the mirror answers.
        """
        state = self._state(images)
        try:
            files = dict(json.loads(state or b"")["files"])
            sizes = {_safe(name): int(about["bytes"]) for name, about in files.items()}
        except (ValueError, KeyError, TypeError) as error:
            path = f"{self._root}/{folder_name(images)}/{STATE}"
            raise CheckpointError(f"{path}: missing or unreadable ({error})") from error
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: self._download(images, name, sizes[name], folder / name), sizes))
        write_synced(folder / STATE, [state or b""])

    def _download(self, images: int, name: str, size: int, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        starts = range(0, size, _RANGE)
        write_synced(path, (self._part(images, name, start, min(_RANGE, size - start)) for start in starts))

    def _part(self, images: int, name: str, start: int, size: int) -> bytes:
        full_name = f"{folder_name(images)}/{name}"
        attempts = itertools.count(1)

        def again(error: OSError, _: float) -> bool:
            # A file that cannot be read is tried three times if the mirror answers another request.
            missing = isinstance(error, FileNotFoundError)
            return not missing and (next(attempts) < 3 or self._state(images) is None)

        try:
            return retry(lambda: self._root.read_range(full_name, start, size), pauses(*PAUSES), again)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self._root}/{full_name}: missing") from error
        except OSError as error:
            raise CheckpointError(f"{self._root}/{full_name}: cannot be read ({error})") from error

    def acquire(self, run: Path, *, damaged: Collection[int] = (), allow_changes: bool = False) -> None:
        """Make this store the mirror of `run`, and this process its uploader. Raises Refused.

        Checkpoints in `damaged` count as incomplete: the next `push` deletes or replaces them.
        """
        mirrored = self.identity()
        fingerprint = json.loads((run / "environment.json").read_text(encoding="utf-8"))["data"]["fingerprint"]
        own = Identity((run / "config.yaml").read_text(encoding="utf-8"), fingerprint)
        mismatches = mirrored.mismatches(own) if mirrored else self.unidentified()
        if mismatches and not allow_changes:
            raise Refused(another_run(self._top.url, mismatches))
        for name in _IDENTITY:
            self._write(name, (run / name).read_bytes())
        owner = {"token": self._token, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        self._write(_OWNER, json.dumps(owner, indent=1).encode())
        self._complete = {images for images in self._folders() if self._state(images) is not None} - {*damaged}

    def push(self, run: Path, images: int, keep: Retention) -> None:
        """Upload a committed checkpoint of the run, and delete the checkpoints that `keep` does not retain or that the
        run has left behind after a divergence.

        Raises Refused if another process has taken over the mirror, FileNotFoundError if the run folder no longer has
        the checkpoint, and Damaged if the checkpoint's files differ from the saved files.
        """
        self._check_owner()
        state = _saved(store.folder_of(run) / folder_name(images))
        for other in store.abandoned(self._complete, state):
            self._remove(other)
        keep = keep.given(state)
        if images not in keep.expired({*self._complete, images}):
            with ExitStack() as stack:
                self._upload(_OpenCheckpoint(run, images, stack))
            self._complete.add(images)
        incomplete = set(self._folders()) - self._complete - self._removed  # stores may list deleted folders
        for other in (*incomplete, *keep.expired(self._complete)):
            self._remove(other)

    def _upload(self, checkpoint: _OpenCheckpoint) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            state = self._state(checkpoint.images) if checkpoint.images in self._complete else None
            if without_records(state or b"") == checkpoint.state:
                return
        self._remove(checkpoint.images)  # a damaged copy, or the run went back to an older checkpoint
        folder = f"checkpoints/{folder_name(checkpoint.images)}"
        for name, file in checkpoint.files():
            self._put(f"{folder}/{name}", file)
        self._check_owner()
        self._put(f"{folder}/{STATE}", io.BytesIO(checkpoint.state_json))

    def _remove(self, images: int) -> None:
        name = folder_name(images)
        self._patiently(lambda: self._root.remove(f"{name}/{STATE}"))
        self._patiently(lambda: self._root.remove_folder(name))
        self._removed.add(images)
        self._complete.discard(images)

    def _check_owner(self) -> None:
        """Raises Refused if another process has taken over the mirror, because only one process may upload."""
        who = "another process"
        with contextlib.suppress(ValueError, KeyError, TypeError):
            owner = json.loads(self._read(_OWNER) or b"")
            if owner["token"] == self._token:
                return
            who = f"process {owner['pid']} on {owner['host']}"
        raise Refused(f"{self._top.url} was taken over by {who}: this run stops its uploads")

    def _write(self, name: str, data: bytes) -> None:
        if self._read(name) != data:
            self._put(name, io.BytesIO(data))

    def _put(self, name: str, file: BinaryIO) -> None:
        try:
            self._top.put(file, name)
        except OSError as error:  # FileNotFoundError if the bucket is missing
            raise Unreachable(str(error)) from error


class _OpenCheckpoint:
    """A committed checkpoint whose open files remain readable after retention deletes the checkpoint."""

    def __init__(self, run: Path, images: int, stack: ExitStack) -> None:
        self.images = images
        folder = store.folder_of(run) / folder_name(images)
        self.state = _saved(folder)
        self._opened = {name: stack.enter_context((folder / name).open("rb")) for name in self.state["files"]}
        self._records = {RECORDS + name: text.encode() for name, text in records(run, images).items()}
        listed = {name: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in self._records.items()}
        self.state_json = store.seal({**self.state, "files": {**self.state["files"], **listed}})

    def files(self) -> Iterator[tuple[str, BinaryIO]]:
        """Yields name and content of each file except state.json. Raises Damaged if a checksum differs."""
        for name, file in self._opened.items():
            if sha256_of(chunks(file)) != self.state["files"][name]["sha256"]:
                raise Damaged(f"{file.name}: does not have its saved checksum")
            file.seek(0)
            yield name, file
        for name, data in self._records.items():
            yield name, io.BytesIO(data)


def _saved(folder: Path) -> dict[str, Any]:
    try:
        return store.unseal((folder / STATE).read_bytes())
    except ValueError as error:
        raise Damaged(f"{folder / STATE}: {error}") from error


def records(run: Path, images: int) -> dict[str, str]:
    """The run's records up to `images` seen, by file name. A run that resumes at `images` extends these records."""
    metrics = metrics_log.read(run / "metrics.jsonl")
    texts = {"metrics.jsonl": "".join(json.dumps(entry) + "\n" for entry in metrics if entry["images"] <= images)}
    if (run / "bad_samples.jsonl").exists():
        texts["bad_samples.jsonl"] = run_folder.bad_samples_before(run / "bad_samples.jsonl", images)
    for name in (ID_FILE, "tokenizer.json"):
        if (run / name).exists():
            texts[name] = (run / name).read_text(encoding="utf-8")
    return texts


def without_records(state: bytes) -> dict[str, Any]:
    """The content of a mirrored state.json without the records, which equals the run folder's state.json.

    Raises ValueError, KeyError, TypeError or AttributeError.
    """
    content = store.unseal(state)
    files = {name: about for name, about in content["files"].items() if not name.startswith(RECORDS)}
    return {**content, "files": files}


def another_run(url: str, mismatches: list[str]) -> str:
    """The message about a mirror that belongs to another run."""
    listed = "".join(f"\n  {line}" for line in mismatches)
    return (
        f"checkpoint.mirror: {url} is the mirror of another run:{listed}\n"
        "Choose another location (checkpoint.mirror=...), restore the old values, or continue with --allow-changes, "
        "which makes this mirror the run's own."
    )


def _safe(name: str) -> str:
    """Returns a plain file name unchanged. Raises ValueError for any other name, which may lead out of the folder."""
    plain = name.removeprefix(RECORDS)
    if not plain or plain != os.path.basename(plain) or plain in (".", "..", STATE):
        raise ValueError(f"{name!r} is not a valid file name in a checkpoint")
    return name
