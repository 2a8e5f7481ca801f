"""Fresh networks keep the scale of their maps at any depth."""

from __future__ import annotations

import pytest
import torch

from dist_t2i.models.config import DiscriminatorConfig, GeneratorConfig
from dist_t2i.models.discriminator import Discriminator
from dist_t2i.models.generator import Generator, GeneratorBlock

SCALES = 7
TEXT = 64


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("more", [{}, {"self_attention": (8, 16), "skips": True}], ids=["plain", "attention and skips"])
def test_fresh_maps_and_logits_do_not_grow_with_depth(blocks: int, more: dict) -> None:
    torch.manual_seed(0)
    channels = (8, 16, 32, 32, 64, 64, 64)
    assert len(channels) == SCALES
    d = Discriminator(DiscriminatorConfig(channels=channels, blocks=blocks, embedding=64, **more), 256, TEXT)
    settings = {"channels": channels[::-1], "blocks": blocks, "layout": 0, "condition": 64, "noise": 32, **more}
    g = Generator(GeneratorConfig(**settings), 256, TEXT)
    stds: list[float] = []
    for module in (*(block for scale in d.scales for block in scale), *g.modules()):
        if module in set(d.modules()) or isinstance(module, GeneratorBlock):
            module.register_forward_hook(lambda module, inputs, output: stds.append(output.std().item()))
    with torch.no_grad():
        sentence, words, mask = torch.randn(4, TEXT), torch.randn(4, 2, TEXT), torch.ones(4, 2, dtype=torch.bool)
        logits = d.adversarial(d.features(torch.rand(4, 3, 256, 256) * 2 - 1), sentence)
        images = g(torch.randn(4, 32), sentence, words, mask, torch.randn(4, 64)).images
    assert len(stds) == 2 * SCALES * blocks
    assert min(stds) > 0.5 and max(stds) < 4.0
    assert logits.square().mean() < 4.0 and (more or logits.abs().max() < 3.0)
    assert (images.abs() > 0.99).float().mean() < 0.1
