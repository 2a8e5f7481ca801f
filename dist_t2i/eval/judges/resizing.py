"""Ways to resize pictures for a feature network. A network's name includes the resizing, on which scores depend.

Each function takes float32 [B, 3, H, W] with values from 0 to 255 and a side in pixels, and returns [B, 3, side, side].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dist_t2i.eval.judges.torch_fidelity import torch_fidelity


def rounded_bicubic(pixels: Tensor, side: int) -> Tensor:
    """Antialiased bicubic resizing, rounded to 8 bits like a resized picture file."""
    if pixels.shape[-2:] == (side, side):
        return pixels
    return _bicubic(pixels, side).round().clamp(0, 255)


def clean(pixels: Tensor, side: int) -> Tensor:
    """clean-fid's resizing: Pillow's antialiased bicubic in floats, clamped, not rounded (Parmar et al. 2022, sec. 3).

    torch has the same filter (a = -0.5 with antialiasing) and differs from Pillow by at most 1e-3 gray levels.
    """
    return _bicubic(pixels, side).clamp(0, 255)


def legacy(pixels: Tensor, side: int) -> Tensor:
    """The original FID's resizing: TensorFlow 1's bilinear interpolation without antialiasing, by torch-fidelity."""
    module = torch_fidelity("interpolate_compat_tensorflow")
    return module.interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(side, side), align_corners=False)


def _bicubic(pixels: Tensor, side: int) -> Tensor:
    return F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
