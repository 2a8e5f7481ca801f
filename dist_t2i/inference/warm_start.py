"""Starts a run from a trained model on another set: the model's vocabulary grows by the tokens of the set.

The embedding of a new token is at first the mean of the embeddings of the two tokens that its merge joins, since the
model has read the word as these tokens so far. A new character has no parts: its embedding is random, with the spread
of the trained ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.utils.seeds import Purpose, mix

if TYPE_CHECKING:
    from torch import Tensor

    from dist_t2i.inference.model_files import ModelFiles

_TABLES = ("text_g.embedding.weight", "text_d.embedding.weight", "text.embedding.weight")
"""Names of the token embeddings of S_G, of S_D, and of the encoder of text.mode=shared."""


def with_tokens(files: ModelFiles, tokenizer: Tokenizer, seed: int) -> ModelFiles:
    """The model with embeddings for all tokens of `tokenizer`, whose first tokens are the model's own (see `grown`)."""
    generator, discriminator = (_grown(part, tokenizer, seed) for part in (files.generator, files.discriminator))
    return replace(files, tokenizer=tokenizer, generator=generator, discriminator=discriminator)


def _grown(tensors: Mapping[str, Tensor], tokenizer: Tokenizer, seed: int) -> dict[str, Tensor]:
    tables = {
        name: grown_rows(tensors[name], tokenizer, mix(seed, number, Purpose.NEW_TOKENS))
        for number, name in enumerate(_TABLES)
        if name in tensors
    }
    return {**tensors, **tables}


def grown_rows(rows: Tensor, tokenizer: Tokenizer, seed: int) -> Tensor:
    """Embeddings float32 [V, E] of the first V tokens -> [vocab_size, E]: these rows, and one for each other token."""
    random = torch.Generator().manual_seed(seed)
    known, missing = rows.float(), tokenizer.vocab_size - len(rows)
    spread = known[1:].std()  # row 0 is the padding, always zero
    table = torch.cat([known, torch.randn(missing, known.shape[1], generator=random) * spread])
    for token in range(len(rows), len(table)):
        if parts := tokenizer.parts.get(token):
            table[token] = table[list(parts)].mean(0)
    return table


def about(files: ModelFiles) -> dict[str, Any]:
    """What a run records about the model that it starts from: its name, without a path, and what identifies it."""
    name = files.config.run.name or files.folder.resolve().name
    return {"name": name, "weights_sha256": files.sha256(), "images": files.images}


def started_from(init: Mapping[str, Any]) -> str:
    """What `about` returned, as a clause without a final period."""
    seen, sha256 = f"{init['images']:,} images seen", f"SHA-256 of the weights {init['weights_sha256']}"
    return f"Training started from the model {init['name']} ({seen}, {sha256})"
