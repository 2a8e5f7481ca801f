"""Cluster profiles: what a Slurm cluster wants to be asked, as YAML, so that a submission is one short line.

Keys and their defaults are the fields of `Profile`. Command-line options go before a profile's values. Texts may name
environment variables of the job (`/scratch/$USER/$SLURM_JOB_ID`); they are filled in where the job runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dist_t2i.config.files import read_section
from dist_t2i.errors import ConfigError


@dataclass(frozen=True)
class Container:
    """An image in which the ranks run. Run folder, code and data must be where its mounts show them."""

    runtime: Literal["pyxis", "apptainer"] = "apptainer"
    image: str = ""
    mounts: tuple[str, ...] = ()
    """`OUTSIDE:INSIDE`, or a path that is the same on both sides."""
    python: str = "python3"
    """Python within the image."""


@dataclass(frozen=True)
class Profile:
    """What a cluster wants. Empty and 0 mean: not asked for, the cluster's own default holds."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = "24h"
    """Time limit of one attempt: `90m`, `24h`, `2d`, or as Slurm takes it, in quotes: `"12:00:00"`, `"1-12"`."""
    gpus_per_node: int = 0
    tasks_per_node: int = 0
    """Ranks per node; 0: one per GPU, or one."""
    cpus_per_task: int = 0
    memory_gb: int = 0
    """Of a node."""
    constraint: str = ""
    exclude: str = ""
    """Nodes to stay away from."""
    exclusive: bool = False
    signal_seconds: int = 120
    """How long before the time limit the job is told to save; at least a step, a checkpoint and half a minute."""
    modules: tuple[str, ...] = ()
    """For `module load`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job."""
    interface: str = ""
    """Network interface of NCCL and gloo, such as `ib0`."""
    scratch: str = ""
    """Folder on each node's own disk, for the shard cache."""
    python: str = ""
    """Python of the environment on the nodes; empty: the one that submits. With a container it only runs what decides at
    the end, outside of the image: 3.7 or newer; empty: `python3`."""
    container: Container = field(default_factory=Container)
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch by name, such as `mail-type: FAIL`."""
    srun: tuple[str, ...] = ()
    """Further options of srun."""


def load(path: Path) -> Profile:
    """A checked profile. Raises ConfigError that names every problem."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = sorted(str(near) for near in (Path(__file__).parent / "profiles").glob("*.yaml"))
        raise ConfigError(f"no profile {path}; those that come along: {', '.join(known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the profile {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the profile {path} is not YAML: {' '.join(str(error).split())}") from None
    problems: list[str] = []
    profile = read_section({} if found is None else found, Profile, "", problems, "a profile")
    if problems:
        raise _error(str(path), problems)
    return check(profile, str(path))


def from_plain(found: dict[str, Any]) -> Profile:
    """A profile from what `dataclasses.asdict` made of one, through JSON. Raises ConfigError."""
    problems: list[str] = []
    profile = read_section(found, Profile, "", problems, "a profile")
    if problems:
        raise ConfigError("the profile of the run cannot be read: " + "; ".join(problems), problems)
    return profile


def check(profile: Profile, source: str = "the profile") -> Profile:
    """The profile, if its values can be. Raises ConfigError that names every problem."""
    if problems := _contradictions(profile):
        raise _error(source, problems)
    return profile


def _error(source: str, problems: list[str]) -> ConfigError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in problems), problems)


def _contradictions(profile: Profile) -> list[str]:
    problems = []
    try:
        minutes(profile.time)
    except ConfigError as error:
        problems.append(f"time: {error}")
    if profile.signal_seconds < 10:
        problems.append(f"signal_seconds: at least 10, is {profile.signal_seconds}: saving takes a while")
    for name in ("gpus_per_node", "tasks_per_node", "cpus_per_task", "memory_gb"):
        if getattr(profile, name) < 0:
            problems.append(f"{name}: at least 0, is {getattr(profile, name)}")
    for name in profile.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(f"environment.{name}: not the name of an environment variable")
    if profile.container.mounts and not profile.container.image:
        problems.append("container.mounts: set, but there is no container.image")
    return problems


def minutes(text: str) -> int:
    """A time limit in minutes, rounded up: `90m`, `24h`, `2d`, `1d12h`, or as Slurm takes it: a number of minutes, `MM:SS`,
    `HH:MM:SS`, `D-HH`, `D-HH:MM`, `D-HH:MM:SS`. Raises ConfigError."""
    text = text.strip()
    units = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", text)
    slurm = re.fullmatch(r"(\d+)-(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?|(?:(\d+):)?(\d+):(\d{1,2})", text)
    if text.isdecimal():
        found = int(text)
    elif units and text:
        days, hours, rest = (int(part or 0) for part in units.groups())
        found = days * 1440 + hours * 60 + rest
    elif slurm:
        days, hours, rest, seconds, *short = (int(part or 0) for part in slurm.groups())
        if not slurm[1]:
            hours, rest, seconds = short
        found = days * 1440 + hours * 60 + rest + -(-seconds // 60)
    else:
        raise ConfigError(f"{text!r} is not a time: write 90m, 24h, 2d, or 1-12:00:00")
    if found <= 0:
        raise ConfigError(f"{text!r}: a job needs at least a minute")
    return found
