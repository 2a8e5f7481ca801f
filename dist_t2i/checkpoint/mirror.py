"""A run's mirror as the training sees it: looked at and restored from at the start, offered each checkpoint after that.

Only rank 0 has one; on the others, and where `checkpoint.mirror` is empty, the same calls do nothing. Everything that
touches the mirror happens in a process of its own (`mirror.py`), which takes no stop signals, ends with this one and
never makes a step wait. A mirror that fails is a warning. The exceptions are at the start, when there is nothing to lose:
another run's mirror is refused, and so is one that cannot be read while the run folder has no checkpoint to go on from.
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
from functools import partial
from pathlib import Path
from typing import Any

from dist_t2i.checkpoint import store
from dist_t2i.checkpoint.lease import Claim
from dist_t2i.checkpoint.mirror_store import RECORD_FILES, RECORDS, Identity, strangers, without_records
from dist_t2i.config.sections import Config
from dist_t2i.distributed.preemption import StopFlag
from dist_t2i.errors import CheckpointError, ExitStatus, UserError
from dist_t2i.reporting.reporter import Reporter
from dist_t2i.storage.folders import open_folder
from dist_t2i.utils.files import write_atomic
from dist_t2i.utils.processes import signals_blocked

FINISH_SECONDS = 600.0
"""How long a finished run waits for its last upload."""
STOP_SECONDS = 5.0
"""How long a stopped run does: what is missing then goes up at the next start."""
_GLANCE = 15.0
"""How long a mirror may not answer at the start of a run that has checkpoints of its own; else `data.retry_seconds`."""


class Mirroring:
    """Call `look`, then `restore`, `offer` after every commit, `tell` now and then, `finish` at the end."""

    def __init__(self, config: Config, reporter: Reporter, *, main: bool, allow_changes: bool = False) -> None:
        self.url = config.checkpoint.mirror if main else ""
        self._config, self._folder, self._allow_changes = config, Path(config.run.folder), allow_changes
        self._say, self._warn = reporter.say, reporter.warn
        self._images: list[int] = []
        self._damaged: list[int] = []
        self._intact: int | None = None
        self._uploader: _Uploader | None = None
        self._offered: int | None = None
        self._uploaded: int | None = None
        self._refused = False

    # ---- at the start ------------------------------------------------------------------------------------------------

    def look(self, fingerprint: str) -> None:
        """See what the mirror has; writes nothing, not even to the log. `fingerprint` is the data set's.

        Raises CheckpointError when it is another run's, or not to be read while the run folder has no checkpoint.
        """
        if not self.url:
            return
        self._refuse_inside()
        own = bool(store.committed(self._folder))
        patience = self._config.data.retry_seconds
        found = self._ask("look", self.url, patience=min(patience, _GLANCE) if own else patience)
        if "unreachable" in found:
            if not own:
                raise CheckpointError(_unreachable(self.url, found["unreachable"]))
            _warn(f"the mirror {self.url} cannot be read; going on with the run folder alone: {found['unreachable']}")
            return
        identity = Identity(**found["identity"]) if found["identity"] else None
        strange = identity.strange_to(self._config, fingerprint) if identity else found["strange"]
        if strange:
            if not self._allow_changes:
                raise CheckpointError(strangers(self.url, strange))
            _warn(f"going on although the mirror {self.url} is another run's: " + "; ".join(strange))
        self._images = found["images"]

    def restore(self, claim: Claim | None) -> None:
        """Under the run's claim, bring the newest whole checkpoint here if the run folder has none as new; a damaged one is passed over.

        Raises CheckpointError when there are some, none of them whole, and none here.
        """
        if claim is None:
            return
        for images in self._images:
            own = self._own_intact()
            if own >= images:
                return
            have = f"has only older checkpoints (to {own:,} images)" if own >= 0 else "has no intact checkpoint"
            self._say(f"{self._folder} {have}: fetching the one at {images:,} images from {self.url}")
            try:
                store.adopt(claim, images, partial(self._fetch, images))
                return
            except _Damaged as error:
                self._damaged.append(images)
                self._warn(f"mirrored checkpoint passed over: {error}")
            except _Unreachable as error:
                if own < 0:
                    raise CheckpointError(_unreachable(self.url, str(error))) from error
                self._warn(f"the mirror {self.url} cannot be read; going on with the run folder alone: {error}")
                return
        if self._images and self._own_intact() < 0:
            raise CheckpointError(
                f"none of the {len(self._images)} checkpoints looked at in {self.url} is whole, and {self._folder} has none.\n"
                "To begin again, name another mirror (checkpoint.mirror=...)."
            )

    def _own_intact(self) -> int:
        """Images seen of the newest intact checkpoint in the run folder, -1 when there is none."""
        if self._intact is None:
            self._intact = -1
            for folder in reversed(store.committed(self._folder)):
                with contextlib.suppress(CheckpointError):
                    self._intact = store.open_checkpoint(folder).images
                    break
        return self._intact

    def _fetch(self, images: int, staging: Path) -> None:
        """A mirrored checkpoint into `staging`, checked, and the run's records of then into the run folder."""
        answer = self._ask("fetch", self.url, str(images), str(staging), patience=self._config.data.retry_seconds)
        if "unreachable" in answer:
            raise _Unreachable(answer["unreachable"])
        if "damaged" in answer:
            raise _Damaged(answer["damaged"])
        try:
            if store.open_checkpoint(staging).images != images:
                raise CheckpointError(f"{staging / store.STATE}: damaged, it is not of {images:,} images.")
        except CheckpointError as error:
            raise _Damaged(
                str(error).replace(str(staging), f"{self.url}/checkpoints/{store.folder_name(images)}")
            ) from error
        for name in RECORD_FILES:
            if (record := staging / RECORDS / name).exists():
                write_atomic(self._folder / name, record.read_text(encoding="utf-8", errors="replace"))
        shutil.rmtree(staging / RECORDS, ignore_errors=True)
        marker = without_records((staging / store.STATE).read_bytes())
        (staging / store.STATE).write_bytes(store.seal(marker))

    def _refuse_inside(self) -> None:
        place, own = open_folder(self.url).path, self._folder.resolve()
        if place is not None and (place.resolve() == own or own in place.resolve().parents):
            raise CheckpointError(
                f"checkpoint.mirror: {self.url} lies in the run folder {self._folder} and would be lost with it: "
                "name a place on another disk or in object storage"
            )

    def _ask(self, command: str, *arguments: str, patience: float) -> dict[str, Any]:
        """The answer of a process that does one thing. Raises UserError for what the mirror's URL cannot do."""
        words = _program(command, *arguments, "--patience", str(patience))
        with signals_blocked():
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=_environment())
        output, _ = process.communicate()
        try:
            answer = json.loads(output)
        except ValueError:
            return {"unreachable": f"its process ended with status {process.returncode}"}
        if "mistake" in answer:
            raise CheckpointError(f"checkpoint.mirror: {answer['mistake']}")
        return answer

    # ---- while training ----------------------------------------------------------------------------------------------

    def offer(self, images: int | None) -> None:
        """The checkpoint at `images` is committed: have it uploaded in the background. None only tells whose it is."""
        self._offered = images
        self.tell()  # whether the process is still there
        if not self.url or self._refused:
            return
        if self._uploader is None:
            keep = self._config.checkpoint
            flags = ["--keep-last", str(keep.keep_last), "--keep-every-images", str(keep.keep_every_images)]
            flags += ["--damaged", *map(str, self._damaged)] + ["--allow-changes"] * self._allow_changes
            self._uploader = _Uploader(_program("follow", self.url, str(self._folder), *flags))
        if images is not None:
            self._uploader.want(images)

    def tell(self, seconds: float = 0.0) -> None:
        """Say what has become of uploads; waits at most `seconds` for news."""
        if self._uploader is None:
            return
        for event in self._uploader.events(seconds):
            kind, problem = event["event"], event.get("problem", "")
            if kind == "failing":
                self._warn(f"the mirror {self.url} fails: {problem} Training goes on; uploads are tried again.")
            elif kind == "works":
                self._say(f"the mirror {self.url} works again")
            elif kind == "refused":
                self._refused = True
                self._warn(f"{problem}\nTraining goes on without a mirror.")
            elif kind == "skipped":
                self._warn(f"not mirrored: {problem}")
            if kind in ("uploaded", "skipped"):
                self._uploaded = event["images"]
        if self._uploader.ended:
            if not self._refused:
                self._warn("the mirror's process has ended; the next checkpoint starts another")
            self._uploader.close()
            self._uploader = None

    @property
    def waiting(self) -> bool:
        """Whether the newest checkpoint is not in the mirror yet."""
        return bool(self.url) and not self._refused and self._uploaded != self._offered

    def finish(self, status: int, stop: StopFlag) -> None:
        """Wait for the last upload: a finished run until it is done, at most `FINISH_SECONDS`; a stopped one a moment."""
        finished = status == ExitStatus.FINISHED
        limit = FINISH_SECONDS if finished else STOP_SECONDS
        deadline = time.monotonic() + limit
        self.tell(0.5 if self.waiting else 0.0)
        if self.waiting and finished:
            self._say(
                f"waiting for {self.url} to have the checkpoint at {self._offered:,} images, at most {limit / 60:.0f} "
                "minutes; Ctrl-C ends the wait"
            )
        while self.waiting and self._uploader and time.monotonic() < deadline and not (finished and stop.requested):
            self.tell(0.25)
        if self.waiting:
            self._warn(f"{self.url} lacks the checkpoint at {self._offered:,} images: the same command brings it there")
        self.close()

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._uploader is not None:
            self._uploader.close()
            self._uploader = None


