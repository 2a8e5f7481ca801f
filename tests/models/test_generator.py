"""The generators: sizes by configuration, no hidden randomness, independent rows, and the effect of words in `attn`."""

import typing

import pytest
import torch

from dist_t2i.config.fields import field_types
from dist_t2i.models.config import AttnConfig, GeneratorConfig
from dist_t2i.models.generator import INITIAL_LOG_VARIANCE, Generator
from dist_t2i.models.layers import SelfAttention, WordAttention
from dist_t2i.models.networks import GENERATORS

TEXT = 24
KINDS = pytest.mark.parametrize("kind", GENERATORS)
PARTS = {"mapping": 2, "self_attention": (8,), "skips": True}


def build(image_size: int = 32, **changes) -> Generator:
    torch.manual_seed(0)
    settings = {"noise": 8, "condition": 12, "channels": (16, 12, 8), "layout": 1024} | changes
    config = GeneratorConfig(**settings)
    return GENERATORS[config.kind](config, image_size, TEXT)


def inputs(generator: Generator, rows: int = 4) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(1)
    normal = [torch.randn(rows, n, generator=random) for n in (generator.noise_width, TEXT, generator.condition_width)]
    noise, sentence, condition_noise = normal
    mask = torch.arange(5) < torch.arange(rows)[:, None] % 5 + 1  # 1, 2, 3, ... words
    return noise, sentence, torch.randn(rows, 5, TEXT, generator=random) * mask[:, :, None], mask, condition_noise


@KINDS
@pytest.mark.parametrize("image_size", [16, 32, 64, 256])
@pytest.mark.parametrize("blocks", [1, 2])
def test_any_size_is_reached_by_scales_and_pixel_shuffle(kind, image_size, blocks):
    generator = build(image_size, kind=kind, blocks=blocks)
    images, mean, log_variance = generator(*inputs(generator, rows=2))
    assert images.shape == (2, 3, image_size, image_size)
    assert images.abs().max() <= 1 and images.std() > 0.05
    assert mean.shape == log_variance.shape == (2, 12)


def test_every_kind_that_can_be_asked_for_is_registered():
    assert typing.get_args(field_types(GeneratorConfig)["kind"]) == tuple(GENERATORS)


def test_scales_that_do_not_divide_the_size_are_refused():
    with pytest.raises(ValueError, match="16 px, which does not divide 40 px"):
        build(40)


@KINDS
def test_output_is_a_function_of_the_inputs_and_rows_are_apart(kind):
    generator = build(kind=kind)
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
    assert log_variance.eq(INITIAL_LOG_VARIANCE).all(), "fresh networks depend on the text, not on the noise"


@KINDS
def test_every_input_and_parameter_matters(kind):
    generator = build(kind=kind)
    noise, sentence, words, mask, condition_noise = inputs(generator)
    for x in (noise, sentence, words, condition_noise):
        x.requires_grad_(True)
    generator(noise, sentence, words, mask, condition_noise).images.square().sum().backward()
    assert all(x.grad.abs().sum(1).gt(0).all() for x in (noise, sentence, condition_noise))
    heard = torch.zeros_like(mask) if words.grad is None else words.grad.abs().sum(2) > 0
    assert heard.equal(mask if kind == "attn" else torch.zeros_like(mask)), "its own words, never padding"
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())


def test_layouts_exist_where_they_have_four_channels_and_can_be_left_out():
    assert set(build(layout=1024).layouts) == {"8", "16"}
    assert set(build(layout=512).layouts) == {"8"}
    assert len(build(layout=0).layouts) == 0


@KINDS
@pytest.mark.parametrize("image_size", [16, 64])
def test_pictures_that_are_mixed_from_a_palette(kind, image_size):
    """Every pixel is a mixture of its palette's colors, and exactly one of them if the shares are saturated."""
    generator = build(image_size, kind=kind, colors=5)
    images = generator(*inputs(generator)).images
    assert images.shape == (4, 3, image_size, image_size) and images.abs().max() <= 1 and images.std() > 0.05
    condition, logits = torch.randn(2, 20), torch.full((2, 5, 4, 4), -50.0)
    chosen = torch.randint(5, (2, 4, 4))
    mixed = generator.colours(logits.scatter(1, chosen[:, None], 50.0), condition)
    palette = torch.tanh(generator.colours.palette(condition)).view(2, 5, 3)
    assert torch.equal(mixed[1, :, 2, 3], palette[1, chosen[1, 2, 3]])
    for parameter in generator.colours.parameters():
        assert torch.autograd.grad(images.square().sum(), parameter, retain_graph=True)[0].abs().sum() > 0


