"""From a configuration and a profile to a job in the queue, through submitit.

    RUN/slurm/config.yaml            the resolved configuration that the job trains with
    RUN/slurm/job.json               the latest submission: job id, nodes, ranks, script, when
    RUN/slurm/JOB_submission.sh      the batch script
    RUN/slurm/JOB_RANK_log.out       what a rank said, over all attempts of the job

Everything that can be checked is checked before anything is queued: configuration, world size, data, profile, and
`sbatch --test-only` on the very script.
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
from slurm.profile import Container, Profile, minutes

FOLDER = "slurm"
JOB = "job.json"


class SubmitError(UserError):
    """Slurm is not there, or does not take the job."""


@dataclass(frozen=True)
class Submission:
    """A run to submit. `seeds` above 0 submits an array of so many runs, in RUN/seed-N each."""

    run: Path
    """Absolute."""
    config: Config
    profile: Profile
    nodes: int = 1
    name: str = ""
    dependency: str = ""
    seeds: int = 0
    allow_changes: bool = False

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node: one per GPU unless the profile says otherwise."""
        return self.profile.tasks_per_node or self.profile.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def folder(self) -> Path:
        return self.run / FOLDER

    @property
    def code(self) -> Path:
        return self.run / snapshot.CODE

    def check(self) -> str:
        """Check world size and data; says in a line what the data is. Raises UserError."""
        from dist_t2i.data.open_data import open_data

        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes}: a job needs at least one")
        if self.seeds < 0:
            raise UserError(f"--array-seeds {self.seeds}: how many runs, or 0 for one that is no array")
        check_world(self.config, self.ranks)
        data = open_data(self.config.data)
        about = data.manifest["splits"]["train"]
        captions = about.get("captions", {}).get("count", 0)
        return f"{about['samples']:,} pictures, {captions:,} captions, {len(about['shards']):,} shards in {data.folder}"

    # ---- the script --------------------------------------------------------------------------------------------------

    def script(self) -> str:
        """The batch script; of an array, where there are several seeds."""
        executor = self._executor()
        if self.seeds > 1:
            executor.parameters["map_count"] = self.seeds  # as `map_array` does
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def _executor(self) -> _Executor:
        profile = self.profile
        executor = _Executor(self.folder, self._python(), self.code)
        given: dict[str, Any] = {
            "job_name": self.name or self.run.name,
            "time": minutes(profile.time),
            "nodes": self.nodes,
            "ntasks_per_node": self.ranks_per_node,
            "gpus_per_node": profile.gpus_per_node,
            "cpus_per_task": profile.cpus_per_task,
            "mem": f"{profile.memory_gb}GB" if profile.memory_gb else "",
            "partition": profile.partition,
            "account": profile.account,
            "qos": profile.qos,
            "constraint": profile.constraint,
            "exclude": profile.exclude,
            "exclusive": profile.exclusive,
            "dependency": self.dependency,
        }
        _refuse_what_breaks_lines({**given, **profile.sbatch}, self.run)
        executor.update_parameters(
            **{name: value for name, value in given.items() if value},
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
        box = self.profile.container
        if not box.image:
            return shlex.quote(self.profile.python or sys.executable)
        if box.runtime == "pyxis":
            return shlex.quote(box.python)  # srun enters the image
        binds = [word for mount in _mounts(box, self.run) for word in ("--bind", mount)]
        gpus = ["--nv"] if self.profile.gpus_per_node else []
        return shlex.join(["apptainer", "exec", *gpus, *binds, box.image, box.python])

    def _setup(self) -> list[str]:
        profile = self.profile
        lines = [f"module load {shlex.join(profile.modules)}"] if profile.modules else []
        lines += [f"export {name}={_expanding(value)}" for name, value in profile.environment.items()]
        if profile.interface:
            lines += [f"export {name}_SOCKET_IFNAME={shlex.quote(profile.interface)}" for name in ("NCCL", "GLOO")]
        if profile.scratch:
            lines.append(f"export SLURM_TMPDIR={_expanding(profile.scratch)}")
        lines.append(f"export PYTHONPATH={shlex.quote(str(self.code))}${{PYTHONPATH:+:$PYTHONPATH}}")
        lines.append("export PYTHONFAULTHANDLER=1")
        lines.append("trap : USR2 TERM  # the ranks save on these; what comes after them is decided at the end")
        return lines

    def _srun(self) -> list[str]:
        profile, words = self.profile, ["--kill-on-bad-exit=1", "--open-mode=append"]
        if profile.cpus_per_task:
            words.append(f"--cpus-per-task={profile.cpus_per_task}")  # srun does not take it from sbatch
        if profile.container.image and profile.container.runtime == "pyxis":
            words.append(f"--container-image={profile.container.image}")
            words.append(f"--container-mounts={','.join(_mounts(profile.container, self.run))}")
            words.append(f"--container-workdir={self.run}")
        return [*words, *profile.srun]

    def _teardown(self) -> list[str]:
        run, log = shlex.quote(str(self.run)), "${SLURM_JOB_ID}"
        if self.seeds:
            run += f"/seed-$(({self.config.train.seed} + ${{SLURM_ARRAY_TASK_ID:-0}}))"
        if self.seeds > 1:
            log = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
        outside = shlex.quote(self.profile.python or "python3")
        python = outside if self.profile.container.image else self._python()
        after = f"{python} {shlex.quote(str(self.code / 'slurm' / 'after.py'))}"
        logs = f"{shlex.quote(str(self.folder))}/{log}_0_log.out"
        return [
            "status=$?",
            f'{after} --run {run} --status "$status" --log {logs}',
            "exit $?",
        ]

    # ---- submitting --------------------------------------------------------------------------------------------------

    def test(self) -> str:
        """What `sbatch --test-only` says of the script, such as when it could start. Raises SubmitError."""
        need_slurm()
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(self.script())
            file.flush()
            done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True)
        said = " ".join(done.stderr.split())
        if done.returncode != 0:
            raise SubmitError(f"Slurm does not take this job: {_reason(said)}")
        return said.removeprefix("sbatch: ")

    def prepare(self, *, keep_code: bool = False) -> None:
        """Write what the job needs into the run folder; an earlier copy of the code stays if asked. Raises UserError."""
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
        """`prepare` and queue it; the job ids, one a run.

        Raises UserError; what an earlier submission had configured is put back then.
        """
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
            raise SubmitError(f"Slurm did not take the job: {_reason(str(error))}") from error
        for (run, _), job in zip(self._runs(), queued, strict=True):
            self._note(run, str(job.job_id))
        return [str(job.job_id) for job in queued]

    def _note(self, run: Path, job: str) -> None:
        said = {
            "job": job,
            "logs": str(self.folder),
            "name": self.name,
            "nodes": self.nodes,
            "ranks": self.ranks,
            "submitted": time.time(),
            "command": shlex.join(sys.argv),
            "folder": os.getcwd(),
            "profile": dataclasses.asdict(self.profile),
        }
        write_atomic(run / FOLDER / JOB, json.dumps(said, indent=1) + "\n")

    def _runs(self) -> list[tuple[Path, Config]]:
        if not self.seeds:
            return [(self.run, _in_folder(self.config, self.run))]
        runs = []
        for number in range(self.seeds):
            seed = self.config.train.seed + number
            run = self.run / f"seed-{seed}"
            seeded = replace(self.config, train=replace(self.config.train, seed=seed))
            runs.append((run, _in_folder(seeded, run)))
        return runs


