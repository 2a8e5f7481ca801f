"""Layers that the generator and the discriminator share, and the arithmetic of their scales.

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
    """Side, in pixels, of the square that a position of the finest computed map covers: the factor of the pixel
    shuffle.

    `channels` has one entry per computed scale 4, 8, 16, ... Raises ValueError if the scales do not divide
    `image_size`.
    """
    count, finest = len(channels), FIRST_SIZE * 2 ** (len(channels) - 1)
    if image_size % finest:
        raise ValueError(
            f"{count} scales from {FIRST_SIZE} px reach {finest} px, which does not divide {image_size} px"
        )
    return image_size // finest


def activate(x: Tensor, inplace: bool = True) -> Tensor:
    """Leaky ReLU. With `inplace`, the caller must not use `x` afterwards."""
    return F.leaky_relu(x, SLOPE, inplace)


class Convolution(nn.Conv2d):
    """A square convolution that keeps H and W. Its kernel is stored as [outputs, height, width, inputs] and initialized
    to scale the variance by gain^2 / 2 (He et al. 2015).

    Channels-last convolutions need the kernel in this memory layout. ZeRO's stages 1 to 3 make parameters contiguous
    views of a flat buffer, so that a kernel of the usual shape would be copied before each convolution. In models of a
    typical size, these copies take about 8% of a step.
    """

    def __init__(self, inputs: int, outputs: int, size: int = 3, gain: float = 2**0.5):
        super().__init__(inputs, outputs, size, padding=size // 2)
        kernel = nn.init.normal_(self.weight.detach(), std=gain / (inputs * size * size) ** 0.5)
        self.weight = nn.Parameter(kernel.permute(0, 2, 3, 1).contiguous())
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, H, W] -> [B, outputs, H, W]."""
        return self._conv_forward(x, self.weight.permute(0, 3, 1, 2), self.bias)


@torch.no_grad()
def repeat_in_patches(layer: Convolution, patch: int) -> Convolution:
    """Makes the initial weights of neighboring output pixels equal, which avoids checkerboards (Aitken et al. 2017)."""
    first = layer.weight[:: patch**2]
    layer.weight.copy_(first.repeat_interleave(patch**2, dim=0))
    return layer


def linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """A linear layer whose outputs have gain^2 times the mean square of the inputs; zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=gain / inputs**0.5)
    nn.init.zeros_(layer.bias)
    return layer


class Modulation(nn.Module):
    """Normalizes each picture's features, then scales and shifts each channel depending on the condition, as in DF-GAN.

    The normalization is our own: all features of a row are divided by their root mean square (no mean, no batch
    statistics). The normalization is cheap, because the division is folded into the scale.
    """

    def __init__(self, channels: int, condition: int):
        super().__init__()
        self.affine = linear(condition, 2 * channels, gain=0.3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, C, H, W], condition [B, N] -> [B, C, H, W]."""
        scale, shift = self.affine(condition)[:, :, None, None].chunk(2, dim=1)
        rms = x.float().square().mean(dim=(1, 2, 3), keepdim=True).add(1e-6).rsqrt().to(x.dtype)
        return torch.addcmul(shift, x, (1 + scale) * rms)


class WordAttention(nn.Module):
    """Adds to each position of a map a mixture of the caption's words, by AttnGAN's attention (sec. 3.1).

    Our reading for a single stage has several heads and adds the mixture to the map instead of concatenating both. Both
    inputs are normalized first, because initial LSTM states are small and maps grow.
    """

    def __init__(self, channels: int, text_width: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = linear(channels, width)
        self.key = linear(text_width, width)
        self.value = linear(text_width, channels, gain=0.5)

    def attention(self, positions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """positions [B, P, C], words [B, T, E], mask bool [B, T] -> fp32 weights [B, heads, P, T], 0 for padding."""
        query, key = self._split(self.query(positions)), self._split(self.key(words))
        scores = (query @ key.transpose(2, 3)).float() / query.shape[3] ** 0.5
        return scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(dim=3)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """x [B, C, H, W], words [B, T, E], mask bool [B, T], True at least once per row -> [B, C, H, W]."""
        positions = x.flatten(2).transpose(1, 2)  # no copy: maps are channels-last
        words = F.layer_norm(words, words.shape[2:])
        weights = self.attention(F.layer_norm(positions, positions.shape[2:]), words, mask)
        mixture = weights.to(x.dtype) @ self._split(self.value(words))  # [B, heads, P, C / heads]
        return x + mixture.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])

    def _split(self, rows: Tensor) -> Tensor:
        """[B, R, heads * D] -> [B, heads, R, D]."""
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Adds to each position of a map a mixture of all its positions, as a residual branch that starts at zero.

    As in GigaGAN (Kang et al. 2023, sec. 3.2), attention logits are L2 distances, with one matrix for queries and keys.
    Unlike inner products, they keep the discriminator's Lipschitz constant bounded (Kim et al. 2021). The branch of a
    fresh network is zero, as in R3GAN (Huang et al. 2024).
    """

    HEAD = 64
    """Number of channels for each head: a map of 256 channels has four heads."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = next(heads for heads in range(max(1, channels // self.HEAD), 0, -1) if channels % heads == 0)
        self.query = linear(channels, channels, gain=0.25)  # a fresh position attends to all positions
        self.value = linear(channels, channels)
        self.mix = linear(channels, channels, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        positions = x.flatten(2).transpose(1, 2)  # no copy: maps are channels-last
        positions = F.layer_norm(positions, positions.shape[2:])
        query, value = (
            layer(positions).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.value)
        )

        # -|q_i - q_j|^2 / sqrt(D), up to -|q_i|^2, which a softmax over j ignores: [B, heads, P, P].
        products, squares = query @ query.transpose(2, 3), query.float().square().sum(3)
        scores = (2 * products.float() - squares[:, :, None, :]) / query.shape[3] ** 0.5
        mixture = scores.softmax(dim=3).to(x.dtype) @ value  # [B, heads, P, D]
        mixed = self.mix(mixture.transpose(1, 2).flatten(2))
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])


def residual_gain(blocks: int) -> float:
    """Factor on the initial gain of each residual branch in a network of `blocks` blocks in total.

    Each branch adds to the variance of the map. From four blocks on, all branches together add a constant amount, so
    that fresh maps and logits do not grow with depth. R3GAN (Huang et al. 2024, sec. 3.2) also scales by depth.
    """
    return min(1.0, 2.0 / blocks**0.5)


class ResidualBlock(nn.Module):
    """A residual block of two 3x3 convolutions. `gain` is that of its second convolution."""

    def __init__(self, channels: int, gain: float = 1.0):
        super().__init__()
        self.conv1 = Convolution(channels, channels)
        self.conv2 = Convolution(channels, channels, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        y = self.conv1(activate(x, inplace=False))
        return x + self.conv2(activate(y))


class Downsample(nn.Module):
    """Halves the side without losing information: pixel unshuffle (2 x 2 to channels), then a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = Convolution(4 * inputs, outputs, size=1, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H/2, W/2]."""
        return self.conv(F.pixel_unshuffle(x, 2))
