"""The source picture in a generator: no effect at first, independent rows, and able to reproduce the source."""

import pytest
import torch

from dist_t2i.models.config import GeneratorConfig
from dist_t2i.models.generator import Generator
from dist_t2i.models.source_encoder import SourceEncoder
from dist_t2i.models.text_encoder import TextEmbedding

CHANNELS = (12, 8, 8)


@pytest.fixture
def networks():
    torch.manual_seed(0)
    config = GeneratorConfig(noise=4, condition=4, channels=CHANNELS, layout=256)
    return Generator(config, 32, 6), SourceEncoder(8, CHANNELS, 32, 6)


TEXT = TextEmbedding(torch.linspace(-1, 1, 18).view(3, 6), torch.randn(3, 2, 6), torch.tensor([[True, True]] * 3))


def inputs(rows=3):
    torch.manual_seed(1)
    return (
        torch.randn(rows, 4),
        torch.randn(rows, 6),
        torch.randn(rows, 1, 6),
        torch.ones(rows, 1),
        torch.randn(rows, 4),
    )


def trained(source):
    """Moves the layers that start at zero, as training would."""
    for layer in (*source.into, source.keep.conv):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return source


def test_a_fresh_encoder_disturbs_nothing(networks):
    generator, source = networks
    pictures = torch.rand(3, 3, 32, 32) * 2 - 1
    assert torch.equal(generator(*inputs(), source(pictures, TEXT)).images, generator(*inputs()).images)


def test_rows_without_a_source_come_from_text_only(networks):
    generator, source = networks
    trained(source)
    pictures, alone = torch.rand(3, 3, 32, 32) * 2 - 1, generator(*inputs()).images
    given = torch.tensor([True, False, True])
    images = generator(*inputs(), source(pictures, TEXT, given)).images
    assert torch.allclose(images[1], alone[1], atol=1e-6)
    assert not torch.allclose(images[0], alone[0], atol=1e-2)
    others = torch.cat([pictures[:1], pictures[:1], pictures[2:]])
    assert torch.equal(images[0], generator(*inputs(), source(others, TEXT, given)).images[0])


def test_all_kept_is_the_source(networks):
    generator, source = networks
    trained(source)
    torch.nn.init.zeros_(source.keep.conv.weight)
    torch.nn.init.constant_(source.repaint.masks.bias, -100.0)
    torch.nn.init.ones_(source.keep.conv.bias)
    pictures = torch.rand(3, 3, 32, 32) * 2 - 1
    assert torch.allclose(generator(*inputs(), source(pictures, TEXT)).images, pictures, atol=1e-6)


def test_a_source_is_repainted_with_the_colors_of_the_words(networks):
    """If the masks are saturated, a pixel has the exact color of a paint or its own color. Padding gives no colors."""
    repaint = networks[1].repaint
    pictures, x = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, 8, 16, 16)
    fresh = repaint(pictures, x, TEXT)
    assert (fresh - pictures).abs().max() < 0.3 and not torch.equal(fresh, pictures)
    torch.nn.init.zeros_(repaint.masks.weight)
    torch.nn.init.constant_(repaint.masks.bias, -100.0)
    assert torch.equal(repaint(pictures, x, TEXT), pictures)
    with torch.no_grad():
        repaint.masks.bias[2] = 100.0
    colors = repaint.palette(TEXT.words, TEXT.mask)
    assert torch.equal(repaint(pictures, x, TEXT), colors[:, 2, :, None, None].expand_as(pictures))
    mask = torch.tensor([[True, False]] * 3)
    other = torch.cat([TEXT.words[:, :1], torch.full((3, 1, 6), 9.0)], dim=1)
    assert torch.equal(repaint.palette(TEXT.words, mask), repaint.palette(other, mask))
    assert not torch.allclose(repaint.palette(TEXT.words, mask), colors)
