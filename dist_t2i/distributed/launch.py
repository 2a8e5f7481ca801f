"""One process per rank, whoever started it: `deepspeed`, `torchrun`, `srun`, or plain `python` (one rank).

`prepare()` reads or fills RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and what the
libraries read when they are first imported. Call it before torch or DeepSpeed is: nothing here imports them.
"""

from __future__ import annotations

import importlib.util
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


@dataclass(frozen=True)
class Rank:
    """This process among the others of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: Literal["deepspeed", "torchrun", "srun", "plain"]


def prepare(environment: MutableMapping[str, str] | None = None) -> Rank:
    """Complete the environment (default: this process's) of one rank and say which one it is.

    Raises `LaunchError` when the launcher gave only a part of it, or a Slurm job's first node has no address.
    """
    env = os.environ if environment is None else environment
    given = [name for name in _NEEDED if env.get(name)]
    if len(given) == len(_NEEDED):
        rank = _from_variables(env, _launcher(env))
    elif given:
        missing = ", ".join(name for name in _NEEDED if name not in given)
        raise LaunchError(
            f"{', '.join(given)} set, but not {missing}: unset them all for a single process, "
            "or start with deepspeed, torchrun or srun, which set them all"
        )
    elif env.get("SLURM_PROCID") and env.get("SLURM_STEP_ID", "").isdigit():
        rank = _from_slurm(env)
    else:
        rank = Rank(0, 1, 0, 1, "plain")
    _complete(env, rank)
    _settle_libraries(env, rank)
    return rank


def _from_variables(env: Mapping[str, str], launcher: Literal["deepspeed", "torchrun", "srun", "plain"]) -> Rank:
    local_world = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"]
    rank = Rank(_whole(env, "RANK"), _whole(env, "WORLD_SIZE"), _whole(env, "LOCAL_RANK"), int(local_world), launcher)
    if not 0 <= rank.rank < rank.world_size:
        raise LaunchError(f"RANK={rank.rank} is not below WORLD_SIZE={rank.world_size}")
    return rank


def _launcher(env: Mapping[str, str]) -> Literal["deepspeed", "torchrun", "plain"]:
    if env.get("TORCHELASTIC_RUN_ID"):
        return "torchrun"
    return "deepspeed" if env.get("CROSS_RANK") else "plain"  # DeepSpeed's launcher sets CROSS_RANK


def _from_slurm(env: MutableMapping[str, str]) -> Rank:
    world, local = _whole(env, "SLURM_NTASKS"), _whole(env, "SLURM_LOCALID")
    per_node = _tasks_here(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1"), env)
    if world > 1 and not env.get("MASTER_ADDR"):
        env["MASTER_ADDR"] = slurm_master(env)
    return Rank(_whole(env, "SLURM_PROCID"), world, local, per_node, "srun")


def _tasks_here(pattern: str, env: Mapping[str, str]) -> int:
    """Tasks on this node from Slurm's `2(x3),1`: two on each of the first three nodes, one on the last."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", pattern):
        counts += [int(count)] * int(repeat or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else counts[-1]


def slurm_master(env: Mapping[str, str]) -> str:
    """Address of the first node of the job step: its name where that resolves, else its NodeAddr in Slurm's books."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    first = _scontrol("show", "hostnames", nodes).split()[:1] if re.search(r"[\[,]", nodes) else [nodes]
    if not first or not first[0]:
        raise LaunchError("SLURM_JOB_NODELIST names no node: set MASTER_ADDR to the address of the first node")
    name = first[0]
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        address = re.search(r"NodeAddr=(\S+)", _scontrol("-o", "show", "node", name))
        if address:
            return address[1]
    raise LaunchError(f"the first node, {name}, has no address that resolves: set MASTER_ADDR to one")


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
        # 0: any port that is free, found as it is taken. Nobody else needs to know it.
        env["MASTER_PORT"] = env.get("MASTER_PORT") or "0"
    elif not env.get("MASTER_ADDR"):
        raise LaunchError(f"WORLD_SIZE={rank.world_size}, but MASTER_ADDR is not set: the address of rank 0's machine")
    elif not env.get("MASTER_PORT"):
        env["MASTER_PORT"] = str(job_port(env))


def job_port(env: Mapping[str, str]) -> int:
    """A port that all ranks of a Slurm job know, another one after each restart (the old one may still be held)."""
    job, restart = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_RESTART_COUNT", "0"))
    step = int(env.get("SLURM_STEP_ID", "0"))
    return 20_000 + (job * 37 + step * 11 + restart * 7) % 10_000  # below Linux's ephemeral ports (32768)


def free_ports(count: int, apart: int = 0) -> list[int]:
    """`count` ports of this machine, 12000 to 21999, on which nobody listens; with `apart`, port + apart is free as well.

    Drawn at random, so that programs that look at the same time find others, and below 32768, where Linux begins to
    give ports to outgoing connections: what was free a moment ago still is. Raises LaunchError where too few are free.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(12_000, 22_000), 10_000):
        if len(found) == count:
            break
        if all(_is_free(number) for number in {port, port + apart}):
            found.append(port)
    if len(found) < count:
        raise LaunchError(f"only {len(found)} of {count} ports are free between 12000 and 22000 on this machine")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
        except OSError:
            return False
        return True


def _settle_libraries(env: MutableMapping[str, str], rank: Rank) -> None:
    if not env.get("OMP_NUM_THREADS") or _is_torchruns_default(env, rank):
        env["OMP_NUM_THREADS"] = str(max(1, usable_cores() // rank.local_world_size))
    if not has_gpu(env):
        env.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns about the accelerator that it cannot find
    if not env.get("GLOO_SOCKET_IFNAME") and (interface := interface_towards(env["MASTER_ADDR"])):
        # gloo would take what this machine's own name resolves to: nothing, or 127.0.1.1, where no other machine finds it
        env["GLOO_SOCKET_IFNAME"] = interface
    binaries = str(Path(sys.executable).parent)  # not resolved: a venv's python is a link
    if binaries not in env.get("PATH", "").split(os.pathsep):
        env["PATH"] = os.pathsep.join([binaries, env.get("PATH", "")])  # ninja, for what DeepSpeed compiles (offload)


def interface_towards(address: str) -> str | None:
    """The network interface by which this machine reaches an address (its own included); None when that is unknown."""
    import psutil

    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as unsent:
            unsent.connect(target)  # sends nothing: the kernel picks the route
            own = unsent.getsockname()[0]
        interfaces = psutil.net_if_addrs()
    except OSError:
        return None
    for name, addresses in interfaces.items():
        if any(known.address.partition("%")[0] == own for known in addresses):
            return name
    return None


def _is_torchruns_default(env: Mapping[str, str], rank: Rank) -> bool:
    """torchrun writes OMP_NUM_THREADS=1 where the user has said nothing and it starts several ranks."""
    several = rank.local_world_size > 1
    return several and bool(env.get("TORCHELASTIC_RUN_ID")) and env.get("OMP_NUM_THREADS") == "1"


def has_gpu(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a GPU can be used: one is there, not hidden, and the installed torch is built for it. No torch import."""
    if env.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return False
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if version is None or not version.is_file():
        return False
    return bool(re.search(r"^(cuda|hip)\b[^=\n]*= *['\"]", version.read_text(), re.MULTILINE))


def _whole(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise LaunchError(f"{name} must be a whole number, is {env.get(name, 'not set')}") from None


class LauncherWatch:
    """Notices that the `deepspeed` or `torchrun` that started this rank has died without telling it.

    `kill` of the `deepspeed` command leaves its launcher and the ranks running. Other parents (a shell, srun) may go.
    """

    INTERVAL = 1.0
    """Seconds between two looks at the process table."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._watched = _launchers_above()
        self._next = 0.0

    def gone(self) -> bool:
        """Whether it has died; looks at most every `INTERVAL`."""
        if not self._watched or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self.INTERVAL
        return os.getppid() != self._parent or not all(
            is_alive(pid, started - 3, started + 3) for pid, started in self._watched.items()
        )


def _launchers_above() -> dict[int, float]:
    """pid -> start of the launchers above this process: torchrun's, or DeepSpeed's launcher and its runner."""
    import psutil

    launchers: dict[int, float] = {}
    try:
        for process in psutil.Process().parents()[:2]:
            command = " ".join(process.cmdline()[:4])
            if not re.search(
                r"deepspeed\.launcher|bin/(deepspeed|ds|torchrun)\b|torch\.distributed\.(run|launch)", command
            ):
                break
            launchers[process.pid] = process.create_time()
    except psutil.Error:
        pass  # a process that vanished, or that we may not read: nothing to watch
    return launchers
