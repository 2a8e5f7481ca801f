"""Submit a training run to Slurm, and look after it.

python tools/submit.py --nodes 4 --config configs/openmoji64.yaml [--profile slurm/profiles/NAME.yaml] [a.b=c ...]
python tools/submit.py status RUN
python tools/submit.py logs RUN [--rank R] [-f]
python tools/submit.py cancel RUN
python tools/submit.py resume RUN [--nodes 2]

Configuration, data and profile are checked before anything is queued. The job comes back by itself from time limits,
preemption and failures, and goes on from its last checkpoint: docs/preemption.md. Every command has its own --help.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dist_t2i.config import files as config_files
from dist_t2i.errors import ExitStatus, UserError, run_command
from slurm import attempts, status
from slurm import profile as profiles
from slurm.submission import FOLDER, Submission, SubmitError, need_slurm

ACTIONS = ("status", "logs", "cancel", "resume")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; without one of `ACTIONS` in front it submits."""
    if arguments and arguments[0] in ACTIONS:
        chosen = _parser_of(arguments[0]).parse_intermixed_args(arguments[1:])
        chosen.action = arguments[0]
        return chosen
    parser = argparse.ArgumentParser(
        prog="submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="go before the file's values")
    parser.add_argument("--name", help="of job and run; default: the config file's name")
    parser.add_argument("--array-seeds", type=int, default=0, metavar="N", help="N runs that differ in their seed")
    parser.add_argument("--local", action="store_true", help="run the same here and now, without Slurm")
    parser.add_argument("--allow-changes", action="store_true", help="as in train.py")
    _add_job_options(parser)
    chosen = parser.parse_intermixed_args(arguments)
    chosen.action = "submit"
    return chosen


def _parser_of(action: str) -> argparse.ArgumentParser:
    about = {
        "status": "How a run is doing: queued, running, preempted k times, failed because ...",
        "logs": "What a rank says.",
        "cancel": "End the job: it saves a checkpoint first, and does not come back.",
        "resume": "Submit a run again, to go on from its last checkpoint.",
    }
    parser = argparse.ArgumentParser(prog=f"submit.py {action}", description=about[action])
    parser.add_argument("run", type=Path, help="the run folder")
    if action == "status":
        parser.add_argument("--json", action="store_true", help="for programs")
    elif action == "logs":
        parser.add_argument("--rank", type=int, default=0)
        parser.add_argument("-f", "--follow", action="store_true", help="until the job has ended")
    elif action == "resume":
        parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="go before the run's values")
        parser.add_argument("--update-code", action="store_true", help="run the code of now, not the run's copy")
        parser.add_argument("--allow-changes", action="store_true", help="as in train.py")
        _add_job_options(parser)
    return parser


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--profile", type=Path, help="YAML file of the cluster, see slurm/profiles")
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--time", help="limit of one attempt, such as 24h; the job goes on in another one")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--dependency", default="", help="as of sbatch, such as afterok:123")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and queue nothing")
    parser.add_argument("--follow", action="store_true", help="show what rank 0 says until the job has ended")


def main() -> int:
    chosen = parse(sys.argv[1:])
    action = {"submit": submit, "status": show, "logs": logs, "cancel": cancel, "resume": resume}[chosen.action]
    try:
        result = action(chosen)
        sys.stdout.flush()
    except BrokenPipeError:  # `logs RUN | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return result


# ---- submit and resume -----------------------------------------------------------------------------------------------


def submit(chosen: argparse.Namespace) -> int:
    config = config_files.load(chosen.config, chosen.overrides)
    folder = config.run.folder or str(Path("runs") / (chosen.name or chosen.config.stem))
    run = Path(folder).expanduser().absolute()
    submission = Submission(
        run,
        config,
        _profile(chosen, profiles.Profile()),
        nodes=1 if chosen.nodes is None else chosen.nodes,
        name=chosen.name or config.run.name or run.name,
        dependency=chosen.dependency,
        seeds=chosen.array_seeds,
        allow_changes=chosen.allow_changes,
    )
    if chosen.follow and chosen.array_seeds:
        raise UserError("--follow shows one run, and --array-seeds starts several: follow one with logs RUN/seed-N -f")
    if chosen.local:
        if chosen.dry_run:
            raise UserError("--dry-run prints a batch script, and --local has none")
        return _train_here(submission)
    return _queue(submission, chosen)


def resume(chosen: argparse.Namespace) -> int:
    run = chosen.run.expanduser().absolute()
    before = status.submitted(run)
    base = profiles.from_plain(before["profile"])
    submission = Submission(
        run,
        config_files.load(run / FOLDER / "config.yaml", chosen.overrides),
        _profile(chosen, base),
        nodes=before["nodes"] if chosen.nodes is None else chosen.nodes,
        name=before.get("name") or run.name,
        dependency=chosen.dependency,
        allow_changes=chosen.allow_changes,
    )
    return _queue(submission, chosen, keep_code=not chosen.update_code)


def _profile(chosen: argparse.Namespace, base: profiles.Profile) -> profiles.Profile:
    profile = profiles.load(chosen.profile) if chosen.profile else base
    given = {name: getattr(chosen, name) for name in ("gpus_per_node", "time", "partition", "account", "qos")}
    profile = dataclasses.replace(profile, **{name: value for name, value in given.items() if value is not None})
    return profiles.check(profile, "the profile, with the options given")


