"""The sections of the configuration that belong to the networks, and the rules within each.

To add a kind of generator, add its name to `GeneratorConfig.kind` and to `networks.GENERATORS`. If the kind has
settings, also add a section with its name. This module does not import torch, so that `--help-config` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dist_t2i.utils.settings import NOT_NEGATIVE, POSITIVE, SHARE, Bounds, Resume, at_least, section, setting

Problem = tuple[tuple[str, ...], str]
"""A pair: the keys involved, with the key to change first; and a text that says what is wrong and how to correct it."""


def default_channels(image_size: int) -> tuple[int, ...]:
    """Channels of the maps of side 4, 8, 16, ... up to full resolution, for pictures of this size.

    They are 256, 192, 128, 64, 32, and 16 from 128 px on: convolutions take most time at full resolution, and most
    weights are at the coarse scales.
    """
    widths = (256, 192, 128, 64, 32)
    return tuple(widths[scale] if scale < len(widths) else 16 for scale in range(image_size.bit_length() - 2))


@dataclass(frozen=True)
class AttnConfig:
    """Settings of the generator `attn` (models/attn_generator.py)."""

    scales: tuple[int, ...] = (8,)
    """Sides, in positions, of the maps that attend to S_G's words."""
    heads: int = 4
    """Number of attention heads, each with its own weights over the words. The heads share the map's channels."""
    width: int = 32
    """Width of queries and keys, summed over all heads."""


@dataclass(frozen=True)
class GeneratorConfig:
    kind: Literal["plain", "attn"] = "plain"
    """Kind of generator (docs/models.md). `model.generator: KIND` is short for `model.generator.kind: KIND`."""
    noise: int = setting(64, at_least(1))
    """Width of the noise vector z."""
    truncation: float = setting(1.0, NOT_NEGATIVE, Resume.FREE)
    """Factor on all noise at inference, unless the caller sets another factor. Below 1, pictures are more typical and
    less varied."""
    condition: int = setting(128, at_least(1))
    """Width of the augmented condition (conditioning augmentation: StackGAN, sec. 3.2)."""
    channels: tuple[int, ...] = setting(default_channels(64), at_least(1), earlier=(256, 256, 128, 64))
    """Channels of the computed maps, of side 4, 8, 16, ... If the last is smaller than the picture, a pixel shuffle turns
    it into the picture. The default depends on data.image_size (shown: for 64 px)."""
    blocks: int = setting(1, at_least(1))
    """Residual blocks per scale."""
    detail: int = 8
    """Channels at full resolution between the pixel shuffle and a last convolution, which smooths the shuffle's grid.
    0: no last convolution. Ignored if full resolution is a computed scale."""
    colors: int = 0
    """Number of colors in a palette that is computed from the condition. Each pixel mixes these colors and consists
    mostly of one, so that areas of one color in drawings are flat. 0: no palette; the color of each pixel is computed
    directly, which suits photographs."""
    color_sharpness: float = setting(1.0, POSITIVE, Resume.FREE)
    """Inverse temperature of the palette's softmax at inference. Above 1, lines that averaging blurs are sharper."""
    layout: int = setting(0, earlier=2048)
    """Count of numbers that a matrix computes from the condition and adds to a scale's map, as layout / size^2
    channels: a cheap way to store layouts. Only scales with at least 4 such channels have a layout; 0: no layouts."""
    mapping: int = 0
    """Layers of a network that maps noise and condition to what modulates the maps (StyleGAN2). 0: no such network."""
    self_attention: tuple[int, ...] = ()
    """Sides, in positions, of the maps whose positions attend to each other (GigaGAN, sec. 3.2)."""
    skips: bool = False
    """Whether every scale adds its own part to the picture (StyleGAN2, sec. 4.1: output skips)."""
    attn: AttnConfig = section(AttnConfig)

    def problems(self) -> Iterator[Problem]:
        """The problems within this section, regardless of the rest of the configuration."""
        for kind, options in vars(self).items():
            for option in (
                dataclasses.fields(options) if dataclasses.is_dataclass(options) and kind != self.kind else ()
            ):
                if getattr(options, option.name) != option.default:
                    why = f"is only read by the generator {kind}, but model.generator.kind is {self.kind}"
                    yield (f"{kind}.{option.name}", "kind"), f"{why}: set model.generator.kind={kind} or leave this out"
        if not set(self.self_attention) <= set(scales(self.channels)):
            yield ("self_attention", "channels"), not_computed("generator", self.self_attention, self.channels)
        if self.colors == 1:
            yield ("colors",), "a picture of one color shows nothing: set at least 2, or 0 for no palette"
        if self.color_sharpness != 1.0 and not self.colors:
            yield ("color_sharpness", "colors"), "only applies to a palette: set colors, or leave this out"
        if self.kind == "attn":
            yield from self._attention_problems()

    def _attention_problems(self) -> Iterator[Problem]:
        attn = self.attn
        if not attn.scales or not set(attn.scales) <= set(scales(self.channels)):
            yield ("attn.scales", "channels"), not_computed("generator", attn.scales, self.channels)
            return
        if attn.heads < 1 or attn.width % attn.heads:
            yield ("attn.width", "attn.heads"), f"must be a multiple of attn.heads={attn.heads}, is {attn.width}"
            return
        for side, channels in zip(scales(self.channels), self.channels, strict=True):
            if side in attn.scales and channels % attn.heads:
                text = f"must divide the {channels} channels of the map of side {side}, is {attn.heads}"
                yield ("attn.heads", "channels"), text


