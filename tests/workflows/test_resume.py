"""A run that is stopped anywhere and resumed equals the uninterrupted run. Real processes, real signals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time

import pytest

from runs import BATCH, Run, assert_same_state, make_set, wait_for_run

pytestmark = pytest.mark.slow
TOTAL = 80


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The uninterrupted run."""
    run = Run(tmp_path_factory.mktemp("whole") / "run", data)
    assert run.train() == 0, run.output()
    return run


@pytest.fixture(scope="module")
def half(tmp_path_factory, data):
    """A run that was stopped at a checkpoint in its middle: a folder to copy."""
    run = Run(tmp_path_factory.mktemp("half") / "run", data)
    assert run.train() == 0, run.output()
    for name in run.checkpoints():
        if name > "images-000000032":
            shutil.rmtree(run.folder / "checkpoints" / name)
    assert run.checkpoints() == ["images-000000032"]
    return run


def copied(half: Run, folder, data, *overrides: str) -> Run:
    shutil.copytree(half.folder, folder)
    return Run(folder, data, *overrides)


def test_runs_are_a_function_of_seed_and_data(whole, data, tmp_path):
    again = Run(tmp_path / "run", data, "data.workers=0")
    assert again.train() == 0, again.output()
    assert_same_state(again, whole)
    assert again.losses() == whole.losses()


def test_resumed_is_bitwise_the_whole_run(whole, half, data, tmp_path):
    run = copied(half, tmp_path / "run", data)
    assert run.train() == 0, run.output()
    assert_same_state(run, whole)
    assert run.losses() == whole.losses(), "metrics.jsonl must hold every report once, as in the whole run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_saves_and_the_same_command_goes_on(whole, data, tmp_path, number):
    run = Run(tmp_path / "run", data, "checkpoint.every_images=1000")
    process = run.start()[0]
    wait_for_run(lambda: (run.folder / "metrics.jsonl").exists() and len(run.metrics()) >= 3, process, run)
    process.send_signal(number)
    assert process.wait(240) == 75, run.output()
    assert "Traceback" not in run.output()
    (saved,) = run.checkpoints()
    assert 0 < int(saved.removeprefix("images-")) < TOTAL
    assert json.loads((run.folder / "progress.json").read_text())["state"] == "stopped"
    assert run.train() == 0, run.output()
    assert_same_state(run, whole)
    assert run.losses() == whole.losses()


def test_one_rank_of_two_is_told_and_both_stop_at_the_same_step(data, tmp_path):
    run = Run(tmp_path / "run", data, "train.total_images=8000", "checkpoint.every_images=8000")
    processes = run.start(ranks=2)
    wait_for_run(lambda: (run.folder / "metrics.jsonl").exists() and len(run.metrics()) >= 2, processes[0], run)
    processes[1].send_signal(signal.SIGUSR2)
    assert [p.wait(240) for p in processes] == [75, 75], run.output()
    assert len(run.checkpoints()) == 1


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ("engine.generator_stage=2", "engine.discriminator_stage=1")),
        (2, ("engine.generator_stage=3", "engine.discriminator_stage=2", "engine.accumulation=2")),
        (1, ("engine.accumulation=2",)),
    ],
)
def test_another_world_size_stage_and_accumulation_within_round_off(whole, half, data, tmp_path, ranks, overrides):
    run = copied(half, tmp_path / "run", data, *overrides)
    assert run.train(ranks=ranks) == 0, run.output()
    for images, losses in whole.losses().items():
        got = run.losses()[images]
        for name, value in losses.items():
            if not name.endswith("/std"):  # a spread within one micro-batch, whose rows change with the world size
                assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (images, name)
    assert_same_state(run, whole, tolerance=1e-5)


def test_two_ranks_then_one(data, tmp_path):
    together = Run(tmp_path / "two", data, "engine.generator_stage=2", "engine.discriminator_stage=2")
    assert together.train(ranks=2) == 0, together.output()
    alone = copied(together, tmp_path / "one", data)
    shutil.rmtree(alone.folder / "checkpoints" / f"images-{TOTAL:09d}")
    assert alone.train() == 0, alone.output()
    assert_same_state(alone, together, tolerance=1e-5)


def test_killed_twenty_times_at_random_moments(whole, data, tmp_path):
    """After a kill -9 at any moment, the run resumes and ends with the same result."""
    rng = random.Random(20)
    run = Run(tmp_path / "run", data, "checkpoint.every_images=8", "report.sample_every_images=16")
    kills = 0
    while kills < 20:
        process = run.start()[0]
        before = len(run.checkpoints())
        # The start-up need not be killed twenty times: most kills come in the steps and saves after the start-up.
        if kills % 5:
            wait_for_run(lambda n=before: ready(run) or len(run.checkpoints()) != n, process, run, allow_exit=True)
        time.sleep(rng.uniform(0, 0.25))
        if process.poll() is not None:
            restart(run)
            continue
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        assert_intact(run)
    assert run.train() == 0, run.output()
    assert_same_state(run, whole)
    assert run.losses() == whole.losses()
    assert not list((run.folder / "checkpoints").glob(".*")), "leftovers of killed saves are swept"


def ready(run: Run) -> bool:
    """Whether the process that was started last has begun to train."""
    try:
        progress = json.loads((run.folder / "progress.json").read_text())
    except (OSError, ValueError):
        return False
    return progress["state"] == "training" and os.path.exists(f"/proc/{progress['pid']}")


def restart(run: Run) -> None:
    """The run ended before it was killed often enough: removes its newest checkpoints."""
    for name in run.checkpoints():
        if name > "images-000000016":
            shutil.rmtree(run.folder / "checkpoints" / name)


def assert_intact(run: Run) -> None:
    """Every checkpoint in the folder is complete, and `latest` names one of them."""
    from dist_t2i.checkpoint import store

    for folder in store.committed(run.folder):
        store.open_checkpoint(folder)
    latest = run.folder / "checkpoints" / "latest"
    if latest.exists():
        assert latest.read_text().strip() in run.checkpoints()


def test_changed_configuration_is_refused_with_the_keys(half, data, tmp_path):
    run = copied(half, tmp_path / "run", data, "optimizer.generator_lr=1e-3", "loss.kl=0.5")
    assert run.train() == 2
    assert "optimizer.generator_lr" in run.output() and "loss.kl" in run.output()
    assert "Traceback" not in run.output()
    assert run.checkpoints() == ["images-000000032"]
    assert run.train("--allow-changes") == 0, run.output()


@pytest.mark.parametrize("other", ["model.generator.condition=12", "optimizer.generator_matrices=muon"])
def test_no_flag_puts_a_checkpoint_into_other_networks(half, data, tmp_path, other):
    run = copied(half, tmp_path / "run", data)
    before = (run.folder / "config.yaml").read_bytes()
    assert run.train(other, "--allow-changes") == 2
    assert other.partition("=")[0] in run.output() and "Traceback" not in run.output()
    assert (run.folder / "config.yaml").read_bytes() == before
    assert run.train() == 0, run.output()


def test_a_damaged_checkpoint_is_passed_over(whole, data, tmp_path):
    run = copied(whole, tmp_path / "run", data)
    *_, before, last = run.checkpoints()
    file = run.folder / "checkpoints" / last / "generator.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert run.train() == 0, run.output()
    assert "generator.safetensors" in run.output() and f"{int(before[7:]):,} images" in run.output()
    assert_same_state(run, whole)


def test_batches_count(whole):
    assert [line["images"] for line in whole.metrics()] == list(range(BATCH, TOTAL + 1, BATCH))
