"""The encoder of source pictures for text-guided editing, and how a generator uses its output.

Our reading of "the embeddings serve text-guided manipulation": the source is an additional input of the unchanged
generator. Maps of the source are added to every scale through 1x1 convolutions whose initial weights are zero
(ControlNet: Zhang et al. 2023, sec. 3.1). The generator's last map gives the share of the source to keep, for each
pixel and color channel (GANimation: Pumarola et al. 2018, sec. 3.1). The share is unbounded, so that a skin that turns
darker or lighter keeps its shading and outlines. Before this mixing, the source is *repainted* (our own): a palette of
paints is computed from the caption's words, and a mask per paint says which pixels get the paint. Without repainting, a
skin tone would change only half way, because the generator normalizes features over the picture.

Legend of shapes: B batch, C channels, E text width, T words, K paints, H W pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_t2i.models.config import scales
from dist_t2i.models.layers import Convolution, Downsample, ResidualBlock, WordAttention, activate, linear, patch_size
from dist_t2i.models.text_encoder import TextEmbedding


class SourceGuide:
    """The encoded sources of a batch. Generators call `add` before every scale's blocks, and `blend` at the end."""

    def __init__(self, repainted: Tensor, given: Tensor | None, maps: dict[int, Tensor], keep: nn.Module):
        self._repainted, self._maps, self._keep = repainted, maps, keep
        self._given = None if given is None else given.to(repainted.dtype)[:, None, None, None]

    def add(self, x: Tensor) -> Tensor:
        """x [B, C, H, W], a map of the generator -> the sum with the source's map of that size."""
        source = self._maps[x.shape[-1]]
        return x + (source if self._given is None else source * self._given)

    def blend(self, last: Tensor, images: Tensor) -> Tensor:
        """The activated last map, its pictures [B, 3, H, W] -> mixtures of these pictures and the repainted sources."""
        keep = self._keep(last)
        keep = keep if self._given is None else keep * self._given
        return images + keep * (self._repainted - images)


class Palette(nn.Module):
    """The colors that a caption's words name."""

    def __init__(self, text_width: int, paints: int):
        super().__init__()
        self.paints = paints
        # Do not rename `colour`: checkpoints contain this name.
        self.share, self.colour = linear(text_width, paints), linear(text_width, 3 * paints)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """words [B, T, E], mask bool [B, T], True at least once per row -> [B, K, 3] in [-1, 1]."""
        words = F.layer_norm(words, words.shape[2:])
        shares = self.share(words).float().masked_fill(~mask[:, :, None], float("-inf")).softmax(dim=1)
        colors = self.colour(words).unflatten(2, (self.paints, 3))
        return torch.tanh((shares[..., None].to(words.dtype) * colors).sum(1))


class Repaint(nn.Module):
    """Recolors the pixels of a source with the colors that a caption names."""

    PAINTS, WIDTH = 8, 48
    UNPAINTED = 6.0
    """Logit of leaving a pixel as it is. The paints' logits begin near 0, so at first almost nothing is repainted."""

    def __init__(self, channels: int, text_width: int, patch: int):
        super().__init__()
        self.palette = Palette(text_width, self.PAINTS)
        self.words = WordAttention(channels, text_width, width=32, heads=gcd(channels, 4))
        self.around = Convolution(channels, self.WIDTH * patch**2, size=1, gain=1.0)
        self.shuffle = nn.PixelShuffle(patch)
        self.pixel = Convolution(3, self.WIDTH, size=1, gain=1.0)
        self.affine = linear(text_width, 4 * self.WIDTH, gain=0.3)
        self.conv1, self.conv2 = (Convolution(self.WIDTH, self.WIDTH, size=1) for _ in range(2))
        self.masks = Convolution(self.WIDTH, self.PAINTS, size=1, gain=1.0)

    def forward(self, pictures: Tensor, x: Tensor, text: TextEmbedding) -> Tensor:
        """pictures [B, 3, patch * H, patch * W] in [-1, 1] and their map x [B, C, H, W] -> pictures."""
        # A perceptron at each pixel. The input: the pixel, its surroundings (which have attended to the words), and the
        # sentence (by modulation).
        around = self.shuffle(self.around(self.words(_pixel_norm(x), text.words, text.mask)))
        scale1, shift1, scale2, shift2 = self.affine(text.sentence)[:, :, None, None].chunk(4, dim=1)
        y = _pixel_norm(self.pixel(pictures) + around)
        y = _pixel_norm(self.conv1(activate(torch.addcmul(shift1, y, 1 + scale1))))
        y = self.masks(activate(self.conv2(activate(torch.addcmul(shift2, y, 1 + scale2)))))

        # Masks of the paints, [B, K, H', W'] at full resolution; the rest of each pixel keeps its color.
        unpainted = torch.full_like(y[:, :1], self.UNPAINTED)
        shares = torch.cat([unpainted, y], dim=1).float().softmax(dim=1)[:, 1:].to(pictures.dtype)
        paint = torch.einsum("bkhw,bkc->bchw", shares, self.palette(text.words, text.mask))
        return paint + (1 - shares.sum(1, keepdim=True)) * pictures


def _pixel_norm(x: Tensor) -> Tensor:
    """Normalizes each position's features to a mean square of 1 (Progressive GANs, Karras et al. 2018, sec. 4.2)."""
    return x * x.float().square().mean(dim=1, keepdim=True).add(1e-6).rsqrt().to(x.dtype)


class SourceEncoder(nn.Module):
    """Encodes source pictures and captions into a `SourceGuide`, for generators with `channels` (coarsest first)."""

    def __init__(self, width: int, channels: Sequence[int], image_size: int, text_width: int):
        super().__init__()
        patch = patch_size(tuple(channels), image_size)
        self.sizes = scales(tuple(channels))[::-1]
        self.unshuffle = nn.PixelUnshuffle(patch)
        self.stem = Convolution(3 * patch**2, width, gain=1.0)
        self.downsamples = nn.ModuleList(Downsample(width, width) for _ in channels[1:])
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in channels)
        self.into = nn.ModuleList(Convolution(width, c, size=1) for c in reversed(channels))
        # The share of the source to keep, for each pixel and color channel; initially 0.
        keep = {"conv": Convolution(channels[-1], 3 * patch**2), "shuffle": nn.PixelShuffle(patch)}
        self.keep = nn.Sequential(OrderedDict(keep))
        for layer in (*self.into, self.keep.conv):
            nn.init.zeros_(layer.weight)
        self.repaint = Repaint(width, text_width, patch)

    def forward(self, pictures: Tensor, text: TextEmbedding, given: Tensor | None = None) -> SourceGuide:
        """pictures [B, 3, H, W] in [-1, 1], S_G's text, given bool [B] (False: no source; None: all True)."""
        x = self.stem(self.unshuffle(pictures).contiguous(memory_format=torch.channels_last))
        features = []
        for i, block in enumerate(self.blocks):
            x = block(self.downsamples[i - 1](x) if i else x)
            features.append(x)
        layers = zip(self.sizes, self.into, features, strict=True)
        maps = {size: into(activate(x, inplace=False)) for size, into, x in layers}
        return SourceGuide(self.repaint(pictures, features[0], text), given, maps, self.keep)
