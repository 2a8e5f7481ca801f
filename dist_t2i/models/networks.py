"""The networks of a run, grouped by the engine that owns their parameters. No parameter belongs to two engines.

    text.mode   generator engine        discriminator engine        text engine   outside
    dual        generator, text_g       discriminator, text_d       -             -
    shared      generator               discriminator               text          -
    frozen      generator               discriminator               -             a frozen encoder

With edit.width, the generator's engine also owns the encoder of source pictures, `source`.
The names in this table are the prefixes of the parameters in checkpoints and exported models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from dist_t2i.models.attn_generator import AttnGenerator
from dist_t2i.models.config import ModelConfig, TextConfig
from dist_t2i.models.discriminator import Discriminator
from dist_t2i.models.generator import Generated, Generator
from dist_t2i.models.source_encoder import SourceEncoder
from dist_t2i.models.text_encoder import TextEmbedding, build_text_encoder


class GeneratorSide(nn.Module):
    """The generator, S_G unless it is shared or frozen, and the encoder of source pictures when editing."""

    def __init__(self, generator: Generator, text_g: nn.Module | None, source: SourceEncoder | None = None):
        super().__init__()
        self.generator, self.text_g, self.source = generator, text_g, source

    def forward(
        self,
        noise: Tensor,
        condition_noise: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        text: TextEmbedding | None,
        pictures: Tensor | None = None,
        given: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Generated:
        """Pictures for B captions. `text`: S_G if shared or frozen. For `pictures` and `given` see `SourceEncoder`.

        rows: int64 [R], the caption of each row of noise; by default the B rows of noise have one caption each.
        """
        text = text if self.text_g is None else self.text_g(tokens, lengths)
        if rows is not None:
            text = TextEmbedding(*(x[rows] for x in text))
            pictures, given = (None if x is None else x[rows] for x in (pictures, given))
        guide = None if pictures is None else self.source(pictures, text, given)
        return self.generator(noise, text.sentence, text.words, text.mask, condition_noise, guide)


class DiscriminatorSide(nn.Module):
    """The discriminator, and S_D unless it is shared or frozen."""

    def __init__(self, discriminator: Discriminator, text_d: nn.Module | None):
        super().__init__()
        self.discriminator, self.text_d = discriminator, text_d

    def forward(self, function: Callable[[DiscriminatorSide], Any]) -> Any:
        """Returns `function(self)`. `function` contains everything that a loss computes with this side, because ZeRO's
        hooks require a single forward call."""
        return function(self)

    def encode(self, tokens: Tensor, lengths: Tensor, text: TextEmbedding | None) -> TextEmbedding:
        """The S_D embedding of B captions, which is the given `text` if S_D is shared or frozen."""
        return self.text_d(tokens, lengths) if self.text_d is not None else cast(TextEmbedding, text)


class TextSide(nn.Module):
    """The encoder that both sides share (text.mode=shared)."""

    def __init__(self, text: nn.Module):
        super().__init__()
        self.text = text

    def forward(self, tokens: Tensor, lengths: Tensor) -> TextEmbedding:
        return self.text(tokens, lengths)


@dataclass(frozen=True)
class Networks:
    """Randomly initialized networks. `text` is set only in text.mode=shared, `frozen` only in text.mode=frozen."""

    generator: GeneratorSide
    discriminator: DiscriminatorSide
    text: TextSide | None
    frozen: nn.Module | None


def build_networks(
    model: ModelConfig,
    text: TextConfig,
    *,
    image_size: int,
    max_tokens: int,
    vocab_size: int,
    edit_width: int = 0,
    frozen: nn.Module | None = None,
) -> Networks:
    """Networks for pictures of `image_size` pixels. The initial weights come from torch's global random generator,
    which the caller must seed first.

    `frozen` is the encoder of text.mode=frozen, with `.width` and forward(tokens, lengths) -> TextEmbedding.
    `edit_width` (channels) above 0 adds the encoder of source pictures. Raises ValueError for sizes that do not fit.
    """
    encoder = partial(build_text_encoder, text, vocab_size, max_tokens)
    dual, width = text.mode == "dual", frozen.width if frozen is not None else text.embedding
    generator = GENERATORS[model.generator.kind](model.generator, image_size, width)
    discriminator = Discriminator(model.discriminator, image_size, width)
    generator_side = GeneratorSide(generator, encoder() if dual else None)
    discriminator_side = DiscriminatorSide(discriminator, encoder() if dual else None)
    shared = TextSide(encoder()) if text.mode == "shared" else None
    if edit_width:  # built last, so that it does not change the random numbers of the other networks
        generator_side.source = SourceEncoder(edit_width, model.generator.channels, image_size, width)
    return Networks(generator_side, discriminator_side, shared, frozen)


GENERATORS: dict[str, type[Generator]] = {"plain": Generator, "attn": AttnGenerator}
