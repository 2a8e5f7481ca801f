"""Submit a training run to Slurm, and manage it.

python tools/submit.py --nodes 4 --config configs/openmoji64.yaml [--profile slurm/profiles/NAME.yaml] [a.b=c ...]
python tools/submit.py status RUN
python tools/submit.py logs RUN [--rank R] [-f]
python tools/submit.py cancel RUN
python tools/submit.py resume RUN [--nodes 2]

The configuration, the data and the profile are checked before a job is queued. After a time limit, a preemption or a
failure, the job is queued again and resumes from its last checkpoint (see docs/preemption.md). Every command has its
own --help.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dist_t2i.config import files as config_files
from dist_t2i.distributed import supervisor
from dist_t2i.errors import ExitStatus, UserError
from slurm import attempts, status
from slurm import profile as profiles
from slurm.submission import FOLDER, Submission, SubmitError, need_slurm

_DESCRIPTIONS = {
    "submit": __doc__,
    "status": "Print the state of a run, such as queued, running, preempted k times, or failed because ...",
    "logs": "Print the log of a rank.",
    "cancel": "End the job for good; a running job saves a checkpoint first.",
    "resume": "Submit a run again, so that the run resumes from its last checkpoint.",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line. A line that does not begin with a command is for `submit`."""
    command, words = "submit", arguments
    if arguments and arguments[0] in _DESCRIPTIONS.keys() - {"submit"}:
        command, *words = arguments
    parser = argparse.ArgumentParser(
        prog="submit.py" if command == "submit" else f"submit.py {command}",
        description=_DESCRIPTIONS[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    if command == "submit":
        config = "YAML file of the run (default: configs/scenes32.yaml)"
        parser.add_argument("--config", type=Path, help=config)
        parser.add_argument("--name", help="name of the job and the run (default: name of the configuration file)")
        parser.add_argument("--array-seeds", type=int, default=0, metavar="N", help="submit N runs of different seeds")
        parser.add_argument("--local", action="store_true", help="train on this machine now, without Slurm")
    else:
        parser.add_argument("run", type=Path, help="the run folder")
    if command == "status":
        parser.add_argument("--json", action="store_true", help="print JSON")
    elif command == "logs":
        parser.add_argument("--rank", type=int, default=0)
        parser.add_argument("-f", "--follow", action="store_true", help="print new lines until the job has ended")
    elif command == "resume":
        parser.add_argument("--update-code", action="store_true", help="use the current code instead of the run's copy")
    if command in ("submit", "resume"):
        _add_job_options(parser)
    return parser.parse_intermixed_args(words)


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the configuration")
    parser.add_argument("--allow-changes", action="store_true", help="as in train.py")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--profile", type=Path, help="YAML file of the cluster (see slurm/profiles)")
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--time", help="time limit of one attempt, such as 24h; the next attempt resumes the run")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--dependency", default="", help="as in sbatch, such as afterok:123")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script without queueing a job")
    parser.add_argument("--follow", action="store_true", help="print the log of rank 0 until the job has ended")


def main() -> int:
    """Returns the exit status. Raises UserError."""
    options = parse(sys.argv[1:])
    command = {"submit": submit, "status": show, "logs": logs, "cancel": cancel, "resume": resume}[options.command]
    try:
        result = command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has ended, as in `logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return result


# ---- submit and resume -----------------------------------------------------------------------------------------------


def submit(options: argparse.Namespace) -> int:
    from dist_t2i.sharding import built_in  # takes long to import

    profile = _profile(options, profiles.Profile())
    path = options.config or built_in.default_config(gpu=profile.gpus_per_node > 0)
    config = config_files.load(path, options.overrides)
    if options.config is None:
        print(built_in.choice(path, config.data.train), flush=True)
    if not options.dry_run:
        built_in.write_missing(config.data.train, config.data.image_size)
    folder = config.run.folder or str(Path("runs") / (options.name or path.stem))
    run = Path(folder).expanduser().absolute()
    submission = Submission(
        run,
        config,
        profile,
        nodes=1 if options.nodes is None else options.nodes,
        name=options.name or config.run.name or run.name,
        dependency=options.dependency,
        seeds=options.array_seeds,
        allow_changes=options.allow_changes,
    )
    if options.follow and options.array_seeds:
        raise UserError("--follow prints one log, but --array-seeds starts several runs; use logs RUN/seed-N -f later")
    if options.local:
        if options.dry_run:
            raise UserError("--dry-run prints a batch script, but --local has no batch script; leave out one option")
        return _train_here(submission)
    return _queue(submission, options)


def resume(options: argparse.Namespace) -> int:
    run = options.run.expanduser().absolute()
    before = status.submitted(run)
    submission = Submission(
        run,
        config_files.load(run / FOLDER / "config.yaml", options.overrides),
        _profile(options, profiles.from_plain(before["profile"])),
        nodes=before["nodes"] if options.nodes is None else options.nodes,
        name=before.get("name") or run.name,
        dependency=options.dependency,
        allow_changes=options.allow_changes,
    )
    return _queue(submission, options, keep_code=not options.update_code)


def _profile(options: argparse.Namespace, base: profiles.Profile) -> profiles.Profile:
    profile = profiles.load(options.profile) if options.profile else base
    given = {name: getattr(options, name) for name in ("gpus_per_node", "time", "partition", "account", "qos")}
    profile = dataclasses.replace(profile, **{name: value for name, value in given.items() if value is not None})
    return profiles.check(profile, "the profile, changed by the options")


def _queue(submission: Submission, options: argparse.Namespace, *, keep_code: bool = False) -> int:
    if options.dry_run:
        print(submission.script())
        return 0
    need_slurm()
    _refuse_if_live(submission.run, _ask)
    _check(submission)
    print(f"Slurm: {submission.test()}")
    jobs = submission.submit(keep_code=keep_code)
    relative = os.path.relpath(submission.run)
    run = shlex.quote(str(submission.run) if relative.startswith("..") else relative)
    print(f"run folder: {run}")
    print(f"queued as job {', '.join(jobs)}: {submission.nodes} nodes, {submission.ranks} ranks")
    tool = f"python {shlex.quote(sys.argv[0])}"
    print(f"log:     {tool} logs {run} -f\nstatus:  {tool} status {run}\ncancel:  {tool} cancel {run}")
    return _follow(submission.run, 0) if options.follow else 0


def _check(submission: Submission) -> None:
    from dist_t2i.data.open_data import open_data  # a late import, so that `status` starts faster

    submission.check()
    data = open_data(submission.config.data)
    train = data.manifest["splits"]["train"]
    counts = f"{train['samples']:,} pictures, {train.get('captions', {}).get('count', 0):,} captions"
    print(f"data: {counts}, {len(train['shards']):,} shards in {data.folder}")


def _refuse_if_live(folder: Path, look: Callable[[Path], status.State]) -> None:
    for run in status.runs_under(folder, missing_ok=True):
        state = look(run)
        if state.live:
            raise SubmitError(f"{run} is {state.word} as job {state.job}: cancel it first, or choose another --name")


def _ask(run: Path) -> status.State:
    """The state of a run according to Slurm. Raises SubmitError if Slurm does not answer."""
    state = status.look(run)
    if state.silent:
        raise SubmitError(f"Slurm does not answer: job {state.job} of {run} may or may not be in the queue")
    return state


def _train_here(submission: Submission) -> int:
    if submission.nodes != 1 or submission.seeds:
        raise UserError("--local runs one node on this machine: leave out --nodes and --array-seeds")
    _refuse_if_live(submission.run, status.look)  # `status.look` works without Slurm
    _check(submission)
    submission.prepare()
    supervisor.train(
        submission.run / FOLDER / "config.yaml",
        ["--allow-changes"] * submission.allow_changes,
        submission.run,
        entry=submission.code / "dist_t2i" / "train.py",
        launcher=["--num_gpus", str(submission.ranks)],
    )
    return 0


# ---- looking after a run ---------------------------------------------------------------------------------------------


def show(options: argparse.Namespace) -> int:
    states = [status.look(run) for run in status.runs_under(options.run)]
    if options.json:
        plain = [{**dataclasses.asdict(state), "state": state.word, "why": state.why} for state in states]
        print(json.dumps(plain if len(plain) > 1 else plain[0], indent=1, default=str))
    else:
        print("\n".join(status.describe(state) for state in states))
    return 1 if any(state.word in ("failed", "diverged") for state in states) else 0


def logs(options: argparse.Namespace) -> int:
    if options.follow:
        return _follow(options.run, options.rank)
    log = _log(options.run, options.rank)
    if not log.exists():
        raise UserError(f"rank {options.rank} has no log yet ({log})")
    _copy_from(log, 0)
    return 0


def cancel(options: argparse.Namespace) -> int:
    need_slurm()
    for run in status.runs_under(options.run):
        state = _ask(run)
        if not state.live:
            print(f"{run}: job {state.job} is not in the queue ({state.word})")
            continue
        attempts.note(run, event="cancel", job=state.job)  # before scancel, so that after.py does not requeue the job
        done = subprocess.run(["scancel", state.job], capture_output=True, text=True)
        if done.returncode:
            attempts.note(run, event="cancel failed", job=state.job)
            raise SubmitError(f"scancel {state.job}: {done.stderr.strip()}")
        print(f"{run}: job {state.job} cancelled; a running job saves a checkpoint before it ends")
    return 0


def _log(run: Path, rank: int) -> Path:
    submission = status.submitted(run)
    if not 0 <= rank < submission["ranks"]:
        raise UserError(f"--rank {rank}: the run has ranks 0 to {submission['ranks'] - 1}")
    return Path(submission["logs"]) / f"{submission['job']}_{rank}_log.out"


def _copy_from(log: Path, offset: int) -> int:
    """Copy a log to stdout from byte `offset` to its end; returns the offset of the end."""
    with log.open("rb") as file:
        file.seek(offset)
        shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return file.tell()


def _follow(run: Path, rank: int) -> int:
    """Copy a rank's log to the terminal until the job has left the queue. Ctrl-C ends only the copying."""
    log, offset, asked, live = _log(run, rank), 0, 0.0, True
    try:
        while True:
            if log.exists():
                offset = _copy_from(log, offset)
            if not live:
                break
            if time.monotonic() > asked + 5:
                state = status.look(run)
                asked, live = time.monotonic(), state.live or state.silent
            time.sleep(0.5)
    except KeyboardInterrupt:
        print("\nthe job continues", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    state = status.look(run)
    print(status.describe(state))
    return 1 if state.word in ("failed", "diverged") else 0
