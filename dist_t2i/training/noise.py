"""Random numbers of a training step, as functions of the seed and the position in the stream.

Each row of a batch has its own random generator, whose seed depends on the row's position. So image number 1,234,567
has the same noise on every rank, at every world size and after every resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_t2i.models.augmentation import UNIFORMS_PER_ROW
from dist_t2i.models.config import GeneratorConfig
from dist_t2i.utils.seeds import Purpose, mix


class RowNoise(NamedTuple):
    """Random numbers of B rows, fp32 on the CPU."""

    noise: Tensor  # [B, Z], standard normal
    condition_noise: Tensor  # [B, C], standard normal
    augmentation: Tensor  # [B, UNIFORMS_PER_ROW], uniform in [0, 1)


def row_noise(seed: int, positions: Tensor, widths: GeneratorConfig) -> RowNoise:
    """The random numbers of the rows at stream `positions` (int64 [B]). `widths` contains Z and C."""
    normal = torch.empty(len(positions), widths.noise + widths.condition)
    uniform = torch.empty(len(positions), UNIFORMS_PER_ROW)
    for row, generator in enumerate(_generators(seed, positions, Purpose.TRAINING_NOISE)):
        normal[row].normal_(generator=generator)
        uniform[row].uniform_(generator=generator)
    noise, condition_noise = normal.split((widths.noise, widths.condition), dim=1)
    return RowNoise(noise.contiguous(), condition_noise.contiguous(), uniform)


def second_noise(seed: int, positions: Tensor, widths: GeneratorConfig) -> tuple[Tensor, Tensor]:
    """Noise [B, Z] and conditioning noise [B, C] of a second fake of the rows at stream `positions` (int64 [B])."""
    normal = torch.empty(len(positions), widths.noise + widths.condition)
    for row, generator in enumerate(_generators(seed, positions, Purpose.MODE_SEEKING_NOISE)):
        normal[row].normal_(generator=generator)
    noise, condition_noise = normal.split((widths.noise, widths.condition), dim=1)
    return noise.contiguous(), condition_noise.contiguous()


def region_negatives(seed: int, images: int, sides: Sequence[int], count: int) -> Tensor | None:
    """int64 [K, P]: for each of the P positions of all region maps, K = `count` other positions of the same map.

    `sides` are the sides of the maps, in positions. The result depends on `images` (the images seen before the step),
    and is the same on every rank. The result is None if `sides` is empty or `count` is 0.
    """
    if not count or not sides:
        return None
    generator = torch.Generator().manual_seed(mix(seed, images, Purpose.NEGATIVES_AND_INFERENCE_NOISE))
    maps, first = [], 0
    for size in [side**2 for side in sides]:
        shifts = torch.randint(1, size, (count, 1), generator=generator)
        maps.append(first + (torch.arange(size) + shifts) % size)
        first += size
    return torch.cat(maps, dim=1)


def perturbation(seed: int, positions: Tensor, size: int) -> Tensor:
    """Standard normal [B, 3, size, size], for `fd_r1`'s finite difference on the rows at stream `positions`."""
    pixels = torch.empty(len(positions), 3, size, size)
    for row, generator in enumerate(_generators(seed, positions, Purpose.FD_R1_PIXELS)):
        pixels[row].normal_(generator=generator)
    return pixels


def _generators(seed: int, positions: Tensor, purpose: Purpose) -> Iterator[torch.Generator]:
    return (torch.Generator().manual_seed(mix(seed, position, purpose)) for position in positions.tolist())
