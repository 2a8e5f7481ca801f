"""The processes that a training run starts to access its mirror: `python -m dist_t2i.checkpoint.mirror_worker REQUEST`.

REQUEST is a JSON object: `command` (look, fetch or follow), `parent` (the PID of the training process) and the
arguments of the function with the command's name. The output is one JSON object per line. Clients of object stores run
threads, so the training process, which forks loader workers later, must not have such clients. tools/mirror.py calls
`answer` directly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from dist_t2i.checkpoint.mirror_store import LOOK_SECONDS, PAUSES, Damaged, MirrorStore, Refused, Unreachable
from dist_t2i.checkpoint.store import Retention, open_checkpoint
from dist_t2i.errors import CheckpointError, UserError
from dist_t2i.storage.retries import pauses
from dist_t2i.utils.processes import end_with, ignore_stop_signals


def look(url: str, patience: float) -> dict[str, Any]:
    """The content of the mirror, as a dictionary with the keys `identity`, `strange` and `images`.

    If the mirror has no config.yaml, `identity` is None, and `strange` lists reasons why the mirror cannot be used.
    `images` lists the checkpoints, newest first.

    Raises Unreachable after `patience` seconds without an answer, and UserError when the URL cannot be used.
    """
    store = MirrorStore(url, patience, LOOK_SECONDS)
    identity = store.identity()
    return {
        "identity": dataclasses.asdict(identity) if identity else None,
        "strange": [] if identity else store.unidentified(),
        "images": store.newest(),
    }


def fetch(url: str, images: int, folder: str | Path, patience: float, *, check: bool = True) -> dict[str, Any]:
    """Download a checkpoint, and verify it if `check`. Raises CheckpointError, OSError, Unreachable and UserError."""
    MirrorStore(url, patience).fetch(images, Path(folder))
    if check:
        open_checkpoint(Path(folder))
    return {}


def answer(command: str, **arguments: Any) -> dict[str, Any]:
    """The result of `look` or `fetch`, or the reason of a failure under `unreachable`, `damaged` or `mistake`."""
    try:
        return (look if command == "look" else fetch)(**arguments)
    except Unreachable as error:
        return {"unreachable": str(error)}
    except CheckpointError as error:
        return {"damaged": str(error)}
    except UserError as error:
        return {"mistake": str(error)}
    except OSError as error:  # an error on this machine, such as a full disk
        return {"mistake": f"{error.filename or arguments['url']}: {error.strerror or error}"}


def follow(url: str, run: str, keep_last: int, keep_every_images: int, damaged: list[int], allow_changes: bool) -> None:
    """Upload the checkpoints that stdin requests, one number of images seen per line, until stdin ends.

    If several requests wait, only the newest checkpoint is uploaded. A failed upload is retried until it succeeds.
    Prints the events `uploaded`, `skipped`, `refused`, `failing` (at the first failure) and `works` (at the next
    success).
    """
    store, keep = MirrorStore(url), Retention(keep_last, keep_every_images)
    requests: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_read, args=[requests], daemon=True).start()
    images: int | None = None
    acquired, failing, waits = False, False, pauses(*PAUSES)
    while True:
        try:
            if not acquired:
                store.acquire(Path(run), damaged=damaged, allow_changes=allow_changes)
                acquired = True
            while images is None or not requests.empty():
                images = requests.get()
            with contextlib.suppress(FileNotFoundError):  # retention deleted the checkpoint; a newer request follows
                store.push(Path(run), images, keep)
            if failing:
                _emit("works")
            failing, waits = False, pauses(*PAUSES)
            _emit("uploaded", images=images)
            images = None
        except Damaged as error:
            _emit("skipped", images=images, problem=str(error))
            images = None
        except (Refused, UserError) as error:
            _emit("refused", problem=str(error))
            return
        except (Unreachable, OSError) as error:
            if not failing:
                _emit("failing", problem=str(error))
            failing = True
            time.sleep(next(waits))


def _read(requests: SimpleQueue[int]) -> None:
    for line in sys.stdin:
        requests.put(int(line))
    os._exit(0)  # stdin ends when the parent ends


def _emit(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


def main() -> None:
    """Serve the request in the first argument."""
    request = json.loads(sys.argv[1])
    command = request.pop("command")
    end_with(request.pop("parent"))
    ignore_stop_signals()
    os.nice(10)  # training has priority
    if command == "follow":
        follow(**request)
    else:
        print(json.dumps(answer(command, **request)), flush=True)


if __name__ == "__main__":
    main()
