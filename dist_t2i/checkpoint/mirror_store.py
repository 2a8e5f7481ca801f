"""What lies in a mirror of a run's checkpoints, and the order in which it comes and goes.

    MIRROR/                         laid out as a run folder is, so that a copy of it is one
      config.yaml, environment.json, tokenizer.json      of the run whose mirror it is
      owner.json                    the process that uploads now; another one that takes over replaces it
      checkpoints/images-000001280/
        *.safetensors               as in the run folder
        run/metrics.jsonl, ...      the run's records up to this checkpoint
        state.json                  as in the run folder, and the size and SHA-256 of the files under run/

state.json is the last file to come and the first to go: a mirrored checkpoint exists whole or not at all. Only the
processes of `mirror.py` use this: they have clients of object stores, the training process must not (see data/apart.py).
"""

from __future__ import annotations

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
from dist_t2i.config.sections import Config
from dist_t2i.errors import CheckpointError, ConfigError
from dist_t2i.reporting import metrics_log
from dist_t2i.reporting.wandb_logger import ID_FILE
from dist_t2i.storage.folders import Folder, open_folder
from dist_t2i.storage.retries import pauses, retry
from dist_t2i.utils.files import chunks, sha256_of, write_synced

T = TypeVar("T")

RECORDS = "run/"
"""Where a mirrored checkpoint keeps what lies beside the checkpoints in a run folder."""
RECORD_FILES = ("metrics.jsonl", "bad_samples.jsonl", ID_FILE)
"""What that may be: a mirror is data, and replaces nothing else in a run folder."""
_IDENTITY = ("environment.json", "tokenizer.json", "config.yaml")
"""In the order in which they are written: a mirror that has the last has them all."""
_OWNER = "owner.json"
_REQUEST_SECONDS = 120.0
"""How long a request for a part of a file may take."""
LOOK_SECONDS = 20.0
"""How long one for a few lines may."""
PAUSES = 0.25, 60.0
"""Seconds of the first and of the longest pause before a failed request is repeated."""
_RANGE = 32 * 2**20
"""Bytes that one request fetches."""
_LOOKED_AT = 20
"""Of the newest checkpoints, how many are looked at to find whole ones."""


class Unreachable(Exception):
    """The mirror does not answer; the message says how."""


class Refused(Exception):
    """The mirror is another run's, or another process uploads there now."""


class LocalDamage(Exception):
    """The checkpoint in the run folder is not what it was when it was saved."""


@dataclass(frozen=True)
class Identity:
    """Whose mirror it is. `fingerprint` is the data set's, "" when it cannot be read."""

    config: str
    fingerprint: str

    def strange_to(self, config: Config, fingerprint: str) -> list[str]:
        """What says that this is the mirror of another run, one line each; empty when it is this run's."""
        try:
            theirs = loads(self.config, origin="config.yaml")
        except ConfigError as error:
            return [f"its config.yaml cannot be read ({'; '.join(error.problems) or error})"]
        changed = differences(theirs, config).items()
        lines = [f"{key}: there {there!r}, here {here!r}" for key, (there, here) in changed]
        if self.fingerprint and self.fingerprint != fingerprint:
            lines.append("the data set is another one (its fingerprint differs)")
        return lines


