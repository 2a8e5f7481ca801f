"""`status` combines Slurm's answers with the files of the run folder, and reports what is missing."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_t2i.errors import UserError
from jobs import submit
from ranks import ROOT
from slurm import attempts, status
from slurm.after import srun_error
from slurm.local import LocalSlurm
from slurm.status import State


def note(run: Path, job: str = "12", **more: object) -> Path:
    """A run folder as a submission leaves it."""
    (run / "slurm").mkdir(parents=True)
    said = {"job": job, "logs": str(run / "slurm"), "nodes": 1, "ranks": 1, "profile": {}, "submitted": 100.0, **more}
    (run / "slurm" / "job.json").write_text(json.dumps(said))
    return run


def begin(moment: float) -> dict:
    return {"event": "begin", "job": "12", "restart": 0, "time": moment}


def end(**more: object) -> dict:
    return {"event": "end", "job": "12", "restart": 0, "time": 300.0, **more}


FINISHED = {"state": "finished", "updated": 200.0}


@pytest.mark.parametrize(
    ("word", "queue", "progress", "attempts"),
    [
        ("queued", "PENDING", {}, []),
        ("queued", "PENDING", FINISHED, [begin(150.0)]),
        ("running", "RUNNING", {}, [begin(150.0)]),
        ("finished", "RUNNING", FINISHED, [begin(150.0)]),
        ("finished", "COMPLETING", FINISHED, [begin(150.0)]),
        ("finished", "COMPLETED", FINISHED, [begin(150.0)]),
        ("finished", "", FINISHED, [begin(150.0)]),
        # Files of an earlier attempt do not describe this attempt.
        ("running", "RUNNING", FINISHED, [begin(250.0)]),
        ("running", "RUNNING", FINISHED | {"updated": 50.0}, []),
        ("cancelled", "CANCELLED", FINISHED | {"updated": 50.0}, []),
        ("failed", "", FINISHED, [begin(250.0), end(verdict="given up", reason="x")]),
        (
            "diverged",
            "FAILED",
            {"state": "diverged"},
            [begin(150.0), end(verdict="diverged", reason="x", kind="diverged")],
        ),
        ("failed", "TIMEOUT", {"state": "running"}, [begin(150.0)]),
        ("stopped", "", {"state": "stopped"}, [begin(150.0)]),
        ("gone", "", {"state": "running"}, [begin(150.0)]),
    ],
)
def test_words(word, queue, progress, attempts):
    state = State(Path("run"), "12", queue, progress=progress, attempts=attempts, submitted=100.0)
    assert state.word == word


def test_seeds_of_an_array_and_what_only_looks_like_one(tmp_path):
    for name in ("seed-10", "seed-9", "seed-a"):
        note(tmp_path / name)
    assert [run.name for run in status.runs_under(tmp_path)] == ["seed-9", "seed-10"]
    done = submit("logs", str(tmp_path))
    assert (
        done.returncode == 2 and f"it is an array: name one of its runs, such as {tmp_path / 'seed-9'}" in done.stderr
    )


@pytest.mark.parametrize("text", ["{", "{}", "[]", "12"])
def test_a_damaged_note_is_named(tmp_path, text):
    (note(tmp_path / "run") / "slurm" / "job.json").write_text(text)
    with pytest.raises(UserError, match=r"job\.json"):
        status.submitted(tmp_path / "run")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("action", ["status", "logs", "cancel", "resume"])
def test_a_folder_of_somebody_else(tmp_path, action):
    """Prints no traceback. Runs as the user nobody, in a process that has already imported its modules."""
    note(tmp_path / "mine" / "run")
    (tmp_path / "mine").chmod(0o700)
    words = ["submit.py", action, str(tmp_path / "mine" / "run")]
    code = f"import os, sys; sys.argv[:] = {words!r}; sys.path[0] = {str(ROOT)!r}; "
    code += "from dist_t2i.cli import submit; from dist_t2i.errors import run_command; "
    code += "submit.need_slurm = lambda: None; os.setuid(65534); sys.exit(run_command(submit.main))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "cannot be read" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_accounting_is_asked_where_the_controller_has_forgotten(tmp_path, monkeypatch):
    """A program that prints what sacct would print, because a real accounting database needs a database server."""
    sacct = tmp_path / "sacct"
    sacct.write_text('#!/bin/sh\n[ "$*" = "-n -X -P -j 12 -o State" ] && echo "CANCELLED by 1000"\n')
    sacct.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert status.ask_slurm("12") == ("CANCELLED", "")


def test_a_reader_that_has_seen_enough(tmp_path):
    run = note(tmp_path / "run")
    (run / "slurm" / "12_0_log.out").write_text("a line\n" * 100_000)
    command = [sys.executable, str(ROOT / "tools" / "submit.py"), "logs", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "a line\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(240) == 0


@pytest.mark.slurm
def test_a_controller_that_is_away(cluster, tmp_path):
    """No command reports that the job is missing, because this cannot be known."""
    one = LocalSlurm(tmp_path / "one", nodes=1, settings={"MessageTimeout": "2"})
    one.up()
    try:
        run = note(tmp_path / "run", "1")
        said = submit("status", str(run), env=one.environment)
        assert said.returncode == 0 and ": gone, job 1\n" in said.stdout, "it answers, and knows of no such job"
        pid = int((one.folder / "run" / "slurmctld").read_text())
        os.kill(pid, signal.SIGKILL)
        said = submit("status", str(run), env=one.environment)
        assert ": unknown, job 1\n" in said.stdout and "Slurm does not answer" in said.stdout
        said = submit("cancel", str(run), env=one.environment)
        assert said.returncode == 2 and "Slurm does not answer: job 1 of" in said.stderr
    finally:
        one.down()


def test_a_connection_that_a_rank_has_trouble_with_itself_is_a_cause(tmp_path):
    """A connection to a lost rank is not reported as a cause."""
    refused = "s3://bucket/a.tar: the connection was refused"
    attempts.note_failure(tmp_path, "1", 0, 1, "RuntimeError", "gloo: Connection closed by peer")
    assert attempts.cause_of_failure(tmp_path, "1", 0) == ("", "")
    attempts.note_failure(tmp_path, "1", 0, 0, "DataError", refused, own=True)
    assert attempts.cause_of_failure(tmp_path, "1", 0)[0] == f"rank 0: DataError: {refused}"


@pytest.mark.parametrize("killed_first", [True, False])
def test_the_task_that_was_killed_is_named_and_not_those_that_it_took_along(tmp_path, killed_first):
    lines = ["srun: error: n2: task 1: Killed", "srun: error: n1: task 0: Exited with exit code 1"]
    log = tmp_path / "log"
    before = "srun: error: n3: task 2: Killed\njob 12, attempt 1: requeued: killed by SIGKILL (n3: task 2: Killed)\n"
    log.write_text(
        before + "\n".join(lines if killed_first else lines[::-1]) + "\nsrun: Force Terminated StepId=12.0\n"
    )
    assert srun_error(log) == " (n2: task 1: Killed)"
    log.write_text(
        before + "srun: error: n1: task 0: Exited with exit code 3\nsrun: error: n2: task 1: Exited with exit code 1\n"
    )
    assert srun_error(log) == " (n1: task 0: Exited with exit code 3)"
    log.write_text(before)
    assert srun_error(log) == "" and srun_error(tmp_path / "none") == ""


def test_the_end_of_the_script_runs_with_the_systems_python():
    """The script runs outside of containers and environments: it needs no library, only Python 3.7."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import slurm.after; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    own = {name for name in done.stdout.split() if name.partition(".")[0] in ("dist_t2i", "slurm")}
    assert own == {"dist_t2i", "dist_t2i.errors", "slurm", "slurm.after", "slurm.attempts"}
    for name in own:
        file = ROOT / name.replace(".", "/")
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        ast.parse(file.read_text(), feature_version=(3, 7))
