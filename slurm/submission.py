"""Submits a job through submitit, from a configuration and a profile; writes these files:

    RUN/slurm/config.yaml            the resolved configuration that the job trains with
    RUN/slurm/job.json               the latest submission: job id, nodes, ranks, command, time
    RUN/slurm/JOB_submission.sh      the batch script
    RUN/slurm/JOB_RANK_log.out       the log of a rank, over all attempts of the job

The configuration, the world size, the profile and (with `sbatch --test-only`) the batch script are checked before
anything is queued; tools/submit.py also checks the data.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit

from dist_t2i.config import files as config_files
from dist_t2i.config.sections import Config
from dist_t2i.config.validation import check_world
from dist_t2i.errors import UserError
from dist_t2i.utils.files import write_atomic
from slurm import snapshot
from slurm.job import TrainJob
from slurm.profile import Profile, minutes

FOLDER = "slurm"
JOB = "job.json"
_SAME_NAMES = "gpus_per_node cpus_per_task partition account qos constraint exclude exclusive".split()
"""Fields of a profile that have the same names as options of sbatch."""


class SubmitError(UserError):
    """Slurm is missing, or refuses the job."""


@dataclass
class Submission:
    """A run to submit, in an absolute folder. `seeds` above 0 submits an array of that many runs, in RUN/seed-N."""

    run: Path
    config: Config
    profile: Profile
    nodes: int = 1
    name: str = ""
    dependency: str = ""
    seeds: int = 0
    allow_changes: bool = False

    def __post_init__(self) -> None:
        # One rank per GPU, unless the profile sets tasks_per_node.
        self.ranks_per_node = self.profile.tasks_per_node or self.profile.gpus_per_node or 1
        self.ranks = self.nodes * self.ranks_per_node
        self.folder, self.code = self.run / FOLDER, self.run / snapshot.CODE

    def check(self) -> None:
        """Checks the numbers of nodes, runs and ranks. Raises UserError."""
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes}: a job needs at least one node")
        if self.seeds < 0:
            raise UserError(f"--array-seeds {self.seeds}: give a number of runs, or 0 for one run without an array")
        check_world(self.config, self.ranks)

    def script(self) -> str:
        """The batch script; the script of an array if `seeds` is above 1."""
        executor = self._executor()
        if self.seeds > 1:
            executor.parameters["map_count"] = self.seeds  # as submitit's `map_array` sets it
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def _executor(self) -> _Executor:
        profile = self.profile
        executor = _Executor(self.folder, self._python(), self.code)
        options: dict[str, Any] = {
            "job_name": self.name or self.run.name,
            "time": minutes(profile.time),
            "nodes": self.nodes,
            "ntasks_per_node": self.ranks_per_node,
            "mem": f"{profile.memory_gb}GB" if profile.memory_gb else "",
            "dependency": self.dependency,
            **{name: getattr(profile, name) for name in _SAME_NAMES},
        }
        # After a line break in an `#SBATCH` line, the shell would run the rest. Slurm expands `%j` and `\\` in paths.
        for name, value in {**options, **profile.sbatch}.items():
            if "\n" in str(value):
                raise SubmitError(f"{name}: {value!r} has a line break, which no option of sbatch may have")
        if set(run := str(self.run)) & set("\n%\\"):
            raise SubmitError(f"run folder {run!r}: Slurm cannot write logs there; choose one without % and backslash")
        executor.update_parameters(
            **{name: value for name, value in options.items() if value},
            wckey=None,
            signal_delay_s=profile.signal_seconds,
            stderr_to_stdout=True,
            setup=self._setup(),
            srun_args=self._srun(),
            teardown=self._teardown(),
            additional_parameters={"requeue": True, **profile.sbatch},
        )
        return executor

    def _python(self) -> str:
        container = self.profile.container
        if not container.image:
            return shlex.quote(self.profile.python or sys.executable)
        if container.runtime == "pyxis":
            return shlex.quote(container.python)  # srun starts the ranks inside the image
        binds = [word for mount in self._mounts() for word in ("--bind", mount)]
        gpus = ["--nv"] if self.profile.gpus_per_node else []
        return shlex.join(["apptainer", "exec", *gpus, *binds, container.image, container.python])

    def _mounts(self) -> list[str]:
        mounts = (*self.profile.container.mounts, str(self.run))
        return [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]

    def _setup(self) -> list[str]:
        profile = self.profile
        lines = [f"module load {shlex.join(profile.modules)}"] if profile.modules else []
        lines += [f"export {name}={_expanding(value)}" for name, value in profile.environment.items()]
        if profile.interface:
            lines += [f"export {name}_SOCKET_IFNAME={shlex.quote(profile.interface)}" for name in ("NCCL", "GLOO")]
        if profile.scratch:
            lines.append(f"export SLURM_TMPDIR={_expanding(profile.scratch)}")
        path = f"export PYTHONPATH={shlex.quote(str(self.code))}${{PYTHONPATH:+:$PYTHONPATH}}"
        trap = "trap : USR2 TERM  # the ranks save on these signals; after.py decides what follows"
        return [*lines, path, "export PYTHONFAULTHANDLER=1", trap]

    def _srun(self) -> list[str]:
        profile, words = self.profile, ["--kill-on-bad-exit=1", "--open-mode=append"]
        if profile.cpus_per_task:
            words.append(f"--cpus-per-task={profile.cpus_per_task}")  # srun does not inherit this option from sbatch
        if profile.container.image and profile.container.runtime == "pyxis":
            image, mounts = profile.container.image, ",".join(self._mounts())
            words += [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={self.run}"]
        return [*words, *profile.srun]

    def _teardown(self) -> list[str]:
        run, log = shlex.quote(str(self.run)), "${SLURM_JOB_ID}"
        if self.seeds:
            run += f"/seed-$(({self.config.train.seed} + ${{SLURM_ARRAY_TASK_ID:-0}}))"
        if self.seeds > 1:
            log = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
        # after.py must run outside of the container, where Slurm's commands are.
        python = shlex.quote(self.profile.python or "python3") if self.profile.container.image else self._python()
        after = f"{python} {shlex.quote(str(self.code / 'slurm' / 'after.py'))}"
        log = f"{shlex.quote(str(self.folder))}/{log}_0_log.out"
        return ["status=$?", f'{after} --run {run} --status "$status" --log {log}', "exit $?"]

    def test(self) -> str:
        """The answer of `sbatch --test-only`, such as the time when the job could start. Raises SubmitError."""
        need_slurm()
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(self.script())
            file.flush()
            done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True)
        if done.returncode != 0:
            raise SubmitError(f"Slurm does not accept this job: {_reason(done.stderr)}")
        return " ".join(done.stderr.split()).removeprefix("sbatch: ")

    def prepare(self, *, keep_code: bool = False) -> None:
        """Writes code and configuration of each run; `keep_code` keeps an existing copy of code. Raises UserError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (keep_code and snapshot.keep(self.run)):
                snapshot.take(self.run)
            for run, config in self._runs():
                (run / FOLDER).mkdir(parents=True, exist_ok=True)
                write_atomic(run / FOLDER / "config.yaml", config_files.dump(config))
        except OSError as error:
            raise UserError(f"the run folder {self.run} cannot be written: {error.strerror or error}") from error

    def submit(self, *, keep_code: bool = False) -> list[str]:
        """Calls `prepare`, queues the job, and returns one job id per run. A refusal restores the old config.yaml."""
        need_slurm()
        files = [run / FOLDER / "config.yaml" for run, _ in self._runs()]
        before = {file: file.read_text(encoding="utf-8") for file in files if file.exists()}
        self.prepare(keep_code=keep_code)
        jobs = [TrainJob(str(run), arguments(run, self.allow_changes)) for run, _ in self._runs()]
        executor = self._executor()
        try:
            queued = executor.map_array(TrainJob.__call__, jobs) if self.seeds > 1 else [executor.submit(jobs[0])]
        except submitit.core.utils.FailedJobError as error:
            for file, text in before.items():
                write_atomic(file, text)
            raise SubmitError(f"Slurm did not accept the job: {_reason(str(error))}") from error
        about = {
            "logs": str(self.folder),
            "name": self.name,
            "nodes": self.nodes,
            "ranks": self.ranks,
            "submitted": time.time(),
            "command": shlex.join(sys.argv),
            "folder": os.getcwd(),
            "profile": dataclasses.asdict(self.profile),
        }
        numbers = [str(job.job_id) for job in queued]
        for (run, _), number in zip(self._runs(), numbers, strict=True):
            write_atomic(run / FOLDER / JOB, json.dumps({"job": number, **about}, indent=1) + "\n")
        return numbers

    def _runs(self) -> list[tuple[Path, Config]]:
        train = self.config.train
        seeds = range(train.seed, train.seed + self.seeds)
        runs = [(self.run / f"seed-{seed}", seed) for seed in seeds] or [(self.run, train.seed)]
        return [
            (run, replace(self.config, run=replace(self.config.run, folder=str(run)), train=replace(train, seed=seed)))
            for run, seed in runs
        ]


