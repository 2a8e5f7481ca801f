"""The exponential moving average of weights, on plain name -> tensor dictionaries, with its half-life in images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def ema_decay(step_images: int, images: int, half_life_images: float, ramp: float) -> float:
    """The factor on the old average for a step of `step_images` that ends at `images` images seen.

    0.5 ** (step_images / half_life), the half-life being at most `ramp * images` early on (EDM, appendix F.2), so that
    an early average is not the initial weights; ramp 0 turns that off. Independent of how images are cut into steps
    once the ramp has passed. A half-life of 0 follows the weights exactly.
    """
    half_life = min(half_life_images, ramp * images) if ramp > 0 else half_life_images
    return 0.5 ** (step_images / half_life) if half_life > 0 else 0.0


@torch.no_grad()
def update_ema(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place, in the average's dtype (keep it fp32).

    Raises KeyError when `weights` lacks one of the average's names. Buffers that are not floating point are copied.
    """
    for name, mean in average.items():
        value = weights[name].to(mean.device)
        if mean.is_floating_point():
            mean.lerp_(value.to(mean.dtype), 1 - decay)
        else:
            mean.copy_(value)
