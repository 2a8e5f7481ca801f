"""The picture that is to be changed, as a generator sees it: maps for its scales, and how much of each pixel stays.

Our reading of "the embeddings serve text-guided manipulation": the text-to-image generator goes on being what it was,
and the source picture comes in beside it. Two ideas of the field meet here. Maps of the source are added into every
scale through 1x1 convolutions that begin at zero (ControlNet: Zhang et al. 2023, "Adding Conditional Control", sec.
3.1), so that at first nothing is disturbed. And the last map says for each pixel and colour how much of the source
stays (GANimation: Pumarola et al. 2018, sec. 3.1, one share for all colours there; one each here, and not bounded, so
that a colour can be multiplied: a darker or lighter skin keeps its shading and its outlines).

Legend of shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_t2i.models.blocks import FIRST_SIZE, SLOPE, Convolution, convolution, patch_size
from dist_t2i.models.discriminator import DiscriminatorBlock, Downsample


def _zero(layer: Convolution) -> Convolution:
    nn.init.zeros_(layer.weight)
    return layer


class SourceGuide:
    """What one batch's source pictures tell a generator. A generator that can edit calls `add` at every scale, before
    its blocks, and `blend` once, at the end."""

    def __init__(self, pictures: Tensor, given: Tensor | None, maps: dict[int, Tensor], keep: nn.Module):
        self._pictures, self._maps, self._keep = pictures, maps, keep
        self._given = None if given is None else given.to(pictures.dtype)[:, None, None, None]

    def add(self, x: Tensor) -> Tensor:
        """x [B, C, H, W], a scale of the generator -> the same with the source's map of that size added."""
        shown = self._maps[x.shape[-1]]
        return x + (shown if self._given is None else shown * self._given)

    def blend(self, last: Tensor, images: Tensor) -> Tensor:
        """The activated last map and the pictures [B, 3, H, W] made of it -> pictures that keep what shall stay."""
        keep = self._keep(last)
        keep = keep if self._given is None else keep * self._given
        return images + keep * (self._pictures - images)


class Keep(nn.Module):
    """The share of the source that stays, for each pixel and colour; 0 everywhere at first."""

    def __init__(self, channels: int, patch: int):
        super().__init__()
        self.conv = _zero(convolution(channels, 3 * patch**2))
        self.shuffle = nn.PixelShuffle(patch)

    def forward(self, last: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 3, patch * H, patch * W]."""
        return self.shuffle(self.conv(last))


class SourceEncoder(nn.Module):
    """Source pictures -> `SourceGuide` for a generator whose scales have these `channels` (4 pixels first)."""

    def __init__(self, width: int, channels: Sequence[int], image_size: int):
        super().__init__()
        patch = patch_size(tuple(channels), image_size)
        self.sizes = [FIRST_SIZE * 2**i for i in reversed(range(len(channels)))]
        self.unshuffle = nn.PixelUnshuffle(patch)
        self.stem = convolution(3 * patch**2, width, gain=1.0)
        self.downsamples = nn.ModuleList(Downsample(width, width) for _ in channels[1:])
        self.blocks = nn.ModuleList(DiscriminatorBlock(width) for _ in channels)
        self.into = nn.ModuleList(_zero(convolution(width, c, size=1)) for c in reversed(channels))
        self.keep = Keep(channels[-1], patch)

    def forward(self, pictures: Tensor, given: Tensor | None = None) -> SourceGuide:
        """pictures [B, 3, H, W] in [-1, 1]; given bool [B], False where a row has no source (None: all have one)."""
        x = self.stem(self.unshuffle(pictures).contiguous(memory_format=torch.channels_last))
        maps = {}
        for i, (size, block, into) in enumerate(zip(self.sizes, self.blocks, self.into, strict=True)):
            x = block(self.downsamples[i - 1](x) if i else x)
            maps[size] = into(F.leaky_relu(x, SLOPE))
        return SourceGuide(pictures, given, maps, self.keep)
