"""Slurm on this one machine, to try jobs and preemption at home: several nodes, every one a slurmd of its own.

    python -m slurm.local up [--nodes 4]      start it; prints the line that points Slurm's commands to it
    python -m slurm.local run COMMAND ...     run a command with Slurm's commands pointed to it
    python -m slurm.local down                end its jobs and stop it

Two partitions: jobs in `high` push out those in `low` (the default one), which get SIGTERM and 20 seconds, and are queued
again. It needs Slurm's programs (on Debian and Ubuntu: `apt-get install slurmctld slurmd slurm-client munge`), but no
root and no accounting. Nothing limits what the nodes take of the machine: they share all of it. Its ports can be reached
from other machines, as Slurm's daemons listen everywhere, but it only listens to the user who started it: that is seen
to by a munged of its own, whose socket nobody else can open.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from dist_t2i.distributed.launch import free_ports
from dist_t2i.errors import UserError, run_command
from dist_t2i.utils.processes import is_alive

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
INSTALL = "on Debian and Ubuntu: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
_UP_SECONDS = 60.0
"""How long the nodes may take until all of them are idle."""
_DOWN_SECONDS = 20.0
"""How long daemons may take to end before they are killed."""

_SETTINGS = {
    "ClusterName": "local",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    "SlurmdParameters": "config_overrides",
    "ProctrackType": "proctrack/pgid",
    "TaskPlugin": "task/none",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_CPU",
    "SwitchType": "switch/none",
    "MpiDefault": "none",
    "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0,requeue_setup_env_fail",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "JobRequeue": "1",
    "ReturnToService": "2",
    "SlurmdTimeout": "20",
    "KillWait": "10",
    "PropagateResourceLimits": "NONE",
}


def missing_programs() -> list[str]:
    """Those of Slurm's programs that are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])


