"""Runs that diverge stop at their last healthy checkpoint, or rewind to it; interrupted anywhere, they do the same."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

from dist_t2i.checkpoint import store
from runs import Run, assert_same_state, make_set, wait_for_run

pytestmark = pytest.mark.slow

SETTINGS = (
    "optimizer.decay=constant",  # so that train.total_images may change
    "train.divergence_images=1",  # the least, 32 steps, applies
    "checkpoint.every_images=64",
    "checkpoint.keep_last=1",
)
EXPLODING = ("optimizer.generator_lr=0.64", "optimizer.discriminator_lr=0.64", "loss.penalty=none")
"""Explodes at once, also after three rewinds; at last beyond the largest finite number."""
SICK = ("optimizer.generator_lr=0.08", "optimizer.discriminator_lr=0.08", "loss.penalty=none")
"""Explodes at once, and stays finite."""
TOO_FAST = ("optimizer.generator_lr=0.02", "optimizer.discriminator_lr=0.02", "train.on_divergence=rewind")
"""Explodes, and recovers with an eighth of these learning rates at the latest."""
HEALTHY, TOTAL = 192, 1024


def new_run(folder, data, *overrides: str) -> Run:
    return Run(folder, data, *SETTINGS, f"train.total_images={TOTAL}", *overrides)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data):
    """A run that was healthy for HEALTHY images, was continued with other rates, and diverged."""
    run = new_run(tmp_path_factory.mktemp("stopped") / "run", data)
    mirror = f"checkpoint.mirror={run.folder.with_name('mirror')}"
    assert run.train(f"train.total_images={HEALTHY}", mirror) == 0, run.output()
    run.folder.with_suffix(".out").unlink()
    assert run.train(*SICK, "--allow-changes", mirror) == 78, run.output()
    return run


def copied(stopped: Run, folder, data, *overrides: str) -> Run:
    shutil.copytree(stopped.folder, folder)
    return new_run(folder, data, *overrides)


def divergences(run: Run) -> list[dict]:
    found = store.load_latest(run.folder)
    assert found is not None
    return found.state.get("divergences", [])


def test_a_stop_says_everything_in_one_message(stopped):
    said = stopped.output()
    assert said.count("training diverged") == 1 and "Traceback" not in said
    assert f"the first sign began at {HEALTHY} images" in said
    assert "(healthy: at most 1,000; usual in this run: " in said and "loss.penalty_weight" in said
    assert f"images-{HEALTHY:09d}; later ones are deleted" in said
    assert "--allow-changes, or set train.on_divergence=rewind" in said
    assert "training diverged" in (stopped.folder / "log.txt").read_text()
    assert json.loads((stopped.folder / "progress.json").read_text())["state"] == "diverged"


def test_the_healthy_checkpoint_outlives_the_sick_ones(stopped):
    """Although only one checkpoint is kept, and several were saved after it: on disk and in the mirror."""
    assert "checkpoint at 320 images: " in (stopped.folder / "log.txt").read_text()
    assert stopped.checkpoints() == [f"images-{HEALTHY:09d}"]
    mirrored = store.load_latest(stopped.folder.with_name("mirror"))
    assert mirrored is not None and mirrored.images == HEALTHY
    assert mirrored.state["divergences"] == divergences(stopped) and divergences(stopped)[0]["healthy"] == HEALTHY


def test_the_same_command_is_refused_and_another_one_continues(stopped, data, tmp_path):
    """What the person then gets equals a run that never diverged."""
    run = copied(stopped, tmp_path / "run", data)
    assert run.train(*SICK) == 78
    assert "the same command would diverge again" in run.output() and "Traceback" not in run.output()
    assert run.train("--allow-changes") == 0, run.output()
    whole = new_run(tmp_path / "whole", data)
    assert whole.train() == 0, whole.output()
    assert_same_state(run, whole, TOTAL)
    assert [d["rewound"] for d in divergences(run)] == [False] and divergences(whole) == []
    assert not (run.folder / "diverged.json").exists()
    assert whole.losses() == run.losses()


def test_after_three_rewinds_a_run_gives_up(stopped, data, tmp_path):
    run = copied(stopped, tmp_path / "run", data, *EXPLODING, "train.on_divergence=rewind")
    assert run.train("--allow-changes") == 78, run.output()
    said = run.output()
    assert [f"rewind {k} of 3" in said for k in (1, 2, 3, 4)] == [True, True, True, False]
    assert run.checkpoints() == [f"images-{HEALTHY:09d}"]
    assert [d["rewound"] for d in divergences(run)] == [True, True, True, False]
    assert run.train() == 78 and "the same command would diverge again" in run.output()


def test_a_run_that_only_warns_goes_on(data, tmp_path):
    run = new_run(tmp_path / "run", data, *SICK, "train.on_divergence=warn", "train.total_images=512")
    assert run.train() == 0, run.output()
    assert run.output().count("warning: since 0 images, logit") == 1
    assert run.checkpoints() == ["images-000000512"]


@pytest.fixture(scope="module")
def rewound(tmp_path_factory, data):
    """A run that rewinds until it recovers; nothing interrupts it."""
    run = new_run(tmp_path_factory.mktemp("rewound") / "run", data, *TOO_FAST)
    assert run.train() == 0, run.output()
    return run


def test_a_rewind_halves_the_rates_until_the_run_recovers(rewound):
    count = len(divergences(rewound))
    assert 1 <= count <= 3 and all(d["rewound"] for d in divergences(rewound))
    last = rewound.metrics()[-1]
    assert last["images"] == TOTAL and last["rewinds"] == count
    assert last["lr"] == pytest.approx(0.02 * 0.5**count)
    positions = [line["images"] for line in rewound.metrics()]
    assert positions == sorted(set(positions)), "every report once"
    assert f"(rewind {count} of 3)" in (rewound.folder / "log.txt").read_text()


def test_interrupted_anywhere_it_is_the_same_run(rewound, data, tmp_path):
    """Stopped by a signal before it diverges, and killed in and after its first rewind."""
    run = new_run(tmp_path / "run", data, *TOO_FAST)
    log = run.folder / "log.txt"

    def seen(images: int) -> bool:
        return (run.folder / "metrics.jsonl").exists() and any(line["images"] >= images for line in run.metrics())

    def says(words: str) -> bool:
        return log.exists() and words in log.read_text()

    first = divergences(rewound)[0]["at"]
    interruptions = [
        (lambda: seen(24), signal.SIGUSR2),
        (lambda: seen(first - 40), signal.SIGTERM),
        (lambda: says("Rewinding"), signal.SIGKILL),
        (lambda: seen(first - 120), signal.SIGKILL),
    ]
    for condition, number in interruptions:
        process = run.start()[0]
        wait_for_run(condition, process, run)
        process.send_signal(number)
        assert process.wait(240) == (-signal.SIGKILL if number == signal.SIGKILL else 75), run.output()
    assert run.train() == 0, run.output()
    assert_same_state(run, rewound, TOTAL)
    assert run.losses() == rewound.losses()
    assert divergences(run) == divergences(rewound)


def test_two_ranks_agree(data, tmp_path):
    run = new_run(tmp_path / "run", data, *EXPLODING, "engine.generator_stage=2", "engine.discriminator_stage=2")
    assert run.train("train.on_divergence=rewind", ranks=2) == 78, run.output()
    assert run.output().count("training diverged") == 4 and run.output().count("(rewind 3 of 3)") == 1
    assert run.checkpoints() == ["images-000000000"]


def test_numbers_that_are_not_finite_rewind_too(data, tmp_path):
    run = new_run(tmp_path / "run", data, "train.on_divergence=rewind", "train.total_images=128")
    assert run.train("train.total_images=64") == 0, run.output()
    assert run.train("optimizer.discriminator_lr=1e30", "--allow-changes") == 78, run.output()
    assert "training broke down at" in run.output() and "(rewind 3 of 3)" in run.output()
    assert run.checkpoints() == ["images-000000064"] and len(divergences(run)) == 4
