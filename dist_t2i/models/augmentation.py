"""Differentiable augmentation of the discriminator's input (Zhao et al. 2020). Callers pass in all random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_t2i.models.config import AugmentConfig

UNIFORMS_PER_ROW = 7
"""Random numbers that `augment` needs per row: shift x, y; brightness, saturation, contrast; cutout x, y."""


def augment(images: Tensor, uniforms: Tensor, config: AugmentConfig) -> Tensor:
    """images [B, 3, H, W] in [-1, 1], uniforms [B, UNIFORMS_PER_ROW] in [0, 1) -> [B, 3, H, W], row by row.

    A real picture and the fake of its caption get the same random numbers, so that their regions stay comparable.
    """
    if config.color > 0:
        images = _color(images, uniforms[:, 2:5].to(images.dtype), config.color)
    if config.translation > 0:
        images = _translate(images, uniforms[:, :2], config.translation)
    if config.cutout > 0:
        images = _cutout(images, uniforms[:, 5:7], config.cutout)
    return images


def _color(images: Tensor, uniforms: Tensor, strength: float) -> Tensor:
    """Brightness (added, up to strength/2), saturation and contrast (factors within 1 +- strength)."""
    brightness, saturation, contrast = (2 * uniforms - 1)[:, :, None, None, None].mul(strength).unbind(1)
    images = images + brightness / 2
    gray = images.mean(dim=1, keepdim=True)
    images = gray + (images - gray) * (1 + saturation)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (1 + contrast)


def _translate(images: Tensor, uniforms: Tensor, share: float) -> Tensor:
    """Shifts by whole pixels, up to `share` of the side. Repeats the pixels at the edges (the original pads with 0)."""

    def moved(size: int, uniform: Tensor) -> Tensor:
        reach = round(share * size)
        shift = torch.floor(uniform * (2 * reach + 1)).long() - reach
        return (torch.arange(size, device=images.device) + shift[:, None]).clamp(0, size - 1)

    x, y = moved(images.shape[3], uniforms[:, 0]), moved(images.shape[2], uniforms[:, 1])
    shifted = images.gather(3, x[:, None, None, :].expand_as(images))
    return shifted.gather(2, y[:, None, :, None].expand_as(images))


def _cutout(images: Tensor, uniforms: Tensor, share: float) -> Tensor:
    """Sets a square of `share` of the side to gray (0). The center of the square is uniform over the picture."""
    _, _, height, width = images.shape
    center_x, center_y = uniforms[:, :1] * width, uniforms[:, 1:] * height
    x, y = (torch.arange(n, device=images.device) + 0.5 for n in (width, height))
    inside_x = (x - center_x).abs() < share * width / 2
    inside_y = (y - center_y).abs() < share * height / 2
    return images * ~(inside_y[:, None, :, None] & inside_x[:, None, None, :])
