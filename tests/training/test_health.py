"""Health: problems that stop a run, and problems that are only reported."""

from __future__ import annotations

import contextlib
import json
import math
import random

import pytest
import torch

from dist_t2i.errors import TrainingError
from dist_t2i.training.health import LEAST_WINDOWS, WARNING_PATIENCE, WINDOW, Diverged, Health, check_finite

HEALTHY = {
    "loss/d": 1.2,
    "loss/d_adversarial": 0.9,
    "loss/g": 0.3,
    "logit/real": 0.8,
    "logit/fake": -0.7,
    "grad/discriminator": 2.0,
    "grad/generator": 1.0,
    "logit/mismatched": -0.4,
    "fake/std": 0.35,
    "real/std": 0.4,
    "fake/magnitude": 0.45,
    "real/magnitude": 0.5,
    "fake/diversity": 0.5,
    "images_per_second": 100.0,
}


def test_finite_numbers_pass():
    check_finite(HEALTHY, images=640, step=10)
    check_finite({}, images=0, step=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("loss/d_alignment", "discriminator and its text encoder"),
        ("loss/g_adversarial", "generator and its text encoder"),
        ("loss/kl", "generator and its text encoder"),
        ("grad/generator", "generator and its text encoder"),
        ("grad/discriminator", "discriminator and its text encoder"),
        ("grad/text", "shared text encoder"),
        ("logit/real", "discriminator"),
    ],
)
def test_a_number_that_is_not_finite_names_loss_group_step_and_checkpoint(name: str, group: str, value: float):
    with pytest.raises(TrainingError) as caught:
        check_finite(
            {**HEALTHY, name: value}, images=12_345, step=193, checkpoint="runs/x/checkpoints/images-000010000"
        )
    message = str(caught.value)
    assert f"{name} is {'NaN' if math.isnan(value) else 'infinite'}" in message
    assert f"parameter groups: {group}\n" in message
    assert "12,345 images (step 193)" in message
    assert "runs/x/checkpoints/images-000010000" in message
    assert caught.value.status == 1


def test_groups_found_in_the_weights_are_named_instead():
    with pytest.raises(TrainingError, match="parameter groups: text_g, generator"):
        check_finite({**HEALTHY, "loss/g": math.nan}, images=1, step=1, groups=["text_g", "generator"])


def test_fp16_may_skip_a_step_whose_gradient_overflowed_but_not_lose_a_loss():
    check_finite({**HEALTHY, "grad/generator": math.inf}, images=1, step=1, fp16=True)
    with pytest.raises(TrainingError):
        check_finite({**HEALTHY, "loss/g": math.inf}, images=1, step=1, fp16=True)


def test_measurements_of_the_machine_are_no_reason_to_stop():
    check_finite({**HEALTHY, "images_per_second": math.inf}, images=1, step=1)


BATCH = 100
PATIENCE = 8_000  # ten checks
STEPS = PATIENCE // BATCH