class LocalSlurm:
    """A cluster in `folder`: its slurm.conf, state, logs and pid files. `settings` go before the built-in ones."""

    def __init__(self, folder: Path, *, nodes: int = 4, settings: Mapping[str, str] | None = None) -> None:
        self.folder, self.settings = folder.absolute(), dict(settings or {})
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.conf = self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with Slurm's commands pointed to this cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "SLURM_CONF": str(self.conf), "PATH": _search_path()}

    # ---- up and down -------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Start it and wait until every node is idle. Raises UserError saying what stands in the way."""
        if not self.nodes:
            raise UserError("--nodes: a cluster has at least one")
        missing = missing_programs()
        if missing:
            raise UserError(f"Slurm is not installed here ({', '.join(missing)} missing).\n{INSTALL}")
        if self.running():
            raise UserError(f"it is up already, in {self.folder}; `down` stops it")
        for name in ("state", "log", "pid", "run"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        (self.folder / "cgroup.conf").write_text("")  # must exist, even empty
        ports = free_ports(len(self.nodes) + 1)
        self._ports = dict(zip(["slurmctld", *self.nodes], ports, strict=True))
        # Not 1 again: a run keeps its job's number, and would be taken for a job of the next cluster.
        # Nor a round number: from jobs' numbers come the ports of their ranks, and clusters may run side by side.
        self._first_job = 1000 + secrets.randbelow(60_000_000)
        self._keys = self._new_keys()
        self.conf.write_text(self.configuration())
        files = [f"--{name}-file={self._keys / name}" for name in ("key", "log", "pid", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={self._keys}/socket", *files)
        self._await_or_down((self._keys / "socket").is_socket)
        self._start("slurmctld", "-D", "-f", str(self.conf))
        for node in self.nodes:
            self.start_node(node)
        self._await_or_down(self._idle)

    def down(self) -> None:
        """End the jobs and stop the daemons; whatever they have started and left behind is killed."""
        with contextlib.suppress(subprocess.SubprocessError, OSError, UserError):  # whatever a daemon still answers
            self.command("scancel", "--user", _user(), timeout=10)
            self._await(lambda: not self.command("squeue", "-h", "-o", "%i").strip(), _DOWN_SECONDS)
        for programs in ("slurm*", "munged"):  # the others cannot end in order without it
            daemons = self._daemons(programs)
            _end(daemons, signal.SIGTERM)
            with contextlib.suppress(UserError):
                self._await(partial(_all_ended, daemons), _DOWN_SECONDS)
            _end(daemons, signal.SIGKILL)
        _end(self.leftovers(), signal.SIGKILL)
        with contextlib.suppress(UserError):
            self._await(lambda: not self.leftovers(), _DOWN_SECONDS)
        shutil.rmtree((self.folder / "keys").resolve(), ignore_errors=True)

    def running(self) -> bool:
        """Whether any of its daemons runs."""
        return any(is_alive(pid) for pid in self._daemons())

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node (again, after it was killed)."""
        self._start(f"slurmd-{node}", "-D", "-N", node, "-f", str(self.conf), program="slurmd")

    def node_processes(self, node: str) -> dict[str, list[int]]:
        """Pids of a node's `slurmd`, of its `slurmstepd`s, and of the `tasks` below these."""
        import psutil

        found: dict[str, list[int]] = {"slurmd": [], "slurmstepd": [], "tasks": []}
        with contextlib.suppress(OSError, ValueError):
            found["slurmd"] = [int((self.folder / "run" / f"slurmd-{node}").read_text())]
        for process in psutil.process_iter(["pid", "name"]):
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") == str(self.conf) and environment.get("SLURMD_NODENAME") == node:
                    found["tasks"].append(process.pid)
                elif process.name().startswith("slurmstepd") and self._spool(node) in _open_paths(process):
                    found["slurmstepd"].append(process.pid)
        return found

    def leftovers(self) -> list[int]:
        """Pids of whatever still runs with this cluster's slurm.conf in its environment, this process aside."""
        import psutil

        found = []
        for process in psutil.process_iter(["pid"]):
            with contextlib.suppress(psutil.Error):
                told = process.environ()
                if process.pid != os.getpid() and told.get("SLURM_CONF") == str(self.conf) and "SLURM_JOB_ID" in told:
                    found.append(process.pid)
        return found

    # ---- talking to it -----------------------------------------------------------------------------------------------

    def command(self, *words: str, timeout: float = 60.0) -> str:
        """What one of Slurm's commands prints. Raises subprocess.CalledProcessError, with its stderr, when it fails."""
        for _ in range(5):
            done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=timeout)
            # munged refuses a credential that it sees twice, or too late, as on a busy machine: nothing was done.
            if not done.returncode or not re.search("authentication|munge", done.stderr, re.IGNORECASE):
                break
            time.sleep(0.5)
        done.check_returncode()
        return done.stdout

    def configuration(self) -> str:
        """The text of slurm.conf."""
        host, user = socket.gethostname().split(".")[0], _user()
        places = {  # in quotes: a path may have spaces
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": str(self._ports["slurmctld"]),
            "SlurmUser": user,
            "SlurmdUser": user,
            "FirstJobId": str(self._first_job),
            # A requeued job waits for twice `cred_expire` and a little: 10 s instead of 121.
            "AuthInfo": f"socket={self._keys}/socket,cred_expire=5",
            "StateSaveLocation": f'"{self.folder}/state"',
            "SlurmdSpoolDir": f"{self._keys}/spool/%n",
            "SlurmctldLogFile": f'"{self.folder}/log/slurmctld.log"',
            "SlurmdLogFile": f'"{self.folder}/log/%n.log"',
            "SlurmctldPidFile": f'"{self.folder}/pid/slurmctld.pid"',
            "SlurmdPidFile": f'"{self.folder}/pid/%n.pid"',
        }
        lines = [f"{name}={value}" for name, value in {**_SETTINGS, **places, **self.settings}.items()]
        cores, memory = max(4, os.cpu_count() or 1), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        for node in self.nodes:
            address = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={self._ports[node]}"
            lines.append(f"NodeName={node} {address} CPUs={cores} RealMemory={memory}")
        every = ",".join(self.nodes)
        lines.append(f"PartitionName=low Nodes={every} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20")
        lines.append(f"PartitionName=high Nodes={every} PriorityTier=10 PreemptMode=OFF")
        return "\n".join(lines) + "\n"

    # ---- daemons -----------------------------------------------------------------------------------------------------

    def _start(self, name: str, *arguments: str, program: str = "") -> None:
        path = shutil.which(program or name, path=_search_path())
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            daemon = subprocess.Popen(
                [str(path), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**self.environment, "LC_ALL": "C"},
                start_new_session=True,
                cwd=self.folder,
            )
        (self.folder / "run" / name).write_text(str(daemon.pid))

    def _new_keys(self) -> Path:
        """A folder for sockets and munged's secret that only this user can enter; elsewhere, as sockets want short paths."""
        folder, link = Path(tempfile.mkdtemp(prefix="slurm-")), self.folder / "keys"
        (folder / "spool").mkdir()
        (folder / "key").touch(mode=0o600)
        (folder / "key").write_bytes(secrets.token_bytes(128))
        shutil.rmtree(link.resolve(), ignore_errors=True)  # of one that was not taken down
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
        return folder

    def _daemons(self, programs: str = "*") -> list[int]:
        found = []
        for file in (self.folder / "run").glob(programs):
            with contextlib.suppress(OSError, ValueError):
                pid = int(file.read_text())
                if is_alive(pid) and _runs(pid, file.name.partition("-")[0]):
                    found.append(pid)
        return found

    def _spool(self, node: str) -> str:
        return str((self.folder / "keys").resolve() / "spool" / node)

    def _idle(self) -> bool:
        with contextlib.suppress(subprocess.SubprocessError):
            return self.command("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * len(self.nodes)
        return False

    def _await_or_down(self, condition: Callable[[], bool]) -> None:
        try:
            self._await(condition, _UP_SECONDS)
        except UserError as error:
            self.down()
            logs = "".join(file.read_text(errors="replace")[-1500:] for file in (self.folder / "log").iterdir())
            raise UserError(f"Slurm's daemons did not come up ({error}). What they say:\n{logs}") from None

    @staticmethod
    def _await(condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise UserError(f"not within {seconds:.0f} seconds")
            time.sleep(0.1)


def _user() -> str:
    """Whose processes these are, whatever the environment says (`runuser` and containers leave another's name in it)."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise UserError(f"user {os.getuid()} has no entry in /etc/passwd, which Slurm needs") from None


def _all_ended(pids: list[int]) -> bool:
    return not any(is_alive(pid) for pid in pids)


def _runs(pid: int, program: str) -> bool:
    """Whether the process is this program: its pid may have gone to another one since."""
    import psutil

    try:
        return Path(psutil.Process(pid).cmdline()[0]).name == program
    except (psutil.Error, IndexError):
        return False


def _open_paths(process) -> str:
    return " ".join(process.cmdline()) + " ".join(file.path for file in process.open_files())


def _end(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


# ---- the command -----------------------------------------------------------------------------------------------------


def default_folder() -> Path:
    """Where the cluster lives unless `--folder` says otherwise."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dist_t2i" / "slurm"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status; `run` does not return, and has the command's own."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where it lives (%(default)s)")
    parser.add_argument("--nodes", type=int, default=4, help="virtual nodes that `up` starts (%(default)s)")
    parser.add_argument("action", choices=("up", "run", "down"))
    parser.add_argument("command", nargs=argparse.REMAINDER, help="of `run`")
    chosen = parser.parse_args(arguments)
    if chosen.action != "run" and chosen.command:  # options after the word: `up --nodes 2`
        chosen = parser.parse_args([*chosen.command, chosen.action], namespace=chosen)
    cluster = LocalSlurm(chosen.folder, nodes=chosen.nodes)
    try:
        return _act(chosen, cluster)
    except OSError as error:
        raise UserError(f"{error.filename or cluster.folder}: {error.strerror or error}") from error


def _act(chosen: argparse.Namespace, cluster: LocalSlurm) -> int:
    if chosen.action == "up":
        cluster.up()
        print(f"Slurm is up: {len(cluster.nodes)} nodes, partitions low (default) and high. In this shell:")
        print(f"export SLURM_CONF={shlex.quote(str(cluster.conf))}")
        return 0
    if chosen.action == "down":
        was = cluster.running()
        cluster.down()
        print("Slurm is down" if was else f"Slurm was not up in {cluster.folder}")
        return 0
    if not chosen.command:
        raise UserError("run what? Such as: python -m slurm.local run squeue")
    if not cluster.running():
        raise UserError("Slurm is not up: python -m slurm.local up")
    program = shutil.which(chosen.command[0], path=_search_path())
    if program is None:
        raise UserError(f"there is no program {chosen.command[0]} to run")
    os.execve(program, chosen.command, cluster.environment)  # its signals and exit status are its own


if __name__ == "__main__":
    sys.exit(run_command(main))
