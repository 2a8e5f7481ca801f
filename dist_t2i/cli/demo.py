"""From nothing to pictures: OpenMoji as a set, both networks trained under DeepSpeed, scores, and a page that shows it all.

python tools/demo.py --budget 10m        (or: BUDGET=10m make demo; 90s, 3m, 1h: the time to train)

Run again, it goes on where it was stopped; finished, it makes the page anew. Ctrl-C stops and saves.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dist_t2i.errors import TrainingError, UserError

ROOT = Path(__file__).resolve().parents[2]
RESERVE = 0.03
"""Share of the budget that sample grids and checkpoints take."""
GRIDS, CHECKPOINTS = 8, 4


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=seconds, default="10m", help="time to train: 90s, 3m, 1h (default: %(default)s)"
    )
    parser.add_argument("--config", type=Path, help="(default: openmoji64 with a GPU, openmoji32 without)")
    parser.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/demo-BUDGET)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="the set (default: data/openmoji at the config's size)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="on top of the configuration")
    return parser.parse_args(arguments)


def seconds(text: str) -> int:
    """90s, 3m, 1h (or a bare number of seconds) as seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    value = float(found[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[found[2]] if found else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 3m or 1h")
    return round(value)


def spelled(budget: int) -> str:
    """Seconds as `seconds` reads them: 600 is 10m."""
    for unit, size in (("h", 3600), ("m", 60)):
        if budget % size == 0:
            return f"{budget // size}{unit}"
    return f"{budget}s"


def main() -> int:
    chosen = parse()
    from dist_t2i.distributed.supervisor import Interrupted

    os.chdir(ROOT)
    started = time.monotonic()
    try:
        demo(chosen)
    except Interrupted as stop:
        print(f"\n{stop}", flush=True)
        return stop.status
    print(f"{time.monotonic() - started:,.0f} s in all")
    return 0


def demo(chosen: argparse.Namespace) -> None:
    """All steps; those that an earlier call finished are passed over."""
    from dist_t2i.config import files as config_files
    from dist_t2i.distributed.launch import has_gpu
    from dist_t2i.distributed.supervisor import train

    budget = spelled(chosen.budget)
    config_path = chosen.config or Path("configs") / ("openmoji64.yaml" if has_gpu() else "openmoji32.yaml")
    size = config_files.load(config_path, chosen.overrides).data.image_size
    run = chosen.run or Path("runs") / f"demo-{budget}"
    data = chosen.data or Path("data") / f"openmoji{size}"
    say(1, f"Pictures: OpenMoji at {size}x{size} pixels, in {data}")
    make_set(data, size)
    overrides = [f"data.train={data}", *chosen.overrides]
    if not (run / "config.yaml").exists():
        say(2, "Speed: how many images a second can be trained on here")
        overrides += plan(config_path, overrides, run, chosen.budget)
        say(3, f"Training for {budget}, in {run} (Ctrl-C stops and saves)")
        train(config_path, overrides, run)
    elif left := images_left(run):
        say(3, f"Training goes on in {run}: {left:,} images to go (Ctrl-C stops and saves)")
        train(run / "config.yaml", overrides, run)
    else:
        say(3, f"Training: finished earlier, in {run}")
    report(run, data, budget)


def say(step: int, text: str) -> None:
    print(f"\n== {step}/5  {text}", flush=True)


def make_set(data: Path, size: int) -> None:
    """The OpenMoji set, unless it is there."""
    if (data / "manifest.json").is_file():
        print("there already")
        return
    command = [sys.executable, "tools/shard.py", "openmoji", "--size", str(size), "--out", str(data)]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise UserError(f"making the pictures failed (exit status {status}); what went wrong is said above")


def plan(config_path: Path, overrides: Sequence[str], run: Path, budget: int) -> list[str]:
    """Trains for some seconds aside, and returns the overrides that make a run of about `budget` seconds.

    The number of images goes into the run's configuration: from there on the run is a function of it, and no clock is
    asked again.
    """
    from dist_t2i.config import files as config_files
    from dist_t2i.distributed.supervisor import train
    from dist_t2i.reporting import metrics_log

    batch = config_files.load(config_path, overrides).train.global_batch
    trial, log = run.with_name(f".{run.name}-speed"), run.with_name(f".{run.name}-speed.log")
    shutil.rmtree(trial, ignore_errors=True)
    trial.parent.mkdir(parents=True, exist_ok=True)
    never = 10**9 // batch * batch
    aside = ["report.every_steps=8", f"train.total_images={never}"]
    aside += [f"checkpoint.every_images={never}", f"report.sample_every_images={never}"]
    needed = min(12.0, max(3.0, budget / 20))
    line = Line()

    def reports() -> list[dict]:
        """After the first one, which warms up: compilers, caches, the first read of the set."""
        return metrics_log.read(trial / "metrics.jsonl")[1:]

    def enough() -> bool:
        found = reports()
        line.show(f"{found[-1]['images_per_second']:,.0f} images/s" if found else "starting")
        return len(found) >= 3 and found[-1]["time"] - found[0]["time"] >= needed

    train(config_path, [*overrides, *aside], trial, enough=enough, log=log)
    rates = sorted(report["images_per_second"] for report in reports())
    shutil.rmtree(trial, ignore_errors=True)
    if not rates:
        raise TrainingError(f"the trial run ended before it could tell its speed; see {log}")
    log.unlink()
    settings = budget_overrides(rates[len(rates) // 2], budget, batch)
    line.show(
        f"{rates[len(rates) // 2]:,.0f} images/s: {settings[0].partition('=')[2]} images in {spelled(budget)}",
        last=True,
    )
    return settings


class Line:
    """A line that is written over on a terminal; elsewhere only its last version is printed."""

    def __init__(self) -> None:
        self._live, self._start = sys.stdout.isatty(), time.monotonic()

    def show(self, text: str, last: bool = False) -> None:
        if self._live:
            print(f"\r{text}, {time.monotonic() - self._start:.0f} s\x1b[K", end="\n" if last else "", flush=True)
        elif last:
            print(text, flush=True)


def budget_overrides(rate: float, budget: int, batch: int) -> list[str]:
    """Settings of a run of `budget` seconds at `rate` images a second; all counts are whole batches."""
    total = max(GRIDS, int((1 - RESERVE) * rate * budget / batch)) * batch
    grids, saves = (total // (parts * batch) * batch for parts in (GRIDS, CHECKPOINTS))
    return [
        f"train.total_images={total}",
        f"report.sample_every_images={grids}",
        f"checkpoint.every_images={saves}",
    ]


def images_left(run: Path) -> int:
    """Images that the run has still to see, by its newest checkpoint."""
    from dist_t2i.checkpoint.store import newest_images
    from dist_t2i.config import files as config_files

    total = config_files.load(run / "config.yaml").train.total_images
    return max(0, total - newest_images(run))


def report(run: Path, data: Path, budget: str) -> None:
    """Scores (unless these weights have theirs) and the page; prints where to look."""
    from dist_t2i.data.shard_set import open_set
    from dist_t2i.eval.evaluate import evaluate, protocol_for
    from dist_t2i.eval.scores import table
    from dist_t2i.inference.pipeline import load
    from dist_t2i.publish import run_page
    from dist_t2i.publish.model_card import SetAbout

    say(4, "Scores, on prompts and pictures that training never saw")
    model, held_out = load(run), open_set(data)
    scores = known_scores(run, model.files.sha256())
    if scores is None:
        found = evaluate(model, held_out, protocol_for(held_out), say=lambda line: print(line, flush=True))
        found.save(run / "scores.json")
        scores = found.as_json()
    say(5, "Page")
    counts = {split: 6 if split == "test-nouns" else 24 for split in scores["splits"]}
    page = run_page.write_page(
        run,
        title=f"{budget} of training on OpenMoji, from nothing",
        rows={split: run_page.held_out_rows(model, held_out, split, count) for split, count in counts.items()},
        scores=scores,
        about=SetAbout.of(model.files),
        config=(run / "config.yaml").read_text(encoding="utf-8"),
        command=f"BUDGET={budget} make demo",
        facts=run_page.facts_of(run, model, held_out),
    )
    print(f"\n{table(scores)}\n")
    print(f"Look at   {page}")
    print(f"          {run / 'curves.png'}  {run / 'samples'}")
    print(f'Draw      {python()} tools/sample.py --run {run} "woman astronaut dark skin tone" --out grid.png')


def known_scores(run: Path, weights: str) -> dict | None:
    """RUN/scores.json if it is about these weights."""
    from dist_t2i.eval.scores import read_scores

    try:
        scores = read_scores(run / "scores.json")
    except UserError:
        return None
    return scores if scores["manifest"]["weights_sha256"] == weights else None


def python() -> str:
    """The interpreter as one would type it here."""
    path = Path(sys.executable)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
