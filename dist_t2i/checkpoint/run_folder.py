"""The folder of a run: what belongs to it before the first step, and whether it may go on with this configuration.

    RUN/config.yaml         the resolved configuration
    RUN/environment.json    versions, git revision, hardware, and the data's fingerprint
    RUN/tokenizer.json      the set's, so that a run can be used without its data

See report.py and checkpoint.py for what training adds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dist_t2i.checkpoint import store
from dist_t2i.checkpoint.lease import Claim, claim
from dist_t2i.config import files as config_files
from dist_t2i.config.resume import refuse_changes
from dist_t2i.config.sections import Config
from dist_t2i.errors import CheckpointError, UserError
from dist_t2i.utils import environment
from dist_t2i.utils.files import write_atomic

if TYPE_CHECKING:
    from dist_t2i.data.shard_set import ShardSet


def prepare(folder: Path, config: Config, data: ShardSet, *, allow_changes: bool, warn: Callable[[str], None]) -> Claim:
    """Make the folder, or check that the one that is there is a run of the same kind, and claim it; rank 0 only.

    Raises ConfigError when the run was begun with another configuration that gives another result, and CheckpointError
    for another data set, unless `allow_changes`; UserError when the folder cannot be written, or when the run is being
    trained by another process of this machine. A running one is left in peace by all of these.
    """
    try:
        if (folder / "config.yaml").exists():
            _check_same_run(folder, config, data, allow_changes, warn)
        mine = claim(store.folder_of(folder), say=warn)
        described = environment.describe() | {"data": {"path": str(data.folder), "fingerprint": data.fingerprint}}
        write_atomic(folder / "environment.json", json.dumps(described, indent=1) + "\n")
        write_atomic(folder / "tokenizer.json", data.tokenizer.text)
        write_atomic(folder / "config.yaml", config_files.dump(config))
        return mine
    except OSError as error:
        raise UserError(
            f"the run folder {folder} cannot be written: {error.strerror or error}.\n"
            "Choose another with run.folder=..., or mend its permissions or free space."
        ) from error


def _check_same_run(
    folder: Path, config: Config, data: ShardSet, allow_changes: bool, warn: Callable[[str], None]
) -> None:
    before = config_files.load(folder / "config.yaml", [])
    for line in refuse_changes(before, config, allow=allow_changes):
        warn(f"going on with another configuration: {line}")
    known = fingerprint_of(folder)
    if known is not None and known != data.fingerprint:
        message = f"{data.folder} is not the set that the run {folder} was begun with (its fingerprint differs)"
        if not allow_changes:
            raise CheckpointError(
                f"{message}.\nGive the old one (data.train=...), start another run (run.folder=...), or go on with "
                "--allow-changes."
            )
        warn(message)


def fingerprint_of(folder: Path) -> str | None:
    """Of the set that a run was begun with; None where an attempt was killed before it wrote that."""
    try:
        return json.loads((folder / "environment.json").read_text(encoding="utf-8"))["data"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cut_bad_samples(file: Path, images: int) -> None:
    """Drop the records of bad_samples.jsonl beyond `images` seen: they come again; rank 0 only."""
    if file.exists():
        write_atomic(file, bad_samples_before(file, images))


def bad_samples_before(file: Path, images: int) -> str:
    """The records of bad_samples.jsonl up to `images` seen, as they stand there."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if line.endswith("\n") and json.loads(line)["position"] < images)