def train(health: Health, values: dict[str, float], steps: int, start: int = 0) -> tuple[int, list[str]]:
    """Images seen after these steps, and the warnings."""
    warnings = []
    for step in range(start // BATCH + 1, start // BATCH + steps + 1):
        health.add({name: torch.tensor(value) for name, value in {**HEALTHY, **values}.items()})
        warnings += health.check(step * BATCH)
    return start + steps * BATCH, warnings


def diverges(health: Health, values: dict[str, float], start: int = 0, steps: int = 3 * STEPS) -> Diverged:
    with pytest.raises(Diverged) as caught:
        train(health, values, steps, start)
    return caught.value


def after(steps: int, values: dict[str, float] = {}, **settings) -> tuple[Health, int]:  # noqa: B006
    """A run that has been like this so far, and its images seen."""
    health = Health(BATCH, PATIENCE, **settings)
    images, warnings = train(health, values, steps)
    assert not warnings and health.since is None
    return health, images


@pytest.mark.parametrize(
    ("kind", "values"),
    {
        "line art, which has little spread": {
            "real/std": 0.12,
            "fake/std": 0.01,
            "real/magnitude": 0.97,
            "fake/magnitude": 0.999,
        },
        "line art before its lines are learned": {"real/std": 0.015, "fake/std": 0.0005},
        "dark pictures": {"real/std": 0.05, "fake/std": 0.03, "real/magnitude": 0.93, "fake/magnitude": 0.96},
        "white backgrounds": {"real/magnitude": 0.95, "fake/magnitude": 0.9999},
        "a strong pixel loss": {"grad/generator": 900.0, "loss/g": 400.0},
        "no penalty": {"logit/real": 60.0, "logit/fake": -80.0},
    }.items(),
)
def test_healthy_runs_are_left_alone(kind: str, values: dict[str, float]):
    after(10 * STEPS, values)


def test_slow_growth_and_spikes_are_healthy():
    """Gradient norms that grow a hundredfold over a run, and explosions of a few steps."""
    health, images = Health(BATCH, PATIENCE), 0
    for part in range(100):
        images, warnings = train(health, {"grad/discriminator": 100 * 100 ** (part / 100)}, 5 * WINDOW, images)
        assert not warnings
        if part % 10 == 5:
            images, _ = train(health, {"grad/discriminator": 1e7, "logit/fake": -1e4}, WINDOW, images)
    assert health.since is None


@pytest.mark.parametrize(
    ("values", "finding", "keys"),
    [
        (
            {"logit/real": 76.0, "logit/fake": -318.0},
            "logit/fake is -318 (healthy: at most 100; ",
            "loss.penalty_weight",
        ),
        (
            {"grad/discriminator": 15_000.0},
            "grad/discriminator is 1.5e+04 (healthy: at most 1,000; ",
            "gradient_clipping",
        ),
        ({"loss/d": 1e6}, "loss/d is 1e+06 (healthy: at most 1,000; ", "optimizer.discriminator_lr"),
        ({"fake/std": 0.0002}, "fake/std is 0.0002 (healthy: at least 0.05 of real/std, which is 0.4)", "optimizer."),
        (
            {"fake/magnitude": 0.999},
            "fake/magnitude is 0.9990 (healthy: at most 0.9750; real/magnitude is 0.50)",
            "optimizer.",
        ),
    ],
)
def test_a_sign_that_lasts_is_a_divergence(values: dict[str, float], finding: str, keys: str):
    """From the start, and after a healthy time: since when, which value, which range, and which keys to change."""
    assert finding in str(diverges(Health(BATCH, PATIENCE), values))
    health, images = after(5 * STEPS)
    found = diverges(health, values, images)
    assert (found.since, found.at) == (images, images + PATIENCE)
    assert f"diverged at {found.at:,} images; the first sign began at {found.since:,} images" in str(found)
    assert finding in str(found) and keys in str(found)
    assert found.record(7, rewound=True)["reason"] == found.findings[0]


def test_what_is_far_from_the_history_of_a_run_is_a_divergence():
    usual = {"grad/generator": 400.0, "logit/real": 50.0}
    health, images = after(5 * STEPS, usual)
    images, warnings = train(health, {"grad/generator": 8_000.0, "logit/real": 300.0}, 3 * STEPS, images)
    assert not warnings and health.since is None, "twenty times and six times the usual values"
    found = diverges(after(5 * STEPS, usual)[0], {"grad/generator": 16_000.0, "logit/real": 600.0}, 5 * PATIENCE)
    assert [finding.partition(" ")[0] for finding in found.findings] == ["logit/real", "grad/generator"]


def test_all_signs_are_in_one_message_from_the_first_on():
    health, images = after(5 * STEPS)
    images, _ = train(health, {"logit/fake": -500.0}, STEPS // 2, images)
    began = health.since
    found = diverges(health, {"logit/fake": -500.0, "fake/std": 0.0, "grad/discriminator": 1e5}, images)
    assert found.since == began and len(found.findings) == 3
    assert str(found).count("optimizer.gradient_clipping") == 1


def test_short_interruptions_do_not_end_a_sign():
    health, images = Health(BATCH, PATIENCE), 0
    with pytest.raises(Diverged) as caught:
        for _ in range(20):
            images, _ = train(health, {"logit/fake": -500.0}, 3 * WINDOW, images)
            images, _ = train(health, {}, WINDOW, images)
    assert caught.value.since == 0


def test_large_batches_wait_for_some_checks():
    found = diverges(Health(BATCH, patience=1), {"logit/fake": -500.0})
    assert found.at == LEAST_WINDOWS * WINDOW * BATCH


@pytest.mark.parametrize(("logit", "diverges"), [(-150.0, False), (-250.0, True)])
def test_the_average_over_the_ranks_counts(logit: float, diverges: bool):
    """Here the logits of the other rank are zero."""
    health = Health(BATCH, PATIENCE)
    with pytest.raises(Diverged) if diverges else contextlib.nullcontext():
        for images in range(BATCH, 3 * PATIENCE, BATCH):
            health.add({"logit/fake": torch.tensor(logit)})
            health.check(images, lambda vector: vector / 2)
    assert images == (PATIENCE if diverges else 3 * PATIENCE - BATCH)


@pytest.mark.parametrize("cut", [1, 3, 8, 61, 100])
def test_a_restored_state_continues_to_the_bit(cut: int):
    """Stopped after any step, also within a window, and resumed from the JSON of a checkpoint."""
    noise = random.Random(cut)
    steps = [{"grad/discriminator": noise.uniform(1, 1e5), "logit/fake": noise.uniform(-400, 0)} for _ in range(160)]
    whole, resumed = Health(BATCH, 10**9), Health(BATCH, 10**9)
    for number, values in enumerate(steps):
        if number == cut:
            state, resumed = json.loads(json.dumps(resumed.state())), Health(BATCH, 10**9)
            resumed.load(state, number * BATCH)
        for health in (whole, resumed):
            train(health, values, 1, number * BATCH)
    assert whole.state() == resumed.state() and whole.state()["episodes"]


def test_the_last_healthy_checkpoint_precedes_the_sign():
    health = Health(BATCH, PATIENCE)
    images, _ = train(health, {}, 2 * WINDOW)
    health.add_checkpoint(images)
    assert health.healthy() == images == health.state()["healthy"]
    later, _ = train(health, {}, WINDOW // 2, images)
    health.add_checkpoint(later)
    assert health.healthy() == images, "until a check passes"
    end, _ = train(health, {"logit/fake": -900.0}, WINDOW // 2, later)
    assert health.since == images and health.healthy(health.since) == images, "the checkpoint is in the same window"
    later, _ = train(health, {}, 8 * WINDOW, end)
    assert health.since is None and health.healthy() == images + BATCH * WINDOW // 2, "the sign did not last"


def test_a_checkpoint_whose_last_step_shows_a_sign_is_not_healthy():
    """Even though the average over its window does not show the sign."""
    health = Health(BATCH, PATIENCE)
    images, _ = train(health, {}, WINDOW - 1)
    images, _ = train(health, {"fake/std": 0.0001}, 1, images)
    health.add_checkpoint(images)
    assert health.since is None and health.healthy() == 0
    images, _ = train(health, {}, 1, images)
    health.add_checkpoint(images)
    train(health, {}, WINDOW, images)
    assert health.healthy() == images


def test_a_checkpoint_of_an_earlier_version_starts_anew():
    health = after(5)[0]
    health.load(None, 12_345)
    fresh = {"begun": 12_345, "healthy": 12_345, "checkpoints": [12_345]}
    assert health.state() == {**Health(BATCH, PATIENCE).state(), **fresh}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss/d_adversarial": 0.001}, "separates real from fake without error"),
        ({"fake/diversity": 0.05}, "loss.g_mode_seeking"),
    ],
)
def test_other_signs_only_give_one_warning(values: dict[str, float], words: str):
    health = Health(BATCH, PATIENCE)
    images, warnings = train(health, values, WARNING_PATIENCE // BATCH - WINDOW)
    assert not warnings and health.since is None
    images, warnings = train(health, values, 2 * WARNING_PATIENCE // BATCH, images)
    assert len(warnings) == 1 and words in warnings[0] and "since 0 images" in warnings[0]


def test_a_run_that_only_warns_goes_on():
    health = Health(BATCH, PATIENCE, fatal=False)
    _, warnings = train(health, {"logit/fake": -500.0}, 10 * STEPS)
    assert len(warnings) == 1 and "logit/fake is -500" in warnings[0] and "loss.penalty_weight" in warnings[0]
    assert health.since is None, "retention treats all checkpoints alike"


def test_numbers_that_are_not_finite_are_dated_to_the_last_finite_check():
    health, images = after(5 * STEPS)
    begun = health.begun
    images, _ = train(health, {"loss/g": math.nan}, 3 * STEPS, images)
    assert health.broken(images, "loss/g is NaN").since == begun and health.begun == begun
    health, images = after(5 * STEPS)
    train(health, {"grad/generator": math.inf}, 3 * STEPS, images)  # fp16 skips such steps
    assert health.since is None
