"""Where a network's text embedding comes from in each text.mode, and how a shared encoder learns from both losses.

A parameter belongs to only one engine, so in text.mode=shared the autograd graph is cut at the embedding. Each network
reads a detached copy of the embedding: a leaf of the graph. The `backward` of the network's engine stores the gradient
in this leaf, and `propagate` backpropagates this gradient through the encoder's engine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_t2i.distributed.engine import NetworkEngine
from dist_t2i.models.text_encoder import TextEmbedding


class PerNetworkText:
    """text.mode=dual: each network encodes with its own encoder, inside its own engine."""

    embedding: TextEmbedding | None = None  # the input of the network; None if the network has its own encoder

    def propagate(self, network: NetworkEngine, rate_scale: float) -> None:
        """Does nothing, because the network's `backward` has already reached the network's encoder."""


class FrozenText(PerNetworkText):
    """text.mode=frozen: a constant embedding, in the network's `dtype`."""

    def __init__(self, frozen: nn.Module, tokens: Tensor, lengths: Tensor, dtype: torch.dtype) -> None:
        sentence, words, mask = frozen(tokens, lengths)
        self.embedding = TextEmbedding(sentence.detach().to(dtype), words.detach().to(dtype), mask)


class SharedText(PerNetworkText):
    """text.mode=shared: one encoder for both networks, and a detached copy of its embedding for each network."""

    embedding: TextEmbedding

    def __init__(self, engine: NetworkEngine, tokens: Tensor, lengths: Tensor) -> None:
        self._engine, self._encoded = engine, engine.module(tokens, lengths)
        self.embedding = TextEmbedding(*(x.detach().requires_grad_(x.is_floating_point()) for x in self._encoded))

    def propagate(self, network: NetworkEngine, rate_scale: float) -> None:
        """Backpropagate the leaf's gradient through the encoder, as one micro-step of the encoder's engine. Call this
        after `network.backward`.

        The network's engine has multiplied the gradient by a loss scale and averaged the gradient over micro-batches.
        The encoder's engine averages a second time, over the encoder's micro-steps. `factor` removes the loss scale and
        cancels the second average.
        """
        factor = self._engine.accumulation / network.loss_scale
        pairs = zip(self._encoded, self.embedding, strict=True)
        terms = [(part * leaf.grad * factor).sum() for part, leaf in pairs if leaf.grad is not None]
        self._engine.backward(sum(terms[1:], start=terms[0]))
        self._engine.step(rate_scale)
