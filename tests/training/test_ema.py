"""The average of weights: its half-life is exact and does not depend on how images are cut into steps."""

import pytest
import torch

from dist_t2i.training.ema import ema_decay, update_ema


@pytest.mark.parametrize("step", [1, 8, 250])
def test_half_life_is_exact(step):
    average, weights = {"w": torch.zeros(3, dtype=torch.double)}, {"w": torch.ones(3, dtype=torch.double)}
    for images in range(step, 1000 + 1, step):
        update_ema(average, weights, ema_decay(step, images, half_life_images=1000, ramp=0))
    torch.testing.assert_close(average["w"], torch.full((3,), 0.5, dtype=torch.double))


def test_ramp_shortens_the_half_life_early_only():
    assert ema_decay(10, 100, 1000, ramp=0.1) == pytest.approx(0.5)
    assert ema_decay(10, 10_000, 1000, ramp=0.1) == pytest.approx(0.5**0.01)
    assert ema_decay(10, 10**9, 1000, ramp=0.1) == ema_decay(10, 10**9, 1000, ramp=0)


def test_half_life_zero_follows_the_weights():
    assert ema_decay(32, 64, 0, ramp=0.05) == 0
    average, weights = {"w": torch.randn(4)}, {"w": torch.randn(4)}
    update_ema(average, weights, 0.0)
    assert average["w"].equal(weights["w"])


def test_average_keeps_its_dtype_and_copies_counters():
    average = {"w": torch.zeros(2), "n": torch.tensor(1)}
    update_ema(average, {"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(5)}, 0.75)
    assert average["w"].dtype == torch.float32 and average["w"].tolist() == [0.25, 0.25]
    assert average["n"] == 5


def test_a_missing_weight_is_an_error():
    with pytest.raises(KeyError):
        update_ema({"w": torch.zeros(1)}, {}, 0.5)
