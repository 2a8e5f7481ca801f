"""The discriminator: one trunk, an adversarial branch and an alignment branch, both conditioned on S_D.

Legend of shapes: B batch, C channels, H W pixels, E text width, A alignment width, P positions of the region maps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_t2i.models.config import DiscriminatorConfig
from dist_t2i.models.layers import (
    FIRST_SIZE,
    SLOPE,
    DiscriminatorBlock,
    Downsample,
    activate,
    convolution,
    linear,
    patch_size,
)
from dist_t2i.models.text_encoder import TextEmbedding


class Features(NamedTuple):
    """What the trunk sees in pictures; computed once and read by both branches."""

    pooled: Tensor
    """[B, A], the whole picture."""
    maps: tuple[Tensor, ...]
    """One [B, C, H, W] for every size in `regions`, as configured."""
    patches: Tensor | None = None
    """[B, P, C], what is judged place by place; None when only whole pictures are."""
    words: Tensor | None = None
    """[B, C, H, W], what words are aligned with; None when only sentences are."""

    def rows(self, start: int, stop: int) -> Features:
        """The features of the pictures [start, stop) of the batch."""
        return self._each(lambda x: x[start:stop])

    def detach(self) -> Features:
        """The same values without their graph."""
        return self._each(Tensor.detach)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Features:
        patches, words = (None if x is None else function(x) for x in (self.patches, self.words))
        return Features(function(self.pooled), tuple(map(function, self.maps)), patches, words)


class PatchJudge(nn.Module):
    """A projection discriminator of its own at every place of a map (PatchGAN, Isola et al. 2017, with a caption)."""

    def __init__(self, channels: int, text_width: int, width: int = 64):
        super().__init__()
        self.embedding = convolution(channels, width, size=1)
        self.realism = linear(width, 1)
        self.condition = linear(text_width, width)

    def embed(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> places [B, H * W, C'], once for all the captions they are judged with."""
        return activate(self.embedding(F.leaky_relu(x, SLOPE))).flatten(2).transpose(1, 2)

    def forward(self, places: Tensor, sentence: Tensor) -> Tensor:
        """places [B, P, C'], sentence [B, E] -> logits [B, P]."""
        agreement = torch.bmm(places, self.condition(sentence)[:, :, None]) / places.shape[2] ** 0.5
        return (self.realism(places) + agreement)[:, :, 0]