def arguments(run: Path, allow_changes: bool = False) -> tuple[str, ...]:
    """The command line of train.py for a run that was prepared."""
    return ("--config", str(run / FOLDER / "config.yaml"), *(["--allow-changes"] if allow_changes else []))


def need_slurm() -> None:
    """Raises SubmitError where Slurm's commands are not."""
    if shutil.which("sbatch") is None:
        raise SubmitError(
            "there is no sbatch on this machine: submit from a login node of the cluster, train here with --local,\n"
            "or try Slurm on this machine: python -m slurm.local up"
        )


class _Executor(submitit.SlurmExecutor):
    """Starts ranks from the run's copy of the code; renders scripts where there is no Slurm, too."""

    def __init__(self, folder: Path, python: str, code: Path) -> None:
        super().__init__(folder=folder, python=python)
        self._code = code

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u {shlex.quote(str(self._code / 'slurm' / 'rank.py'))} {shlex.quote(str(self.folder))}"

    @classmethod
    def affinity(cls) -> int:
        return 2


def _refuse_what_breaks_lines(options: dict[str, Any], run: Path) -> None:
    """A line break ends an `#SBATCH` line, and the shell runs what comes after it; Slurm fills in `%j` within paths.

    Raises SubmitError.
    """
    for name, value in options.items():
        if "\n" in str(value):
            raise SubmitError(f"{name}: {value!r} has a line break, which no option of sbatch may have")
    if any(character in str(run) for character in "\n%\\"):
        raise SubmitError(f"run folder {str(run)!r}: Slurm's logs cannot lie there; choose one without % and backslash")


def _in_folder(config: Config, run: Path) -> Config:
    return replace(config, run=replace(config.run, folder=str(run)))


def _mounts(box: Container, run: Path) -> list[str]:
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in (*box.mounts, str(run))]


def _expanding(value: str) -> str:
    """A value for the shell in which only variables are filled in."""
    return '"' + re.sub(r'(["\\`])', r"\\\1", value).replace("$(", "\\$(") + '"'


def _reason(text: str) -> str:
    """Slurm's own words out of an error message."""
    said = re.findall(r"(?:sbatch: )?error: ([^\n]+?)(?= sbatch: |$)", " ".join(text.split()))
    return "; ".join(dict.fromkeys(said)) or " ".join(text.split())[-300:]
