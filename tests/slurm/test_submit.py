"""tools/submit.py and the profiles: the checks before a job is queued, and the job's script."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit

from dist_t2i.errors import ConfigError
from jobs import Job, submit
from ranks import ROOT
from runs import CONFIG
from slurm import attempts, submission
from slurm import profile as profiles
from slurm.local import LocalSlurm

PROFILES = sorted((ROOT / "slurm" / "profiles").glob("*.yaml"))


@pytest.fixture
def config(tmp_path, data) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG + f"run: {{folder: {tmp_path / 'run'}}}\n")
    file.write_text(file.read_text().replace("data: {", f"data: {{train: {data}, "))
    return file


# ---- profiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        *[("90m", 90), ("24h", 1440), ("2d", 2880), ("1d12h", 2160), ("45", 45), ("1-12:00:00", 2160)],
        *[("00:30:30", 31), ("30:00", 30), ("90:01", 91), ("12:00:00", 720), ("2-0", 2880), ("1-12:30", 2190)],
    ],
)
def test_times(text, minutes):
    assert profiles.minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "0", "24 hours", "-5", "1:2:3:4", "1-", "²"])
def test_what_is_not_a_time(text):
    with pytest.raises(ConfigError, match="write 90m" if text != "0" else "at least a minute"):
        profiles.minutes(text)


def test_every_problem_of_a_profile_is_named(tmp_path):
    file = tmp_path / "profile.yaml"
    file.write_text("partion: gpu\ngpus_per_node: many\nenvironment: [A]\ncontainer: {runtime: docker}\n")
    with pytest.raises(ConfigError) as caught:
        profiles.load(file)
    said = str(caught.value)
    assert "4 problems" in said and "did you mean partition?" in said and "expected one of pyxis, apptainer" in said
    assert "gpus_per_node: expected a whole number, got the text 'many'" in said


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("signal_seconds: 5", "at least 10"),
        ("time: 12:00:00", "put the text in quotes"),
        ("time: soon", "is not a time"),
        ("environment: {2X: 1}", "not the name of an environment variable"),
        ("container: {mounts: [/data]}", "there is no container.image"),
        ("- a", "expected `key: value` lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_profiles_that_cannot_be(tmp_path, text, problem):
    (tmp_path / "profile.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(problem)):
        profiles.load(tmp_path / "profile.yaml")


def test_a_profile_that_is_not_there_names_those_that_are(tmp_path):
    with pytest.raises(ConfigError, match=r"plain\.yaml"):
        profiles.load(tmp_path / "none.yaml")


class _GpuCluster(LocalSlurm):
    """A Slurm that claims the resources of the example profiles; no job runs on it."""

    def configuration(self) -> str:
        text = super().configuration()
        text = re.sub(r"CPUs=\d+", "CPUs=96 Gres=gpu:8", text) + "GresTypes=gpu\n"
        nodes = ",".join(self.nodes)
        for number in range(8):
            (self.folder / f"gpu{number}").touch()  # stands for a device
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        return text + "".join(f"PartitionName={name} Nodes={nodes}\n" for name in ("gpu", "preemptible"))


@pytest.mark.slurm
def test_slurm_takes_every_profile(cluster, tmp_path, config):
    """`cluster` only checks that Slurm is installed."""
    gpus = _GpuCluster(tmp_path / "gpus", nodes=2)
    gpus.up()
    try:
        for file in PROFILES:
            done = submit(
                *("--nodes", "2", "--config", str(config), "--profile", str(file), "--dry-run", "--account", "mine"),
                env=gpus.environment,
            )
            assert done.returncode == 0, done.stderr
            script = tmp_path / file.with_suffix(".sh").name
            script.write_text(done.stdout)
            said = subprocess.run(
                ["sbatch", "--test-only", str(script)], env=gpus.environment, capture_output=True, text=True
            )
            assert said.returncode == 0 and "to start at" in said.stderr, (file, said.stderr)
    finally:
        gpus.down()


def test_containers_modules_and_environment_in_the_script(tmp_path, config):
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        "gpus_per_node: 2\nmodules: [cuda/12.6, nccl]\nscratch: /scratch/$USER\ninterface: ib0\n"
        'environment: {NOTE: "a $HOME `b` \\"c\\" $(d) ${NONE:-$(e)}"}\ncontainer: {image: /img/x.sif, mounts: [/data]}\n'
        "sbatch: {mail-type: FAIL}\nsrun: [--mpi=none]\n"
    )
    words = ("--nodes", "3", "--config", str(config), "--profile", str(profile), "--dry-run", "--time", "2d")
    script = submit(*words, "--qos", "long", "--dependency", "afterok:7").stdout
    for line in (
        *("#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=2", "#SBATCH --gpus-per-node=2", "#SBATCH --time=2880"),
        *("#SBATCH --qos=long", "#SBATCH --dependency=afterok:7", "#SBATCH --mail-type=FAIL", "#SBATCH --requeue"),
        *("#SBATCH --signal=USR2@120", "module load cuda/12.6 nccl", 'export SLURM_TMPDIR="/scratch/$USER"'),
        *("export NCCL_SOCKET_IFNAME=ib0", "export GLOO_SOCKET_IFNAME=ib0"),
    ):
        assert f"{line}\n" in script, line
    assert "apptainer exec --nv --bind /data:/data --bind " in script and "/img/x.sif python3 -u " in script
    assert "--mpi=none" in script and "--kill-on-bad-exit=1" in script
    (export,) = re.findall(r"export NOTE=.*", script)
    said = subprocess.run(["bash", "-c", f'{export}; printf %s "$NOTE"'], capture_output=True, text=True).stdout
    assert said == f'a {os.environ["HOME"]} `b` "c" $(d) $(e)', "variables are filled in, and nothing is run"
    profile.write_text(profile.read_text().replace("image:", "runtime: pyxis, image:"))
    script = submit(*words).stdout
    assert "--container-image=/img/x.sif" in script and "--container-mounts=/data:/data," in script
    assert re.search(r"^python3 /", script, re.MULTILINE), "what decides at the end runs outside"
    profile.write_text(profile.read_text() + f"python: {tmp_path}/my python\n")
    script = submit(*words).stdout
    assert f"\n'{tmp_path}/my python' /" in script and " python3 -u /" in script


def test_odd_names_stay_what_they_are(tmp_path, config):
    """Values keep their meaning in the script and in the shell that runs it; other values are refused."""
    run = tmp_path / 'it\'s a "run" $(HOME) ünï'
    script = submit("--config", str(config), "--name", 'a "näme"', f"run.folder={run}", "--dry-run").stdout
    assert "#SBATCH --job-name='a \"näme\"'\n" in script
    teardown = script.partition("# teardown")[2].replace(sys.executable, "printf '%s\\n'")
    said = subprocess.run(["bash", "-c", teardown], capture_output=True, text=True).stdout
    assert said.splitlines()[:3] == [f"{run}/code/slurm/after.py", "--run", str(run)]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--name", "a\ntouch b"], "has a line break"),
        (["run.name=a\ntouch b"], "has a line break"),
        (["run.folder=/tmp/50%j"], "choose one without %"),
    ],
)
def test_what_would_break_the_script(config, words, problem):
    done = submit("--config", str(config), *words, "--dry-run")
    assert done.returncode == 2 and problem in done.stderr and not done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", submission.PRIVATE)
def test_private_names_of_submitit(name):
    assert hasattr(submitit.SlurmExecutor, name)


# ---- before anything is queued ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train.global_batch=x"], "train.global_batch"),
        (["data.train=/nowhere"], "/nowhere"),
        (["--nodes", "3"], "train.global_batch"),
        (["--nodes", "0"], "--nodes 0"),
        (["--partition", "nope"], "invalid partition"),
        (["--nodes", "99", "train.global_batch=396"], "node"),
        (["--time", "soon"], "is not a time"),
        (["--gpus-per-node", "-2"], "gpus_per_node: must be at least 0"),
        (["--array-seeds", "-1"], "--array-seeds -1"),
        (["--array-seeds", "2", "--follow"], "--follow prints one log"),
        (["--profile", "/nowhere.yaml"], "no profile /nowhere.yaml"),
        (["--local", "--nodes", "2"], "--local runs one node"),
        (["--local", "--dry-run"], "--local has no batch script"),
    ],
)
@pytest.mark.slurm
def test_nothing_is_queued_when_something_is_wrong(cluster, config, tmp_path, words, problem):
    before = cluster.command("squeue", "-h", "-o", "%i")
    given = [] if "--profile" in words else ["--profile", str(PROFILES[0].with_name("local.yaml"))]
    done = submit("--config", str(config), *given, *words, env=cluster.environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert problem in done.stderr and done.stderr.startswith("error: "), done.stderr
    assert not (tmp_path / "run").exists() and cluster.command("squeue", "-h", "-o", "%i") == before


def test_without_slurm_it_says_what_to_do(config):
    done = submit("--config", str(config), env={**os.environ, "PATH": str(Path(sys.executable).parent)})
    assert done.returncode == 2 and "there is no sbatch" in done.stderr and "slurm.local up" in done.stderr


@pytest.mark.parametrize("action", ["status", "logs", "cancel", "resume"])
@pytest.mark.slurm
def test_a_folder_that_was_not_submitted(cluster, tmp_path, action):
    done = submit(action, str(tmp_path), env=cluster.environment)
    assert done.returncode == 2 and "is not a submitted run" in done.stderr, done.stderr


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.slurm
def test_an_array_of_seeds_that_are_followed_and_looked_at(cluster, data, tmp_path):
    """Two seeds in two folders run the copy of the code, with status and logs of each. A live run is not submitted
    twice."""
    run = Job(cluster, tmp_path / "run", data, "train.total_images=16", nodes=1)
    words = ("--nodes", "1", "--config", str(run.config), "--profile", str(PROFILES[0].with_name("local.yaml")))
    first = cluster.command("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 600").strip()
    seeds = ("--array-seeds", "2", "--dependency", f"afterany:{first}", "train.seed=5", *run.overrides)
    shown = run.tool(*words, *seeds, "--dry-run")
    said = run.tool(*words, *seeds)
    assert re.search(r"queued as job (\d+)_0, \1_1", said)
    (queued,) = (run.folder / "slurm").glob("*_submission.sh")
    assert "\n#SBATCH --array=0-1%2\n" in shown and queued.read_text() in shown, "what is shown is what is queued"
    again = run.tool(*words, "--array-seeds", "2", "train.seed=5", *run.overrides, status=2)
    assert "cancel it first" in again
    here = run.tool("--local", "--config", str(run.config), *run.overrides, status=2)
    assert "cancel it first" in here, "it would replace the code that the job starts again from"
    cluster.command("scancel", first)
    folders = [run.folder / "seed-5", run.folder / "seed-6"]
    run.wait_for(lambda: all(state(run, folder) == "finished" for folder in folders), "both seeds")
    weights = [(folder / "checkpoints/images-000000016/generator.safetensors").read_bytes() for folder in folders]
    assert weights[0] != weights[1]
    assert "finished: 16 images" in run.tool("logs", str(folders[1]))
    assert "finished" in run.tool("logs", str(folders[0]), "-f")
    assert "--rank 5: the run has ranks 0 to 0" in run.tool("logs", str(folders[0]), "--rank", "5", status=2)
    about = json.loads((run.folder / "code.json").read_text())
    assert about["revision"] and (run.folder / "code" / "slurm" / "rank.py").exists()
    assert run.tool("status", str(run.folder)).count("finished, job") == 2
    assert "is not in the queue (finished)" in run.tool("cancel", str(folders[0]))
    assert "--nodes 0: " in run.tool("resume", str(folders[0]), "--nodes", "0", status=2)
    refused_resume(cluster, tmp_path, folders[0])
    said = run.tool("resume", str(folders[0]), "train.total_images=24", "--follow")
    (job,) = re.findall(r"queued as job (\d+):", said)
    assert " JobName=run " in cluster.command("scontrol", "-o", "show", "job", job), "the name of the array"
    assert state(run, folders[0]) == "finished" and (folders[0] / "checkpoints/images-000000024").is_dir()
    assert (folders[0] / "code" / "slurm" / "rank.py").read_bytes() == (run.folder / "code/slurm/rank.py").read_bytes()


TWO_TASKS = """#!/bin/bash
#SBATCH --array=0-1 --output=/dev/null --requeue
[ "$SLURM_JOB_ID" = "$SLURM_ARRAY_JOB_ID" ] || exec sleep 100
[ -z "$SLURM_RESTART_COUNT" ] || exec sleep 100
until [ "$(squeue -h -t RUNNING -j "$SLURM_ARRAY_JOB_ID" -o %i | wc -l)" = 2 ]; do sleep 0.1; done
"""


@pytest.mark.slurm
def test_a_task_of_an_array_is_queued_again_alone(cluster, tmp_path):
    """One task has the array's own number. With this number, Slurm's commands would apply to all tasks."""
    after = f"{sys.executable} {ROOT / 'slurm' / 'after.py'} --run {tmp_path} --status 75\n"
    (tmp_path / "job.sh").write_text(TWO_TASKS + after)
    (array,) = re.findall(r"\d+", cluster.command("sbatch", str(tmp_path / "job.sh")))
    try:
        shown = wait_for_restart(cluster, array)
    finally:
        cluster.command("scancel", array)
    restarts = {job: int(count) for job, count in re.findall(r"JobId=(\d+) .*? Restarts=(\d+)", shown)}
    assert restarts.pop(array) == 1 and list(restarts.values()) == [0], shown


@pytest.mark.slurm
def test_a_job_that_slurm_does_not_queue_again(cluster, tmp_path):
    """`status` reports this, and why the job had ended."""
    after = f"{sys.executable} {ROOT / 'slurm' / 'after.py'} --run {tmp_path} --status 75"
    said = cluster.command(
        "sbatch", "-W", "--parsable", "--no-requeue", "-o", "/dev/null", "--wrap", f"{after} || true"
    )
    first, last = (json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines())
    assert first["verdict"] == "requeued" and last["verdict"] == "given up" and last["job"] == said.strip()
    assert last["reason"].startswith("Slurm did not queue the job again") and "checkpoint saved" in last["reason"]


@pytest.mark.slurm
@pytest.mark.parametrize("moment", ["before the end of the script looks", "between its look and the requeue"])
def test_cancelled_at_the_last_moment(cluster, tmp_path, moment):
    """A job that its user cancels at the moment of its requeue stays cancelled."""
    note = f'{json.dumps({"event": "cancel"})[:-1]}, "job": "\'$SLURM_JOB_ID\'", "time": 0}}'
    cancel = f"echo '{note}' >>{tmp_path}/attempts.jsonl; {shutil.which('scancel')} $SLURM_JOB_ID"
    with_it = f'trap "" TERM\ncase "$1" in requeue) {cancel};; esac\n' if moment.startswith("between") else ""
    program(tmp_path / "bin" / "scontrol", f'{with_it}exec {shutil.which("scontrol")} "$@"\n')
    first = "" if with_it else f"{cancel.partition(';')[0]}\n"
    after = f"{sys.executable} {ROOT / 'slurm' / 'after.py'} --run {tmp_path} --status 75\n"
    script = (
        f"#!/bin/bash\n#SBATCH --requeue --output={tmp_path}/said\nexport PATH={tmp_path}/bin:$PATH\n"
        f"trap : USR2 TERM\n{first}{after}"  # as in every script of `Submission`
    )
    (tmp_path / "job.sh").write_text(script)
    job, end = cluster.command("sbatch", "--parsable", str(tmp_path / "job.sh")).strip(), time.monotonic() + 60
    while not (ends := cancelled_ends(tmp_path)) or not re.search(
        "JobState=(CANCELLED|COMPLETED) ", shown := cluster.command("scontrol", "-o", "show", "job", job)
    ):
        assert time.monotonic() < end, f"{ends}\n{cluster.command('scontrol', '-o', 'show', 'job', job)}"
        time.sleep(0.1)
    assert len(ends) == 1 and ("Restarts=1" in shown) == bool(with_it), shown


def refused_resume(cluster: LocalSlurm, folder: Path, run: Path) -> None:
    """Slurm stops between the check of the script and its submission; the run folder does not change."""
    refusing = (
        'case "$*" in *--test-only*) exec {} "$@";; esac\necho "sbatch: error: Unable to contact slurm" >&2; exit 1\n'
    )
    program(folder / "bin" / "sbatch", refusing.format(shutil.which("sbatch")))
    environment = {**cluster.environment, "PATH": f"{folder / 'bin'}:{cluster.environment['PATH']}"}
    before = {file: file.read_bytes() for file in (run / "slurm").glob("*") if file.suffix in (".yaml", ".json")}
    done = submit("resume", str(run), "train.total_images=64", env=environment)
    assert done.returncode == 2 and "Slurm did not accept the job: Unable to contact" in done.stderr, done.stderr
    assert len(before) == 2 and all(file.read_bytes() == content for file, content in before.items())


def cancelled_ends(run: Path) -> list[dict]:
    """Attempts that ended because the job was cancelled."""
    return [entry for entry in attempts.read(run) if entry.get("reason") == "CANCELLED"]


def program(file: Path, lines: str) -> None:
    file.parent.mkdir()
    file.write_text(f"#!/bin/bash\n{lines}")
    file.chmod(0o755)


def wait_for_restart(cluster: LocalSlurm, array: str) -> str:
    """Slurm's list of the tasks after one of them was queued again."""
    end = time.monotonic() + 60
    while "Restarts=1" not in (shown := cluster.command("scontrol", "-o", "show", "job", array)):
        assert time.monotonic() < end, shown
        time.sleep(0.1)
    return shown


def state(run: Job, folder: Path) -> str:
    said = run.tool("status", str(folder), "--json", status=None)
    return json.loads(said)["state"] if said.startswith("{") else ""


@pytest.mark.slow
def test_the_same_job_without_slurm(config, tmp_path):
    done = submit("--local", "--config", str(config), "train.total_images=16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/checkpoints/images-000000016").is_dir() and (tmp_path / "run/code/dist_t2i").is_dir()
