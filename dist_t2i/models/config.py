"""What the networks can be told: the sections of the configuration that belong to them, and the rules within each.

A kind of generator adds its name to `GeneratorConfig.kind` and, where it has settings of its own, a section of that name;
what it is, is in `registry.py`. Nothing here imports torch: `--help-config` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Problem = tuple[tuple[str, ...], str]
"""Keys of the section, the one to change first, and what is wrong with a remedy."""


@dataclass(frozen=True)
class AttnConfig:
    """What the generator `attn` can be told besides (models/attn.py)."""

    scales: tuple[int, ...] = (8,)
    """Sides, in positions, of the maps that read S_G's words, position by position."""
    heads: int = 4
    """Attention heads: how many words a position can tell apart at a time. They share out the map's channels."""
    width: int = 32
    """Width of the space in which positions look for words, over all heads."""


@dataclass(frozen=True)
class GeneratorConfig:
    kind: Literal["plain", "attn"] = "plain"
    """Which generator (docs/models.md). `model.generator: KIND` is short for it."""
    noise: int = 64
    """Width of the noise vector z."""
    truncation: float = 1.0
    """Factor on all noise where pictures are made and scored, not in training: below 1 they are more typical and less
    varied. Whoever makes pictures may ask for another."""
    condition: int = 128
    """Width of the augmented condition (conditioning augmentation: StackGAN, sec. 3.2)."""
    channels: tuple[int, ...] = (256, 256, 128, 64)
    """Channels at 4, 8, 16, ... pixels, up to the last scale that is computed; the rest is pixel shuffle."""
    blocks: int = 1
    """Residual blocks per scale."""
    detail: int = 8
    """Channels at full resolution between the pixel shuffle and the last convolution, which smooths its grid; 0 goes
    straight to colours. Unused when full resolution is a computed scale."""
    colours: int = 0
    """How many colours a picture is mixed from, which its condition gives: sharp shares of them at every pixel, so that
    what is of one colour in drawings is of one colour. 0: every pixel has a colour of its own, as photographs want."""
    colour_sharpness: float = 1.0
    """Factor on how decided those shares are where pictures are made and scored, not in training: above 1 the lines are
    crisper than the weights' average alone draws them."""
    layout: int = 2048
    """Numbers per scale that the condition draws straight into the map (as layout / size^2 channels, where that is at
    least 4): a cheap memory of where things are. 0 leaves it out."""
    attn: AttnConfig = field(default_factory=AttnConfig)

    def problems(self) -> Iterator[Problem]:
        """What cannot work, whatever the rest of the configuration says."""
        for kind in dataclasses.fields(self):
            section = getattr(self, kind.name)
            if not dataclasses.is_dataclass(section) or kind.name == self.kind:
                continue
            for option in dataclasses.fields(section):
                if getattr(section, option.name) != option.default:
                    yield (
                        (f"{kind.name}.{option.name}", "kind"),
                        f"is only read by the generator {kind.name}, but model.generator.kind is {self.kind}: "
                        f"set model.generator.kind={kind.name} or leave this out",
                    )
        if self.colours == 1:
            yield ("colours",), "a picture of one colour shows nothing: at least 2, or 0 for colours pixel by pixel"
        if self.colour_sharpness != 1.0 and not self.colours:
            yield (
                ("colour_sharpness", "colours"),
                "is of the few colours that pictures are mixed from: set colours, or leave this out",
            )
        if self.kind == "attn":
            yield from self._attention_problems()

    def _attention_problems(self) -> Iterator[Problem]:
        computed, attn = scales(self.channels), self.attn
        if not attn.scales or not set(attn.scales) <= set(computed):
            yield ("attn.scales", "channels"), not_computed("generator", attn.scales, computed)
            return
        if attn.heads < 1 or attn.width % attn.heads:
            yield ("attn.width", "attn.heads"), f"must be a multiple of attn.heads={attn.heads}, is {attn.width}"
            return
        for side in attn.scales:
            channels = self.channels[computed.index(side)]
            if channels % attn.heads:
                text = f"must divide the {channels} channels of the map of side {side}, is {attn.heads}"
                yield ("attn.heads", "channels"), text


