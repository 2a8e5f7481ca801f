"""Prepares the run folder before the first step: checks that the run may continue, and writes these files:

    RUN/config.yaml         the resolved configuration
    RUN/environment.json    versions, git revision, hardware, and the data set's fingerprint
    RUN/tokenizer.json      the data set's tokenizer, so that the run can be used without its data; after a start from
                            a model, the model's tokenizer with the tokens of the data set added

reporting/reporter.py and checkpoint/store.py list the files that training adds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from dist_t2i.checkpoint import divergence, store
from dist_t2i.checkpoint.lease import Lease, acquire
from dist_t2i.config import files as config_files
from dist_t2i.config.resume import refuse_changes
from dist_t2i.errors import CheckpointError, UserError
from dist_t2i.utils import environment
from dist_t2i.utils.files import remove_abandoned, write_atomic


def prepare(
    folder: Path, config: str, data: dict[str, str], *, allow_changes: bool, warn: Callable[[str], None]
) -> Lease:
    """Create the run folder, or check that it belongs to this run, and acquire its lease. Rank 0 only.

    `config` is the text for config.yaml; `data` has the set's `path` and `fingerprint`. Raises ConfigError if the
    configuration at the start of the run gives another result, and CheckpointError if the run began with another data
    set; with `allow_changes`, both errors are warnings. Raises DivergedError if a divergence has stopped the run and
    nothing says how the run should continue. Raises UserError if the folder cannot be written, or if another process on
    this machine trains the run. Every UserError leaves the run unchanged.
    """
    try:
        if (folder / "config.yaml").exists():
            _check_same_run(folder, config, data, allow_changes, warn)
        lease = acquire(store.folder_of(folder), say=warn)
        remove_abandoned(folder)
        described = environment.describe() | {"data": data}
        write_atomic(folder / "environment.json", json.dumps(described, indent=1) + "\n")
        write_atomic(folder / "config.yaml", config)
        return lease
    except OSError as error:
        raise UserError(
            f"the run folder {folder} cannot be written: {error.strerror or error}.\n"
            "Choose another folder with run.folder=..., correct the permissions, or free some space."
        ) from error


def record(folder: Path, config: str, tokenizer: str) -> None:
    """Write the texts of config.yaml and tokenizer.json; rank 0 only. Raises UserError when they cannot be written."""
    try:
        write_atomic(folder / "tokenizer.json", tokenizer)
        write_atomic(folder / "config.yaml", config)
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be written: {error.strerror or error}") from error


def _check_same_run(
    folder: Path, config: str, data: dict[str, str], allow_changes: bool, warn: Callable[[str], None]
) -> None:
    before, now = config_files.load(folder / "config.yaml", []), config_files.loads(config)
    divergence.refuse(folder, now.train.on_divergence, allow_changes=allow_changes)
    for line in refuse_changes(before, now, allow=allow_changes):
        warn(f"continuing with another configuration: {line}")
    known = fingerprint_of(folder)
    if known is not None and known != data["fingerprint"]:
        message = f"{data['path']} is not the set that the run {folder} began with (its fingerprint differs)"
        if not allow_changes:
            raise CheckpointError(
                f"{message}.\nUse the old set (data.train=...), start another run (run.folder=...), or continue with "
                "--allow-changes."
            )
        warn(message)


def fingerprint_of(folder: Path) -> str | None:
    """The fingerprint of the set with which a run began; None if the run folder does not record the fingerprint."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((folder / "environment.json").read_text(encoding="utf-8"))["data"]["fingerprint"]
    return None


def cut_bad_samples(file: Path, images: int) -> None:
    """Drop the records of bad_samples.jsonl from `images` seen on, because training will rewrite these; rank 0 only."""
    if file.exists():
        write_atomic(file, bad_samples_before(file, images))


def bad_samples_before(file: Path, images: int) -> str:
    """The complete lines of bad_samples.jsonl whose position is less than `images`, the number of images seen."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if line.endswith("\n") and json.loads(line)["position"] < images)
