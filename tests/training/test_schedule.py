"""Schedules compared with values computed by hand."""

from __future__ import annotations

import pytest

from dist_t2i.config.sections import LossConfig, OptimizerConfig
from dist_t2i.training.schedule import learning_rate_scale, penalty_scale, warmup


def test_warmup_rises_to_one_and_stays():
    assert warmup(0, 1000) == pytest.approx(0.001)
    assert warmup(499, 1000) == pytest.approx(0.5)
    assert warmup(999, 1000) == warmup(123_456, 1000) == 1.0
    assert warmup(0, 0) == 1.0


@pytest.mark.parametrize(
    ("decay", "images", "expected"),
    [
        ("constant", 10_000, 1.0),
        ("linear", 5_000, 1.0),
        ("linear", 7_500, 0.1 + 0.9 * 0.5),
        ("linear", 10_000, 0.1),
        ("linear", 20_000, 0.1),  # past the end it stays
        ("cosine", 5_000, 1.0),
        ("cosine", 7_500, 0.1 + 0.9 * 0.5),
        ("cosine", 6_250, 0.1 + 0.9 * 0.5 * (1 + 2**-0.5)),
        ("cosine", 10_000, 0.1),
    ],
)
def test_decay(decay: str, images: int, expected: float):
    optimizer = OptimizerConfig(warmup_images=0, decay=decay, decay_start=0.5, final_lr_scale=0.1)
    assert learning_rate_scale(images, optimizer, 10_000) == pytest.approx(expected)


def test_decay_from_the_start_and_at_the_very_end():
    whole = OptimizerConfig(warmup_images=0, decay="linear", decay_start=0.0, final_lr_scale=0.0)
    assert [learning_rate_scale(n, whole, 100) for n in (0, 25, 100)] == [1.0, 0.75, 0.0]
    never = OptimizerConfig(warmup_images=0, decay="linear", decay_start=1.0)
    assert [learning_rate_scale(n, never, 100) for n in (0, 99, 100)] == [1.0, 1.0, 1.0]


def test_warmup_and_decay_multiply():
    both = OptimizerConfig(warmup_images=100, decay="linear", decay_start=0.0, final_lr_scale=0.0)
    assert learning_rate_scale(49, both, 100) == pytest.approx(0.5 * 0.51)


def test_the_lazy_penalty_keeps_its_weight_on_average():
    loss = LossConfig(penalty="r1", penalty_weight=0.05, penalty_every=8)
    scales = [penalty_scale(step, loss) for step in range(80)]
    assert [step for step, scale in enumerate(scales) if scale] == list(range(0, 80, 8))
    assert sum(scales) / len(scales) == pytest.approx(0.05)
    assert penalty_scale(0, LossConfig(penalty="none")) == 0.0
