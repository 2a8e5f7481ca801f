"""Text encoders that no loss changes (text.mode=frozen)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_t2i.models.text_encoder import TextEmbedding


class FrozenText(nn.Module):
    """An encoder that no loss changes: it has no parameters that require a gradient, and its output carries none.

    `encoder` is any module of this file, already loaded with its weights.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.width = encoder.width

    @torch.no_grad()
    def forward(self, tokens: Tensor, lengths: Tensor) -> TextEmbedding:
        """tokens int64 [B, T], lengths int64 [B] -> `TextEmbedding`."""
        return self.encoder(tokens, lengths)


class CaptionTable(nn.Module):
    """Caption vectors computed beforehand (by a sentence encoder, say), looked up by the caption's token ids.

    `vectors` is float [N, E]; `tokens` int64 [N, T] and `lengths` int64 [N] are the N captions as the run's tokenizer
    encodes them. A caption that is not in the table gets the mean of all vectors: a table cannot embed new text.
    `words` is the sentence vector as a single token.
    """

    def __init__(self, vectors: Tensor, tokens: Tensor, lengths: Tensor):
        super().__init__()
        self.register_buffer("vectors", torch.cat([vectors.float(), vectors.float().mean(0, keepdim=True)]))
        self.rows = {self._key(row, length): i for i, (row, length) in enumerate(zip(tokens, lengths, strict=True))}
        self.width = vectors.shape[1]

    @staticmethod
    def _key(tokens: Tensor, length: Tensor) -> tuple[int, ...]:
        return tuple(tokens[: int(length)].tolist())

    def forward(self, tokens: Tensor, lengths: Tensor) -> TextEmbedding:
        """tokens int64 [B, T], lengths int64 [B] -> `TextEmbedding` whose words are [B, 1, E]."""
        unknown = len(self.vectors) - 1
        rows = [self.rows.get(self._key(row, n), unknown) for row, n in zip(tokens.cpu(), lengths.cpu(), strict=True)]
        sentence = self.vectors[torch.tensor(rows, device=self.vectors.device)]
        return TextEmbedding(sentence, sentence[:, None], tokens.new_ones(len(rows), 1, dtype=torch.bool))
