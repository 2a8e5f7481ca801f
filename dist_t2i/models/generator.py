"""The plain generator turns noise and a sentence into a picture in one stage. Other kinds are subclasses (networks.py).

Legend of shapes: B batch, Z noise, E text width, C channels or condition width, N width of noise and condition
together, T words, H W pixels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_t2i.models.config import GeneratorConfig
from dist_t2i.models.layers import (
    FIRST_SIZE,
    SLOPE,
    Convolution,
    Modulation,
    SelfAttention,
    activate,
    linear,
    patch_size,
    repeat_in_patches,
    residual_gain,
)
from dist_t2i.models.source_encoder import SourceGuide


class Generated(NamedTuple):
    """Pictures, and the Gaussian from which conditioning augmentation sampled their condition."""

    images: Tensor  # [B, 3, H, W] in [-1, 1]; edited pictures may lie slightly outside
    mean: Tensor  # [B, C]
    log_variance: Tensor  # [B, C]


INITIAL_LOG_VARIANCE = -4.0
"""Initial log variance of the condition. The value is low (StackGAN's is near 0), so that the condition stays close to
its mean and the text has an effect from the first step."""


class ConditionAugmentation(nn.Module):
    """Samples the condition from a Gaussian. The sentence determines its mean and variance (StackGAN, sec. 3.2)."""

    def __init__(self, text_width: int, condition: int):
        super().__init__()
        self.statistics = linear(text_width, 2 * condition)
        nn.init.constant_(self.statistics.bias[condition:], INITIAL_LOG_VARIANCE)
        nn.init.zeros_(self.statistics.weight[condition:])

    def forward(self, sentence: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sentence [B, E], noise [B, C] (standard normal; 0 for the mean) -> condition, mean, log variance [B, C]."""
        mean, log_variance = self.statistics(sentence).chunk(2, dim=1)
        log_variance = log_variance.clamp(-8.0, 8.0)
        # Reparameterization, so that gradients reach mean and variance (StackGAN, sec. 3.2): c = mu + sigma * eps.
        return mean + noise * (0.5 * log_variance).exp(), mean, log_variance


class GeneratorBlock(nn.Module):
    """A residual block of two 3x3 convolutions, each after a text-conditioned modulation."""

    def __init__(self, channels: int, condition: int, gain: float = 0.5):
        super().__init__()
        self.modulation1 = Modulation(channels, condition)
        self.conv1 = Convolution(channels, channels)
        self.modulation2 = Modulation(channels, condition)
        self.conv2 = Convolution(channels, channels, gain=gain)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, C, H, W], condition [B, N] -> [B, C, H, W]."""
        y = self.conv1(activate(self.modulation1(x, condition)))
        return x + self.conv2(activate(self.modulation2(y, condition)))


class Upsample(nn.Module):
    """Doubles the side: a 1x1 convolution to the next scale's channels, then repetition of each position."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = Convolution(inputs, outputs, size=1, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', 2H, 2W]."""
        return F.interpolate(self.conv(x), scale_factor=2, mode="nearest")


class Mapping(nn.Sequential):
    """Maps noise and condition, [B, N], to what modulates the maps, [B, N] (StyleGAN, Karras et al. 2019, sec. 2).

    A modulation alone is linear in noise and condition, so it can add but not combine them. The layers can.
    """

    def __init__(self, width: int, layers: int):
        super().__init__(
            *(part for _ in range(layers) for part in (linear(width, width, gain=2**0.5), nn.LeakyReLU(SLOPE)))
        )


class Layout(nn.Module):
    """Adds a map of `values` numbers that a matrix computes from the condition: a cheap store of layouts. Our idea."""

    def __init__(self, condition: int, channels: int, size: int, values: int):
        super().__init__()
        self.size = size
        self.draw = linear(condition, values // size**2 * size**2)  # do not rename it: checkpoints contain `draw`
        self.conv = Convolution(values // size**2, channels, size=1, gain=0.5)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, C, H, W], condition [B, N] -> [B, C, H, W]."""
        layout = self.draw(condition).view(len(x), -1, self.size, self.size)
        return x + self.conv(layout.contiguous(memory_format=torch.channels_last))


