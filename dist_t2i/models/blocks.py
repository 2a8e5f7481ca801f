"""Pieces that the generator and the discriminator share, and the arithmetic of their scales.

Legend of shapes: B batch, C channels, H W pixels, N width of a condition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIRST_SIZE = 4
"""Side in pixels of the coarsest map of both networks."""
SLOPE = 0.2
"""Negative slope of every leaky ReLU."""


def patch_size(channels: tuple[int, ...], image_size: int) -> int:
    """Side of the square of pixels that one position of the finest computed map stands for.

    `channels` holds one entry per computed scale 4, 8, 16, ...; what is left up to `image_size` is pixel (un)shuffle.
    Raises ValueError when the scales do not divide the image size.
    """
    finest = FIRST_SIZE * 2 ** (len(channels) - 1)
    if image_size % finest:
        raise ValueError(
            f"{len(channels)} scales from {FIRST_SIZE} px reach {finest} px, which does not divide {image_size} px"
        )
    return image_size // finest


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU, in place: call it on a tensor that nothing else needs."""
    return F.leaky_relu(x, SLOPE, inplace=True)


class Convolution(nn.Conv2d):
    """A convolution whose kernel is stored as [outputs, height, width, inputs].

    That is the layout in memory that channels-last convolutions want. As the parameter's own shape, and not as strides of
    the usual one, it outlives ZeRO's stages 1 to 3, which make every parameter a plain view of a flat buffer: with the
    usual shape each convolution copies its kernel into that layout first, some 8% of a step at a peer's size.
    """

    def __init__(self, inputs: int, outputs: int, size: int, gain: float):
        super().__init__(inputs, outputs, size, padding=size // 2)
        kernel = nn.init.normal_(self.weight.detach(), std=gain / (inputs * size * size) ** 0.5)
        self.weight = nn.Parameter(kernel.permute(0, 2, 3, 1).contiguous())
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, H, W] -> [B, outputs, H, W]."""
        return self._conv_forward(x, self.weight.permute(0, 3, 1, 2), self.bias)


def convolution(inputs: int, outputs: int, size: int = 3, gain: float = 2**0.5) -> Convolution:
    """A square convolution that keeps H and W, initialised to keep the variance (He et al. 2015) times gain^2 / 2."""
    return Convolution(inputs, outputs, size, gain)


@torch.no_grad()
def repeat_in_patches(layer: Convolution, patch: int) -> Convolution:
    """Gives the patch^2 outputs that a pixel shuffle lays side by side the same fresh weights: no checkerboards.

    Aitken et al. 2017, "Checkerboard artifact free sub-pixel convolution".
    """
    first = layer.weight[:: patch**2]
    layer.weight.copy_(first.repeat_interleave(patch**2, dim=0))
    return layer


def linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """A linear layer whose outputs have gain^2 times the inputs' mean square; zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=gain / inputs**0.5)
    nn.init.zeros_(layer.bias)
    return layer


class Modulation(nn.Module):
    """Normalise each picture's features, then scale and shift every channel as the condition says.

    The normalisation is one root mean square over all of a row's features (no mean, no statistics over the batch): one
    cheap pass that is folded into the scale. Text-conditioned affine modulation: DF-GAN, sec. 3.3, our reading here.
    """

    def __init__(self, channels: int, condition: int):
        super().__init__()
        self.affine = linear(condition, 2 * channels, gain=0.3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, C, H, W], condition [B, N] -> [B, C, H, W]."""
        scale, shift = self.affine(condition)[:, :, None, None].chunk(2, dim=1)
        rms = x.float().square().mean(dim=(1, 2, 3), keepdim=True).add(1e-6).rsqrt().to(x.dtype)
        return torch.addcmul(shift, x, (1 + scale) * rms)
