"""Where a network's text embedding comes from in each text.mode, and how a shared encoder learns from both losses.

A parameter belongs to one engine only, so in text.mode=shared the graph is cut at the embedding: each network reads a leaf,
its engine's `backward` leaves the gradient there, and `propagate` continues it through the encoder's engine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_t2i.distributed.engine import NetworkEngine
from dist_t2i.models.text_encoder import TextEmbedding


class PerNetworkText:
    """text.mode=dual: each network encodes with its own encoder, inside its own engine."""

    embedding: TextEmbedding | None = None  # for the network to read; None where it encodes for itself

    def propagate(self, network: NetworkEngine, rate_scale: float) -> None:
        """Nothing to do: the network's own backward has reached its encoder."""


class FrozenText(PerNetworkText):
    """text.mode=frozen: a constant embedding, in the network's `dtype`."""

    def __init__(self, frozen: nn.Module, tokens: Tensor, lengths: Tensor, dtype: torch.dtype) -> None:
        sentence, words, mask = frozen(tokens, lengths)
        self.embedding = TextEmbedding(sentence.detach().to(dtype), words.detach().to(dtype), mask)


class SharedText(PerNetworkText):
    """text.mode=shared: one encoder, and a leaf for each network that reads it."""

    embedding: TextEmbedding

    def __init__(self, engine: NetworkEngine, tokens: Tensor, lengths: Tensor) -> None:
        self._engine, self._encoded = engine, engine.module(tokens, lengths)
        self.embedding = TextEmbedding(*(x.detach().requires_grad_(x.is_floating_point()) for x in self._encoded))

    def propagate(self, network: NetworkEngine, rate_scale: float) -> None:
        """After `network.backward`: take the leaf's gradient through the encoder, as one of the encoder's micro-steps.

        The gradient carries the network's loss scale, and the network's engine has averaged it over its micro-batches. The
        encoder's engine averages over twice as many micro-steps, one for each network; `factor` corrects for both.
        """
        factor = self._engine.accumulation / network.loss_scale
        pairs = zip(self._encoded, self.embedding, strict=True)
        terms = [(part * leaf.grad * factor).sum() for part, leaf in pairs if leaf.grad is not None]
        self._engine.backward(sum(terms[1:], start=terms[0]))
        self._engine.step(rate_scale)
