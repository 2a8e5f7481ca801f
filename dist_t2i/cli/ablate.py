"""Run an ablation: training with one change at a time over several seeds, and a report of the results.

python tools/ablate.py --config configs/ablation-openmoji.yaml [--seeds N] [--budget IMAGES] [--jobs 2]
python tools/ablate.py --config ... --slurm-profile slurm/profiles/plain.yaml     (Slurm arrays; repeat at their end)

To resume an interrupted ablation, repeat the command: finished runs and their scores are kept, and an interrupted run
continues from its checkpoint. The results are OUT/table.md, table.json, index.html and pictures; --write-doc also
writes the table to docs/. The report describes the method of comparison.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.cli.common import new_parser, say, write_built_in_set, writing
from dist_t2i.errors import UserError
from dist_t2i.utils.files import read_json, write_atomic

if TYPE_CHECKING:
    from dist_t2i.ablation.plan import Plan
    from dist_t2i.ablation.report import Findings
    from dist_t2i.ablation.runs import Configs
    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.eval.protocol import Protocol

STARTED = time.monotonic()


def main() -> int:
    parser = new_parser("ablate.py", __doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="see configs/ablation-openmoji.yaml")
    parser.add_argument("--seeds", type=int, metavar="N", help="number of runs of each arm (default: as in FILE)")
    parser.add_argument("--budget", type=int, metavar="IMAGES", help="images that each run sees (default: as in FILE)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs (default: runs/ablation-NAME)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of parallel runs on this machine")
    parser.add_argument("--slurm-profile", type=Path, metavar="FILE", help="train as Slurm arrays (see slurm/profiles)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of each Slurm job (default: 1)")
    parser.add_argument("--report-only", action="store_true", help="report the finished runs without training")
    doc = Path("docs/ablation.md")
    help_text = f"also write the report to this file (default: {doc})"
    parser.add_argument("--write-doc", type=Path, nargs="?", const=doc, metavar="FILE", help=help_text)
    args = parser.parse_args()
    from dist_t2i.ablation import plan as plans
    from dist_t2i.distributed.supervisor import Interrupted

    plan = plans.load(args.config, seeds=args.seeds, images=args.budget)
    out = args.out or Path("runs") / f"ablation-{plan.name}"
    with writing(out, "name another folder with --out"):
        out.mkdir(parents=True, exist_ok=True)
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    try:
        return ablate(plan, out, args)
    except Interrupted as stop:
        print(f"\n{stop}", flush=True)
        return stop.status
    finally:
        append_call(out, args.jobs)


def ablate(plan: Plan, out: Path, args: argparse.Namespace) -> int:
    """Runs all steps except those that earlier calls have finished. Returns the exit status."""
    from dist_t2i.ablation import runs
    from dist_t2i.data.open_data import open_data

    configs = plan.configs(out)
    data_config = next(iter(configs.values())).data
    folder = Path(str(data_config.train))
    if plan.source and not (folder / "manifest.json").is_file():
        say(f"writing the pictures to {folder}")
        write_built_in_set(plan.source, folder, data_config.image_size)
    data = open_data(data_config)
    runs.check_kept(configs, data)
    runs.write_sentences(plan, data, out, say)
    failed: dict[tuple[str, int], str] = {}
    if not args.report_only:
        if args.slurm_profile:
            if not finished_on_slurm(plan, configs, out, args):
                return 0
        else:
            failed = runs.train_all(configs, args.jobs, say)
    report(plan, configs, data, out, failed, args.write_doc)
    return 1 if failed else 0


def finished_on_slurm(plan: Plan, configs: Configs, out: Path, args: argparse.Namespace) -> bool:
    """Whether every run is finished. Queues an array of seeds for each unfinished arm that is not in the queue."""
    from dist_t2i.ablation.runs import is_finished
    from slurm import profile as profiles
    from slurm import status
    from slurm.submission import Submission, need_slurm

    profile = profiles.load(args.slurm_profile)
    left = [arm for arm in plan.arms if not all(is_finished(c) for (name, _), c in configs.items() if name == arm)]
    if left:
        need_slurm()
    for arm in left:
        folder = (out / arm).absolute()
        states = [status.look(run) for run in status.runs_under(folder, missing_ok=True)]
        if any(state.live or state.silent for state in states):
            say("\n".join(status.describe(state) for state in states))
            continue
        config, name = plan.config(arm, 0, out), f"{plan.name}-{arm}"
        job = Submission(folder, config, profile, nodes=args.nodes, name=name, seeds=plan.seeds)
        job.check()
        job.test()
        say(f"{arm}: {plan.seeds} seeds queued as {', '.join(job.submit())}")
    if left:
        say("repeat the command to see the state of the runs, and to write the report after all runs have finished")
    return not left


# ---- report ----------------------------------------------------------------------------------------------------------


def report(
    plan: Plan, configs: Configs, data: ShardSet, out: Path, failed: Mapping[tuple[str, int], str], doc: Path | None
) -> None:
    """Scores all finished runs and writes the report. Raises UserError if an arm has no finished run."""
    from dist_t2i.ablation import report as reports
    from dist_t2i.ablation import scoring
    from dist_t2i.ablation.runs import is_finished
    from dist_t2i.eval.protocol import load_protocol

    protocol = load_protocol(plan.protocol)
    scorer = scoring.RunScorer(data, protocol, out, say)
    done = {key: config for key, config in configs.items() if is_finished(config)}
    empty = [arm for arm in plan.arms if not any(name == arm for name, _ in done)]
    if empty:
        raise UserError(f"the report needs a finished run of each arm; {out} lacks one of {', '.join(empty)}")
    scores = {key: scorer.scores(Path(config.run.folder)) for key, config in done.items()}
    missing = [
        f"{arm}/seed-{seed} {failed.get((arm, seed), 'is not finished')}"
        for arm, seed in configs
        if (arm, seed) not in done
    ]
    facts = facts_of(done, scores, data, out)
    results = reports.Findings(plan, configs, scores, missing, facts)
    pictures = write_pictures(results, data, protocol, out, min(seed for _, seed in done))
    write_atomic(out / "table.json", json.dumps(results.as_json(), indent=1) + "\n")
    names = {heading: path.name for heading, path in pictures.items()}
    write_atomic(out / "table.md", reports.markdown(results, names))
    page = reports.write_page(results, out / "index.html", pictures, data.manifest.get("credit", ""))
    print("", *(f"* {verdict}" for verdict in results.verdicts()), "", sep="\n")
    print(f"Report: {page} and {out / 'table.md'}")
    if doc:
        doc.parent.mkdir(parents=True, exist_ok=True)
        names = {heading: f"{doc.stem}-{path.name}" for heading, path in pictures.items()}
        for heading, path in pictures.items():
            write_atomic(doc.with_name(names[heading]), path.read_bytes())
        write_atomic(doc, reports.markdown(results, names))
        say(f"written to {doc}")


def write_pictures(results: Findings, data: ShardSet, protocol: Protocol, out: Path, seed: int) -> dict[str, Path]:
    """Writes the figures, and returns their PNG files by heading."""
    from dist_t2i.ablation import figures

    pictures = {}
    plan, split = results.plan, results.splits[0]
    measures = [measure for measure in results.measures if measure.split == split]
    try:
        heading = "Every run (dots), means and 95% intervals (bars)"
        pictures[heading] = figures.plot_seeds(plan, measures, out / "seeds.png")
    except ImportError as error:
        say(f"seeds.png was not written: {error} (run `pip install matplotlib`)")
    rows = figures.side_by_side(plan, seed, data, split, protocol, out)
    title = f"{split}: seed {seed} of each arm, with equal prompts and noise, not cherry-picked"
    pictures["The arms side by side"] = figures.write_grid(plan, rows, out / "grid.png", title)
    return pictures


def facts_of(
    done: Configs, scores: Mapping[tuple[str, int], Mapping[str, Any]], data: ShardSet, out: Path
) -> dict[str, str]:
    """Facts about how the results were computed: command, hardware, hours, revision, data."""
    from dist_t2i.ablation.runs import seconds_trained
    from dist_t2i.checkpoint.store import newest_images
    from dist_t2i.utils import environment

    about, folders = environment.describe(), [Path(config.run.folder) for config in done.values()]
    machines = [read_json(folder / "environment.json") for folder in folders]
    trained = sum(map(seconds_trained, folders))
    scored = sum(run_scores["seconds"] for run_scores in scores.values())
    calls = (out / "calls.jsonl").read_text(encoding="utf-8") if (out / "calls.jsonl").is_file() else ""
    spent = time.monotonic() - STARTED + sum(json.loads(line)["seconds"] for line in calls.splitlines())
    any_scores = next(iter(scores.values()))
    rules = any_scores["protocol"]
    networks = ", ".join(
        f"{network['name']} (weights `{network['weights_sha256'][:12]}`)"
        for name, network in any_scores["manifest"]["judges"].items()
        if name != "own"
    )
    facts = {
        "command": "`" + shlex.join(["python", "tools/ablate.py", *sys.argv[1:]]) + "`",
        "hardware": "; ".join(sorted({_hardware(machine) for machine in machines})),
        "time": f"{spent / 3600:.2f} hours in all calls; summed over runs: training {trained / 3600:.2f} h "
        f"({trained / len(folders):,.0f} s per run of {max(map(newest_images, folders)):,} images), "
        f"scoring {scored / 3600:.2f} h",
        "revision": "; ".join(sorted({_revision(machine["code"]) for machine in machines}))
        + f"; table written by {_revision(about['code'])}",
        "versions": ", ".join(f"{name} {version}" for name, version in about["packages"].items()),
        "data": f"{data.manifest.get('name', '')}, fingerprint `{data.fingerprint}`",
        "protocol": f"{rules['name']} version {rules['version']}, "
        f"splits {', '.join(rules['splits']) or 'all held-out'}, "
        f"{len(rules['seeds'])} pictures per caption, features of {networks}",
        "pictures": str(data.manifest.get("credit", "")),
    }
    return {name: value for name, value in facts.items() if value}


def _hardware(about: Mapping[str, Any]) -> str:
    processor = about.get("processor", {})
    gpus = ", ".join(gpu["name"] for gpu in about.get("gpus", []))
    threads = f", {about['threads']} threads per run" if about.get("threads") else ""
    return f"{gpus or processor.get('model', 'unknown')}, {processor.get('cores', '?')} cores{threads}"


def _revision(code: Mapping[str, Any]) -> str:
    return f"`{code.get('revision', 'unknown')[:12]}`" + (" with local changes" if code.get("dirty") else "")


def append_call(out: Path, jobs: int) -> None:
    """Appends this call to OUT/calls.jsonl, from which `facts_of` sums the time of all calls."""
    line = {
        "command": shlex.join(sys.argv),
        "seconds": round(time.monotonic() - STARTED, 1),
        "jobs": jobs,
        "ended": round(time.time()),
    }
    with (out / "calls.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
