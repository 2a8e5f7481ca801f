"""Which keys may change when a run is resumed."""

from __future__ import annotations

from typing import Any

from dist_t2i.config.fields import build, flatten, keys
from dist_t2i.config.sections import Config
from dist_t2i.errors import ConfigError
from dist_t2i.utils.settings import Resume


def is_free(key: str, config: Config) -> bool:
    """Whether a run may resume with another value of `key` without a change of its result."""
    if key == "train.total_images":
        return config.optimizer.decay == "constant"  # with decay, the learning rates depend on this key
    return keys()[key].resume is Resume.FREE


def with_earlier_defaults(old: Config, new: Config) -> Config:
    """`new` with the defaults with which an earlier version started the run `old`.

    A key counts as not given if it has the present default. So a run of an earlier version resumes with the files and
    the command that started it.
    """
    was, now = flatten(old), flatten(new)
    present = flatten(build({"data.image_size": new.data.image_size}))  # some defaults depend on the size
    kept = {
        name: was[name]
        for name, key in keys().items()
        if now[name] == present[name] != was[name] and was[name] in (key.earlier, key.absent)
    }
    return build({**now, **kept})


def differences(old: Config, new: Config, *, free: bool = False) -> dict[str, tuple[Any, Any]]:
    """(old, new) by dotted key, for each changed key that alters the result, or with `free` for each that does not."""
    before, after = flatten(old), flatten(new)
    changed = [key for key in before if before[key] != after[key] and is_free(key, new) == free]
    return {key: (before[key], after[key]) for key in changed}


def refuse_changes(old: Config, new: Config, *, allow: bool = False, flag: str = "--allow-changes") -> list[str]:
    """One line for each changed key that alters the result. Raises `ConfigError` with these lines unless `allow`.

    Other networks or another optimizer are refused even with `allow`, because the checkpoint lacks their tensors.
    `flag` is the command-line option that sets `allow`.
    """
    changes = {key: f"{key}: was {was!r}, is now {now!r}" for key, (was, now) in differences(old, new).items()}
    lines = list(changes.values())
    fixed = [line for key, line in changes.items() if keys()[key].resume is Resume.FIXED]
    if fixed and allow:
        head = "the checkpoints of this run do not fit another network or optimizer:"
        tail = "Put the old values back, or start another run (run.folder=...)."
        raise ConfigError("\n  ".join([head, *fixed]) + f"\n{tail}", fixed)
    if lines and not allow:
        count = "1 key" if len(lines) == 1 else f"{len(lines)} keys"
        head = f"this run was started with another configuration; {count} would change its result:"
        tail = f"Put the old values back, start another run (run.folder=...), or continue anyway with {flag}."
        raise ConfigError("\n  ".join([head, *lines]) + f"\n{tail}", lines)
    return lines