def arguments(run: Path, allow_changes: bool = False) -> tuple[str, ...]:
    """The arguments of train.py for a prepared run."""
    return ("--config", str(run / FOLDER / "config.yaml"), *(["--allow-changes"] if allow_changes else []))


def need_slurm() -> None:
    """Raises SubmitError without Slurm's commands."""
    if shutil.which("sbatch") is None:
        raise SubmitError(
            "there is no sbatch on this machine: submit from a login node of the cluster, train here with --local,\n"
            "or try Slurm on this machine: python -m slurm.local up"
        )


PRIVATE = ("_make_submission_file_text", "_submitit_command_str")
"""Private names of submitit.SlurmExecutor that this module uses; tests/slurm/test_submit.py checks that each exists."""


class _Executor(submitit.SlurmExecutor):
    """Starts ranks from the run's copy of the code, and can render scripts even on machines without Slurm."""

    def __init__(self, folder: Path, python: str, code: Path) -> None:
        super().__init__(folder=folder, python=python)
        self._code = code

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u {shlex.quote(str(self._code / 'slurm' / 'rank.py'))} {shlex.quote(str(self.folder))}"

    @classmethod
    def affinity(cls) -> int:
        return 2  # submitit would refuse to start without srun


def _expanding(value: str) -> str:
    """`value` in quotes in which the shell expands variables, but runs no commands."""
    return '"' + re.sub(r'(["\\`])', r"\\\1", value).replace("$(", "\\$(") + '"'


def _reason(text: str) -> str:
    text = " ".join(text.split())
    errors = re.findall(r"(?:sbatch: )?error: ([^\n]+?)(?= sbatch: |$)", text)
    return "; ".join(dict.fromkeys(errors)) or text[-300:]
