"""What a run records when its training diverges, and how it continues.

    state.json of a checkpoint    `divergences`: all divergences so far, oldest first
    RUN/diverged.json             what the next start needs, while the run is stopped by a divergence

A divergence is a dictionary: `at` and `since`, the images seen when training was found to have diverged and before the
first sign of it; `healthy`, the images seen at the last healthy checkpoint; `reason`, a line for people; `rewound`,
whether the run continued from there with half the learning rates. training/health.py finds divergences.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_t2i.checkpoint import store
from dist_t2i.checkpoint.lease import Lease
from dist_t2i.errors import CheckpointError, DivergedError
from dist_t2i.utils.files import read_json, write_atomic

FILE = "diverged.json"
REWINDS = 3
"""A run rewinds at most this many times."""

Divergences = Sequence[dict[str, Any]]


def rewinds(divergences: Divergences) -> int:
    """How often the run has rewound."""
    return sum(bool(divergence["rewound"]) for divergence in divergences)


def rate_scale(divergences: Divergences) -> float:
    """The factor on the configured learning rates: each rewind has halved them."""
    return 0.5 ** rewinds(divergences)


def may_rewind(divergences: Divergences) -> bool:
    """Whether the run may rewind once more."""
    return rewinds(divergences) < REWINDS


def rates(divergences: Divergences) -> str:
    """The learning rates after the rewinds so far, for people; "" before the first rewind."""
    count = rewinds(divergences)
    return (
        f"learning rates {rate_scale(divergences):g} times the configured ones (rewind {count} of {REWINDS})"
        if count
        else ""
    )


def stop(lease: Lease, run: Path, divergences: Divergences, text: str) -> tuple[store.Checkpoint | None, str]:
    """Make the last healthy checkpoint the newest one of the run, and write diverged.json.

    Returns this checkpoint, if there is one, and `text`, which describes the divergence, with what a person can do now.
    Rank 0 only. Raises Superseded.
    """
    latest = None
    try:
        latest = store.rewind(lease, [divergences[-1]["healthy"]], {"divergences": divergences})
        where = (
            f"Last healthy checkpoint: {latest.folder}; later ones are deleted"
            if latest
            else "There is no healthy checkpoint"
        )
    except CheckpointError as error:
        where = f"The last healthy checkpoint is not the newest one yet: {error}"
    rewind = f", or set train.on_divergence=rewind (half the learning rates, up to {REWINDS} times)"
    message = (
        f"{text}\n  {where}.\n  To continue {'from it' if latest else 'from the beginning'}, change these keys and add "
        f"--allow-changes{rewind if may_rewind(divergences) else ''}.\n"
        "  If the pictures look right, set train.on_divergence=warn."
    )
    with contextlib.suppress(OSError):  # a full disk: without this file, the next start repeats the divergence
        write_atomic(run / FILE, json.dumps({"message": message, "divergences": divergences}, indent=1) + "\n")
    return latest, message


def stopped(run: Path) -> bool:
    """Whether the run is stopped by a divergence."""
    return bool(read_json(run / FILE))


def refuse(run: Path, on_divergence: str, *, allow_changes: bool) -> None:
    """Raise DivergedError if the run is stopped by a divergence and nothing says how it should continue."""
    record = read_json(run / FILE)
    if not record or allow_changes or on_divergence == "warn":
        return
    if on_divergence == "rewind" and may_rewind(record["divergences"]):
        return
    raise DivergedError(f"the same command would diverge again. {record['message']}")


def resume(lease: Lease, run: Path, on_divergence: str) -> list[dict[str, Any]]:
    """Go back to the last healthy checkpoint of a run that is stopped by a divergence; returns its divergences.

    With `rewind`, the last one then counts as rewound. Returns [] if the run is not stopped by a divergence. Rank 0 only;
    call `settle` once training begins. Raises CheckpointError and Superseded.
    """
    record = read_json(run / FILE)
    if not record:
        return []
    *earlier, last = record["divergences"]
    rewound = on_divergence == "rewind" and may_rewind(record["divergences"])
    divergences = [*earlier, {**last, "rewound": rewound}]
    store.rewind(lease, [last["healthy"]], {"divergences": divergences})
    return divergences


def settle(run: Path) -> None:
    """The run is no longer stopped by a divergence."""
    with contextlib.suppress(OSError):
        (run / FILE).unlink()
