"""Slurm on this machine, to try jobs and preemption: several virtual nodes, each with its own slurmd.

    python -m slurm.local up [--nodes 4]      start Slurm; prints the line that selects it in a shell
    python -m slurm.local run COMMAND ...     run a command that uses this Slurm
    python -m slurm.local down                end all jobs and stop Slurm

This Slurm has two partitions. Jobs in `high` preempt jobs in `low` (the default): the preempted jobs get SIGTERM, have
20 seconds to save, and are queued again. Slurm's programs must be installed; root and accounting are not needed. Each
node may use the whole machine. Slurm's daemons listen on all interfaces, but obey only the user who started them,
because only this user can open the socket of munged, Slurm's authentication daemon.
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
from pathlib import Path

from dist_t2i.distributed.launch import free_ports
from dist_t2i.errors import UserError, run_command
from dist_t2i.utils.processes import is_alive, send

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
INSTALL = "on Debian and Ubuntu: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
_UP_SECONDS = 60.0  # time limit until all nodes are idle
_DOWN_SECONDS = 20.0  # time limit for the daemons to end before they are killed

_SETTINGS = """
ClusterName=local AuthType=auth/munge CredType=cred/munge SlurmdParameters=config_overrides ProctrackType=proctrack/pgid
TaskPlugin=task/none SelectType=select/cons_tres SelectTypeParameters=CR_CPU SwitchType=switch/none MpiDefault=none
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,requeue_setup_env_fail
PreemptType=preempt/partition_prio PreemptMode=REQUEUE JobRequeue=1 ReturnToService=2 SlurmdTimeout=20 KillWait=10
PropagateResourceLimits=NONE UnkillableStepTimeout=600
"""


def missing_programs() -> list[str]:
    """Slurm's programs that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])


