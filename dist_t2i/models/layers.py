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


class WordAttention(nn.Module):
    """Adds to each position of a map what it finds among the caption's words.

    AttnGAN's attention (eq. 4): a position's query against the words' keys, a softmax over the words, their values'
    mean. Our reading for a single stage: several heads, added to the map instead of laid beside it, and both sides
    normalised first, because fresh LSTM states are small and maps grow.
    """

    def __init__(self, channels: int, text_width: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = linear(channels, width)
        self.key = linear(text_width, width)
        self.value = linear(text_width, channels, gain=0.5)

    def attention(self, places: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """places [B, P, C], words [B, T, E], mask bool [B, T] -> fp32 shares [B, heads, P, T], 0 for padding."""
        query, key = self._split(self.query(places)), self._split(self.key(words))
        scores = (query @ key.transpose(2, 3)).float() / query.shape[3] ** 0.5
        return scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(dim=3)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """x [B, C, H, W], words [B, T, E], mask bool [B, T], True at one word or more a row -> [B, C, H, W]."""
        places = x.flatten(2).transpose(1, 2)  # no copy: maps are channels-last
        words = F.layer_norm(words, words.shape[2:])
        shares = self.attention(F.layer_norm(places, places.shape[2:]), words, mask)
        found = shares.to(x.dtype) @ self._split(self.value(words))  # [B, heads, P, C / heads]
        return x + found.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])

    def _split(self, rows: Tensor) -> Tensor:
        """[B, R, heads * D] -> [B, heads, R, D]."""
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)


class DiscriminatorBlock(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = convolution(channels, channels)
        self.conv2 = convolution(channels, channels, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        y = self.conv1(F.leaky_relu(x, SLOPE))
        return x + self.conv2(activate(y))


class Downsample(nn.Module):
    """Half the side: the four pixels of a square side by side, then a 1x1 convolution; nothing is thrown away."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = convolution(4 * inputs, outputs, size=1, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H/2, W/2]."""
        return self.conv(F.pixel_unshuffle(x, 2))