class MirrorStore:
    """The mirror at a URL or folder. Methods raise Unreachable when it does not answer, after `patience` seconds."""

    def __init__(self, url: str, patience: float = 0.0, request_seconds: float = _REQUEST_SECONDS) -> None:
        self._top = open_folder(url, seconds=request_seconds)
        self._root = open_folder(f"{self._top.url}/checkpoints", seconds=request_seconds)
        self._deadline = time.monotonic() + patience
        self._token = uuid.uuid4().hex
        self._whole: set[int] | None = None
        self._removed: set[int] = set()

    # ---- what is there -----------------------------------------------------------------------------------------------

    def identity(self) -> Identity | None:
        """Whose it is; None when it is nobody's yet."""
        config = self._read(_IDENTITY[-1])
        if config is None:
            return None
        try:
            fingerprint = str(json.loads(self._read("environment.json") or b"")["data"]["fingerprint"])
        except (ValueError, KeyError, TypeError):
            fingerprint = ""
        return Identity(config.decode(errors="replace"), fingerprint)

    def newest(self) -> list[int]:
        """Images seen of the newest checkpoints that are there whole, newest first."""
        return [images for images in self._folders()[:_LOOKED_AT] if self._state(images) is not None]

    def _folders(self) -> list[int]:
        """Images seen of all checkpoints that are there or were begun, newest first."""
        try:
            names = self._patiently(self._root.names)
        except FileNotFoundError as error:  # an empty prefix is listed as empty: the bucket itself is not there
            raise Unreachable(str(error)) from error
        return sorted((images for name in names if (images := images_in(name)) is not None), reverse=True)

    def _state(self, images: int) -> bytes | None:
        """The commit marker, None when there is none."""
        try:
            return self._patiently(lambda: self._root.read(f"{folder_name(images)}/{STATE}"))
        except FileNotFoundError:
            return None

    def _read(self, name: str) -> bytes | None:
        try:
            return self._patiently(lambda: self._top.read(name))
        except FileNotFoundError:
            return None

    def _patiently(self, action: Callable[[], T]) -> T:
        """What `action` returns, tried again until the deadline. Raises Unreachable and FileNotFoundError."""

        def again(error: OSError, pause: float) -> bool:
            return not isinstance(error, FileNotFoundError) and time.monotonic() + pause <= self._deadline

        try:
            return retry(action, pauses(*PAUSES), again)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Unreachable(str(error)) from error

    # ---- down --------------------------------------------------------------------------------------------------------

    def fetch(self, images: int, folder: Path) -> None:
        """Put a mirrored checkpoint into a folder, its marker last, every file synced; nothing is checked.

        Raises CheckpointError when a file is missing or unreadable although the mirror answers.
        """
        state = self._state(images)
        try:
            listed = dict(json.loads(state or b"")["files"])
            sizes = {_safe(name): int(about["bytes"]) for name, about in listed.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._root}/{folder_name(images)}/{STATE}: missing or unreadable ({error})"
            ) from error
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(lambda name: self._download(images, name, sizes[name], folder / name), sizes):
                pass
        write_synced(folder / STATE, [state or b""])

    def _download(self, images: int, name: str, size: int, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        starts = range(0, size, _RANGE)
        write_synced(path, (self._part(images, name, start, min(_RANGE, size - start)) for start in starts))

    def _part(self, images: int, name: str, start: int, size: int) -> bytes:
        whole_name = f"{folder_name(images)}/{name}"
        attempts = itertools.count(1)

        def again(error: OSError, _: float) -> bool:
            if isinstance(error, FileNotFoundError):
                return False
            return next(attempts) < 3 or self._state(images) is None  # else the mirror answers, but not about this file

        try:
            return retry(lambda: self._root.read_range(whole_name, start, size), pauses(*PAUSES), again)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self._root}/{whole_name}: missing") from error
        except OSError as error:
            raise CheckpointError(f"{self._root}/{whole_name}: cannot be read ({error})") from error

    # ---- up ----------------------------------------------------------------------------------------------------------

    def claim(self, run: Path, *, damaged: Collection[int] = (), allow_changes: bool = False) -> None:
        """Make this the mirror of the run in `run`, and this process the one that uploads. Raises Refused.

        `damaged` ones are known not to be whole, though they have a marker.
        """
        theirs = self.identity()
        config = (run / "config.yaml").read_text(encoding="utf-8")
        fingerprint = json.loads((run / "environment.json").read_text(encoding="utf-8"))["data"]["fingerprint"]
        strange = theirs.strange_to(loads(config), fingerprint) if theirs else self.unnamed()
        if strange and not allow_changes:
            raise Refused(strangers(self._top.url, strange))
        for name in _IDENTITY:
            self._write(name, (run / name).read_bytes())
        owner = {"token": self._token, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        self._write(_OWNER, json.dumps(owner, indent=1).encode())
        there = {images for images in self._folders() if self._state(images) is not None}
        self._whole = there.difference(damaged)

    def unnamed(self) -> list[str]:
        """What is wrong with a mirror that does not say whose it is: nothing while it is empty."""
        return ["it has checkpoints, but no config.yaml that says whose they are"] if self.newest() else []

    def push(self, run: Path, images: int, keep: Retention) -> None:
        """Have the committed checkpoint of the run here, and no others than `keep` says. Returns when it is there.

        Raises Refused when another process has taken the mirror over, FileNotFoundError when the run folder keeps the
        checkpoint no longer, LocalDamage when its files are not what they were.
        """
        assert self._whole is not None, "claim first"
        self._still_ours()
        keep = keep.with_best(_saved(store.folder_of(run) / folder_name(images)))
        if images not in keep.expired({*self._whole, images}):
            with ExitStack() as stack:
                self._upload(_Source(run, images, stack))
            self._whole.add(images)
        begun = set(self._folders()) - self._whole - self._removed  # some stores list empty folders for a while
        for other in (*begun, *keep.expired(self._whole)):
            self._remove(other)

    def _upload(self, source: _Source) -> None:
        if self._has(source):
            return
        self._remove(source.images)  # damaged, or of a run that went on from before it with other values
        for name, file in source.files():
            self._put(self._root, file, f"{folder_name(source.images)}/{name}")
        self._still_ours()
        self._put(self._root, io.BytesIO(source.marker), f"{folder_name(source.images)}/{STATE}")

    def _has(self, source: _Source) -> bool:
        if not self._whole or source.images not in self._whole:
            return False
        try:
            return without_records(self._state(source.images) or b"") == source.saved
        except (ValueError, KeyError, TypeError, AttributeError):
            return False

    def _remove(self, images: int) -> None:
        self._patiently(lambda: self._root.remove(f"{folder_name(images)}/{STATE}"))
        self._patiently(lambda: self._root.remove_folder(folder_name(images)))
        self._removed.add(images)
        if self._whole:
            self._whole.discard(images)

    def _still_ours(self) -> None:
        """An older process of the run that was lost sight of must not write beside the one that goes on."""
        try:
            owner = json.loads(self._read(_OWNER) or b"")
            ours = owner["token"] == self._token
        except (ValueError, KeyError, TypeError):
            owner, ours = {}, False
        if not ours:
            who = f"process {owner['pid']} on {owner['host']}" if "pid" in owner else "another process"
            raise Refused(f"{self._top.url} was taken over by {who}: this run uploads no more")

    def _write(self, name: str, data: bytes) -> None:
        if self._read(name) != data:
            self._put(self._top, io.BytesIO(data), name)

    def _put(self, place: Folder, file: BinaryIO, name: str) -> None:
        try:
            place.put(file, name)
        except OSError as error:  # also FileNotFoundError: there is no such bucket
            raise Unreachable(str(error)) from error


class _Source:
    """A committed checkpoint, opened: what retention deletes in the run folder meanwhile can still be read."""

    def __init__(self, run: Path, images: int, stack: ExitStack) -> None:
        self.images = images
        folder = store.folder_of(run) / folder_name(images)
        self.saved = _saved(folder)
        self._opened = {name: stack.enter_context((folder / name).open("rb")) for name in self.saved["files"]}
        self._records = {RECORDS + name: text.encode() for name, text in records(run, images).items()}
        listed = {name: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in self._records.items()}
        self.marker = store.seal({**self.saved, "files": {**self.saved["files"], **listed}})

    def files(self) -> Iterator[tuple[str, BinaryIO]]:
        """Name and content of each, checked. Raises LocalDamage."""
        for name, file in self._opened.items():
            if sha256_of(chunks(file)) != self.saved["files"][name]["sha256"]:
                raise LocalDamage(f"{file.name}: does not have the checksum it was saved with")
            file.seek(0)
            yield name, file
        for name, data in self._records.items():
            yield name, io.BytesIO(data)


def _saved(folder: Path) -> dict[str, Any]:
    """The state of a committed checkpoint. Raises LocalDamage."""
    try:
        return store.unseal((folder / STATE).read_bytes())
    except ValueError as error:
        raise LocalDamage(f"{folder / STATE}: {error}") from error


def records(run: Path, images: int) -> dict[str, str]:
    """The run's records as of `images` seen, by file name: what a run that goes on from there continues."""
    metrics = [entry for entry in metrics_log.read(run / "metrics.jsonl") if entry["images"] <= images]
    found = {"metrics.jsonl": "".join(json.dumps(entry) + "\n" for entry in metrics)}
    if (run / "bad_samples.jsonl").exists():
        found["bad_samples.jsonl"] = run_folder.bad_samples_before(run / "bad_samples.jsonl", images)
    if (run / ID_FILE).exists():
        found[ID_FILE] = (run / ID_FILE).read_text(encoding="utf-8")
    return found


def without_records(state: bytes) -> dict[str, Any]:
    """The marker as it is in the run folder. Raises ValueError and the like when it is none."""
    found = store.unseal(state)
    return {**found, "files": {name: about for name, about in found["files"].items() if not name.startswith(RECORDS)}}


def strangers(url: str, lines: list[str]) -> str:
    """The message about a mirror of another run."""
    listed = "".join(f"\n  {line}" for line in lines)
    return (
        f"checkpoint.mirror: {url} is the mirror of another run:{listed}\n"
        "Name another place (checkpoint.mirror=...), put the old values back, or go on with --allow-changes, which makes "
        "it this run's."
    )


def _safe(name: str) -> str:
    """A marker is data: its names lead nowhere else. Raises ValueError."""
    plain = name.removeprefix(RECORDS)
    if not plain or plain != os.path.basename(plain) or plain in (".", "..", STATE):
        raise ValueError(f"{name!r} is no name of a file in a checkpoint")
    return name