class _Damaged(UserError):
    """This one cannot be used, another may."""


class _Unreachable(UserError):
    """The mirror does not answer."""


class _Uploader:
    """A `follow` process of mirror.py, and the pipes to it. Main thread only: it ends with the thread that starts it."""

    def __init__(self, words: list[str]) -> None:
        with signals_blocked():
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(), bufsize=0
            )
        assert self._process.stdout is not None
        self._output, self._left, self.ended = self._process.stdout.fileno(), b"", False
        os.set_blocking(self._output, False)

    def want(self, images: int) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: `events` will tell
            self._process.stdin.write(b"%d\n" % images)

    def events(self, seconds: float) -> list[dict[str, Any]]:
        """What it has said since the last time; waits at most `seconds` for the first."""
        select.select([self._output], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._output, 2**16):
                self._left += chunk
            self.ended = True
        *lines, self._left = self._left.split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _program(command: str, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "dist_t2i.checkpoint.mirror_worker",
        command,
        *arguments,
        "--parent",
        str(os.getpid()),
    ]


def _environment() -> dict[str, str]:
    """This process's, so that the package is found from where it was found here."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}  # not the working folder's, which comes first else


def _warn(message: str) -> None:
    print(f"warning: {message}", flush=True)


def _unreachable(url: str, problem: str) -> str:
    return (
        f"the mirror {url} cannot be read, and the run folder has no checkpoint, so it cannot be told where to begin: "
        f"{problem}\nMend that, or begin without it (checkpoint.mirror=)."
    )
