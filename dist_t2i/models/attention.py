"""Maps that read a caption's words, position by position (AttnGAN, Xu et al. 2018, sec. 3.1).

Legend of shapes: B batch, T words, E text width, C channels, P positions of a map, N width of queries and keys.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dist_t2i.models.blocks import linear


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
