"""Where each side's text embedding comes from, and how a shared encoder learns from both losses.

A parameter lives in one engine only. So in text.mode=shared the graph is cut at the embedding: each side sees a leaf, its
engine's `backward` leaves the gradient there, and `carry` takes it on through the encoder's own engine.
"""

from __future__ import annotations

from torch import Tensor, nn

from dist_t2i.distributed.engine import NetworkEngine
from dist_t2i.models.text_encoder import TextEmbedding


class OwnText:
    """text.mode=dual: each side encodes inside its own engine; there is nothing to give and nothing to carry."""

    embedding: TextEmbedding | None = None

    def carry(self, source: NetworkEngine, rate_scale: float) -> None:
        """Nothing: the side's own backward reached its encoder."""


class GivenText(OwnText):
    """text.mode=frozen: a constant embedding."""

    def __init__(self, frozen: nn.Module, tokens: Tensor, lengths: Tensor, engine: NetworkEngine):
        sentence, words, mask = frozen(tokens, lengths)
        self.embedding = TextEmbedding(sentence.detach().to(engine.dtype), words.detach().to(engine.dtype), mask)


class SharedText(OwnText):
    """text.mode=shared: one encoder, one leaf for each use of it."""

    def __init__(self, engine: NetworkEngine, tokens: Tensor, lengths: Tensor):
        self._engine = engine
        self._encoded: TextEmbedding = engine.module(tokens, lengths)
        self.embedding = TextEmbedding(
            *(part.detach().requires_grad_(part.is_floating_point()) for part in self._encoded)
        )

    def carry(self, source: NetworkEngine, rate_scale: float) -> None:
        """After `source.backward`: the leaf's gradient through the encoder, as one of the encoder's micro-steps.

        `source` has put its loss scale and a mean over its micro-batches into the gradient. The encoder's engine averages
        over twice as many (one for each side), which is taken back here.
        """
        factor = self._engine.accumulation / source.loss_scale
        leaves = zip(self._encoded, self.embedding, strict=True)
        self._engine.backward(sum((part * leaf.grad * factor).sum() for part, leaf in leaves if leaf.grad is not None))
        self._engine.step(rate_scale)
