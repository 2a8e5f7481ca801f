"""Health: problems that stop a run, and problems that are only reported."""

from __future__ import annotations

import math

import pytest

from dist_t2i.errors import TrainingError
from dist_t2i.training.health import Health, check_finite

FINE = {
    "loss/d": 1.2,
    "loss/d_adversarial": 0.9,
    "loss/g": 0.3,
    "logit/real": 0.8,
    "logit/fake": -0.7,
    "grad/discriminator": 2.0,
    "grad/generator": 1.0,
    "fake/std": 0.4,
    "images_per_second": 100.0,
}


def test_finite_numbers_pass():
    check_finite(FINE, images=640, step=10)
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
        check_finite({**FINE, name: value}, images=12_345, step=193, checkpoint="runs/x/checkpoints/images-000010000")
    message = str(caught.value)
    assert f"{name} is {'NaN' if math.isnan(value) else 'infinite'}" in message
    assert f"parameter groups: {group}\n" in message
    assert "12,345 images (step 193)" in message
    assert "runs/x/checkpoints/images-000010000" in message
    assert caught.value.status == 1


def test_groups_found_in_the_weights_are_named_instead():
    with pytest.raises(TrainingError, match="parameter groups: text_g, generator"):
        check_finite({**FINE, "loss/g": math.nan}, images=1, step=1, groups=["text_g", "generator"])


def test_fp16_may_skip_a_step_whose_gradient_overflowed_but_not_lose_a_loss():
    check_finite({**FINE, "grad/generator": math.inf}, images=1, step=1, fp16=True)
    with pytest.raises(TrainingError):
        check_finite({**FINE, "loss/g": math.inf}, images=1, step=1, fp16=True)


def test_measurements_of_the_machine_are_no_reason_to_stop():
    check_finite({**FINE, "images_per_second": math.inf}, images=1, step=1)


def observe(health: Health, values: dict[str, float], until: int, start: int = 0) -> list[tuple[int, str]]:
    return [(n, warning) for n in range(start, until, 100) for warning in health.observe(n, {**FINE, **values})]


def test_a_healthy_run_is_left_alone():
    assert observe(Health(patience_images=1000), {}, 10_000) == []


@pytest.mark.parametrize(
    ("values", "after", "words"),
    [
        ({"loss/d_adversarial": 0.001}, 1000, "discriminator's adversarial loss is zero"),
        ({"fake/std": 0.001}, 300, "same picture for every prompt"),
        ({"logit/fake": -250.0}, 0, "logits grow beyond 100"),
    ],
)
def test_a_collapse_is_told_once_after_its_patience(values: dict[str, float], after: int, words: str):
    told = observe(Health(patience_images=1000), values, 10_000)
    assert [n for n, _ in told] == [after]
    assert words in told[0][1]
    assert any(key in told[0][1] for key in ("loss.", "optimizer."))  # with a remedy


def test_a_sign_that_goes_away_starts_its_patience_anew():
    health = Health(patience_images=1000)
    bad = {"loss/d_adversarial": 0.0}
    assert observe(health, bad, 900) == []
    assert observe(health, {}, 1000, start=900) == []
    assert [n for n, _ in observe(health, bad, 5000, start=1000)] == [2000]
