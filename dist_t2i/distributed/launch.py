"""One process per rank under any launcher: `deepspeed`, `torchrun`, `srun`, or plain `python` (one rank).

`prepare()` completes RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and the variables
that libraries read on import. Call `prepare` before the first import of torch or DeepSpeed, which launch.py avoids.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_t2i.errors import LaunchError
from dist_t2i.utils.processes import is_alive, usable_cores

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
Launcher = Literal["deepspeed", "torchrun", "srun", "plain"]


@dataclass(frozen=True)
class Rank:
    """The position of this process among the run's processes."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: Launcher


def prepare(environment: MutableMapping[str, str] | None = None) -> Rank:
    """Completes `environment` (default: that of this process) for one rank, and returns the rank.

    Raises LaunchError if the launcher set only some variables, or if the first node of a Slurm job has no address.
    """
    env = os.environ if environment is None else environment
    present = [name for name in _NEEDED if env.get(name)]
    if len(present) == len(_NEEDED):
        rank = _from_variables(env)
    elif present:
        missing = ", ".join(name for name in _NEEDED if name not in present)
        raise LaunchError(
            f"{', '.join(present)} set, but not {missing}: unset all of them for a single process, "
            "or start with deepspeed, torchrun or srun, which set all of them"
        )
    elif env.get("SLURM_PROCID") and env.get("SLURM_STEP_ID", "").isdigit():
        rank = _from_slurm(env)
    else:
        rank = Rank(0, 1, 0, 1, "plain")
    _complete(env, rank)
    _set_up_libraries(env, rank)
    return rank


def _from_variables(env: Mapping[str, str]) -> Rank:
    other: Launcher = "deepspeed" if env.get("CROSS_RANK") else "plain"  # only DeepSpeed's launcher sets CROSS_RANK
    launcher: Launcher = "torchrun" if env.get("TORCHELASTIC_RUN_ID") else other
    local_world = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"]
    position, world, local = (_integer(env, name) for name in _NEEDED)
    rank = Rank(position, world, local, int(local_world), launcher)
    if not 0 <= rank.rank < rank.world_size:
        raise LaunchError(f"RANK={rank.rank} is not below WORLD_SIZE={rank.world_size}")
    return rank


def _from_slurm(env: MutableMapping[str, str]) -> Rank:
    world, local = _integer(env, "SLURM_NTASKS"), _integer(env, "SLURM_LOCALID")
    # In Slurm's notation, `2(x3),1` means two tasks on each of the first three nodes and one task on the last node.
    pattern = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1")
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", pattern)
    counts = [int(count) for count, repeat in groups for _ in range(int(repeat or 1))]
    per_node = counts[min(int(env.get("SLURM_NODEID", "0")), len(counts) - 1)]
    if world > 1 and not env.get("MASTER_ADDR"):
        env["MASTER_ADDR"] = slurm_master(env)
    return Rank(_integer(env, "SLURM_PROCID"), world, local, per_node, "srun")


