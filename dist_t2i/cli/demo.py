"""Write a set, train both networks on it under DeepSpeed, score the model, and write a page of the results.

python tools/demo.py --budget 10m                 (or BUDGET=10m make demo; the budget is the training time: 90s, 3m, 1h)
python tools/demo.py --budget 10m --set scenes    (or BUDGET=10m SET=scenes make demo)

The set `openmoji` has drawings whose captions determine most of the picture. The set `scenes` has pictures that the
project renders; their captions leave the background, sizes, places and angles open.

Ctrl-C saves a checkpoint and stops the demo. To resume the demo, repeat the command. After a finished demo, the command
only rewrites the page.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.cli.common import ROOT, new_parser, say, write_built_in_set
from dist_t2i.errors import TrainingError

if TYPE_CHECKING:
    from dist_t2i.config.sections import Config

RESERVE = 0.03
"""Share of the budget for sample grids and checkpoints."""
GRIDS, CHECKPOINTS = 8, 4
TITLES = {"openmoji": "OpenMoji", "scenes": "rendered scenes"}
PROMPTS = {"openmoji": "woman astronaut dark skin tone", "scenes": "a red star left of a blue ring"}
"""Set -> a prompt for the commands that the demo suggests."""


def main() -> int:
    parser = new_parser("demo.py", __doc__)
    budget = "training time: 90s, 3m, 1h (default: %(default)s)"
    parser.add_argument("--budget", type=seconds, default="10m", help=budget)
    parser.add_argument("--set", choices=TITLES, default="openmoji", help="(default: %(default)s)")
    parser.add_argument("--config", type=Path, help="(default: SET64.yaml with a GPU, SET32.yaml without)")
    run = "run folder (default: runs/demo-BUDGET, with --set scenes runs/demo-scenes-BUDGET)"
    parser.add_argument("--run", type=Path, metavar="DIR", help=run)
    data = "folder of the set (default: data/SETSIZE, with the picture size of the configuration)"
    parser.add_argument("--data", type=Path, metavar="DIR", help=data)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the configuration")
    args = parser.parse_args()
    from dist_t2i.distributed.supervisor import Interrupted
    from dist_t2i.utils.progress import duration

    os.chdir(ROOT)
    started = time.monotonic()
    try:
        demo(args)
    except Interrupted as stop:
        print(f"\n{stop}", flush=True)
        return stop.status
    print(f"finished after {duration(time.monotonic() - started)}")
    return 0


def seconds(text: str) -> int:
    """Converts a duration (90s, 3m, 1h, or a number without a unit) to seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    value = float(match[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[match[2]] if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration; write 90s, 3m or 1h")
    return round(value)


def spelled(budget: int) -> str:
    """The inverse of `seconds`: 600 becomes 10m."""
    for unit, size in (("h", 3600), ("m", 60)):
        if budget % size == 0:
            return f"{budget // size}{unit}"
    return f"{budget}s"


def demo(args: argparse.Namespace) -> None:
    """Runs all steps of the demo that earlier calls have not finished."""
    from dist_t2i.checkpoint.store import newest_images
    from dist_t2i.config import files as config_files
    from dist_t2i.distributed.launch import has_gpu
    from dist_t2i.distributed.supervisor import train

    budget, name = spelled(args.budget), args.set
    config_path = args.config or Path("configs") / f"{name}{64 if has_gpu() else 32}.yaml"
    config = config_files.load(config_path, args.overrides)
    size = config.data.image_size
    run = args.run or Path("runs") / (f"demo-{budget}" if name == "openmoji" else f"demo-{name}-{budget}")
    data = args.data or Path("data") / f"{name}{size}"
    heading(1, f"Pictures: {TITLES[name]} at {size}x{size} pixels, in {data}")
    if (data / "manifest.json").is_file():
        print("the set exists already")
    else:
        write_built_in_set(name, data, size)
    if parts := for_drawings(config):
        print(f"{config_path} has parts for drawings, whose captions determine most of the picture: {', '.join(parts)}")
    overrides = [f"data.train={data}", *args.overrides]
    if not (run / "config.yaml").exists():
        heading(2, "Speed of training on this machine, in images per second")
        overrides += plan(config_path, overrides, run, args.budget)
        heading(3, f"Training for {budget}, in {run} (Ctrl-C saves and stops)")
        train(config_path, overrides, run)
    elif (left := config_files.load(run / "config.yaml").train.total_images - newest_images(run)) > 0:
        heading(3, f"Training resumes in {run}: {left:,} images remain (Ctrl-C saves and stops)")
        train(run / "config.yaml", overrides, run)
    else:
        heading(3, f"Training in {run} has finished already")
    report(run, data, budget, name)


def for_drawings(config: Config) -> list[str]:
    """The losses and parts of the generator that suit drawings only, as keys with their values."""
    generator, loss = config.model.generator, config.loss
    values = {
        "loss.pixels": loss.pixels,
        "loss.g_alignment_regions": loss.g_alignment_regions,
        "model.generator.colors": generator.colors,
        "model.generator.layout": generator.layout,
    }
    return [f"{key} {value:g}" for key, value in values.items() if value]


def heading(step: int, text: str) -> None:
    print(f"\n== {step}/5  {text}", flush=True)


def plan(config_path: Path, overrides: Sequence[str], run: Path, budget: int) -> list[str]:
    """Measures the training speed in a short trial run; returns overrides for a run of about `budget` seconds.

    These overrides contain the number of images, so that the run itself does not depend on the clock.
    """
    from dist_t2i.config import files as config_files
    from dist_t2i.distributed.supervisor import train
    from dist_t2i.reporting import metrics_log

    batch = config_files.load(config_path, overrides).train.global_batch
    trial, log = run.with_name(f".{run.name}-speed"), run.with_name(f".{run.name}-speed.log")
    shutil.rmtree(trial, ignore_errors=True)
    trial.parent.mkdir(parents=True, exist_ok=True)
    never = 10**9 // batch * batch
    keys = ("train.total_images", "checkpoint.every_images", "report.sample_every_images")
    endless = ["report.every_steps=8", *(f"{key}={never}" for key in keys)]
    needed = min(12.0, max(3.0, budget / 20))
    started, live = time.monotonic(), sys.stdout.isatty()

    def reports() -> list[dict[str, Any]]:
        """All reports except the first, which includes the warm-up of compilers, caches and the data set."""
        return metrics_log.read(trial / "metrics.jsonl")[1:]

    def enough() -> bool:
        entries = reports()
        if live:
            rate = f"{entries[-1]['images_per_second']:,.0f} images/s" if entries else "starting"
            print(f"\r{rate}, {time.monotonic() - started:.0f} s\x1b[K", end="", flush=True)
        return len(entries) >= 3 and entries[-1]["time"] - entries[0]["time"] >= needed

    train(config_path, [*overrides, *endless], trial, enough=enough, log=log)
    rates = sorted(entry["images_per_second"] for entry in reports())
    shutil.rmtree(trial, ignore_errors=True)
    if not rates:
        raise TrainingError(f"the trial run ended before its speed was measured; see {log}")
    log.unlink()
    rate = rates[len(rates) // 2]
    settings = budget_overrides(rate, budget, batch)
    text = f"{rate:,.0f} images/s: {settings[0].partition('=')[2]} images in {spelled(budget)}"
    print(f"\r{text}\x1b[K" if live else text, flush=True)
    return settings


def budget_overrides(rate: float, budget: int, batch: int) -> list[str]:
    """Overrides for a run of `budget` seconds at `rate` images per second; each count is a multiple of the batch."""
    total = max(GRIDS, int((1 - RESERVE) * rate * budget / batch)) * batch
    grids, saves = (total // (parts * batch) * batch for parts in (GRIDS, CHECKPOINTS))
    return [
        f"train.total_images={total}",
        f"report.sample_every_images={grids}",
        f"checkpoint.every_images={saves}",
    ]


def report(run: Path, data: Path, budget: str, name: str) -> None:
    """Writes the page and prints the paths of the results. Scores a model without up-to-date scores.json."""
    from dist_t2i.data.shard_set import open_set
    from dist_t2i.eval.evaluate import evaluate, protocol_for
    from dist_t2i.eval.scores import known_scores, table
    from dist_t2i.inference.pipeline import load
    from dist_t2i.publish import run_page

    heading(4, "Scores on held-out prompts and pictures")
    model, held_out = load(run), open_set(data)
    scores = known_scores(run, model.files.sha256())
    if scores is None:
        results = evaluate(model, held_out, protocol_for(held_out), say=say)
        results.save(run / "scores.json")
        scores = results.as_json()
    heading(5, "Page")
    title = f"{budget} of training on {TITLES[name]}, from random weights"
    command = f"BUDGET={budget} make demo" if name == "openmoji" else f"BUDGET={budget} SET={name} make demo"
    prompt = PROMPTS[name]
    page = run_page.write_page(run, model, held_out, scores, title=title, command=command, prompt=prompt)
    interpreter = Path(sys.executable)
    python = interpreter.relative_to(ROOT) if interpreter.is_relative_to(ROOT) else interpreter
    print(f"\n{table(scores)}\n")
    print(f"Page      {page}")
    print(f"Files     {run / 'curves.png'}  {run / 'samples'}")
    print(f'Sample    {python} tools/sample.py --run {run} "{prompt}" --out grid.png')
