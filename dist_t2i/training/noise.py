"""Random numbers of a training step, as a function of (seed, position in the stream) and nothing else.

Each row of a batch has its own generator, seeded by its position, so that the noise of image number 1,234,567 is the same
on any rank, at any world size and after any resume.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dist_t2i.config.sections import Config
from dist_t2i.models.augmentation import UNIFORMS_PER_ROW
from dist_t2i.utils.seeds import Purpose, mix


class Draws(NamedTuple):
    """Random numbers of B rows, fp32 on the CPU."""

    noise: Tensor
    """[B, Z], standard normal"""
    condition_noise: Tensor
    """[B, C], standard normal"""
    augmentation: Tensor
    """[B, UNIFORMS_PER_ROW], uniform in [0, 1)"""


def draw(config: Config, positions: Tensor) -> Draws:
    """The draws of the rows at these stream positions (int64 [B])."""
    widths = (config.model.generator.noise, config.model.generator.condition)
    normal = torch.empty(len(positions), sum(widths))
    uniform = torch.empty(len(positions), UNIFORMS_PER_ROW)
    generator = torch.Generator()
    for row, position in enumerate(positions.tolist()):
        generator.manual_seed(mix(config.train.seed, position, Purpose.TRAINING_NOISE))
        normal[row].normal_(generator=generator)
        uniform[row].uniform_(generator=generator)
    noise, condition_noise = normal.split(widths, dim=1)
    return Draws(noise.contiguous(), condition_noise.contiguous(), uniform)


def draw_places(config: Config, images: int) -> Tensor | None:
    """int64 [K, P]: K other places of the same region map for each of the P places of all maps, for the step that begins
    at `images` seen; None when `loss.region_negatives` is 0. Every rank draws the same."""
    count, sides = config.loss.region_negatives, config.model.discriminator.regions
    if not count or not sides:
        return None
    generator = torch.Generator().manual_seed(mix(config.train.seed, images, Purpose.NEGATIVES_AND_INFERENCE_NOISE))
    maps, first = [], 0
    for side in sides:
        places = side**2
        shifts = torch.randint(1, places, (count, 1), generator=generator)
        maps.append(first + (torch.arange(places) + shifts) % places)
        first += places
    return torch.cat(maps, dim=1)


def draw_pixels(config: Config, positions: Tensor, size: int) -> Tensor:
    """Standard normal [B, 3, size, size] for the finite difference of `fd_r1`."""
    pixels = torch.empty(len(positions), 3, size, size)
    generator = torch.Generator()
    for row, position in enumerate(positions.tolist()):
        generator.manual_seed(mix(config.train.seed, position, Purpose.FD_R1_PIXELS))
        pixels[row].normal_(generator=generator)
    return pixels
