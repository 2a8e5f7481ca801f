"""Given text embeddings (text.mode=frozen): where they come from, and how an exported model carries them along.

Two sources, named by `text.frozen`:

* an exported folder: its S_D (or its shared or frozen encoder) reads the captions. Token ids are that folder's, so the
  run must use the same tokenizer.
* a `.safetensors` table: one tensor `vectors` [N, E] and, in the file's metadata, `captions`: a JSON list of the N
  texts, in the same order. Any sentence encoder can write one; a text that is not in it gets the mean vector.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dist_t2i.errors import UserError
from dist_t2i.models.config import TextConfig
from dist_t2i.models.frozen_text import CaptionTable, FrozenText
from dist_t2i.models.text_encoder import build_text_encoder
from dist_t2i.utils.tensors import fill, read_metadata, read_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dist_t2i.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class FrozenSource:
    """A given encoder as data: what an export stores, and what `build` makes a module from."""

    about: dict[str, Any]
    """JSON-able: `{"kind": "table"}`, or `{"kind": "encoder", "text": {...}, "vocab_size": n, "max_tokens": n}`."""
    tensors: dict[str, Tensor]
    """A table's `vectors`, `tokens`, `lengths`, or an encoder's parameters."""
    where: Path
    """The file they came from, for messages."""

    def build(self) -> nn.Module:
        """A module with `.width` and forward(tokens, lengths) -> `TextEmbedding`, on the CPU. Raises UserError."""
        try:
            if self.about["kind"] == "table":
                return CaptionTable(*(self.tensors[name] for name in ("vectors", "tokens", "lengths")))
            text = TextConfig(**self.about["text"])
            with torch.device("meta"):
                encoder = build_text_encoder(text, self.about["vocab_size"], self.about["max_tokens"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.where}: not a frozen text encoder ({error}); export the model again") from None
        return FrozenText(fill(encoder, self.tensors, "", self.where)).eval()


def load_frozen(text: TextConfig, tokenizer: Tokenizer, max_tokens: int) -> nn.Module:
    """The given encoder that the configuration names; see `FrozenSource.build` and `frozen_source`."""
    return frozen_source(text, tokenizer, max_tokens).build()


def frozen_source(text: TextConfig, tokenizer: Tokenizer, max_tokens: int) -> FrozenSource:
    """What `text.frozen` names, for captions of up to `max_tokens` tokens of `tokenizer`.

    Raises UserError when that is neither an exported folder nor a table, or one made with another tokenizer.
    """
    path = Path(text.frozen)
    if path.is_dir():
        return _from_export(path, tokenizer, max_tokens)
    if path.suffix == ".safetensors":
        return _from_table(path, tokenizer, max_tokens)
    raise UserError(
        f"text.frozen={path}: neither an exported folder (tools/export.py makes one) nor a .safetensors table"
    )


def _from_export(folder: Path, tokenizer: Tokenizer, max_tokens: int) -> FrozenSource:
    from dist_t2i.modelfiles import read_export

    source = read_export(folder)
    if source.tokenizer != tokenizer:
        raise UserError(
            f"text.frozen={folder}: its encoder was trained with another tokenizer than this set's;\n"
            "both models must be trained on sets that share one tokenizer.json"
        )
    limit = source.config.data.max_tokens
    if source.config.text.encoder == "transformer" and limit < max_tokens:
        raise UserError(f"text.frozen={folder}: its transformer reads {limit} tokens: set data.max_tokens to that")
    if source.frozen is not None:
        return source.frozen
    prefix = "text_d." if source.config.text.mode == "dual" else "text."
    found = {k.removeprefix(prefix): v for k, v in source.discriminator.items() if k.startswith(prefix)}
    about = {"kind": "encoder", "text": dataclasses.asdict(source.config.text), "max_tokens": limit}
    return FrozenSource(about | {"vocab_size": tokenizer.vocab_size}, found, folder / "discriminator.safetensors")


def _from_table(path: Path, tokenizer: Tokenizer, max_tokens: int) -> FrozenSource:
    tensors = read_tensors(path)
    try:
        captions = json.loads(read_metadata(path).get("captions", "null"))
    except ValueError:
        captions = None
    vectors = tensors.get("vectors")
    if vectors is None or vectors.ndim != 2 or not isinstance(captions, list) or len(captions) != len(vectors):
        raise UserError(
            f"text.frozen={path}: a table needs a tensor `vectors` [N, E] and, in the file's metadata, `captions`: "
            "a JSON list of N texts"
        )
    tokens, lengths = tokenizer.encode([str(caption) for caption in captions], max_tokens)
    return FrozenSource({"kind": "table"}, {"vectors": vectors, "tokens": tokens, "lengths": lengths}, path)