@dataclass(frozen=True)
class DiscriminatorConfig:
    channels: tuple[int, ...] = setting(default_channels(64)[::-1], at_least(1), earlier=(64, 128, 256, 256))
    """Channels from the finest computed scale down to 4 pixels. The default depends on data.image_size (shown: for 64
    px)."""
    blocks: int = setting(1, at_least(1))
    """Residual blocks per scale."""
    embedding: int = setting(256, at_least(1))
    """Width of the alignment space, in which images and S_D sentences are compared."""
    condition: Literal["projection", "joint"] = "projection"
    """How the adversarial branch uses S_D: `projection` (Miyato & Koyama 2018), or `joint` (a perceptron on both)."""
    regions: tuple[int, ...] = setting((), earlier=(8,))
    """Sides, in positions, of the maps that are aligned by position; empty: only whole pictures are aligned."""
    patches: int = 0
    """Side, in positions, of the map that a patch head scores by position; 0: only whole pictures are scored."""
    words: int = setting(8, earlier=0)
    """Side, in positions, of the map aligned with S_D's words (AttnGAN, sec. 3.2); 0: only sentences are aligned."""
    region_embedding: int = 64
    """Width of the spaces in which regions are compared with each other and with words."""
    self_attention: tuple[int, ...] = ()
    """Sides, in positions, of the maps whose positions attend to each other (GigaGAN, sec. 3.2)."""
    skips: bool = False
    """Whether every scale also reads the picture, shrunk to its side (StyleGAN2, sec. 4.1: input skips)."""

    def problems(self) -> Iterator[Problem]:
        """The problems within this section, regardless of the rest of the configuration."""
        for name in ("regions", "patches", "words", "self_attention"):
            value = getattr(self, name)
            sides = value if isinstance(value, tuple) else (value,) if value else ()
            if not set(sides) <= set(scales(self.channels)):
                yield (name, "channels"), not_computed("discriminator", sides, self.channels)


def scales(channels: tuple[int, ...]) -> list[int]:
    """Sides of the maps that a network with these channels computes: 4, 8, 16, ... positions."""
    return [4 * 2**scale for scale in range(len(channels))]


def not_computed(network: str, sides: tuple[int, ...], channels: tuple[int, ...]) -> str:
    """The message for a setting that asks for maps of `sides` when the network does not compute all of these maps."""
    given, computed = ", ".join(map(str, sides)) or "the list", ", ".join(map(str, scales(channels)))
    return f"{given} must be among the scales that model.{network}.channels computes: {computed}"


@dataclass(frozen=True)
class TextConfig:
    mode: Literal["dual", "shared", "frozen"] = "dual"
    """`dual`: separate encoders S_G and S_D; `shared`: one encoder for both losses; `frozen`: a given embedding."""
    encoder: Literal["lstm", "transformer"] = "lstm"
    """Architecture of the text encoders."""
    embedding: int = setting(256, at_least(2))
    """Width of a sentence or word embedding (both directions of the LSTM together)."""
    layers: int = setting(1, at_least(1))
    """Layers of each text encoder."""
    heads: int = setting(4, at_least(1))
    """Attention heads; transformer only."""
    frozen: str = setting("", resume=Resume.CHECKED)
    """`mode: frozen` only: an exported folder whose encoder is reused, or a .safetensors table of caption vectors."""


@dataclass(frozen=True)
class AugmentConfig:
    """Differentiable augmentation (Zhao et al. 2020) of all pictures that D sees, real and fake."""

    translation: float = setting(0.125, Bounds(0, 1, below=True))
    """Largest shift as a share of the side."""
    color: float = setting(0.0, SHARE)
    """Strength of brightness, saturation and contrast jitter, 0 to 1."""
    cutout: float = setting(0.0, Bounds(0, 1, below=True))
    """Side of the square that is blanked, as a share of the picture's side."""


@dataclass(frozen=True)
class ModelConfig:
    generator: GeneratorConfig = section(GeneratorConfig)
    discriminator: DiscriminatorConfig = section(DiscriminatorConfig)