@dataclass(frozen=True)
class DiscriminatorConfig:
    channels: tuple[int, ...] = (64, 128, 256, 256)
    """Channels from the finest computed scale down to 4 pixels."""
    blocks: int = 1
    """Residual blocks per scale."""
    embedding: int = 256
    """Width of the alignment space: images and S_D sentences are compared there."""
    condition: Literal["projection", "joint"] = "projection"
    """How the adversarial branch reads S_D: projection (Miyato & Koyama 2018) or a perceptron on both."""
    regions: tuple[int, ...] = (8,)
    """Sides, in positions, of the maps that are aligned region by region; empty aligns whole pictures only."""
    patches: int = 0
    """Side, in positions, of the map where realism and caption are judged place by place as well; 0 judges whole
    pictures only."""
    words: int = 0
    """Side, in positions, of the map whose positions S_D's words are aligned with, word by word (AttnGAN, sec. 3.2); 0
    aligns sentences only."""
    region_embedding: int = 64
    """Width of the spaces in which regions are compared, with each other and with words."""

    def problems(self) -> Iterator[Problem]:
        """What cannot work, whatever the rest of the configuration says."""
        computed = scales(self.channels)
        single = {name: (side,) if side else () for name, side in (("patches", self.patches), ("words", self.words))}
        for name, sides in {"regions": self.regions, **single}.items():
            if not set(sides) <= set(computed):
                yield (name, "channels"), not_computed("discriminator", sides, computed)


@dataclass(frozen=True)
class AlignmentConfig:
    """Weights, by the names of `alignment.py`'s terms, and temperatures of the contrasts; the head of section `loss`."""

    d_alignment: float = 1.0
    """Weight of D's InfoNCE between real pictures and their captions."""
    d_alignment_regions: float = 1.0
    """The same for the positions of D's region maps (0 when there are none)."""
    g_alignment_text: float = 1.0
    """Weight of G's InfoNCE between its pictures and S_D of their captions."""
    g_alignment_image: float = 1.0
    """Weight of G's InfoNCE between its pictures and the real pictures of the same captions."""
    g_alignment_regions: float = 1.0
    """The same, position by position of D's region maps (0 when there are none)."""
    temperature: float = 0.1
    """Temperature of the InfoNCE losses on whole pictures and sentences."""
    region_negatives: int = 0
    """Other places of its map with which each position of a fake's region map is contrasted as well, besides the same place
    of other pictures. They pull where all pictures look alike, such as a plain ground."""
    region_temperature: float = 0.1
    """Temperature of the InfoNCE losses on regions."""
    d_alignment_words: float = 1.0
    """Weight of D's InfoNCE between real pictures and the words of their captions (0 when D aligns no words)."""
    g_alignment_words: float = 1.0
    """Weight of G's, between its pictures and S_D's words of their captions."""
    word_temperature: float = 0.1
    """Temperature of the InfoNCE losses on words."""
    word_sharpness: float = 5.0
    """How sharply a word picks its regions, and a caption's likeness its best words (AttnGAN: gamma 1 and gamma 2)."""

    def problems(self) -> Iterator[Problem]:
        """What cannot work, whatever the rest of the configuration says."""
        for name in ("region_temperature", "word_temperature", "word_sharpness"):
            if not getattr(self, name) > 0:
                yield (name,), f"must be above 0, is {getattr(self, name):g}"


def scales(channels: tuple[int, ...]) -> list[int]:
    """Sides of the maps that a network with these channels computes: 4, 8, 16, ... positions."""
    return [4 * 2**scale for scale in range(len(channels))]


def not_computed(network: str, sides: tuple[int, ...], computed: list[int]) -> str:
    """What is wrong with maps of these sides, some of which the network does not compute."""
    return (
        f"{', '.join(map(str, sides)) or 'the list'} must be among the scales that model.{network}.channels computes: "
        f"{', '.join(map(str, computed))}"
    )


@dataclass(frozen=True)
class TextConfig:
    mode: Literal["dual", "shared", "frozen"] = "dual"
    """`dual`: S_G and S_D apart; `shared`: one encoder that both losses train; `frozen`: a given embedding."""
    encoder: Literal["lstm", "transformer"] = "lstm"
    """Architecture of the text encoders."""
    embedding: int = 256
    """Width of a sentence or word embedding (both directions of the LSTM together)."""
    layers: int = 1
    """Layers of each text encoder."""
    heads: int = 4
    """Attention heads; transformer only."""
    frozen: str = ""
    """`mode: frozen` only: an exported folder whose encoder is reused, or a .safetensors table of caption vectors."""


@dataclass(frozen=True)
class AugmentConfig:
    """Differentiable augmentation (Zhao et al. 2020) of what D sees, real and fake alike."""

    translation: float = 0.125
    """Largest shift as a share of the side."""
    color: float = 0.0
    """Strength of brightness, saturation and contrast jitter, 0 to 1."""
    cutout: float = 0.0
    """Side of the square that is blanked, as a share of the picture's."""


@dataclass(frozen=True)
class ModelConfig:
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