class Discriminator(nn.Module):
    """Judges realism and agreement with a caption from one pass through the trunk.

    A picture enters as patches (pixel unshuffle down to the finest scale that `channels` lists). The adversarial branch
    is a projection discriminator (Miyato & Koyama 2018) or a joint one (a small perceptron on features beside
    sentence), for the whole picture and, where `patches` is configured, place by place. The alignment branch puts
    pictures, S_D sentences and, where `regions` are configured, the positions of region maps into spaces where InfoNCE
    compares them; where `words` are, S_D's words and the positions of a map as well. Our reading of the two branches.
    """

    def __init__(self, config: DiscriminatorConfig, image_size: int, text_width: int):
        super().__init__()
        channels, width = config.channels, config.embedding
        patch = patch_size(channels, image_size)
        sizes = [FIRST_SIZE * 2**i for i in reversed(range(len(channels)))]
        single = {
            name: (side,) if side else () for name, side in (("patches", config.patches), ("words", config.words))
        }
        for name, wanted in {"regions": config.regions, **single}.items():
            if not set(wanted) <= set(sizes):
                raise ValueError(f"discriminator.{name} {wanted} are not all computed scales ({sizes})")
        self.region_sizes, self.patch_size, self.word_size = config.regions, config.patches, config.words
        self.unshuffle = nn.PixelUnshuffle(patch)
        self.stem = convolution(3 * patch**2, channels[0], gain=1.0)
        self.downsamples = nn.ModuleList(Downsample(a, b) for a, b in pairwise(channels))
        self.scales = nn.ModuleList(
            nn.ModuleList(DiscriminatorBlock(c) for _ in range(config.blocks)) for c in channels
        )
        self.pool = linear(channels[-1] * FIRST_SIZE**2, width, gain=2**0.5)
        self.joint = config.condition == "joint"
        self.condition = linear(text_width, width)
        self.hidden = linear(2 * width, width, gain=2**0.5) if self.joint else None
        self.realism = linear(width, 1)
        self.image_projection = linear(width, width)
        self.text_projection = linear(text_width, width)
        channel_of = dict(zip(sizes, channels, strict=True))
        self.region_projections = nn.ModuleList(
            convolution(channel_of[size], config.region_embedding, size=1, gain=1.0) for size in config.regions
        )
        self.region_text_projection = linear(text_width, config.region_embedding) if config.regions else None
        self.patch_judge = PatchJudge(channel_of[config.patches], text_width) if config.patches else None
        self.word_projection = linear(text_width, config.region_embedding) if config.words else None
        self.word_region_projection = (
            convolution(channel_of[config.words], config.region_embedding, size=1, gain=1.0) if config.words else None
        )

    def features(self, images: Tensor) -> Features:
        """images [B, 3, H, W] in [-1, 1] -> `Features`."""
        x = self.stem(self.unshuffle(images).contiguous(memory_format=torch.channels_last))
        # The finest regions are the stem's, linear in the pixels (layer 0 of Park et al. 2020), the others the blocks'.
        maps, judged = {x.shape[-1]: x}, {}
        for i, blocks in enumerate(self.scales):
            x = self.downsamples[i - 1](x) if i else x
            for block in blocks:
                x = block(x)
            maps.setdefault(x.shape[-1], x)
            judged[x.shape[-1]] = x
        places = None if self.patch_judge is None else self.patch_judge.embed(judged[self.patch_size])
        pooled = activate(self.pool(F.leaky_relu(x, SLOPE).flatten(1)))
        return Features(pooled, tuple(maps[size] for size in self.region_sizes), places, judged.get(self.word_size))

    def adversarial(self, features: Features, sentence: Tensor) -> Tensor:
        """Features of B pictures, S_D sentences [B, E] of captions that may or may not be theirs -> logits.

        [B]; with `patches`, [B, 2 * patches^2]: the logits of the places, and the whole picture's as often again, so
        that a mean over a row weighs both alike.
        """
        condition = self.condition(sentence)
        if self.joint:
            whole = self.realism(activate(self.hidden(torch.cat([features.pooled, condition], dim=1))))
        else:
            agreement = (features.pooled * condition).sum(1, keepdim=True) / condition.shape[1] ** 0.5
            whole = self.realism(features.pooled) + agreement
        if self.patch_judge is None:
            return whole[:, 0]
        places = self.patch_judge(features.patches, sentence)
        return torch.cat([whole.expand_as(places), places], dim=1)

    def align_image(self, features: Features) -> Tensor:
        """Features of B pictures -> unit vectors [B, A]."""
        return F.normalize(self.image_projection(features.pooled).float(), dim=1)

    def align_text(self, sentence: Tensor) -> Tensor:
        """S_D sentences [B, E] -> unit vectors [B, A]."""
        return F.normalize(self.text_projection(sentence).float(), dim=1)

    def align_regions(self, features: Features) -> Tensor:
        """Features of B pictures -> a unit vector for each position of each region map, [B, P, A']."""
        maps = [layer(x).flatten(2) for layer, x in zip(self.region_projections, features.maps, strict=True)]
        return F.normalize(torch.cat(maps, dim=2).transpose(1, 2).float(), dim=2)

    def align_region_text(self, sentence: Tensor) -> Tensor:
        """S_D sentences [B, E] -> unit vectors [B, A'] in the space of the regions."""
        return F.normalize(self.region_text_projection(sentence).float(), dim=1)

    def align_words(self, words: Tensor) -> Tensor:
        """S_D words [B, T, E] -> unit vectors [B, T, A'] in the space of the positions that they may speak of."""
        return F.normalize(self.word_projection(words).float(), dim=2)

    def align_word_regions(self, features: Features) -> Tensor:
        """Features of B pictures -> a unit vector for each position of the map of the words, [B, P, A']."""
        return F.normalize(self.word_region_projection(features.words).flatten(2).transpose(1, 2).float(), dim=2)

    def embed_pictures(self, features: Features) -> Embeddings:
        """What the alignments compare of B pictures: `image` and, where they are configured, `regions`, `word_regions`."""
        embeddings = {"image": self.align_image(features)}
        if self.region_sizes:
            embeddings["regions"] = self.align_regions(features)
        if self.word_size:
            embeddings["word_regions"] = self.align_word_regions(features)
        return embeddings

    def embed_captions(self, text: TextEmbedding) -> Embeddings:
        """What they compare of B captions, read by S_D: `text`, and with these `region_text`, `words` and `word_mask`."""
        embeddings = {"text": self.align_text(text.sentence)}
        if self.region_sizes:
            embeddings["region_text"] = self.align_region_text(text.sentence)
        if self.word_size:
            embeddings["words"], embeddings["word_mask"] = self.align_words(text.words), text.mask
        return embeddings

    def forward(self, images: Tensor, sentence: Tensor) -> Tensor:
        """images [B, 3, H, W], sentence [B, E] -> adversarial logits [B]."""
        return self.adversarial(self.features(images), sentence)


Embeddings = dict[str, Tensor]
"""Tensors with one row a picture, by name."""
