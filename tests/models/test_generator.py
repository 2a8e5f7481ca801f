"""The generator: sizes by configuration, no hidden randomness, rows apart."""

import typing

import pytest
import torch

from dist_t2i.configschema import field_types
from dist_t2i.models.generator import INITIAL_LOG_VARIANCE, Generator
from dist_t2i.models.options import GeneratorConfig
from dist_t2i.models.registry import GENERATORS

TEXT = 24


def build(image_size: int = 32, **changes) -> Generator:
    torch.manual_seed(0)
    settings = {"noise": 8, "condition": 12, "channels": (16, 12, 8), "layout": 1024} | changes
    return Generator(GeneratorConfig(**settings), image_size, TEXT)


def inputs(generator: Generator, rows: int = 4) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(1)
    normal = [torch.randn(rows, n, generator=random) for n in (generator.noise_width, TEXT, generator.condition_width)]
    noise, sentence, condition_noise = normal
    return noise, sentence, torch.zeros(rows, 5, TEXT), torch.ones(rows, 5, dtype=torch.bool), condition_noise


@pytest.mark.parametrize("image_size", [16, 32, 64, 256])
@pytest.mark.parametrize("blocks", [1, 2])
def test_any_size_is_reached_by_scales_and_pixel_shuffle(image_size, blocks):
    generator = build(image_size, blocks=blocks)
    images, mean, log_variance = generator(*inputs(generator, rows=2))
    assert images.shape == (2, 3, image_size, image_size)
    assert images.abs().max() <= 1 and images.std() > 0.05
    assert mean.shape == log_variance.shape == (2, 12)


def test_every_kind_that_can_be_asked_for_is_registered():
    assert typing.get_args(field_types(GeneratorConfig)["kind"]) == tuple(GENERATORS)


def test_scales_that_do_not_divide_the_size_are_refused():
    with pytest.raises(ValueError, match="16 px, which does not divide 40 px"):
        build(40)


def test_output_is_a_function_of_the_inputs_and_rows_are_apart():
    generator = build()
    everything = inputs(generator)
    images = generator(*everything).images
    assert generator(*everything).images.equal(images)
    alone = generator(*(x[2:3] for x in everything)).images
    torch.testing.assert_close(alone[0], images[2], rtol=1e-4, atol=1e-5)


def test_condition_augmentation_is_mean_plus_scaled_noise():
    augmentation = build().augmentation
    sentence, noise = torch.randn(3, TEXT), torch.randn(3, 12)
    condition, mean, log_variance = augmentation(sentence, noise)
    torch.testing.assert_close(condition, mean + noise * log_variance.exp().sqrt())
    assert augmentation(sentence, torch.zeros(3, 12))[0].equal(mean)
    assert log_variance.eq(INITIAL_LOG_VARIANCE).all(), "fresh networks hear the text, not the noise"


def test_every_input_and_parameter_matters():
    generator = build()
    noise, sentence, words, mask, condition_noise = inputs(generator)
    for x in (noise, sentence, condition_noise):
        x.requires_grad_(True)
    generator(noise, sentence, words, mask, condition_noise).images.square().sum().backward()
    assert all(x.grad.abs().sum(1).gt(0).all() for x in (noise, sentence, condition_noise))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())


def test_layouts_exist_where_they_have_four_channels_and_can_be_left_out():
    assert set(build(layout=1024).layouts) == {"8", "16"}
    assert set(build(layout=512).layouts) == {"8"}
    assert len(build(layout=0).layouts) == 0


def test_a_fresh_pixel_shuffle_makes_no_checkerboard():
    images = build(detail=0)(*inputs(build())).images
    torch.testing.assert_close(images[:, :, ::2, ::2], images[:, :, 1::2, 1::2], rtol=1e-4, atol=1e-5)