def slurm_master(env: Mapping[str, str]) -> str:
    """Address of the first node of the job step: its name if the name resolves, otherwise Slurm's NodeAddr."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    name = _scontrol("show", "hostnames", nodes).partition("\n")[0] if re.search(r"[\[,]", nodes) else nodes
    if not name:
        raise LaunchError("SLURM_JOB_NODELIST names no node: set MASTER_ADDR to the address of the first node")
    with contextlib.suppress(OSError):
        socket.getaddrinfo(name, None)
        return name
    if address := re.search(r"NodeAddr=(\S+)", _scontrol("-o", "show", "node", name)):
        return address[1]
    raise LaunchError(f"the address of the first node, {name}, is unknown: set MASTER_ADDR to this address")


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"cannot ask Slurm for the nodes of this job ({error}): set MASTER_ADDR yourself") from None


def _complete(env: MutableMapping[str, str], rank: Rank) -> None:
    env["RANK"], env["WORLD_SIZE"] = str(rank.rank), str(rank.world_size)
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = str(rank.local_rank), str(rank.local_world_size)
    if rank.world_size == 1:
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        # With port 0, the system picks a free port, which no other process needs to know.
        env["MASTER_PORT"] = env.get("MASTER_PORT") or "0"
    elif not env.get("MASTER_ADDR"):
        raise LaunchError(f"WORLD_SIZE={rank.world_size}, but MASTER_ADDR is not set: set it to the address of rank 0")
    elif not env.get("MASTER_PORT"):
        env["MASTER_PORT"] = str(job_port(env))


def job_port(env: Mapping[str, str]) -> int:
    """A port that every rank of a Slurm job computes identically. A restart of the job changes the port, because the
    old port may still be in use."""
    job, restart = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_RESTART_COUNT", "0"))
    step = int(env.get("SLURM_STEP_ID", "0"))
    return 20_000 + (job * 37 + step * 11 + restart * 7) % 10_000  # below Linux's ephemeral ports (32768)


def free_ports(count: int, apart: int = 0) -> list[int]:
    """`count` free ports of this machine between 12000 and 21999; each port + `apart` is free, too.

    The choice is random, so that programs that search at the same time rarely choose the same port. All ports are below
    32768, where Linux's ports for outgoing connections begin.
    """
    candidates = random.SystemRandom().sample(range(12_000, 22_000), 10_000)
    free = (port for port in candidates if all(_is_free(number) for number in {port, port + apart}))
    ports = list(itertools.islice(free, count))
    if len(ports) < count:
        raise LaunchError(f"only {len(ports)} of {count} ports are free between 12000 and 22000 on this machine")
    return ports


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket() as listener:
        listener.bind(("", port))
        return True
    return False


def _set_up_libraries(env: MutableMapping[str, str], rank: Rank) -> None:
    # torchrun sets OMP_NUM_THREADS=1 for several ranks if the user has not set a value. The rank's share of the cores
    # replaces torchrun's value.
    several = rank.local_world_size > 1
    default = several and bool(env.get("TORCHELASTIC_RUN_ID")) and env.get("OMP_NUM_THREADS") == "1"
    if not env.get("OMP_NUM_THREADS") or default:
        env["OMP_NUM_THREADS"] = str(max(1, usable_cores() // rank.local_world_size))
    if not has_gpu(env):
        env.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns of a missing accelerator
    if not env.get("GLOO_SOCKET_IFNAME") and (interface := interface_towards(env["MASTER_ADDR"])):
        # By default gloo resolves this machine's name, which often fails or gives 127.0.1.1, an address that other
        # machines cannot reach.
        env["GLOO_SOCKET_IFNAME"] = interface
    binaries = str(Path(sys.executable).parent)  # not resolved, because a venv's python is a link to another folder
    if binaries not in env.get("PATH", "").split(os.pathsep):
        env["PATH"] = os.pathsep.join([binaries, env.get("PATH", "")])  # DeepSpeed's offload needs ninja


def interface_towards(address: str) -> str | None:
    """The network interface through which this machine reaches an address, even its own; None if unknown."""
    import psutil

    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as unsent:
            unsent.connect(target)  # sends nothing, but the kernel picks the route
            local = unsent.getsockname()[0]
        interfaces = psutil.net_if_addrs()
    except OSError:
        return None
    addresses = ((name, each.address.partition("%")[0]) for name, several in interfaces.items() for each in several)
    return next((name for name, address in addresses if address == local), None)


def has_gpu(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a GPU is present and visible and torch is built for GPUs. Does not import torch."""
    present = any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
    if env.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not present:
        return False
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    built = version.read_text() if version and version.is_file() else ""
    return bool(re.search(r"^(cuda|hip)\b[^=\n]*= *['\"]", built, re.MULTILINE))


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise LaunchError(f"{name} must be a whole number, is {env.get(name, 'not set')}") from None


class LauncherWatch:
    """Notices that the `deepspeed` or `torchrun` process that started this rank died without a signal to the rank.

    If `deepspeed` is killed, its launcher and the ranks continue to run. Other parents (a shell, srun) are not watched,
    because such a parent may end before the run.
    """

    INTERVAL = 1.0
    """Seconds between two checks."""

    def __init__(self) -> None:
        import psutil

        self._parent, self._next = os.getppid(), 0.0
        self._watched: dict[int, float] = {}
        known = re.compile(r"deepspeed\.launcher|bin/(deepspeed|ds|torchrun)\b|torch\.distributed\.(run|launch)")
        with contextlib.suppress(psutil.Error):  # a process that has ended or is not readable is not watched
            for process in psutil.Process().parents()[:2]:  # torchrun, or DeepSpeed's launcher and its runner
                if not known.search(" ".join(process.cmdline()[:4])):
                    break
                self._watched[process.pid] = process.create_time()

    def gone(self) -> bool:
        """Whether the launcher has died. Checks at most every `INTERVAL` seconds, and returns False between checks."""
        if not self._watched or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self.INTERVAL
        alive = (is_alive(pid, started - 3, started + 3) for pid, started in self._watched.items())
        return os.getppid() != self._parent or not all(alive)
