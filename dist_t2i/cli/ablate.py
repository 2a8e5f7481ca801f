"""Put a claim to the test: the same training with one thing changed at a time, several seeds each, and what follows.

python tools/ablate.py --config configs/ablation-openmoji.yaml [--seeds N] [--budget IMAGES] [--jobs 2]
python tools/ablate.py --config ... --slurm-profile slurm/profiles/plain.yaml       (arrays of seeds; again when they are done)

Stopped, the same command goes on: finished runs are kept, an interrupted one goes on from its checkpoint, scores are
computed once. At the end OUT has table.md, table.json, index.html and pictures; --write-doc puts the table into docs/.
dist_t2i/ablation says how the comparison is made.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.errors import UserError

if TYPE_CHECKING:
    from dist_t2i.ablation.plan import Plan
    from dist_t2i.ablation.runs import Configs
    from dist_t2i.data.shard_set import ShardSet

ROOT = Path(__file__).resolve().parents[2]
STARTED = time.monotonic()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ablate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="see configs/ablation-openmoji.yaml")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each arm (default: the file's)")
    parser.add_argument("--budget", type=int, metavar="IMAGES", help="images each run sees (default: the file's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: runs/ablation-NAME)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs that train side by side on this machine")
    parser.add_argument("--slurm-profile", type=Path, metavar="FILE", help="train as Slurm arrays, see slurm/profiles")
    parser.add_argument("--nodes", type=int, default=1, help="of each Slurm job (default: 1)")
    parser.add_argument("--report-only", action="store_true", help="train nothing: the table of the runs that are done")
    parser.add_argument(
        "--write-doc",
        type=Path,
        nargs="?",
        const=Path("docs/ablation.md"),
        metavar="FILE",
        help="write the table there, too (default: docs/ablation.md)",
    )
    return parser.parse_args(arguments)


def main() -> int:
    chosen = parse()
    from dist_t2i.ablation import plan as plans
    from dist_t2i.distributed.supervisor import Interrupted

    plan = plans.load(chosen.config, seeds=chosen.seeds, images=chosen.budget)
    out = chosen.out or Path("runs") / f"ablation-{plan.name}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; name another folder with --out") from None
    if chosen.jobs < 1:
        raise UserError(f"--jobs {chosen.jobs}: at least 1")
    try:
        return ablate(plan, out, chosen)
    except Interrupted as stop:
        print(f"\n{stop}", flush=True)
        return stop.status
    finally:
        note_call(out, chosen.jobs)


def ablate(plan: Plan, out: Path, chosen: argparse.Namespace) -> int:
    """All of it; what an earlier call has finished is passed over. Returns the exit status."""
    from dist_t2i.ablation import runs

    configs = plan.configs(out)
    data = the_set(plan, configs)
    runs.check_kept(configs, data)
    runs.write_sentences(plan, data, out, say)
    failed: dict[tuple[str, int], str] = {}
    if not chosen.report_only:
        if chosen.slurm_profile:
            if not all_done_on_slurm(plan, configs, out, chosen):
                return 0
        else:
            failed = runs.train_all(configs, chosen.jobs, say)
    report(plan, configs, data, out, failed, chosen.write_doc)
    return 1 if failed else 0


def say(text: str) -> None:
    print(text, flush=True)


def the_set(plan: Plan, configs: Configs) -> ShardSet:
    """The data, made first where the plan says how. Raises UserError."""
    from dist_t2i.data.open_data import open_data

    config = next(iter(configs.values())).data
    place = Path(str(config.train))
    if plan.source == "openmoji" and not (place / "manifest.json").is_file():
        say(f"making the pictures: {place}")
        command = [sys.executable, str(ROOT / "tools" / "shard.py"), "openmoji"]
        status = subprocess.run(
            [*command, "--size", str(config.image_size), "--out", str(place)], check=False
        ).returncode
        if status:
            raise UserError(f"making the pictures failed (exit status {status}); what went wrong is said above")
    return open_data(config)


# ---- Slurm -----------------------------------------------------------------------------------------------------------


def all_done_on_slurm(plan: Plan, configs: Configs, out: Path, chosen: argparse.Namespace) -> bool:
    """Whether every run is finished; if not, arms that are not in the queue are queued as an array of seeds each."""
    from dist_t2i.ablation.runs import is_finished
    from slurm import profile as profiles
    from slurm import status
    from slurm.submission import Submission, need_slurm

    profile = profiles.load(chosen.slurm_profile)
    left = [arm for arm in plan.arms if not all(is_finished(c) for (name, _), c in configs.items() if name == arm)]
    if left:
        need_slurm()
    for arm in left:
        folder = (out / arm).absolute()
        states = [status.look(run) for run in status.runs_under(folder, missing_ok=True)]
        if any(state.live or state.silent for state in states):
            say("\n".join(status.describe(state) for state in states))
            continue
        job = Submission(
            folder,
            plan.config(arm, 0, out),
            profile,
            nodes=chosen.nodes,
            name=f"{plan.name}-{arm}",
            seeds=plan.seeds,
        )
        job.check()
        job.test()
        say(f"{arm}: {plan.seeds} seeds queued as {', '.join(job.submit())}")
    if left:
        say("the same command shows how they are doing, and writes the table when they are done")
    return not left


# ---- report ----------------------------------------------------------------------------------------------------------


def report(
    plan: Plan, configs: Configs, data: ShardSet, out: Path, failed: Mapping[tuple[str, int], str], doc: Path | None
) -> None:
    """Scores of all finished runs, the table, the page and the pictures. Raises UserError when an arm has no run."""
    from dist_t2i.ablation import report as reports
    from dist_t2i.ablation import scoring
    from dist_t2i.ablation.runs import is_finished
    from dist_t2i.eval.protocol import load_protocol

    protocol = load_protocol(plan.protocol)
    judge = scoring.RunScorer(data, protocol, out, say)
    done = {key: config for key, config in configs.items() if is_finished(config)}
    empty = [arm for arm in plan.arms if not any(name == arm for name, _ in done)]
    if empty:
        raise UserError(f"no table yet: no finished run of {', '.join(empty)} in {out}")
    scores = {key: judge.scores(Path(config.run.folder)) for key, config in done.items()}
    missing = [
        f"{arm}/seed-{seed} {failed.get((arm, seed), 'is not finished')}"
        for arm, seed in configs
        if (arm, seed) not in done
    ]
    made = facts(done, scores, data, out)
    found = reports.findings(plan, configs, scores, missing=missing, made=made)
    figures = draw(plan, found, data, protocol, out, min(seed for _, seed in done))
    (out / "table.json").write_text(json.dumps(found.as_json(), indent=1) + "\n", encoding="utf-8")
    inside = {heading: path.name for heading, path in figures.items()}
    (out / "table.md").write_text(reports.markdown(found, inside), encoding="utf-8")
    page = reports.write_page(found, out / "index.html", figures, data.manifest.get("credit", ""))
    print("", *(f"* {said}" for said in found.verdicts()), "", f"Look at {page} and {out / 'table.md'}", sep="\n")
    if doc:
        write_doc(doc, reports.markdown, found, figures)


def draw(plan: Plan, found: Any, data: ShardSet, protocol: Any, out: Path, seed: int) -> dict[str, Path]:
    """Heading -> PNG."""
    from dist_t2i.ablation import figures

    drawn = {}
    split = found.measures[0].split
    shown = [one for one in found.measures if one.split == split]
    try:
        drawn["Every run as a dot, means and intervals as bars"] = figures.plot_seeds(plan, shown, out / "seeds.png")
    except ImportError as error:
        say(f"no seeds.png: {error} (`pip install matplotlib` brings it)")
    rows = figures.side_by_side(plan, seed, data, split, protocol, out)
    title = f"{split}: seed {seed} of each arm, same prompts, same noise; not picked"
    drawn["The arms side by side"] = figures.write_grid(plan, rows, out / "grid.png", title)
    return drawn


def write_doc(doc: Path, markdown: Any, found: Any, pictures: Mapping[str, Path]) -> None:
    """The document with its pictures beside it, named after it."""
    doc.parent.mkdir(parents=True, exist_ok=True)
    beside = {}
    for heading, path in pictures.items():
        place = doc.with_name(f"{doc.stem}-{path.name}")
        place.write_bytes(path.read_bytes())
        beside[heading] = place.name
    doc.write_text(markdown(found, beside), encoding="utf-8")
    say(f"written to {doc}")


def facts(
    done: Configs, scores: Mapping[tuple[str, int], Mapping[str, Any]], data: ShardSet, out: Path
) -> dict[str, str]:
    """How it was made: command, hardware, hours, revision, data."""
    from dist_t2i.ablation.runs import seconds_trained
    from dist_t2i.checkpoint.store import newest_images
    from dist_t2i.utils import environment

    about = environment.describe()
    ran = [json.loads((Path(c.run.folder) / "environment.json").read_text(encoding="utf-8")) for c in done.values()]
    hardware = {_hardware(one) for one in ran}
    code = {_revision(one["code"]) for one in ran}
    trained = [seconds_trained(Path(config.run.folder)) for config in done.values()]
    judged = [one["seconds"] for one in scores.values()]
    seen = [newest_images(Path(config.run.folder)) for config in done.values()]
    spent = time.monotonic() - STARTED + sum(one["seconds"] for one in calls(out))
    judges = next(iter(scores.values()))["manifest"]["judges"]
    judged_by = ", ".join(
        f"{j['name']} (weights `{j['weights_sha256'][:12]}`)" for n, j in judges.items() if n != "own"
    )
    rules = next(iter(scores.values()))["protocol"]
    facts = {
        "command": "`" + shlex.join(["python", "tools/ablate.py", *sys.argv[1:]]) + "`",
        "hardware": "; ".join(sorted(hardware)),
        "time": f"{spent / 3600:.2f} hours in all calls; {sum(trained) / 3600:.2f} h of them training "
        f"({sum(trained) / len(trained):,.0f} s a run of {max(seen):,} images), {sum(judged) / 3600:.2f} h scoring",
        "revision": "; ".join(sorted(code)) + f"; the table by {_revision(about['code'])}",
        "versions": ", ".join(f"{name} {version}" for name, version in about["packages"].items()),
        "data": f"{data.manifest.get('name', '')}, fingerprint `{data.fingerprint}`",
        "protocol": f"{rules['name']} version {rules['version']}, splits {', '.join(rules['splits']) or 'all held-out'}, "
        f"{len(rules['seeds'])} pictures a caption, judged by {judged_by}",
        "pictures": str(data.manifest.get("credit", "")),
    }
    return {name: value for name, value in facts.items() if value}


def _hardware(about: Mapping[str, Any]) -> str:
    processor = about.get("processor", {})
    gpus = ", ".join(gpu["name"] for gpu in about.get("gpus", []))
    threads = f", {about['threads']} threads a run" if about.get("threads") else ""
    return f"{gpus or processor.get('model', 'unknown')}, {processor.get('cores', '?')} cores{threads}"


def _revision(code: Mapping[str, Any]) -> str:
    return f"`{code.get('revision', 'unknown')[:12]}`" + (" with local changes" if code.get("dirty") else "")


def note_call(out: Path, jobs: int) -> None:
    """A line about this call in OUT/calls.jsonl: hours are added up from there."""
    line = {
        "command": shlex.join(sys.argv),
        "seconds": round(time.monotonic() - STARTED, 1),
        "jobs": jobs,
        "ended": round(time.time()),
    }
    with (out / "calls.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def calls(out: Path) -> list[dict[str, Any]]:
    """The calls before this one."""
    path = out / "calls.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
