"""Augmentation: no effect at zero strength, the named effect otherwise, and gradients pass through it."""

import pytest
import torch

from dist_t2i.models.augmentation import UNIFORMS_PER_ROW, augment
from dist_t2i.models.config import AugmentConfig

OFF = {"translation": 0.0, "color": 0.0, "cutout": 0.0}
STRONG = AugmentConfig(translation=0.25, color=0.5, cutout=0.3)


def pictures(rows: int = 3, size: int = 8) -> torch.Tensor:
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def draws(rows: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.rand(rows, UNIFORMS_PER_ROW, generator=torch.Generator().manual_seed(seed))


def test_zero_strength_changes_nothing():
    assert augment(pictures(), draws(), AugmentConfig(**OFF)).equal(pictures())


@pytest.mark.parametrize("name", list(OFF))
def test_each_strength_does_something_and_keeps_the_shape(name):
    out = augment(pictures(), draws(), AugmentConfig(**(OFF | {name: 0.4})))
    assert out.shape == pictures().shape and not out.equal(pictures())


def test_translation_shifts_whole_pixels_and_repeats_the_edge():
    images = torch.arange(8.0).repeat(1, 3, 8, 1)  # every row of pixels reads 0 1 2 3 4 5 6 7
    fixed = torch.zeros(1, UNIFORMS_PER_ROW)  # the largest shift to one side: -2 of 8 px
    out = augment(images, fixed, AugmentConfig(**(OFF | {"translation": 0.25})))
    assert out[0, 0, 0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5]
    fixed[:] = 0.999
    out = augment(images, fixed, AugmentConfig(**(OFF | {"translation": 0.25})))
    assert out[0, 0, 0].tolist() == [2, 3, 4, 5, 6, 7, 7, 7]


def test_all_shifts_are_equally_likely():
    config = AugmentConfig(**(OFF | {"translation": 0.25}))
    images = torch.arange(8.0).repeat(1000, 3, 8, 1)
    grid = torch.zeros(1000, UNIFORMS_PER_ROW)
    grid[:, 0] = torch.arange(1000) / 1000
    first = augment(images, grid, config)[:, 0, 0, 3]
    assert first.unique(return_counts=True)[1].tolist() == [200] * 5


def test_cutout_blanks_a_square_of_its_share():
    middle = torch.full((1, UNIFORMS_PER_ROW), 0.5)
    out = augment(torch.ones(1, 3, 8, 8), middle, AugmentConfig(**(OFF | {"cutout": 0.5})))
    assert out[0, 0, 2:6, 2:6].abs().sum() == 0 and (out == 0).sum() == 3 * 16


def test_neutral_color_numbers_are_the_identity():
    neutral = torch.full((3, UNIFORMS_PER_ROW), 0.5)
    torch.testing.assert_close(augment(pictures(), neutral, AugmentConfig(**(OFF | {"color": 0.8}))), pictures())


def test_rows_are_apart_and_gradients_pass():
    images = pictures().requires_grad_(True)
    out = augment(images, draws(), STRONG)
    torch.testing.assert_close(augment(pictures()[1:2], draws()[1:2], STRONG)[0], out[1].detach())
    out[1].square().sum().backward()
    assert images.grad[1].abs().sum() > 0 and images.grad[0].abs().sum() == 0 and images.grad[2].abs().sum() == 0


def test_gradient_is_that_of_finite_differences():
    images = pictures(1).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: augment(x, draws(1).double(), STRONG), images)