class ToRGB(nn.Module):
    """Turns the last map into `outputs` values per pixel: convolution, pixel shuffle, a convolution if `detail` > 0."""

    def __init__(self, channels: int, detail: int, patch: int, outputs: int):
        super().__init__()
        fresh = Convolution(channels, (detail or outputs) * patch**2, gain=2**0.5 if detail else 1.0)
        self.conv = repeat_in_patches(fresh, patch)
        self.shuffle = nn.PixelShuffle(patch)
        self.smooth = Convolution(detail, outputs, gain=1.0) if detail else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, outputs, patch * H, patch * W], unbounded."""
        x = self.shuffle(self.conv(x))
        return x if self.smooth is None else self.smooth(activate(x.contiguous(memory_format=torch.channels_last)))


class PaletteMix(nn.Module):
    """Mixes each pixel's color from a palette that is computed from the condition. Our idea: where the softmax of the
    shares saturates, areas of one color in a drawing are flat."""

    SHARPNESS = 3.0
    """Inverse temperature of the softmax; above 1, so that each pixel leans towards one color from the start."""

    def __init__(self, condition: int, colors: int, inference_sharpness: float = 1.0):
        super().__init__()
        self.palette = linear(condition, 3 * colors)
        self.inference_sharpness = inference_sharpness

    def forward(self, logits: Tensor, condition: Tensor) -> Tensor:
        """logits [B, colors, H, W], condition [B, N] -> pictures [B, 3, H, W] in [-1, 1]."""
        sharpness = self.SHARPNESS * (1.0 if self.training else self.inference_sharpness)
        shares = (sharpness * logits).float().softmax(dim=1).to(logits.dtype)
        colors = torch.tanh(self.palette(condition)).unflatten(1, (-1, 3))
        return torch.einsum("bkhw,bkc->bchw", shares, colors)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """x [B, C, H, W] -> [B, C, factor * H, factor * W], bilinear, so that no grid shows."""
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


class Generator(nn.Module):
    """Single-stage generator, conditioned at every scale on noise and the augmented sentence. Callers pass in all
    noise.

    Convolutions compute only the scales that `channels` lists; a pixel shuffle of the last map replaces the finer
    scales. Thus a small budget of computation is spent at scales where convolutions cost little per parameter.
    """

    def __init__(self, config: GeneratorConfig, image_size: int, text_width: int):
        super().__init__()
        width, channels, blocks = config.noise + config.condition, config.channels, range(config.blocks)
        self.channels_of = {str(FIRST_SIZE * 2**i): c for i, c in enumerate(channels)}
        self.augmentation = ConditionAugmentation(text_width, config.condition)
        self.first = linear(width, channels[0] * FIRST_SIZE**2)
        self.upsamples = nn.ModuleList(Upsample(a, b) for a, b in pairwise(channels))
        gain = 0.5 * residual_gain(len(blocks) * len(channels))
        self.scales = nn.ModuleList(nn.ModuleList(GeneratorBlock(c, width, gain) for _ in blocks) for c in channels)
        self.layouts = nn.ModuleDict()
        for size, c in self.channels_of.items():
            if int(size) > FIRST_SIZE and config.layout >= 4 * int(size) ** 2:
                self.layouts[size] = Layout(width, c, int(size), config.layout)
        self.last_modulation = Modulation(channels[-1], width)
        patch = patch_size(channels, image_size)
        self.last = ToRGB(channels[-1], config.detail if patch > 1 else 0, patch, config.colors or 3)
        # Do not rename `colours`: checkpoints contain this name.
        self.colours = PaletteMix(width, config.colors, config.color_sharpness) if config.colors else None
        self.noise_width, self.condition_width = config.noise, config.condition
        self.mapping = Mapping(width, config.mapping) if config.mapping else None
        self.self_attentions = nn.ModuleDict(
            {str(size): SelfAttention(self.channels_of[str(size)]) for size in config.self_attention}
        )
        coarse = channels[:-1] if config.skips else ()
        self.skips = nn.ModuleList(Convolution(c, config.colors or 3, size=1, gain=gain) for c in coarse)
        self.patch = patch

    def forward(
        self,
        noise: Tensor,
        sentence: Tensor,
        words: Tensor,
        mask: Tensor,
        condition_noise: Tensor,
        source: SourceGuide | None = None,
    ) -> Generated:
        """noise [B, Z], sentence [B, E], words [B, T, E], mask bool [B, T], condition_noise [B, C] -> `Generated`.

        `source` guides the edit of source pictures. This class ignores the words; subclasses may read them.
        """
        # Conditioning augmentation (StackGAN, sec. 3.2) gives the condition [B, C], with the noise [B, N].
        condition, mean, log_variance = self.augmentation(sentence, condition_noise)
        condition = torch.cat([noise.to(condition.dtype), condition], dim=1)
        condition = condition if self.mapping is None else self.mapping(condition)

        # The first map, [B, C, 4, 4].
        x = self.first(condition).view(len(noise), -1, FIRST_SIZE, FIRST_SIZE)
        x = x.contiguous(memory_format=torch.channels_last)

        coarse: Tensor | None = None  # the parts of the picture that the scales so far have added
        # Each scale doubles the side, [B, C', 2H, 2W]. Before a scale's blocks, the layout (our own), the source and
        # the words are added to its map. The blocks then modulate the map by the condition (DF-GAN, sec. 3.3).
        for i, blocks in enumerate(self.scales):
            x = self.upsamples[i - 1](x) if i else x
            size = str(x.shape[-1])
            x = self.layouts[size](x, condition) if size in self.layouts else x
            x = x if source is None else source.add(x)
            x = self.read_words(x, words, mask)
            for block in blocks:
                x = block(x, condition)
            x = self.self_attentions[size](x) if size in self.self_attentions else x
            coarse = self._add_skip(i, x, coarse)

        # To pixels: [B, 3, H, W], or the logits of the palette's shares [B, colors, H, W].
        last = activate(self.last_modulation(x, condition))
        output = self.last(last)
        output = output if coarse is None else output + enlarge(coarse, self.patch)
        images = torch.tanh(output) if self.colours is None else self.colours(output, condition)

        # In an edit, each pixel keeps a share of the source (GANimation, sec. 3.1).
        return Generated(images if source is None else source.blend(last, images), mean, log_variance)

    def _add_skip(self, scale: int, x: Tensor, coarse: Tensor | None) -> Tensor | None:
        """The sum of the coarser scales' parts of the picture, enlarged to the map x, and the part of this scale."""
        coarse = None if coarse is None else enlarge(coarse, 2)
        if scale >= len(self.skips):
            return coarse
        part = self.skips[scale](activate(x, inplace=False))
        return part if coarse is None else coarse + part

    def read_words(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """A scale's map x [B, C, H, W] after attending to words [B, T, E], mask bool [B, T]. This class returns x
        itself."""
        return x
