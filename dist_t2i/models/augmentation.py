"""Differentiable augmentation of what the discriminator sees (Zhao et al. 2020), with every random number passed in."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_t2i.models.config import AugmentConfig

DRAWS = 7
"""Random numbers that `augment` needs for each row: shift x, y; brightness, saturation, contrast; cutout x, y."""


def augment(images: Tensor, draws: Tensor, config: AugmentConfig) -> Tensor:
    """images [B, 3, H, W] in [-1, 1], draws [B, DRAWS] uniform in [0, 1) -> [B, 3, H, W].

    A real picture and the fake of its caption take the same draws, so that their regions stay comparable. Row i depends
    on row i alone, strengths of zero change nothing, and gradients flow to `images` (never to `draws`).
    """
    if config.color > 0:
        images = _color(images, draws[:, 2:5].to(images.dtype), config.color)
    if config.translation > 0:
        images = _translate(images, draws[:, :2], config.translation)
    if config.cutout > 0:
        images = _cutout(images, draws[:, 5:7], config.cutout)
    return images


def _color(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Brightness (added, up to strength/2), saturation and contrast (factors within 1 +- strength)."""
    brightness, saturation, contrast = (2 * draws - 1)[:, :, None, None, None].mul(strength).unbind(1)
    images = images + brightness / 2
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (1 + saturation)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (1 + contrast)


def _translate(images: Tensor, draws: Tensor, share: float) -> Tensor:
    """Whole-pixel shifts of up to `share` of the side; what comes in repeats the edge.

    (The original fills with zeros, grey here; repeating the edge suits pictures on a plain ground.)
    """
    rows, channels, height, width = images.shape
    reach_x, reach_y = round(share * width), round(share * height)
    shift_x = torch.floor(draws[:, 0] * (2 * reach_x + 1)).long() - reach_x
    shift_y = torch.floor(draws[:, 1] * (2 * reach_y + 1)).long() - reach_y
    x = (torch.arange(width, device=images.device) + shift_x[:, None]).clamp(0, width - 1)
    y = (torch.arange(height, device=images.device) + shift_y[:, None]).clamp(0, height - 1)
    images = images.gather(3, x[:, None, None, :].expand(rows, channels, height, width))
    return images.gather(2, y[:, None, :, None].expand(rows, channels, height, width))


def _cutout(images: Tensor, draws: Tensor, share: float) -> Tensor:
    """A square of `share` of the side becomes grey (0); its centre is anywhere in the picture."""
    _, _, height, width = images.shape
    centre_x, centre_y = draws[:, :1] * width, draws[:, 1:] * height
    x, y = (torch.arange(n, device=images.device) + 0.5 for n in (width, height))
    inside_x = (x - centre_x).abs() < share * width / 2
    inside_y = (y - centre_y).abs() < share * height / 2
    return images * ~(inside_y[:, None, :, None] & inside_x[:, None, None, :])
