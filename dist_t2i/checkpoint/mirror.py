"""Training restores a checkpoint from its mirror at the start, and uploads every new checkpoint to the mirror.

Only rank 0 uses the mirror: on other ranks, and with an empty `checkpoint.mirror`, the methods do nothing. Separate
processes (mirror_worker.py) make all requests to the mirror, so that no step waits for a request. These processes
ignore stop signals and end with the training process. If the mirror fails during training, the run prints a warning and
continues. A mirror that fails at the start may be an error, because no training can be lost yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dist_t2i.checkpoint import mirror_store, store
from dist_t2i.checkpoint.lease import Lease
from dist_t2i.checkpoint.mirror_store import Damaged, Identity, Unreachable
from dist_t2i.config.sections import CheckpointConfig
from dist_t2i.errors import CheckpointError
from dist_t2i.reporting.reporter import Reporter
from dist_t2i.storage.folders import open_folder
from dist_t2i.utils.files import write_atomic
from dist_t2i.utils.processes import signals_blocked

FINISH_SECONDS = 600.0
"""A finished run waits at most this many seconds for its last upload."""
STOP_SECONDS = 5.0
"""A stopped run waits at most this many seconds for its last upload; the next start uploads what is missing."""
_GLANCE_SECONDS = 15.0
"""A start from a run folder with checkpoints waits at most this many seconds for the mirror's answer."""


@dataclass
class Mirror:
    """Call `look` and `restore` first, `offer` after every commit, `poll` from time to time, and `finish` at the end.

    `config` is the text of the run's config.yaml. `look` and `restore` wait up to `retry_seconds` for an answer.
    """

    checkpoint: CheckpointConfig
    run: Path
    config: str
    reporter: Reporter
    _: KW_ONLY
    retry_seconds: float
    main: bool
    allow_changes: bool = False

    def __post_init__(self) -> None:
        self.url = self.checkpoint.mirror if self.main else ""
        self._say, self._warn = self.reporter.say, self.reporter.warn
        self._images: list[int] = []
        self._damaged: list[int] = []
        self._uploader: _Uploader | None = None
        self._offered: int | None = None
        self._uploaded: int | None = None
        self._refused = False

    def look(self, fingerprint: str) -> None:
        """Read the identity and the checkpoints of the mirror, without writing anything, even to the log.

        Raises CheckpointError if the mirror lies in the run folder or belongs to another run. If the run folder has no
        checkpoint, a mirror that cannot be read is also a CheckpointError.
        """
        if not self.url:
            return
        folder, run = open_folder(self.url).path, self.run.resolve()
        if folder is not None and folder.resolve().is_relative_to(run):
            raise CheckpointError(
                f"checkpoint.mirror: {self.url} lies in the run folder {self.run} and would be lost with it: "
                "choose a location on another disk or in object storage"
            )
        has_own = bool(store.committed(self.run))
        patience = min(self.retry_seconds, _GLANCE_SECONDS) if has_own else self.retry_seconds
        try:
            answer = self._ask("look", patience=patience)
        except Unreachable as error:
            return self._unreachable(error, has_own, _warn)
        own = Identity(self.config, fingerprint)
        mismatches = Identity(**answer["identity"]).mismatches(own) if answer["identity"] else answer["strange"]
        if mismatches:
            if not self.allow_changes:
                raise CheckpointError(mirror_store.another_run(self.url, mismatches))
            _warn(f"continuing although the mirror {self.url} belongs to another run: " + "; ".join(mismatches))
        self._images = answer["images"]

    @property
    def has_checkpoints(self) -> bool:
        """Whether `look` found checkpoints."""
        return bool(self._images)

    def restore(self, lease: Lease | None) -> None:
        """Fetch the newest intact checkpoint of the mirror and commit it under `lease`, unless the run folder has it.

        Skips damaged checkpoints, and those that the run has left behind after a divergence. Raises CheckpointError when
        no checkpoint of a mirror with checkpoints is intact, and the run folder has no intact checkpoint.
        """
        if lease is None or not self._images:
            return
        newest = self._newest_intact()
        own = newest.images if newest else -1
        behind = store.abandoned(self._images, newest.state) if newest else ()
        for images in [images for images in self._images if images not in behind]:
            if own >= images:
                return
            have = f"has only older checkpoints (up to {own:,} images)" if own >= 0 else "has no intact checkpoint"
            self._say(f"{self.run} {have}: fetching the checkpoint at {images:,} images from {self.url}")
            try:
                store.adopt(lease, images, partial(self._fetch, images))
                return
            except Damaged as error:
                self._damaged.append(images)
                self._warn(f"skipped a mirrored checkpoint: {error}")
            except Unreachable as error:
                return self._unreachable(error, own >= 0, self._warn)
        if own < 0:
            raise CheckpointError(
                f"none of the {len(self._images)} checkpoints inspected in {self.url} is intact, and neither is any in "
                f"{self.run}.\nTo start from the beginning, name another mirror (checkpoint.mirror=...)."
            )

    def _newest_intact(self) -> store.Checkpoint | None:
        for folder in reversed(store.committed(self.run)):
            with contextlib.suppress(CheckpointError):
                return store.open_checkpoint(folder)
        return None

    def _fetch(self, images: int, staging: Path) -> None:
        self._ask("fetch", images=images, folder=str(staging), patience=self.retry_seconds, check=False)
        try:
            if store.open_checkpoint(staging).images != images:
                raise CheckpointError(f"{staging / store.STATE}: damaged: does not state {images:,} images.")
        except CheckpointError as error:
            mirrored = f"{self.url}/checkpoints/{store.folder_name(images)}"
            raise Damaged(str(error).replace(str(staging), mirrored)) from error
        for name in mirror_store.RECORD_FILES:
            if (record := staging / mirror_store.RECORDS / name).exists():
                write_atomic(self.run / name, record.read_text(encoding="utf-8", errors="replace"))
        shutil.rmtree(staging / mirror_store.RECORDS, ignore_errors=True)
        state = mirror_store.without_records((staging / store.STATE).read_bytes())
        (staging / store.STATE).write_bytes(store.seal(state))

    def _unreachable(self, error: Unreachable, has_own: bool, warn: Callable[[str], None]) -> None:
        if has_own:
            return warn(f"the mirror {self.url} cannot be read; using only the run folder: {error}")
        raise CheckpointError(
            f"the mirror {self.url} cannot be read, and the run folder has no checkpoint, so the position to resume "
            f"from is unknown: {error}\nRepair the mirror, or start from the beginning without it (checkpoint.mirror=)."
        ) from error

    def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """A worker's answer. Raises Unreachable, Damaged, or, for a URL that cannot be used, CheckpointError."""
        process = _start_worker(subprocess.DEVNULL, command=command, url=self.url, **arguments)
        output, _ = process.communicate()
        try:
            answer = json.loads(output)
        except ValueError:
            raise Unreachable(f"the mirror's process ended with status {process.returncode}") from None
        for kind, error in (("unreachable", Unreachable), ("damaged", Damaged)):
            if kind in answer:
                raise error(answer[kind])
        if "mistake" in answer:
            raise CheckpointError(f"checkpoint.mirror: {answer['mistake']}")
        return answer

    def offer(self, images: int | None) -> None:
        """Upload the checkpoint at `images` in the background. With None, this run only takes over the mirror."""
        self._offered = images
        self.poll()  # finds out whether the uploader has ended
        if not self.url or self._refused:
            return
        if self._uploader is None:
            self._uploader = _Uploader(
                url=self.url,
                run=str(self.run),
                keep_last=self.checkpoint.keep_last,
                keep_every_images=self.checkpoint.keep_every_images,
                damaged=self._damaged,
                allow_changes=self.allow_changes,
            )
        if images is not None:
            self._uploader.request(images)

    def poll(self, seconds: float = 0.0) -> None:
        """Print the uploader's events since the last call, after a wait of up to `seconds` for the first event."""
        if self._uploader is None:
            return
        for event in self._uploader.events(seconds):
            kind, problem = event["event"], event.get("problem", "")
            if kind == "failing":
                self._warn(f"the mirror {self.url} fails: {problem} Training continues; uploads are retried.")
            elif kind == "works":
                self._say(f"the mirror {self.url} works again")
            elif kind == "refused":
                self._refused = True
                self._warn(f"{problem}\nTraining continues without a mirror.")
            elif kind == "skipped":
                self._warn(f"a checkpoint was not mirrored: {problem}")
            if kind in ("uploaded", "skipped"):
                self._uploaded = event["images"]
        if self._uploader.ended:
            if not self._refused:
                self._warn("the mirror's process has ended; the next checkpoint starts a new process")
            self.close()

    @property
    def waiting(self) -> bool:
        """Whether the newest checkpoint has not been uploaded yet."""
        return bool(self.url) and not self._refused and self._uploaded != self._offered

    def finish(self, *, finished: bool, stopping: Callable[[], bool]) -> None:
        """Wait for the last upload.

        A finished run waits up to FINISH_SECONDS or until `stopping()`, and a stopped run up to STOP_SECONDS.
        """
        limit = FINISH_SECONDS if finished else STOP_SECONDS
        deadline = time.monotonic() + limit
        self.poll(0.5 if self.waiting else 0.0)
        if self.waiting and finished:
            self._say(
                f"waiting for {self.url} to receive the checkpoint at {self._offered:,} images, up to {limit / 60:.0f} "
                "minutes; Ctrl-C ends the wait"
            )
        while self.waiting and self._uploader and time.monotonic() < deadline and not (finished and stopping()):
            self.poll(0.25)
        if self.waiting:
            self._warn(f"{self.url} lacks the checkpoint at {self._offered:,} images: repeat the command to upload it")
        self.close()

    def close(self) -> None:
        """Kill the uploader."""
        if self._uploader is not None:
            self._uploader.close()
            self._uploader = None


