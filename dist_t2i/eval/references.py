"""Degraded copies of real pictures, which give the floor and the ceiling of each score.

Each function takes and returns uint8 [N, 3, H, W]. The blur is proportional to the side of a picture (one pixel at
32 px), so that its effect is comparable at all sizes. Noise is seeded by the index of the picture, so that a picture
always gets the same noise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_t2i.utils.seeds import Purpose, mix


def mirrored(images: Tensor) -> Tensor:
    """Left and right exchanged. The content is the same, so a generator can hardly reach better scores."""
    return images.flip(-1)


def shrunk(images: Tensor, side: int = 8) -> Tensor:
    """Averaged down to `side` pixels and interpolated back: only the colors and rough shapes remain."""
    small = F.interpolate(images.float(), size=(side, side), mode="area")
    return _rounded(F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False))


def blurred(images: Tensor) -> Tensor:
    """Gaussian blur with a sigma of 1/32 of the side."""
    sigma = images.shape[-1] / 32
    reach = max(1, round(3 * sigma))
    line = torch.exp(-(torch.arange(-reach, reach + 1, device=images.device).float() ** 2) / (2 * sigma**2))
    line = line / line.sum()
    kernel = (line[:, None] * line[None, :]).expand(3, 1, -1, -1).contiguous()
    return _rounded(F.conv2d(F.pad(images.float(), (reach,) * 4, mode="replicate"), kernel, groups=3))


def noisy(images: Tensor, first: int = 0, sigma: float = 15.0) -> Tensor:
    """Adds Gaussian noise with standard deviation `sigma` on the 0 to 255 scale.

    The noise of image i is seeded by `first` + i, and is the same on every machine.
    """
    noise = torch.stack([torch.randn(images.shape[1:], generator=_generator(first + i)) for i in range(len(images))])
    return _rounded(images.float() + sigma * noise.to(images.device))


def random(images: Tensor, first: int = 0) -> Tensor:
    """Independent random bytes in the shape of `images`; image i is seeded by `first` + i."""
    generators = (_generator(first + i) for i in range(len(images)))
    pictures = [torch.randint(256, images.shape[1:], generator=one, dtype=torch.uint8) for one in generators]
    return torch.stack(pictures).to(images.device)


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(number, Purpose.REFERENCE_PICTURES))


def _rounded(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)
