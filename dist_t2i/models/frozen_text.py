"""Text encoders without trainable parameters (text.mode=frozen)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_t2i.models.text_encoder import TextEmbedding


class PretrainedEncoder(nn.Module):
    """A text encoder of `text_encoder.py` whose weights are loaded and fixed; its output carries no gradient."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.width = encoder.width

    @torch.no_grad()
    def forward(self, tokens: Tensor, lengths: Tensor) -> TextEmbedding:
        """tokens int64 [B, T], lengths int64 [B] -> `TextEmbedding`."""
        return self.encoder(tokens, lengths)


class CaptionTable(nn.Module):
    """Caption vectors that were computed in advance, for example by a sentence encoder. The keys are token ids.

    vectors: float [N, E]; tokens: int64 [N, T] and lengths: int64 [N], as the run's tokenizer encodes the captions. A
    caption that is not in the table gets the mean of all vectors. The only word embedding of a caption is its sentence
    vector.
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
        rows = [self.rows.get(self._key(row, n), -1) for row, n in zip(tokens.cpu(), lengths.cpu(), strict=True)]
        sentence = self.vectors[torch.tensor(rows, device=self.vectors.device)]
        return TextEmbedding(sentence, sentence[:, None], tokens.new_ones(len(rows), 1, dtype=torch.bool))
