"""The set and the configuration of a command line that names neither: scenes, which the project renders itself."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

from dist_t2i.errors import UserError
from dist_t2i.sharding.sources.scenes import ABOUT, scene_items
from dist_t2i.sharding.write_set import write_set
from dist_t2i.sharding.writing.prepare import Options
from dist_t2i.utils.processes import usable_cores

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SCENES = 20_000
"""Number of pictures in a set of scenes that a command writes on first use."""


def default_config(gpu: bool) -> Path:
    """The configuration of a command without --config, by whether it trains on a GPU. Raises UserError if the project's
    configurations are missing."""
    path = CONFIGS / f"scenes{64 if gpu else 32}.yaml"
    if not path.is_file():
        raise UserError(f"--config FILE is missing, and so is the default {path}")
    return path


def choice(path: Path, train: str | tuple[str, ...]) -> str:
    """The line that says what a command without --config trains, and how to choose otherwise."""
    return f"no --config: training {os.path.relpath(path)} on {train}; choose with --config FILE and data.train=DIR"


def write_missing(train: str | tuple[str, ...], size: int) -> None:
    """Writes the set of scenes with pictures of `size` pixels if `train` names that set and it does not exist yet.

    Several processes of a machine may call this function at the same time: one writes, the others wait.
    """
    folder = Path(f"data/scenes{size}")
    if train != str(folder) or (folder / "manifest.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "manifest.json").is_file():
            print(f"{folder}: rendering {SCENES:,} scenes of {size} px", file=sys.stderr, flush=True)
            options = Options(size=size, shard_samples=1_000, processes=usable_cores(), about=ABOUT)
            write_set(folder, scene_items(SCENES, size, seed=0), [], options)
