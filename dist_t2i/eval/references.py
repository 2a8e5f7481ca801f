"""Real pictures left alone and damaged on purpose: the floor and the ceiling that stand beside every score.

Each function takes and returns uint8 [N, 3, H, W]. Damage is relative to the side (a 32nd of it is a pixel at 32 px),
so it means the same at every resolution; noise is drawn from a fixed seed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mirrored(images: Tensor) -> Tensor:
    """Left and right exchanged: another picture of the same thing, about the best that a generator can hope for."""
    return images.flip(-1)


def shrunk(images: Tensor, side: int = 8) -> Tensor:
    """Averaged down to `side` pixels and interpolated back: the colours and the rough shape, nothing else."""
    small = F.interpolate(images.float(), size=(side, side), mode="area")
    return to_bytes(F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False))


def blurred(images: Tensor) -> Tensor:
    """Gaussian blur with a sigma of 1/32 of the side."""
    sigma = images.shape[-1] / 32
    reach = max(1, round(3 * sigma))
    line = torch.exp(-(torch.arange(-reach, reach + 1, device=images.device).float() ** 2) / (2 * sigma**2))
    line = line / line.sum()
    kernel = (line[:, None] * line[None, :]).expand(3, 1, -1, -1).contiguous()
    return to_bytes(F.conv2d(F.pad(images.float(), (reach,) * 4, mode="replicate"), kernel, groups=3))


def noisy(images: Tensor, sigma: float = 15.0) -> Tensor:
    """Gaussian noise of `sigma` grey levels of 255, the same on every machine."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return to_bytes(images.float() + sigma * noise.to(images.device))


def to_bytes(images: Tensor) -> Tensor:
    """Float pixels to uint8, rounded and clipped."""
    return images.round().clamp(0, 255).to(torch.uint8)
