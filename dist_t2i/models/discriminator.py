"""The discriminator: one trunk, an adversarial branch and an alignment branch, both conditioned on S_D.

Legend of shapes: B batch, C channels, H W pixels, E text width, A alignment width, P positions of the region maps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_t2i.models.config import DiscriminatorConfig, scales
from dist_t2i.models.layers import (
    FIRST_SIZE,
    Convolution,
    Downsample,
    ResidualBlock,
    SelfAttention,
    activate,
    linear,
    patch_size,
    residual_gain,
)
from dist_t2i.models.text_encoder import TextEmbedding

Embeddings = dict[str, Tensor]
"""Tensors with one row per picture or caption, by name."""


class Features(NamedTuple):
    """The trunk's features of B pictures, which both branches read."""

    pooled: Tensor  # [B, A], the whole picture
    maps: tuple[Tensor, ...]  # one [B, C, H, W] for each size in `regions`, in that order
    patches: Tensor | None = None  # [B, P, C'], the positions that the patch head scores; None without it
    words: Tensor | None = None  # [B, C, H, W], the map that words are aligned with; None without words

    def rows(self, start: int, stop: int) -> Features:
        """The features of the pictures [start, stop) of the batch."""
        patches, words = (None if x is None else x[start:stop] for x in (self.patches, self.words))
        return Features(self.pooled[start:stop], tuple(x[start:stop] for x in self.maps), patches, words)


