"""Real pictures left alone and damaged on purpose: the floor and the ceiling that stand beside every score.

Each function takes and returns uint8 [N, 3, H, W]. Damage is relative to the side (a 32nd of it is a pixel at 32 px),
so it means the same at every resolution; what is drawn is a function of a picture's number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_t2i.utils.seeds import mix


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


def noisy(images: Tensor, first: int = 0, sigma: float = 15.0) -> Tensor:
    """Gaussian noise of `sigma` grey levels of 255; image i has that of number `first` + i, the same on every machine."""
    noise = torch.stack([torch.randn(images.shape[1:], generator=_generator(first + i)) for i in range(len(images))])
    return to_bytes(images.float() + sigma * noise.to(images.device))


def random(images: Tensor, first: int = 0) -> Tensor:
    """Pictures of the same size whose every byte is drawn by itself; image i is random picture number `first` + i."""
    drawn = [
        torch.randint(256, images.shape[1:], generator=_generator(first + i), dtype=torch.uint8)
        for i in range(len(images))
    ]
    return torch.stack(drawn).to(images.device)


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(number, 6))


def to_bytes(images: Tensor) -> Tensor:
    """Float pixels to uint8, rounded and clipped."""
    return images.round().clamp(0, 255).to(torch.uint8)
