"""Talks to the mirror of a run's checkpoints. See docs/checkpoints.md.

    python -m dist_t2i.checkpoint.mirror_worker look URL                    print the run it belongs to and its checkpoints
    python -m dist_t2i.checkpoint.mirror_worker fetch URL IMAGES FOLDER     download a checkpoint and compare its checksums
    python -m dist_t2i.checkpoint.mirror_worker follow URL RUN              upload checkpoints; a training run starts this

The output is JSON, an object a line. `follow` reads images seen from stdin, a line a checkpoint, uploads the newest of the
waiting checkpoints, retries until it succeeds, and ends with its input.
"""

# The training process starts these commands instead of calling them: it forks loader workers later, so it must not have
# clients of object stores, which run threads.

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dist_t2i.checkpoint.mirror_store import LOOK_SECONDS, PAUSES, LocalDamage, MirrorStore, Refused, Unreachable
from dist_t2i.checkpoint.store import Retention, open_checkpoint
from dist_t2i.errors import CheckpointError, UserError
from dist_t2i.storage.retries import pauses
from dist_t2i.utils.processes import end_with, ignore_stop_signals


def look(url: str, patience: float) -> dict[str, Any]:
    """The mirror's `identity` (None without one), why it is `strange` without an identity, and `images` (newest first).

    Raises Unreachable after `patience` seconds without an answer, and UserError when the URL cannot be used.
    """
    store = MirrorStore(url, patience, LOOK_SECONDS)
    identity = store.identity()
    return {
        "identity": dataclasses.asdict(identity) if identity else None,
        "strange": [] if identity else store.unidentified(),
        "images": store.newest(),
    }


def fetch(url: str, images: int, folder: Path, patience: float, *, check: bool) -> dict[str, Any]:
    """Download a checkpoint; the result is empty, or `damaged` says why the checkpoint cannot be used.

    `check` compares checksums; a training run does that itself. Raises as `look` does, and OSError.
    """
    try:
        MirrorStore(url, patience).fetch(images, folder)
        if check:
            open_checkpoint(folder)
    except CheckpointError as error:
        return {"damaged": str(error)}
    return {}


def follow(url: str, run: Path, keep: Retention, damaged: list[int], *, allow_changes: bool) -> int:
    """Upload until stdin ends. Prints events: `uploaded`, `failing` and `works` (once each time), `refused`, `skipped`."""
    store, requests, failing = MirrorStore(url), _Requests(), False
    acquired, waits = False, pauses(*PAUSES)
    while True:
        try:
            if not acquired:
                store.acquire(run, damaged=damaged, allow_changes=allow_changes)
                acquired = True
            images = requests.newest()
            with contextlib.suppress(FileNotFoundError):  # retention deleted it: a newer one will be requested
                store.push(run, images, keep)
            requests.done(images)
            if failing:
                _emit("works")
            failing, waits = False, pauses(*PAUSES)
            _emit("uploaded", images=images)
        except LocalDamage as error:
            requests.done(images)
            _emit("skipped", images=images, problem=str(error))
        except (Refused, UserError) as error:
            _emit("refused", problem=str(error))
            return 0
        except (Unreachable, OSError) as error:
            if not failing:
                _emit("failing", problem=str(error))
            failing = True
            time.sleep(next(waits))


class _Requests:
    """The newest checkpoint requested on stdin. The process ends with its input: its parent has ended."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._images: int | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def newest(self) -> int:
        """Images seen of the checkpoint to upload; waits for a request."""
        with self._changed:
            self._changed.wait_for(lambda: self._images is not None)
            assert self._images is not None
            return self._images

    def done(self, images: int) -> None:
        """Forget the request for `images`, unless a newer one has replaced it."""
        with self._changed:
            if self._images == images:
                self._images = None

    def _read(self) -> None:
        for line in sys.stdin:
            with self._changed:
                self._images = int(line)
                self._changed.notify()
        os._exit(0)


def _emit(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="mirror", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("look", "fetch", "follow"):
        command = commands.add_parser(name)
        command.add_argument("url")
        command.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
        command.add_argument("--patience", type=float, default=30.0, help="seconds that the mirror may not answer")
        if name == "fetch":
            command.add_argument("images", type=int)
            command.add_argument("folder", type=Path)
        if name == "follow":
            command.add_argument("run", type=Path)
            command.add_argument("--keep-last", type=int, default=2)
            command.add_argument("--keep-every-images", type=int, default=0)
            command.add_argument(
                "--damaged", type=int, nargs="*", default=[], help="images seen of damaged checkpoints"
            )
            command.add_argument("--allow-changes", action="store_true")
    return parser.parse_args(arguments)


def main() -> int:
    """Returns the exit status: 0 unless this program is at fault."""
    options = parse()
    if options.parent:
        end_with(options.parent)
        ignore_stop_signals()
        os.nice(10)  # training has priority
    if options.command == "follow":
        keep = Retention(options.keep_last, options.keep_every_images)
        return follow(options.url, options.run, keep, options.damaged, allow_changes=options.allow_changes)
    print(json.dumps(answer(options)), flush=True)
    return 0


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """The answer to `look` or `fetch`; `unreachable` or `mistake` says why the mirror cannot be read."""
    try:
        if options.command == "look":
            return look(options.url, options.patience)
        return fetch(options.url, options.images, options.folder, options.patience, check=not options.parent)
    except Unreachable as error:
        return {"unreachable": str(error)}
    except UserError as error:
        return {"mistake": str(error)}
    except OSError as error:  # of this machine: a full disk
        return {"mistake": f"{error.filename or options.url}: {error.strerror or error}"}


if __name__ == "__main__":
    sys.exit(main())