class _Uploader:
    """Runs `follow` of mirror_worker.py. Only the main thread may start this process, which ends with its thread."""

    def __init__(self, **arguments: Any) -> None:
        self._process = _start_worker(subprocess.PIPE, command="follow", **arguments)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._partial_line, self.ended = b"", False
        os.set_blocking(self._output.fileno(), False)

    def request(self, images: int) -> None:
        with contextlib.suppress(OSError):  # the process has ended, which `events` reports
            self._input.write(b"%d\n" % images)

    def events(self, seconds: float) -> list[dict[str, Any]]:
        """New events, after a wait of up to `seconds` for the first event. Sets `ended` if the process has ended."""
        select.select([self._output], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._output.fileno(), 2**16):
                self._partial_line += chunk
            self.ended = True
        *lines, self._partial_line = self._partial_line.split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        with self._process:  # closes the pipes and waits for the end
            self._process.kill()


def _start_worker(stdin: int, **request: Any) -> subprocess.Popen[bytes]:
    """Start mirror_worker.py from the copy of the package that this process uses."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-m", "dist_t2i.checkpoint.mirror_worker", json.dumps({"parent": os.getpid(), **request})]
    # Without PYTHONSAFEPATH, the working folder would precede PYTHONPATH.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    with signals_blocked():
        return subprocess.Popen(words, stdin=stdin, stdout=subprocess.PIPE, env=environment, bufsize=0)


def _warn(message: str) -> None:
    print(f"warning: {message}", flush=True)
