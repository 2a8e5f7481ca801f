"""The generator `attn`, whose maps attend to S_G's words (AttnGAN, Xu et al. 2018, sec. 3.1, in one stage).

Legend of shapes: B batch, T words, E text width, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from dist_t2i.models.config import GeneratorConfig
from dist_t2i.models.generator import Generator
from dist_t2i.models.layers import WordAttention


class AttnGenerator(Generator):
    """The plain generator, with attention to the words before the blocks of each scale in `attn.scales`."""

    def __init__(self, config: GeneratorConfig, image_size: int, text_width: int):
        super().__init__(config, image_size, text_width)
        self.attentions = nn.ModuleDict()
        for size, channels in self.channels_of.items():
            if int(size) in config.attn.scales:
                self.attentions[size] = WordAttention(channels, text_width, config.attn.width, config.attn.heads)

    def read_words(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """x [B, C, H, W], words [B, T, E], mask bool [B, T] -> [B, C, H, W]."""
        size = str(x.shape[-1])
        return self.attentions[size](x, words, mask) if size in self.attentions else x
