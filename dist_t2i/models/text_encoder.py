"""The text embeddings S_G and S_D: encoders of token ids, trained from scratch together with their network.

Legend of shapes: B batch, T tokens, E embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn

from dist_t2i.models.config import TextConfig


class TextEmbedding(NamedTuple):
    """The embeddings of a batch of captions; row i depends on caption i only."""

    sentence: Tensor  # [B, E], one vector per caption
    words: Tensor  # [B, T, E], one vector per token; zero where `mask` is False
    mask: Tensor  # [B, T] bool, True at the caption's tokens, False at padding


def token_mask(tokens: Tensor, lengths: Tensor) -> Tensor:
    """[B, T] bool, True at the first `lengths[i]` positions of row i."""
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


class _Together(torch.autograd.Function):
    """The identity. The backward pass waits for all gradients, and then returns the gradients in a fixed order."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class OrderedLSTM(nn.LSTM):
    """An LSTM whose parameters receive their gradients in an order that does not depend on the captions' lengths.

    ZeRO stage 2 fills its reduction buckets in the order in which gradients arrive. With packed sequences, this order
    depends on the captions' lengths, which differ between ranks. Without a fixed order, gradients of different
    parameters would silently be added.
    """

    def forward(self, input, hx=None):
        """Takes and returns the same as `nn.LSTM`."""
        parameters = self._flat_weights
        self._flat_weights = list(_Together.apply(*parameters))
        try:
            return super().forward(input, hx)
        finally:
            self._flat_weights = parameters


class LstmText(nn.Module):
    """A bidirectional LSTM, the default. The sentence is the last hidden state of both directions (AttnGAN, sec. 3.1).
    It is normalized over its width, because initial LSTM states are much smaller than the noise."""

    def __init__(self, vocab_size: int, embedding: int, layers: int = 1):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding, padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.lstm = OrderedLSTM(embedding, embedding // 2, layers, batch_first=True, bidirectional=True)
        self.width = embedding

    def forward(self, tokens: Tensor, lengths: Tensor) -> TextEmbedding:
        """tokens int64 [B, T], lengths int64 [B] (1 to T) -> `TextEmbedding`."""
        rows, sizes = self.embedding(tokens), lengths.cpu()
        states, (hidden, _) = self.lstm(rnn.pack_padded_sequence(rows, sizes, batch_first=True, enforce_sorted=False))
        words, _ = rnn.pad_packed_sequence(states, batch_first=True, total_length=tokens.shape[1])
        sentence = F.layer_norm(torch.cat([hidden[-2], hidden[-1]], dim=1), (self.width,))
        return TextEmbedding(sentence, words, token_mask(tokens, lengths))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a two-layer perceptron, both residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, E], mask [B, T] bool -> [B, T, E]; padding gets no attention."""
        rows, tokens, width = x.shape
        split = self.query_key_value(self.attention_norm(x)).view(rows, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(rows, tokens, width))
        return x + self.perceptron(self.perceptron_norm(x))


class TransformerText(nn.Module):
    """A small transformer with learned positions; the sentence is the mean over the caption's tokens."""

    def __init__(self, vocab_size: int, embedding: int, layers: int, heads: int, max_tokens: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding, padding_idx=0)
        self.position = nn.Embedding(max_tokens, embedding)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.position.weight, std=0.1)
        self.blocks = nn.ModuleList(TransformerBlock(embedding, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(embedding)
        self.width = embedding

    def forward(self, tokens: Tensor, lengths: Tensor) -> TextEmbedding:
        """tokens int64 [B, T <= max_tokens], lengths int64 [B] (1 to T) -> `TextEmbedding`."""
        mask = token_mask(tokens, lengths)
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x, mask)
        words = self.norm(x) * mask[:, :, None]
        return TextEmbedding(words.sum(1) / lengths[:, None].to(words.dtype), words, mask)


def build_text_encoder(text: TextConfig, vocab_size: int, max_tokens: int) -> nn.Module:
    """A new encoder, with `.width` (E) and forward(tokens int64 [B, T], lengths int64 [B]) -> `TextEmbedding`."""
    if text.encoder == "transformer":
        return TransformerText(vocab_size, text.embedding, text.layers, text.heads, max_tokens)
    return LstmText(vocab_size, text.embedding, text.layers)
