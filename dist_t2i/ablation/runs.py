"""Finds the finished runs of an ablation and trains the other runs, one at a time or in parallel.

OUT/ARM/seed-N/            run folder
OUT/ARM/seed-N.yaml        configuration of the run
OUT/ARM/seed-N.log         output of the run, if runs train in parallel
OUT/sentences.safetensors  caption vectors, if an arm needs them
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from dist_t2i.ablation.plan import Plan, table_of
from dist_t2i.checkpoint.run_folder import fingerprint_of
from dist_t2i.checkpoint.store import newest_images
from dist_t2i.config import files as config_files
from dist_t2i.config.resume import refuse_changes
from dist_t2i.config.sections import Config
from dist_t2i.data.shard_set import ShardSet
from dist_t2i.distributed.supervisor import Interrupted, train
from dist_t2i.errors import CheckpointError, ConfigError, ExitStatus, TrainingError, UserError, run_command
from dist_t2i.reporting import metrics_log
from dist_t2i.utils.files import write_atomic
from dist_t2i.utils.processes import usable_cores

Configs = Mapping[tuple[str, int], Config]
Say = Callable[[str], None]
_LOOK = 0.25
"""Seconds between two polls of runs that train in parallel."""


def is_finished(config: Config) -> bool:
    return newest_images(Path(config.run.folder)) >= config.train.total_images


def seconds_trained(run: Path) -> float:
    """Seconds of training by metrics.jsonl, without the seconds of start-up, sample grids and checkpoints."""
    seconds, before = 0.0, 0
    for entry in metrics_log.read(run / "metrics.jsonl"):
        rate = entry.get("images_per_second")
        if isinstance(rate, (int, float)) and rate > 0:
            seconds += (entry["images"] - before) / rate
        before = entry["images"]
    return seconds


def check_kept(configs: Configs, data: ShardSet) -> None:
    """Raises a CheckpointError that lists all existing runs whose configuration or data differs from the plan."""
    problems = []
    for config in configs.values():
        run = Path(config.run.folder)
        if not (run / "config.yaml").exists():
            continue
        try:
            saved = config_files.load(run / "config.yaml")
            if config.engine.precision == "auto":  # config.yaml of a run has the precision that `auto` selected
                config = replace(config, engine=replace(config.engine, precision=saved.engine.precision))
            refuse_changes(saved, config)
        except ConfigError as error:
            problems += [f"{run}: {line}" for line in error.problems or [str(error)]]
        known = fingerprint_of(run)
        if known is not None and known != data.fingerprint:
            problems.append(f"{run}: the run's training set has another fingerprint than {data.folder}")
    if problems:
        listed = "".join(f"\n  {line}" for line in problems)
        raise CheckpointError(
            f"the folder has runs of another ablation:{listed}\nName another folder with --out, or remove these runs."
        )


def write_sentences(plan: Plan, data: ShardSet, out: Path, say: Say) -> None:
    """Writes the table of caption vectors if an arm needs a table and this set has no table yet. Raises UserError."""
    path = table_of(out)
    stamp = path.with_suffix(".set")
    if not any(arm.sentences for arm in plan.arms.values()):
        return
    if path.exists() and stamp.exists() and stamp.read_text() == data.fingerprint:
        return
    from dist_t2i.ablation.sentence_encoder import NAME, write_table

    captions = all_captions(data)
    say(f"{NAME}: writing vectors of {len(captions):,} captions to {path}")
    write_table(path, captions)
    stamp.write_text(data.fingerprint)


def all_captions(data: ShardSet) -> list[str]:
    """All captions of all splits, with their variants in light and dark skin tone, which the evaluation needs."""
    from dist_t2i.eval.skin_tones import tone_pair

    captions: dict[str, None] = {}
    for split in data.splits:
        samples = data.samples(split)
        for i in range(len(samples)):
            captions.update(dict.fromkeys(samples[i].captions))
    for caption in list(captions):
        captions.update(dict.fromkeys(tone_pair(caption) or ()))
    return list(captions)


# ---- training --------------------------------------------------------------------------------------------------------


def train_all(configs: Configs, jobs: int, say: Say) -> dict[tuple[str, int], str]:
    """Trains the unfinished runs, `jobs` at a time; returns the error of each failed run by (arm, seed).

    Raises Interrupted after a stop signal, once the runs have saved checkpoints.
    """
    unfinished = {key: config for key, config in configs.items() if not is_finished(config)}
    if len(unfinished) < len(configs):
        say(f"{len(configs) - len(unfinished)} of {len(configs)} runs are finished")
    for config in unfinished.values():
        file = config_file(config)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, config_files.dump(config))
    return _in_parallel(unfinished, jobs, say) if jobs > 1 else _in_turn(unfinished, say)


def config_file(config: Config) -> Path:
    """The file from which a run reads its configuration at the start; the run folder has a copy of this file."""
    return Path(config.run.folder + ".yaml")


def _in_turn(configs: Configs, say: Say) -> dict[tuple[str, int], str]:
    failed = {}
    for number, (key, config) in enumerate(configs.items(), 1):
        say(f"run {number} of {len(configs)}: {_describe(key, config)}")
        started = time.monotonic()
        try:
            train(config_file(config), [], Path(config.run.folder))
        except TrainingError as error:
            failed[key] = str(error)
            say(f"{_name(key)} failed: {error}")
        else:
            say(f"{_name(key)}: {time.monotonic() - started:,.0f} s")
    return failed


def _describe(key: tuple[str, int], config: Config) -> str:
    seen = newest_images(Path(config.run.folder))
    progress = f"resumes at {seen:,} of" if seen else "trains for"
    return f"{_name(key)} {progress} {config.train.total_images:,} images"


def _name(key: tuple[str, int]) -> str:
    return f"{key[0]}/seed-{key[1]}"


def _in_parallel(configs: Configs, jobs: int, say: Say) -> dict[tuple[str, int], str]:
    """Trains each run in a separate process, which executes this module. `_stopping` passes stop signals on to them."""
    environment = {**os.environ}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // jobs)))
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
    waiting, failed = list(configs.items()), {}
    live: dict[tuple[str, int], tuple[subprocess.Popen, float]] = {}
    with _stopping(live) as asked:
        while live or (waiting and not asked):
            while waiting and len(live) < jobs and not asked:
                key, config = waiting.pop(0)
                say(f"{_describe(key, config)}; {len(waiting)} more runs wait; log: {config.run.folder}.log")
                command = [sys.executable, "-m", __name__, str(config_file(config)), config.run.folder]
                live[key] = (subprocess.Popen(command, env=environment, start_new_session=True), time.monotonic())
            for key, (process, started) in list(live.items()):
                status = process.poll()
                if status is None:
                    continue
                del live[key]
                if status not in (ExitStatus.FINISHED, ExitStatus.INTERRUPTED):
                    failed[key] = f"exit status {status}; see {configs[key].run.folder}.log"
                say(f"{_name(key)}: {failed.get(key) or f'{time.monotonic() - started:,.0f} s'}")
            time.sleep(_LOOK)
    if asked:
        raise Interrupted("stopped; repeat the command to resume the runs")
    return failed


@contextlib.contextmanager
def _stopping(live: Mapping) -> Iterator[list[int]]:
    """A context in which Ctrl-C, SIGTERM and SIGHUP stop the live runs; yields the list of received signals."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if not asked:
            print("\nstopping after the runs have saved checkpoints", flush=True)
        asked.append(number)
        for process, _ in live.values():
            with contextlib.suppress(OSError):
                process.send_signal(signal.SIGINT)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> int:
    """Trains one run for `_in_parallel`. The arguments are CONFIG and RUN."""
    config, run = map(Path, sys.argv[1:])
    try:
        train(config, [], run, log=Path(f"{run}.log"))
    except Interrupted as stop:
        return stop.status
    except UserError as error:
        print(f"{run}: {error}", file=sys.stderr, flush=True)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