class LocalSlurm:
    """A cluster that keeps all its files in `folder`; `settings` replace the built-in settings of slurm.conf."""

    def __init__(self, folder: Path, *, nodes: int = 4, settings: Mapping[str, str] | None = None) -> None:
        self.folder, self.settings = folder.absolute(), dict(settings or {})
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.conf = self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, changed so that Slurm's commands use this cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "SLURM_CONF": str(self.conf), "PATH": _search_path()}

    def up(self) -> None:
        """Starts the cluster and waits until every node is idle. Raises UserError."""
        if not self.nodes:
            raise UserError("--nodes: a cluster needs at least one node")
        if missing := missing_programs():
            raise UserError(f"Slurm is not installed here ({', '.join(missing)} missing).\n{INSTALL}")
        if self.running():
            raise UserError(f"Slurm is up already, in {self.folder}; `down` stops it")
        for name in ("state", "log", "pid", "run"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        (self.folder / "cgroup.conf").write_text("")  # Slurm needs this file, even if it is empty
        self._ports = dict(zip(["slurmctld", *self.nodes], free_ports(len(self.nodes) + 1), strict=True))
        # The first job number is random for two reasons. A run records the number of its job, and a job of the next
        # cluster must not have the same number. Ports of ranks derive from job numbers, and must differ between
        # clusters that run at the same time.
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
        """Ends the jobs, stops the daemons, and kills the processes that outlive them."""
        with contextlib.suppress(subprocess.SubprocessError, OSError, UserError):  # the daemons may be dead
            self.command("scancel", "--user", _user(), timeout=10)
            self._await(lambda: not self.command("squeue", "-h", "-o", "%i").strip(), _DOWN_SECONDS)
        self._stop("slurm*")
        self._stop("munged")  # last, because the other daemons need it to end cleanly
        with contextlib.suppress(UserError):
            self._await(self._kill_leftovers, _DOWN_SECONDS)
        shutil.rmtree((self.folder / "keys").resolve(), ignore_errors=True)

    def _kill_leftovers(self) -> bool:
        """Kills what is left of jobs; whether nothing is left. A step that is just starting can add processes later."""
        left = self.leftovers()
        send(left, signal.SIGKILL)
        return not left

    def _stop(self, programs: str) -> None:
        send(self._daemons(programs), signal.SIGTERM)
        with contextlib.suppress(UserError):
            self._await(lambda: not self._daemons(programs), _DOWN_SECONDS)
        send(self._daemons(programs), signal.SIGKILL)

    def running(self) -> bool:
        """Whether any daemon runs."""
        return bool(self._daemons())

    def start_node(self, node: str) -> None:
        """Starts the slurmd of a node."""
        self._start(f"slurmd-{node}", "-D", "-N", node, "-f", str(self.conf), program="slurmd")

    def leftovers(self) -> list[int]:
        """Pids of other processes whose environment variables show that they belong to a job of this cluster."""
        import psutil

        found = {process.pid: process.info["environ"] or {} for process in psutil.process_iter(["environ"])}
        own = [pid for pid, environment in found.items() if environment.get("SLURM_CONF") == str(self.conf)]
        return [pid for pid in own if "SLURM_JOB_ID" in found[pid] and pid != os.getpid()]

    def command(self, *words: str, timeout: float = 60.0) -> str:
        """The output of one of Slurm's commands. Raises subprocess.CalledProcessError with the command's stderr."""
        for _ in range(5):
            done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=timeout)
            # On a busy machine munged refuses late or repeated credentials. The command then had no effect.
            if not done.returncode or not re.search("authentication|munge", done.stderr, re.IGNORECASE):
                break
            time.sleep(0.5)
        done.check_returncode()
        return done.stdout

    def configuration(self) -> str:
        """The text of slurm.conf."""
        host, user = socket.gethostname().split(".")[0], _user()
        locations = {  # in quotes, because a path may have spaces
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": str(self._ports["slurmctld"]),
            "SlurmUser": user,
            "SlurmdUser": user,
            "FirstJobId": str(self._first_job),
            # A requeued job waits a little more than 2 * cred_expire: here 10 s, and 121 s by default.
            "AuthInfo": f"socket={self._keys}/socket,cred_expire=5",
            "StateSaveLocation": f'"{self.folder}/state"',
            "SlurmdSpoolDir": f"{self._keys}/spool/%n",
            "SlurmctldLogFile": f'"{self.folder}/log/slurmctld.log"',
            "SlurmdLogFile": f'"{self.folder}/log/%n.log"',
            "SlurmctldPidFile": f'"{self.folder}/pid/slurmctld.pid"',
            "SlurmdPidFile": f'"{self.folder}/pid/%n.pid"',
        }
        settings = dict(setting.split("=", 1) for setting in _SETTINGS.split())
        lines = [f"{name}={value}" for name, value in {**settings, **locations, **self.settings}.items()]
        cores, memory = max(4, os.cpu_count() or 1), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        for node in self.nodes:
            address = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={self._ports[node]}"
            lines.append(f"NodeName={node} {address} CPUs={cores} RealMemory={memory}")
        every = ",".join(self.nodes)
        lines.append(f"PartitionName=low Nodes={every} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20")
        lines.append(f"PartitionName=high Nodes={every} PriorityTier=10 PreemptMode=OFF")
        return "\n".join(lines) + "\n"

    def _start(self, name: str, *arguments: str, program: str = "") -> None:
        command, env = [str(shutil.which(program or name, path=_search_path())), *arguments], self.environment
        env["LC_ALL"], folder = "C", self.folder
        with (folder / "log" / f"{name}.out").open("ab") as out:
            daemon = subprocess.Popen(
                command, cwd=folder, env=env, start_new_session=True, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        (folder / "run" / name).write_text(str(daemon.pid))

    def _new_keys(self) -> Path:
        """Makes a folder that only this user can enter, for munged's secret and for sockets, which need a short
        path."""
        folder, link = Path(tempfile.mkdtemp(prefix="slurm-")), self.folder / "keys"
        (folder / "spool").mkdir()
        (folder / "key").touch(mode=0o600)
        (folder / "key").write_bytes(secrets.token_bytes(128))
        shutil.rmtree(link.resolve(), ignore_errors=True)  # left by a cluster that was not stopped
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
        return folder

    def _daemons(self, programs: str = "*") -> list[int]:
        """Pids of the running daemons whose pid file has a name that matches the pattern `programs`."""
        import psutil

        pids = []
        for file in (self.folder / "run").glob(programs):
            with contextlib.suppress(OSError, ValueError, psutil.Error, IndexError):
                pid = int(file.read_text())
                program = Path(psutil.Process(pid).cmdline()[0]).name  # not the daemon, if the pid was reused
                if is_alive(pid) and program == file.name.partition("-")[0]:
                    pids.append(pid)
        return pids

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
            raise UserError(f"Slurm's daemons did not start ({error}). Their logs:\n{logs}") from None

    @staticmethod
    def _await(condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise UserError(f"not ready within {seconds:.0f} seconds")
            time.sleep(0.1)


def _user() -> str:
    """The owner of this process. The variable USER would be wrong under `runuser` and in containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise UserError(f"user {os.getuid()} has no entry in /etc/passwd, which Slurm needs") from None


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status, except for `run`, where the command replaces this process."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_t2i" / "slurm"
    parser.add_argument("--folder", type=Path, default=default, help="folder of the cluster (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=4, help="virtual nodes that `up` starts (default: %(default)s)")
    parser.add_argument("action", choices=("up", "run", "down"))
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command that `run` starts")
    options = parser.parse_args(arguments)
    if options.action != "run" and options.command:  # options after the action: `up --nodes 2`
        options = parser.parse_args([*options.command, options.action], namespace=options)
    cluster = LocalSlurm(options.folder, nodes=options.nodes)
    try:
        return _act(options, cluster)
    except OSError as error:
        raise UserError(f"{error.filename or cluster.folder}: {error.strerror or error}") from error


def _act(options: argparse.Namespace, cluster: LocalSlurm) -> int:
    if options.action == "up":
        cluster.up()
        print(f"Slurm is up: {len(cluster.nodes)} nodes, partitions low (default) and high. In this shell:")
        print(f"export SLURM_CONF={shlex.quote(str(cluster.conf))}")
        return 0
    if options.action == "down":
        was = cluster.running()
        cluster.down()
        print("Slurm is down" if was else f"Slurm was not up in {cluster.folder}")
        return 0
    if not options.command:
        raise UserError("`run` needs a command, for example: python -m slurm.local run squeue")
    if not cluster.running():
        raise UserError("Slurm is not up; start it: python -m slurm.local up")
    if (program := shutil.which(options.command[0], path=_search_path())) is None:
        raise UserError(f"there is no program {options.command[0]} to run")
    os.execve(program, options.command, cluster.environment)


if __name__ == "__main__":
    sys.exit(run_command(main))