class PatchHead(nn.Module):
    """A projection discriminator at each position of a map: PatchGAN (Isola et al. 2017) with a caption."""

    def __init__(self, channels: int, text_width: int, width: int = 64):
        super().__init__()
        self.embedding = Convolution(channels, width, size=1)
        self.realism = linear(width, 1)
        self.condition = linear(text_width, width)

    def embed(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> patches [B, H * W, C'], from which `forward` can score any number of captions."""
        return activate(self.embedding(activate(x, inplace=False))).flatten(2).transpose(1, 2)

    def forward(self, patches: Tensor, sentence: Tensor) -> Tensor:
        """patches [B, P, C'], sentence [B, E] -> logits [B, P]."""
        agreement = torch.bmm(patches, self.condition(sentence)[:, :, None]) / patches.shape[2] ** 0.5
        return (self.realism(patches) + agreement)[:, :, 0]


class Discriminator(nn.Module):
    """Scores realism and agreement with a caption from one pass through the trunk.

    The adversarial branch scores the whole picture and, with `patches`, each position of a map. The alignment branch
    projects pictures and S_D sentences into a space where InfoNCE compares them. With `regions` or `words`, it also
    projects the positions of maps and S_D's words. This is our reading of the paper. Raises ValueError if `config`
    names a map that the trunk does not compute.
    """

    def __init__(self, config: DiscriminatorConfig, image_size: int, text_width: int):
        super().__init__()
        for names, text in config.problems():
            raise ValueError(f"model.discriminator.{names[0]}: {text}")
        channels, width = config.channels, config.embedding
        patch = patch_size(channels, image_size)
        self.region_sizes, self.patch_size, self.word_size = config.regions, config.patches, config.words
        self.unshuffle = nn.PixelUnshuffle(patch)
        self.stem = Convolution(3 * patch**2, channels[0], gain=1.0)
        self.downsamples = nn.ModuleList(Downsample(a, b) for a, b in pairwise(channels))
        repeats, gain = range(config.blocks), residual_gain(config.blocks * len(channels))
        self.scales = nn.ModuleList(nn.ModuleList(ResidualBlock(c, gain) for _ in repeats) for c in channels)
        self.pool = linear(channels[-1] * FIRST_SIZE**2, width, gain=2**0.5)
        self.joint = config.condition == "joint"
        self.condition = linear(text_width, width)
        self.hidden = linear(2 * width, width, gain=2**0.5) if self.joint else None
        self.realism = linear(width, 1, gain=gain)  # small in deep networks, as fresh logits should be
        self.image_projection = linear(width, width)
        self.text_projection = linear(text_width, width)
        channels_of = dict(zip(scales(channels)[::-1], channels, strict=True))

        def projection(size: int) -> Convolution:
            return Convolution(channels_of[size], config.region_embedding, size=1, gain=1.0)

        self.region_projections = nn.ModuleList(map(projection, config.regions))
        self.region_text_projection = linear(text_width, config.region_embedding) if config.regions else None
        # Do not rename `patch_judge`: checkpoints contain this name.
        self.patch_judge = PatchHead(channels_of[config.patches], text_width) if config.patches else None
        self.word_projection = linear(text_width, config.region_embedding) if config.words else None
        self.word_region_projection = projection(config.words) if config.words else None
        self.self_attentions = nn.ModuleDict(
            {str(size): SelfAttention(channels_of[size]) for size in config.self_attention}
        )
        coarse = channels[1:] if config.skips else ()
        self.skips = nn.ModuleList(Convolution(3, c, size=1, gain=0.5 * gain) for c in coarse)

    def features(self, images: Tensor) -> Features:
        """images [B, 3, H, W] in [-1, 1] -> `Features`."""
        # Turn patches of pixels into channels, [B, C, H', W'] at the finest computed scale.
        x = self.stem(self.unshuffle(images).contiguous(memory_format=torch.channels_last))

        # Each scale halves the side, [B, C', H'/2, W'/2], down to 4 x 4. The finest region map is the stem's output,
        # which is linear in the pixels (layer 0 of Park et al. 2020); the other region maps are the outputs of the
        # blocks of their scales.
        region_maps, block_maps = {x.shape[-1]: x}, {}
        for i, blocks in enumerate(self.scales):
            x = self.downsamples[i - 1](x) if i else x
            if i and self.skips:
                x = x + self.skips[i - 1](F.avg_pool2d(images, images.shape[-1] // x.shape[-1]))
            for block in blocks:
                x = block(x)
            size = str(x.shape[-1])
            x = self.self_attentions[size](x) if size in self.self_attentions else x
            region_maps.setdefault(x.shape[-1], x)
            block_maps[x.shape[-1]] = x

        # The whole picture, [B, A], and the positions for the patch head, [B, P, C'].
        pooled = activate(self.pool(activate(x, inplace=False).flatten(1)))
        patches = None if self.patch_judge is None else self.patch_judge.embed(block_maps[self.patch_size])
        maps = tuple(region_maps[size] for size in self.region_sizes)
        return Features(pooled, maps, patches, block_maps.get(self.word_size))

    def adversarial(self, features: Features, sentence: Tensor) -> Tensor:
        """Features of B pictures, S_D sentences [B, E] of matching or other captions -> logits [B].

        With `patches`, the logits are [B, 2 * patches^2]: the whole picture's logit, repeated patches^2 times, and then
        the patch head's logits. A mean over a row therefore weights both equally.
        """
        # `projection` (Miyato & Koyama 2018): an unconditional logit plus the inner product of picture and condition,
        # here scaled by 1 / sqrt(A). `joint`: a perceptron on both, [B, 2A]. The result is [B, 1] for both.
        condition = self.condition(sentence)
        if self.joint:
            whole = self.realism(activate(self.hidden(torch.cat([features.pooled, condition], dim=1))))
        else:
            agreement = (features.pooled * condition).sum(1, keepdim=True) / condition.shape[1] ** 0.5
            whole = self.realism(features.pooled) + agreement
        if self.patch_judge is None:
            return whole[:, 0]

        # The same projection at each position, [B, P].
        patches = self.patch_judge(features.patches, sentence)
        return torch.cat([whole.expand_as(patches), patches], dim=1)

    def align_image(self, features: Features) -> Tensor:
        """Features of B pictures -> unit vectors [B, A]."""
        return F.normalize(self.image_projection(features.pooled).float(), dim=1)

    def align_text(self, sentence: Tensor) -> Tensor:
        """S_D sentences [B, E] -> unit vectors [B, A]."""
        return F.normalize(self.text_projection(sentence).float(), dim=1)

    def embed_pictures(self, features: Features) -> Embeddings:
        """Unit vectors: `image` [B, A] and, if configured, `regions` and `word_regions` [B, P, A'] by position."""
        embeddings = {"image": self.align_image(features)}
        if self.region_sizes:
            maps = [layer(x).flatten(2) for layer, x in zip(self.region_projections, features.maps, strict=True)]
            embeddings["regions"] = F.normalize(torch.cat(maps, dim=2).transpose(1, 2).float(), dim=2)
        if self.word_size:
            regions = self.word_region_projection(features.words).flatten(2).transpose(1, 2)
            embeddings["word_regions"] = F.normalize(regions.float(), dim=2)
        return embeddings

    def embed_captions(self, text: TextEmbedding) -> Embeddings:
        """Unit vectors: `text` [B, A]; if configured, `region_text` [B, A'] and `words` [B, T, A'] with `word_mask`."""
        embeddings = {"text": self.align_text(text.sentence)}
        if self.region_sizes:
            embeddings["region_text"] = F.normalize(self.region_text_projection(text.sentence).float(), dim=1)
        if self.word_size:
            embeddings["words"] = F.normalize(self.word_projection(text.words).float(), dim=2)
            embeddings["word_mask"] = text.mask
        return embeddings