def test_colors_are_sharper_at_inference_than_in_training():
    """`color_sharpness` multiplies the logits of the shares in eval mode, never in training."""
    plain, sharp = (build(colors=5, color_sharpness=factor).colours for factor in (1.0, 2.0))
    logits, condition = torch.randn(2, 5, 4, 4), torch.randn(2, 20)
    assert sharp(logits, condition).equal(plain(logits, condition))
    rendered = sharp.eval()(logits, condition)
    assert rendered.equal(plain(2 * logits, condition)) and not rendered.equal(plain.eval()(logits, condition))


def test_the_plain_generator_is_what_it_was_before_there_were_others():
    """Names, order and values of its parameters, which runs and exported models rely on."""
    names = [name for name, _ in build().named_parameters()]
    assert [n for n, _ in build(kind="attn").named_parameters() if not n.startswith("attentions.")] == names
    assert names[:4] == ["augmentation.statistics.weight", "augmentation.statistics.bias", "first.weight", "first.bias"]
    plain, attn = build().state_dict(), build(kind="attn").state_dict()
    assert all(attn[name].equal(value) for name, value in plain.items()), "initialized before the attention's"


def test_padding_gets_no_attention_whatever_is_in_it():
    generator = build(kind="attn", attn=AttnConfig(scales=(4, 8, 16)))
    noise, sentence, words, mask, condition_noise = inputs(generator)
    images = generator(noise, sentence, words, mask, condition_noise).images
    rubbish = words.masked_fill(~mask[:, :, None], 100.0)
    assert generator(noise, sentence, rubbish, mask, condition_noise).images.equal(images)
    shares = generator.attentions["8"].attention(torch.randn(4, 64, 12), rubbish, mask)
    assert shares.sum(dim=3).allclose(torch.ones(4, 4, 64)) and not shares.masked_select(~mask[:, None, None]).any()


def test_attention_is_where_it_was_asked_for():
    assert set(build(kind="attn").attentions) == {"8"}
    assert set(build(kind="attn", attn=AttnConfig(scales=(16, 4), heads=2)).attentions) == {"4", "16"}


def test_positions_read_the_words_they_look_for():
    """With one head and one word that matches the queries, every position gets the value of this word."""
    attention = WordAttention(channels=2, text_width=3, width=2, heads=1)
    with torch.no_grad():
        attention.query.weight.copy_(torch.eye(2) * 30)
        attention.key.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        attention.value.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    words = torch.eye(3)[None]
    x = torch.zeros(1, 2, 1, 2)
    x[0, 0, 0, 0] = x[0, 1, 0, 1] = 1.0  # the first position looks for the first word, the second for the second
    found = (attention(x, words, torch.ones(1, 3, dtype=torch.bool)) - x)[0, :, 0].T
    torch.testing.assert_close(found, torch.nn.functional.layer_norm(words, (3,))[0, :2, :2])


def test_a_fresh_pixel_shuffle_makes_no_checkerboard():
    images = build(detail=0)(*inputs(build())).images
    torch.testing.assert_close(images[:, :, ::2, ::2], images[:, :, 1::2, 1::2], rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize("image_size", [16, 64])
def test_optional_parts_read_every_input_and_train_every_parameter(kind, image_size):
    generator = build(image_size, kind=kind, **PARTS)
    torch.nn.init.normal_(generator.self_attentions["8"].mix.weight, std=0.1)  # zero in a fresh network
    everything = inputs(generator)
    generator(*everything).images.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())
    alone = generator(*(x[2:3] for x in everything)).images
    torch.testing.assert_close(alone[0], generator(*everything).images[2], rtol=1e-4, atol=1e-5)


def test_positions_attend_to_each_other():
    """A change at one position of a map changes the other positions."""
    attention = SelfAttention(16)
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    assert attention(x).equal(x), "a fresh branch adds nothing"
    torch.nn.init.normal_(attention.mix.weight)
    changed = x.clone()
    changed[:, 0, 0, 0] += 3
    assert (attention(changed) - attention(x))[:, :, 3, 3].abs().max() > 1e-4


def test_self_attention_at_a_map_that_is_not_computed_is_refused():
    assert any(
        "self_attention" in names for names, _ in GeneratorConfig(channels=(8, 8), self_attention=(16,)).problems()
    )
