"""Cluster profiles: the options of sbatch that a Slurm cluster needs, as YAML.

The keys and their defaults are the fields of `Profile`. Command-line options replace a profile's values. Texts may
contain environment variables (`/scratch/$USER/$SLURM_JOB_ID`); the job replaces them with their values.
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
    """An image in which the ranks run. Its mounts must contain the run folder, the code and the data."""

    runtime: Literal["pyxis", "apptainer"] = "apptainer"
    image: str = ""
    mounts: tuple[str, ...] = ()
    """`OUTSIDE:INSIDE`, or one path for both."""
    python: str = "python3"
    """Python inside the image."""


@dataclass(frozen=True)
class Profile:
    """Options of a cluster. An empty text or 0 means the default of the cluster."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = "24h"
    """Time limit of one attempt: `90m`, `24h`, `2d`, or Slurm's form in quotes: `"12:00:00"`, `"1-12"`."""
    gpus_per_node: int = 0
    tasks_per_node: int = 0
    """Ranks per node; 0 means one rank per GPU, or one rank on nodes without GPUs."""
    cpus_per_task: int = 0
    memory_gb: int = 0
    """Memory of a node."""
    constraint: str = ""
    exclude: str = ""
    """Nodes that the job must not use."""
    exclusive: bool = False
    signal_seconds: int = 120
    """Seconds between the signal to save and the time limit. They must suffice for a step, for saving, and for half a
    minute more."""
    modules: tuple[str, ...] = ()
    """Arguments of `module load`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job."""
    interface: str = ""
    """Network interface of NCCL and gloo, such as `ib0`."""
    scratch: str = ""
    """Folder on each node's local disk, for the shard cache."""
    python: str = ""
    """Python on the nodes; empty: the Python that submits the job. With a container, this Python (3.7 or newer; empty:
    `python3`) runs only after.py, outside of the image.
    """
    container: Container = field(default_factory=Container)
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch by name, such as `mail-type: FAIL`."""
    srun: tuple[str, ...] = ()
    """Further options of srun."""


def load(path: Path) -> Profile:
    """Read and check a profile. Raises ConfigError, which names every problem."""
    try:
        profile = from_plain(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        known = sorted(str(file) for file in (Path(__file__).parent / "profiles").glob("*.yaml"))
        raise ConfigError(f"no profile {path}; the project has {', '.join(known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the profile {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the profile {path} is not YAML: {' '.join(str(error).split())}") from None
    return check(profile, str(path))


def from_plain(values: Any, origin: str = "the profile of the run") -> Profile:
    """A profile from parsed YAML, or from the JSON of `dataclasses.asdict(profile)`. Raises ConfigError."""
    problems: list[str] = []
    profile = read_section({} if values is None else values, Profile, "", problems, "a profile")
    _refuse(problems, origin)
    return profile


def _refuse(problems: list[str], origin: str) -> None:
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{origin}: {count}\n" + "\n".join(f"  {line}" for line in problems), problems)


def check(profile: Profile, origin: str = "the profile") -> Profile:
    """Returns the profile if its values are valid. Raises ConfigError, which names every problem."""
    problems = []
    try:
        minutes(profile.time)
    except ConfigError as error:
        problems.append(f"time: {error}")
    if profile.signal_seconds < 10:
        problems.append(f"signal_seconds: must be at least 10, is {profile.signal_seconds}: a run needs time to save")
    for name in ("gpus_per_node", "tasks_per_node", "cpus_per_task", "memory_gb"):
        if getattr(profile, name) < 0:
            problems.append(f"{name}: must be at least 0, is {getattr(profile, name)}")
    for name in profile.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(f"environment.{name}: not the name of an environment variable")
    if profile.container.mounts and not profile.container.image:
        problems.append("container.mounts: set, but there is no container.image")
    _refuse(problems, origin)
    return profile


_TIMES = (
    r"(?P<m>\d+)",
    r"(?=.)(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?",
    r"(?P<d>\d+)-(?P<h>\d+)(?::(?P<m>\d{1,2}))?(?::(?P<s>\d{1,2}))?",
    r"(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d{1,2})",
)
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def minutes(text: str) -> int:
    """A time limit in minutes, rounded up. Raises ConfigError.

    `90m`, `24h`, `2d`, `1d12h`, or one of Slurm's forms: minutes, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM`, `D-HH:MM:SS`.
    """
    match = next(filter(None, (re.fullmatch(form, text.strip()) for form in _TIMES)), None)
    if match is None:
        raise ConfigError(f"{text!r} is not a time: write 90m, 24h, 2d, or 1-12:00:00")
    seconds = sum(int(number or 0) * _SECONDS[unit] for unit, number in match.groupdict().items())
    if seconds <= 0:
        raise ConfigError(f"{text!r}: a job needs at least a minute")
    return -(-seconds // 60)
