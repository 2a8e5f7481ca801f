"""Which keys may change when a run is resumed."""

from __future__ import annotations

from typing import Any

from dist_t2i.config.fields import flatten, keys
from dist_t2i.config.sections import Config
from dist_t2i.errors import ConfigError
from dist_t2i.utils.settings import Resume


def is_free(key: str, config: Config) -> bool:
    """Whether `key` may change on resume without changing what is trained.

    `train.total_images` may where no schedule reads it: with a constant learning rate. `engine.precision` may not:
    bf16 and fp32 runs part at once.
    """
    if key == "train.total_images":
        return config.optimizer.decay == "constant"
    return keys()[key].resume is Resume.FREE


def differences(old: Config, new: Config, *, free: bool = False) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) for the keys whose change alters the result; with `free`, for the others."""
    before, after = flatten(old), flatten(new)
    changed = [key for key in before if before[key] != after[key] and is_free(key, new) == free]
    return {key: (before[key], after[key]) for key in changed}


def refuse_changes(old: Config, new: Config, *, allow: bool = False, flag: str = "--allow-changes") -> list[str]:
    """Lines that name the changed keys. Raises `ConfigError` with them unless `allow`; `flag` is how a user allows.

    What is allowed, too, are not other networks or another optimizer: the checkpoint has no weights for them.
    """
    changes = {key: f"{key}: was {was!r}, is now {now!r}" for key, (was, now) in differences(old, new).items()}
    lines = list(changes.values())
    fixed = [line for key, line in changes.items() if keys()[key].resume is Resume.FIXED]
    if fixed and allow:
        raise ConfigError(
            "the checkpoints of this run do not fit another network or optimizer:\n  "
            + "\n  ".join(fixed)
            + "\nPut the old "
            "values back, or start another run (run.folder=...).",
            fixed,
        )
    if lines and not allow:
        listed = "".join(f"\n  {line}" for line in lines)
        count = "1 key" if len(lines) == 1 else f"{len(lines)} keys"
        raise ConfigError(
            f"this run was started with another configuration; {count} would change its result:{listed}\n"
            f"Put the old values back, start another run (run.folder=...), or go on regardless with {flag}.",
            lines,
        )
    return lines