def _queue(submission: Submission, chosen: argparse.Namespace, *, keep_code: bool = False) -> int:
    if chosen.dry_run:
        print(submission.script())
        return 0
    need_slurm()
    _refuse_if_live(submission.run, _seen)
    print(f"data: {submission.check()}")
    print(f"Slurm: {submission.test()}")
    jobs = submission.submit(keep_code=keep_code)
    run = shlex.quote(_shown(submission.run))
    print(f"run folder: {run}")
    print(f"queued as job {', '.join(jobs)}: {submission.nodes} nodes, {submission.ranks} ranks")
    here = f"python {shlex.quote(sys.argv[0])}"
    print(f"follow it:  {here} logs {run} -f\nsee it:     {here} status {run}\nend it:     {here} cancel {run}")
    return _follow(submission.run, 0) if chosen.follow else 0


def _refuse_if_live(run: Path, look: Callable[[Path], status.State]) -> None:
    for one in status.runs_under(run, missing_ok=True):
        state = look(one)
        if state.live:
            raise SubmitError(f"{one} is {state.word} as job {state.job}: cancel that first, or choose another --name")


def _seen(run: Path) -> status.State:
    """Its state by Slurm's own word. Raises SubmitError when Slurm does not answer."""
    state = status.look(run)
    if state.silent:
        raise SubmitError(
            f"Slurm does not answer, so it cannot be told whether job {state.job} of {run} is in the queue"
        )
    return state


def _train_here(submission: Submission) -> int:
    from dist_t2i.distributed import supervisor

    if submission.nodes != 1 or submission.seeds:
        raise UserError("--local runs one node on this machine: leave out --nodes and --array-seeds")
    _refuse_if_live(submission.run, status.look)  # where Slurm does not answer, there may be none any more
    print(f"data: {submission.check()}")
    submission.prepare()
    launcher = ["--num_gpus", str(submission.ranks)]
    supervisor.train(
        submission.run / FOLDER / "config.yaml",
        ["--allow-changes"] * submission.allow_changes,
        submission.run,
        entry=submission.code / "dist_t2i" / "train.py",
        launcher=launcher,
    )
    return 0


def _shown(run: Path) -> str:
    here = os.path.relpath(run)
    return str(run) if here.startswith("..") else here


# ---- looking after a run ---------------------------------------------------------------------------------------------


def show(chosen: argparse.Namespace) -> int:
    states = [status.look(run) for run in status.runs_under(chosen.run)]
    if chosen.json:
        said = [{**dataclasses.asdict(state), "state": state.word, "why": state.why} for state in states]
        print(json.dumps(said if len(said) > 1 else said[0], indent=1, default=str))
    else:
        print("\n".join(status.describe(state) for state in states))
    return 1 if any(state.word == "failed" for state in states) else 0


def logs(chosen: argparse.Namespace) -> int:
    if chosen.follow:
        return _follow(chosen.run, chosen.rank)
    file = _log(chosen.run, chosen.rank)
    if not file.exists():
        raise UserError(f"rank {chosen.rank} has said nothing yet ({file})")
    with file.open("rb") as source:
        shutil.copyfileobj(source, sys.stdout.buffer)
    return 0


def cancel(chosen: argparse.Namespace) -> int:
    need_slurm()
    for run in status.runs_under(chosen.run):
        state = _seen(run)
        if not state.live:
            print(f"{run}: job {state.job} is not in the queue ({state.word})")
            continue
        attempts.note(run, event="cancel", job=state.job)  # first: a job that ends just now must not come back
        done = subprocess.run(["scancel", state.job], capture_output=True, text=True)
        if done.returncode:
            attempts.note(run, event="cancel failed", job=state.job)
            raise SubmitError(f"scancel {state.job}: {done.stderr.strip()}")
        print(f"{run}: job {state.job} cancelled; a running one saves a checkpoint as it ends")
    return 0


def _log(run: Path, rank: int) -> Path:
    said = status.submitted(run)
    if not 0 <= rank < said["ranks"]:
        raise UserError(f"--rank {rank}: the run has ranks 0 to {said['ranks'] - 1}")
    return Path(said["logs"]) / f"{said['job']}_{rank}_log.out"


def _follow(run: Path, rank: int) -> int:
    """Copy a rank's log to the terminal until the job has left the queue; Ctrl-C leaves the job alone."""
    file, place, asked, live = _log(run, rank), 0, 0.0, True
    try:
        while True:
            if file.exists():
                with file.open("rb") as source:
                    source.seek(place)
                    shutil.copyfileobj(source, sys.stdout.buffer)
                    place = source.tell()
                sys.stdout.buffer.flush()
            if not live:
                break
            if time.monotonic() > asked + 5:
                state = status.look(run)
                asked, live = time.monotonic(), state.live or state.silent
            time.sleep(0.5)
    except KeyboardInterrupt:
        print("\nthe job goes on", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    state = status.look(run)
    print(status.describe(state))
    return 1 if state.word == "failed" else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
